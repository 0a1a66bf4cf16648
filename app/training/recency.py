"""What to do about a base rate that moves: weigh recent leads more, and set the level of probabilities anew.

Both only where they foretell better: each fold in the order of time is foretold by what was known before it,
with and without, and what is no better by more than one standard error stays off. Pure.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from app.ai.calibration import MAX_SHIFT, Calibrator, calibrate, shift_log_odds
from app.ai.domain import FloatArray, IntArray, JsonObject
from app.ai.venn_abers import VennAbersTable
from app.training.calibrators import log_losses

FitCalibrator = Callable[[FloatArray, IntArray], Calibrator]

HALF_LIVES = (1.0, 0.5, 0.25)
"""Ages, as shares of the training window, at which a lead counts half as much as one at its end."""


class Foretold(NamedTuple):
    """Log-loss of each foretold lead (m,), in nats, with the level as it was fitted and with it set anew."""

    plain: FloatArray
    shifted: FloatArray


class Recency(NamedTuple):
    """What is switched on: weights of a half-life, the intercept refit; and everything tried, for people."""

    half_life: float | None
    intercept: bool
    evidence: JsonObject


NEVER = Recency(None, False, {"half_life": None, "intercept": False, "tried": []})
"""Where nobody knows in which order leads came, nothing can move."""


def choose_recency(
    raw: Mapping[float | None, FloatArray], outcome: IntArray, fold: IntArray, fit: FitCalibrator
) -> Recency:
    """Chooses a half-life, of those tried and None, and then whether the level is set anew beside it.

    `raw` has the out-of-fold scores (m,) of a model fitted with each half-life; outcomes (m,) and folds (m,),
    numbered in the order of time, are the same for all. On is what has the lower log-loss by more than one
    standard error of the difference, lead by lead.
    """
    if len(np.unique(fold)) < 2:
        return NEVER
    told = {half_life: foretell(scores, outcome, fold, fit) for half_life, scores in raw.items()}
    without = told[None].plain
    tried = [_compare(half_life, False, each.plain, without) for half_life, each in told.items() if half_life]
    best = min(told, key=lambda half_life: told[half_life].plain.mean())
    half_life = best if is_better(told[best].plain, without) else None
    level = told[half_life]
    tried.append(_compare(half_life, True, level.shifted, level.plain))
    intercept = is_better(level.shifted, level.plain)
    return Recency(half_life, intercept, {
        "half_life": half_life,
        "intercept": intercept,
        "log_loss_without": round(float(without.mean()), 6),
        "log_loss_with": round(float((level.shifted if intercept else level.plain).mean()), 6),
        "leads": len(without),
        "tried": tried,
    })  # fmt: skip


def recency_weights(order: FloatArray, half_life: float) -> FloatArray:
    """Returns weights (n,), 1 on average, that halve with every `half_life` of age, a share of the window."""
    age = (order.max() - order) / (np.ptp(order) or 1.0)
    weight = 0.5 ** (age / half_life)
    weights: FloatArray = weight / weight.mean()
    return weights


def measure_base_rate(outcome: IntArray, order: FloatArray | None, half_life: float | None) -> float:
    """Returns the rate of outcomes (n,), each lead counting as in a fit with this half-life, or all alike."""
    weights = recency_weights(order, half_life) if half_life and order is not None else None
    return float(np.average(outcome, weights=weights))


def fit_shift(probability: FloatArray, outcome: IntArray) -> float:
    """Returns the log-odds to add to probabilities (n,), none 0 or 1, to suit 0/1 outcomes (n,) best.

    Maximum likelihood in one dimension, by Newton's method on Platt's smoothed targets (see
    `calibration.fit_sigmoid`), which keep it finite where all outcomes are the same.
    """
    positives = float(outcome.sum())
    negatives = len(outcome) - positives
    wanted = positives * (positives + 1) / (positives + 2) + negatives / (negatives + 2)
    shift = 0.0
    for _ in range(100):
        predicted = shift_log_odds(probability, shift)
        # The curve flattens far out; a step of at most 1 cannot overshoot into that.
        step = float(np.clip((wanted - predicted.sum()) / (predicted * (1 - predicted)).sum(), -1.0, 1.0))
        shift = float(np.clip(shift + step, -MAX_SHIFT, MAX_SHIFT))
        if abs(step) < 1e-10:
            break
    return shift


def fit_recent_shift(calibrator: Calibrator, raw: FloatArray, outcome: IntArray, fold: IntArray) -> float:
    """Fits the shift to the leads of the last fold: the most recent whose outcomes are in."""
    recent = fold == fold.max()
    return fit_shift(calibrate(raw[recent], calibrator), outcome[recent])


def foretell(raw: FloatArray, outcome: IntArray, fold: IntArray, fit: FitCalibrator) -> Foretold:
    """Foretells each fold after the first by a calibrator fitted on the out-of-fold scores of earlier ones.

    Folds (m,) are numbered in the order of time. Set anew, the level is that of the fold just before.
    """
    losses = list(_foretell_folds(raw, outcome, fold, fit))
    return Foretold(*(np.concatenate(part) for part in zip(*losses, strict=True)))


def is_better(losses: FloatArray, than: FloatArray) -> bool:
    """Tells whether losses (n,) are lower on average by more than one standard error of the difference."""
    gain = than - losses
    return bool(gain.mean() > gain.std() / np.sqrt(len(gain)))


def shift_table(table: VennAbersTable, shift: float) -> VennAbersTable:
    """Returns the table with p0 and p1 moved by the shift, so that intervals go where probabilities go."""
    return VennAbersTable(table.scores, shift_log_odds(table.p0, shift), shift_log_odds(table.p1, shift))


def _compare(half_life: float | None, intercept: bool, losses: FloatArray, than: FloatArray) -> JsonObject:
    gain = than - losses
    return {
        "half_life": half_life,
        "intercept": intercept,
        "log_loss": round(float(losses.mean()), 6),
        "gain": round(float(gain.mean()), 6),
        "standard_error": round(float(gain.std() / np.sqrt(len(gain))), 6),
    }


def _foretell_folds(
    raw: FloatArray, outcome: IntArray, fold: IntArray, fit: FitCalibrator
) -> Iterator[tuple[FloatArray, FloatArray]]:
    for number in np.unique(fold)[1:]:
        before, now = fold < number, fold == number
        calibrator = fit(raw[before], outcome[before])
        probability = calibrate(raw[now], calibrator)
        shift = fit_recent_shift(calibrator, raw[before], outcome[before], fold[before])
        shifted = calibrate(raw[now], replace(calibrator, shift=shift))
        yield log_losses(probability, outcome[now]), log_losses(shifted, outcome[now])
