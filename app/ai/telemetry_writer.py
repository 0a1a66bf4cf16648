"""Everything done to the telemetry log, one thing after another: on the event loop, or on a thread.

Events that are ready together share one commit, made where they stand: the way to a thread and back takes
longer than a quick disk. Among other requests an event waits a moment for theirs (`Patience`), because a
synchronised disk costs the processor as much for one event as for twenty. A disk that is not quick is waited
for on the thread. Runs in every worker that serves, started after the fork by `ml_telemetry`, its only
caller, and knows nothing of the database.
"""

import asyncio
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import structlog

from app.ai.domain import StoredEvent
from app.ai.patience import Patience
from app.ai.telemetry_log import TelemetryLog
from app.errors import TelemetryUnavailableError
from app.metrics import TELEMETRY_FAILURES, TELEMETRY_RECORD_SECONDS, observe_event

_MOST_COUNTED = 8
"""So many requests under way, at most, make an event wait longer."""

_T = TypeVar("_T")
_Written = asyncio.Future[BaseException | None]

_UNWRITTEN = TelemetryUnavailableError("not written")
"""What is the matter with an event that nobody has tried to write."""

_log = structlog.get_logger()


@dataclass(slots=True)
class _Entry:
    """An event on its way to the log; `written` gets what keeps it from being durable, None once it is."""

    build: Callable[[], StoredEvent]
    written: "_Written | None" = None
    deadline_seconds: float = 0.0
    withdrawn: bool = False
    error: Exception | None = _UNWRITTEN


class TelemetryWriter:
    """Writes to a log; bound to the event loop that starts it.

    The thread writes groups of at most `group_size` events. A disk that took `quick_seconds` or longer the
    last time is not waited for on the event loop. Among other requests an event waits for theirs, at most
    `company_seconds` for each of up to eight.
    """

    def __init__(
        self, log: TelemetryLog, group_size: int, quick_seconds: float, company_seconds: float
    ) -> None:
        self._telemetry_log = log
        self._group_size = group_size
        self._quick_seconds = quick_seconds
        self._company_seconds = company_seconds
        self._ready: list[_Entry] = []
        self._company, self._newcomers = Patience(), Patience()
        self._wait: asyncio.TimerHandle | None = None
        self._commits_soon = False
        self._jobs: queue.SimpleQueue[_Entry | Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work_until_closed, name="telemetry-writer", daemon=True)
        self._log_free = threading.Lock()
        self._commit_seconds = 0.0
        self._closing = False
        self._usable = True

    @property
    def usable(self) -> bool:
        """Whether the log could be written when that was last tried."""
        return self._usable

    def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def write(
        self, build: Callable[[], StoredEvent], deadline_seconds: float, under_way: int = 0
    ) -> None:
        """Returns once the event is durable; it is written also if the caller is cancelled meanwhile.

        `build` makes it just before it is written, here or on the thread: those of a group are made one after
        another, which takes less time than among everything else. `under_way` is how many requests will have
        an event soon, this one among them, 0 if that is not known.

        Raises:
            TelemetryUnavailableError: it could not be made, or is not durable within the deadline. An event
                that had already reached the disk by then stays.
        """
        began = time.perf_counter()
        written: _Written = self._loop.create_future()
        self._ready.append(_Entry(build, written, deadline_seconds))
        self._plan_commit(under_way)
        try:
            error = await written
        finally:
            TELEMETRY_RECORD_SECONDS.observe(time.perf_counter() - began)
        if error is not None:
            raise TelemetryUnavailableError from error

    def _plan_commit(self, under_way: int) -> None:
        if self._commits_soon:
            return
        # Not for the smaller half of the requests under way: what they would spare the disk, the others lose.
        if self._is_quick() and len(self._ready) <= under_way / 2 and self._company.take():
            if self._wait is None:
                self._wait = self._loop.call_later(
                    self._company_seconds * min(under_way, _MOST_COUNTED), self._write_ready
                )
            return
        if under_way == 1 and not self._newcomers.take():
            self._write_ready()
            return
        # Others may have sent a request that nobody has looked at. In the next turn of the event loop they
        # are read, and those that need not wait for the database have an event in the one after.
        self._commits_soon = True
        self._loop.call_soon(self._loop.call_soon, self._write_ready)

    def _is_quick(self) -> bool:
        return self._commit_seconds < self._quick_seconds

    def _write_ready(self) -> None:
        """Writes what is ready, if the disk has been quick of late and the log is free."""
        ready, self._ready = self._ready, []
        if self._commits_soon:
            self._commits_soon = False
            self._newcomers.note(len(ready))
        if self._wait is not None:
            self._wait.cancel()
            self._wait = None
            self._company.note(len(ready))
        if not self._is_quick() or not self._log_free.acquire(blocking=False):
            for entry in ready:
                self._hand_over(entry)
            return
        try:
            self._write_group(ready)
        finally:
            self._log_free.release()
            _settle_entries(ready)

    def _hand_over(self, entry: _Entry) -> None:
        if entry.written is not None:
            timer = self._loop.call_later(entry.deadline_seconds, self._withdraw, entry)
            entry.written.add_done_callback(lambda _: timer.cancel())
        self._jobs.put(entry)

    def _withdraw(self, entry: _Entry) -> None:
        entry.withdrawn, entry.error = True, TimeoutError()
        _settle_entries([entry])
        self._note("deadline", entry.error)

    def end_wait(self) -> None:
        """Has what waits for the events of other requests written now."""
        if self._ready:
            self._write_ready()

    def enqueue(self, build: Callable[[], StoredEvent]) -> None:
        """Has the event written and returns at once; may be called from any thread."""
        self._jobs.put(_Entry(build))

    async def run(self, work: Callable[[TelemetryLog], _T]) -> _T:
        """Returns what `work` does to the log, after everything enqueued before it.

        Raises:
            TelemetryUnavailableError: the log cannot be used.
        """
        outcome: asyncio.Future[_T] = self._loop.create_future()

        def call() -> None:
            try:
                settle = functools.partial(_settle, outcome, work(self._telemetry_log))
            except Exception as exc:  # noqa: BLE001 - raised again where it is awaited
                settle = functools.partial(_settle_error, outcome, exc)
            self._tell_loop(settle)

        self._jobs.put(call)
        return await outcome

    async def check(self) -> None:
        """Tries whether the log can be written, and remembers it.

        Raises:
            TelemetryUnavailableError: it cannot.
        """
        try:
            await self.run(TelemetryLog.check_writable)
        except TelemetryUnavailableError as exc:
            self._note("check", exc.__cause__)
            raise
        self._note_usable()

    async def close(self, deadline_seconds: float) -> None:
        """Writes what is enqueued, closes the log and ends the thread, unless the disk takes too long."""

        def finish(log: TelemetryLog) -> None:
            self._closing = True
            log.close()

        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                await self.run(finish)
                await asyncio.to_thread(self._thread.join, deadline_seconds)

    # --- on the thread -----------------------------------------------------------------------------------

    def _work_until_closed(self) -> None:
        while not self._closing:
            group, call = self._take_jobs()
            if group:
                # What fails outside the log is counting or logging: who waits was told, the thread goes on.
                with self._log_free, suppress(Exception):
                    self._commit(group)
            if call is not None:  # reads or makes room, which does not disturb whoever writes meanwhile
                call()

    def _take_jobs(self) -> tuple[Sequence[_Entry], Callable[[], None] | None]:
        group: list[_Entry] = []
        job = self._jobs.get()
        while isinstance(job, _Entry):
            if not job.withdrawn:
                group.append(job)
            if len(group) == self._group_size:
                return group, None
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group, None
        return group, job

    def _commit(self, group: Sequence[_Entry]) -> None:
        try:
            self._write_group(group)
        finally:
            self._tell_loop(functools.partial(_settle_entries, group))

    # --- on either ---------------------------------------------------------------------------------------

    def _write_group(self, group: Sequence[_Entry]) -> None:
        events = [event for entry in group if (event := _build(entry)) is not None]
        error: Exception | None = None
        began = time.perf_counter()
        try:
            self._telemetry_log.write(events)
        except Exception as exc:  # noqa: BLE001 - the thread must outlive whatever it was; who waits is told
            error = exc
        self._commit_seconds = time.perf_counter() - began
        for entry in group:
            if entry.error is _UNWRITTEN:
                entry.error = error
        if error is None:
            self._note_usable()
            for event in events:
                observe_event(event.action)
        else:
            self._note("write", error.__cause__ or error)
        if lost := sum(entry.written is None and entry.error is not None for entry in group):
            TELEMETRY_FAILURES.labels("lost").inc(lost)

    def _tell_loop(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call)

    def _note(self, step: str, cause: BaseException | None) -> None:
        was_usable, self._usable = self._usable, False
        TELEMETRY_FAILURES.labels(step).inc()
        if was_usable:
            _log.error("telemetry_log_unusable", step=step, error=type(cause).__name__)

    def _note_usable(self) -> None:
        was_usable, self._usable = self._usable, True
        if not was_usable:
            _log.info("telemetry_log_usable_again")


def _build(entry: _Entry) -> StoredEvent | None:
    try:
        return entry.build()
    except Exception as exc:  # noqa: BLE001 - told to who waits for it; the others have done nothing
        entry.error = exc
        return None


def _settle_entries(group: Sequence[_Entry]) -> None:
    for entry in group:
        if entry.written is not None:
            _settle(entry.written, entry.error)


def _settle(future: "asyncio.Future[_T]", result: _T) -> None:
    if not future.done():
        future.set_result(result)


def _settle_error(future: "asyncio.Future[_T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
