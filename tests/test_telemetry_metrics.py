"""The figures are right with one worker and with several."""

import asyncio
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.service import PREDICT, Connection, Load, Service, add_leads, publish_crm_model

PATIENCE_SECONDS = 30.0

ROOT = Path(__file__).parent.parent

WORKER = """
import sys
from app import metrics
metrics.observe_request("/ai/advanced-ml/predict-batch", 200, None, 0.01)
metrics.observe_request("/ai/advanced-ml/predict-batch", 422, "EMPTY_BATCH", 0.01)
metrics.observe_batch(
    answered=4, coverage_sum=3.0, rejections={"LEAD_NOT_FOUND": 2}, stages_ms=[("scoring", 2.0)]
)
metrics.observe_lookups("hit", 1)
metrics.observe_lookups("miss", 3)
metrics.observe_model_look(ready=sys.argv[1] == "ready", refused=sys.argv[1] != "ready")
metrics.observe_breaker(sys.argv[2])
metrics.TELEMETRY_BACKLOG.set(int(sys.argv[3]))
if sys.argv[4:] == ["render"]:
    sys.stdout.buffer.write(metrics.render_metrics()[0])
    sys.stdout.flush()
else:
    print("done", flush=True)
    sys.stdin.read()
"""


def start(shared: Path | None, *arguments: str) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    if shared is not None:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(shared)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment,
    )  # fmt: skip


def read_samples(text: str) -> dict[tuple[str, str], float]:
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "pid"]
            samples[sample.name, ",".join(labels)] = sample.value
    return samples


def test_one_worker_reports_its_own_figures() -> None:
    output, _ = start(None, "ready", "closed", "7", "render").communicate(timeout=60)
    samples = read_samples(output.decode())
    assert samples["leadscore_requests_total", "code=,route=/ai/advanced-ml/predict-batch,status=200"] == 1
    assert samples["leadscore_leads_total", "outcome=answered"] == 4
    assert samples["leadscore_leads_total", "outcome=LEAD_NOT_FOUND"] == 2
    assert samples["leadscore_feature_coverage_total", ""] == 3
    assert samples["leadscore_prediction_cache_lookups_total", "result=hit"] == 1
    assert samples["leadscore_prediction_cache_lookups_total", "result=miss"] == 3
    assert samples["leadscore_telemetry_backlog", ""] == 7
    assert samples["leadscore_model_ready", ""] == 1


def test_two_workers_report_their_figures_together(tmp_path: Path) -> None:
    other = start(tmp_path, "not-ready", "open", "3")
    assert other.stdout is not None
    assert other.stdout.readline() == b"done\n"
    output, _ = start(tmp_path, "ready", "closed", "7", "render").communicate(timeout=60)
    other.communicate(timeout=60)
    samples = read_samples(output.decode())
    assert samples["leadscore_requests_total", "code=,route=/ai/advanced-ml/predict-batch,status=200"] == 2
    refused = "code=EMPTY_BATCH,route=/ai/advanced-ml/predict-batch,status=422"
    assert samples["leadscore_requests_total", refused] == 2
    assert samples["leadscore_request_seconds_count", "route=/ai/advanced-ml/predict-batch"] == 4
    assert samples["leadscore_model_ready", ""] == 0
    assert samples["leadscore_newest_model_refused", ""] == 1
    assert samples["leadscore_breaker_state", ""] == 2
    assert samples["leadscore_telemetry_backlog", ""] == 10


def test_a_worker_that_died_leaves_its_counts_and_not_its_state(tmp_path: Path) -> None:
    start(tmp_path, "not-ready", "open", "3").communicate(timeout=60)
    output, _ = start(tmp_path, "ready", "closed", "7", "render").communicate(timeout=60)
    samples = read_samples(output.decode())
    assert samples["leadscore_leads_total", "outcome=answered"] == 8
    assert samples["leadscore_model_ready", ""] == 1
    assert samples["leadscore_breaker_state", ""] == 0


TWO_SCRAPES = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from app.metrics import render_metrics
both, own = threading.Barrier(2), threading.local()
def meet(event, _):
    if event == "os.remove" and not hasattr(own, "met"):
        own.met = True
        both.wait(60)
sys.addaudithook(meet)
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda _: render_metrics(), range(2)))
"""
"""Neither removes a file before the other has found it, too."""


def test_two_scrapes_may_forget_the_same_dead_worker(tmp_path: Path) -> None:
    start(tmp_path, "ready", "closed", "3").communicate(timeout=60)
    dead = set(tmp_path.glob("gauge_live*.db"))
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", TWO_SCRAPES], cwd=ROOT, env=environment, check=True, timeout=120)
    assert dead
    assert not dead & set(tmp_path.iterdir())


def test_the_first_failure_of_a_service_can_be_seen_to_rise() -> None:
    script = (
        "from app.main import create_app; from app.metrics import render_metrics\n"
        "from app.settings import Settings\n"
        "create_app(Settings(ai_enable_legacy_advanced_ml=True)); print(render_metrics()[0].decode())"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    samples = read_samples(told.stdout)
    legacy = "/ai/advanced-ml-legacy/predict-batch"
    for route, status, code in (
        (PREDICT, 500, "INTERNAL_ERROR"),
        (PREDICT, 500, "PREDICTION_FAILED"),
        (PREDICT, 503, "DATABASE_UNAVAILABLE"),
        (PREDICT, 503, "KEYS_UNAVAILABLE"),
        (PREDICT, 503, "MODEL_NOT_READY"),
        (PREDICT, 503, "OVERLOADED"),
        (PREDICT, 503, "TELEMETRY_UNAVAILABLE"),
        (legacy, 503, "CIRCUIT_OPEN"),
    ):
        assert samples["leadscore_requests_total", f"code={code},route={route},status={status}"] == 0
    assert samples["leadscore_leads_total", "outcome=LEAD_NOT_FOUND"] == 0
    assert samples["leadscore_leads_total", "outcome=DATABASE_UNAVAILABLE"] == 0


async def test_a_service_with_two_workers_counts_every_request_once(
    database_url: str, tmp_path: Path
) -> None:
    load = Load("metrics", add_leads(database_url, 20))
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, WORKERS="2") as service:
        await load.run(service.port, 300)
        connection = await Connection.open(service.port)
        scored = 0.0
        async with asyncio.timeout(PATIENCE_SECONDS):
            while scored < len(load.answered):  # a request counts once it is over
                _, _, body = await connection.ask("GET", "/metrics")
                samples = read_samples(body.decode())
                scored = sum(
                    value for (name, labels), value in samples.items()
                    if name == "leadscore_requests_total" and PREDICT in labels
                )  # fmt: skip
        await connection.close()
    assert scored == len(load.answered)
    statuses = Counter(load.answered.values())
    assert samples["leadscore_telemetry_events_total", "action=ml.prediction.success"] == statuses[200]
    assert samples["leadscore_telemetry_events_total", "action=ml.prediction.error"] == statuses[422]
    assert samples["leadscore_model_ready", ""] == 1
