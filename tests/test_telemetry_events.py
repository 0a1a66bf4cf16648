"""The event schemas are closed: numbers, codes, digests, and nothing anybody typed."""

import json

import msgspec
import numpy as np
import pytest

from app.ai.domain import ModelRef, Predictions, Rejection
from app.ai.events import (
    SCHEMAS,
    ModelLoaded,
    ModelLoadFailed,
    PredictionError,
    PredictionSuccess,
    RequestRecord,
    Summary,
    build_prediction_event,
    build_summaries,
    encode_event,
)

CANARY = "Zoë Quicksilver <zoe@example.org>"
ERROR = PredictionError(
    route="/ai/advanced-ml/predict-batch", status=422, trace_id=None, latency_ms=1.5,
    error_code="EMPTY_BATCH", asked=None,
)  # fmt: skip


def make_predictions(
    lead_ids: list[str], probability: list[float], rejected: str | None = None
) -> Predictions:
    values = np.array(probability)
    return Predictions(
        asked=len(lead_ids) + (rejected is not None),
        lead_ids=lead_ids,
        probability=values,
        confidence=np.maximum(values, 1 - values),
        coverage=np.full(len(values), 0.75),
        prediction=values >= 0.5,
        verdict=np.zeros(len(values), np.uint8),
        cache_hits=1,
        rejections=()
        if rejected is None
        else (Rejection(rejected, 2, "LEAD_NOT_FOUND", f"No lead {rejected}"),),
        model=ModelRef("advanced_ml_20260101_120000", "20260101_120000", "ab" * 32, "cd" * 32),
        calibration_method="sigmoid",
        confidence_method="max_probability",
        bounds=(0.01, 0.99),
        stages_ms={"database": 1.2504, "scoring": 0.49961},
    )


def make_record(predictions: Predictions | None = None, error_code: str | None = None) -> RequestRecord:
    record = RequestRecord("req-1", started=0.0, as_of=0.0, route="/ai/advanced-ml/predict-batch")
    record.predictions, record.error_code = predictions, error_code
    return record


def read_event(action: str, meta: str) -> object:
    return msgspec.json.decode(meta, type=SCHEMAS[action])  # type: ignore[index]


def test_an_answered_batch_is_told_in_counts_and_summaries_without_a_single_lead_id() -> None:
    predictions = make_predictions(["zoe@example.org", "lead_2"], [0.25, 0.75], rejected="nobody@example.org")
    event = build_prediction_event(make_record(predictions), 200, 3.0)
    assert isinstance(event, PredictionSuccess)
    assert (event.asked, event.answered, event.rejections) == (3, 2, {"LEAD_NOT_FOUND": 1})
    assert (event.positives, event.cache_hits, event.verdicts.ok) == (1, 1, 2)
    assert (event.probability.min, event.probability.max, event.probability.mean) == (0.25, 0.75, 0.5)
    assert event.stages_ms == {"database": 1.25, "scoring": 0.5}
    stored = encode_event(event, "id", "2026-01-01T00:00:00Z", "req-1")
    assert "example" not in stored.meta
    assert "lead_2" not in stored.meta


def test_a_request_that_failed_after_scoring_is_an_error_event() -> None:
    event = build_prediction_event(make_record(make_predictions(["a"], [0.5]), "INTERNAL_ERROR"), 500, 3.0)
    assert isinstance(event, PredictionError)
    assert event.error_code == "INTERNAL_ERROR"


def test_a_batch_without_any_answer_has_empty_summaries() -> None:
    event = build_prediction_event(make_record(make_predictions([], [], rejected="x")), 200, 3.0)
    assert isinstance(event, PredictionSuccess)
    assert event.probability.mean is None
    encode_event(event, "id", "2026-01-01T00:00:00Z")


def test_each_row_is_summarised_by_itself() -> None:
    rising, constant = build_summaries(np.array([np.arange(11.0)[::-1], np.full(11, 0.5)]))
    assert rising == Summary(min=0.0, p10=1.0, p50=5.0, p90=9.0, max=10.0, mean=5.0)
    assert constant == Summary(min=0.5, p10=0.5, p50=0.5, p90=0.5, max=0.5, mean=0.5)
    assert build_summaries(np.array([[0.25], [1.0]])) == [Summary(*[0.25] * 6), Summary(*[1.0] * 6)]
    assert [summary.p50 for summary in build_summaries(np.empty((2, 0)))] == [None, None]


def test_a_summary_has_six_decimals() -> None:
    one, two = build_summaries(np.array([[1 / 3]])) + build_summaries(np.array([[1 / 3, 2 / 3]]))
    assert one == Summary(*[0.333333] * 6)
    assert (two.min, two.max, two.mean) == (0.333333, 0.666667, 0.5)


def test_every_action_reads_back_what_was_written() -> None:
    events = [
        build_prediction_event(make_record(make_predictions(["a"], [0.3])), 200, 1.0),
        ERROR,
        ModelLoaded(
            model_id="advanced_ml_1",
            model_version="1",
            model_sha256="0" * 64,
            feature_count=20,
            duration_ms=9.0,
        ),
        ModelLoadFailed(reason="bad_digest", duration_ms=1.0),
    ]
    stored = [encode_event(event, "id", "2026-01-01T00:00:00Z") for event in events]
    assert {event.action for event in stored} == set(SCHEMAS)
    assert [read_event(event.action, event.meta) for event in stored] == events


@pytest.mark.parametrize("action", SCHEMAS)
def test_an_extra_field_is_refused(action: str) -> None:
    event = {
        "ml.prediction.success": build_prediction_event(
            make_record(make_predictions(["a"], [0.3])), 200, 1.0
        ),
        "ml.prediction.error": ERROR,
        "ml.model.load": ModelLoaded(
            model_id="m", model_version="1", model_sha256="0" * 64, feature_count=1, duration_ms=1.0
        ),
        "ml.model.load_failed": ModelLoadFailed(reason="bad_digest", duration_ms=1.0),
    }[action]
    content = msgspec.to_builtins(event)
    assert read_event(action, json.dumps(content)) == event
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        read_event(action, json.dumps({**content, "email": CANARY}))


def test_no_text_field_lets_a_person_through() -> None:
    success = build_prediction_event(make_record(make_predictions(["a"], [0.3])), 200, 1.0)
    failed = ModelLoadFailed(reason="bad_digest", duration_ms=1.0, model_version="1")
    refused = 0
    for event in (success, ERROR, failed):
        for name, value in msgspec.to_builtins(event).items():
            if not isinstance(value, str | None):
                continue
            with pytest.raises(msgspec.ValidationError):
                encode_event(msgspec.structs.replace(event, **{name: CANARY}), "id", "2026-01-01T00:00:00Z")
            refused += 1
    assert refused >= 9


def test_no_key_of_a_mapping_lets_a_person_through() -> None:
    success = build_prediction_event(make_record(make_predictions(["a"], [0.3])), 200, 1.0)
    for name, value in (("rejections", {CANARY: 1}), ("stages_ms", {CANARY: 1.0})):
        with pytest.raises(msgspec.ValidationError):
            encode_event(msgspec.structs.replace(success, **{name: value}), "id", "2026-01-01T00:00:00Z")
