"""One deadline for a whole request: a step may wait for long by itself, but not all of them in turn."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.ai.domain import RequestContext
from app.ai.drift_window import DriftWindow
from app.ai.ml_telemetry import MlTelemetry
from app.ai.prediction_cache import NullCache
from app.ai.predictor import Predictor, ScoringPolicy
from app.error_handlers import ErrorBoundary, Problems
from app.middleware.audit import AuditMiddleware
from app.middleware.in_flight import RECORD_SECONDS, Admission, InFlightLimit
from app.middleware.request_id import RequestIdMiddleware
from app.settings import Settings
from tests.fakes import FakeLeadSource, FakeModels
from tests.lead_models import AS_OF, build_lead_bundle, build_lead_rows
from tests.test_telemetry_shipping import GatedLog, GatedTable

SCORE = "/ai/advanced-ml/predict-batch"
STEP_SECONDS = 60.0  # what each step would wait by itself
PATIENCE_SECONDS = 15.0


def build_app(source: FakeLeadSource, telemetry: MlTelemetry, executor: ThreadPoolExecutor) -> ASGIApp:
    """The layers a scoring request goes through, with a deadline that leaves a moment besides the event's."""
    predictor = Predictor(
        FakeModels(build_lead_bundle()), source, NullCache(), DriftWindow(10),
        executor=executor, policy=ScoringPolicy(0.6, "max_probability"),
    )  # fmt: skip

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        record = scope["state"]["record"]
        await Request(scope, receive).body()
        context = RequestContext(AS_OF, answer_by=record.answer_by)
        record.predictions = await predictor.predict(["lead_0"], context)
        await Response(b"{}", media_type="application/json")(scope, receive, send)

    problems, admission = Problems({SCORE: frozenset({"POST"})}), Admission(10)
    limited = InFlightLimit(
        endpoint, paths={SCORE}, admission=admission, deadline_seconds=RECORD_SECONDS + 0.05
    )
    return RequestIdMiddleware(
        AuditMiddleware(
            ErrorBoundary(limited, problems=problems),
            telemetry=lambda _: telemetry,
            problem=problems,
            admission=admission,
            routes=frozenset({SCORE}),
        )
    )


@pytest.mark.parametrize(
    ("hung", "answer"),
    [
        ((), (200, None)),
        (("leads",), (503, "OVERLOADED")),
        (("disk", "events"), (503, "TELEMETRY_UNAVAILABLE")),
        (("leads", "disk", "events"), (503, "TELEMETRY_UNAVAILABLE")),
    ],
    ids=["nothing", "leads", "event", "everything"],
)
async def test_steps_that_hang_one_after_the_other_share_the_deadline(
    tmp_path: Path, hung: tuple[str, ...], answer: tuple[int, str | None]
) -> None:
    source = FakeLeadSource({"lead_0": build_lead_rows(1, seed=1)[0]})
    log, table = GatedLog(tmp_path), GatedTable()
    if "events" not in hung:
        table.gate.set()
    # A disk that is never quick: on the event loop nothing could end the wait for it.
    telemetry = MlTelemetry(log, table, record_deadline_seconds=STEP_SECONDS, quick_disk_seconds=0)
    await telemetry.open()
    if "leads" in hung:
        source.gate = asyncio.Event()
    if "disk" in hung:
        log.gate.clear()
    with ThreadPoolExecutor(1) as executor:
        transport = httpx2.ASGITransport(build_app(source, telemetry, executor))
        async with (
            httpx2.AsyncClient(transport=transport, base_url="http://test") as client,
            asyncio.timeout(PATIENCE_SECONDS),
        ):
            response = await client.post(SCORE, content=b"[]")
    assert (response.status_code, response.json().get("error_code")) == answer
    log.gate.set()
    table.gate.set()
    await telemetry.close()


def test_the_deadline_leaves_time_for_the_database_and_the_event() -> None:
    assert Settings(_env_file=None, database_deadline_seconds=4).ai_request_deadline_seconds == 5  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="AI_REQUEST_DEADLINE_SECONDS"):
        Settings(_env_file=None, database_deadline_seconds=4.1)  # type: ignore[call-arg]
