"""A base rate that moves is followed where the past shows that it pays, and otherwise left alone."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from app.ai.calibration import Calibrator, calibrate, calibration_statistics, fit_sigmoid, shift_log_odds
from app.ai.domain import FloatArray, IntArray
from app.ai.venn_abers import build_intervals, build_table, look_up
from app.training.recency import (
    HALF_LIVES,
    fit_recent_shift,
    fit_shift,
    foretell,
    is_better,
    recency_weights,
    shift_table,
)

N, FOLDS = 6000, 6


def simulate(drift: float, seed: int = 1) -> tuple[FloatArray, IntArray, IntArray]:
    """Scores, outcomes and folds in the order of time; the log-odds of all leads move by `drift` a fold."""
    random = np.random.default_rng(seed)
    fold = np.repeat(np.arange(FOLDS), N // FOLDS)
    score = random.random(N)
    outcome = random.random(N) < expit(4 * score - 2 + drift * fold)
    return score, outcome.astype(np.int64), fold


def fit(raw: FloatArray, outcome: IntArray) -> Calibrator:
    return Calibrator("sigmoid", fit_sigmoid(raw, outcome), 0.001, 0.999)


@pytest.mark.parametrize("drift", [-0.3, 0.3])
def test_a_moving_base_rate_switches_the_shift_on_and_the_next_window_is_foretold_better(
    drift: float,
) -> None:
    raw, outcome, fold = simulate(drift)
    before, after = fold < FOLDS - 1, fold == FOLDS - 1
    told = foretell(raw[before], outcome[before], fold[before], fit)
    assert is_better(told.shifted, told.plain)
    plain = fit(raw[before], outcome[before])
    shift = fit_recent_shift(plain, raw[before], outcome[before], fold[before])
    moved = Calibrator("sigmoid", plain.params, 0.001, 0.999, shift=shift)
    stale, fresh = (
        calibration_statistics(calibrate(raw[after], each), outcome[after]) for each in (plain, moved)
    )
    assert np.sign(shift) == np.sign(drift)
    assert fresh["log_loss"] < stale["log_loss"]
    assert fresh["ece"] < stale["ece"] / 1.5


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_base_rate_that_stays_leaves_the_shift_off(seed: int) -> None:
    told = foretell(*simulate(0.0, seed), fit)
    assert not is_better(told.shifted, told.plain)


def test_a_fold_is_foretold_by_earlier_ones_alone() -> None:
    raw, outcome, fold = simulate(0.2)
    told = foretell(raw, outcome, fold, fit)
    assert len(told.plain) == N - N // FOLDS
    changed = np.where(fold == FOLDS - 1, 1 - outcome, outcome)
    again = foretell(raw, changed, fold, fit)
    last = N // FOLDS
    for losses, others in zip(told, again, strict=True):
        assert np.array_equal(losses[:-last], others[:-last])
        assert not np.array_equal(losses[-last:], others[-last:])


def test_a_shift_is_the_maximum_likelihood_on_smoothed_targets() -> None:
    random = np.random.default_rng(2)
    p = random.uniform(0.02, 0.9, 500)
    outcome = (random.random(500) < expit(logit(p) - 0.7)).astype(np.int64)
    positives = outcome.sum()
    target = np.where(outcome == 1, (positives + 1) / (positives + 2), 1 / (500 - positives + 2))

    def loss(shift: float) -> float:
        moved = expit(logit(p) + shift)
        return float(-(target * np.log(moved) + (1 - target) * np.log(1 - moved)).sum())

    found = fit_shift(p, outcome)
    assert found == pytest.approx(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x, abs=1e-4)
    assert shift_log_odds(p, found).mean() == pytest.approx(target.mean(), abs=1e-12)


@pytest.mark.parametrize("won", [0, 1])
@pytest.mark.parametrize("p", [1e-6, 0.4, 1 - 1e-6])
def test_outcomes_of_one_kind_give_a_finite_shift(p: float, won: int) -> None:
    shift = fit_shift(np.full(40, p), np.full(40, won))
    assert expit(logit(p) + shift) == pytest.approx(41 / 42 if won else 1 / 42, rel=1e-6)


@pytest.mark.parametrize("half_life", HALF_LIVES)
def test_a_lead_weighs_half_as_much_as_one_a_half_life_younger_in_any_unit(half_life: float) -> None:
    order = np.linspace(0.0, 1.0, 101)
    weights = recency_weights(order, half_life)
    assert weights.mean() == pytest.approx(1.0)
    assert weights[100 - round(100 * half_life)] / weights[100] == pytest.approx(0.5)
    np.testing.assert_allclose(recency_weights(1.7e9 + 86_400 * order, half_life), weights, rtol=1e-6)
    assert recency_weights(np.full(3, 5.0), half_life).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("shift", [-0.6, 0.6])
def test_intervals_move_with_the_probabilities_they_hold(shift: float) -> None:
    raw, outcome, _ = simulate(0.0)
    table = build_table(raw, outcome)
    moved = shift_table(table, shift)
    inside = np.linspace(0.1, 0.9, 200)
    for before, after in zip(look_up(table, inside), look_up(moved, inside), strict=True):
        np.testing.assert_allclose(logit(after) - logit(before), shift, atol=1e-9)
    merged = Calibrator("venn_abers", table.to_json(), 0.001, 0.999, shift=shift)
    p = calibrate(inside, merged)
    ends = build_intervals(moved, inside, p, unknown=np.zeros(200, np.bool_), bounds=(0.001, 0.999))
    unwidened = np.column_stack(look_up(moved, inside))
    assert ((unwidened[:, 0] <= p) & (p <= unwidened[:, 1])).all()
    np.testing.assert_allclose(ends, unwidened, atol=1e-12)
