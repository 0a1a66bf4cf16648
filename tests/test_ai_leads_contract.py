"""The contract, line by line, against the real application over HTTP with a real database and a real model.

Sections 1 to 3: scoring, operations, errors. Runs by itself:
`python -m pytest tests/test_ai_leads_contract.py`.
"""

import base64
import hashlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psycopg
import pytest
from fastapi import FastAPI

from app.ai.features import FeatureSet
from app.ai.model_manifest import ModelManifest, read_manifest
from app.db.demo_crm import load_demo
from app.schemas.ai_ml import (
    HealthResponse,
    LegacyPredictBatchResponse,
    ModelsResponse,
    PredictBatchResponse,
    Problem,
)
from app.training.publish import publish_model
from app.wiring import find_incompatibility
from tests.in_process import add_odd_leads, build_settings, serve
from tests.lead_models import VERSION, describe_model, publish_lead_model

PEOPLE = 400
UUID = "6f1c0c1e-5f0b-4a57-9a1c-0c6a3f0e9b11"
SCORE, LEGACY = "/ai/advanced-ml/predict-batch", "/ai/advanced-ml-legacy/predict-batch"
HEALTH, MODELS = "/ai/advanced-ml/health", "/ai/advanced-ml/models"
BOTH = pytest.mark.parametrize("path", [SCORE, LEGACY])
ORIGIN = "http://localhost:3000"
CANARY = "canary-7c1f0e"


@pytest.fixture(scope="module")
def crm_url(create_database: Callable[..., str], migrated_template: str) -> str:
    url = create_database("contract", migrated_template)
    load_demo(url, people=PEOPLE, seed=3, until=datetime.now(UTC))
    add_odd_leads(url)
    return url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contract")
    publish_lead_model(path / "models")
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> ModelManifest:
    (path,) = (folder / "models").glob("*.manifest.json")
    return read_manifest(path.read_bytes())


@pytest.fixture(scope="module")
def client(crm_url: str, folder: Path) -> Iterator[httpx2.Client]:
    """A client of the service as it runs by default, over the odd leads too."""
    settings = build_settings(folder, crm_url, lead_source="contract_leads")
    with serve(settings) as base, httpx2.Client(base_url=base) as http:
        yield http


@pytest.fixture(scope="module")
def uncached(crm_url: str, folder: Path) -> Iterator[httpx2.Client]:
    """A client of a service that computes every answer, without telemetry and without the legacy router."""
    settings = build_settings(
        folder,
        crm_url,
        lead_source="contract_leads",
        ml_prediction_cache_ttl_seconds=0,
        ai_enable_legacy_advanced_ml=False,
        ai_telemetry_enabled=False,
    )
    with serve(settings) as base, httpx2.Client(base_url=base) as http:
        yield http


@pytest.fixture(scope="module")
def broken(crm_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a service without models, telemetry log or database, with a route that fails."""

    async def fail() -> None:
        raise ValueError(CANARY)

    def add_failing_route(app: FastAPI) -> None:
        app.add_api_route("/fails", fail)

    path = tmp_path_factory.mktemp("broken")
    (path / "var").mkdir()
    (path / "var" / "telemetry").write_text("a file where a directory should be")
    settings = build_settings(path, re.sub(r"/[^/?]+\?", "/nowhere?", crm_url))
    with serve(settings, add_failing_route) as base, httpx2.Client(base_url=base) as http:
        yield http


def ask(client: httpx2.Client, *lead_ids: str) -> dict[str, Any]:
    response = client.post(SCORE, json=list(lead_ids))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask_until_hits(client: httpx2.Client, hits: int, *lead_ids: str) -> dict[str, Any]:
    """Asks until that many answers come out of the cache."""
    deadline = time.monotonic() + 10
    while (answer := ask(client, *lead_ids))["cache_hits"] != hits:
        assert time.monotonic() < deadline
    return answer


def problem_of(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Asserts that the response is the error `code` in the one shape errors have."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    Problem.model_validate_json(response.content)
    body: dict[str, Any] = response.json()
    assert list(body) == [
        "type", "title", "status", "detail", "instance", "error_code", "request_id", "timestamp", "errors",
    ]  # fmt: skip
    assert body["type"] == f"urn:lead-scoring:problem:{code}"
    assert (body["status"], body["error_code"]) == (status, code)
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["timestamp"].endswith("Z")
    assert abs(datetime.fromisoformat(body["timestamp"]).timestamp() - time.time()) < 5
    assert len(response.content) < 4096
    if status == 503:
        assert int(response.headers["retry-after"]) >= 1
    return body


# --- 1. Scoring: what is asked ----------------------------------------------------------------------------


@BOTH
def test_both_shapes_of_body_get_the_same_answer(client: httpx2.Client, path: str) -> None:
    raw, wrapped = client.post(path, json=["lead_1"]), client.post(path, json={"lead_ids": ["lead_1"]})
    assert raw.status_code == wrapped.status_code == 200
    assert raw.json()["predictions"] == wrapped.json()["predictions"]


@BOTH
@pytest.mark.parametrize(
    "content",
    [
        b"", b"nonsense", b"NaN", b'{"lead_ids": [NaN]}', b'["\\ud800"]', b'"lead_1"', b"{}", b"null",
        b'{"lead_ids": ["a"], "include": []}', b'{"lead_ids": ["a"], "lead_ids": ["a"]}',
        b'{"lead_ids": "lead_1"}', b"[" * 100_000, '["a"]'.encode("utf-16"), b'\xef\xbb\xbf["a"]',
        b'["\xff"]',
    ],
)  # fmt: skip
def test_a_body_of_any_other_kind_is_an_invalid_payload(
    client: httpx2.Client, path: str, content: bytes
) -> None:
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert problem_of(response, 422, "INVALID_PAYLOAD_FORMAT")["instance"] == path


@BOTH
@pytest.mark.parametrize(
    "bad", ["", "a" * 65, "-a", "a b", "a\x00", "ä", "'; DROP TABLE people", 1, None, ["a"]]
)
def test_a_bad_lead_id_is_named_by_pointer_in_either_shape(
    client: httpx2.Client, path: str, bad: object
) -> None:
    for body, pointer in ((["lead_1", bad], "/1"), ({"lead_ids": ["lead_1", bad]}, "/lead_ids/1")):
        problem = problem_of(client.post(path, json=body), 422, "INVALID_LEAD_ID")
        assert [position["pointer"] for position in problem["errors"]] == [pointer]
        assert set(problem["errors"][0]) == {"pointer", "code", "detail"}


def test_errors_name_at_most_twenty_positions(client: httpx2.Client) -> None:
    problem = problem_of(client.post(SCORE, json=[0] * 2000), 422, "INVALID_LEAD_ID")
    assert len(problem["errors"]) == 20


@BOTH
def test_one_to_two_thousand_leads_are_allowed(client: httpx2.Client, path: str) -> None:
    problem_of(client.post(path, json=[]), 422, "EMPTY_BATCH")
    problem_of(client.post(path, json={"lead_ids": []}), 422, "EMPTY_BATCH")
    problem_of(client.post(path, json=["lead_1"] * 2001), 413, "BATCH_SIZE_EXCEEDED")
    assert client.post(path, json=["lead_1"] * 2000).json()["total_processed"] == 2000


def test_a_lead_is_asked_by_uuid_in_any_case_or_by_external_reference_and_comes_back_as_sent(
    client: httpx2.Client,
) -> None:
    asked = [UUID, UUID.upper(), "odd:UUID@x.y_z-1"]
    predictions = ask(client, *asked)["predictions"]
    assert [prediction["lead_id"] for prediction in predictions] == asked
    assert len({prediction["probability"] for prediction in predictions}) == 1


def test_order_and_duplicates_are_kept_and_equal_ids_get_equal_outcomes(client: httpx2.Client) -> None:
    asked = ["lead_9", "nobody", "lead_2", "lead_9", "nobody", "lead_2"]
    answer = ask(client, *asked)
    assert [p["lead_id"] for p in answer["predictions"]] == ["lead_9", "lead_2", "lead_9", "lead_2"]
    assert answer["predictions"][:2] == answer["predictions"][2:]
    assert [(e["lead_id"], e["position"]) for e in answer["errors"]] == [("nobody", 1), ("nobody", 4)]


@BOTH
@pytest.mark.parametrize(
    "query", ["include=nonsense", "include=interval,nonsense", "include=interval,", "x=1", "include=&x"]
)
def test_what_is_not_served_and_unknown_parameters_are_invalid(
    client: httpx2.Client, path: str, query: str
) -> None:
    problem_of(client.post(f"{path}?{query}", json=["lead_1"]), 422, "INVALID_PARAMETER")
    assert client.post(f"{path}?include=", json=["lead_1"]).status_code == 200


# --- 1. Scoring: what is answered -------------------------------------------------------------------------


def test_a_full_answer_has_every_field_and_validates_against_the_published_schema(
    client: httpx2.Client, manifest: ModelManifest
) -> None:
    asked = [*(f"lead_{number}" for number in range(1, PEOPLE + 1)), "nobody", "odd_empty", "odd_rejected"]
    response = client.post(SCORE, json=asked)
    PredictBatchResponse.model_validate_json(response.content)
    answer = response.json()
    assert list(answer) == [
        "predictions", "errors", "model_version", "model_id", "model_sha256", "total_processed",
        "successful_predictions", "failed_predictions", "processing_time_ms", "cache_hit", "cache_hits",
        "schema_version", "contract_version", "calibration_metadata", "request_id",
    ]  # fmt: skip
    assert list(answer["predictions"][0]) == [
        "lead_id", "probability", "confidence", "calibrated_probability", "features_present_ratio",
        "prediction", "verdict",
    ]  # fmt: skip
    assert answer["model_version"] == VERSION
    assert answer["model_id"] == f"advanced_ml_{VERSION}"
    assert answer["model_sha256"] == manifest.sha256
    assert (answer["schema_version"], answer["contract_version"]) == ("v1", 1)
    assert answer["request_id"] == response.headers["x-request-id"]
    assert answer["total_processed"] == len(asked)
    assert answer["successful_predictions"] == len(answer["predictions"]) == PEOPLE + 1
    assert answer["failed_predictions"] == len(answer["errors"]) == 2
    assert answer["processing_time_ms"] > 0


def test_the_numbers_of_an_answer_mean_what_the_contract_says(
    client: httpx2.Client, manifest: ModelManifest
) -> None:
    predictions = ask(client, *(f"lead_{number}" for number in range(1, PEOPLE + 1)))["predictions"]
    for prediction in predictions:
        probability = prediction["probability"]
        assert 0.01 <= probability <= 0.99
        assert prediction["calibrated_probability"] == probability
        assert prediction["confidence"] == max(probability, 1 - probability)
        assert prediction["prediction"] == (probability >= manifest.threshold)
        coverage = prediction["features_present_ratio"]
        assert coverage * 7 == pytest.approx(round(coverage * 7))
        assert prediction["verdict"] != "ok" or coverage >= 0.6
    assert len({prediction["probability"] for prediction in predictions}) > PEOPLE / 4


def test_calibration_metadata_sums_the_answer_up(client: httpx2.Client) -> None:
    answer = ask(client, "lead_1", "lead_2", "nobody")
    ratios = [prediction["features_present_ratio"] for prediction in answer["predictions"]]
    assert answer["calibration_metadata"] == {
        "calibration_method": "sigmoid",
        "raw_probabilities_count": 2,
        "calibrated_probabilities_count": 2,
        "avg_feature_coverage": sum(ratios) / 2,
        "confidence_method": "max_probability",
        "bounds": [0.01, 0.99],
    }


def test_verdicts_tell_how_much_there_was_to_go_on(client: httpx2.Client, manifest: ModelManifest) -> None:
    empty, thin, infinite = ask(client, "odd_empty", "odd_thin", "odd_infinite")["predictions"]
    assert (empty["verdict"], empty["features_present_ratio"]) == ("abstain", 0)
    assert empty["probability"] == manifest.base_rate
    assert (thin["verdict"], infinite["verdict"]) == ("caution", "abstain")
    assert "ok" in {p["verdict"] for p in ask(client, *(f"lead_{n}" for n in range(1, 20)))["predictions"]}


def test_a_lead_that_cannot_be_answered_is_named_with_its_reason_and_fails_nobody_else(
    client: httpx2.Client,
) -> None:
    unknown = ("nobody", str(UUID[:-1] + "2"), "odd_nameless")
    answer = ask(client, "lead_1", "odd_twice", "odd_rejected", "odd_nan", *unknown)
    assert [prediction["lead_id"] for prediction in answer["predictions"]] == ["lead_1", "odd_nan"]
    assert [(error["position"], error["error_code"]) for error in answer["errors"]] == [
        (1, "LEAD_AMBIGUOUS"),
        (2, "FEATURES_REJECTED"),
        (4, "LEAD_NOT_FOUND"),
        (5, "LEAD_NOT_FOUND"),
        (6, "LEAD_NOT_FOUND"),
    ]
    assert all(set(error) == {"lead_id", "position", "error_code", "message"} for error in answer["errors"])


def test_an_answer_without_a_single_prediction_is_still_an_answer(client: httpx2.Client) -> None:
    response = client.post(SCORE, json=["nobody"])
    answer = PredictBatchResponse.model_validate_json(response.content)
    assert (answer.successful_predictions, answer.failed_predictions, answer.cache_hit) == (0, 1, False)


def test_cache_hits_are_counted_and_the_numbers_stay_the_same(client: httpx2.Client, crm_url: str) -> None:
    with psycopg.connect(crm_url) as connection:
        a, b, c = (str(row[0]) for row in connection.execute("SELECT id FROM people LIMIT 3").fetchall())
    first = ask(client, a, b)
    assert (first["cache_hit"], first["cache_hits"]) == (False, 0)
    # On a machine that is busy the cache may be suspended for a moment, and hits are then not promised.
    mixed = ask_until_hits(client, 2, b, "nobody", b.upper())
    assert (mixed["cache_hit"], mixed["failed_predictions"]) == (True, 1)
    again = ask_until_hits(client, 3, a, b, c)
    assert again["cache_hit"] is True
    assert again["predictions"][:2] == first["predictions"]


def test_a_batch_of_two_thousand_equals_single_requests_bit_for_bit(uncached: httpx2.Client) -> None:
    odd = [
        "odd_twice",
        "odd_empty",
        "odd_thin",
        "odd_rejected",
        "odd_nan",
        "odd_infinite",
        "odd_nameless",
        UUID,
        UUID.upper(),
    ]
    known = [f"lead_{number}" for number in range(1, PEOPLE + 1)]
    unknown = [f"nobody_{number}" for number in range(50)]
    asked = ([*known, *odd, *unknown] * 5)[:2000]
    text = uncached.post(SCORE, json=asked).text
    # Compared as text: equal digits are equal bits, and nothing is lost to a parser.
    together = iter(re.findall(r'\{"lead_id":"[^"]+","probability":[^}]*\}', text))
    errors = iter(json.loads(text)["errors"])
    alone = {lead_id: uncached.post(SCORE, json=[lead_id]) for lead_id in dict.fromkeys(asked)}
    for position, lead_id in enumerate(asked):
        answer = alone[lead_id]
        if answer.json()["predictions"]:
            assert next(together) in answer.text
        else:
            assert next(errors) == {**answer.json()["errors"][0], "position": position}
    assert next(together, None) is None
    assert next(errors, None) is None


ODD_LEADS = [*(f"lead_{number}" for number in range(1, 97)), "nobody", "odd_empty", "odd_nan", "lead_1"]


def ask_including(client: httpx2.Client, extras: str, *lead_ids: str) -> list[dict[str, Any]]:
    response = client.post(f"{SCORE}?include={extras}", json=lead_ids)
    PredictBatchResponse.model_validate_json(response.content)
    predictions: list[dict[str, Any]] = response.json()["predictions"]
    return predictions


def test_whoever_asks_gets_an_interval_that_holds_the_probability(
    client: httpx2.Client, uncached: httpx2.Client, manifest: ModelManifest
) -> None:
    asked = [*(f"lead_{number}" for number in range(1, 100)), "nobody", "odd_empty", "lead_1"]
    full = ask_including(client, "interval", *asked)
    plain = ask(client, *asked)["predictions"]
    assert [
        {**prediction, "interval": f["interval"]} for prediction, f in zip(plain, full, strict=True)
    ] == full
    for prediction in full:
        low, high = prediction["interval"]
        assert 0.01 <= low <= prediction["probability"] <= high <= 0.99
        assert ask_including(uncached, "interval", prediction["lead_id"]) == [prediction]
    assert len({tuple(prediction["interval"]) for prediction in full}) > 10
    assert full[-2]["verdict"] == "abstain"
    assert full[-2]["interval"] == [0.01, 0.99]


def test_whoever_asks_gets_a_receipt_that_adds_up_to_the_probability_and_reasons_in_words(
    client: httpx2.Client, uncached: httpx2.Client, manifest: ModelManifest
) -> None:
    full = ask_including(client, "reasons", *ODD_LEADS)
    plain = ask(client, *ODD_LEADS)["predictions"]
    for prediction, explained in zip(plain, full, strict=True):
        receipt, reasons = explained["receipt"], explained["reasons"]
        assert explained == {**prediction, "receipt": receipt, "reasons": reasons}
        assert list(receipt) == ["base_rate", "contributions", "calibration", "bounds"]
        assert [line["feature"] for line in receipt["contributions"]] == [
            "gpa", "minutes", "contacts", "newsletter", "age", "source", "fee"
        ]  # fmt: skip
        steps = sum(line["contribution"] for line in receipt["contributions"])
        total = receipt["base_rate"] + steps + receipt["calibration"] + receipt["bounds"]
        assert abs(total - prediction["probability"]) < 1e-9
        assert receipt["base_rate"] == manifest.base_rate
        if prediction["verdict"] != "abstain":
            points = [re.fullmatch(r".+: ([+-]\d+) points?", sentence) for sentence in reasons]
            told = sum(int(match[1]) for match in points if match)
            assert all(points)
            assert told == round(100 * (prediction["probability"] - receipt["base_rate"]))
    assert full[-3]["reasons"] == ["too little is known of this lead: the probability is the base rate"]
    assert max(len(prediction["reasons"]) for prediction in full) == 6, "five, and everything else"
    for prediction in (full[0], full[-2]):
        assert ask_including(uncached, "reasons", prediction["lead_id"]) == [prediction]


def test_whoever_asks_gets_the_numbers_the_model_reads(
    client: httpx2.Client, uncached: httpx2.Client, manifest: ModelManifest
) -> None:
    full = ask_including(client, "features", *ODD_LEADS)
    names = [feature["name"] for feature in manifest.feature_set]
    for prediction, told in zip(ask(client, *ODD_LEADS)["predictions"], full, strict=True):
        assert told == {**prediction, "features": told["features"]}
        assert list(told["features"]) == names
    empty = next(told for told in full if told["lead_id"] == "odd_empty")["features"]
    assert {value for name, value in empty.items() if not name.startswith("newsletter")} <= {None, 0.0}
    assert None in empty.values()
    assert len({json.dumps(told["features"]) for told in full}) > 90
    assert ask_including(uncached, "features", "lead_1") == [full[0]] == [full[-1]]


def test_all_that_can_be_included_can_be_asked_together(client: httpx2.Client) -> None:
    (prediction,) = ask_including(client, "interval,reasons,features", "lead_1")
    for extra in ("interval", "reasons", "features"):
        (one,) = ask_including(client, extra, "lead_1")
        assert one.items() <= prediction.items()


@pytest.mark.parametrize("extra", ["reasons", "features"])
def test_a_request_with_reasons_may_carry_as_many_leads_as_is_set(
    client: httpx2.Client, crm_url: str, folder: Path, extra: str
) -> None:
    query = f"{SCORE}?include={extra}"
    assert client.post(query, json=["lead_1"] * 100).json()["successful_predictions"] == 100
    problem = problem_of(client.post(query, json=["lead_1"] * 101), 413, "BATCH_SIZE_EXCEEDED")
    assert f"includes {extra} may carry 100 lead IDs" in problem["detail"]
    with serve(build_settings(folder, crm_url, ml_max_reasons_batch=2)) as base:
        assert httpx2.post(base + query, json=["lead_1"] * 2).status_code == 200
        problem_of(httpx2.post(base + query, json=["lead_1"] * 3), 413, "BATCH_SIZE_EXCEEDED")
        assert httpx2.post(base + SCORE, json=["lead_1"] * 3).status_code == 200


def test_the_legacy_route_keeps_its_old_shape(client: httpx2.Client) -> None:
    for extra in ("interval", "reasons", "features"):
        problem_of(client.post(f"{LEGACY}?include={extra}", json=["lead_1"]), 422, "INVALID_PARAMETER")


def test_a_model_published_without_intervals_says_so_and_answers_without_them(
    crm_url: str, tmp_path: Path
) -> None:
    estimator, description = describe_model()
    publish_model(
        tmp_path / "models", estimator, msgspec.structs.replace(description, venn_abers=msgspec.UNSET)
    )
    with serve(build_settings(tmp_path, crm_url)) as base:
        refused = httpx2.post(f"{base}{SCORE}?include=interval", json=["lead_1"])
        answered = httpx2.post(base + SCORE, json=["lead_1"])
    assert "without intervals" in problem_of(refused, 422, "INVALID_PARAMETER")["detail"]
    assert "interval" not in answered.json()["predictions"][0]


def test_the_document_names_what_may_be_included(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    (parameter,) = paths[SCORE]["post"]["parameters"]
    assert (parameter["name"], parameter["in"], parameter["required"]) == ("include", "query", False)
    allowed = re.compile(parameter["schema"]["pattern"])
    for include in ("", "interval", "reasons", "reasons,interval", "nonsense", "interval,", ",", "intervals"):
        status = client.post(SCORE, params={"include": include}, json=["lead_1"]).status_code
        assert status == (200 if allowed.search(include) else 422)
    assert "reasons: at most 100 lead IDs" in parameter["description"]
    assert not paths[LEGACY]["post"].get("parameters")


@pytest.mark.parametrize("method", ["margin", "entropy", "interval"])
def test_the_other_confidence_methods_can_be_chosen(crm_url: str, folder: Path, method: str) -> None:
    with serve(build_settings(folder, crm_url, ml_confidence_method=method)) as base:
        asked = ["lead_1", "lead_2", "lead_3"]
        answer = httpx2.post(f"{base}{SCORE}?include=interval", json=asked).json()
    assert answer["calibration_metadata"]["confidence_method"] == method
    for prediction in answer["predictions"]:
        assert 0 <= prediction["confidence"] <= 1
        if method == "margin":
            assert prediction["confidence"] == pytest.approx(2 * abs(prediction["probability"] - 0.5))
        if method == "interval":
            low, high = prediction["interval"]
            assert prediction["confidence"] == 1 - (high - low)


# --- 1. Scoring: the legacy route -------------------------------------------------------------------------


def test_the_legacy_route_answers_in_the_old_shape_with_the_same_numbers(client: httpx2.Client) -> None:
    asked = ["lead_1", "nobody", "odd_empty"]
    response = client.post(LEGACY, json=asked)
    LegacyPredictBatchResponse.model_validate_json(response.content)
    answer = response.json()
    assert list(answer) == [
        "predictions", "model_used", "total_processed", "successful_predictions", "request_id", "via",
    ]  # fmt: skip
    names = ["lead_id", "prediction", "probability", "confidence"]
    assert [list(prediction) for prediction in answer["predictions"]] == [names] * 2
    hardened = ask(client, *asked)["predictions"]
    assert answer["predictions"] == [{name: prediction[name] for name in names} for prediction in hardened]
    assert (answer["model_used"], answer["via"]) == (VERSION, "legacy-proxy")
    assert (answer["total_processed"], answer["successful_predictions"]) == (3, 2)
    assert answer["request_id"] == response.headers["x-request-id"]


def test_every_legacy_answer_says_that_the_route_is_deprecated(client: httpx2.Client) -> None:
    answers = [client.post(LEGACY, json=["lead_1"]), client.post(LEGACY, json=[]), client.get(LEGACY)]
    assert [answer.status_code for answer in answers] == [200, 422, 405]
    for answer in answers:
        assert re.fullmatch(r"@\d+", answer.headers["deprecation"])
        assert answer.headers["link"] == f'<{SCORE}>; rel="successor-version"'
        assert "sunset" not in answer.headers
    assert "deprecation" not in client.post(SCORE, json=["lead_1"]).headers


def test_sunset_is_sent_when_it_is_set(crm_url: str, folder: Path) -> None:
    with serve(build_settings(folder, crm_url, ai_legacy_sunset="2027-03-01T00:00:00Z")) as base:
        headers = httpx2.post(base + LEGACY, json=["lead_1"]).headers
    assert headers["sunset"] == "Mon, 01 Mar 2027 00:00:00 GMT"


def test_the_flag_takes_the_legacy_route_away(uncached: httpx2.Client, client: httpx2.Client) -> None:
    problem_of(uncached.post(LEGACY, json=["lead_1"]), 404, "NOT_FOUND")
    assert LEGACY not in uncached.get("/openapi.json").json()["paths"]
    assert LEGACY in client.get("/openapi.json").json()["paths"]
    assert uncached.get(HEALTH).json()["breaker"] is None
    assert uncached.get(HEALTH).json()["prediction_cache"] == {"freshness": "off"}


def test_the_hardened_router_is_mounted_first_and_the_routers_have_tags_of_their_own(
    client: httpx2.Client,
) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert next(iter(paths)) == SCORE
    assert paths[SCORE]["post"]["tags"] != paths[LEGACY]["post"]["tags"]


def test_openapi_describes_every_field_and_lets_answers_grow_but_not_bodies(client: httpx2.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    fields = {
        (name, field): told for name in schemas for field, told in schemas[name].get("properties", {}).items()
    }
    assert len(fields) > 100
    assert not [place for place, told in fields.items() if len(told.get("description", "")) < 10]
    assert [name for name in schemas if "additionalProperties" in schemas[name]] == ["LeadIdObject"]
    assert schemas["LeadIdObject"]["additionalProperties"] is False


def test_openapi_names_the_headers_of_a_route_on_its_way_out(client: httpx2.Client) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for answer in operations.get("post", {}).get("responses", {}).values():
            assert ({"Deprecation", "Sunset", "Link"} <= answer["headers"].keys()) == (path == LEGACY)


def test_openapi_says_that_metrics_are_text(client: httpx2.Client) -> None:
    declared = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert [client.get("/metrics").headers["content-type"].partition(";")[0]] == list(declared)


def test_a_source_that_does_not_suit_a_model_is_told_every_column_it_lacks(manifest: ModelManifest) -> None:
    first, second, *others = FeatureSet.from_json(manifest.feature_set).input_columns
    source = {column.name: column.kind for column in others}
    assert find_incompatibility(manifest, source) == (
        f"The lead source has no column {first.name}, {second.name}."
    )


# --- 2. Operations ----------------------------------------------------------------------------------------


def test_health_says_what_serves_and_what_ops_ask_next(
    client: httpx2.Client, manifest: ModelManifest
) -> None:
    response = client.get(HEALTH)
    assert response.status_code == 200
    HealthResponse.model_validate_json(response.content)
    body = response.json()
    assert (body["status"], body["loaded"], body["cache_status"]) == ("healthy", True, "hit")
    assert body["reason"] is None
    assert (body["model_version"], body["model_sha256"]) == (VERSION, manifest.sha256)
    assert body["feature_count"] == 7
    assert 0 <= body["since_seconds"] <= body["uptime_seconds"] + 60
    assert body["database"]["status"] == "ok"
    assert body["telemetry"]["status"] == "ok"
    assert body["breaker"] == {"state": "closed"}
    assert set(body["drift"]) == {"status", "rows"}
    assert body["prediction_cache"]["freshness"] in {"expiry_only", "suspended"}  # odd_leads has no triggers


def test_without_a_model_health_is_503_with_nulls_and_scoring_is_not_ready(broken: httpx2.Client) -> None:
    response = broken.get(HEALTH)
    assert response.status_code == 503
    HealthResponse.model_validate_json(response.content)
    body = response.json()
    assert (body["status"], body["loaded"], body["cache_status"]) == ("unhealthy", False, "error")
    for name in ("model_version", "model_sha256", "since_seconds", "feature_count"):
        assert body[name] is None
    assert broken.get("/livez").status_code == 200
    problem_of(broken.get("/readyz"), 503, "MODEL_NOT_READY")
    models = broken.get(MODELS).json()
    assert (models["status"], models["available"]) == ("no_model_loaded", [])
    assert models["version"] is models["path"] is models["performance"] is None


@pytest.mark.parametrize("reason", ["rollback_refused", "served_unknown", "no_artifact", "no_directory"])
def test_why_no_model_serves_is_told_over_http(
    crm_url: str, folder: Path, tmp_path: Path, reason: str
) -> None:
    served = tmp_path / "var" / "served_models"
    served.parent.mkdir()
    if reason == "rollback_refused":
        served.mkdir()
        (served / "20990101_000000").touch()
    elif reason == "served_unknown":
        served.write_text("a file where a directory should be")
    settings = build_settings(
        tmp_path,
        crm_url,
        ml_model_dir=tmp_path / "nowhere" if reason == "no_directory" else folder / "models",
        ml_model_version="20200101_000000" if reason == "no_artifact" else None,
    )
    with serve(settings) as base, httpx2.Client(base_url=base) as http:
        health, models = http.get(HEALTH), http.get(MODELS).json()
    assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
    assert (health.json()["reason"], models["reason"]) == (reason, reason)


def test_models_shows_the_active_model_and_every_artifact(
    client: httpx2.Client, manifest: ModelManifest
) -> None:
    response = client.get(MODELS)
    ModelsResponse.model_validate_json(response.content)
    body = response.json()
    assert (body["status"], body["version"], body["model_type"]) == ("loaded", VERSION, "random_forest")
    assert body["reason"] is None
    assert (body["path"], body["sha256"], body["feature_count"]) == (manifest.file_name, manifest.sha256, 7)
    assert set(body["performance"]) >= {"accuracy", "precision", "recall", "f1_score", "roc_auc"}
    assert datetime.fromisoformat(body["loaded_at"]) <= datetime.now(UTC)
    assert body["loaded_since_seconds"] >= 0
    assert body["available"] == [
        {
            "file": manifest.file_name,
            "version": VERSION,
            "model_type": "random_forest",
            "state": "active",
            "reason": None,
            "signature": "missing",
            "signed_by": None,
            "card": None,
        }
    ]


def test_probes_and_documents_answer(client: httpx2.Client) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/docs").headers["content-type"].startswith("text/html")
    assert client.get("/openapi.json").json()["info"]["title"] == "Lead Scoring"
    assert client.post(SCORE, json=["lead_1"]).status_code == 200
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert f'leadscore_requests_total{{code="",route="{SCORE}",status="200"}}' in metrics.text


def test_docs_run_one_version_of_a_library_that_the_browser_checks_and_nothing_else(
    client: httpx2.Client,
) -> None:
    answer = client.get("/docs")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    loaded = re.findall(
        r'<(?:script|link)[^>]* (?:src|href)="([^"]+)" integrity="(sha384-[^"]{64})"', answer.text
    )
    assert len(loaded) == answer.text.count("//") == 2, "nothing is loaded unchecked"
    for address, _ in loaded:
        assert re.search(r"@\d+\.\d+\.\d+/", address), "an exact version"
        assert address in policy["script-src"] + policy["style-src"]
    (inline,) = re.findall(r"<script>(.*?)</script>", answer.text)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert policy["script-src"].split() == [loaded[1][0], f"'sha256-{digest}'"]
    assert client.get(re.search(r'url: "(.*?)"', inline)[1]).json()["openapi"]


@pytest.mark.parametrize("path", [HEALTH, MODELS, "/livez", "/readyz", "/metrics", "/docs", "/openapi.json"])
def test_head_answers_like_get_without_a_body(client: httpx2.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


# --- 3. Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/nowhere", "/ai", "/ai/advanced-ml", SCORE + "/", "//", f"/{CANARY}/x"]
)
def test_an_unknown_path_is_not_found_and_not_repeated(client: httpx2.Client, path: str) -> None:
    response = client.get(path)
    assert problem_of(response, 404, "NOT_FOUND")["instance"] == "/"
    assert CANARY not in response.text


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", SCORE, "POST"), ("PUT", SCORE, "POST"), ("DELETE", LEGACY, "POST"),
        ("OPTIONS", SCORE, "POST"), ("TRACE", SCORE, "POST"), ("PROPFIND", SCORE, "POST"),
        ("POST", HEALTH, "GET, HEAD"), ("DELETE", "/livez", "GET, HEAD"), ("POST", "/docs", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)  # fmt: skip
def test_a_wrong_method_is_answered_with_those_that_are_allowed(
    client: httpx2.Client, method: str, path: str, allowed: str
) -> None:
    response = client.request(method, path)
    assert problem_of(response, 405, "METHOD_NOT_ALLOWED")["instance"] == path
    assert response.headers["allow"] == allowed


@BOTH
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=utf-16"}, {"Content-Type": ""}, {},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)  # fmt: skip
def test_anything_but_plain_json_is_an_unsupported_media_type(
    client: httpx2.Client, path: str, headers: dict[str, str]
) -> None:
    response = client.post(path, content=b'["lead_1"]', headers=headers)
    problem_of(response, 415, "UNSUPPORTED_MEDIA_TYPE")


@BOTH
def test_a_body_that_is_too_large_is_refused_whether_its_length_is_declared_or_not(
    client: httpx2.Client, path: str
) -> None:
    body = json.dumps(["lead_1"] * 40_000).encode()
    headers = {"Content-Type": "application/json"}
    assert len(body) > 262_144
    pieces = (body[start : start + 10_000] for start in range(0, len(body), 10_000))
    for content in (body, pieces):
        response = client.post(path, content=content, headers=headers)
        assert "262144 bytes" in problem_of(response, 413, "BODY_TOO_LARGE")["detail"]


def test_a_declared_length_is_refused_before_a_byte_of_the_body_is_sent(client: httpx2.Client) -> None:
    answer = send_raw(client, "Host: x", "Content-Length: 100000000", "Expect: 100-continue")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in answer


@pytest.mark.parametrize("hosts", [[], ["Host: a", "Host: b"]])
def test_a_request_without_exactly_one_host_is_malformed(client: httpx2.Client, hosts: list[str]) -> None:
    answer = send_raw(client, *hosts, "Content-Length: 2")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"error_code":"MALFORMED_REQUEST"' in answer


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: x", "Content-Length: 2", "Transfer-Encoding: chunked"),
        ("Host: x", "Content-Length: 2", "Content-Length: 3"),
        ("Host: x", "Content-Length: +2"),
        ("Host: x", "Content-Length: 99999999999999999999999999"),
        ("Host: x", "folded: a\r\n b", "Content-Length: 2"),
        ("Host: x", "nul: a\x00b", "Content-Length: 2"),
        ("no colon",),
    ],
)
def test_what_is_no_http_request_at_all_is_malformed_too(
    client: httpx2.Client, headers: tuple[str, ...]
) -> None:
    head, _, body = send_raw(client, *headers).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/problem+json" in head
    assert Problem.model_validate_json(body).error_code == "MALFORMED_REQUEST"


def send_raw(client: httpx2.Client, *headers: str) -> bytes:
    """Sends the head of a request, byte for byte, and returns the first piece of the answer."""
    lines = [f"POST {SCORE} HTTP/1.1", "Content-Type: application/json", *headers, "", ""]
    with connect(client) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return connection.recv(65536)


def connect(client: httpx2.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=5)


def test_no_error_repeats_what_the_caller_sent(client: httpx2.Client) -> None:
    headers = {"Content-Type": "application/json"}
    answers = [
        client.post(SCORE, json=[f"{CANARY} {CANARY}"]),
        client.post(SCORE, json={CANARY: ["lead_1"]}),
        client.post(SCORE, json={"lead_ids": CANARY}),
        client.post(SCORE, content=f"[{CANARY}".encode(), headers=headers),
        client.post(f"{SCORE}?{CANARY}={CANARY}", json=["lead_1"]),
        client.post(f"{SCORE}?include={CANARY}", json=["lead_1"]),
        client.post(SCORE, content=b"[]", headers={"Content-Type": CANARY}),
        client.get(f"/{CANARY}"),
        client.request("OPTIONS", SCORE, headers={"Origin": f"http://{CANARY}"}),
        client.post(SCORE, json=[], headers={"X-Request-ID": f"{CANARY}!"}),
    ]
    for answer in answers:
        assert answer.status_code >= 400
        assert CANARY not in answer.text + str(answer.headers)


def test_an_unexpected_failure_is_an_internal_error_and_leaves_the_connection_alone(
    broken: httpx2.Client,
) -> None:
    response = broken.get("/fails", headers={"Origin": ORIGIN})
    problem_of(response, 500, "INTERNAL_ERROR")
    assert CANARY not in response.text
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "connection" not in response.headers
    assert broken.get("/livez").status_code == 200


def test_a_lead_source_that_is_not_there_is_a_failed_prediction(crm_url: str, folder: Path) -> None:
    with serve(build_settings(folder, crm_url, lead_source="no_such_relation")) as base:
        response = httpx2.post(base + SCORE, json=["lead_1"])
        problem_of(response, 500, "PREDICTION_FAILED")
        assert "no_such_relation" not in response.text
        problem_of(httpx2.post(base + LEGACY, json=["lead_1"]), 500, "PREDICTION_FAILED")
        assert httpx2.get(base + HEALTH).status_code == 200


def test_no_answer_leaves_without_its_audit_record(broken: httpx2.Client) -> None:
    response = broken.post(SCORE, json=["lead_1"], headers={"Origin": ORIGIN})
    problem_of(response, 503, "TELEMETRY_UNAVAILABLE")
    assert "deprecation" in broken.post(LEGACY, json=[]).headers
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert broken.get(HEALTH).json()["telemetry"]["status"] == "unavailable"


def test_without_a_log_an_answer_leaves_when_its_record_is_in_the_database(
    crm_url: str, tmp_path: Path
) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "telemetry").write_text("a file where a directory should be")
    with serve(build_settings(tmp_path, crm_url)) as base:
        assert httpx2.get(base + HEALTH).json()["telemetry"]["status"] == "direct"
        response = httpx2.post(base + SCORE, json=[], headers={"X-Request-ID": "without-a-log"})
        problem_of(response, 422, "EMPTY_BATCH")
        with psycopg.connect(crm_url) as connection:
            rows = connection.execute("SELECT action FROM ai_events WHERE request_id = 'without-a-log'")
            assert rows.fetchall() == [("ml.prediction.error",)]


def answers_of_every_kind(client: httpx2.Client, headers: dict[str, str]) -> list[httpx2.Response]:
    return [
        client.post(SCORE, json=["lead_1"], headers=headers),
        client.get("/nowhere", headers=headers),
        client.get(SCORE, headers=headers),
        client.post(SCORE, json=["lead_1"] * 2001, headers=headers),
        client.post(SCORE, content=b"x" * 300_000, headers=headers),
        client.post(SCORE, content=b"[]", headers={**headers, "Content-Type": "text/plain"}),
        client.post(SCORE, json=[], headers=headers),
    ]


def test_an_allowed_origin_is_named_on_every_answer_and_a_foreign_one_on_none(
    client: httpx2.Client, broken: httpx2.Client
) -> None:
    headers = {"Origin": ORIGIN}
    allowed = [*answers_of_every_kind(client, headers), broken.get("/readyz", headers=headers)]
    assert [answer.status_code for answer in allowed] == [200, 404, 405, 413, 413, 415, 422, 503]
    for answer in allowed:
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
        assert {"x-request-id", "retry-after", "allow", "www-authenticate"} <= set(exposed)
    for answer in answers_of_every_kind(client, {"Origin": "https://evil.example"}):
        assert "access-control-allow-origin" not in answer.headers
        assert "Origin" in answer.headers["vary"]


def test_a_preflight_is_answered_and_a_foreign_one_refused_in_the_shape_of_every_error(
    client: httpx2.Client,
) -> None:
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, traceparent, tracestate, x-request-id",
    }
    good = client.options(SCORE, headers={"Origin": ORIGIN, **asks})
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in good.headers["access-control-allow-methods"]
    evil = client.options(SCORE, headers={"Origin": "https://evil.example", **asks})
    problem_of(evil, 400, "MALFORMED_REQUEST")
    assert "access-control-allow-origin" not in evil.headers
    put = client.options(SCORE, headers={"Origin": ORIGIN, **asks, "Access-Control-Request-Method": "PUT"})
    problem_of(put, 400, "MALFORMED_REQUEST")
    assert put.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("given", ["a", "A-Z_0.9", "x" * 64])
def test_a_proper_request_id_is_taken(client: httpx2.Client, given: str) -> None:
    response = client.post(SCORE, json=["lead_1"], headers={"X-Request-ID": given})
    assert response.headers["x-request-id"] == response.json()["request_id"] == given
    assert (
        problem_of(client.get("/nowhere", headers={"X-Request-ID": given}), 404, "NOT_FOUND")["request_id"]
        == given
    )


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "é", "a;b", "../x"])
def test_an_improper_request_id_is_replaced_by_a_uuid_version_7(client: httpx2.Client, given: str) -> None:
    made = client.get("/livez", headers={"X-Request-ID": given.encode("latin-1")}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", made)


def test_every_request_for_scores_leaves_one_event(client: httpx2.Client, crm_url: str) -> None:
    client.post(SCORE, json=["lead_1", "nobody"], headers={"X-Request-ID": "contract-good"})
    client.post(LEGACY, json=[], headers={"X-Request-ID": "contract-bad"})
    with connect(client) as connection:
        head = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nX-Request-ID: contract-cut\r\nContent-Length: 99\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n[".encode())
    wanted = {"contract-good": None, "contract-bad": "EMPTY_BATCH", "contract-cut": "CLIENT_CLOSED_REQUEST"}
    deadline = time.monotonic() + 10
    found: dict[str, str | None] = {}
    with psycopg.connect(crm_url, autocommit=True) as database:
        while found != wanted and time.monotonic() < deadline:
            rows = database.execute(
                "SELECT request_id, meta->>'error_code' FROM ai_events WHERE request_id LIKE 'contract-%'"
            ).fetchall()
            assert len(rows) == len(dict(rows))
            found = dict(rows)
    assert found == wanted


def test_the_batch_limit_can_be_lowered_and_openapi_says_so(crm_url: str, folder: Path) -> None:
    with serve(build_settings(folder, crm_url, ml_max_batch_size=3)) as base:
        assert httpx2.post(base + SCORE, json=["lead_1"] * 3).status_code == 200
        problem_of(httpx2.post(base + SCORE, json=["lead_1"] * 4), 413, "BATCH_SIZE_EXCEEDED")
        schemas = httpx2.get(base + "/openapi.json").json()["components"]["schemas"]
    assert schemas["LeadIdArray"]["maxItems"] == 3
    assert schemas["LeadIdObject"]["properties"]["lead_ids"]["maxItems"] == 3


def test_a_service_without_a_model_serves_by_itself_once_there_is_one(crm_url: str, tmp_path: Path) -> None:
    with serve(build_settings(tmp_path, crm_url)) as base:
        problem_of(httpx2.post(base + SCORE, json=["lead_1"]), 503, "MODEL_NOT_READY")
        publish_lead_model(tmp_path / "models")
        deadline = time.monotonic() + 15
        while httpx2.get(base + "/readyz").status_code != 200:
            assert time.monotonic() < deadline
        assert httpx2.post(base + SCORE, json=["lead_1"]).status_code == 200


def test_importing_the_application_does_no_io_and_building_it_opens_nothing(tmp_path: Path) -> None:
    from app.main import create_app

    create_app(build_settings(tmp_path, "postgresql://nobody@127.0.0.1:1/nothing"))
    assert not list(tmp_path.iterdir())
