"""The service with a planted bug: it acknowledges a request before the request's event is durable.

python -m bench.hasty_service
"""

import asyncio

import app.wiring
from app.ai.events import Event
from app.ai.ml_telemetry import MlTelemetry
from app.serve import serve
from app.settings import load_settings

DELAY_SECONDS = 0.05


class HastyTelemetry(MlTelemetry):
    """Writes events a little later, and says at once that it has."""

    async def record(self, event: Event, request_id: str | None = None, *, alone: bool = False) -> None:  # noqa: ARG002
        """Returns at once."""
        asyncio.get_running_loop().call_later(DELAY_SECONDS, self.submit, event, request_id)


if __name__ == "__main__":
    app.wiring.MlTelemetry = HastyTelemetry  # type: ignore[misc]
    serve(load_settings())
