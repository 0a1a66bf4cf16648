"""Planted bugs: each does what careless code would do, most of them between the server and the application.

For the self-test of `prove_hostile_input`: each must be found.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.ai.model_manifest import ModelManifest
from app.http_protocol import ProblemProtocol
from bench.hostile_cases import LEGACY, SCORE


def decode_as_the_framework_does(app: ASGIApp) -> ASGIApp:
    """A scoring route that has its body decoded, and its refusals worded, by the framework."""
    stock = FastAPI()

    async def score(lead_ids: list[str]) -> dict[str, Any]:
        return {"predictions": [], "total_processed": len(lead_ids)}

    for path in (SCORE, LEGACY):
        stock.post(path)(score)
    return _only_scoring(app, stock)


def echo_what_is_refused(app: ASGIApp) -> ASGIApp:
    """An error that quotes what it refuses."""

    async def quote(scope: Scope, receive: Receive, send: Send) -> None:
        asked = await _read_body(receive)

        def reword(status: int, body: bytes) -> tuple[int, bytes]:
            if status != 422:
                return status, body
            return status, json.dumps({**json.loads(body), "detail": asked.decode("latin-1")[:400]}).encode()

        await _answer_reworded(app, scope, asked, send, reword)

    return _only_scoring(app, quote)


def answer_an_undocumented_status(app: ASGIApp) -> ASGIApp:
    """An empty batch is a teapot."""

    async def brew(scope: Scope, receive: Receive, send: Send) -> None:
        def reword(status: int, body: bytes) -> tuple[int, bytes]:
            return (418 if b"EMPTY_BATCH" in body else status), body

        await _answer_reworded(app, scope, await _read_body(receive), send, reword)

    return _only_scoring(app, brew)


def keep_the_last_of_two_keys(app: ASGIApp) -> ASGIApp:
    """A layer that decodes the body and writes it anew, as gateways do."""

    async def rewrite(scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive)
        with suppress(ValueError, RecursionError):
            body = json.dumps(json.loads(body), ensure_ascii=False).encode()
        await _answer_reworded(app, scope, body, send, lambda status, answer: (status, answer))

    return _only_scoring(app, rewrite)


def name_another_model(app: ASGIApp) -> ASGIApp:
    """An answer whose numbers are not those of the model it names."""

    async def misname(scope: Scope, receive: Receive, send: Send) -> None:
        def reword(status: int, body: bytes) -> tuple[int, bytes]:
            return status, re.sub(
                rb"20260(\d)01_", lambda found: b"20260%d01_" % (int(found[1]) % 3 + 1), body
            )

        await _answer_reworded(app, scope, await _read_body(receive), send, reword)

    return _only_scoring(app, misname)


def forget_events(app: ASGIApp) -> ASGIApp:
    """A route that answers without telling anybody."""

    class Forgetful:
        async def record(self, *_: object, **__: object) -> None:
            return

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {**scope["state"], "telemetry": Forgetful()}}, receive, send)

    return _only_scoring(app, answer)


class EndlessHeads(ProblemProtocol):
    """A protocol that reads whatever comes, as uvicorn's does."""

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        HttpToolsProtocol.data_received(self, data)


def read_manifest_carelessly(data: bytes) -> ModelManifest:
    """A manifest reader that decodes and leaves it at that."""
    return msgspec.json.decode(data, type=ModelManifest)


def _only_scoring(app: ASGIApp, planted: ASGIApp) -> ASGIApp:
    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        wanted = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in (SCORE, LEGACY)
        await (planted if wanted else app)(scope, receive, send)

    return choose


async def _read_body(receive: Receive) -> bytes:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return body


async def _answer_reworded(
    app: ASGIApp, scope: Scope, body: bytes, send: Send, reword: Callable[[int, bytes], tuple[int, bytes]]
) -> None:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]
    kept: list[Message] = []

    async def receive() -> Message:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    async def keep(message: Message) -> None:
        kept.append(message)

    await app(scope, receive, keep)
    answer = b"".join(message.get("body", b"") for message in kept)
    status, answer = reword(kept[0]["status"], answer)
    await send({**kept[0], "status": status})
    await send({"type": "http.response.body", "body": answer})
