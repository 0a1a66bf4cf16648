"""Telemetry: events are durable on this machine before an answer leaves, and reach the database exactly once.

Events go to the telemetry log, and a task ships the log in groups: the event ID is the primary key there, and
an event leaves the log only after the database committed, so delivery may repeat and its effect cannot. No
request waits for the database, unless the log cannot be written: then events go to the database at once.
`middleware.audit` and `middleware.shedding` record prediction events; `wiring` opens and closes it inside the
lifespan, after a fork.
"""

import asyncio
import functools
import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal, Protocol

import msgspec
import structlog
from uuid_utils import uuid7

from app.ai.domain import EventSink, StoredEvent
from app.ai.events import Event, encode_event
from app.ai.telemetry_direct import DirectWriter
from app.ai.telemetry_log import TelemetryLog
from app.ai.telemetry_writer import TelemetryWriter
from app.errors import TelemetryUnavailableError
from app.metrics import TELEMETRY_BACKLOG, TELEMETRY_FAILURES

TelemetryState = Literal["ok", "shipping_delayed", "direct", "unavailable", "off"]

_LONGEST_PAUSE_SECONDS = 2.0

_CALM_GROUP, _CALM_PAUSE_SECONDS, _CALM_GROUPS = 100, 0.02, 8
"""Events in a shipment, the pause after it, and how many such shipments may wait before they grow."""

_log = structlog.get_logger()


class Telemetry(Protocol):
    """Where events are recorded; `build` makes one when it is written, a little later and on any thread."""

    async def record(
        self,
        build: Callable[[], Event],
        request_id: str | None = None,
        *,
        deadline_seconds: float | None = None,
        under_way: int = 0,
    ) -> None:
        """Returns once the event is durable: on this machine, or else in the database.

        `deadline_seconds` is what the request has left, `under_way` how many requests will have an event
        soon, this one among them, 0 if that is not known. A caller that is cancelled while it waits leaves
        exactly one event behind.

        Raises:
            TelemetryUnavailableError: the event could not be made durable.
            Exception: whatever `build` raises.
        """
        ...

    def submit(self, build: Callable[[], Event], request_id: str | None = None) -> None:
        """Has the event recorded and returns at once; may be called from any thread."""
        ...

    def backlog(self) -> int:
        """Tells how many events wait for the database, as of the last look."""
        ...

    def state(self) -> TelemetryState:
        """Tells whether events can be recorded and are being shipped."""
        ...


class NullTelemetry:
    """Telemetry that is turned off: accepts everything, keeps nothing."""

    async def record(
        self,
        build: Callable[[], Event],
        request_id: str | None = None,
        *,
        deadline_seconds: float | None = None,
        under_way: int = 0,
    ) -> None:
        """Forgets the event."""

    def submit(self, build: Callable[[], Event], request_id: str | None = None) -> None:
        """Forgets the event."""

    def backlog(self) -> int:
        """Tells that nothing waits."""
        return 0

    def state(self) -> TelemetryState:
        """Tells that telemetry is off."""
        return "off"


class MlTelemetry:
    """Telemetry over a log and a sink.

    `now` gives the time of an event, `new_id` its UUIDv7. `group_size` bounds one commit and one shipment.
    `ship_interval_seconds` is the pause between looks for events to ship; it doubles up to two seconds while
    the database is away. `record_deadline_seconds` bounds the wait for the disk, and that for the database
    where the disk fails. The event loop itself waits for a disk that took less than `quick_disk_seconds`.
    Among other requests an event waits for theirs, at most `company_seconds` for each of up to eight.
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
        quick_disk_seconds: float = 0.001,
        company_seconds: float = 0.001,
    ) -> None:
        self._writer = TelemetryWriter(log, group_size, quick_disk_seconds, company_seconds)
        self._direct = DirectWriter(sink, group_size)
        self._sink = sink
        self._now = now
        self._new_id = new_id
        self._group_size = group_size
        self._ship_interval_seconds = ship_interval_seconds
        self._record_deadline_seconds = record_deadline_seconds
        self._open = False
        self._shipping = True
        self._backlog = 0

    async def open(self) -> None:
        """Starts writing and shipping, also what an earlier run left.

        A log that cannot be used now is tried again and again; see `state`.
        """
        self._open = True
        self._writer.start()
        with suppress(TelemetryUnavailableError):
            await self._writer.check()
        await self._look_at_log()
        self._shipper = asyncio.create_task(self._ship_until_cancelled(), name="telemetry-shipper")

    async def close(self, deadline_seconds: float = 3.0) -> None:
        """Refuses further events, makes the last ones durable and tries once more to ship them."""
        self._open = False
        self._shipper.cancel()
        await asyncio.wait({self._shipper})
        self._writer.end_wait()
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._ship_all()
        except Exception as exc:  # noqa: BLE001 - whatever is not shipped now is shipped by the next run
            _log.warning("telemetry_left_in_log", error=type(exc).__name__)
        await self._direct.close(deadline_seconds)
        await self._writer.close(deadline_seconds)

    async def record(
        self,
        build: Callable[[], Event],
        request_id: str | None = None,
        *,
        deadline_seconds: float | None = None,
        under_way: int = 0,
    ) -> None:
        """See `Telemetry.record`."""
        if not self._open:
            raise TelemetryUnavailableError
        # The ID is given here: an event that goes to both, because the log failed late, is the same in both.
        store = functools.partial(self._store, build, self._new_id(), request_id)
        ends = math.inf if deadline_seconds is None else time.monotonic() + deadline_seconds
        if self._writer.usable:
            with suppress(TelemetryUnavailableError):
                await self._writer.write(store, self._seconds_until(ends), under_way)
                return
        await self._direct.write(store(), self._seconds_until(ends))

    def _seconds_until(self, ends: float) -> float:
        return min(self._record_deadline_seconds, max(0.0, ends - time.monotonic()))

    def submit(self, build: Callable[[], Event], request_id: str | None = None) -> None:
        """See `Telemetry.submit`; an event that cannot be written is counted and lost."""
        self._writer.enqueue(functools.partial(self._store, build, self._new_id(), request_id))

    def backlog(self) -> int:
        """See `Telemetry.backlog`."""
        return self._backlog

    def state(self) -> TelemetryState:
        """See `Telemetry.state`."""
        if not self._writer.usable:
            return "direct" if self._direct.usable else "unavailable"
        return "ok" if self._shipping else "shipping_delayed"

    def _store(self, build: Callable[[], Event], event_id: str, request_id: str | None) -> StoredEvent:
        event = build()
        created_at = self._now().isoformat(timespec="microseconds").replace("+00:00", "Z")
        try:
            return encode_event(event, event_id, created_at, request_id)
        except msgspec.ValidationError as exc:
            # The message of the exception may hold the value, so the schema's name has to do.
            _log.error("event_outside_schema", schema=type(event).__name__)
            raise TelemetryUnavailableError from exc

    async def _ship_until_cancelled(self) -> None:
        pause = self._ship_interval_seconds
        while True:
            await asyncio.sleep(pause)
            failure: Exception | None = None
            try:
                pause = await self._ship_calmly()
            except Exception as exc:  # noqa: BLE001 - whatever it was, the events stay
                failure = exc
            try:
                await self._look_at_log()
            except Exception as exc:  # noqa: BLE001 - whatever it was, the next look may do better
                failure = failure or exc
            if failure is None:
                self._note_shipping()
            else:
                self._note_delay(failure)
                pause = min(2 * max(pause, self._ship_interval_seconds), _LONGEST_PAUSE_SECONDS)
            if not self._writer.usable:  # tried again soon, whatever the database does
                pause = self._ship_interval_seconds

    async def _ship_all(self) -> None:
        while await self._ship_group(self._group_size):
            pass

    async def _ship_calmly(self) -> float:
        """Ships a group; returns for how long the next one waits, in seconds."""
        # Requests wait for the processor that PostgreSQL needs for events, so what is not urgent goes in
        # small groups, with room between them.
        size = min(self._group_size, max(_CALM_GROUP, self._backlog // _CALM_GROUPS))
        if await self._ship_group(size):
            return _CALM_PAUSE_SECONDS if size < self._group_size else 0.0
        # A group that is not full is the last one: to send the few events that came meanwhile, and then the
        # next few, would keep two processors and a disk busy without end.
        return self._ship_interval_seconds

    async def _ship_group(self, limit: int) -> bool:
        """Ships the oldest events; tells whether that were as many as might be."""
        batch = await self._writer.run(lambda log: log.read_batch(limit))
        if batch.events:
            await self._sink.write_events(batch.events)
            await self._writer.run(lambda log: log.delete(batch))
        return len(batch.events) == limit

    async def _look_at_log(self) -> None:
        if not self._writer.usable:
            with suppress(TelemetryUnavailableError):
                await self._writer.check()
        if not self._writer.usable:
            await self._direct.check()
        with suppress(TelemetryUnavailableError):
            self._backlog = await self._writer.run(_prepare_and_count)
            TELEMETRY_BACKLOG.set(self._backlog)

    def _note_delay(self, cause: Exception) -> None:
        TELEMETRY_FAILURES.labels("ship").inc()
        if self._shipping:
            _log.warning("telemetry_shipping_delayed", error=type(cause).__name__)
        self._shipping = False

    def _note_shipping(self) -> None:
        if not self._shipping:
            _log.info("telemetry_shipping_resumed")
        self._shipping = True


def _prepare_and_count(log: TelemetryLog) -> int:
    log.prepare_next()
    return log.count()
