"""The legacy edge: the old contract over the same predictor, behind a circuit breaker, until it is retired.

An open circuit is answered with 503 and never with a score made up some other way. Errors of the caller are
raised before the breaker is asked, so they cannot trip it. Called by `main`, which mounts it behind its flag.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from app.ai.dependencies import DirectRoute, breaker_of, predictor_of, record_of
from app.ai.domain import Predictions, RequestContext
from app.ai.scoring_requests import SCORING_ERRORS, read_lead_ids
from app.errors import CircuitOpenError
from app.metrics import observe_breaker
from app.schemas.ai_ml import LegacyPredictBatchResponse
from app.schemas.openapi import describe_answers, describe_scoring_body

PREFIX = "/ai/advanced-ml-legacy"


def build_router(max_batch_size: int, dependencies: Sequence[Any] = ()) -> APIRouter:
    """Returns the routes."""
    router = APIRouter(
        prefix=PREFIX,
        tags=["Advanced ML (legacy)"],
        deprecated=True,
        route_class=DirectRoute,
        dependencies=dependencies,
    )
    errors = (*SCORING_ERRORS, CircuitOpenError)

    @router.post(
        "/predict-batch",
        summary="Score leads, in the old shape",
        responses=describe_answers("The leads that could be scored.", LegacyPredictBatchResponse, errors),
        openapi_extra=describe_scoring_body(max_batch_size),
    )
    async def predict_batch(request: Request) -> Response:
        """Answers like the hardened route, with the same numbers; leads without an answer are left out."""
        record, breaker = record_of(request), breaker_of(request)
        lead_ids, _ = await read_lead_ids(request, max_batch_size)
        record.asked = len(lead_ids)
        context = RequestContext(record.as_of, answer_by=record.answer_by)
        try:
            async with breaker.guard():
                record.predictions = await predictor_of(request).predict(lead_ids, context)
        finally:
            observe_breaker(breaker.state)
        return Response(encode_answer(record.predictions, record.request_id), media_type="application/json")

    return router


class _Prediction(msgspec.Struct):
    lead_id: str
    prediction: bool
    probability: float
    confidence: float


def encode_answer(predictions: Predictions, request_id: str) -> bytes:
    """Returns the body of a 200, as `LegacyPredictBatchResponse` describes it."""
    columns = (predictions.prediction, predictions.probability, predictions.confidence)
    return msgspec.json.encode(
        {
            "predictions": list(map(_Prediction, predictions.lead_ids, *(c.tolist() for c in columns))),
            "model_used": predictions.model.version,
            "total_processed": predictions.asked,
            "successful_predictions": len(predictions.lead_ids),
            **predictions.describe_age(),
            "request_id": request_id,
            "via": "legacy-proxy",
        }
    )
