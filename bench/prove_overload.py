"""Proves that a worker which is asked ten times what it can do goes on doing what it can.

First its peak is measured, with as many batches under way as give the most answers. Then batches come at ten
times that rate, whether the ones before are answered or not. Those it cannot answer must be refused at once,
with a Retry-After; as many as at its peak must be answered, in time; and when the rush is over, a request
must soon take no longer than before.

make prove-overload [LONG=1] [SEED=n]
"""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from bench.data import open_stage, sample_lead_ids
from bench.figures import Figure
from bench.load import Sample, build_request, cycle, run_load
from bench.proof import ProofRun, run_proof
from bench.servers import start_service

PROMISE = "ten times too many requests are refused at once, and cost no answer that could be given"
LEADS = 10_000
BATCH = 2_000  # the dearest request, so that a refusal costs little beside an answer
PEAK_CONNECTIONS = 8
TIMES_PEAK = 10
IN_TIME_SECONDS = 1.0
NORMAL_IN_A_ROW = 3
GIVE_UP_SECONDS = 10.0


def measure(run: ProofRun) -> Sequence[Figure]:
    """Measures with a rush of 6 seconds, or of a minute in the long run."""
    return uvloop.run(_measure(run, 60.0 if run.long else 6.0))


def no_limit(run: ProofRun) -> Sequence[Figure]:
    """The same with a service that lets everybody in."""
    return uvloop.run(_measure(run, 3.0, plant="no-limit"))


async def _measure(run: ProofRun, seconds: float, plant: str | None = None) -> Sequence[Figure]:
    with (
        open_stage(Path("var/bench"), LEADS) as stage,
        tempfile.TemporaryDirectory() as directory,
        start_service(
            "overload",
            stage,
            Path(directory),
            plant=plant,
            ML_PREDICTION_CACHE_TTL_SECONDS="0",
            DATABASE_DEADLINE_SECONDS=str(IN_TIME_SECONDS),
        ) as server,
    ):
        ids = sample_lead_ids(stage.url, LEADS, run.seed % 100 / 100)
        batches = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
        requests = cycle([build_request(json.dumps(batch).encode()) for batch in batches])
        alone, peak = Sample(), Sample()
        await run_load(server.port, requests, alone, connections=1, seconds=2, at_least=20)
        await run_load(
            server.port, requests, peak, connections=PEAK_CONNECTIONS, seconds=seconds / 2, at_least=50
        )
        rush = _Rush(server.port, requests)
        await rush.run(peak.rate * TIMES_PEAK, seconds)
        back = await rush.wait_until_normal(2 * statistics.median(alone.milliseconds) / 1000)
    shed = sorted(rush.shed) or [GIVE_UP_SECONDS]
    return (
        Figure(
            f"answers in time, of the peak ({peak.rate:.0f}/s of {BATCH} leads)",
            rush.in_time / seconds / peak.rate, 0.9, at_least=True,
        ),
        Figure(f"p99 of {len(rush.shed)} refusals", shed[int(0.99 * len(shed))] * 1000, 50, unit="ms"),
        Figure("refusals without a Retry-After of 1 to 3 s", rush.without_retry_after, 0, unit=""),
        Figure("neither answered nor refused", rush.other, 0, unit=""),
        Figure("normal again after", back, 2, unit="s"),
    )  # fmt: skip


@dataclass
class _Rush:
    """Requests that come at a rate, each on a connection that is free or new."""

    port: int
    requests: Iterator[bytes]
    in_time: int = 0
    shed: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    other: int = 0
    _free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    _over: float = 0.0

    async def run(self, rate: float, seconds: float) -> None:
        """Sends `rate` requests a second; returns when that is over, not when they are answered."""
        began = time.perf_counter()
        self._over = began + seconds
        self._tasks = set()
        sent = 0
        while (now := time.perf_counter()) < self._over:
            for _ in range(int((now - began) * rate) - sent):
                self._tasks.add(asyncio.create_task(self._ask()))
                sent += 1
            await asyncio.sleep(0.002)

    async def wait_until_normal(self, seconds: float) -> float:
        """Returns how long after the rush the first of a few came that took at most `seconds` each."""
        request, streak, first = next(self.requests), 0, 0.0
        while streak < NORMAL_IN_A_ROW and time.perf_counter() - self._over < GIVE_UP_SECONDS:
            began = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request)
            status, _ = await _read(reader)
            writer.close()
            normal = status == 200 and time.perf_counter() - began <= seconds
            streak = streak + 1 if normal else 0
            first = began - self._over if streak == 1 else first
        for task in self._tasks:
            task.cancel()
        return max(first, 0.0) if streak else GIVE_UP_SECONDS

    async def _ask(self) -> None:
        began = time.perf_counter()
        try:
            connection = (
                self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self.port)
            )
            connection[1].write(next(self.requests))
            status, retry_after = await _read(connection[0])
        except (OSError, asyncio.IncompleteReadError):
            self.other += 1
            return
        self._free.append(connection)
        took = time.perf_counter() - began
        if status == 200:
            self.in_time += took <= IN_TIME_SECONDS and began + took <= self._over
        elif status == 503:
            self.shed.append(took)
            self.without_retry_after += retry_after not in (b"1", b"2", b"3")
        else:
            self.other += 1


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Reads one answer; returns its status and its Retry-After."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(_value(head, b"content-length")))
    return int(head[9:12]), _value(head, b"retry-after")


def _value(head: bytes, name: bytes) -> bytes:
    return head.partition(b"\r\n" + name + b": ")[2].partition(b"\r\n")[0]


if __name__ == "__main__":
    run_proof(PROMISE, measure, {"no limit": no_limit})
