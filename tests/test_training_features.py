"""What training makes of columns: levels, derived and declared features, and the leakage guard."""

import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from app.ai.domain import ColumnKind, InputColumn, LeadColumns
from app.ai.features import build_features
from app.errors import TrainingError
from app.training.declared import DECLARED_COLUMNS, build_declared_features
from app.training.derive import derive_features
from app.training.leakage import check_leakage, is_denied, measure_separation
from app.training.levels import learn_levels
from app.training.repeats import distinct_codes
from tests.fakes import build_columns

N = 400
AS_OF = np.full(N, 1_767_225_600.0)
DAY = 86_400.0
OUTCOME = (np.arange(N) % 4 == 0).astype(np.int64)


def build_leads(values: Sequence[object], kind: ColumnKind) -> tuple[LeadColumns, list[InputColumn]]:
    column = InputColumn("it", kind)
    return build_columns([{"it": value} for value in values], [column]), [column]


def derive(values: Sequence[object], kind: ColumnKind) -> dict[str, str]:
    """Returns transform by feature name for a lone column beside one that is always usable."""
    columns = [InputColumn("it", kind), InputColumn("gpa", "number")]
    rng = np.random.default_rng(0)
    rows = [
        {"it": value, "gpa": float(number)} for value, number in zip(values, rng.normal(size=N), strict=True)
    ]
    derived = derive_features(build_columns(rows, columns), OUTCOME, AS_OF, columns)
    return {spec.name: spec.transform for spec in derived.feature_set.specs if spec.name != "gpa"} | (
        {"dropped": derived.dropped["it"]} if "it" in derived.dropped else {}
    )


def every(period: int, value: object, other: object) -> list[object]:
    return [value if index % period == 0 else other for index in range(N)]


def test_a_level_is_the_smoothed_log_odds_of_its_training_rows() -> None:
    texts = ["Fair"] * 100 + [" fair "] * 100 + ["Web"] * 200
    outcome = np.array([1] * 50 + [0] * 150 + [0] * 200)
    leads, _ = build_leads(texts, "text")
    params = learn_levels(leads.columns["it"], outcome)
    rate = (50 + 10 * 0.125) / 210
    assert set(params["levels"]) == {"fair", "web"}
    assert params["levels"]["fair"] == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)
    assert params["levels"]["web"] < params["unseen"] < params["levels"]["fair"]
    assert "missing" not in params


def test_rare_levels_are_pooled_and_never_named() -> None:
    texts = ["common"] * 380 + [f"Anna Bell {index}" for index in range(15)] + [None] * 5
    outcome = np.array([0] * 380 + [1] * 15 + [0] * 5)
    leads, _ = build_leads(texts, "text")
    params = learn_levels(leads.columns["it"], outcome)
    assert list(params["levels"]) == ["common"]
    assert params["unseen"] > 0 > params["missing"]
    assert "anna" not in str(params).casefold()


@pytest.mark.parametrize("outcome", [np.zeros(N, np.int64), np.ones(N, np.int64)])
def test_levels_stay_finite_when_only_one_class_is_there(outcome: np.ndarray) -> None:
    leads, _ = build_leads(every(2, "a", "b"), "text")
    params = learn_levels(leads.columns["it"], outcome)
    assert all(map(math.isfinite, [*params["levels"].values(), params["unseen"]]))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([float(value) for value in np.random.default_rng(1).normal(size=N)], "number", {"it": "value"}),
        ([float(value) for value in np.random.default_rng(1).pareto(1.2, size=N)], "number", {"it": "log1p"}),
        (every(3, True, False), "boolean", {"it": "flag"}),
        (every(3, "a", "b"), "text", {"it": "level", "it=a": "one_of", "it=b": "one_of"}),
        (every(3, None, "b"), "text", {"it__present": "is_present"}),
        ([AS_OF[0] - index * DAY for index in range(N)], "timestamp", {"it": "age_days"}),
        ([AS_OF[0] + index * DAY for index in range(N)], "timestamp", {"it": "days_until"}),
        (every(3, None, 2.5), "number", {"it__present": "is_present"}),
        (
            [None if index % 3 == 0 else index / 7 for index in range(N)],
            "number",
            {"it": "value", "it__present": "is_present"},
        ),
    ],
)
def test_each_kind_of_column_gets_its_features(
    values: Sequence[object], kind: ColumnKind, expected: dict[str, str]
) -> None:
    assert derive(values, kind) == expected


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        (["same"] * N, "text", "constant"),
        ([None] * N, "number", "constant"),
        (every(100, True, False), "boolean", "the same in all but 4 rows"),
        ([f"lead {index}" for index in range(N)], "text", "identifier or free text"),
        ([f"name {index // 4}" for index in range(N)], "text", "no value occurs in 10 rows"),
        ([float(index * 7) for index in range(N)], "number", "looks like an identifier"),
    ],
)
def test_columns_that_teach_nothing_are_left_out_with_a_reason(
    values: Sequence[object], kind: ColumnKind, reason: str
) -> None:
    derived = derive(values, kind)
    assert reason in derived.pop("dropped")
    assert derived == {}


def test_derived_features_of_new_leads_survive_unseen_and_missing_text() -> None:
    leads, columns = build_leads(every(3, "a", "b"), "text")
    feature_set = derive_features(leads, OUTCOME, AS_OF, columns).feature_set
    new, _ = build_leads(["a", "zebra", None], "text")
    values = build_features(new, feature_set, AS_OF[:3]).values[:, 0]
    assert np.isfinite(values[:2]).all()
    assert values[0] != values[1]


def test_a_column_that_knows_the_outcome_stops_training_and_is_named() -> None:
    values = ["closed" if won else "open" for won in OUTCOME]
    leads, columns = build_leads(values, "text")
    with pytest.raises(TrainingError, match=r"it alone separates .* 1\.00 .*--exclude it.*--allow-leaky it"):
        check_leakage(leads, OUTCOME, AS_OF, columns, allowed=())
    assert [one.column for one in check_leakage(leads, OUTCOME, AS_OF, columns, allowed=("it",))] == ["it"]


def test_a_column_filled_only_after_the_outcome_is_caught_by_its_emptiness() -> None:
    leads, columns = build_leads([AS_OF[0] if won else None for won in OUTCOME], "timestamp")
    with pytest.raises(TrainingError, match="whether it is empty alone separates"):
        check_leakage(leads, OUTCOME, AS_OF, columns, allowed=())


def test_a_number_that_separates_in_its_middle_is_caught() -> None:
    rng = np.random.default_rng(3)
    values = np.where(OUTCOME == 1, rng.uniform(-1, 1, N), rng.choice([-3.0, 3.0], N) + rng.normal(0, 0.1, N))
    leads, columns = build_leads([float(value) for value in values], "number")
    with pytest.raises(TrainingError):
        check_leakage(leads, OUTCOME, AS_OF, columns, allowed=())


def test_a_telling_column_is_flagged_but_not_refused() -> None:
    rng = np.random.default_rng(4)
    leads, columns = build_leads(
        [float(won * 1.5 + noise) for won, noise in zip(OUTCOME, rng.normal(size=N), strict=True)], "number"
    )
    (flagged,) = check_leakage(leads, OUTCOME, AS_OF, columns, allowed=())
    assert 0.75 < flagged.auc < 0.90
    assert "it alone separates" in str(flagged)


def test_many_levels_do_not_look_like_a_leak_because_they_remember_each_row() -> None:
    leads, columns = build_leads([f"level {index}" for index in range(N)], "text")
    assert measure_separation("it", leads.columns["it"], OUTCOME, AS_OF).auc < 0.6
    assert check_leakage(leads, OUTCOME, AS_OF, columns, allowed=()) == ()


@pytest.mark.parametrize(
    "name", ["lifecycle_state", "Status", "conversion_probability", "lead_score", "converted"]
)
def test_a_column_that_is_written_because_of_the_outcome_is_denied(name: str) -> None:
    assert is_denied(name)


def test_the_declared_set_has_twenty_described_features_and_no_denied_column() -> None:
    rows = [{column.name: "1" if column.kind == "text" else None for column in DECLARED_COLUMNS}] * N
    feature_set = build_declared_features(build_columns(rows, DECLARED_COLUMNS), OUTCOME)
    assert len(feature_set.specs) == 20
    assert {column.name for column in feature_set.input_columns} == {
        column.name for column in DECLARED_COLUMNS
    }
    assert all(spec.description for spec in feature_set.specs)
    assert not [column.name for column in DECLARED_COLUMNS if is_denied(column.name)]


def test_a_declared_column_without_any_text_is_a_clear_refusal() -> None:
    rows = [{column.name: None for column in DECLARED_COLUMNS}] * N
    with pytest.raises(TrainingError, match="source: no row has a text"):
        build_declared_features(build_columns(rows, DECLARED_COLUMNS), OUTCOME)


def test_the_commonest_level_is_kept_however_small_the_data() -> None:
    leads, _ = build_leads(["a", "a", "b", None], "text")
    assert list(learn_levels(leads.columns["it"], np.array([1, 0, 0, 1]))["levels"]) == ["a"]


def test_one_long_text_takes_no_more_memory_than_it_has() -> None:
    texts = [None if index % 9 == 0 else f" Level {index % 500}" for index in range(5000)]
    texts[7] = "x" * 20_000
    cells = build_leads(texts, "text")[0].columns["it"]
    known = [text.strip().lower() for text in texts if text is not None]
    expected = np.zeros(len(texts), dtype=np.int64)
    expected[cells.present] = [sorted(set(known)).index(text) + 1 for text in known]
    outcome = (np.arange(len(texts)) % 3 == 0).astype(np.int64)
    tracemalloc.start()
    codes = distinct_codes(cells)
    measure_separation("it", cells, outcome, np.zeros(len(texts)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes.tolist() == expected.tolist()
    assert peak < 5e6


def dropped_beside(first: Sequence[object], second: Sequence[object], *kinds: ColumnKind) -> dict[str, str]:
    """Derives features of two columns; returns why any of them was left out."""
    columns = [InputColumn(name, kind) for name, kind in zip(("first", "second"), kinds, strict=True)]
    rows = [{"first": one, "second": two} for one, two in zip(first, second, strict=True)]
    derived = derive_features(build_columns(rows, columns), OUTCOME, AS_OF, columns)
    read = {column.name for column in derived.feature_set.input_columns}
    assert read == {"first", "second"} - set(derived.dropped)
    return derived.dropped


NOISE = [float(number) for number in np.random.default_rng(8).normal(size=N)]
LETTERS = [("a", "b", "c")[index % 7 % 3] for index in range(N)]


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        (NOISE, NOISE, ("number", "number")),
        (NOISE, [-3 * number + 1 for number in NOISE], ("number", "number")),
        (NOISE, [math.exp(number) for number in NOISE], ("number", "number")),
        (LETTERS, [f" {letter.upper()}" for letter in LETTERS], ("text", "text")),
        (LETTERS, [{"a": 20.0, "b": -1.0, "c": 3.5}[letter] for letter in LETTERS], ("text", "number")),
        (every(3, True, False), every(3, "yes", "no"), ("boolean", "text")),
        ([AS_OF[0] - abs(x) * DAY for x in NOISE], [abs(x) for x in NOISE], ("timestamp", "number")),
    ],
)
def test_a_column_that_repeats_another_is_left_out_and_said(
    first: Sequence[object], second: Sequence[object], kinds: tuple[ColumnKind, ColumnKind]
) -> None:
    assert dropped_beside(first, second, *kinds) == {"second": "says the same as first"}


def test_of_two_columns_that_say_the_same_the_fuller_one_is_kept() -> None:
    dropped = dropped_beside(every(3, None, "b"), every(3, "no", "yes"), "text", "text")
    assert dropped == {"first": "says the same as second"}


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        (NOISE, list(reversed(NOISE)), ("number", "number")),
        (NOISE, [abs(number) for number in NOISE], ("number", "number")),
        (LETTERS, ["z" if index == 5 else letter for index, letter in enumerate(LETTERS)], ("text", "text")),
        (NOISE, [None if index % 20 == 0 else x for index, x in enumerate(NOISE)], ("number", "number")),
    ],
)
def test_columns_that_differ_anywhere_both_stay(
    first: Sequence[object], second: Sequence[object], kinds: tuple[ColumnKind, ColumnKind]
) -> None:
    assert dropped_beside(first, second, *kinds) == {}
