"""Tells a worker's parts that it is about to end: readiness fails, and answers close their connections.

Connections that are in use are thereby given up one by one by their clients, who know what is coming, and
none is cut off. Begun by a signal: SIGUSR1 announces the end, SIGTERM is the end. Held by `main`, read by
`http_protocol` and `health`. Only a worker without memory ends at once.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import structlog

ANNOUNCEMENT = signal.SIGUSR1
"""Sent to every worker of a service that will end: fail readiness, go on answering."""

OUT_OF_MEMORY = 70
"""The exit status of a worker that ran out of memory: EX_SOFTWARE of sysexits.h."""

_log = structlog.get_logger()


class Drain:
    """Whether the worker is draining, and for how long it will; `seconds` and `monotonic` are in seconds."""

    def __init__(self, seconds: float, monotonic: Callable[[], float]) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._ends_at: float | None = None

    @property
    def active(self) -> bool:
        """Whether it has begun."""
        return self._ends_at is not None

    def begin(self) -> None:
        """Begins, unless it has begun."""
        if self._ends_at is None:
            self._ends_at = self._monotonic() + self._seconds

    def remaining_seconds(self) -> float:
        """Returns how long idle connections are kept; 0 when the time is up or nothing has begun."""
        return max(0.0, self._ends_at - self._monotonic()) if self._ends_at is not None else 0.0


def end_worker(pid: int) -> None:
    """Has a worker end without a drain, what is in flight excepted."""
    os.kill(pid, ANNOUNCEMENT)
    os.kill(pid, signal.SIGTERM)


def end_with_supervisor() -> None:
    """Has this worker end without a drain when the process that started it is no more.

    Nobody else would stop it then: it would go on listening, and the next service would find the port taken.
    """
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        return
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(supervisor.sentinel)
        end_worker(os.getpid())

    loop.add_reader(supervisor.sentinel, end)


def end_without_memory(write_out: Callable[[], None]) -> None:
    """Has this worker end at once when its event loop cannot take a connection for want of memory.

    `write_out` waits, for a moment, until its last lines are written.
    The loop would offer no other connection after that one, however much memory there is again: the worker
    would live on and hear nobody. What was answered is on disk; whoever watches the process starts another.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # What fails in a connection, a task or a callback names it, and ends there; the rest is of the loop.
        own = context.keys() <= {"message", "exception"}
        deaf = own and isinstance(context.get("exception"), MemoryError)
        try:
            loop.default_exception_handler(context)
            if deaf:
                _log.critical("out_of_memory", meaning="this worker ends", remedy="raise its limit on memory")
                write_out()
        finally:
            if deaf:
                os._exit(OUT_OF_MEMORY)

    asyncio.get_running_loop().set_exception_handler(handle)


def begin_on_signals(drain: Drain) -> None:
    """Begins with `ANNOUNCEMENT` or SIGTERM, which then goes its usual way; needs the main thread.

    One of several workers that gets SIGTERM unannounced goes its way when the drain is over: a service
    manager may signal all processes at once, and the supervisor keeps the listening socket open meanwhile. In
    any other thread it does nothing: there the server does not listen to signals either.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    stop, loop = signal.getsignal(signal.SIGTERM), asyncio.get_running_loop()
    supervised = multiprocessing.parent_process() is not None

    def begin(number: int, frame: FrameType | None) -> None:
        announced = drain.active
        drain.begin()
        if number != signal.SIGTERM or not callable(stop):
            return
        if announced or not supervised:
            stop(number, frame)
        else:
            seconds = drain.remaining_seconds()
            loop.call_soon_threadsafe(loop.call_later, seconds, stop, number, None)

    signal.signal(ANNOUNCEMENT, begin)
    signal.signal(signal.SIGTERM, begin)
