"""Starts the service with one part replaced by what it guards against, so that a proof can show it notices.

python -m bench.planted NAME
"""

import asyncio
import dataclasses
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

import psycopg
from psycopg.abc import Buffer
from psycopg.pq.abc import PGresult
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import app.ai.loaded_model
import app.ai.predictor
import app.http_protocol
import app.main
import app.middleware.shedding
import app.wiring
from app.ai.events import Event
from app.ai.fitted_model import FittedModel
from app.ai.inference import Scorer
from app.ai.micro_batching import MicroBatching, Places, W
from app.ai.ml_telemetry import MlTelemetry
from app.ai.model_bundle import ModelBundle
from app.ai.model_registry import ModelRegistry
from app.ai.score_kernels import ScoreKernels
from app.db.engine import Database, _Loan
from app.db.session import Session, UseRow
from app.errors import DatabaseUnavailableError, OverloadedError
from app.middleware.body_limit import BodyLimit
from app.middleware.in_flight import LONGEST_WAIT_SECONDS, Admission
from app.serve import serve
from app.settings import load_settings

T = TypeVar("T")

HASTY_SECONDS, SLOW_SECONDS = 0.05, 0.02


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
        async def query(
            self, statement: str, parameters: Sequence[Buffer], use_row: UseRow | None = None
        ) -> PGresult:
            async def ask(session: Session) -> PGresult:
                await session.driver().execute("SELECT 1")
                return await session.query(statement, parameters, self._deadline, use_row)

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

    class LetsAllIn(Admission):
        def is_full(self, longest_wait: float = 0.0) -> bool:  # noqa: ARG002
            return False

    app.main.Admission = LetsAllIn  # type: ignore[misc,attr-defined]


def leaking_places() -> None:
    """Whoever is refused takes a place all the same, and never gives it back."""

    class Leaks(Admission):
        def is_full(self, longest_wait: float = LONGEST_WAIT_SECONDS) -> bool:
            full = super().is_full(longest_wait)
            if full:
                self.enter()
            return full

    app.main.Admission = Leaks  # type: ignore[misc,attr-defined]


def no_retry_after() -> None:
    """Refusals that do not say when to come back."""

    class SilentError(OverloadedError):
        def __init__(self) -> None:
            super().__init__()
            self.retry_after = None

    app.middleware.shedding.OverloadedError = SilentError  # type: ignore[misc,attr-defined]


def unguarded() -> None:
    """No deadlines for clients, no limit on requests in flight: what both cost is measured beside it."""
    stock_protocol()
    no_limit()


def slow_telemetry() -> None:
    """Telemetry that takes 20 ms more for each event."""

    class SlowTelemetry(MlTelemetry):
        async def record(
            self, build: Callable[[], Event], request_id: str | None = None, **known: Any
        ) -> None:
            await asyncio.sleep(SLOW_SECONDS)
            await super().record(build, request_id, **known)

    app.wiring.MlTelemetry = SlowTelemetry  # type: ignore[misc]


def other_probabilities() -> None:
    """Probabilities that are a millionth lower than they should be."""
    calibrate = app.ai.predictor.calibrate  # type: ignore[attr-defined]
    app.ai.predictor.calibrate = (  # type: ignore[attr-defined]
        lambda raw, calibrator: calibrate(raw, calibrator) * (1 - 1e-6)
    )


def hasty_telemetry() -> None:
    """Says at once that an event is durable, and writes it a little later."""

    class HastyTelemetry(MlTelemetry):
        async def record(
            self, build: Callable[[], Event], request_id: str | None = None, **_: object
        ) -> None:
            asyncio.get_running_loop().call_later(HASTY_SECONDS, self.submit, build, request_id)

    app.wiring.MlTelemetry = HastyTelemetry  # type: ignore[misc]


def mixed_look_ups() -> None:
    """Whoever shares a look-up is handed the answers of the lead before his own."""

    class MixesUp(MicroBatching[W, T]):
        async def look_up(self, world: W, lead_ids: Sequence[str]) -> tuple[T, Places]:
            found, places = await super().look_up(world, lead_ids)
            return found, None if places is None else [max(place - 1, 0) for place in places]

    app.ai.predictor.MicroBatching = MixesUp  # type: ignore[misc,attr-defined]


def batch_in_last_bit() -> None:
    """A scorer whose sums are rounded differently in a batch, as those of a matrix product are."""
    build_scorer = app.ai.loaded_model.build_compiled_scorer  # type: ignore[attr-defined]

    def build(model: FittedModel, kernels: ScoreKernels) -> Scorer:
        score = build_scorer(model, kernels)
        return lambda values: score(values) * (1 - (len(values) > 1) * 2**-52)

    app.ai.loaded_model.build_compiled_scorer = build  # type: ignore[attr-defined]


def keeps_bodies() -> None:
    """Every body that was read stays in memory."""

    class KeepsBodies(BodyLimit):
        kept: ClassVar[list[bytes]] = []

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def keep() -> Message:
                message = await receive()
                self.kept.append(message.get("body", b""))
                return message

            await super().__call__(scope, keep, send)

    app.main.BodyLimit = KeepsBodies  # type: ignore[misc]


def keeps_notes() -> None:
    """Half a kilobyte is kept of each request, by its name."""

    class KeepsNotes(BodyLimit):
        kept: ClassVar[dict[str, bytes]] = {}

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.kept[str(uuid4())] = bytes(500)
            await super().__call__(scope, receive, send)

    app.main.BodyLimit = KeepsNotes  # type: ignore[misc]


def reads_first() -> None:
    """A body is looked at when all of it is there."""

    class ReadsFirst(BodyLimit):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            messages = [await receive()]
            while messages[-1].get("more_body"):
                messages.append(await receive())
            messages.reverse()

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await super().__call__(scope, replay, send)

    app.main.BodyLimit = ReadsFirst  # type: ignore[misc]


PLANTS: dict[str, Callable[[], None]] = {
    "stock-protocol": stock_protocol,
    "swap-in-place": swap_in_place,
    "driver-timeout": driver_timeout,
    "no-limit": no_limit,
    "leaking-places": leaking_places,
    "no-retry-after": no_retry_after,
    "hasty-telemetry": hasty_telemetry,
    "mixed-look-ups": mixed_look_ups,
    "batch-in-last-bit": batch_in_last_bit,
    "unguarded": unguarded,
    "slow-telemetry": slow_telemetry,
    "other-probabilities": other_probabilities,
    "keeps-bodies": keeps_bodies,
    "keeps-notes": keeps_notes,
    "reads-first": reads_first,
}


if __name__ == "__main__":
    PLANTS[sys.argv[1]]()
    serve(load_settings())
