"""Clients that go away in the middle leave their event all the same, once."""

import asyncio
import json
from pathlib import Path

import psycopg

from tests.service import PREDICT, Connection, Service, add_leads, publish_crm_model
from tests.test_kill import wait_for_events


async def send_and_leave(port: int, request_id: str, body: bytes, promised: int) -> None:
    """Promises a body of some length, sends what there is of it, and hangs up without reading."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST {PREDICT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"X-Request-ID: {request_id}\r\nContent-Length: {promised}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(0)
    writer.close()
    await writer.wait_closed()


async def test_whoever_hangs_up_leaves_exactly_one_event(database_url: str, tmp_path: Path) -> None:
    lead_ids = add_leads(database_url, 200)
    body = json.dumps(lead_ids).encode()
    whole = {f"whole-{number}": 0 for number in range(150)}
    half = {f"half-{number}": 0 for number in range(50)}
    with Service(tmp_path, database_url, publish_crm_model(tmp_path / "models")) as service:
        await asyncio.gather(*(send_and_leave(service.port, name, body, len(body)) for name in whole))
        wait_for_events(database_url, whole)  # or those who come next are refused, for too many are under way
        await asyncio.gather(*(send_and_leave(service.port, name, body[:50], len(body)) for name in half))
        rows = wait_for_events(database_url, {**whole, **half})
        connection = await Connection.open(service.port)
        assert (await connection.ask("POST", PREDICT, body))[0] == 200
        await connection.close()
        assert service.stop() == 0
    assert {name: rows.get(name) for name in (*whole, *half)} == dict.fromkeys((*whole, *half), 1)
    with psycopg.connect(database_url) as rows_of:
        given_up = rows_of.execute(
            "SELECT DISTINCT action, meta->>'error_code', meta->>'status' FROM ai_events"
            " WHERE request_id LIKE 'half-%'"
        ).fetchall()
    assert given_up == [("ml.prediction.error", "CLIENT_CLOSED_REQUEST", "499")]
    assert b"unhandled_exception" not in service.stderr.read_bytes()
