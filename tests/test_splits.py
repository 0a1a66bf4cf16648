"""Which leads are learnt from and which are measured on: never the same, and never the future first."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner

from app.ai.domain import FloatArray, InputColumn, IntArray
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy
from app.cli import cli
from app.db.csv_import import import_csv
from app.errors import TrainingError
from app.training.evaluation import evaluate_model
from app.training.options import TrainingOptions
from app.training.report import describe_data
from app.training.rows import TrainingRows, choose_columns, fetch_rows
from app.training.splits import Fold, build_folds, group_rows, split_rows
from app.training.train import choose_features, train
from tests.builders import AS_OF, column, leads
from tests.real_leads import CSV, TRAPS, needs_real_leads

N, SINCE = 1200, datetime(2026, 1, 11, tzinfo=UTC)


def build_rows(order: FloatArray | None = None, seed: int = 0, n: int = N) -> TrainingRows:
    """Leads of which many are entered more than once: a source, here and there empty, and two numbers."""
    random = np.random.default_rng(seed)
    who, source = random.integers(0, n, n), random.integers(0, 4, n)
    visits, height = random.integers(0, 300, n)[who], random.normal(size=n)[who]
    outcome = (random.random(n) < 0.2 + visits / 600).astype(np.int64)
    columns = leads(
        source=column("text", *(None if level == 3 else f"source {level}" for level in source[who].tolist())),
        visits=column("number", *visits.astype(float).tolist()),
        height=column("number", *height.tolist()),
        reference=column("text", *(f"ref {number}" for number in range(n))),
    )  # fmt: skip
    return TrainingRows(columns, outcome, np.full(n, AS_OF), order)


def content(rows: TrainingRows) -> set[tuple[object, ...]]:
    """The distinct feature rows, without the reference that only numbers the leads."""
    columns = [rows.leads.columns[name] for name in rows.leads.columns if name != "reference"]
    cells = [np.where(one.present, one.values.astype(object), None).tolist() for one in columns]
    return set(zip(*cells, strict=True))


def check_folds(rows: TrainingRows, folds: list[Fold]) -> None:
    for fold in folds:
        assert not set(fold.train.tolist()) & set(fold.test.tolist())
        assert not content(rows.take(fold.train)) & content(rows.take(fold.test))
        for part in fold:
            assert 0 < rows.outcome[part].mean() < 1


def test_identical_rows_never_sit_on_both_sides() -> None:
    for order in (None, np.random.default_rng(1).permutation(N).astype(float)):
        rows = build_rows(order)
        learnt, measured = split_rows(rows, seed=2)
        assert not content(learnt) & content(measured)
        assert learnt.leads.n == (N - measured.leads.n if order is None else N - N // 5)
        for seed in (2, 3):
            check_folds(rows, build_folds(rows, seed))


def test_without_an_order_every_row_is_measured_once_and_both_classes_spread_evenly() -> None:
    rows = build_rows()
    learnt, measured = split_rows(rows, seed=0)
    assert measured.leads.n == pytest.approx(N / 5, abs=10)
    assert measured.outcome.mean() == pytest.approx(learnt.outcome.mean(), abs=0.02)
    drawn = [build_folds(rows, seed) for seed in (0, 1)]
    for folds in drawn:
        assert len(folds) == 5
        assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(N))
        for fold in folds:
            assert rows.outcome[fold.test].mean() == pytest.approx(rows.outcome.mean(), abs=0.03)
    assert drawn[0][0].test.tolist() != drawn[1][0].test.tolist()


def test_the_seed_alone_decides_what_is_drawn() -> None:
    rows = build_rows()
    drawn = [split_rows(rows, seed)[1].leads.columns["reference"].values.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_in_order_no_row_is_learnt_from_that_is_later_than_one_measured_on() -> None:
    order = np.random.default_rng(3).permutation(N).astype(float)
    rows = build_rows(order)
    learnt, measured = split_rows(rows, seed=0)
    assert measured.order is not None
    assert learnt.order is not None
    assert sorted(learnt.order.tolist()) == list(range(N - N // 5))
    last_fifth = content(rows.take(order >= N - N // 5))
    assert content(measured) == last_fifth - content(learnt) < last_fifth, (
        "what repeats an earlier one is left out"
    )
    folds = build_folds(rows, seed=0)
    assert len(folds) == 5
    check_folds(rows, folds)
    for fold in folds:
        assert order[fold.train].max() < order[fold.test].min()
    assert [len(fold.train) for fold in folds] == [400, 560, 720, 880, 1040]


def test_a_block_without_both_classes_is_joined_with_the_next() -> None:
    rows = build_rows(np.arange(N, dtype=float))
    outcome = rows.outcome.copy()
    outcome[560:720] = 0
    rows = replace(rows, outcome=outcome)
    folds = build_folds(rows, seed=0)
    assert [len(fold.train) for fold in folds] == [400, 560, 880, 1040]
    check_folds(rows, folds)


def test_a_last_fifth_of_one_class_is_refused_with_what_to_do() -> None:
    rows = build_rows(np.arange(N, dtype=float))
    outcome = rows.outcome.copy()
    outcome[-300:] = 0
    with pytest.raises(
        TrainingError, match=r"most recent fifth .* holds \d+ leads, and not both .*--order-by"
    ):
        split_rows(replace(rows, outcome=outcome), seed=0)


def test_where_nearly_every_late_lead_repeats_an_earlier_one_the_test_part_is_drawn() -> None:
    rows = build_rows(np.arange(N, dtype=float))
    again = column("number", *(np.arange(N) % (N - N // 5)).astype(float).tolist())
    rows = replace(rows, leads=leads(visits=again))
    learnt, measured = split_rows(rows, seed=0)
    assert learnt.order is None
    assert measured.order is None
    assert measured.leads.n == pytest.approx(N / 5, abs=15)
    assert not content(learnt) & content(measured)


@pytest.mark.parametrize("order", [None, np.arange(N, dtype=float)], ids=["drawn", "in order"])
def test_leads_that_few_columns_tell_apart_are_learnt_from_and_tested_on_whatever_they_are_like(
    order: FloatArray | None,
) -> None:
    """With five cities and nothing else, one whole city would be held out, and none would be learnt."""
    rows = build_rows(order)
    cities = column("text", *(f"city {number % 5}" for number in range(N)))
    rows = replace(rows, leads=leads(city=cities, reference=rows.leads.columns["reference"]))
    learnt, measured = split_rows(rows, seed=0)
    assert measured.leads.n == pytest.approx(N // 5, abs=1)
    assert (measured.order is None) is (order is None)
    folds = [(learnt.take(fold.train), learnt.take(fold.test)) for fold in build_folds(learnt, seed=0)]
    assert len(folds) == 5
    for known, stranger in ((learnt, measured), *folds):
        assert len(content(known)) == len(content(stranger)) == 5


def build_common(*, related: bool) -> TrainingRows:
    """Leads, the earliest first, of whom most equal some others by chance: the more common, the colder.

    With `related` columns the city says the country, and that the currency.
    """
    random, n = np.random.default_rng(0), 5000
    city, source = (
        random.choice(levels, n, p=1 / np.arange(1, levels + 1) / np.sum(1 / np.arange(1, levels + 1)))
        for levels in (20, 8)
    )
    visits, opened = random.geometric(0.35, n) - 1.0, random.geometric(0.5, n) - 1.0
    outcome = (random.random(n) < 1 / (1 + np.exp(2.2 - 0.35 * visits - 0.3 * opened))).astype(np.int64)
    columns = {
        "city": column("text", *(f"city {number}" for number in city.tolist())),
        "source": column("text", *(f"source {number}" for number in source.tolist())),
        "visits": column("number", *visits.tolist()),
        "opened": column("number", *opened.tolist()),
    }
    if related:
        for name in ("country", "currency"):
            columns[name] = column("text", *(f"{name} {number % 4}" for number in city.tolist()))
    return TrainingRows(leads(**columns), outcome, np.full(n, AS_OF), np.arange(n, dtype=float))


@pytest.mark.parametrize("related", [False, True])
def test_leads_that_chance_makes_equal_are_no_copies_and_are_tested_on(related: bool) -> None:
    """Without the common ones the latest leads would seem to apply more often than they do."""
    rows = build_common(related=related)
    learnt, measured = split_rows(rows, seed=0)
    latest = rows.outcome[learnt.leads.n :]
    assert measured.leads.n > 0.9 * len(latest)
    assert measured.outcome.mean() == pytest.approx(latest.mean(), abs=0.01)
    for fold in build_folds(learnt, seed=0):
        assert len(fold.test) > 0.9 * (fold.test.max() + 1 - len(fold.train))


@pytest.mark.parametrize("columns", [("height",), ("height", "city"), ("height", "city", "source")])
def test_copies_stay_together_where_one_column_tells_leads_apart(columns: tuple[str, ...]) -> None:
    who, common = np.repeat(np.arange(2500), 2), build_common(related=False)
    height = column("number", *np.random.default_rng(1).normal(size=5000).tolist())
    cells = {"height": height, **common.leads.columns}
    rows = replace(common, leads=leads(**{name: cells[name] for name in columns})).take(who)
    group = group_rows(rows)
    assert (group[::2] == group[1::2]).all()
    assert len(set(group.tolist())) == 2500


@pytest.mark.parametrize("order", [None, np.arange(N, dtype=float)])
def test_folds_that_would_hold_one_class_only_are_refused(order: FloatArray | None) -> None:
    rows = build_rows(order)
    with pytest.raises(TrainingError, match="outcomes are apart"):
        build_folds(replace(rows, outcome=(np.arange(N) >= N).astype(np.int64)), seed=0)


def test_rows_are_told_apart_by_every_column_that_may_become_a_feature_and_by_no_other() -> None:
    def groups(rows: TrainingRows) -> IntArray:
        return np.sort(np.bincount(group_rows(rows)))

    rows = build_rows()
    assert len(groups(rows)) == len(content(rows)) < N, "a reference of its own tells no two rows apart"
    alone = replace(rows, leads=leads(reference=rows.leads.columns["reference"]))
    assert groups(alone).tolist() == [1] * N


def test_a_large_group_does_not_change_how_often_the_leads_beside_it_apply() -> None:
    """Evening out the outcomes of the folds would fill the one that holds many lost leads with won ones."""
    random, n = np.random.default_rng(5), 4000
    visits = np.where(np.arange(n) < 600, -1.0, random.random(n))
    outcome = (random.random(n) < np.where(visits < 0, 0.05, 0.5)).astype(np.int64)
    rows = TrainingRows(leads(visits=column("number", *visits.tolist())), outcome, np.full(n, AS_OF))
    held_the_group = False
    for fold in (*build_folds(rows, seed=0), *build_folds(rows, seed=1)):
        others = fold.test[visits[fold.test] >= 0]
        held_the_group |= len(others) < len(fold.test)
        assert outcome[others].mean() == pytest.approx(outcome[visits >= 0].mean(), abs=0.005)
        assert len(fold.test) == pytest.approx(n / 5, abs=2)
    assert held_the_group


def build_snapshots(order: FloatArray | None, *, alike: bool = False) -> TrainingRows:
    """Six rows of each of 300 leads, whose visits grow by a number of their own; or that begin `alike`."""
    random = np.random.default_rng(7)
    lead, turn = np.repeat(np.arange(300), 6), np.tile(np.arange(6.0), 300)
    visits = turn * random.normal(size=300)[lead] + (0.0 if alike else random.normal(size=1800))
    columns = leads(
        visits=column("number", *visits.tolist()),
        height=column("number", *random.normal(size=300)[lead].tolist()),
        weight=column("number", *random.normal(size=300)[lead].tolist()),
        name=column("text", *(f"lead {number}" for number in lead.tolist())),
    )
    if alike:
        columns = leads(visits=columns.columns["visits"])
    return TrainingRows(columns, (random.random(300) < 0.3)[lead].astype(np.int64), np.full(1800, AS_OF),
                        order, random.permutation(300)[lead])  # fmt: skip


@pytest.mark.parametrize("alike", [False, True], ids=["apart", "alike at first"])
@pytest.mark.parametrize(
    "order", [None, np.arange(1800.0), np.tile(np.arange(6.0), 300)], ids=["drawn", "in turn", "at once"]
)
def test_the_rows_of_one_lead_never_sit_on_both_sides(order: FloatArray | None, alike: bool) -> None:
    rows = build_snapshots(order, alike=alike)
    learnt, measured = split_rows(rows, seed=0)
    assert measured.lead is not None
    assert 50 <= measured.leads.n == len(set(measured.lead.tolist())) <= 70, "a fifth, one row of each"
    folds = [(learnt.take(fold.train), learnt.take(fold.test)) for fold in build_folds(learnt, seed=0)]
    assert len(folds) == 5
    for known, stranger in ((learnt, measured), *folds):
        assert known.lead is not None
        assert stranger.lead is not None
        assert not set(known.lead.tolist()) & set(stranger.lead.tolist())
        assert len(set(stranger.lead.tolist())) == stranger.leads.n, "rows of a lead are no further evidence"


def test_rows_equal_to_one_of_another_lead_keep_both_leads_together() -> None:
    rows = build_snapshots(None)
    for cells in rows.leads.columns.values():
        cells.values[6] = cells.values[0]
    group = group_rows(rows)
    assert set(group[:12].tolist()) == {group[0]}
    assert len(set(group.tolist())) == 299


def test_leads_that_all_hang_together_by_equal_rows_are_parted_all_the_same() -> None:
    rows = build_snapshots(None, alike=True)
    assert len(np.unique(rows.leads.columns["visits"].values[::6])) == 1
    assert np.bincount(group_rows(rows)).tolist() == [6] * 300


def test_many_equal_rows_stay_together_though_a_lead_has_two() -> None:
    visits = np.where(np.arange(N) < 400, -1.0, np.arange(N))
    rows = replace(build_rows(), leads=leads(visits=column("number", *visits.tolist())))
    group = group_rows(replace(rows, lead=np.append(np.arange(N - 1), 0)))
    assert np.bincount(group).max() == 401, "more than a fold of rows are equal, and one is of the same lead"


def test_leads_of_one_row_each_are_parted_as_if_nobody_had_numbered_them() -> None:
    for order in (None, np.arange(N, dtype=float)):
        rows = build_rows(order)
        numbered = replace(rows, lead=np.random.default_rng(0).permutation(N))
        assert group_rows(numbered).tolist() == group_rows(rows).tolist()
        assert numbered.take_one_a_lead() is numbered


def test_what_names_a_lead_is_no_feature_and_says_nothing_of_another_column(tmp_path: Path) -> None:
    rows = build_snapshots(None)
    columns = tuple(InputColumn(name, cells.kind) for name, cells in rows.leads.columns.items())
    build, dropped = choose_features(
        TrainingOptions(url="", model_dir=tmp_path, source="leads"), columns, rows
    )
    assert {spec.name for spec in build(rows).specs} == {"visits", "height", "weight"}
    assert list(dropped) == ["name"]


@pytest.fixture
def timed(database_url: str, tmp_path: Path) -> Callable[..., TrainingOptions]:
    """Options for `timed`: 600 leads, one an hour from 1 January 2026, numbered downwards."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            """
            CREATE TABLE timed AS SELECT md5(i::text)::uuid AS lead_id, 600 - i AS countdown,
                timestamptz '2026-01-01 00:00Z' + i * interval '1 hour' AS created_at,
                CASE WHEN i > 3 THEN timestamptz '2026-01-01 00:00Z' + i * interval '1 hour' END AS seen_at,
                (sin(i * i) > 0.3)::int AS won, sin(i * i) + 2 * cos(i) AS signal
            FROM generate_series(0, 599) i;
            CREATE VIEW timeless AS SELECT lead_id, countdown, seen_at, won, signal FROM timed
            """
        )

    def options(**changes: object) -> TrainingOptions:
        given = TrainingOptions(url=database_url, model_dir=tmp_path, source="timed", label="won",
                                exclude=("seen_at",), model="logistic_regression")  # fmt: skip
        return replace(given, **changes)

    return options


def read(options: TrainingOptions) -> TrainingRows:
    return fetch_rows(options, choose_columns(options)[0], lambda *_: None)[0]


def test_leads_come_in_the_order_of_their_times_or_of_the_column_named(
    timed: Callable[..., TrainingOptions],
) -> None:
    by_time, by_column = read(timed()), read(timed(order_by="countdown"))
    assert by_time.order is not None
    assert by_column.order is not None
    assert sorted(by_column.order.tolist()) == list(range(1, 601))
    assert np.argsort(by_time.order).tolist() == np.argsort(-by_column.order).tolist()
    assert by_time.order.tolist() == by_column.leads.columns["created_at"].values.tolist()
    assert set(by_column.leads.columns) == {"created_at", "signal"}
    assert set(by_time.leads.columns) == {"countdown", "signal"}, "the order of leads is no feature of theirs"
    assert read(timed(source="timeless")).order is None


def test_leads_entered_several_times_are_found_though_each_has_a_time_of_its_own(
    database_url: str, tmp_path: Path
) -> None:
    """Two numbers that say nothing of the outcome; with the time as a feature no two leads would be equal."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            """
            CREATE TABLE entered AS SELECT gen_random_uuid() AS lead_id, sin(i) AS a, i * i % 23 AS b,
                (sin(i * i * i) > 0.5)::int AS won, timestamptz '2025-01-01Z'
                    + (i * 7919 + n * 104729) % 500000 * interval '1 minute' AS created_at
            FROM generate_series(1, 900) i, generate_series(0, i % 2) n
            """
        )
    options = TrainingOptions(url=database_url, model_dir=tmp_path, source="entered", label="won",
                              model="random_forest")  # fmt: skip
    manifest = train(options).manifest
    assert {spec["name"] for spec in manifest.feature_set} == {"a", "b"}
    assert manifest.report["repeated"] > 100, "of a fifth of 1,350"
    low, high = manifest.report["intervals"]["roc_auc"]
    assert low < 0.5 < high


def test_leads_of_a_time_after_the_as_of_time_are_left_out_and_counted(
    timed: Callable[..., TrainingOptions],
) -> None:
    options = timed(as_of=SINCE)
    rows, everyone, left_out = fetch_rows(options, choose_columns(options)[0], lambda *_: None)
    assert rows.order is not None
    assert rows.order.max() == SINCE.timestamp()
    assert (rows.leads.n, everyone.leads.n, left_out.later) == (241, 241, 359)
    assert read(timed(as_of=SINCE, order_by="created_at")).leads.n == 241
    assert read(timed(as_of=SINCE, source="timeless")).leads.n == 600, "nobody knows when these came"
    with pytest.raises(TrainingError, match="no leads up to 2025-12-31"):
        read(timed(as_of=datetime(2025, 12, 31, tzinfo=UTC)))
    manifest = train(options).manifest
    assert manifest.report["later"] == 359
    assert dict(describe_data(manifest))["left out, later than the moment named"] == "359 leads"


def test_since_leaves_earlier_leads_out(timed: Callable[..., TrainingOptions]) -> None:
    rows = read(timed(since=SINCE))
    assert rows.leads.n == 600 - 240
    assert rows.order is not None
    assert rows.order.min() == SINCE.timestamp()
    with pytest.raises(TrainingError, match="no leads since 2026-06-01"):
        read(timed(since=datetime(2026, 6, 1, tzinfo=UTC)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "timeless", "since": SINCE}, "2026-01-11 needs the time .*--order-by"),
        ({"order_by": "countdown", "since": SINCE}, "needs the time of each lead"),
        ({"order_by": "seen_at"}, "seen_at is empty or not finite for some leads"),
        ({"order_by": "seen_at", "since": SINCE}, "seen_at is empty for some leads"),
        ({"order_by": "countdwn"}, "no column countdwn .*did you mean countdown"),
        ({"order_by": "lead_id"}, "no column lead_id"),
    ],
)  # fmt: skip
def test_an_order_or_a_time_that_is_not_there_is_named(
    timed: Callable[..., TrainingOptions], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        read(timed(**changes))


def test_the_command_tests_on_the_most_recent_leads_and_says_so(
    timed: Callable[..., TrainingOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = timed()
    monkeypatch.setenv("DATABASE_URL", options.url)
    monkeypatch.setenv("ML_MODEL_DIR", str(options.model_dir))
    asked = ["train", "--source", "timed", "--label", "won", "--exclude", "seen_at", "--since", "2026-01-06",
             "--order-by", "created_at", "--model", "logistic_regression"]  # fmt: skip
    result = CliRunner().invoke(cli, asked, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "384 to fit, 256 of them to calibrate, 96 to test, the most recent ones" in result.output
    assert "no lead from before" in result.output


def test_the_manifest_says_how_the_test_part_was_chosen(timed: Callable[..., TrainingOptions]) -> None:
    drawn = train(timed(source="timeless")).manifest
    assert drawn.report["split"] == "random"
    assert "drawn at random" in dict(describe_data(drawn))["leads"]
    earlier = datetime(2026, 2, 1, tzinfo=UTC)
    ordered = train(timed(source="timeless", order_by="countdown", now=earlier)).manifest
    assert ordered.report["split"] == "time"
    assert {spec["name"] for spec in ordered.feature_set} == {"signal"}


def test_the_manifest_tells_what_was_learnt_from_and_calibrated_on_from_what_was_tested_on(
    timed: Callable[..., TrainingOptions],
) -> None:
    with psycopg.connect(timed().url) as connection:
        connection.execute(
            # Every other one of the last hundred equals the 300th.
            "CREATE VIEW repeating AS SELECT lead_id, won, created_at AS as_of, CASE"
            " WHEN countdown <= 100 AND countdown % 2 = 1"
            " THEN (SELECT signal FROM timed WHERE countdown = 300) ELSE signal END AS signal FROM timed"
        )
    manifest = train(timed(source="repeating", exclude=())).manifest
    training = manifest.training
    assert (training.train_rows, training.test_rows, manifest.report["repeated"]) == (480, 70, 50)
    assert (training.as_of_from, training.as_of_to) == ("2026-01-01T00:00:00Z", "2026-01-20T23:00:00Z")
    assert manifest.report["tested"] == ["2026-01-21T00:00:00Z", "2026-01-25T22:00:00Z"]
    assert training.calibrate_rows == 320
    told = dict(describe_data(manifest))
    assert told["leads"].startswith("480 to fit, 320 of them to calibrate, 70 to test")
    assert told["left out as repeats of other leads"] == "50 leads"
    window = "learnt from 2026-01-01T00:00:00Z to 2026-01-20T23:00:00Z, tested on 2026-01-21T00:00:00Z to"
    assert told["as-of times"].startswith(window)
    (overlap,) = evaluate_model(
        timed(source="repeating"), ModelRegistry(ModelCatalogue(timed().model_dir)).load(),
        ScoringPolicy(0.6, "margin"), lambda *_: None,
    ).warnings  # fmt: skip
    assert overlap.startswith("480 of 600 leads are of the time model")


def test_rows_of_a_source_of_past_moments_carry_the_number_of_their_lead(
    timed: Callable[..., TrainingOptions],
) -> None:
    with psycopg.connect(timed().url) as connection:
        connection.execute(
            "CREATE VIEW moments AS SELECT t.lead_id, t.won, t.signal + n * sin(t.countdown) AS signal,"
            " t.created_at + n * interval '1 day' AS as_of, t.countdown AS of_lead"
            " FROM timed t, generate_series(1, 4) n"
        )
    rows = read(timed(source="moments", exclude=()))
    assert rows.lead is not None
    of_lead = rows.leads.columns["of_lead"].values
    numbers = set(zip(rows.lead.tolist(), of_lead.tolist(), strict=True))
    assert len(numbers) == len(set(rows.lead.tolist())) == len(set(of_lead.tolist())) == 600
    assert rows.take_one_a_lead().leads.n == 600
    options = timed(source="moments", exclude=())
    manifest = train(options).manifest
    assert {spec["name"] for spec in manifest.feature_set} == {"signal"}, "the number of a lead is no feature"
    bundle = ModelRegistry(ModelCatalogue(options.model_dir)).load()
    assert evaluate_model(options, bundle, ScoringPolicy(0.6, "margin"), lambda *_: None).leads == 600


@needs_real_leads
@pytest.mark.parametrize("order_by", [None, "lead_number"])
def test_identical_real_leads_never_sit_on_both_sides(
    create_database: Callable[..., str], tmp_path: Path, order_by: str | None
) -> None:
    url = create_database(f"splits_real_{order_by}")
    import_csv(
        url, CSV, table="leads", id_column="Prospect ID", label_column="Converted", missing=("Select",)
    )
    excluded = TRAPS if order_by else (*TRAPS, "lead_number")
    rows = read(TrainingOptions(url=url, model_dir=tmp_path, source="leads", label="converted",
                                exclude=excluded, order_by=order_by))  # fmt: skip
    learnt, measured = split_rows(rows, seed=0)
    assert len(content(rows)) == 7250
    assert not content(learnt) & content(measured)
    assert (
        measured.leads.n == pytest.approx(1848, abs=1) if order_by is None else 1500 < measured.leads.n < 1848
    )
    check_folds(rows, build_folds(rows, seed=0))
