"""Proves that slow clients cost the good ones nothing, and that none of them stays.

The service is put under a light load by a few good clients. Then slow ones come: some connect and say
nothing, some send headers or a body byte by byte, some ask for answers they do not read. Every one must be
cut off within the deadline and a second, and the good clients must hardly notice.

make prove-slow-clients [LONG=1] [SEED=n]
"""

import asyncio
import json
import re
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import uvloop
from numpy.random import Generator, default_rng

from bench.data import open_stage, sample_lead_ids
from bench.figures import Figure
from bench.load import PATH, Sample, ask, build_request, cycle, run_load
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.servers import start_service

PROMISE = "slow clients are cut off within the deadline and a second, and cost the good ones nothing"
LEADS = 10_000
GOOD_CLIENTS = 4
GOOD_SECONDS = 8.0
TRICKLE_SHARE = 1 / 12  # of the deadline, between two bytes
GRACE_SECONDS = 1.0
STALLED = 20
SETTLING_SECONDS = 0.3
ANSWERS_NOT_READ = 60  # some 6 MB, more than the kernel buffers for a reader that stalls

_HEAD = f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n".encode()


def measure(run: ProofRun) -> Sequence[Figure]:
    """Measures with a few hundred slow clients, or 10,000 in the long run."""
    return uvloop.run(_measure(run, 10_000 if run.long else 300, deadline=10.0 if run.long else 3.0))


def stock_protocol(run: ProofRun) -> Sequence[Figure]:
    """The same with uvicorn's own protocol, which waits for ever."""
    return uvloop.run(_measure(run, 20, deadline=1.0, plant="stock-protocol"))


async def _measure(
    run: ProofRun, slow: int, *, deadline: float, plant: str | None = None
) -> Sequence[Figure]:
    settings = {"AI_CLIENT_DEADLINE_SECONDS": str(deadline)}
    with (
        open_stage(Path("var/bench"), LEADS) as stage,
        tempfile.TemporaryDirectory() as directory,
        start_service("slow-clients", stage, Path(directory), plant=plant, **settings) as server,
    ):
        ids = sample_lead_ids(stage.url, 500, run.seed % 100 / 100)
        requests = cycle([build_request(json.dumps([lead_id]).encode()) for lead_id in ids])
        seconds = 1.0 if plant else GOOD_SECONDS
        alone, beside = Sample(), Sample()
        await run_load(server.port, requests, alone, connections=GOOD_CLIENTS, seconds=seconds, at_least=100)
        longest = deadline + GRACE_SECONDS
        stalled = await _stall(server.port, deadline)
        crowd = asyncio.create_task(_crowd(server.port, slow, default_rng(run.seed), deadline))
        await run_load(server.port, requests, beside, connections=GOOD_CLIENTS, seconds=longest, at_least=100)
        lives = [*await crowd, *stalled]
    return (
        Figure("good clients' p99 beside slow ones, of that alone", _ratio(beside, alone), 2.0),
        Figure("slow clients still there after deadline + 1 s", float(lives.count(None)), 0, unit=""),
        Figure(
            f"longest stay of {len(lives)} slow clients (deadline {deadline:g} s)",
            max((life for life in lives if life is not None), default=0.0), longest, unit="s",
        ),
    )  # fmt: skip


def _ratio(beside: Sample, alone: Sample) -> float:
    return beside.percentile(0.99) / alone.percentile(0.99)


async def _crowd(port: int, count: int, draw: Generator, deadline: float) -> list[float | None]:
    """Returns how long each slow client was let stay, in seconds; None for those that were not cut off."""
    kinds = (b"", b"POST /a", _HEAD + b"Content-Length: 2000\r\n\r\n[")
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number in range(count):
            client = await _Slow.connect(port)
            stay = client.stay(kinds[number % len(kinds)], b"x", draw.uniform(0, 1), deadline)
            tasks.append(group.create_task(stay))
            if number % 10 == 9:
                await asyncio.sleep(deadline / 2 * 10 / count)  # in a stream, and all there before one leaves
    return [task.result() for task in tasks]


async def _stall(port: int, deadline: float) -> list[float | None]:
    """Does what `_crowd` does with clients that do not read their answers."""
    models = json.loads(await ask(port, b"GET /ai/advanced-ml/models HTTP/1.1\r\nHost: bench\r\n\r\n"))
    page = f"GET {models['available'][0]['card']} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
    clients = [await _Slow.connect(port, reads=False) for _ in range(STALLED)]
    for client in clients:
        client.transport.write(page * ANSWERS_NOT_READ)
    # A stay begins when the kernel's buffers are full and the service has stopped answering.
    answered, before = await _count_pages(port), -1.0
    while answered > before:
        await asyncio.sleep(SETTLING_SECONDS)
        answered, before = await _count_pages(port), answered
    return await asyncio.gather(*(client.stay(b"", b"\r\n", 0, deadline) for client in clients))


async def _count_pages(port: int) -> float:
    text = (await ask(port, b"GET /metrics HTTP/1.1\r\nHost: bench\r\n\r\n")).decode()
    found = re.search(r'leadscore_requests_total\{code="",route="[^"]*/card",status="200"\} (\S+)', text)
    return float(found[1]) if found else 0.0


class _Slow(asyncio.Protocol):
    """A connection that gives the server little, and learns when the server ends it."""

    def __init__(self) -> None:
        self.transport: Any = None
        self._gone: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(cls, port: int, *, reads: bool = True) -> Self:
        plug = socket.socket()
        plug.setblocking(False)
        if not reads:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(plug, ("127.0.0.1", port))
        _, client = await loop.create_connection(cls, sock=plug)
        if not reads:
            client.transport.pause_reading()
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, _exc: Exception | None) -> None:
        if not self._gone.done():
            self._gone.set_result(time.perf_counter())

    async def stay(self, first: bytes, trickle: bytes, offset: float, deadline: float) -> float | None:
        """Sends a little now and then; returns how long it took until the server ended it, or None.

        A client that does not read learns of its end from its next write.
        """
        began, pause = time.perf_counter(), deadline * TRICKLE_SHARE
        self.transport.write(first)
        await asyncio.wait({self._gone}, timeout=offset * pause)
        while not self._gone.done() and time.perf_counter() - began < deadline + GRACE_SECONDS:
            if first or trickle.isspace():
                self.transport.write(trickle)
            await asyncio.wait({self._gone}, timeout=pause)
        self.transport.abort()
        return self._gone.result() - began if self._gone.done() else None


if __name__ == "__main__":
    still_there = "slow clients still there after deadline + 1 s"
    run_proof(PROMISE, measure, {"uvicorn's own protocol": PlantedBug(stock_protocol, still_there)})
