"""End to end, over HTTP, against a running service.

    python test_ml_integration.py [BASE_URL]        default http://127.0.0.1:8000, with the demo CRM

Every check prints one line; the exit status is the number that failed. pytest runs the same checks against a
server that it starts itself, on a free port, with its own database.
"""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

PREDICT = "/ai/advanced-ml/predict-batch"
LEGACY = "/ai/advanced-ml-legacy/predict-batch"
CHECKS: list[Callable[[httpx.Client], None]] = []


def check(function: Callable[[httpx.Client], None]) -> Callable[[httpx.Client], None]:
    """Registers a check; its name is the sentence that is reported."""
    CHECKS.append(function)
    return function


@check
def health_is_healthy_and_names_the_model(client: httpx.Client) -> None:
    response = client.get("/ai/advanced-ml/health")
    body = response.json()
    assert response.status_code == 200, body
    assert body["status"] == "healthy"
    assert body["loaded"] is True
    assert re.fullmatch(r"[0-9a-f]{64}", body["model_sha256"])
    assert body["feature_count"] > 0


@check
def models_lists_the_active_model_as_verified(client: httpx.Client) -> None:
    body = client.get("/ai/advanced-ml/models").json()
    assert body["status"] == "loaded"
    assert not body["path"].startswith("/")
    assert any(entry["version"] == body["version"] for entry in body["available"])
    assert 0.5 < body["performance"]["roc_auc"] <= 1


@check
def a_raw_array_and_a_wrapped_object_get_the_same_predictions(client: httpx.Client) -> None:
    ids = ["lead_1", "lead_2", "lead_3"]
    raw, wrapped = client.post(PREDICT, json=ids).json(), client.post(PREDICT, json={"lead_ids": ids}).json()
    assert raw["predictions"] == wrapped["predictions"]
    assert [entry["lead_id"] for entry in raw["predictions"]] == ids


@check
def every_prediction_keeps_the_contract(client: httpx.Client) -> None:
    body = client.post(PREDICT, json=[f"lead_{i}" for i in range(1, 101)]).json()
    assert body["successful_predictions"] == 100, body["errors"][:3]
    for entry in body["predictions"]:
        assert 0 <= entry["probability"] <= 1
        assert entry["calibrated_probability"] == entry["probability"]
        assert 0 <= entry["confidence"] <= 1
        assert 0 <= entry["features_present_ratio"] <= 1
        assert entry["verdict"] in {"ok", "caution", "abstain"}
    assert len({entry["probability"] for entry in body["predictions"]}) > 10


@check
def a_receipt_adds_up_to_the_probability_within_its_interval(client: httpx.Client) -> None:
    ids = [f"lead_{i}" for i in range(1, 101)]
    body = client.post(f"{PREDICT}?include=interval,reasons", json=ids).json()
    for entry in body["predictions"]:
        receipt = entry["receipt"]
        steps = sum(line["contribution"] for line in receipt["contributions"])
        total = receipt["base_rate"] + steps + receipt["calibration"] + receipt["bounds"]
        assert abs(total - entry["probability"]) < 1e-9
        assert entry["interval"][0] <= entry["probability"] <= entry["interval"][1]
    assert any(entry["reasons"] for entry in body["predictions"])


@check
def unknown_leads_are_reported_at_their_positions_and_do_not_fail_the_rest(client: httpx.Client) -> None:
    body = client.post(PREDICT, json=["nobody", "lead_1", "nobody"]).json()
    assert [error["position"] for error in body["errors"]] == [0, 2]
    assert {error["error_code"] for error in body["errors"]} == {"LEAD_NOT_FOUND"}
    assert (body["total_processed"], body["successful_predictions"], body["failed_predictions"]) == (3, 1, 2)


@check
def a_batch_equals_the_same_leads_one_by_one(client: httpx.Client) -> None:
    ids = [f"lead_{i}" for i in range(200, 220)]
    batch = client.post(PREDICT, json=ids).json()["predictions"]
    assert batch == [client.post(PREDICT, json=[lead]).json()["predictions"][0] for lead in ids]


@check
def a_second_question_is_answered_from_the_cache(client: httpx.Client) -> None:
    ids = ["lead_31", "lead_32"]
    client.post(PREDICT, json=ids)
    deadline = time.monotonic() + 10  # on a machine that is busy the cache may be suspended for a moment
    while (again := client.post(PREDICT, json=ids).json())["cache_hit"] is not True:
        assert time.monotonic() < deadline
    assert again["cache_hits"] == 2


@check
def two_thousand_leads_are_one_request_and_one_more_is_too_many(client: httpx.Client) -> None:
    ids = [f"lead_{i}" for i in range(1, 2002)]
    assert client.post(PREDICT, json=ids[:2000]).status_code == 200
    refused = client.post(PREDICT, json=ids)
    assert refused.status_code == 413
    assert refused.json()["error_code"] == "BATCH_SIZE_EXCEEDED"


@check
def nonsense_gets_a_problem_document_that_echoes_nothing(client: httpx.Client) -> None:
    for body, code in (
        (b"[NaN]", "INVALID_PAYLOAD_FORMAT"),
        (b"[]", "EMPTY_BATCH"),
        (b'["Robert\'); DROP"]', "INVALID_LEAD_ID"),
        (b'{"lead_ids":["a"],"x":1}', "INVALID_PAYLOAD_FORMAT"),
        (b'["\\ud800"]', "INVALID_PAYLOAD_FORMAT"),
    ):
        response = client.post(PREDICT, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 422, (body, response.text)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["error_code"] == code, (body, response.text)
        assert "DROP" not in response.text


@check
def a_request_id_is_accepted_echoed_and_made_when_it_is_unfit(client: httpx.Client) -> None:
    mine = f"check-{uuid.uuid4()}"
    kept = client.post(PREDICT, json=["lead_1"], headers={"x-request-id": mine})
    assert kept.headers["x-request-id"] == mine == kept.json()["request_id"]
    made = client.post(PREDICT, json=["lead_1"], headers={"x-request-id": "spaces are unfit"}).headers[
        "x-request-id"
    ]
    assert uuid.UUID(made).version == 7


@check
def the_legacy_route_agrees_and_says_it_is_deprecated(client: httpx.Client) -> None:
    new, old = client.post(PREDICT, json=["lead_5"]), client.post(LEGACY, json=["lead_5"])
    assert old.json()["predictions"][0]["probability"] == new.json()["predictions"][0]["probability"]
    assert old.json()["via"] == "legacy-proxy"
    assert "deprecation" in old.headers
    assert 'rel="successor-version"' in old.headers["link"]


@check
def live_ready_and_metrics_answer(client: httpx.Client) -> None:
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 200
    metrics = client.get("/metrics")
    assert metrics.status_code == 200
    assert "# HELP" in metrics.text


def report(base_url: str) -> int:
    """Runs every check against the service at `base_url`, prints a line for each, returns how many failed."""
    failed = 0
    with httpx.Client(base_url=base_url, timeout=10) as client:
        for function in CHECKS:
            try:
                function(client)
            except (AssertionError, httpx.HTTPError, KeyError, ValueError) as exc:
                failed += 1
                print(f"FAIL  {function.__name__.replace('_', ' ')}: {type(exc).__name__} {exc}")
            else:
                print(f"ok    {function.__name__.replace('_', ' ')}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed against {base_url}")
    return failed


def start_server(var_dir: Path, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """Starts `leadscore serve` on a free port; returns the process, and its address once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=Path(__file__).parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PORT": "0", "VAR_DIR": str(var_dir), **environment},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"listens on (http://\S+)", line):
            return process, found[1]
    raise AssertionError(f"the server ended with status {process.wait()} before it was ready")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of our own: embedded database, demo CRM, shipped model."""
    process, address = start_server(tmp_path_factory.mktemp("service"), DATABASE_URL="")
    yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, "SIGTERM must end the service in order, with exit status 0"
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
def test_end_to_end(server: str, function: Callable[[httpx.Client], None]) -> None:
    """Each check, against the server started above."""
    with httpx.Client(base_url=server, timeout=10) as client:
        function(client)


if __name__ == "__main__":
    started = time.perf_counter()
    failures = report(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
    print(f"{time.perf_counter() - started:.1f} s")
    sys.exit(min(failures, 125))
