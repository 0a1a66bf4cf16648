"""Proves that memory does not grow: not with the number of requests, and not with the size of a body.

One service gets requests of every kind (`bench.request_kinds`) over several connections at once. What is
held is the resident set of its whole process tree (Rss of /proc/PID/smaps_rollup), read when nothing is under
way: after a warm-up in which the largest requests have met, and at the end. Then bodies of 100 MB are sent,
whatever the service says to them, and the peak it reached meanwhile (VmHWM) is compared with what it held
before.

make prove-memory [LONG=1] [SEED=n]
"""

import asyncio
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import psycopg
import uvloop

from bench.data import Stage, open_stage, sample_lead_ids
from bench.figures import Figure
from bench.hostile_cases import SCORE
from bench.load import read_answer
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.request_kinds import Kind, list_kinds
from bench.servers import Server, start_service

PROMISE = "memory grows neither with the requests that were answered nor with the size of a body"
LEADS = 10_000
CACHE_SIZE = 2_000  # full, and forgetting, before anything is measured
CONNECTIONS = 16
REQUESTS, LONG_REQUESTS = 100_000, 10_000_000
FEWEST, LONGEST_SECONDS = 12_000, 75.0
WARM_UP = 0.15  # of the requests that are counted, on top
ROUND = 50_000  # requests after which the events that have come are taken out of the database again
PAUSE_SECONDS = 0.05  # of a client that was refused
READINGS, BETWEEN_SECONDS = 5, 0.1
REFUSED = 503
BODY_BYTES, PIECE_BYTES = 100_000_000, 1 << 16
HEAD = f"POST {SCORE} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n".encode()


def measure(run: ProofRun) -> Sequence[Figure]:
    """Measures with as many of 100,000 requests as there is time for, or with ten million in the long run."""
    with _serve() as (stage, server):
        client = _Client(server, run.seed, sample_lead_ids(stage.url, LEADS, run.seed % 100 / 100))
        count, seconds = (LONG_REQUESTS, float("inf")) if run.long else (REQUESTS, LONGEST_SECONDS)
        drift = uvloop.run(client.measure_drift(stage.url, count, seconds))
        return (*drift, *_measure_bodies(server))


def keeps_bodies(run: ProofRun) -> Sequence[Figure]:
    """The drift of a service that keeps every body."""
    return _plant_drift(run, "keeps-bodies", 1_000, "50 leads", "500 leads")


def keeps_notes(run: ProofRun) -> Sequence[Figure]:
    """The drift of a service that keeps a note of each request, half a kilobyte."""
    return _plant_drift(run, "keeps-notes", 12_000, "1 lead, asked before")


def reads_first(_run: ProofRun) -> Sequence[Figure]:
    """What a body costs a service that reads all of it before it says no."""
    with _serve("reads-first") as (_, server):
        return _measure_bodies(server)


def _plant_drift(run: ProofRun, plant: str, count: int, *only: str) -> Sequence[Figure]:
    """Returns the drift over as many requests of the kinds in which the bug shows soonest."""
    with _serve(plant) as (stage, server):
        client = _Client(server, run.seed, sample_lead_ids(stage.url, LEADS, run.seed % 100 / 100), only)
        return uvloop.run(client.measure_drift(stage.url, count, float("inf")))[:1]


@contextmanager
def _serve(plant: str | None = None) -> Iterator[tuple[Stage, Server]]:
    with (
        open_stage(Path("var/bench"), LEADS) as stage,
        tempfile.TemporaryDirectory() as directory,
        start_service(
            "memory", stage, Path(directory), plant=plant, ML_PREDICTION_CACHE_SIZE=str(CACHE_SIZE)
        ) as server,
    ):
        yield stage, server


class _Client:
    """Sends what is drawn, over several connections at once, and counts what came of it."""

    def __init__(self, server: Server, seed: int, lead_ids: Sequence[str], only: Sequence[str] = ()) -> None:
        self.wrong: Counter[str] = Counter()
        self.refused = 0
        self._server = server
        self._random = Random(seed)  # noqa: S311
        self._kinds = [kind for kind in list_kinds(lead_ids) if not only or kind.name in only]
        self._left = 0

    async def measure_drift(self, url: str, count: int, seconds: float) -> Sequence[Figure]:
        """Sends `count` requests, or at least `FEWEST` of them until `seconds` are over."""
        largest = [kind for kind in self._kinds if kind.name == "2,000 leads"]
        await self._send(20 * CONNECTIONS, largest or self._kinds)
        await self._send(int(WARM_UP * min(count, REQUESTS)), self._kinds)
        before, began, sent = await self._settle(), time.perf_counter(), 0
        self.refused = 0
        while sent < count and (sent < FEWEST or time.perf_counter() - began < seconds):
            sent += await self._send(min(FEWEST // 10, count - sent), self._kinds)
            if sent % ROUND == 0:
                _forget_events(url)
        after = await self._settle()
        if self.wrong:
            print(f"other answers than are right: {dict(self.wrong)}")
        return (
            Figure(
                f"resident set, drift over {sent:,} requests ({before:.1f} MB)",
                after / before - 1,
                0.01,
                unit="",
            ),
            Figure("requests", sent, min(FEWEST, count), at_least=True, unit=""),
            Figure("answers that are not the right ones", self.wrong.total(), 0, unit=""),
            Figure(
                "refused and asked again, share", self.refused / sent, 0.01, unit="", binding=False
            ),  # how busy the machine is with something else
        )

    async def _settle(self) -> float:
        """Returns the resident megabytes when nothing is under way."""
        readings = []
        for _ in range(READINGS):
            await asyncio.sleep(BETWEEN_SECONDS)
            readings.append(self._server.resident_megabytes())
        return statistics.median(readings)

    async def _send(self, count: int, kinds: Sequence[Kind]) -> int:
        self._left = count
        await asyncio.gather(*(self._keep_sending(kinds) for _ in range(CONNECTIONS)))
        return count

    async def _keep_sending(self, kinds: Sequence[Kind]) -> None:
        shares, streams = [kind.share for kind in kinds], None
        while self._left > 0:
            self._left -= 1
            kind = self._random.choices(kinds, shares)[0]
            streams = streams or await asyncio.open_connection("127.0.0.1", self._server.port)
            reader, writer = streams
            writer.write(kind.draw(self._random))
            ends = True
            if kind.status is not None:
                try:
                    status, ends, body = await read_answer(reader)
                except (OSError, asyncio.IncompleteReadError):
                    status, body = 0, b""
                if status == REFUSED and b'"OVERLOADED"' in body:  # not wrong, and nothing was answered
                    self.refused += 1
                    self._left += 1
                    await asyncio.sleep(PAUSE_SECONDS)
                elif status != kind.status:
                    self.wrong[f"{kind.name}: {status}"] += 1
            else:
                with suppress(OSError):
                    await writer.drain()
            if ends:
                writer.close()
                streams = None
        if streams:
            streams[1].close()


def _forget_events(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE ai_events")


def _measure_bodies(server: Server) -> Sequence[Figure]:
    declared = HEAD + b"Content-Length: %d\r\n\r\n" % BODY_BYTES, b" " * PIECE_BYTES
    chunked = (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        b"%x\r\n%s\r\n" % (PIECE_BYTES, b" " * PIECE_BYTES),
    )
    return [
        Figure(f"a 100 MB body {name}, most more that is held", _measure_body(server, *sent), 5, unit="MB")
        for name, sent in (("of declared length", declared), ("in chunks", chunked))
    ]


def _measure_body(server: Server, head: bytes, piece: bytes) -> float:
    """Sends the body to its end, or until the connection is closed; returns MB."""
    before = server.resident_megabytes()
    server.forget_peak()
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as client,
        suppress(ConnectionError),
    ):
        client.sendall(head)
        for _ in range(BODY_BYTES // PIECE_BYTES):
            client.sendall(piece)
        client.recv(1 << 16)
    return server.peak_megabytes() - before


if __name__ == "__main__":
    run_proof(
        PROMISE,
        measure,
        {
            "every body is kept": PlantedBug(keeps_bodies, "resident set, drift over *"),
            "a note of each request is kept": PlantedBug(keeps_notes, "resident set, drift over *"),
            # Either way: memory that the first body took may still be held, and serve the second.
            "all is read before it is refused": PlantedBug(
                reads_first, "a 100 MB body *, most more that is held"
            ),
        },
    )
