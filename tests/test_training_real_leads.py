"""The proof on real leads: 9,240 enquiries out of a file that nobody here wrote."""

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import httpx2 as httpx
import pytest

from app.ai.features import build_features
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.db.csv_import import import_csv
from app.db.engine import Database
from app.db.leads import PostgresLeadSource, fetch_all_chunks
from app.errors import TrainingError
from app.training.options import TrainingOptions
from app.training.report import TrainingReport
from app.training.train import train
from tests.fakes import fetch_at_once
from tests.in_process import build_settings, serve
from tests.real_leads import CSV, TRAPS, needs_real_leads

pytestmark = needs_real_leads


@pytest.fixture(scope="module")
def options(create_database: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> TrainingOptions:
    url = create_database("real_leads")
    summary = import_csv(
        url, CSV, table="x_education", id_column="Prospect ID", label_column="Converted", missing=("Select",)
    )
    assert (summary.rows, summary.label) == (9240, "converted")
    return TrainingOptions(
        url=url, model_dir=tmp_path_factory.mktemp("models"), source="x_education", label="converted"
    )


@pytest.fixture(scope="module")
def report(options: TrainingOptions) -> TrainingReport:
    return train(replace(options, exclude=TRAPS, model="hist_gradient_boosting"))


def test_the_model_ranks_and_calibrates_leads_it_has_never_seen(report: TrainingReport) -> None:
    metrics = report.manifest.metrics
    assert report.manifest.training.test_rows == 1848
    assert 0.86 <= metrics["roc_auc"] <= 0.92, "more would mean that a column knows the outcome"
    assert metrics["ece"] < 0.05
    assert abs(metrics["mean_predicted"] - metrics["mean_observed"]) < 0.02
    assert metrics["brier"] < 0.145
    in_the_top_tenth = metrics["lift_at_10_percent"] * metrics["mean_observed"]
    assert in_the_top_tenth > 0.9


def test_the_intervals_cover_leads_the_model_has_never_seen(report: TrainingReport) -> None:
    told = report.manifest.report["interval_coverage"]
    assert told["bins"] == 15
    assert told["covered"] >= 14
    assert 0 < told["mean_width"] < 0.05


def test_constants_and_identifiers_of_the_file_feed_no_feature(report: TrainingReport) -> None:
    dropped, read = (
        report.manifest.report["dropped"],
        {column["name"] for spec in report.manifest.feature_set for column in spec["inputs"]},
    )
    assert {"magazine", "receive_more_updates_about_our_courses", "lead_number"} <= set(dropped)
    assert not read & {*TRAPS, *dropped, "converted", "lead_number", "prospect_id", "lead_id", "external_ref"}
    assert {"lead_source", "total_time_spent_on_website", "what_is_your_current_occupation"} <= read


def test_a_column_of_sales_notes_is_refused_by_name(options: TrainingOptions) -> None:
    kept_in = tuple(name for name in TRAPS if name != "tags")
    with pytest.raises(TrainingError, match=r"tags alone separates the outcomes with an AUC of 0\.9"):
        train(replace(options, exclude=kept_in))


def test_a_trap_under_the_limit_is_flagged(options: TrainingOptions, tmp_path: Path) -> None:
    kept_in = tuple(name for name in TRAPS if name != "lead_quality")
    report = train(replace(options, exclude=kept_in, model="logistic_regression", model_dir=tmp_path))
    assert any("lead_quality" in warning for warning in report.manifest.report["warnings"])


def test_every_lead_of_the_file_is_scored_over_http(
    options: TrainingOptions, report: TrainingReport, tmp_path: Path
) -> None:
    with CSV.open(encoding="utf-8", newline="") as file:
        converted = {row["Prospect ID"]: row["Converted"] == "1" for row in csv.DictReader(file)}
    ids = list(converted)
    settings = build_settings(
        tmp_path, options.url, ml_model_dir=report.manifest_path.parent, lead_source="x_education"
    )
    probabilities: dict[str, float] = {}
    with serve(settings) as address, httpx.Client(base_url=address, timeout=30) as client:
        for start in range(0, len(ids), 2000):
            answer = client.post("/ai/advanced-ml/predict-batch", json=ids[start : start + 2000]).json()
            assert answer["errors"] == []
            assert answer["model_sha256"] == report.manifest.sha256
            probabilities |= {entry["lead_id"]: entry["probability"] for entry in answer["predictions"]}
    assert list(probabilities) == ids
    mean = {
        won: fmean(probabilities[lead] for lead in ids if converted[lead] is won) for won in (True, False)
    }
    assert mean[True] - mean[False] > 0.3
    assert fmean(probabilities.values()) == pytest.approx(fmean(converted.values()), abs=0.02)


def test_real_leads_get_receipts_that_add_up_in_words_of_the_manifest_and_of_ours(
    options: TrainingOptions, report: TrainingReport, tmp_path: Path
) -> None:
    with CSV.open(encoding="utf-8", newline="") as file:
        ids = [row["Prospect ID"] for row in csv.DictReader(file)][:100]
    settings = build_settings(
        tmp_path, options.url, ml_model_dir=report.manifest_path.parent, lead_source="x_education"
    )
    with serve(settings) as address, httpx.Client(base_url=address, timeout=30) as client:
        answer = client.post("/ai/advanced-ml/predict-batch?include=reasons", json=ids).json()
    params = [spec["params"] for spec in report.manifest.feature_set]
    levels = {level for p in params for level in (*p.get("levels", ()), *p.get("values", ()))}
    words = {*levels, "another one", "unknown", "yes", "no"}
    number = re.compile(r"(about )?[\d.,]+(, (more|less) than most)?")
    assert len(answer["predictions"]) == 100
    for prediction in answer["predictions"]:
        receipt = prediction["receipt"]
        steps = sum(line["contribution"] for line in receipt["contributions"])
        total = receipt["base_rate"] + steps + receipt["calibration"] + receipt["bounds"]
        assert abs(total - prediction["probability"]) < 1e-9
        told = {line["value"] for line in receipt["contributions"]}
        assert not [value for value in told - words if not number.fullmatch(value)]
    sentences = [sentence for prediction in answer["predictions"] for sentence in prediction["reasons"]]
    for about in ("total time spent on website (", "lead origin (", "what is your current occupation ("):
        assert any(sentence.startswith(about) for sentence in sentences)


async def test_rows_read_for_training_equal_rows_read_for_serving(
    options: TrainingOptions, report: TrainingReport
) -> None:
    features = ModelRegistry(ModelCatalogue(report.manifest_path.parent)).load().feature_set
    chunk = next(iter(fetch_all_chunks(options.url, "x_education", features.input_columns, chunk_rows=2000)))
    database = Database(options.url, pool_size=1, deadline_seconds=30)
    try:
        source = PostgresLeadSource(database, "x_education")
        fetched = await fetch_at_once(source, chunk.lead_ids, features.input_columns)
    finally:
        await database.close()
    trained = build_features(chunk.leads, features, 0.0).values
    served = build_features(fetched.leads, features, 0.0).values[fetched.row_of]
    assert served.tobytes() == trained.tobytes()
