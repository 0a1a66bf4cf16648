"""Training end to end on a real database: what is read, refused, learnt, published, and that it repeats."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import numpy as np
import psycopg
import pytest
from rich.console import Console

from app.ai.calibration import calibrate
from app.ai.feature_safety import check_features
from app.ai.features import build_features
from app.ai.model_bundle import ModelBundle
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_manifest import manifest_fingerprint
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy, score_leads
from app.db.engine import Database
from app.db.leads import PostgresLeadSource, fetch_all_chunks
from app.errors import ArtifactError, TrainingError
from app.training.declared import DECLARED_COLUMNS, build_declared_features
from app.training.evaluation import evaluate_model
from app.training.fit import choose_threshold
from app.training.model_metrics import evaluate
from app.training.options import TrainingOptions
from app.training.report import TrainingReport, print_report
from app.training.rows import choose_columns, fetch_rows
from app.training.train import train
from tests.conftest import DEMO_PEOPLE, DEMO_UNTIL
from tests.fakes import fetch_at_once

DAY = 86_400.0


def build_options(url: str, model_dir: Path, **changes: object) -> TrainingOptions:
    options = TrainingOptions(url=url, model_dir=model_dir, seed=3, now=DEMO_UNTIL, model="random_forest")
    return replace(options, **changes)


def load_only(model_dir: Path) -> ModelBundle:
    return ModelRegistry(ModelCatalogue(model_dir, pattern="advanced_ml_*")).load()


def quick_options(url: str, model_dir: Path, **changes: object) -> TrainingOptions:
    """Options for the made-up relation with the model that is fitted fastest."""
    return build_options(
        url, model_dir, **{"source": "made_up", "label": "won", "model": "logistic_regression", **changes}
    )


@pytest.fixture(scope="module")
def report(demo_url: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingReport:
    return train(build_options(demo_url, tmp_path_factory.mktemp("models")))


@pytest.fixture
def made_up(database_url: str) -> Callable[[int], str]:
    """Makes the relation `made_up` with n leads, a third of them positive; returns the database's URL."""

    def make(n: int) -> str:
        with psycopg.connect(database_url) as connection:
            connection.execute(
                """
                CREATE TABLE made_up AS SELECT
                    md5(i::text)::uuid AS lead_id, 'ref-' || i AS external_ref, (i %% 3 = 0)::int AS won,
                    'person ' || i AS full_name, sin(i) + 0.7 * (i %% 3 = 0)::int AS signal,
                    CASE WHEN i %% 7 > 0 THEN cos(i) END AS noise,
                    (i %% 3 = 0)::int * 100 + i %% 2 AS after_the_fact, (i %% 3 = 0)::text AS status
                FROM generate_series(1, %s) i
                """,
                [n],
            )
        return database_url

    return make


def test_training_publishes_a_model_the_registry_loads(report: TrainingReport) -> None:
    bundle = load_only(report.manifest_path.parent)
    manifest = report.manifest
    assert bundle.ref.model_id == "advanced_ml_20260601_000000"
    assert bundle.ref.sha256 == manifest.sha256
    assert len(bundle.feature_set.specs) == 20
    assert manifest.horizon_days == 90
    assert 0 < manifest.threshold < 1
    assert manifest.metrics["roc_auc"] > 0.6
    assert manifest.training.calibrate_rows == pytest.approx(manifest.training.train_rows * 2 / 3, abs=1)
    assert len(manifest.golden_inputs) == 32
    assert any(None in row for row in manifest.golden_inputs[:-1])
    assert set(manifest.golden_inputs[-1]) == {None}


def test_the_same_seed_and_data_give_the_same_fingerprint_and_predictions(
    report: TrainingReport, demo_url: str, tmp_path: Path
) -> None:
    again = train(build_options(demo_url, tmp_path))
    assert manifest_fingerprint(again.manifest) == manifest_fingerprint(report.manifest)
    assert again.manifest.golden_outputs == report.manifest.golden_outputs
    assert again.manifest.metrics == report.manifest.metrics
    one, other_one = (
        told.card_path.read_text().replace(told.manifest.sha256, "") for told in (report, again)
    )
    assert one == other_one
    other = train(build_options(demo_url, tmp_path / "other", seed=4))
    assert manifest_fingerprint(other.manifest) != manifest_fingerprint(report.manifest)


async def test_training_rows_equal_serving_rows_bit_for_bit(demo_url: str) -> None:
    chunk = next(iter(fetch_all_chunks(demo_url, "lead_source", DECLARED_COLUMNS, chunk_rows=DEMO_PEOPLE)))
    assert len(chunk.lead_ids) == DEMO_PEOPLE
    outcome = (np.arange(DEMO_PEOPLE) % 4 == 0).astype(np.int64)
    feature_set = build_declared_features(chunk.leads, outcome)
    as_of = DEMO_UNTIL.timestamp()
    trained = build_features(chunk.leads, feature_set, np.full(DEMO_PEOPLE, as_of))
    database = Database(demo_url, pool_size=1, deadline_seconds=30)
    try:
        fetched = await fetch_at_once(
            PostgresLeadSource(database, "lead_source"), chunk.lead_ids, feature_set.input_columns
        )
    finally:
        await database.close()
    served = build_features(fetched.leads, feature_set, as_of)
    assert served.values[fetched.row_of].tobytes() == trained.values.tobytes()
    assert served.states[fetched.row_of].tobytes() == trained.states.tobytes()


def test_leads_without_an_as_of_are_learnt_from_and_evaluated_as_of_the_midnight_the_service_takes(
    database_url: str, tmp_path: Path
) -> None:
    """What matters is the last eight hours, in the afternoon: as of that moment the ages would be others."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "CREATE TABLE made_up AS SELECT md5(i::text)::uuid AS lead_id, sin(i) AS signal, visited_at,"
            " (sin(i * i) < CASE WHEN visited_at > '2026-06-01 07:00Z' THEN 0.5 ELSE -0.5 END)::int AS won"
            " FROM generate_series(1, 600) i, LATERAL (SELECT timestamptz '2026-06-01 15:00Z'"
            " - (i * 37 % 48) * interval '1 hour' - i * interval '1 second') AS visit(visited_at)"
        )
    midnight = DEMO_UNTIL.timestamp()
    options = quick_options(database_url, tmp_path, now=DEMO_UNTIL + timedelta(hours=15))
    manifest = train(options).manifest
    assert manifest.training.as_of_from == manifest.training.as_of_to == "2026-06-01T00:00:00Z"
    rows, *_ = fetch_rows(options, choose_columns(options)[0], lambda *_: None)
    bundle = load_only(tmp_path)
    learnt = build_features(rows.leads, bundle.feature_set, rows.as_of)
    served = build_features(rows.leads, bundle.feature_set, midnight)
    assert learnt.values.tobytes() == served.values.tobytes()
    policy = ScoringPolicy(0.6, "margin")
    answers = score_leads(bundle, rows.leads, midnight, policy).answers
    told = evaluate_model(options, bundle, policy, lambda *_: None).metrics
    assert told == evaluate(
        np.ascontiguousarray(answers["probability"]), rows.outcome, bundle.manifest.threshold
    )


def test_a_lead_is_decided_only_when_its_whole_horizon_has_passed(demo_url: str, tmp_path: Path) -> None:
    options = build_options(demo_url, tmp_path)
    columns, _ = choose_columns(options)
    rows, everyone, left_out = fetch_rows(options, columns, lambda *_: None)
    assert rows.as_of.max() + 90 * DAY <= DEMO_UNTIL.timestamp()
    assert everyone.leads.n == rows.leads.n + sum(left_out)
    assert left_out.undecided > 0
    with psycopg.connect(demo_url) as connection:
        (expected, positives) = connection.execute(
            """
            SELECT count(*), count(*) FILTER (WHERE outcome_at <= as_of + interval '90 days')
            FROM lead_training
            WHERE as_of + interval '90 days' <= %s
            """,
            [DEMO_UNTIL],
        ).fetchone() or (0, 0)
    assert (rows.leads.n, rows.outcome.sum()) == (expected, positives)


def test_an_outcome_that_comes_later_than_the_moment_of_training_is_not_known_yet(
    report: TrainingReport, demo_url: str, tmp_path: Path
) -> None:
    earlier = build_options(demo_url, tmp_path, as_of=DEMO_UNTIL - timedelta(days=120))
    rows, *_ = fetch_rows(earlier, choose_columns(earlier)[0], lambda *_: None)
    assert rows.leads.n < report.manifest.training.train_rows + report.manifest.training.test_rows
    assert rows.as_of.max() + 90 * DAY <= (DEMO_UNTIL - timedelta(days=120)).timestamp()


@pytest.mark.parametrize("model", ["logistic_regression", "random_forest", "hist_gradient_boosting"])
def test_every_model_type_trains_loads_and_scores_a_lead_the_same_in_any_company(
    made_up: Callable[[int], str], tmp_path: Path, model: str
) -> None:
    options = quick_options(made_up(300), tmp_path, model=model, fmt="joblib")
    report = train(replace(options, exclude=("after_the_fact",)))
    bundle = load_only(tmp_path)
    assert bundle.manifest.model_type == model
    assert report.manifest.metrics["roc_auc"] > 0.6
    values = np.random.default_rng(0).normal(size=(200, len(bundle.feature_set.specs)))
    together = calibrate(bundle.scorer(values), bundle.calibrator)
    alone = [calibrate(bundle.scorer(values[[row]]), bundle.calibrator)[0] for row in range(200)]
    assert together.tolist() == alone


def test_derived_features_leave_out_identity_outcome_and_denied_columns(
    made_up: Callable[[int], str], tmp_path: Path
) -> None:
    options = build_options(
        made_up(300), tmp_path, source="made_up", label="won", exclude=("after_the_fact",),
        allow_leaky=("status",),  # which opens the guard, not the list
    )  # fmt: skip
    manifest = train(options).manifest
    names = {spec["name"] for spec in manifest.feature_set}
    assert names == {"signal", "noise", "noise__present"}
    assert set(manifest.report["dropped"]) == {"status", "full_name"}
    assert manifest.report["excluded"] == ["after_the_fact"]
    assert (manifest.label, manifest.horizon_days) == ("won", None)


def test_a_leaky_column_stops_training_unless_it_is_allowed(
    made_up: Callable[[int], str], tmp_path: Path
) -> None:
    options = quick_options(made_up(300), tmp_path)
    with pytest.raises(TrainingError, match="--exclude after_the_fact"):
        train(options)
    assert not list(tmp_path.iterdir())
    manifest = train(replace(options, allow_leaky=("after_the_fact",))).manifest
    assert any("after_the_fact" in warning for warning in manifest.report["warnings"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "wonn"}, "no column wonn .*did you mean won"),
        ({"label": "signal"}, "values other than 0 and 1"),
        ({"label": "full_name"}, "expected a number or boolean"),
        ({"label": "won", "exclude": ("nois",)}, "no column nois .*did you mean noise"),
        ({}, "no column outcome_at .*name a yes-or-no column with --label, or a time with --outcome"),
        ({"outcome": "won"}, "won is a number, not a time; name a yes-or-no column with --label"),
        ({"label": "won", "exclude": ("full_name", "signal", "noise", "after_the_fact")}, "no column left"),
    ],
)
def test_a_wrong_option_is_named(
    made_up: Callable[[int], str], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        train(build_options(made_up(60), tmp_path, source="made_up", **changes))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("5 AS a, 'x' AS b", r"no column tells the 240 leads .* apart \(a: constant; b: constant\)"),
        ("5 AS a, NULL::text AS b", r"\(a: constant; b: constant\)"),
        ("i AS a", r"\(a: looks like an identifier"),
        # The column came late: the first of the parts that models are compared on knows one value of it.
        (
            "greatest(i, 150) / 7 AS a, timestamptz '2026-01-01Z' + i * interval '1 hour' AS as_of",
            r"compared on parts of the leads, and in one no column tells .* \(a: constant\)",
        ),
        *(
            (f"cos(i) AS a, CASE i WHEN 9 THEN '{moment}' ELSE timestamptz '2026-01-01Z' END AS as_of", words)
            for moment, words in (
                ("infinity", "as_of is infinite for some leads"),
                ("-infinity", "as_of is infinite for some leads"),
                ("20000-01-01", "in no year from 1 to 9998"),
                ("0044-03-15 BC", "in no year from 1 to 9998"),
            )
        ),
        ("cos(i) AS a, NULLIF(i % 2, 0) AS flag, i % 5 AS flag__present", "exclude it"),
    ],
)
def test_leads_that_nothing_can_be_learnt_from_are_a_clear_refusal(
    database_url: str, tmp_path: Path, columns: str, message: str
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            f"CREATE TABLE made_up AS SELECT md5(i::text)::uuid AS lead_id, (i * i % 7 < 3)::int AS won, "
            f"{columns} FROM generate_series(1, 300) i"
        )
    with pytest.raises(TrainingError, match=message):
        train(quick_options(database_url, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_beginning_that_is_not_finite_is_a_clear_refusal(database_url: str, tmp_path: Path) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "CREATE TABLE made_up AS SELECT md5(i::text)::uuid AS lead_id, sin(i) AS signal, "
            "CASE i WHEN 9 THEN '-infinity' ELSE timestamptz '2026-01-01Z' END AS created_at, "
            "timestamptz '2026-01-02Z' AS won_at FROM generate_series(1, 300) i"
        )
    with pytest.raises(TrainingError, match="created_at is infinite for some leads"):
        train(quick_options(database_url, tmp_path, label=None, outcome="won_at"))


def test_a_published_version_is_never_overwritten(report: TrainingReport, demo_url: str) -> None:
    with pytest.raises(ArtifactError, match="already exists"):
        train(build_options(demo_url, report.manifest_path.parent))


def test_the_report_has_the_paths_whole_however_narrow_the_output_is(report: TrainingReport) -> None:
    out = StringIO()
    print_report(report, Console(file=out, width=40))
    assert {str(report.manifest_path), str(report.card_path)} <= set(out.getvalue().splitlines())


def test_the_report_and_the_card_say_the_held_out_figures_and_no_value_of_a_lead(
    report: TrainingReport, demo_url: str
) -> None:
    out = StringIO()
    print_report(report, Console(file=out, width=160))
    html = report.card_path.read_text()
    markdown = report.card_path.with_suffix(".md").read_text()
    figure = f"{report.manifest.metrics['roc_auc']:.4f}"
    assert all(figure in text for text in (out.getvalue(), html, markdown))
    chosen = report.manifest.report["choice"]["chosen"]
    assert all(chosen in text for text in (out.getvalue(), html, markdown))
    low, high = report.manifest.report["intervals"]["roc_auc"]
    assert f"{figure}  (95 %: {low:.4f} to {high:.4f})" in out.getvalue()
    assert "http" not in html
    assert html.count("<svg") == 5
    for part in ("## What it is for", "**By verdict**", "**By time**", "## Known limits"):
        assert part in markdown
        assert part.strip("#* ") in html
    json.dumps(report.facts())
    with psycopg.connect(demo_url) as connection:
        rows = connection.execute(
            "SELECT id::text, external_ref, full_name, email, phone FROM people"
        ).fetchall()
    published = html + markdown + report.manifest_path.read_text()
    values = {value for row in rows for value in row if value}
    assert len(values) > DEMO_PEOPLE
    assert not [value for value in values if value in published]


def test_a_model_that_knows_nothing_is_not_recommended_for_anything_but_what_the_base_rate_does(
    made_up: Callable[[int], str], tmp_path: Path
) -> None:
    options = quick_options(made_up(600), tmp_path)
    said = {}
    for name, kept_out in (("noise", ("signal", "after_the_fact")), ("signal", ("noise", "after_the_fact"))):
        report = train(replace(options, exclude=kept_out, model_dir=tmp_path / name))
        out = StringIO()
        print_report(report, Console(file=out, width=200))
        said[name] = out.getvalue(), report.card_path.with_suffix(".md").read_text()
        alone = report.manifest.report["base_rate_alone"]
        (line,) = (line for line in said[name][0].splitlines() if "log-loss, the base rate alone" in line)
        assert f"{alone['log_loss']:.4f}" in line
        assert f"lower is better; the base rate alone has {alone['brier']:.4f}" in said[name][1]
        assert all("the base rate alone " in text.split("Candidates", 1)[1] for text in said[name])
    for text in said["noise"]:
        assert "It may order leads no better than chance" in " ".join(text.split())
        assert "no better than answering every lead the base rate" in " ".join(text.split())
    assert "whom to call first" not in said["noise"][1]
    assert "whom to call first" in said["signal"][1]
    assert not [text for text in said["signal"] if "no better than" in text]


def test_progress_tells_every_stage_to_its_end(made_up: Callable[[int], str], tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        seen[stage] = (done, total)

    train(quick_options(made_up(300), tmp_path, exclude=("after_the_fact",)), progress)
    assert seen["read"][0] == 300
    assert seen["compare"][0] == seen["compare"][1] > 0
    assert seen["fit"][0] == seen["fit"][1] > 0
    assert set(seen) == {"read", "compare", "fit"}


def test_the_threshold_has_the_highest_f1_of_all_thresholds() -> None:
    rng = np.random.default_rng(1)
    probability = rng.random(300).round(2)
    outcome = (rng.random(300) < probability).astype(np.int64)

    def f1(threshold: float) -> float:
        chosen = probability >= threshold
        return 2 * (chosen & (outcome == 1)).sum() / (chosen.sum() + outcome.sum())

    best = choose_threshold(probability, outcome)
    assert f1(best) == max(f1(threshold) for threshold in np.unique(probability))


def test_base_rate_and_calibrated_probabilities_agree_on_training_leads(
    report: TrainingReport, demo_url: str
) -> None:
    bundle = load_only(report.manifest_path.parent)
    options = build_options(demo_url, Path())
    rows, *_ = fetch_rows(options, choose_columns(options)[0], lambda *_: None)
    matrix = build_features(rows.leads, bundle.feature_set, rows.as_of)
    values = check_features(matrix, bundle.feature_set, bundle.statistics).values
    probability = calibrate(bundle.scorer(values), bundle.calibrator)
    assert abs(probability.mean() - bundle.manifest.base_rate) < 0.1
    assert datetime.fromisoformat(bundle.manifest.created_at) == DEMO_UNTIL.astimezone(UTC)
