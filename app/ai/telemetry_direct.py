"""The way around the telemetry log: while it cannot be written, the database itself makes events durable.

Events that wait at the same time share one INSERT. Called by `ml_telemetry` alone, on its event loop.
"""

import asyncio
import itertools

from app.ai.domain import EventSink, StoredEvent
from app.errors import TelemetryUnavailableError
from app.metrics import TELEMETRY_FAILURES, observe_event

_Written = asyncio.Future[Exception | None]


class DirectWriter:
    """Writes to a sink in groups of at most `group_size` events."""

    def __init__(self, sink: EventSink, group_size: int) -> None:
        self._sink = sink
        self._group_size = group_size
        self._waiting: dict[_Written, StoredEvent] = {}
        self._task: asyncio.Task[None] | None = None
        self._usable = True

    @property
    def usable(self) -> bool:
        """Whether the sink took what it was last given."""
        return self._usable

    async def write(self, event: StoredEvent, deadline_seconds: float) -> None:
        """Returns once the event is in the database; it is written also if the caller is cancelled meanwhile.

        Raises:
            TelemetryUnavailableError: the database refused it or took longer than the deadline. An event that
                was on its way by then may be there; one that was not is forgotten.
        """
        written: _Written = asyncio.get_running_loop().create_future()
        self._waiting[written] = event
        if self._task is None:
            self._task = asyncio.create_task(self._write_waiting(), name="telemetry-direct")
        # Unlike wait_for, this leaves the future alone when the caller is cancelled.
        await asyncio.wait({written}, timeout=deadline_seconds)
        self._waiting.pop(written, None)  # if it is still there, it is late
        error = written.result() if written.done() else TimeoutError()
        if error is not None:
            TELEMETRY_FAILURES.labels("direct").inc()
            raise TelemetryUnavailableError from error
        observe_event(event.action)

    async def check(self) -> None:
        """Finds out whether the sink takes events, by giving it none."""
        await self._write_group([])

    async def close(self, deadline_seconds: float) -> None:
        """Waits for what is on its way."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=deadline_seconds)

    async def _write_waiting(self) -> None:
        while self._waiting:
            group = dict(itertools.islice(self._waiting.items(), self._group_size))
            for written in group:
                del self._waiting[written]
            error = await self._write_group(list(group.values()))
            for written in group:
                written.set_result(error)
        self._task = None

    async def _write_group(self, events: list[StoredEvent]) -> Exception | None:
        try:
            await self._sink.write_events(events)
        except Exception as exc:  # noqa: BLE001 - whatever it was, who waits is told
            self._usable = False
            return exc
        self._usable = True
        return None
