"""A client that keeps `connections` requests on their way, and knows how long each took.

It speaks HTTP/1.1 over bare sockets, so that on two cores it takes as little as possible from the server it
measures. A request is sent on a connection when the answer to the one before has arrived (closed loop).
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

PATH = "/ai/advanced-ml/predict-batch"
Cell = tuple[str, int, int]
"""Contender, leads in a request, connections."""
_PAUSE_SECONDS = 0.05  # of a client that was refused
_KEPT_SECONDS = 4.0  # servers keep an idle connection for 5, and may close it just as it is used again


@dataclass
class Sample:
    """What a contender did in one cell: milliseconds of each answer, seconds it took, requests it refused.

    `ends` are how many answers there were at the end of each burst.
    """

    milliseconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    refused: int = 0
    ends: list[int] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Returns the latency that `share` of the answers stayed within, in milliseconds."""
        return _percentile(self.milliseconds, share)

    def spread(self, share: float) -> tuple[float, float]:
        """Returns the least and the greatest that `percentile` is in a single burst."""
        found = [_percentile(self.milliseconds[at:end], share) for at, end in pairwise([0, *self.ends])]
        return min(found), max(found)

    @property
    def rate(self) -> float:
        """Answers a second, over all connections."""
        return len(self.milliseconds) / self.seconds


def _percentile(milliseconds: Sequence[float], share: float) -> float:
    ordered = sorted(milliseconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def build_request(body: bytes, path: str = PATH, *, credential: str | None = None) -> bytes:
    """Returns the bytes of one POST, with a bearer credential or without."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n" + (f"Authorization: Bearer {credential}\r\n" if credential else "")
    ) + "\r\n"
    return head.encode() + body


async def ask(port: int, request: bytes) -> bytes:
    """Sends one request on a connection of its own; returns the body of a 200."""
    connection = await _connect(port)
    try:
        answer = await connection.exchange(request)
    finally:
        connection.close()
    if answer is None:
        raise RuntimeError("refused: the server is too busy")
    return answer


async def run_load(
    port: int, requests: Iterator[bytes], sample: Sample, *, connections: int, seconds: float, at_least: int
) -> None:
    """Adds to `sample` for `seconds`, and until `at_least` answers have come."""
    opened = [await _connect(port) for _ in range(connections)]
    # The first of a burst finds cold caches everywhere.
    await asyncio.gather(*(connection.exchange(next(requests)) for connection in opened))
    began = time.perf_counter()
    goal = len(sample.milliseconds) + at_least

    async def keep_asking(connection: _Connection) -> None:
        while time.perf_counter() - began < seconds or len(sample.milliseconds) < goal:
            if connection.is_stale():
                connection = await _connect(port)
                opened.append(connection)
            request = next(requests)
            sent = time.perf_counter()
            if await connection.exchange(request) is None:
                sample.refused += 1
                await asyncio.sleep(_PAUSE_SECONDS)
            else:
                sample.milliseconds.append((time.perf_counter() - sent) * 1000)

    await asyncio.gather(*map(keep_asking, opened))
    sample.seconds += time.perf_counter() - began
    sample.ends.append(len(sample.milliseconds))
    for connection in opened:
        connection.close()


async def measure_in_turns(
    cells: Sequence[Cell],
    samples: dict[Cell, Sample],
    ports: Mapping[str, int],
    requests: Callable[[str, int], Iterator[bytes]],
    *,
    seconds: float,
    rounds: int,
    seed: int = 1,
) -> None:
    """Adds to the sample of each cell, a burst each, every round in another order, which `seed` draws.

    `requests` are those of a contender, by its name and the leads in each.
    """
    order = random.Random(seed)  # noqa: S311  an order of play, nothing secret
    for _ in range(rounds):
        for cell in order.sample(cells, len(cells)):
            name, size, connections = cell
            sample = samples.setdefault(cell, Sample())
            await run_load(
                ports[name], requests(name, size), sample,
                connections=connections, seconds=seconds, at_least=5,
            )  # fmt: skip


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    """Returns status, whether the connection ends with this answer, and the body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head[9:12]), b"\r\nconnection: close\r\n" in head, await reader.readexactly(length)


class _Connection(asyncio.Protocol):
    """One kept-alive connection."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._answer: asyncio.Future[bytes | None]
        self._refused = False
        self._parts: list[bytes] = []
        self._missing = -1
        self._answered = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if self._missing < 0:
            whole = b"".join(self._parts)
            head, found, rest = whole.partition(b"\r\n\r\n")
            if not found:
                return
            self._refused = head.startswith(b"HTTP/1.1 503")
            if not self._refused and not head.startswith(b"HTTP/1.1 200"):
                self._fail(RuntimeError(f"not a 200: {whole[:500]!r}"))
                return
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            self._parts, self._missing = [rest], int(length[15:]) - len(rest)
        else:
            self._missing -= len(data)
        if self._missing == 0 and not self._answer.done():
            self._answered = time.perf_counter()
            self._answer.set_result(None if self._refused else b"".join(self._parts))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the server closed the connection"))

    async def exchange(self, request: bytes) -> bytes | None:
        """Sends one request, returns the body of the answer, None if the server is too busy for it (503)."""
        self._answer = asyncio.get_running_loop().create_future()
        self._parts, self._missing = [], -1
        self._transport.write(request)
        return await self._answer

    def is_stale(self) -> bool:
        idle = time.perf_counter() - self._answered
        return bool(self._transport.is_closing()) or idle > _KEPT_SECONDS

    def close(self) -> None:
        self._transport.close()

    def _fail(self, error: Exception) -> None:
        answer = getattr(self, "_answer", None)
        if answer is not None and not answer.done():
            answer.set_exception(error)


async def _connect(port: int) -> _Connection:
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
    return connection


def cycle(requests: Sequence[bytes]) -> Iterator[bytes]:
    """Yields the requests over and over."""
    while True:
        yield from requests
