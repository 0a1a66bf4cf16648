"""Text columns as a feature for each level: what is built of them, and that a column still counts once."""

from typing import Any

import numpy as np
import pytest

from app.ai.domain import InputColumn, IntArray, LeadColumns
from app.ai.feature_safety import build_statistics, check_features
from app.ai.features import CellState, FeatureSet, build_features
from app.training.candidates import CANDIDATES
from app.training.derive import MAX_ONE_HOT, derive_features
from app.training.fit import FittedCandidate
from app.training.model_metrics import measure_importance
from app.training.verdict import build_weights
from tests.fakes import build_columns

N = 1200
AS_OF = np.full(N, 1_767_225_600.0)
COLUMNS = (InputColumn("town", "text"), InputColumn("gpa", "number"))


def build_leads(towns: list[Any]) -> LeadColumns:
    numbers = np.random.default_rng(0).normal(size=len(towns))
    return build_columns(
        [{"town": town, "gpa": float(gpa)} for town, gpa in zip(towns, numbers, strict=True)], COLUMNS
    )


def draw_towns(count: int) -> list[Any]:
    return [None if index % 7 == 0 else f"Town {index % count}" for index in range(N)]


def derive(towns: list[Any], outcome: IntArray | None = None) -> tuple[FeatureSet, LeadColumns]:
    leads = build_leads(towns)
    won = np.arange(N) % 2 if outcome is None else outcome
    return derive_features(leads, won, AS_OF, COLUMNS).feature_set, leads


def test_each_level_is_a_feature_of_its_own_and_any_other_text_is_one_more() -> None:
    features, leads = derive(draw_towns(3))
    assert features.names == ("town", "town=town 1", "town=town 2", "town=town 0", "town__present", "gpa")
    new = build_leads([" TOWN 1 ", "town 0", "nowhere", None])
    matrix = build_features(new, features, 0.0)
    statistics = build_statistics(build_features(leads, features, AS_OF))
    checked = check_features(matrix, features, statistics)
    assert checked.values[:, :5].tolist() == [
        [0, 1, 0, 0, 1],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1],  # the training has met no other text, so it is bounded to none of the levels
        [0, 0, 0, 0, 0],
    ]
    assert matrix.values[2, 0] == 1
    assert matrix.states[:, 0].tolist() == [
        *(CellState.PRESENT, CellState.PRESENT, CellState.UNSEEN, CellState.MISSING)
    ]
    assert checked.out_of_range.tolist() == [0, 0, 0, 0]


def test_rare_texts_are_met_in_training_together() -> None:
    towns = [f"hamlet {index}" if index % 40 == 0 else "town" for index in range(N)]
    features, leads = derive(towns)
    assert features.names == ("town", "town=town", "gpa")
    values = build_features(leads, features, AS_OF).values
    assert values[:, 0].tolist() == [float(town != "town") for town in towns]


def test_a_column_of_many_levels_is_one_number() -> None:
    assert len(derive(draw_towns(MAX_ONE_HOT))[0].specs) == MAX_ONE_HOT + 3
    features, _ = derive(draw_towns(MAX_ONE_HOT + 1))
    assert features.names == ("town", "gpa")
    assert features.specs[0].transform == "level"


def test_a_column_counts_once_however_many_levels_it_has() -> None:
    features, leads = derive(draw_towns(9))
    statistics = build_statistics(build_features(leads, features, AS_OF))
    new = build_columns(
        [{"town": town, "gpa": gpa} for town in (None, "town 1") for gpa in (None, 2.0)], COLUMNS
    )
    checked = check_features(build_features(new, features, 0.0), features, statistics)
    assert checked.coverage.tolist() == checked.weighted_coverage.tolist() == [0.0, 0.5, 0.5, 1.0]


def test_a_columns_weight_is_lost_with_the_column_and_with_an_unseen_text_and_only_once() -> None:
    features, leads = derive(draw_towns(9))
    weights = build_weights({"town": 0.09, "gpa": 0.01}, features)
    assert sum(weights) == pytest.approx(1)
    statistics = build_statistics(build_features(leads, features, AS_OF))
    new = build_columns([{"town": town, "gpa": 0.1} for town in ("town 3", "nowhere", None)], COLUMNS)
    checked = check_features(build_features(new, features, 0.0), features, statistics, weights)
    assert checked.weighted_coverage == pytest.approx([1.0, 0.25, 0.25])


def test_a_column_is_shuffled_as_a_whole() -> None:
    towns = draw_towns(8)
    outcome = np.array([town in {"Town 1", "Town 3", "Town 5"} for town in towns], np.int64)
    features, leads = derive(towns, outcome)
    matrix = build_features(leads, features, AS_OF)
    known = [features.names.index(f"town=town {number}") for number in (1, 3, 5)]
    fitted = FittedCandidate(
        None, features, build_statistics(matrix), lambda values: values[:, known].sum(axis=1), CANDIDATES[0]
    )
    importance = measure_importance(fitted, matrix, outcome, seed=0)
    assert set(importance) == {"town", "gpa"}
    # One level alone would leave two thirds of the positives in place; all together leave nothing to go by.
    assert importance["town"] > 0.45
    assert importance["gpa"] == 0
