"""The hardened edge: lead IDs in, the full answer out. Reads, calls the predictor, maps; decides nothing."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response

from app.ai.dependencies import DirectRoute, predictor_of, record_of
from app.ai.domain import VERDICTS, Extra, Predictions, Receipt, RequestContext
from app.ai.scoring_requests import SCORING_ERRORS, read_lead_ids
from app.schemas.ai_ml import PredictBatchResponse
from app.schemas.openapi import describe_answers, describe_scoring_body

PREFIX = "/ai/advanced-ml"

_VERDICTS = np.array(VERDICTS, object)


def build_router(
    max_batch_size: int,
    max_reasons_batch: int,
    dependencies: Sequence[Any] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> APIRouter:
    """Returns the routes; `clock` is the one `RequestRecord.started` was taken from."""
    offered: dict[Extra, int] = {
        "interval": max_batch_size,
        "reasons": max_reasons_batch,
        "features": max_reasons_batch,
    }
    router = APIRouter(
        prefix=PREFIX, tags=["Advanced ML (hardened)"], route_class=DirectRoute, dependencies=dependencies
    )

    @router.post(
        "/predict-batch",
        summary="Score leads",
        responses=describe_answers("One outcome for each ID asked.", PredictBatchResponse, SCORING_ERRORS),
        openapi_extra=describe_scoring_body(max_batch_size, offered.items()),
    )
    async def predict_batch(request: Request) -> Response:
        """Answers each lead ID with a calibrated probability, or with the reason why there is none."""
        record = record_of(request)
        lead_ids, include = await read_lead_ids(request, max_batch_size, offered)
        record.asked = len(lead_ids)
        context = RequestContext(record.as_of, include, record.answer_by)
        record.predictions = await predictor_of(request).predict(lead_ids, context)
        elapsed_ms = (clock() - record.started) * 1000
        body = encode_answer(record.predictions, record.request_id, elapsed_ms)
        return Response(body, media_type="application/json")

    return router


class _Prediction(msgspec.Struct, gc=False):
    lead_id: str
    probability: float
    confidence: float
    calibrated_probability: float
    features_present_ratio: float
    prediction: bool
    verdict: str


class _FullPrediction(_Prediction, gc=False):
    interval: list[float] | msgspec.UnsetType
    receipt: Receipt | msgspec.UnsetType
    reasons: tuple[str, ...] | msgspec.UnsetType
    features: Mapping[str, float | None] | msgspec.UnsetType


class _Error(msgspec.Struct):
    lead_id: str
    position: int
    error_code: str
    message: str


def encode_answer(predictions: Predictions, request_id: str, elapsed_ms: float) -> bytes:
    """Returns the body of a 200, as `PredictBatchResponse` describes it; numbers keep all their digits."""
    answered = len(predictions.lead_ids)
    return msgspec.json.encode(
        {
            "predictions": _build_predictions(predictions),
            "errors": [
                _Error(declined.lead_id, declined.position, declined.code, declined.message)
                for declined in predictions.rejections
            ],
            "model_version": predictions.model.version,
            "model_id": predictions.model.model_id,
            "model_sha256": predictions.model.sha256,
            "total_processed": predictions.asked,
            "successful_predictions": answered,
            "failed_predictions": len(predictions.rejections),
            "processing_time_ms": round(elapsed_ms, 3),
            "cache_hit": 0 < answered == predictions.cache_hits,
            "cache_hits": predictions.cache_hits,
            **predictions.describe_age(),
            "schema_version": "v1",
            "contract_version": 1,
            "calibration_metadata": {
                "calibration_method": predictions.calibration_method,
                "raw_probabilities_count": answered,
                "calibrated_probabilities_count": answered,
                "avg_feature_coverage": float(predictions.coverage.sum()) / answered if answered else 0.0,
                "confidence_method": predictions.confidence_method,
                "bounds": predictions.bounds,
            },
            "request_id": request_id,
        }
    )


def _build_predictions(predictions: Predictions) -> list[_Prediction]:
    extras = _build_extras(predictions)
    probability = predictions.probability.tolist()
    verdict = _VERDICTS[predictions.verdict].tolist()
    return list(
        map(
            _FullPrediction if extras else _Prediction,
            predictions.lead_ids,
            probability,
            predictions.confidence.tolist(),
            probability,
            predictions.coverage.tolist(),
            predictions.prediction.tolist(),
            verdict,
            *extras,
        )
    )


def _build_extras(predictions: Predictions) -> list[Iterable[Any]]:
    """Returns what `_FullPrediction` has besides the usual, field by field; nothing if nothing was asked."""
    intervals, explanations, features = predictions.intervals, predictions.explanations, predictions.features
    if intervals is None and explanations is None and features is None:
        return []
    unset = repeat(msgspec.UNSET)
    return [
        unset if intervals is None else intervals.tolist(),
        unset if explanations is None else (explanation.receipt for explanation in explanations),
        unset if explanations is None else (explanation.reasons for explanation in explanations),
        unset if features is None else features,
    ]
