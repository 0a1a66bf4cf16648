"""A client that sends at a rate, whether the answers keep up or not (open loop), or comes back at once.

It is lean, so that on two cores it takes as little as possible from the server it floods: bare sockets,
requests encoded beforehand, connections kept and used again, nothing read of an answer but status, length and
Retry-After. A request is sent on a connection that waits for nothing. For `prove_overload`.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_TICK_SECONDS = 0.002


@dataclass
class Outcomes:
    """What came back in some time: seconds each answer or refusal took, and what nobody should get."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    other: int = 0

    def note(self, status: bytes, seconds: float, retry_after: bytes) -> None:
        """Adds what came back."""
        if status == b"200":
            self.answered.append(seconds)
        elif status == b"503":
            self.refused.append(seconds)
            self.without_retry_after += retry_after not in (b"1", b"2", b"3")
        else:
            self.other += 1


class Rush:
    """A flood of POSTs to a port of the loopback; `outcomes` is what came back since sending began last."""

    def __init__(self, port: int, requests: Iterator[bytes]) -> None:
        self.outcomes = Outcomes()
        self._port = port
        self._requests = requests
        self._free: list[_Caller] = []
        self._callers: list[_Caller] = []

    async def send(self, rate: float, seconds: float) -> Outcomes:
        """Sends `rate` requests a second; returns what came back meanwhile, also of earlier ones."""
        self.outcomes = outcomes = Outcomes()
        began = time.perf_counter()
        sent = 0
        while (elapsed := time.perf_counter() - began) < seconds:
            for _ in range(int(elapsed * rate) - sent):
                caller = self._free.pop() if self._free else await self._connect()
                caller.ask(next(self._requests))
                sent += 1
            await asyncio.sleep(_TICK_SECONDS)
        self.outcomes = Outcomes()
        return outcomes

    async def storm(self, callers: int, seconds: float) -> Outcomes:
        """Has so many callers ask again the moment they are answered or refused; returns what came back."""
        self.outcomes = outcomes = Outcomes()
        self._free += [await self._connect() for _ in range(callers)]
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            while self._free:
                self._free.pop().ask(next(self._requests))
            await asyncio.sleep(_TICK_SECONDS)
        self.outcomes = Outcomes()
        return outcomes

    async def ask_once(self, longest_seconds: float) -> Outcomes:
        """Sends one request, and returns what came back within so many seconds."""
        caller = await self._connect()
        caller.ask(next(self._requests))
        with suppress(TimeoutError):
            await asyncio.wait_for(caller.idle.wait(), longest_seconds)
        self.close()
        return self.outcomes

    def close(self) -> None:
        """Ends every connection, answered or not."""
        for caller in self._callers:
            caller.transport.abort()

    def take_back(self, caller: "_Caller") -> None:
        """Keeps a connection whose answer is complete for the next request."""
        self._free.append(caller)

    def drop(self, caller: "_Caller") -> None:
        """Forgets a connection that has ended."""
        with suppress(ValueError):
            self._free.remove(caller)

    async def _connect(self) -> "_Caller":
        loop = asyncio.get_running_loop()
        _, caller = await loop.create_connection(lambda: _Caller(self), "127.0.0.1", self._port)
        self._callers.append(caller)
        return caller


class _Caller(asyncio.Protocol):
    """One kept-alive connection; `idle` is set while it waits for nothing."""

    def __init__(self, rush: Rush) -> None:
        self.transport: Any = None
        self.idle = asyncio.Event()
        self._rush = rush
        self._sent = 0.0
        self._head = b""
        self._missing = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> None:
        """Sends a request."""
        self._sent, self._head, self._missing = time.perf_counter(), b"", -1
        self.idle.clear()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._missing >= 0:
            self._missing -= len(data)
        else:
            self._head += data
            head, found, rest = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._head = head.lower()
            self._missing = int(_value(self._head, b"content-length")) - len(rest)
        if self._missing == 0:
            seconds = time.perf_counter() - self._sent
            self._rush.outcomes.note(self._head[9:12], seconds, _value(self._head, b"retry-after"))
            self._rush.take_back(self)
            self.idle.set()

    def connection_lost(self, _exc: Exception | None) -> None:
        # Of the connections that wait for nothing the server closes some: none of them owes an answer.
        if not self.idle.is_set():
            self._rush.outcomes.other += 1
        self._rush.drop(self)
        self.idle.set()


def _value(head: bytes, name: bytes) -> bytes:
    return head.partition(b"\r\n" + name + b": ")[2].partition(b"\r\n")[0]
