"""Calibration: numbers that stay in their bounds, keep the ranking, and never depend on the batch."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from app.ai.calibration import (
    Calibrator,
    calibrate,
    calibration_statistics,
    confidence,
    fit_isotonic,
    fit_sigmoid,
    shift_log_odds,
)
from app.ai.venn_abers import build_table, look_up, merge
from tests.builders import INF, NAN, ODD_FLOATS


def sample(rows: int, seed: int = 1, power: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores in [0, 1] whose true probability is score ** power, and their outcomes."""
    random = np.random.default_rng(seed)
    raw = random.random(rows)
    return raw, (random.random(rows) < raw**power).astype(np.int64)


CALIBRATORS = {
    "sigmoid": Calibrator("sigmoid", fit_sigmoid(*sample(2000))),
    "steep": Calibrator("sigmoid", {"slope": 1e150, "intercept": -1e150}),
    "level": Calibrator("sigmoid", {"slope": 0.0, "intercept": 0.3}),
    "spread": Calibrator("spread", {"steepness": 8.0, "centre": 0.3}, 0.02, 0.98),
    "isotonic": Calibrator("isotonic", fit_isotonic(*sample(2000)), 0.001, 0.999),
    "one point": Calibrator("isotonic", {"scores": [0.5], "probabilities": [0.25]}),
    "wide": Calibrator(
        "isotonic", {"scores": [-1e150, 5e-324, 1e-323, 1e150], "probabilities": [0.0, 0.1, 0.7, 1.0]}
    ),
    "venn-abers": Calibrator("venn_abers", build_table(*sample(500)).to_json(), 0.001, 0.999, 1e-6),
    "ties broken": Calibrator("isotonic", fit_isotonic(*sample(500)), 0.1, 0.8, 1e-6),
    "shifted sigmoid": Calibrator("sigmoid", fit_sigmoid(*sample(2000)), 0.01, 0.99, 0.0, -0.4),
    "shifted isotonic": Calibrator("isotonic", fit_isotonic(*sample(2000)), 0.001, 0.999, 1e-4, 0.7),
    "shifted far": Calibrator("venn_abers", build_table(*sample(500)).to_json(), 0.0, 1.0, 0.0, 20.0),
    "shifted none": Calibrator("none", {}, 0.0, 1.0, 0.0, -20.0),
    "none": Calibrator("none", {}, 0.01, 0.99),
    "unbounded": Calibrator("none", {}),
}  # fmt: skip
each_calibrator = pytest.mark.parametrize("calibrator", CALIBRATORS.values(), ids=CALIBRATORS)
any_float = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True) | st.sampled_from(ODD_FLOATS)
METHODS = ("max_probability", "margin", "entropy")


@each_calibrator
def test_two_thousand_scores_equal_the_same_scores_one_by_one_bit_for_bit(calibrator: Calibrator) -> None:
    raw = np.concatenate([np.random.default_rng(2).random(2000 - len(ODD_FLOATS)), ODD_FLOATS])
    batch = calibrate(raw, calibrator)
    alone = np.concatenate([calibrate(raw[row : row + 1], calibrator) for row in range(2000)])
    assert alone.tobytes() == batch.tobytes()
    for method in METHODS:
        sure = confidence(batch, method)
        one_by_one = np.concatenate([confidence(batch[row : row + 1], method) for row in range(2000)])
        assert one_by_one.tobytes() == sure.tobytes()


@each_calibrator
@settings(max_examples=200)
@given(st.lists(any_float, max_size=9))
def test_compiled_loops_and_numpy_give_the_same_bits(calibrator: Calibrator, odd: list[float]) -> None:
    points = np.array(calibrator.params.get("scores", []))
    beside = [np.nextafter(points, side) for side in (-INF, INF)]
    raw = np.concatenate([odd, ODD_FLOATS, points, *beside, np.random.default_rng(5).normal(0.4, 0.4, 50)])
    raw.flags.writeable = len(odd) % 2 == 0
    assert calibrate(raw, calibrator).tobytes() == calibrate(raw, calibrator, lambda: None).tobytes()


@each_calibrator
def test_neither_place_nor_alignment_nor_memory_layout_changes_a_bit(calibrator: Calibrator) -> None:
    raw = np.random.default_rng(3).normal(0.4, 0.3, 300)
    expected = calibrate(raw, calibrator)
    for start in range(9):
        for length in (1, 2, 3, 5, 8, 13, 31, 64, 200):
            part = slice(start, start + length)
            assert calibrate(raw[part], calibrator).tobytes() == expected[part].tobytes()
    assert calibrate(np.repeat(raw, 3)[::3], calibrator).tobytes() == expected.tobytes()
    assert calibrate(raw[::-1], calibrator)[::-1].tobytes() == expected.tobytes()


@each_calibrator
@settings(max_examples=150, deadline=None)
@given(scores=st.lists(any_float, min_size=1, max_size=20))
def test_any_floats_give_probabilities_in_the_bounds_that_keep_the_ranking(
    calibrator: Calibrator, scores: list[float]
) -> None:
    raw = np.array(scores)
    p = calibrate(raw, calibrator)
    assert np.isfinite(p).all()
    assert ((p >= calibrator.lower) & (p <= calibrator.upper)).all()
    assert not np.signbit(p).any()
    order = np.argsort(np.where(np.isnan(raw), -INF, raw))
    assert (np.diff(p[order]) >= 0).all()
    for method in METHODS:
        sure = confidence(p, method)
        assert ((sure >= 0) & (sure <= 1)).all()


@each_calibrator
def test_neighbouring_floats_are_never_ranked_the_wrong_way_round(calibrator: Calibrator) -> None:
    random = np.random.default_rng(4)
    starts = np.concatenate(
        [random.random(200), random.normal(0, 3, 50), calibrator.params.get("scores", [])]
    )
    for start in starts:
        raw = [start]
        for _ in range(50):
            raw.append(np.nextafter(raw[-1], INF))
        assert (np.diff(calibrate(np.array(raw), calibrator)) >= 0).all()


def test_rounding_never_lifts_a_score_over_the_point_above_it() -> None:
    random = np.random.default_rng(16)
    low, high = random.random(2000) / 100, random.random(2000) / 2 + 0.5
    lifted = low + (high - low) > high
    assert lifted.any()
    for pair in zip(low[lifted], high[lifted], strict=True):
        curve = Calibrator("isotonic", {"scores": [0.0, 1.0], "probabilities": list(pair)})
        assert calibrate(np.array([0.0, 1.0]), curve).tolist() == list(pair)


@each_calibrator
def test_a_score_that_is_not_a_number_ranks_no_lead_above_any_other(calibrator: Calibrator) -> None:
    nan, lowest = calibrate(np.array([NAN, -INF]), calibrator)
    assert nan == lowest


@each_calibrator
def test_no_scores_have_no_probabilities_and_the_input_is_left_as_it_was(calibrator: Calibrator) -> None:
    assert calibrate(np.array([]), calibrator).shape == (0,)
    raw = np.array(ODD_FLOATS)
    before = raw.copy()
    calibrate(raw, calibrator)
    np.testing.assert_array_equal(raw, before)


@each_calibrator
def test_a_calibrator_survives_json(calibrator: Calibrator) -> None:
    again = Calibrator.from_json(json.loads(json.dumps(calibrator.to_json())))
    assert again == calibrator


def test_none_is_the_score_itself_within_bounds() -> None:
    p = calibrate(np.array([0.5, 0.0, 1.0, -3.0, 7.0]), CALIBRATORS["none"])
    assert p.tolist() == [0.5, 0.01, 0.99, 0.01, 0.99]


def test_venn_abers_is_the_merged_pair_of_its_table_within_bounds() -> None:
    table = build_table(*sample(300))
    raw = np.random.default_rng(2).random(1000)
    expected = np.clip(merge(*look_up(table, raw)), 0.05, 0.95)
    assert np.array_equal(calibrate(raw, Calibrator("venn_abers", table.to_json(), 0.05, 0.95)), expected)


@pytest.mark.parametrize("method", ["isotonic", "venn_abers", "sigmoid", "none"])
def test_broken_ties_leave_the_ranking_as_it_was(method: str) -> None:
    raw, outcome = sample(1000)
    params = {
        "isotonic": fit_isotonic(raw, outcome),
        "venn_abers": build_table(raw, outcome).to_json(),
        "sigmoid": fit_sigmoid(raw, outcome),
        "none": {},
    }[method]
    tied = calibrate(raw, Calibrator(method, params, 0.2, 0.7))
    apart = calibrate(raw, Calibrator(method, params, 0.2, 0.7, 1e-6))
    assert len(np.unique(tied)) < len(np.unique(raw)) == len(np.unique(apart))
    assert np.array_equal(np.argsort(apart), np.argsort(raw))
    assert np.abs(apart - tied).max() < 1e-6
    assert 0.2 <= apart.min() <= apart.max() <= 0.7


@pytest.mark.parametrize("share", [-1e-9, 0.01, NAN])
def test_a_tie_break_that_would_change_probabilities_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="tie"):
        Calibrator("none", {}, 0.0, 1.0, share)


@pytest.mark.parametrize("shift", [-20.1, 21.0, NAN, INF])
def test_a_shift_out_of_all_measure_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="shifted"):
        Calibrator("none", {}, shift=shift)


def test_a_shift_is_added_to_the_log_odds_before_the_bounds() -> None:
    raw, outcome = sample(500)
    given = Calibrator("isotonic", fit_isotonic(raw, outcome))
    expected = np.clip(expit(logit(calibrate(raw, given)) - 0.8), 0.05, 0.6)
    found = calibrate(raw, Calibrator("isotonic", given.params, 0.05, 0.6, shift=-0.8))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found == 0.05).any()
    assert (found == 0.6).any()


@pytest.mark.parametrize("shift", [-20.0, -0.3, 1e-12, 0.3, 20.0])
def test_a_shift_never_ranks_neighbouring_probabilities_the_wrong_way_round(shift: float) -> None:
    starts = np.concatenate(
        [np.random.default_rng(1).random(300), [0.0, 5e-324, 2.2e-308, 1e-17, 1 - 2**-48]]
    )
    for start in starts:
        p = [start]
        for _ in range(50):
            p.append(min(np.nextafter(p[-1], INF), 1.0))
        shifted = shift_log_odds(np.array(p), shift)
        assert (np.diff(shifted) >= 0).all()
        assert ((shifted >= 0) & (shifted <= 1)).all()


def test_a_calibrator_without_tie_break_and_shift_is_written_as_it_always_was() -> None:
    assert set(Calibrator("none", {}).to_json()) == {"method", "params", "lower", "upper"}


def test_spread_is_one_half_at_the_centre_symmetric_and_as_steep_as_asked() -> None:
    spread = Calibrator("spread", {"steepness": 8.0, "centre": 0.3})
    below, centre, above = calibrate(np.array([0.1, 0.3, 0.5]), spread)
    assert centre == 0.5
    assert below + above == pytest.approx(1.0, abs=1e-12)
    assert above == pytest.approx(1 / (1 + math.exp(-1.6)), abs=1e-12)


def test_sigmoid_equals_the_formula() -> None:
    raw = np.linspace(-3, 3, 101)
    p = calibrate(raw, Calibrator("sigmoid", {"slope": 2.5, "intercept": -0.7}))
    np.testing.assert_allclose(p, [1 / (1 + math.exp(-(2.5 * x - 0.7))) for x in raw], rtol=1e-12)


def test_the_far_tails_of_a_sigmoid_keep_their_relative_precision() -> None:
    (p,) = calibrate(np.array([-700.0]), Calibrator("sigmoid", {"slope": 1.0, "intercept": 0.0}))
    assert p == pytest.approx(math.exp(-700), rel=1e-12)


def test_isotonic_joins_its_points_by_straight_lines_and_is_level_beyond_them() -> None:
    curve = Calibrator("isotonic", {"scores": [0.2, 0.4, 0.8], "probabilities": [0.1, 0.3, 0.9]})
    p = calibrate(np.array([-5, 0.2, 0.3, 0.4, 0.6, 0.8, 5]), curve)
    np.testing.assert_allclose(p, [0.1, 0.1, 0.2, 0.3, 0.6, 0.9, 0.9], rtol=1e-15)


def test_fitted_sigmoid_is_the_maximum_likelihood_on_platts_targets() -> None:
    raw, outcome = sample(3000, seed=5)
    params = fit_sigmoid(raw, outcome)
    positives, negatives = outcome.sum(), (1 - outcome).sum()
    high, low = (positives + 1) / (positives + 2), 1 / (negatives + 2)
    target = np.where(outcome == 1, high, low)
    # A soft target is two weighted rows to a library that knows hard ones only.
    free = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000)
    free.fit(
        np.concatenate([raw, raw])[:, None],
        np.repeat([1, 0], len(raw)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    assert params["slope"] == pytest.approx(free.coef_[0, 0], rel=1e-4)
    assert params["intercept"] == pytest.approx(free.intercept_[0], rel=1e-4)


def test_fitted_sigmoid_finds_the_curve_that_made_the_outcomes() -> None:
    random = np.random.default_rng(6)
    raw = random.normal(0, 2, 200_000)
    outcome = (random.random(len(raw)) < 1 / (1 + np.exp(-(1.3 * raw - 0.4)))).astype(np.int64)
    params = fit_sigmoid(raw, outcome)
    assert params["slope"] == pytest.approx(1.3, rel=0.02)
    assert params["intercept"] == pytest.approx(-0.4, abs=0.02)


@pytest.mark.parametrize("scale", [1e-60, 1e-6, 1.0, 1e6, 1e60])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_scale_of_the_scores_does_not_matter(scale: float, offset: float) -> None:
    raw, outcome = sample(1000)
    shifted = (raw + offset) * scale
    expected = calibrate(raw, Calibrator("sigmoid", fit_sigmoid(raw, outcome)))
    found = calibrate(shifted, Calibrator("sigmoid", fit_sigmoid(shifted, outcome)))
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_perfectly_separated_scores_give_a_finite_curve() -> None:
    raw, outcome = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])
    p = calibrate(raw, Calibrator("sigmoid", fit_sigmoid(raw, outcome)))
    assert 0.1 < p[0] < 0.35
    assert 0.65 < p[3] < 0.9


@pytest.mark.parametrize("outcome", [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
def test_scores_that_do_not_rank_the_outcomes_give_everybody_the_base_rate(outcome: list[int]) -> None:
    params = fit_sigmoid(np.array([0.1, 0.2, 0.8, 0.9]), np.array(outcome))
    assert params["slope"] == pytest.approx(0.0, abs=1e-9)
    assert abs(sum(outcome) / 4 - 1 / (1 + math.exp(-params["intercept"]))) <= 1 / 6 + 1e-12


def test_equal_scores_give_everybody_the_base_rate() -> None:
    assert fit_sigmoid(np.full(10, 0.7), np.arange(10) % 2)["slope"] == 0.0
    assert fit_isotonic(np.full(10, 0.7), np.arange(10) % 2) == {"scores": [0.7], "probabilities": [0.5]}


def test_isotonic_pools_the_same_blocks_as_scikit_learn() -> None:
    raw, outcome = sample(3000, seed=7)
    raw = np.round(raw, 3)
    params = fit_isotonic(raw, outcome)
    peer = IsotonicRegression(out_of_bounds="clip").fit(raw, outcome)
    rates, first, counts = np.unique(peer.predict(np.sort(raw)), return_index=True, return_counts=True)
    means = [np.sort(raw)[start : start + rows].mean() for start, rows in zip(first, counts, strict=True)]
    np.testing.assert_allclose(params["probabilities"], rates, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(params["scores"], means, rtol=1e-9)


def test_isotonic_does_not_depend_on_the_order_of_the_rows() -> None:
    raw, outcome = sample(1000)
    raw = np.round(raw, 2)
    order = np.random.default_rng(8).permutation(1000)
    assert fit_isotonic(raw, outcome) == fit_isotonic(raw[order], outcome[order])


def test_isotonic_keeps_apart_most_of_what_the_model_keeps_apart() -> None:
    raw, outcome = sample(3000, seed=9)
    fresh, _ = sample(2000, seed=10)
    ours = calibrate(fresh, Calibrator("isotonic", fit_isotonic(raw, outcome)))
    steps = IsotonicRegression(out_of_bounds="clip").fit(raw, outcome).predict(fresh)
    assert len(np.unique(ours)) > 1500 > 10 * len(np.unique(np.round(steps, 9))) / 2


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e150, 1e150), st.integers(0, 1)), min_size=1, max_size=30),
    st.sampled_from(["sigmoid", "isotonic"]),
)
def test_whatever_is_fitted_is_a_valid_calibrator(rows: list[tuple[float, int]], method: str) -> None:
    raw, outcome = (np.array(part) for part in zip(*rows, strict=True))
    fit = fit_sigmoid if method == "sigmoid" else fit_isotonic
    p = calibrate(raw, Calibrator(method, fit(raw, outcome)))
    assert ((p >= 0) & (p <= 1)).all()


def test_scores_a_last_bit_apart_keep_their_order_though_means_are_rounded() -> None:
    scores = np.random.default_rng(15).random(1000)
    rows = 49
    score = next(score for score in scores if score * rows / rows > score)
    raw = np.array([score] * rows + [np.nextafter(score, 1)])
    params = fit_isotonic(raw, np.array([0] * rows + [1]))
    assert params == {"scores": [score, raw[-1]], "probabilities": [0.0, 1.0]}


@pytest.mark.parametrize(("method", "fit"), [("sigmoid", fit_sigmoid), ("isotonic", fit_isotonic)])
def test_calibrated_scores_beat_raw_ones_on_rows_that_were_not_fitted(method: str, fit) -> None:
    calibrator = Calibrator(method, fit(*sample(4000, seed=11)))
    raw, outcome = sample(20_000, seed=12)
    before = calibration_statistics(raw, outcome)
    after = calibration_statistics(calibrate(raw, calibrator), outcome)
    assert after["ece"] < before["ece"] / 3
    assert after["brier"] < before["brier"]
    assert after["log_loss"] < before["log_loss"]


@pytest.mark.parametrize("fit", [fit_sigmoid, fit_isotonic])
@pytest.mark.parametrize(
    ("raw", "outcome"),
    [([], []), ([0.5], [0, 1]), ([NAN], [1]), ([INF], [1]), ([0.5], [2]), ([0.5], [0.5]), ([[0.5]], [[1]])],
)
def test_a_sample_that_cannot_be_fitted_is_refused(fit, raw: list, outcome: list) -> None:
    with pytest.raises(ValueError, match="needs"):
        fit(np.array(raw), np.array(outcome))


@pytest.mark.parametrize(
    ("method", "params", "bounds"),
    [
        ("magic", {}, (0, 1)),
        ("none", {"slope": 1.0}, (0, 1)),
        ("none", {}, (-0.1, 1)),
        ("none", {}, (0, 1.1)),
        ("none", {}, (0.6, 0.5)),
        ("none", {}, (NAN, 1)),
        ("sigmoid", {"slope": 1.0}, (0, 1)),
        ("sigmoid", {"slope": -1.0, "intercept": 0.0}, (0, 1)),
        ("sigmoid", {"slope": NAN, "intercept": 0.0}, (0, 1)),
        ("sigmoid", {"slope": 1.0, "intercept": INF}, (0, 1)),
        ("sigmoid", {"slope": [1.0, 2.0], "intercept": 0.0}, (0, 1)),
        ("spread", {"steepness": 0.0, "centre": 0.5}, (0, 1)),
        ("spread", {"steepness": -2.0, "centre": 0.5}, (0, 1)),
        ("isotonic", {"scores": [], "probabilities": []}, (0, 1)),
        ("isotonic", {"scores": [0.1], "probabilities": [0.1, 0.2]}, (0, 1)),
        ("isotonic", {"scores": [0.2, 0.1], "probabilities": [0.1, 0.2]}, (0, 1)),
        ("isotonic", {"scores": [0.1, 0.1], "probabilities": [0.1, 0.2]}, (0, 1)),
        ("isotonic", {"scores": [0.1, 0.2], "probabilities": [0.2, 0.1]}, (0, 1)),
        ("isotonic", {"scores": [0.1, 0.2], "probabilities": [-0.1, 0.1]}, (0, 1)),
        ("isotonic", {"scores": [0.1, 0.2], "probabilities": [0.1, 1.1]}, (0, 1)),
        ("isotonic", {"scores": [0.1, INF], "probabilities": [0.1, 0.2]}, (0, 1)),
        ("isotonic", {"scores": 0.1, "probabilities": 0.1}, (0, 1)),
        ("venn_abers", {"scores": [0.5], "p0": [0.0, 0.2]}, (0, 1)),
        ("venn_abers", {"scores": [0.5], "p0": [0.5, 0.2], "p1": [0.6, 0.7]}, (0, 1)),
    ],
)
def test_a_calibrator_that_could_mislead_is_refused(method: str, params: dict, bounds: tuple) -> None:
    with pytest.raises(ValueError, match=r"."):
        Calibrator(method, params, *bounds)
    with pytest.raises(ValueError, match=r"."):
        Calibrator.from_json({"method": method, "params": params, "lower": bounds[0], "upper": bounds[1]})


def test_a_calibrator_with_a_field_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="fields"):
        Calibrator.from_json({"method": "none", "params": {}, "lower": 0, "upper": 1, "surprise": 1})


def test_confidence_by_each_method() -> None:
    p = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    assert confidence(p, "max_probability").tolist() == [1.0, 0.75, 0.5, 0.75, 1.0]
    assert confidence(p, "margin").tolist() == [1.0, 0.5, 0.0, 0.5, 1.0]
    bits = 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3)
    np.testing.assert_allclose(confidence(p, "entropy"), [1, 1 - bits, 0, 1 - bits, 1], atol=1e-15)


def test_the_confidence_method_interval_is_one_less_the_width_of_what_it_is_given() -> None:
    p, intervals = np.array([0.1, 0.5]), np.array([[0.0, 0.25], [0.5, 0.5]])
    assert confidence(p, "interval", intervals).tolist() == [0.75, 1.0]
    with pytest.raises(ValueError, match="needs intervals"):
        confidence(p, "interval")


@settings(max_examples=200, deadline=None)
@given(any_float, st.sampled_from(METHODS))
def test_confidence_is_in_bounds_for_any_float(p: float, method: str) -> None:
    assert 0 <= confidence(np.array([p]), method)[0] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_confidence_grows_with_the_distance_from_a_half(method: str) -> None:
    p = np.linspace(0.5, 1, 2001)
    assert (np.diff(confidence(p, method)) >= 0).all()
    np.testing.assert_allclose(confidence(1 - p, method), confidence(p, method), atol=1e-12)


def test_statistics_of_a_small_sample_worked_out_by_hand() -> None:
    found = calibration_statistics(np.array([0.2, 0.4, 0.6, 0.8]), np.array([0, 1, 0, 1]), bins=2)
    assert found["brier"] == pytest.approx((0.04 + 0.36 + 0.36 + 0.04) / 4)
    assert found["log_loss"] == pytest.approx(-(2 * math.log(0.8) + 2 * math.log(0.4)) / 4)
    assert found["ece"] == pytest.approx((abs(0.3 - 0.5) + abs(0.7 - 0.5)) / 2)
    assert (found["mean_predicted"], found["mean_observed"]) == (0.5, 0.5)


def test_a_certain_mistake_costs_much_but_not_everything() -> None:
    found = calibration_statistics(np.array([0.0, 1.0]), np.array([1, 0]))
    assert 30 < found["log_loss"] < 40


def test_calibration_error_does_not_depend_on_the_order_of_equal_probabilities() -> None:
    random = np.random.default_rng(13)
    p = np.round(random.random(1001), 1)
    outcome = (random.random(1001) < p).astype(np.int64)
    order = random.permutation(1001)
    first, second = calibration_statistics(p, outcome), calibration_statistics(p[order], outcome[order])
    assert first["ece"] == pytest.approx(second["ece"], abs=1e-12)


@pytest.mark.parametrize("rows", [300, 2000])
@pytest.mark.parametrize("shape", [(1.0, 1.0), (1.0, 9.0), (0.5, 0.5)])
def test_the_noise_floor_is_what_true_probabilities_show_on_average(
    rows: int, shape: tuple[float, float]
) -> None:
    random = np.random.default_rng(14)
    p = random.beta(*shape, rows)
    simulated = [
        calibration_statistics(p, (random.random(rows) < p).astype(np.int64))["ece"] for _ in range(300)
    ]
    floor = calibration_statistics(p, np.zeros(rows, dtype=np.int64))["ece_floor"]
    assert floor == pytest.approx(np.mean(simulated), rel=0.08)


def test_one_row_has_statistics() -> None:
    found = calibration_statistics(np.array([0.25]), np.array([1]))
    assert found["ece"] == 0.75
    assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_statistics_of_what_is_no_probability_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        calibration_statistics(np.array([p]), np.array([1]))
