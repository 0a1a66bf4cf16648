"""Telemetry as the rest of the service sees it."""

from typing import Literal, Protocol

from app.ai.events import Event

TelemetryState = Literal["ok", "shipping_delayed", "unavailable", "off"]


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
