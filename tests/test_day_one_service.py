"""The first days of a service, end to end: no outcome, a few, all of one kind, and at last enough."""

import json
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from pathlib import Path

import httpx2 as httpx
import numpy as np
import psycopg
import pytest
from click.testing import CliRunner
from rich.console import Console

from app.ai.domain import VERDICTS
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_manifest import manifest_fingerprint
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy, find_intervals, score_leads
from app.ai.reasons import NOTHING_LEARNT
from app.cli import cli
from app.errors import TrainingError
from app.training.day_one import ENOUGH_ROWS
from app.training.evaluation import evaluate_model
from app.training.options import TrainingOptions
from app.training.report import TrainingReport, print_report
from app.training.rows import choose_columns, fetch_rows
from app.training.train import train
from tests.conftest import DEMO_UNTIL
from tests.in_process import build_settings, serve

LEADS = 400
POLICY = ScoringPolicy(min_coverage=0.6, confidence_method="interval")


@pytest.fixture
def options(database_url: str, tmp_path: Path) -> TrainingOptions:
    """Training on a CRM that opened today: 400 leads, and not one of them won or lost."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            """
            CREATE TABLE fresh AS SELECT
                md5(i::text)::uuid AS lead_id, 'ref-' || i AS external_ref, NULL::int AS won,
                sin(i * 7) + 0.9 * (i %% 3 = 0)::int AS signal, CASE WHEN i %% 7 > 0 THEN cos(i) END AS noise,
                (ARRAY['web', 'fair', 'agent'])[1 + i %% 3] AS source, (i %% 3 = 0)::int * 5 AS note,
                i AS number
            FROM generate_series(1, %s) i
            """,
            [LEADS],
        )
    return TrainingOptions(
        url=database_url, model_dir=tmp_path / "models", source="fresh", label="won",
        exclude=("note", "source", "number"), now=DEMO_UNTIL, model="logistic_regression",
    )  # fmt: skip


def decide(options: TrainingOptions, condition: str) -> None:
    """Decides the leads whose number `i` meets the condition: every third is won."""
    with psycopg.connect(options.url) as connection:
        connection.execute(f"UPDATE fresh SET won = (number % 3 = 0)::int WHERE {condition}")


def train_next(options: TrainingOptions, **changes: object) -> TrainingReport:
    """Trains a version that is newer than all before."""
    versions = len(list(options.model_dir.glob("*.manifest.json"))) if options.model_dir.exists() else 0
    moment = options.now + timedelta(seconds=versions)
    return train(replace(options, **{"as_of": options.now, "now": moment, **changes}))


def test_without_any_outcome_every_lead_is_answered_the_expected_rate_and_the_verdict_abstains(
    options: TrainingOptions, tmp_path: Path
) -> None:
    report = train_next(options, base_rate=0.12)
    manifest = report.manifest
    assert (manifest.base_rate, manifest.metrics, manifest.training.train_rows) == (0.12, {}, 0)
    assert (manifest.training.as_of_from, len(manifest.golden_inputs)) == (None, 32)
    settings = build_settings(tmp_path, options.url, ml_model_dir=options.model_dir, lead_source="fresh")
    with serve(settings) as address, httpx.Client(base_url=address, timeout=30) as client:
        asked = "/ai/advanced-ml/predict-batch?include=interval,reasons"
        answer = client.post(asked, json=["ref-1", "ref-2"]).json()
        models = client.get("/ai/advanced-ml/models").json()
        card = client.get(f"/ai/advanced-ml/models/{manifest.version}/card").text
    for entry in answer["predictions"]:
        assert (entry["probability"], entry["verdict"], entry["prediction"]) == (0.12, "abstain", False)
        assert entry["interval"] == [0.0, 1.0]
        assert entry["reasons"] == [NOTHING_LEARNT]
    assert models["performance"] == {}
    assert "no outcome is known yet" in card


def test_with_a_few_outcomes_the_same_service_begins_to_tell_leads_apart(options: TrainingOptions) -> None:
    train_next(options, base_rate=0.12)
    decide(options, "number <= 60")
    report = train_next(options)
    bundle = ModelRegistry(ModelCatalogue(options.model_dir)).load()
    assert bundle.ref.version == report.manifest.version
    everyone = fetch_rows(options, choose_columns(options)[0], lambda *_: None)[1]
    scored = score_leads(bundle, everyone.leads, everyone.as_of, POLICY)
    probability = scored.answers["probability"]
    with psycopg.connect(options.url) as connection:
        rows = connection.execute("SELECT number % 3 = 0 FROM fresh ORDER BY lead_id").fetchall()
        won = np.array([row[0] for row in rows])
    assert probability[won].mean() > probability[~won].mean() + 0.05
    assert abs(probability.mean() - 1 / 3) < 0.08
    ends = find_intervals(bundle, scored.answers)
    assert ((ends[:, 0] <= probability) & (probability <= ends[:, 1])).all()
    assert 0.2 < np.diff(ends).mean() < 0.8
    assert (scored.answers["verdict"] == VERDICTS.index("ok")).mean() > 0.9


def test_a_receipt_adds_up_and_an_evaluation_measures_a_model_of_few_outcomes(
    options: TrainingOptions, tmp_path: Path
) -> None:
    decide(options, "number <= 60")
    train_next(options)
    settings = build_settings(tmp_path, options.url, ml_model_dir=options.model_dir, lead_source="fresh")
    with serve(settings) as address, httpx.Client(base_url=address, timeout=30) as client:
        asked = "/ai/advanced-ml/predict-batch?include=reasons"
        answer = client.post(asked, json=[f"ref-{i}" for i in range(1, 31)]).json()
    for entry in answer["predictions"]:
        receipt = entry["receipt"]
        lines = sum(line["contribution"] for line in receipt.pop("contributions"))
        assert lines + sum(receipt.values()) == pytest.approx(entry["probability"], abs=1e-9)
    assert any(entry["reasons"] for entry in answer["predictions"])
    decide(options, "number > 60")
    found = evaluate_model(
        options, ModelRegistry(ModelCatalogue(options.model_dir)).load(), POLICY, lambda *_: None
    )
    assert found.metrics["roc_auc"] > 0.6
    coverage = found.interval_coverage
    assert coverage is not None
    assert coverage["covered"] == coverage["bins"]


def test_the_report_and_the_card_say_how_few_outcomes_there_are_and_when_to_train_again(
    options: TrainingOptions,
) -> None:
    decide(options, "number <= 33")
    report = train_next(options)
    out = StringIO()
    print_report(report, Console(file=out, width=500))
    markdown = report.card_path.with_suffix(".md").read_text()
    for text in (out.getvalue(), markdown, report.card_path.read_text()):
        assert "day-one model" in text
        assert "33 outcomes, 11 of them positive" in text
        assert f"Train again at {ENOUGH_ROWS} outcomes" in text
    assert report.manifest.report["undecided"] == LEADS - 33
    assert json.loads(json.dumps(report.facts()))["report"]["day_one"]["outcomes"] == 33


@pytest.mark.parametrize(("kind", "rate"), [("= 0", 6.5 / 7), ("> 0", 0.5 / 13)])
def test_outcomes_of_one_kind_give_the_base_rate_and_need_no_expectation(
    options: TrainingOptions, kind: str, rate: float
) -> None:
    decide(options, f"number <= 18 AND number % 3 {kind}")
    report = train_next(options)
    bundle = ModelRegistry(ModelCatalogue(options.model_dir)).load()
    everyone = fetch_rows(options, choose_columns(options)[0], lambda *_: None)[1]
    answers = score_leads(bundle, everyone.leads, everyone.as_of, POLICY).answers
    assert report.manifest.base_rate == pytest.approx(rate)
    assert set(answers["probability"]) == {report.manifest.base_rate}
    assert set(answers["verdict"]) == {VERDICTS.index("abstain")}


def test_nothing_decided_and_nothing_expected_is_a_clear_refusal(
    options: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", options.url)
    monkeypatch.setenv("ML_MODEL_DIR", str(options.model_dir))
    command = ["train", "--source", "fresh", "--label", "won"]
    refused = CliRunner().invoke(cli, command)
    assert refused.exit_code == 1
    assert "no lead is decided yet" in refused.stderr
    assert "--base-rate 0.1" in refused.stderr
    assert CliRunner().invoke(cli, [*command, "--base-rate", "1"]).exit_code == 2
    given = CliRunner().invoke(cli, [*command, "--base-rate", "0.2", "--json"])
    assert json.loads(given.stdout)["base_rate"] == 0.2


def test_a_column_that_knows_the_outcome_is_left_out_by_name_unless_it_is_allowed(
    options: TrainingOptions,
) -> None:
    decide(options, "number <= 60")
    knowing = replace(options, exclude=("source", "number"))
    left_out = train_next(knowing).manifest
    assert "--allow-leaky note keeps it" in left_out.report["dropped"]["note"]
    assert "note" not in {column["name"] for spec in left_out.feature_set for column in spec["inputs"]}
    allowed = train_next(knowing, allow_leaky=("note",)).manifest
    assert "note" in {spec["name"] for spec in allowed.feature_set}


def test_with_enough_outcomes_the_first_day_is_over_and_an_expected_rate_is_said_to_be_unused(
    options: TrainingOptions,
) -> None:
    decide(options, "true")
    manifest = train_next(options, base_rate=0.5).manifest
    assert "day_one" not in manifest.report
    assert manifest.metrics["roc_auc"] > 0.6
    assert any("expected base rate is not used" in warning for warning in manifest.report["warnings"])


def test_the_same_outcomes_and_seed_give_the_same_model(options: TrainingOptions) -> None:
    decide(options, "number <= 45")
    one, same = train_next(options).manifest, train_next(options).manifest
    assert manifest_fingerprint(one) == manifest_fingerprint(same)
    decide(options, "number <= 60")
    assert manifest_fingerprint(train_next(options).manifest) != manifest_fingerprint(one)


def test_the_default_source_answers_from_its_first_decided_lead(demo_url: str, tmp_path: Path) -> None:
    options = TrainingOptions(url=demo_url, model_dir=tmp_path, now=DEMO_UNTIL)
    columns, _ = choose_columns(options)
    first = fetch_rows(options, columns, lambda *_: None)[1].as_of.min()
    since = DEMO_UNTIL.timestamp() - first
    for days in (80, 110):
        moment = DEMO_UNTIL - timedelta(seconds=since) + timedelta(days=days)
        report = train(replace(options, now=moment, base_rate=0.25))
        known = report.manifest.report["day_one"]
        assert (known["outcomes"] > 0) == (days > 90)
    assert known["outcomes"] < ENOUGH_ROWS
    assert ModelRegistry(ModelCatalogue(tmp_path)).load().ref.version == report.manifest.version


def test_a_source_without_leads_is_a_clear_refusal(options: TrainingOptions) -> None:
    with psycopg.connect(options.url) as connection:
        connection.execute("DELETE FROM fresh")
    with pytest.raises(TrainingError, match="fresh has no leads"):
        train_next(options, base_rate=0.2)
