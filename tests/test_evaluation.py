"""`leadscore evaluate`: a published model on leads whose outcome is known, answered as by the service."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import httpx2 as httpx
import numpy as np
import psycopg
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from app.ai.domain import VERDICTS
from app.ai.model_bundle import ModelBundle
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy, find_intervals, score_leads
from app.cli import cli
from app.db.csv_import import import_csv
from app.errors import CommandError
from app.training.bootstrap import bootstrap_intervals
from app.training.evaluation import Evaluation, evaluate_model
from app.training.interval_coverage import measure_coverage
from app.training.model_metrics import evaluate
from app.training.options import TrainingOptions
from app.training.reliability import describe_reliability
from app.training.report import print_evaluation
from app.training.rows import choose_columns, fetch_rows
from app.training.splits import split_rows
from app.training.train import train
from tests.conftest import DEMO_UNTIL
from tests.in_process import build_settings, serve
from tests.lead_models import build_lead_bundle, build_lead_rows
from tests.real_leads import CSV, TRAPS, needs_real_leads

POLICY = ScoringPolicy(min_coverage=0.6, confidence_method="margin")
VERSION = "20260601_000000"
SEED_HOLDING_OUT_EMPTY_LEADS = 3
MID_FEBRUARY = datetime(2025, 2, 15, tzinfo=UTC)


def evaluate_quietly(options: TrainingOptions, bundle: ModelBundle) -> Evaluation:
    return evaluate_model(options, bundle, POLICY, lambda *_: None)


@pytest.fixture(scope="module")
def crm(create_database: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> TrainingOptions:
    """Leads of 2025 and their outcomes, a model of the first month, and views of the others."""
    url = create_database("evaluation")
    with psycopg.connect(url) as connection:
        connection.execute(
            """
            CREATE TABLE leads AS SELECT
                md5(i::text)::uuid AS lead_id, '2025-01-01'::timestamptz + i * interval '1 hour' AS as_of,
                (i %% 3 = 0)::int AS won, sin(i) + 0.7 * (i %% 3 = 0)::int AS signal, cos(i) AS noise,
                CASE WHEN i %% 10 > 0 THEN i %% 3 = 0 END AS known, i %% 7 < 2 AS chance
            FROM generate_series(1, %s) i;
            """,
            [2000],
        )
        for view, condition in (("seen", "<= '2025-02-01'"), ("unseen", "> '2025-02-01'")):
            connection.execute(f"CREATE VIEW {view} AS SELECT * FROM leads WHERE as_of {condition}")
        connection.execute(
            """
            CREATE VIEW thin AS SELECT lead_id, as_of, won, noise * 0 AS other,
                CASE WHEN extract(hour FROM as_of) < 12 THEN signal END AS signal,
                CASE WHEN extract(hour FROM as_of) < 12 THEN noise END AS noise FROM unseen;
            CREATE VIEW patchy AS SELECT lead_id, won * (hour % 12 > 0)::int AS won,
                CASE WHEN hour % 12 > 0 THEN signal END AS signal,
                CASE WHEN hour % 12 > 0 THEN noise END AS noise
                FROM (SELECT *, extract(epoch FROM as_of)::bigint / 3600 AS hour FROM leads);
            CREATE VIEW without_signal AS SELECT lead_id, as_of, won, noise FROM unseen;
            CREATE VIEW signal_as_text AS
                SELECT lead_id, as_of, won, noise, signal::text AS signal FROM unseen;
            CREATE VIEW only_lost AS SELECT * FROM unseen WHERE won = 0;
            CREATE VIEW a_few AS SELECT * FROM unseen LIMIT 30;
            CREATE VIEW timeless AS SELECT lead_id, won, signal, noise FROM leads;
            CREATE VIEW timeless_too AS SELECT * FROM timeless;
            CREATE VIEW begun AS SELECT lead_id, as_of AS created_at, won, signal, noise FROM leads
            """
        )
    models = tmp_path_factory.mktemp("models")
    options = TrainingOptions(
        url=url,
        model_dir=models,
        source="seen",
        label="won",
        exclude=("known", "chance"),
        model="logistic_regression",
        now=DEMO_UNTIL,
    )
    train(options)
    return replace(options, source="unseen")


@pytest.fixture(scope="module")
def bundle(crm: TrainingOptions) -> ModelBundle:
    return ModelRegistry(ModelCatalogue(crm.model_dir)).load()


@needs_real_leads
def test_an_evaluation_on_real_leads_is_that_of_the_answers_over_http(
    create_database: Callable[..., str], tmp_path: Path
) -> None:
    url = create_database("evaluation_real")
    import_csv(
        url, CSV, table="leads", id_column="Prospect ID", label_column="Converted", missing=("Select",)
    )
    with psycopg.connect(url) as connection:
        for name, half in (("seen", "= 0"), ("unseen", "= 1")):
            connection.execute(
                f"CREATE VIEW {name} AS SELECT * FROM leads WHERE get_byte(uuid_send(lead_id), 15) % 2 {half}"
            )
        rows = connection.execute("SELECT external_ref, converted FROM unseen").fetchall()
    options = TrainingOptions(url=url, model_dir=tmp_path / "models", source="seen", label="converted",
                              exclude=TRAPS, model="logistic_regression")  # fmt: skip
    train(options)
    bundle = ModelRegistry(ModelCatalogue(options.model_dir)).load()
    found = evaluate_quietly(replace(options, source="unseen"), bundle)

    probability, verdicts = [], []
    settings = build_settings(tmp_path, url, ml_model_dir=options.model_dir, lead_source="unseen")
    with serve(settings) as address, httpx.Client(base_url=address, timeout=30) as client:
        for start in range(0, len(rows), 2000):
            ids = [lead_id for lead_id, _ in rows[start : start + 2000]]
            answer = client.post("/ai/advanced-ml/predict-batch", json=ids).json()
            probability += [entry["probability"] for entry in answer["predictions"]]
            verdicts += [entry["verdict"] for entry in answer["predictions"]]
    outcome = np.array([int(won) for _, won in rows])
    assert found.leads == len(rows) == len(probability) > 4000
    expected = evaluate(np.array(probability), outcome, bundle.manifest.threshold)
    assert found.metrics == pytest.approx(expected, abs=1e-12)
    assert {verdict: told["leads"] for verdict, told in found.verdicts.items()} == {
        verdict: verdicts.count(verdict) for verdict in VERDICTS
    }
    assert found.metrics["roc_auc"] > 0.84
    assert found.intervals["roc_auc"][0] < found.metrics["roc_auc"] < found.intervals["roc_auc"][1]
    assert found.interval_coverage is not None
    assert found.interval_coverage["bins"] == 15
    assert found.warnings == ()


def test_leads_after_the_training_window_are_evaluated_without_a_warning(
    crm: TrainingOptions, bundle: ModelBundle
) -> None:
    found = evaluate_quietly(crm, bundle)
    assert found.warnings == ()
    assert (found.version, found.source, found.outcome) == (VERSION, "unseen", "won")
    assert found.leads == 2000 - 744
    assert 0.6 < found.metrics["roc_auc"] < 1
    assert found.verdicts["ok"] == {"leads": found.leads, "share": 1.0,
                                    "brier": pytest.approx(found.metrics["brier"], abs=1e-6)}  # fmt: skip


def test_leads_of_the_training_window_are_counted_in_a_warning(
    crm: TrainingOptions, bundle: ModelBundle
) -> None:
    (warning,) = evaluate_quietly(replace(crm, source="leads"), bundle).warnings
    assert warning.startswith(
        f"596 of 2,000 leads are of the time model {VERSION} was trained on (2025-01-01 to 2025-01-25)"
    )


def test_leads_without_a_time_of_their_own_are_warned_of_only_where_the_model_comes_from_them(
    crm: TrainingOptions, bundle: ModelBundle, tmp_path: Path
) -> None:
    timeless = replace(crm, source="timeless")
    assert evaluate_quietly(timeless, bundle).warnings == ()
    train(replace(timeless, model_dir=tmp_path, exclude=()))
    bundle = ModelRegistry(ModelCatalogue(tmp_path)).load()
    for spelling in ("timeless", "public.timeless"):
        (warning,) = evaluate_quietly(replace(crm, source=spelling), bundle).warnings
        assert "trained on timeless" in warning
    assert evaluate_quietly(replace(crm, source="timeless_too"), bundle).warnings == ()


def test_leads_taken_as_they_were_when_the_model_was_trained_overlap_if_they_had_begun(
    crm: TrainingOptions, tmp_path: Path
) -> None:
    begun = replace(crm, source="begun", model_dir=tmp_path, exclude=("created_at",), now=MID_FEBRUARY)
    train(begun)
    (warning,) = evaluate_quietly(begun, ModelRegistry(ModelCatalogue(tmp_path)).load()).warnings
    assert warning.startswith("1,104 of 2,000 leads are of the time model")
    assert "(up to 2025-02-15)" in warning


def test_leads_of_which_nothing_is_known_are_judged_by_the_base_rate_they_are_answered_with(
    crm: TrainingOptions, bundle: ModelBundle
) -> None:
    found = evaluate_quietly(replace(crm, source="thin"), bundle)
    assert found.verdicts["abstain"]["share"] == pytest.approx(0.5, abs=0.01)
    base_rate, rate = bundle.manifest.base_rate, 1 / 3
    assert found.verdicts["abstain"]["brier"] == pytest.approx(
        rate * (1 - base_rate) ** 2 + (1 - rate) * base_rate**2, abs=0.01
    )
    assert found.verdicts["ok"]["brier"] < found.verdicts["abstain"]["brier"]
    assert sum(told["leads"] for told in found.verdicts.values()) == found.leads


def test_the_figures_of_a_training_are_those_of_what_the_held_out_leads_are_answered(
    crm: TrainingOptions, tmp_path: Path
) -> None:
    # Identical leads are kept together: with this seed those of which nothing is known are held out.
    options = replace(crm, source="patchy", exclude=(), model_dir=tmp_path, seed=SEED_HOLDING_OUT_EMPTY_LEADS)
    report = train(options)
    bundle = ModelRegistry(ModelCatalogue(tmp_path)).load()
    rows, *_ = fetch_rows(options, choose_columns(options)[0], lambda *_: None)
    _, held_out = split_rows(rows, options.seed)
    answers = score_leads(bundle, held_out.leads, held_out.as_of, POLICY).answers
    probability, outcome = np.ascontiguousarray(answers["probability"]), held_out.outcome
    empty = answers["verdict"] == VERDICTS.index("abstain")
    assert empty.sum() > 100
    assert not outcome[empty].any()

    told = report.manifest.report
    expected = evaluate(probability, outcome, bundle.manifest.threshold)
    assert report.manifest.metrics == pytest.approx(expected, abs=1e-12)
    assert told["reliability"] == describe_reliability(probability, outcome)
    assert told["intervals"] == bootstrap_intervals(probability, outcome, options.seed)
    intervals = find_intervals(bundle, answers)
    assert told["interval_coverage"] == measure_coverage(intervals, probability, outcome)
    card = report.card_path.with_suffix(".md").read_text()
    assert f"| abstain | {empty.sum()} | 0.0% | {bundle.manifest.base_rate:.1%} |" in card


def test_a_model_that_does_no_better_on_these_leads_than_the_base_rate_is_warned_of(
    crm: TrainingOptions, bundle: ModelBundle
) -> None:
    found = evaluate_quietly(replace(crm, label="chance"), bundle)
    assert found.metrics["log_loss"] > found.base_rate_alone["log_loss"]
    out = StringIO()
    print_evaluation(found, Console(file=out, width=200))
    assert "It may order leads no better than chance" in out.getvalue()
    assert "no better than answering every lead the base rate" in out.getvalue()


def test_leads_without_an_outcome_are_left_out_and_counted(crm: TrainingOptions, bundle: ModelBundle) -> None:
    found = evaluate_quietly(replace(crm, label="known"), bundle)
    assert found.undecided == 126
    assert found.leads == 2000 - 744 - 126


def test_leads_that_get_no_answer_are_counted_and_count_for_nothing(
    database_url: str, tmp_path: Path
) -> None:
    leads = build_lead_rows(200, seed=1)
    for lead in leads[:7]:
        lead["tuition_fee"] = float("nan")  # the model of this test declines such a lead
    columns = ("gpa", "minutes_on_site", "touchpoint_count", "newsletter_opt_in", "created_at", "source",
               "tuition_fee")  # fmt: skip
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "CREATE TABLE odd (lead_id uuid DEFAULT gen_random_uuid(), label boolean, gpa float8, "
            "minutes_on_site float8, touchpoint_count float8, newsletter_opt_in boolean, "
            "created_at timestamptz, source text, tuition_fee float8)"
        )
        connection.cursor().executemany(
            "INSERT INTO odd (label, gpa, minutes_on_site, touchpoint_count, newsletter_opt_in, created_at, "
            "source, tuition_fee) VALUES (%s, %s, %s, %s, %s, to_timestamp(%s), %s, %s)",
            [(number % 2 == 0, *(lead[name] for name in columns)) for number, lead in enumerate(leads)],
        )
    options = TrainingOptions(url=database_url, model_dir=tmp_path, source="odd", label="label")
    found = evaluate_quietly(options, build_lead_bundle())
    assert (found.rejected, found.leads, found.positives) == (7, 193, 96)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"source": "without_signal"},
            r"without_signal lacks columns that model \w+ reads.* signal \(number\)",
        ),
        ({"source": "signal_as_text"}, r"signal_as_text lacks columns .* another type: signal \(number\)"),
        ({"source": "nowhere"}, "there is no table or view nowhere"),
        ({"label": "wun"}, "no column wun .* did you mean won"),
        ({"label": "noise"}, "noise feeds model .* cannot be what it foretells"),
        ({"label": "as_of"}, "the label as_of has values other than 0 and 1"),
        ({"source": "only_lost"}, "0 with the outcome"),
        ({"source": "a_few"}, "too few decided leads"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_evaluated_is_said_in_one_line(
    crm: TrainingOptions, bundle: ModelBundle, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(CommandError, match=said):
        evaluate_quietly(replace(crm, **changes), bundle)


@pytest.fixture
def run(crm: TrainingOptions) -> Callable[..., Result]:
    environment = {"DATABASE_URL": crm.url, "ML_MODEL_DIR": str(crm.model_dir)}
    return lambda *arguments: CliRunner().invoke(cli, ["evaluate", *arguments], env=environment)


def test_the_command_prints_the_figures_of_the_model_that_serves(
    run: Callable[..., Result], crm: TrainingOptions, bundle: ModelBundle
) -> None:
    expected = evaluate_quietly(crm, bundle)
    told = json.loads(run("--source", "unseen", "--json").stdout)
    assert told == json.loads(json.dumps(expected.facts()))
    text = run("--source", "unseen", "--label", "won", "--model", VERSION).stdout
    low, high = expected.intervals["roc_auc"]
    assert f"{expected.metrics['roc_auc']:.4f}  (95 %: {low:.4f} to {high:.4f})" in text
    assert "verdict abstain" in text
    assert expected.interval_coverage is not None
    without = expected.interval_coverage["covered_without_width"]
    assert f"the bare probabilities in {without}; mean width" in " ".join(text.split())
    (line,) = (line for line in text.splitlines() if "Brier score, the base rate alone" in line)
    assert f"{expected.base_rate_alone['brier']:.4f}" in line
    assert "warning" not in text


def test_without_a_source_the_model_is_evaluated_on_its_own_and_the_overlap_is_said(
    run: Callable[..., Result],
) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert "596 of 744 leads are of the time model" in " ".join(result.output.split())


def test_a_model_of_an_outcome_time_is_asked_its_own_question_by_default(
    demo_url: str, tmp_path: Path
) -> None:
    options = TrainingOptions(url=demo_url, model_dir=tmp_path, now=DEMO_UNTIL, model="logistic_regression")
    report = train(options)
    environment = {"DATABASE_URL": demo_url, "ML_MODEL_DIR": str(tmp_path)}
    arguments = ["evaluate", "--as-of", DEMO_UNTIL.date().isoformat(), "--json"]
    told = json.loads(CliRunner().invoke(cli, arguments, env=environment).stdout)
    training = report.manifest.training
    assert (told["source"], told["outcome"]) == ("lead_training", "outcome_at")
    assert told["leads"] == training.train_rows + training.test_rows
    assert told["positives"] == training.positives
    assert told["undecided"] == report.manifest.report["undecided"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--model", "20200101_000000"), 1, "no model 20200101_000000"),
        (("--label", "won", "--outcome", "won"), 2, "--label or --outcome"),
        (("--source", "without_signal"), 1, "signal (number)"),
    ],
)
def test_a_command_that_cannot_go_on_says_why(
    run: Callable[..., Result], arguments: tuple[str, ...], status: int, said: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == status
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_names_out_of_the_database_are_printed_as_they_are(crm: TrainingOptions, bundle: ModelBundle) -> None:
    out = StringIO()
    evaluation = replace(evaluate_quietly(crm, bundle), source="[bold]leads", warnings=("[red]odd",))
    print_evaluation(evaluation, Console(file=out, width=160))
    assert "[bold]leads" in out.getvalue()
    assert "[red]odd" in out.getvalue()
