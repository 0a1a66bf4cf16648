"""A lead younger than the horizon is neither won nor lost; taking it for lost would teach a rate too low."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner
from rich.console import Console
from scipy.stats import lognorm

from app.ai.domain import FloatArray
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy, score_leads
from app.cli import cli
from app.errors import TrainingError
from app.training.evaluation import evaluate_model
from app.training.options import TrainingOptions
from app.training.report import print_report
from app.training.rows import LeftOut, choose_columns, fetch_rows
from app.training.train import train
from tests.builders import DAY, column, leads

NOW = datetime(2026, 6, 1, tzinfo=UTC)
N, HORIZON_DAYS, WINDOW_DAYS = 60_000, 90, 150
DELAYS = lognorm(s=0.9, scale=30)
"""Days until a lead that will come does come: half within 30, one in nine only after 90."""


@pytest.fixture
def options(database_url: str, tmp_path: Path) -> Callable[..., TrainingOptions]:
    return lambda **changes: replace(
        TrainingOptions(url=database_url, model_dir=tmp_path, source="delayed", outcome="won_at", now=NOW,
                        horizon_days=HORIZON_DAYS, model="logistic_regression"),
        **changes,
    )  # fmt: skip


def eventually(interest: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-interest))


def create_delayed_leads(url: str) -> FloatArray:
    """Makes `delayed`: leads of the last 150 days as they are known now; returns each one's true chance."""
    random = np.random.default_rng(6)
    interest, age = random.normal(0, 1, N), random.uniform(0, WINDOW_DAYS, N)
    delay = np.where(random.random(N) < eventually(interest), DELAYS.rvs(N, random_state=random), np.inf)
    with psycopg.connect(url) as connection:
        connection.execute(
            "CREATE TABLE delayed (lead_id uuid, created_at timestamptz, interest float8, won_at timestamptz)"
        )
        with connection.cursor().copy("COPY delayed FROM STDIN") as copy:
            for row in range(N):
                created = NOW.timestamp() - age[row] * DAY
                won = (
                    datetime.fromtimestamp(created + delay[row] * DAY, UTC)
                    if delay[row] <= age[row]
                    else None
                )
                copy.write_row((f"{row:032x}", datetime.fromtimestamp(created, UTC), interest[row], won))
        connection.execute(
            "CREATE VIEW taken_for_lost AS "
            "SELECT lead_id, interest, (won_at IS NOT NULL)::int AS won FROM delayed"
        )
    return interest


def calibration_error(options: TrainingOptions, interest: FloatArray) -> float:
    """Returns the error against the true chance to come within the horizon, over 15 bins of equal mass."""
    train(options)
    bundle = ModelRegistry(ModelCatalogue(options.model_dir)).load()
    scored = score_leads(
        bundle, leads(interest=column("number", *interest.tolist())), NOW.timestamp(),
        ScoringPolicy(0.0, "margin"),
    )  # fmt: skip
    predicted = scored.answers["probability"]
    truth = eventually(interest) * DELAYS.cdf(HORIZON_DAYS)
    bins = np.array_split(np.argsort(interest), 15)
    return float(np.mean([abs(predicted[part].mean() - truth[part].mean()) for part in bins]))


def test_waiting_for_the_horizon_calibrates_and_taking_young_leads_for_lost_does_not(
    options: Callable[..., TrainingOptions], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    interest = create_delayed_leads(options().url)
    patient = calibration_error(options(), interest)
    naive = options(source="taken_for_lost", label="won", model_dir=tmp_path / "naive")
    taken_for_lost = calibration_error(naive, interest)
    record_property("waiting", round(patient, 4))
    record_property("taken for lost", round(taken_for_lost, 4))
    assert patient < 0.02
    assert taken_for_lost > 0.05


def test_labels_that_fall_among_the_latest_leads_may_not_be_in_yet_and_the_report_and_card_say_so(
    options: Callable[..., TrainingOptions], tmp_path: Path
) -> None:
    create_delayed_leads(options().url)
    with psycopg.connect(options().url) as connection:
        connection.execute(
            "CREATE VIEW labelled AS SELECT lead_id, created_at, interest, (won_at IS NOT NULL)::int AS won, "
            f"CASE WHEN created_at < '{NOW}'::timestamptz - interval '{HORIZON_DAYS} days' "
            f"THEN (won_at < created_at + interval '{HORIZON_DAYS} days')::int END AS waiting "
            f"FROM delayed WHERE lead_id < '00000000-0000-0000-0000-000000004000'"
        )
    said = {}
    for label, other in (("won", "waiting"), ("waiting", "won")):
        asked = options(source="labelled", label=label, exclude=(other,), order_by="created_at",
                        model_dir=tmp_path / label)  # fmt: skip
        report, out = train(asked), StringIO()
        print_report(report, Console(file=out, width=200))
        said[label] = [
            " ".join(text.split())
            for text in (out.getvalue(), report.card_path.with_suffix(".md").read_text())
        ]
    for text in said["won"]:
        assert "their outcomes are not in yet and were taken for no" in text
        assert "name the time of the outcome with --outcome and --horizon-days" in text
    assert not [text for text in said["waiting"] if "not in yet" in text]


def create_few(url: str, rows: str, time: str = "created_at") -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            f"CREATE TABLE delayed AS SELECT md5(concat({time}, won_at, i))::uuid AS lead_id, "
            f"{time}::timestamptz, won_at::timestamptz, sin(i) AS signal "
            f"FROM (VALUES {rows}) AS given({time}, won_at), generate_series(1, 60) i"
        )


@pytest.mark.parametrize("time", ["created_at", "as_of"])
def test_each_lead_is_won_lost_or_open_by_its_own_horizon(
    options: Callable[..., TrainingOptions], time: str
) -> None:
    create_few(
        options().url,
        """('2026-01-01', '2026-02-01'), ('2026-01-02', '2026-01-02'), ('2026-01-03', '2026-05-01'),
           ('2026-01-04', NULL), ('2026-01-05', '2026-01-04'), ('2026-05-01', '2026-05-02'),
           ('2026-05-02', NULL)""",
        time,
    )
    asked = options()
    rows, everyone, left_out = fetch_rows(asked, choose_columns(asked)[0], lambda *_: None)
    by_day = {
        datetime.fromtimestamp(moment, UTC).day: int(won)
        for moment, won in zip(rows.as_of, rows.outcome, strict=True)
    }
    assert by_day == {1: 1, 2: 1, 3: 0, 4: 0}, "in time, the same day, too late, never"
    assert left_out == LeftOut(2 * 60, 60), "young and won, young and open; won before it began"
    assert rows.leads.n == 4 * 60
    assert everyone.leads.n == 7 * 60


@pytest.mark.parametrize(
    ("kind", "won", "decided"),
    [
        ("date", "2026-01-01", {1: 1, 2: 0, 3: 0}),
        ("timestamptz", "2026-01-01", {1: 1, 2: 0, 3: 0}),
        ("timestamptz", "2026-01-01 11:59", {2: 0, 3: 0}),
        ("timestamptz", "2026-01-01 12:01", {1: 1, 2: 0, 3: 0}),
        ("date", "2025-12-31", {2: 0, 3: 0}),
    ],
)
def test_an_outcome_of_which_only_the_date_is_known_came_after_a_beginning_of_the_same_day(
    options: Callable[..., TrainingOptions], kind: str, won: str, decided: dict[int, int]
) -> None:
    create_few(
        options().url,
        f"('2026-01-01 12:00', '{won}'), ('2026-01-02 12:00', '2026-06-01'), ('2026-01-03 12:00', NULL)",
    )
    with psycopg.connect(options().url) as connection:
        connection.execute(f"ALTER TABLE delayed ALTER won_at TYPE {kind}")
    asked = options()
    rows, _, left_out = fetch_rows(asked, choose_columns(asked)[0], lambda *_: None)
    by_day = {
        datetime.fromtimestamp(moment, UTC).day: int(outcome)
        for moment, outcome in zip(rows.as_of, rows.outcome, strict=True)
    }
    assert by_day == decided
    assert left_out == LeftOut(0, 60 * (3 - len(decided)))


@pytest.mark.parametrize(
    "place", ["UTC", "Europe/London", "Europe/Berlin", "America/New_York", "Asia/Kolkata"]
)
def test_outcomes_that_are_dates_of_whatever_place_are_told_as_such(
    options: Callable[..., TrainingOptions], place: str
) -> None:
    """Leads of 2025 at any time of day; a third win, every other one of these on the day it begins."""
    with psycopg.connect(options().url) as connection:
        connection.execute(
            f"""
            CREATE TABLE delayed AS SELECT md5(i::text)::uuid AS lead_id, sin(i) AS signal,
                began AT TIME ZONE '{place}' AS created_at, CASE WHEN i % 3 = 0
                    THEN (began::date + i % 2 * 30)::timestamp AT TIME ZONE '{place}' END AS won_at
            FROM generate_series(1, 900) i, LATERAL (SELECT timestamp '2025-01-01 06:30'
                + i % 300 * interval '1 day' + i % 17 * interval '1 hour') AS local(began)
            """
        )
    asked = options()
    rows, _, left_out = fetch_rows(asked, choose_columns(asked)[0], lambda *_: None)
    assert left_out == LeftOut(0, 0)
    assert (rows.leads.n, rows.outcome.sum()) == (900, 300)


def create_visited(url: str) -> None:
    """Makes `visited`: leads of 2025 with other times; and `moments`, the same with an as-of time."""
    with psycopg.connect(url) as connection:
        connection.execute(
            """
            CREATE TABLE visited AS SELECT md5(i::text)::uuid AS lead_id, created_at, sin(i) AS signal,
                created_at + (2 + sin(i * i)) * interval '9 days' AS last_visit_at,
                (created_at + interval '200 days')::date AS intake_on,
                CASE WHEN i % 3 = 0 THEN created_at + interval '20 days' END AS won_at
            FROM generate_series(1, 600) i, LATERAL (
                SELECT timestamptz '2025-01-01 10:00Z' + i * interval '6 hours') AS began(created_at);
            CREATE VIEW moments AS SELECT *, created_at + interval '1 day' AS as_of FROM visited;
            CREATE VIEW only_times AS SELECT lead_id, created_at, last_visit_at, won_at FROM visited
            """
        )


def test_without_an_as_of_no_time_is_learnt_from_as_training_and_serving_would_count_it_differently(
    options: Callable[..., TrainingOptions],
) -> None:
    create_visited(options().url)
    manifest = train(options(source="visited")).manifest
    assert {spec["name"] for spec in manifest.feature_set} == {"signal"}
    assert set(manifest.report["dropped"]) == {"last_visit_at", "intake_on"}
    assert "give visited an as_of" in manifest.report["dropped"]["last_visit_at"]
    at_moments, _ = choose_columns(options(source="moments"))
    assert {column.name for column in at_moments} == {"created_at", "signal", "last_visit_at", "intake_on"}
    of_today, _ = choose_columns(options(source="visited", label="signal"))
    assert {"last_visit_at", "intake_on"} <= {column.name for column in of_today}
    with pytest.raises(TrainingError, match=r"no column left .*last_visit_at: .* give only_times an as_of"):
        train(options(source="only_times"))
    with psycopg.connect(options().url) as connection:
        connection.execute("ALTER VIEW lead_training RENAME COLUMN as_of TO moment")
    with pytest.raises(TrainingError, match="no column as_of"):
        choose_columns(options(source="lead_training"))


def test_an_evaluation_without_an_as_of_says_which_times_the_service_counts_differently(
    options: Callable[..., TrainingOptions], tmp_path: Path
) -> None:
    create_visited(options().url)
    train(options(source="moments"))
    bundle = ModelRegistry(ModelCatalogue(tmp_path)).load()
    policy = ScoringPolicy(0.0, "margin")
    said = evaluate_model(options(source="visited"), bundle, policy, lambda *_: None).warnings
    assert any("created_at, intake_on and last_visit_at" in warning for warning in said)
    assert not any(
        "last_visit_at" in warning
        for warning in evaluate_model(options(source="moments"), bundle, policy, lambda *_: None).warnings
    )


def test_a_source_without_any_beginning_is_a_clear_refusal(options: Callable[..., TrainingOptions]) -> None:
    create_few(options().url, "('2026-01-01', '2026-02-01')", "begun_at")
    with pytest.raises(TrainingError, match=r"no column as_of or created_at, .*--label"):
        train(options())


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_moment_that_has_not_come_is_refused_as_it_would_make_every_young_lead_a_lost_one(
    options: Callable[..., TrainingOptions], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    with pytest.raises(TrainingError, match="as-of time 2026-06-02"):
        options(as_of=NOW + timedelta(days=1))
    options(as_of=NOW)
    create_visited(options().url)
    train(options(source="visited"))
    monkeypatch.setenv("DATABASE_URL", options().url)
    monkeypatch.setenv("ML_MODEL_DIR", str(options().model_dir))
    asked = [command, "--source", "visited", "--outcome", "won_at", "--as-of", "9000-01-01"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: the as-of time 9000-01-01 has not come yet: a lead whose outcome may still come would count "
        "as lost."
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--label", "won", "--outcome", "won_at"), "--label or --outcome"),
        (("--seed", "4294967296"), "0<=x<=4294967295"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_opened(arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(cli, ["train", *arguments])
    assert result.exit_code == 2
    assert said in result.output
