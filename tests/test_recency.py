"""A base rate that moves is followed where the past shows that it pays, and otherwise left alone."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psycopg
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from app.ai.calibration import Calibrator, calibrate, calibration_statistics, fit_sigmoid, shift_log_odds
from app.ai.domain import FloatArray, IntArray
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy, score_leads
from app.ai.venn_abers import build_intervals, build_table, look_up
from app.training.options import TrainingOptions
from app.training.recency import (
    HALF_LIVES,
    NEVER,
    choose_recency,
    fit_recent_shift,
    fit_shift,
    foretell,
    is_better,
    recency_weights,
    shift_table,
)
from app.training.train import train
from tests.builders import DAY, column, leads

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


def test_without_two_folds_nothing_is_ever_switched_on() -> None:
    raw, outcome, fold = simulate(0.9)
    assert choose_recency({None: raw, 0.5: raw}, outcome, np.zeros_like(fold), fit) is NEVER


def test_a_half_life_is_chosen_for_what_it_foretells_and_the_level_is_asked_beside_it() -> None:
    raw, outcome, fold = simulate(0.0)
    blurred = raw + np.random.default_rng(3).normal(0, 0.3, N)
    chosen = choose_recency({None: blurred, 1.0: raw, 0.5: blurred - 0.1}, outcome, fold, fit)
    assert (chosen.half_life, chosen.intercept) == (1.0, False)
    assert chosen.evidence["log_loss_with"] < chosen.evidence["log_loss_without"]
    assert [(one["half_life"], one["intercept"]) for one in chosen.evidence["tried"]] == [
        (1.0, False), (0.5, False), (1.0, True),
    ]  # fmt: skip
    level = choose_recency({None: raw, 0.5: blurred}, *simulate(0.3)[1:], fit)
    assert (level.half_life, level.intercept) == (None, True)


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


NOW, YEAR = datetime(2026, 6, 1, tzinfo=UTC), 365


@pytest.fixture
def train_on(database_url: str, tmp_path: Path) -> Callable[..., TrainingOptions]:
    """`train_on(interest, outcome)` trains on leads spread over a year, the earliest first."""

    def run(interest: FloatArray, outcome: IntArray) -> TrainingOptions:
        start = NOW.timestamp() - YEAR * DAY
        with psycopg.connect(database_url) as connection:
            connection.execute(
                "CREATE TABLE moving (lead_id uuid, as_of timestamptz, interest float8, won int)"
            )
            with connection.cursor().copy("COPY moving FROM STDIN") as copy:
                for row, (signal, won) in enumerate(zip(interest, outcome, strict=True)):
                    moment = datetime.fromtimestamp(start + row * YEAR * DAY / len(outcome), UTC)
                    copy.write_row((f"{row:032x}", moment, float(signal), int(won)))
        options = TrainingOptions(url=database_url, model_dir=tmp_path, source="moving", label="won", now=NOW,
                                  model="logistic_regression")  # fmt: skip
        train(options)
        return options

    return run


def measure(
    options: TrainingOptions, chance: Callable[[FloatArray], FloatArray], shift: float | None
) -> float:
    """Returns the log-loss on new leads of this chance, by the model as published or with another shift."""
    bundle = ModelRegistry(ModelCatalogue(options.model_dir)).load()
    if shift is not None:
        bundle = replace(bundle, calibrator=replace(bundle.calibrator, shift=shift))
    random = np.random.default_rng(9)
    interest = random.normal(0, 1, 20_000)
    outcome = (random.random(len(interest)) < chance(interest)).astype(np.int64)
    fresh = leads(interest=column("number", *interest.tolist()))
    answers = score_leads(bundle, fresh, NOW.timestamp(), ScoringPolicy(0.0, "margin")).answers
    return calibration_statistics(answers["probability"], outcome)["log_loss"]


def test_training_follows_a_base_rate_that_moves_and_the_next_leads_are_scored_better(
    train_on: Callable[..., TrainingOptions],
) -> None:
    random = np.random.default_rng(4)
    interest, time = random.normal(0, 1, 8000), np.linspace(0, 1, 8000)
    outcome = (random.random(8000) < expit(interest + 0.5 - 2 * time)).astype(np.int64)
    options = train_on(interest, outcome)
    manifest = ModelRegistry(ModelCatalogue(options.model_dir)).load().manifest
    recency = manifest.report["choice"]["recency"]
    assert recency["intercept"]
    assert recency["log_loss_with"] < recency["log_loss_without"]
    assert manifest.calibrator["shift"] < -0.1
    assert measure(options, lambda x: expit(x - 1.5), None) < measure(options, lambda x: expit(x - 1.5), 0.0)
    # The fifth that was held out is the next window too.
    before, now = outcome[:6400].mean(), manifest.metrics["mean_observed"]
    assert manifest.metrics["mean_predicted"] < (before + now) / 2
    # And what a lead is answered of which nothing is known moves along.
    assert manifest.base_rate < (before + now) / 2


def test_training_on_leads_whose_base_rate_stays_switches_nothing_on(
    train_on: Callable[..., TrainingOptions],
) -> None:
    random = np.random.default_rng(5)
    interest = random.normal(0, 1, 3000)
    options = train_on(interest, (random.random(3000) < expit(interest - 0.5)).astype(np.int64))
    manifest = ModelRegistry(ModelCatalogue(options.model_dir)).load().manifest
    recency = manifest.report["choice"]["recency"]
    assert (recency["half_life"], recency["intercept"]) == (None, False)
    assert recency["log_loss_with"] == recency["log_loss_without"]
    assert "shift" not in manifest.calibrator


def test_training_weighs_recent_leads_more_where_what_tells_them_apart_has_changed(
    train_on: Callable[..., TrainingOptions],
) -> None:
    random = np.random.default_rng(6)
    interest, time = random.normal(0, 1, 4000), np.linspace(0, 1, 4000)
    outcome = (random.random(4000) < expit(4 * (time - 0.35) * interest)).astype(np.int64)
    options = train_on(interest, outcome)
    manifest = ModelRegistry(ModelCatalogue(options.model_dir)).load().manifest
    assert manifest.report["choice"]["recency"]["half_life"] in HALF_LIVES
    assert manifest.metrics["roc_auc"] > 0.8
