"""The numbers behind the model card's charts: curves, gain, thresholds.

Pure. Everything is computed from held-out probabilities (n,) and 0/1 outcomes (n,) in which both occur.
Called by `card_evidence`.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from app.ai.domain import FloatArray, IntArray

_CURVE_POINTS = 200


def build_roc(probability: FloatArray, outcome: IntArray) -> FloatArray:
    """Returns points (p, 2): share of the others called by mistake, share of positives found; ascending."""
    others, found, _ = roc_curve(outcome, probability)
    return _thin(np.column_stack([others, found]))


def build_precision_recall(probability: FloatArray, outcome: IntArray) -> FloatArray:
    """Returns points (p, 2): share of positives found, share of the called that are positive; ascending."""
    precision, recall, _ = precision_recall_curve(outcome, probability)
    return _thin(np.column_stack([recall, precision])[::-1])


def build_gain(probability: FloatArray, outcome: IntArray) -> FloatArray:
    """Returns (101, 2): the share of leads called, best first, in per cent steps; the positives among them.

    Leads with the same probability come in random order, on average.
    """
    others, found, _ = roc_curve(outcome, probability, drop_intermediate=False)
    rate = outcome.mean()
    called = np.arange(101) / 100
    return np.column_stack([called, np.interp(called, rate * found + (1 - rate) * others, found)])


@dataclass(frozen=True, slots=True)
class Threshold:
    """What calling every lead from a probability on would mean, in shares of leads."""

    probability: float
    called: float
    found: float
    precision: float
    false_alarms: float


def build_thresholds(
    probability: FloatArray, outcome: IntArray, decision_threshold: float
) -> list[Threshold]:
    """Returns the decision threshold and round ones around it, ascending, as far as a lead reaches them."""
    wanted = sorted({0.1, 0.25, 0.5, 0.75, 0.9, decision_threshold})
    return [
        Threshold(
            probability=limit,
            called=float(called.mean()),
            found=float(called[outcome == 1].mean()),
            precision=float(outcome[called].mean()),
            false_alarms=float(called[outcome == 0].mean()),
        )
        for limit in wanted
        if (called := probability >= limit).any()
    ]


def _thin(points: FloatArray) -> FloatArray:
    """Keeps both ends and at most 200 points of a curve, evenly spaced along it."""
    if len(points) <= _CURVE_POINTS:
        return points
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(points, axis=0)).sum(axis=1))])
    kept = np.unique(
        np.searchsorted(along, np.linspace(0, along[-1], _CURVE_POINTS)).clip(max=len(points) - 1)
    )
    thinned: FloatArray = points[kept]
    return thinned
