"""The table of Venn-Abers pairs against isotonic fits with the added point, one by one."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from app.ai.domain import FloatArray, IntArray
from app.ai.venn_abers import VennAbersTable, build_intervals, build_table, look_up, merge

Sample = list[tuple[int, int]]
samples = st.lists(st.tuples(st.integers(-12, 12), st.integers(0, 1)), min_size=1, max_size=40)


def fit_directly(scores: FloatArray, outcome: IntArray, score: float, added: int) -> float:
    """The isotonic fit on the sample with (score, added) in it, at that score."""
    fit = IsotonicRegression().fit(np.append(scores, score), np.append(outcome, added))
    return float(fit.predict([score])[0])


def assert_table_is_direct(scores: FloatArray, outcome: IntArray, asked: FloatArray) -> None:
    p0, p1 = look_up(build_table(scores, outcome), asked)
    for place, score in enumerate(asked):
        assert abs(p0[place] - fit_directly(scores, outcome, score, 0)) <= 1e-12
        assert abs(p1[place] - fit_directly(scores, outcome, score, 1)) <= 1e-12


@settings(max_examples=200, deadline=None)
@given(samples)
def test_the_table_equals_direct_fits_at_between_and_beyond_the_scores(sample: Sample) -> None:
    scores = np.array([score / 8 for score, _ in sample])
    outcome = np.array([happened for _, happened in sample])
    met = np.unique(scores)
    asked = np.concatenate([met, met - 1 / 16, met + 1 / 16, [-1e6, 1e6]])
    assert_table_is_direct(scores, outcome, asked)


@pytest.mark.parametrize("seed", range(3))
def test_the_table_equals_direct_fits_on_scores_that_mean_something(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.beta(1.0, 3.0, 2000)
    outcome = (random.random(2000) < truth).astype(np.int64)
    scores = np.round(truth + random.normal(0, 0.1, 2000), 3 if seed else 12)
    assert_table_is_direct(scores, outcome, np.concatenate([scores[:40], random.normal(0.3, 0.4, 40)]))


def test_equal_scores_are_one_step_whatever_the_order_of_their_rows() -> None:
    scores, outcome = np.array([0.5, 0.5, 0.2, 0.5, 0.2]), np.array([1, 0, 1, 1, 0])
    one, other = build_table(scores, outcome), build_table(scores[::-1], outcome[::-1])
    assert one.to_json() == other.to_json()


def test_ten_thousand_scores_take_a_second_at_most_and_far_fewer_pieces() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=10_000)
    outcome = (random.random(10_000) < 1 / (1 + np.exp(-scores))).astype(np.int64)
    started = time.perf_counter()
    table = build_table(scores, outcome)
    assert time.perf_counter() - started < 1
    assert len(table.scores) < 5000


def test_a_score_alone_and_in_a_batch_gets_the_same_pair() -> None:
    random = np.random.default_rng(1)
    table = build_table(random.normal(size=300).round(1), random.integers(0, 2, 300))
    asked = np.append(random.normal(size=333).round(1), [np.nan, np.inf, -np.inf, 0.0, -0.0])
    p0, p1 = look_up(table, asked)
    alone = [look_up(table, asked[[place]]) for place in range(len(asked))]
    assert [(a.item(), b.item()) for a, b in alone] == list(zip(p0.tolist(), p1.tolist(), strict=True))


def test_a_score_that_is_not_a_number_is_the_lowest_there_is() -> None:
    table = build_table([0.1, 0.2, 0.3], [0, 1, 1])
    p0, p1 = look_up(table, np.array([np.nan, -np.inf]))
    assert (p0[0], p1[0]) == (p0[1], p1[1])
    assert p0[0] == 0


@given(samples)
def test_the_merged_probability_lies_between_the_pair(sample: Sample) -> None:
    table = build_table([score for score, _ in sample], [happened for _, happened in sample])
    p0, p1 = look_up(table, np.arange(-14.0, 15.0, 0.5))
    merged = merge(p0, p1)
    assert np.all((p0 - 1e-15 <= merged) & (merged <= p1 + 1e-15))
    assert np.all(p0 <= p1)


@given(samples, st.lists(st.floats(), max_size=20), st.floats(0, 1), st.floats(0, 1), st.data())
def test_an_interval_of_any_score_keeps_to_the_bounds_and_holds_what_is_shown(
    sample: Sample, raw: list[float], one: float, other: float, data: st.DataObject
) -> None:
    table = build_table([score for score, _ in sample], [happened for _, happened in sample])
    bounds = min(one, other), max(one, other)
    shown = np.array([data.draw(st.floats(*bounds)) for _ in raw])
    unknown = np.array([data.draw(st.booleans()) for _ in raw], np.bool_)
    ends = build_intervals(table, np.array(raw), shown, unknown=unknown, bounds=bounds)
    low, high = ends.T
    assert ends.shape == (len(raw), 2)
    assert np.all((bounds[0] <= low) & (low <= shown) & (shown <= high) & (high <= bounds[1]))
    assert np.all(ends[unknown] == bounds)
    without = build_intervals(None, np.array(raw), shown, unknown=unknown, bounds=bounds)
    assert np.all(without == bounds)


@given(samples)
def test_a_table_survives_json(sample: Sample) -> None:
    table = build_table([score for score, _ in sample], [happened for _, happened in sample])
    assert VennAbersTable.from_json(table.to_json()).to_json() == table.to_json()


@pytest.mark.parametrize(
    "data",
    [
        {"scores": [], "p0": [0.0]},
        {"scores": [], "p0": [0.0], "p1": [1.0], "p2": [1.0]},
        {"scores": [0.5], "p0": [0.0], "p1": [1.0]},
        {"scores": [[0.5]], "p0": [0.0, 1.0], "p1": [1.0, 1.0]},
        {"scores": [0.5, 0.5], "p0": [0.0, 0.1, 0.2], "p1": [0.5, 0.6, 0.7]},
        {"scores": [float("nan")], "p0": [0.0, 0.1], "p1": [0.5, 0.6]},
        {"scores": [0.5], "p0": [0.1, 0.0], "p1": [0.5, 0.6]},
        {"scores": [0.5], "p0": [0.0, 0.1], "p1": [0.5, 1.1]},
        {"scores": [0.5], "p0": [0.0, float("nan")], "p1": [0.5, 1.0]},
        {"scores": [0.5], "p0": [0.0, 0.6], "p1": [0.5, 1.0]},
        {"scores": ["x"], "p0": [0.0, 0.1], "p1": [0.5, 1.0]},
    ],
)
def test_a_table_that_is_not_one_is_refused(data: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        VennAbersTable.from_json(data)


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [([], []), ([0.1], [0, 1]), ([float("inf")], [1]), ([float("nan")], [1]), ([0.1], [2])],
)
def test_a_sample_that_is_not_one_is_refused(scores: list[float], outcome: list[int]) -> None:
    with pytest.raises(ValueError, match="needs"):
        build_table(scores, outcome)
