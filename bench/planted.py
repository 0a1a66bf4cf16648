"""Starts the service with one part replaced by what it guards against, so that a proof can show it notices.

python -m bench.planted NAME
"""

import asyncio
import dataclasses
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import psycopg
from psycopg.abc import Buffer
from psycopg.pq.abc import PGresult
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import app.ai.model_bundle
import app.ai.predictor
import app.http_protocol
import app.main
import app.wiring
from app.ai.events import Event
from app.ai.inference import Scorer
from app.ai.micro_batching import MicroBatching, Places, W
from app.ai.ml_telemetry import MlTelemetry
from app.ai.model_bundle import ModelBundle
from app.ai.model_registry import ModelRegistry
from app.db.engine import Database, _Loan
from app.db.session import Session
from app.errors import DatabaseUnavailableError
from app.serve import serve
from app.settings import load_settings

T = TypeVar("T")

HASTY_SECONDS = 0.05


def stock_protocol() -> None:
    """Uvicorn's own protocol: no client has a deadline."""
    app.http_protocol.ProblemProtocol = HttpToolsProtocol  # type: ignore[assignment,misc]


def swap_in_place() -> None:
    """A registry that keeps one bundle and changes it part by part: requests see halves of two models."""

    class SwapsInPlace(ModelRegistry):
        async def active(self) -> ModelBundle:
            bundle = await super().active()
            kept: ModelBundle = self.__dict__.setdefault("kept", dataclasses.replace(bundle))
            if kept.ref != bundle.ref and "swap" not in self.__dict__:
                self.__dict__["swap"] = asyncio.create_task(self._swap(kept, bundle))
            return kept

        async def _swap(self, kept: ModelBundle, bundle: ModelBundle) -> None:
            for part in dataclasses.fields(bundle):
                object.__setattr__(kept, part.name, getattr(bundle, part.name))
                await asyncio.sleep(0.005)
            del self.__dict__["swap"]

    app.wiring.ModelRegistry = SwapsInPlace  # type: ignore[misc]


def driver_timeout() -> None:
    """`asyncio.timeout` round the driver's call, which then asks a frozen server to cancel."""

    class TimedDatabase(Database):
        async def query(self, statement: str, parameters: Sequence[Buffer]) -> PGresult:
            async def ask(session: Session) -> PGresult:
                await session.driver().execute("SELECT 1")
                return await session.query(statement, parameters)

            return await self._run(ask)

        async def _run(self, call: Callable[[Session], Awaitable[T]]) -> T:
            try:
                async with asyncio.timeout(self._deadline):
                    return await self._lend(call, _Loan())
            except (TimeoutError, psycopg.OperationalError, OSError) as exc:
                raise DatabaseUnavailableError from exc

    app.wiring.Database = TimedDatabase  # type: ignore[misc]


def no_limit() -> None:
    """Every request is let in, however many wait."""

    class LetIn:
        def __init__(self, app: ASGIApp, **_: object) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self._app(scope, receive, send)

    app.main.InFlightLimit = LetIn  # type: ignore[misc,assignment]


def hasty_telemetry() -> None:
    """Says at once that an event is durable, and writes it a little later."""

    class HastyTelemetry(MlTelemetry):
        async def record(self, event: Event, request_id: str | None = None, **_: object) -> None:
            asyncio.get_running_loop().call_later(HASTY_SECONDS, self.submit, event, request_id)

    app.wiring.MlTelemetry = HastyTelemetry  # type: ignore[misc]


def mixed_look_ups() -> None:
    """Whoever shares a look-up is handed the answers of the lead before his own."""

    class MixesUp(MicroBatching[W, T]):
        async def look_up(self, world: W, lead_ids: Sequence[str]) -> tuple[T, Places]:
            found, places = await super().look_up(world, lead_ids)
            return found, places if isinstance(places, slice) else [max(place - 1, 0) for place in places]

    app.ai.predictor.MicroBatching = MixesUp  # type: ignore[misc,attr-defined]


def batch_in_last_bit() -> None:
    """A scorer whose sums are rounded differently in a batch, as those of a matrix product are."""
    build_scorer = app.ai.model_bundle.build_scorer  # type: ignore[attr-defined]

    def build(estimator: object) -> Scorer:
        score = build_scorer(estimator)
        return lambda values: score(values) * (1 - (len(values) > 1) * 2**-52)

    app.ai.model_bundle.build_scorer = build  # type: ignore[attr-defined]


PLANTS: dict[str, Callable[[], None]] = {
    "stock-protocol": stock_protocol,
    "swap-in-place": swap_in_place,
    "driver-timeout": driver_timeout,
    "no-limit": no_limit,
    "hasty-telemetry": hasty_telemetry,
    "mixed-look-ups": mixed_look_ups,
    "batch-in-last-bit": batch_in_last_bit,
}


if __name__ == "__main__":
    PLANTS[sys.argv[1]]()
    serve(load_settings())
