"""Serves the model card that training wrote beside a manifest, as a page or as Markdown.

Nothing is rendered here and no path is taken from the caller: a version is looked for among the models that
the registry finds, and the file is opened the way artifacts are. A page may load nothing and run nothing.
`main` mounts the route.
"""

import asyncio
import re
from typing import Annotated, Any, get_args

import structlog
from fastapi import APIRouter, Depends, Path, Request, Response

from app.ai.model_manifest import CardForm
from app.ai.model_registry import ModelRegistry
from app.errors import ArtifactError, InvalidParameterError, NotFoundError
from app.schemas.openapi import Responses, describe_answers

PATH = "/ai/advanced-ml/models/{version}/card"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
"""What a card is sent with: it has its own styles, and may load and run nothing else at all."""

_MEDIA_TYPES: dict[CardForm, str] = {"html": "text/html", "markdown": "text/markdown"}
_VERSION = r"^[0-9]{8}_[0-9]{6}$"

_log = structlog.get_logger()


async def _get_registry(request: Request) -> ModelRegistry:
    registry: ModelRegistry = request.state.registry
    return registry


# Checked by hand: the framework's refusal speaks of request bodies.
Version = Annotated[str, Path(json_schema_extra={"pattern": _VERSION}, examples=["20260101_120000"])]
Registry = Annotated[ModelRegistry, Depends(_get_registry)]


def build_router() -> APIRouter:
    """Returns the route, for GET and HEAD."""
    router = APIRouter(tags=["Operations"])
    router.add_api_route(
        PATH, get_card, methods=["GET"], summary="The model card of a version, for people",
        response_class=Response, responses=_describe_card(), openapi_extra={"parameters": [_FORMAT]},
    )  # fmt: skip
    router.add_api_route(PATH, get_card, methods=["HEAD"], include_in_schema=False)
    return router


async def get_card(version: Version, request: Request, registry: Registry) -> Response:
    """Answers with what a model is for, what it was made from, how good it is and where it is not."""
    form = _read_form(request)
    if re.fullmatch(_VERSION, version) is None:
        raise InvalidParameterError("A version has the form YYYYMMDD_HHMMSS; the list of models names them.")
    try:
        body = await asyncio.to_thread(registry.read_card, version, form)
    except ArtifactError as exc:
        if exc.reason != "missing":
            _log.warning("card_refused", version=version, reason=exc.reason)
        raise NotFoundError("There is no model card of this version.") from exc
    return Response(body, headers=_HEADERS, media_type=_MEDIA_TYPES[form])


def _read_form(request: Request) -> CardForm:
    match request.query_params.multi_items():
        case []:
            return "html"
        case [("format", "html" | "markdown" as form)]:
            return form
    raise InvalidParameterError("The one query parameter of a model card is format: html or markdown.")


def _describe_card() -> Responses:
    text: dict[str, Any] = {"schema": {"type": "string"}}
    answers = describe_answers("The card.", None, (NotFoundError, InvalidParameterError))
    answers[200]["content"] = dict.fromkeys(_MEDIA_TYPES.values(), text)
    return answers


_FORMAT: dict[str, Any] = {
    "name": "format",
    "in": "query",
    "required": False,
    "description": "A page for a browser, which is the default, or the same facts as Markdown.",
    "schema": {"type": "string", "enum": list(get_args(CardForm))},
}
