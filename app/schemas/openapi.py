"""What OpenAPI says that FastAPI cannot derive: the two body shapes, and every error a route may answer with.

Routes decode their bodies and answer their errors themselves, so both are described here, from the pydantic
contract and the error tree. Pure. Called by the routers, `health` and `main`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from app.errors import (
    InternalError,
    LeadScoringError,
    MalformedRequestError,
    MethodNotAllowedError,
)
from app.schemas.ai_ml import LeadIdArray, LeadIdObject, Problem

PROBLEM_MEDIA_TYPE = "application/problem+json"

_REFERENCES = "#/components/schemas/{model}"
_REQUEST_ID = {"schema": {"type": "string"}, "description": "The request's ID; also in every error body."}
_RETRY_AFTER = {"schema": {"type": "integer"}, "description": "Seconds to wait before a retry."}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "Always `Bearer`."}},
    405: {"Allow": {"schema": {"type": "string"}, "description": "The methods this path answers to."}},
    429: {"Retry-After": _RETRY_AFTER},
    503: {"Retry-After": _RETRY_AFTER},
}
_DEPRECATED: dict[str, Any] = {
    name: {"schema": {"type": "string"}, "description": description}
    for name, description in {
        "Deprecation": "Since when the route is, as `@` and seconds since 1970-01-01 UTC (RFC 9745).",
        "Sunset": "When it ends, where that is known (RFC 8594).",
        "Link": 'What takes its place, as `rel="successor-version"`.',
    }.items()
}
_CARD = "/ai/advanced-ml/models/{version}/card"
_NAMES_VERSION = {
    ("/ai/advanced-ml/predict-batch", "post"): "model_version",
    ("/ai/advanced-ml-legacy/predict-batch", "post"): "model_used",
    ("/ai/advanced-ml/models", "get"): "version",
}
"""Which field of an answer names the version that a model card is asked by."""
_EVERYWHERE = (MalformedRequestError, MethodNotAllowedError, InternalError)

Responses = dict[int | str, dict[str, Any]]


def describe_answers(
    description: str, model: type | None, errors: Sequence[type[LeadScoringError]] = ()
) -> Responses:
    """Returns the `responses` of a route: its 200, its `errors`, and what may happen anywhere."""
    answers: Responses = {200: {"description": description, "headers": {"X-Request-ID": _REQUEST_ID}}}
    if model is not None:
        answers[200]["model"] = model
    kinds: tuple[type[LeadScoringError], ...] = (*_EVERYWHERE, *errors)
    for status, named in _group_by_status(kinds):
        answers[status] = _describe_problem(status, named)
    return answers


def describe_scoring_body(max_batch_size: int, extras: Iterable[tuple[str, int]] = ()) -> dict[str, Any]:
    """Returns the `openapi_extra` of a scoring route: either shape of body, with its limits.

    `extras` are what the query parameter `include` may name, and with how many lead IDs at most; without any
    there is no parameter.
    """
    array, wrapped = (
        {"$ref": _REFERENCES.format(model=model.__name__)} for model in (LeadIdArray, LeadIdObject)
    )
    examples = {
        "raw array": {"value": ["lead_1", "lead_2"]},
        "wrapped object": {"value": {"lead_ids": ["lead_1", "lead_2"]}},
    }
    description = f"1 to {max_batch_size} lead IDs; order and duplicates are kept."
    content = {"application/json": {"schema": {"anyOf": [array, wrapped]}, "examples": examples}}
    limits = dict(extras)
    parameters = [_describe_include(limits, max_batch_size)] if limits else []
    body = {"required": True, "description": description, "content": content}
    return {"parameters": parameters, "requestBody": body}


def _describe_include(limits: Mapping[str, int], max_batch_size: int) -> dict[str, Any]:
    fewer = (f" {extra}: at most {most} lead IDs." for extra, most in limits.items() if most < max_batch_size)
    one = f"({'|'.join(limits)})"
    return {
        "name": "include",
        "in": "query",
        "required": False,
        "description": "What each prediction is to carry besides the usual: "
        f"{' or '.join(limits)}, or several separated by commas.{''.join(fewer)}",
        "schema": {"type": "string", "pattern": f"^({one}(,{one})*)?$", "example": next(iter(limits))},
    }


def complete_document(
    document: dict[str, Any], max_batch_size: int, guard_errors: Sequence[type[LeadScoringError]]
) -> dict[str, Any]:
    """Adds the schemas routes only refer to, `guard_errors` where a credential is asked for, links, headers.

    Returns the same document.
    """
    models = [(model, "validation") for model in (LeadIdArray, LeadIdObject, Problem)]
    _, definitions = models_json_schema(models, ref_template=_REFERENCES)  # type: ignore[arg-type]
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for name in schemas.keys() - {LeadIdObject.__name__}:
        schemas[name].pop("additionalProperties", None)  # answers may get fields, which a client is to ignore
    schemas["LeadIdArray"]["maxItems"] = max_batch_size
    schemas["LeadIdObject"]["properties"]["lead_ids"]["maxItems"] = max_batch_size
    for (path, method), field in _NAMES_VERSION.items():
        if path in document["paths"]:
            _link_to_card(document, document["paths"][path][method]["responses"]["200"], field)
    for path in document["paths"].values():
        for operation in path.values():
            if "security" in operation:
                _add_errors(operation["responses"], guard_errors)
            if operation.get("deprecated"):
                for answer in operation["responses"].values():
                    answer["headers"] |= _DEPRECATED
    return document


def _add_errors(answers: dict[str, Any], errors: Sequence[type[LeadScoringError]]) -> None:
    for status, named in _group_by_status(errors):
        added = _describe_problem(status, named)
        there = answers.setdefault(str(status), added)
        if there is added:
            continue
        there["description"] += f" or {added['description']}"
        content = there["content"].setdefault(PROBLEM_MEDIA_TYPE, {"examples": {}})
        content["examples"] |= added["content"][PROBLEM_MEDIA_TYPE]["examples"]
        content["schema"] = added["content"][PROBLEM_MEDIA_TYPE]["schema"]


def _group_by_status(
    errors: Sequence[type[LeadScoringError]],
) -> list[tuple[int, list[type[LeadScoringError]]]]:
    by_status: dict[int, list[type[LeadScoringError]]] = {}
    for error in dict.fromkeys(errors):
        by_status.setdefault(error.status, []).append(error)
    return sorted(by_status.items())


def _link_to_card(document: Mapping[str, Any], answer: dict[str, Any], field: str) -> None:
    answer["links"] = {
        "card": {
            "operationId": document["paths"][_CARD]["get"]["operationId"],
            "parameters": {"version": f"$response.body#/{field}"},
            "description": "The model card of the version that is named.",
        }
    }


def _describe_problem(status: int, kinds: Sequence[type[LeadScoringError]]) -> dict[str, Any]:
    return {
        "description": " or ".join(f"`{kind.code}`" for kind in kinds),
        "headers": {"X-Request-ID": _REQUEST_ID, **_HEADERS.get(status, {})},
        "content": {
            PROBLEM_MEDIA_TYPE: {
                "schema": {"$ref": _REFERENCES.format(model="Problem")},
                "examples": {kind.code: {"value": _example(kind)} for kind in kinds},
            }
        },
    }


def _example(kind: type[LeadScoringError]) -> dict[str, Any]:
    return {
        "type": f"urn:lead-scoring:problem:{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": kind.default_detail,
        "instance": "/ai/advanced-ml/predict-batch",
        "error_code": kind.code,
        "request_id": "0193572e-7d2c-7c4e-9d3a-2f1b8c5a6e70",
        "timestamp": "2026-01-01T12:00:00Z",
        "errors": [],
    }
