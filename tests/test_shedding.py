"""Refusals of scoring requests before anything of them is read."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.ai.events import PredictionError
from app.error_handlers import Problems
from app.errors import TelemetryUnavailableError
from app.middleware.in_flight import Admission
from app.middleware.shedding import Shedding
from tests.fakes import FakeTelemetry
from tests.service import PREDICT, Connection, Service, add_leads, publish_crm_model


class _Caller:
    """What one caller gets from a `Shedding` before an application that only notes that it was reached."""

    def __init__(self, *, full: bool, telemetry: FakeTelemetry | None = None) -> None:
        self.telemetry = telemetry or FakeTelemetry()
        self.sent: list[Any] = []
        self.reached = False
        admission = Admission(limit=1)
        if full:
            admission.enter()
        self._shedding = Shedding(
            self._reach,
            path=PREDICT,
            admission=admission,
            telemetry=lambda _scope: self.telemetry,
            problem=Problems({PREDICT: frozenset({"POST"})}),
        )

    async def ask(self, method: str = "POST", path: str = PREDICT, **headers: str) -> None:
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": pairs, "state": {}}
        await self._shedding(scope, self._receive, self._send)

    def read(self) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Returns status, headers and problem document of the one answer."""
        start, body = self.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], headers, json.loads(body["body"])

    async def _reach(self, _scope: Any, _receive: Any, _send: Any) -> None:
        self.reached = True

    async def _receive(self) -> Any:
        raise AssertionError("a refused request is not read")

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


async def test_a_refusal_says_what_every_other_error_does_and_leaves_its_event() -> None:
    caller = _Caller(full=True)
    await caller.ask(x_request_id="mine-1")
    status, headers, problem = caller.read()
    assert status == 503
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == problem["request_id"] == "mine-1"
    assert headers["retry-after"] in ("1", "2", "3")
    assert (problem["error_code"], problem["instance"]) == ("OVERLOADED", PREDICT)
    (event,) = caller.telemetry.events
    assert isinstance(event, PredictionError)
    assert (event.error_code, event.status, event.route) == ("OVERLOADED", 503, PREDICT)
    assert not caller.reached


async def test_a_refusal_whose_event_is_not_durable_is_withheld() -> None:
    caller = _Caller(full=True)
    caller.telemetry.error = TelemetryUnavailableError()
    await caller.ask()
    status, headers, problem = caller.read()
    assert (status, problem["error_code"]) == (503, "TELEMETRY_UNAVAILABLE")
    assert headers["retry-after"] == "1"


async def test_refusals_that_come_together_leave_an_event_each() -> None:
    caller = _Caller(full=True)
    await asyncio.gather(*(caller.ask() for _ in range(20)))
    assert len(caller.telemetry.events) == 20
    names = {dict(message["headers"])[b"x-request-id"] for message in caller.sent if "headers" in message}
    assert len(names) == 20


async def test_one_that_is_given_up_while_it_waits_takes_nobody_with_it() -> None:
    caller = _Caller(full=True)
    tasks = [asyncio.create_task(caller.ask()) for _ in range(2)]
    await asyncio.sleep(0)  # both wait for others by now
    tasks[0].cancel()
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    assert caller.read()[0] == 503


@pytest.mark.parametrize(
    ("full", "method", "path", "headers"),
    [
        (False, "POST", PREDICT, {}),
        (True, "GET", PREDICT, {}),
        (True, "POST", "/ai/advanced-ml-legacy/predict-batch", {}),
        (True, "POST", PREDICT, {"origin": "http://localhost:3000"}),
    ],
)
async def test_everything_else_goes_further_in(
    full: bool, method: str, path: str, headers: dict[str, str]
) -> None:
    caller = _Caller(full=full)
    await caller.ask(method, path, **headers)
    assert caller.reached
    assert not caller.telemetry.events


async def _ask_until_refused(port: int, body: bytes) -> None:
    while True:
        connection = await Connection.open(port)
        status = (await connection.ask("POST", PREDICT, body))[0]
        await connection.close()
        if status == 503:
            return


async def test_the_connection_of_a_refused_request_stays_in_use(database_url: str, tmp_path: Path) -> None:
    (lead_id,) = add_leads(database_url, 1)
    large = json.dumps([lead_id] + ["00000000-0000-4000-8000-000000000000"] * 1999).encode()
    models = publish_crm_model(tmp_path / "models")
    limits = {
        "AI_MAX_REQUESTS_IN_FLIGHT": "1",
        "AI_REQUEST_DEADLINE_SECONDS": "50",
        "DATABASE_DEADLINE_SECONDS": "40",
    }
    with Service(tmp_path, database_url, models, **limits) as service:
        first, other = await Connection.open(service.port), await Connection.open(service.port)
        with psycopg.connect(database_url) as blocker:
            blocker.execute("LOCK TABLE people IN ACCESS EXCLUSIVE MODE")
            held = asyncio.create_task(first.ask("POST", PREDICT, json.dumps([lead_id]).encode()))
            await _ask_until_refused(service.port, b"[]")  # refused as such until the one place is taken
            refused = [
                await other.ask("POST", PREDICT, large, [("X-Request-ID", f"refused-{number}"), *origin])
                for number, origin in enumerate([(), (), [("Origin", "http://localhost:3000")]])
            ]
        assert (await held)[0] == 200
        assert (await other.ask("POST", PREDICT, json.dumps([lead_id]).encode()))[0] == 200
        await first.close()
        await other.close()
        assert service.stop() == 0
    for number, (status, head, body) in enumerate(refused):
        assert (status, json.loads(body)["error_code"]) == (503, "OVERLOADED")
        assert re.search(rb"(?i)\r\nretry-after: [123]\r\n", head)
        assert re.search(rb"(?i)\r\nx-request-id: refused-%d\r\n" % number, head)
    assert b"access-control-allow-origin: http://localhost:3000" in refused[2][1].lower()
    with psycopg.connect(database_url) as rows_of:
        rows = rows_of.execute(
            "SELECT request_id, meta->>'error_code' FROM ai_events"
            " WHERE request_id LIKE 'refused-%' ORDER BY 1"
        ).fetchall()
    assert rows == [(f"refused-{number}", "OVERLOADED") for number in range(3)]
