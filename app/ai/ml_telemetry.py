"""Telemetry: events are durable on this machine before an answer leaves, and reach the database exactly once.

One thread per worker writes the telemetry log and shares each commit among the requests that wait for it. A
task ships the log in groups: the event ID is the primary key there, and an event leaves the log only after
the database committed, so delivery may repeat and its effect cannot. `middleware.audit` records prediction
events, `wiring` opens and closes it inside the lifespan (after any fork). It never lets a request wait for
the database.
"""

import asyncio
import functools
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol, TypeVar

import msgspec
import structlog
from uuid_utils import uuid7

from app.ai.domain import EventSink, StoredEvent
from app.ai.events import Event, encode_event
from app.ai.telemetry_log import TelemetryLog
from app.errors import TelemetryUnavailableError
from app.metrics import TELEMETRY_BACKLOG, TELEMETRY_EVENTS, TELEMETRY_FAILURES, TELEMETRY_RECORD_SECONDS

_T = TypeVar("_T")
_Written = asyncio.Future[TelemetryUnavailableError | None]
TelemetryState = Literal["ok", "shipping_delayed", "unavailable", "off"]

_LONGEST_PAUSE_SECONDS = 2.0

_log = structlog.get_logger("app.telemetry")


class Telemetry(Protocol):
    """Where events are recorded."""

    async def record(self, event: Event, request_id: str | None = None) -> None:
        """Returns once the event is durable on this machine.

        A caller that is cancelled while it waits leaves exactly one event behind.

        Raises:
            TelemetryUnavailableError: the event could not be made durable.
        """
        ...

    def submit(self, event: Event, request_id: str | None = None) -> None:
        """Enqueues the event and returns at once; may be called from any thread."""
        ...

    def backlog(self) -> int:
        """Tells how many events wait for the database, as of the last look."""
        ...

    def state(self) -> TelemetryState:
        """Tells whether events can be recorded and are being shipped."""
        ...


class NullTelemetry:
    """Telemetry that is turned off: accepts everything, keeps nothing."""

    async def record(self, event: Event, request_id: str | None = None) -> None:
        """Forgets the event."""

    def submit(self, event: Event, request_id: str | None = None) -> None:
        """Forgets the event."""

    def backlog(self) -> int:
        """Tells that nothing waits."""
        return 0

    def state(self) -> TelemetryState:
        """Tells that telemetry is off."""
        return "off"


@dataclass(slots=True)
class _Entry:
    """An event on its way to the log; `written` gets None, or the error that kept it from being durable."""

    event: StoredEvent
    written: "_Written | None" = None
    withdrawn: bool = False


class MlTelemetry:
    """Telemetry over a log and a sink.

    `now` gives the time of an event, `new_id` its UUIDv7. `group_size` bounds one commit and one shipment.
    `ship_interval_seconds` is the pause between looks for events to ship; it doubles up to two seconds while
    the database is away. `record_deadline_seconds` bounds the wait for the disk.
    """

    def __init__(
        self,
        log: TelemetryLog,
        sink: EventSink,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_id: Callable[[], str] = lambda: str(uuid7()),
        group_size: int = 500,
        ship_interval_seconds: float = 0.25,
        record_deadline_seconds: float = 2.0,
    ) -> None:
        self._telemetry_log = log
        self._sink = sink
        self._now = now
        self._new_id = new_id
        self._group_size = group_size
        self._ship_interval_seconds = ship_interval_seconds
        self._record_deadline_seconds = record_deadline_seconds
        self._jobs: queue.SimpleQueue[_Entry | Callable[[], None]] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_until_closed, name="telemetry-writer", daemon=True)
        self._open = False
        self._writing = True
        self._log_usable = False  # until it was tried
        self._shipping = True
        self._backlog = 0

    async def open(self) -> None:
        """Starts writing and shipping; events left from an earlier run are shipped too."""
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._writer.start()
        await self._look_at_log()
        self._shipper = asyncio.create_task(self._ship_until_cancelled(), name="telemetry-shipper")

    async def close(self, deadline_seconds: float = 3.0) -> None:
        """Refuses further events, makes the last ones durable and tries once more to ship them."""
        self._open = False
        self._shipper.cancel()
        await asyncio.wait({self._shipper})
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._ship_all()
        except Exception as exc:  # noqa: BLE001 - whatever is not shipped now is shipped by the next run
            _log.warning("telemetry_left_in_log", error=type(exc).__name__)
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                await self._on_writer(self._finish)
                self._writer.join(deadline_seconds)

    async def record(self, event: Event, request_id: str | None = None) -> None:
        """See `Telemetry.record`."""
        if not self._open:
            raise TelemetryUnavailableError
        written: _Written = self._loop.create_future()
        entry = _Entry(self._store(event, request_id), written)
        self._jobs.put(entry)
        with TELEMETRY_RECORD_SECONDS.time():
            # Unlike wait_for, this leaves the entry alone when the request is cancelled: it is still written.
            await asyncio.wait({written}, timeout=self._record_deadline_seconds)
        if not written.done():
            entry.withdrawn = True
            self._note_log(usable=False)
            TELEMETRY_FAILURES.labels("deadline").inc()
            raise TelemetryUnavailableError
        if (error := written.result()) is not None:
            raise TelemetryUnavailableError from error

    def submit(self, event: Event, request_id: str | None = None) -> None:
        """See `Telemetry.submit`; an event that cannot be written is counted and lost."""
        try:
            self._jobs.put(_Entry(self._store(event, request_id)))
        except TelemetryUnavailableError:
            TELEMETRY_FAILURES.labels("lost").inc()

    def backlog(self) -> int:
        """See `Telemetry.backlog`."""
        return self._backlog

    def state(self) -> TelemetryState:
        """See `Telemetry.state`."""
        if not self._log_usable:
            return "unavailable"
        return "ok" if self._shipping else "shipping_delayed"

    def _store(self, event: Event, request_id: str | None) -> StoredEvent:
        created_at = self._now().isoformat(timespec="microseconds").replace("+00:00", "Z")
        try:
            return encode_event(event, self._new_id(), created_at, request_id)
        except msgspec.ValidationError as exc:
            # The message of the exception may hold the value, so the schema's name has to do.
            _log.error("event_outside_schema", schema=type(event).__name__)
            raise TelemetryUnavailableError from exc

    # --- the writer thread -------------------------------------------------------------------------------

    def _write_until_closed(self) -> None:
        while self._writing:
            group, call = self._take_jobs()
            if group:
                self._commit(group)
            if call is not None:
                call()

    def _take_jobs(self) -> tuple[list[_Entry], Callable[[], None] | None]:
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

    def _commit(self, group: list[_Entry]) -> None:
        error = self._write(group)
        waiting = [entry.written for entry in group if entry.written is not None]
        if waiting:
            self._call_loop(functools.partial(_settle, waiting, error))

    def _write(self, group: list[_Entry]) -> TelemetryUnavailableError | None:
        try:
            self._telemetry_log.write([entry.event for entry in group])
        except TelemetryUnavailableError as exc:
            self._note_log(usable=False, cause=exc.__cause__)
            TELEMETRY_FAILURES.labels("write").inc()
            TELEMETRY_FAILURES.labels("lost").inc(sum(entry.written is None for entry in group))
            return exc
        self._note_log(usable=True)
        for entry in group:
            TELEMETRY_EVENTS.labels(entry.event.action).inc()
        return None

    def _finish(self) -> None:
        self._writing = False
        self._telemetry_log.close()

    async def _on_writer(self, work: Callable[[], _T]) -> _T:
        """Runs `work` on the writer thread, which owns the log, after everything enqueued before it."""
        outcome: asyncio.Future[_T] = self._loop.create_future()

        def call() -> None:
            try:
                settle = functools.partial(_settle, [outcome], work())
            except Exception as exc:  # noqa: BLE001 - raised again where it is awaited
                settle = functools.partial(_settle_error, outcome, exc)
            self._call_loop(settle)

        self._jobs.put(call)
        return await outcome

    def _call_loop(self, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call)

    # --- the shipper -------------------------------------------------------------------------------------

    async def _ship_until_cancelled(self) -> None:
        pause = self._ship_interval_seconds
        while True:
            await asyncio.sleep(pause)
            try:
                await self._ship_all()
            except Exception as exc:  # noqa: BLE001 - whatever it was, the events stay
                self._note_shipping(works=False, cause=exc)
                TELEMETRY_FAILURES.labels("ship").inc()
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                self._note_shipping(works=True)
                pause = self._ship_interval_seconds
            await self._look_at_log()

    async def _ship_all(self) -> None:
        log = self._telemetry_log
        if not await self._on_writer(log.own_shipping):
            return
        try:
            while (batch := await self._on_writer(lambda: log.read_batch(self._group_size))).events:
                await self._sink.write_events(batch.events)
                await self._on_writer(functools.partial(log.delete, batch))
        finally:
            self._jobs.put(log.release_shipping)

    async def _look_at_log(self) -> None:
        log = self._telemetry_log
        try:
            if not self._log_usable:
                await self._on_writer(log.check_writable)
            self._backlog = await self._on_writer(log.count)
        except TelemetryUnavailableError as exc:
            self._note_log(usable=False, cause=exc.__cause__)
        else:
            self._note_log(usable=True)
            TELEMETRY_BACKLOG.set(self._backlog)

    def _note_log(self, *, usable: bool, cause: BaseException | None = None) -> None:
        if usable != self._log_usable:
            note = _log.info if usable else _log.warning
            note("telemetry_log_state", usable=usable, error=type(cause).__name__ if cause else None)
        self._log_usable = usable

    def _note_shipping(self, *, works: bool, cause: BaseException | None = None) -> None:
        if works != self._shipping:
            note = _log.info if works else _log.warning
            note("telemetry_shipping_state", works=works, error=type(cause).__name__ if cause else None)
        self._shipping = works


def _settle(waiting: "list[asyncio.Future[_T]]", result: _T) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(result)


def _settle_error(future: "asyncio.Future[_T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
