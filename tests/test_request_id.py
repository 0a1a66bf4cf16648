"""Every request has a name; every answer under /ai/ has its event first; every failure has an answer."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx2 as httpx
import pytest
import structlog
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.testing import capture_logs

from app.ai.events import Event, PredictionError, PredictionSuccess, RequestRecord
from app.errors import EmptyBatchError, LeadScoringError, TelemetryUnavailableError
from app.middleware.audit import AuditMiddleware
from app.middleware.in_flight import Admission
from app.middleware.request_id import RequestIdMiddleware
from tests.test_telemetry_events import make_predictions

POST = "/ai/advanced-ml/predict-batch"


UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Journal:
    """Telemetry that notes what happened in which order, and can be out of order itself."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.events: list[tuple[Event, str | None]] = []
        self.under_way: list[int] = []
        self.broken = False
        self.gate: asyncio.Event | None = None

    async def record(
        self,
        build: Callable[[], Event],
        request_id: str | None = None,
        *,
        deadline_seconds: float | None = None,
        under_way: int = 0,
    ) -> None:
        if self.broken:
            raise TelemetryUnavailableError
        self.under_way.append(under_way)
        self.submit(build, request_id)
        if self.gate is not None:
            await self.gate.wait()

    def submit(self, build: Callable[[], Event], request_id: str | None = None) -> None:
        self.steps.append("event")
        self.events.append((build(), request_id))

    def backlog(self) -> int:
        return 0

    def state(self) -> str:
        return "ok"


def build_problem(scope: Scope, error: LeadScoringError) -> ASGIApp:
    record: RequestRecord = scope["state"]["record"]
    record.error_code = error.code
    return JSONResponse({"error_code": error.code, "request_id": record.request_id}, error.status)


async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
    """What the application does is told by the query."""
    record: RequestRecord = scope["state"]["record"]
    match scope["query_string"].decode():
        case "refuse":
            await build_problem(scope, EmptyBatchError())(scope, receive, send)
        case "raise":
            raise ValueError("zoe@example.org")
        case "silent":
            return
        case "hang":
            await asyncio.Event().wait()
        case "wait-for-disconnect":
            while (await receive())["type"] != "http.disconnect":
                pass
        case "cut":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ValueError("zoe@example.org")
        case "many":
            record.asked, record.predictions = 65, make_predictions(["lead_1"], [0.3])
            await JSONResponse({})(scope, receive, send)
        case _:
            if scope["method"] == "POST":
                record.predictions = make_predictions(["lead_1"], [0.3])
            structlog.get_logger().info("inside")
            headers = {"Access-Control-Allow-Origin": "http://localhost:3000", "Vary": "Origin"}
            await JSONResponse({"as_of": record.as_of}, headers=headers)(scope, receive, send)


def build_app(journal: Journal, admission: Admission | None = None, **options: object) -> ASGIApp:
    audit = AuditMiddleware(
        endpoint,
        telemetry=lambda _: journal,
        problem=build_problem,
        admission=admission or Admission(10),
        routes=frozenset({POST, "/livez"}),
    )
    return RequestIdMiddleware(audit, **options)  # type: ignore[arg-type]


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def send_raw(
    app: ASGIApp, path: str, query: str = "", *, incoming: Sequence[Message] = ({"type": "http.request"},)
) -> list[Message]:
    """Speaks ASGI to the application; returns what it sent."""
    sent: list[Message] = []
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": query.encode(),
        "headers": [],
    }
    messages = iter(incoming)

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 64])
async def test_a_wellformed_request_id_is_kept(given: str) -> None:
    journal = Journal()
    async with client_of(build_app(journal)) as client:
        answer = await client.post(POST, headers={"X-Request-ID": given})
    assert answer.headers["X-Request-ID"] == given
    assert [request_id for _, request_id in journal.events] == [given]


@pytest.mark.parametrize(
    "given",
    ["", "x" * 65, "a b", "zoe@example.org", "a\tb", "<script>", "a,b", "a/b", "abc\u00e9"],
)
async def test_any_other_request_id_is_replaced_by_a_uuid7(given: str) -> None:
    async with client_of(build_app(Journal())) as client:
        answer = await client.post(POST, headers=[(b"X-Request-ID", given.encode("latin-1"))])
    assert UUID7.fullmatch(answer.headers["X-Request-ID"])


async def test_a_request_id_sent_twice_is_believed_neither_time() -> None:
    async with client_of(build_app(Journal())) as client:
        answer = await client.post(POST, headers=[("X-Request-ID", "one"), ("X-Request-ID", "two")])
    assert UUID7.fullmatch(answer.headers["X-Request-ID"])
    assert len(answer.headers.get_list("X-Request-ID")) == 1


@pytest.mark.parametrize(
    ("given", "trace_id"),
    [
        (f"00-{'ab' * 16}-{'cd' * 8}-01", "ab" * 16),
        (f"01-{'ab' * 16}-{'cd' * 8}-01-more", "ab" * 16),
        (f"ff-{'ab' * 16}-{'cd' * 8}-01", None),
        (f"00-{'00' * 16}-{'cd' * 8}-01", None),
        (f"00-{'ab' * 16}-{'00' * 8}-01", None),
        (f"00-{'AB' * 16}-{'cd' * 8}-01", None),
        ("zoe@example.org", None),
    ],
)
async def test_a_valid_traceparent_reaches_event_and_log(given: str, trace_id: str | None) -> None:
    journal = Journal()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with client_of(build_app(journal)) as client:
            await client.post(POST, headers={"traceparent": given})
    event, _ = journal.events[0]
    assert isinstance(event, PredictionSuccess)
    assert event.trace_id == trace_id
    assert [line.get("trace_id") for line in lines if line["event"] == "inside"] == [trace_id]


async def test_everything_logged_meanwhile_carries_the_request_id_and_nothing_afterwards() -> None:
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with client_of(build_app(Journal())) as client:
            await client.post(POST, headers={"X-Request-ID": "abc"})
        await asyncio.sleep(0)  # what need not be waited for is done in the loop's next turn
        structlog.get_logger().info("afterwards")
    assert [(line["event"], line.get("request_id")) for line in lines] == [
        ("inside", "abc"), ("request", "abc"), ("afterwards", None),
    ]  # fmt: skip
    assert (lines[1]["route"], lines[1]["status"], lines[1]["code"]) == (POST, 200, None)


@pytest.mark.parametrize(
    "moment",
    [
        "2024-10-04T03:25:45.678+00:00",
        "1970-01-01T00:00:00+00:00",
        "2038-01-19T03:14:08+00:00",
        "2028-02-29T23:59:59.999+00:00",
        "2026-03-29T01:00:00+00:00",  # clocks in Europe go forward
        "2026-10-25T01:00:00+00:00",  # and back
        "2026-12-31T23:59:59.999999+00:00",
    ],
)
async def test_as_of_is_the_start_of_the_utc_day(moment: str) -> None:
    now = datetime.fromisoformat(moment)
    async with client_of(build_app(Journal(), now=now.timestamp)) as client:
        as_of = (await client.get("/livez")).json()["as_of"]
    assert datetime.fromtimestamp(as_of, UTC) == now.replace(hour=0, minute=0, second=0, microsecond=0)


CLOCKS = """
import asyncio, json, os, sys, time
from pathlib import Path
from app.ai.ml_telemetry import MlTelemetry
from app.ai.telemetry_log import TelemetryLog
from app.error_handlers import Problems
from app.errors import EmptyBatchError
from app.middleware.request_id import build_record
from tests.test_telemetry_shipping import Table, make_event

async def record():
    table = Table()
    telemetry = MlTelemetry(TelemetryLog(Path(sys.argv[1])), table)
    await telemetry.open()
    await telemetry.record(make_event)
    await telemetry.close()
    return [event.created_at for event in table.rows.values()]

for zone in sys.argv[2:]:
    os.environ["TZ"] = zone
    time.tzset()
    problem = json.loads(Problems({})({"path": "/"}, EmptyBatchError()).body)
    times = [problem["timestamp"], *asyncio.run(record())]
    print(json.dumps([time.strftime("%z"), times, build_record({"headers": []}).as_of]))
"""


def test_times_are_utc_in_whatever_time_zone_the_machine_is(tmp_path: Path) -> None:
    # New York's rules, and the ends of the world, one of which has another day; in no need of zone files.
    zones = ["EST5EDT,M3.2.0,M11.1.0", "<-12>12", "<+14>-14"]
    before = datetime.now(UTC)
    told = subprocess.run(
        [sys.executable, "-c", CLOCKS, str(tmp_path), *zones], check=True, capture_output=True, text=True
    )
    after = datetime.now(UTC)
    lines = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("[")]
    assert len({offset for offset, _, _ in lines}) == len(zones)
    for _, (error, event), as_of in lines:
        for moment in (error, event):
            assert moment.endswith("Z")
            assert before.replace(microsecond=0) <= datetime.fromisoformat(moment) <= after
        assert as_of % 86400 == 0
        assert before.date() <= datetime.fromtimestamp(as_of, UTC).date() <= after.date()


async def test_the_event_comes_before_the_answer() -> None:
    journal = Journal()

    async def send(message: Message) -> None:
        journal.steps.append(message["type"])

    scope: Scope = {
        "type": "http", "method": "POST", "path": POST, "query_string": b"", "headers": [], "state": {},
    }  # fmt: skip
    await build_app(journal)(scope, asyncio.Queue().get, send)
    assert journal.steps == ["event", "http.response.start", "http.response.body"]


async def test_a_refusal_leaves_an_error_event_with_its_code() -> None:
    journal = Journal()
    async with client_of(build_app(journal)) as client:
        answer = await client.post(POST + "?refuse")
    assert answer.status_code == 422
    event, _ = journal.events[0]
    assert isinstance(event, PredictionError)
    assert (event.status, event.error_code, event.route) == (422, "EMPTY_BATCH", POST)


async def test_an_answer_whose_event_is_not_durable_is_withheld_and_keeps_its_cors_headers() -> None:
    journal = Journal()
    journal.broken = True
    async with client_of(build_app(journal)) as client:
        answer = await client.post(POST)
    assert answer.status_code == 503
    assert answer.json()["error_code"] == "TELEMETRY_UNAVAILABLE"
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert answer.headers["Vary"] == "Origin"
    assert "X-Request-ID" in answer.headers


@pytest.mark.parametrize("path", [POST, "/livez", "/anything"])
async def test_an_exception_nobody_caught_is_answered_as_500_and_logged_without_raising(path: str) -> None:
    journal = Journal()
    with capture_logs() as lines:
        async with client_of(build_app(journal)) as client:
            answer = await client.post(path + "?raise", headers={"X-Request-ID": "abc"})
    assert answer.status_code == 500
    assert answer.json() == {"error_code": "INTERNAL_ERROR", "request_id": "abc"}
    assert answer.headers["X-Request-ID"] == "abc"
    assert "unhandled_exception" in [line["event"] for line in lines]
    assert len(journal.events) == (1 if path == POST else 0)


async def test_an_application_that_answers_nothing_is_answered_for() -> None:
    journal = Journal()
    async with client_of(build_app(journal)) as client:
        answer = await client.post(POST + "?silent")
    assert answer.json()["error_code"] == "INTERNAL_ERROR"
    assert len(journal.events) == 1


async def test_an_answer_that_breaks_off_is_left_to_the_server_and_not_begun_again() -> None:
    journal = Journal()
    sent = await send_raw(build_app(journal), POST, "cut")
    assert [message["type"] for message in sent] == ["http.response.start"]


async def test_a_request_cancelled_at_work_leaves_one_event() -> None:
    journal = Journal()
    request = asyncio.create_task(send_raw(build_app(journal), POST, "hang"))
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert [(event.status, event.error_code) for event, _ in journal.events] == [
        (499, "CLIENT_CLOSED_REQUEST")
    ]  # type: ignore[union-attr]


async def test_a_request_cancelled_while_its_event_is_written_leaves_one_event() -> None:
    journal = Journal()
    journal.gate = asyncio.Event()
    request = asyncio.create_task(send_raw(build_app(journal), POST))
    await asyncio.sleep(0)
    assert len(journal.events) == 1
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert len(journal.events) == 1


async def test_a_client_that_went_away_leaves_one_event_and_gets_no_answer() -> None:
    journal = Journal()
    sent = await send_raw(
        build_app(journal), POST, "wait-for-disconnect", incoming=[{"type": "http.disconnect"}]
    )
    assert sent == []
    assert [event.error_code for event, _ in journal.events] == ["CLIENT_CLOSED_REQUEST"]  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["/ai/advanced-ml/health", "/livez", "/metrics", "/docs"])
async def test_reading_leaves_no_event(path: str) -> None:
    journal = Journal()
    async with client_of(build_app(journal)) as client:
        await client.get(path)
        await client.options(path)
    assert journal.events == []


async def test_a_path_nobody_serves_never_becomes_a_label_or_a_log_value() -> None:
    journal = Journal()
    with capture_logs() as lines:
        async with client_of(build_app(journal)) as client:
            await client.post("/ai/zoe@example.org?refuse")
    assert "zoe" not in json.dumps(lines)
    assert "zoe" not in str(journal.events)
    labels = {
        label
        for metric in REGISTRY.collect()
        for sample in metric.samples
        for label in sample.labels.values()
    }
    assert not {label for label in labels if "zoe" in label}
    assert "unmatched" in labels


async def test_other_protocols_pass_through() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    audit = AuditMiddleware(
        app, telemetry=lambda _: Journal(), problem=build_problem, admission=Admission(10)
    )
    await RequestIdMiddleware(audit)({"type": "lifespan"}, asyncio.Queue().get, asyncio.Queue().put)
    assert seen == ["lifespan"]


async def test_a_small_request_knows_of_those_under_way_and_one_with_many_leads_waits_for_none() -> None:
    journal, admission = Journal(), Admission(10)
    for _ in range(3):
        admission.enter()
    app = build_app(journal, admission)
    await send_raw(app, POST)
    await send_raw(app, POST, "many")
    assert journal.under_way == [3, 0]
