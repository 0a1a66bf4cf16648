"""What a model's verdicts rest on: the worth of each feature, and how little data is too little.

Both are measured on leads the model has not seen; neither changes a score. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from app.ai.domain import Column, FloatArray, IntArray, LeadColumns
from app.ai.feature_safety import check_features
from app.ai.features import FeatureMatrix, FeatureSet
from app.training.fit import CalibratedModel
from app.training.rows import TrainingRows

_MIN_ROWS, _MIN_SAMPLES, _RANDOM_LEADS = 100, 10_000, 100
_THRESHOLDS = np.arange(13) / 20


class VerdictRule(NamedTuple):
    """What a manifest says of verdicts: its base rate, feature weights (k,), and `abstain_below` or None."""

    base_rate: float
    weights: list[float]
    abstain_below: float | None


def measure_rule(
    model: CalibratedModel,
    importance: Mapping[str, float],
    learnt: TrainingRows,
    held_out: TrainingRows,
    seed: int,
) -> VerdictRule:
    """Measures the rule of a model that has learnt from `learnt`; for `importance` see `build_weights`."""
    weights = build_weights(importance, model.fitted.feature_set)
    return VerdictRule(
        base_rate=model.base_rate,
        weights=weights,
        abstain_below=measure_abstain_below(model, weights, learnt, held_out, seed),
    )


def build_weights(importance: Mapping[str, float], feature_set: FeatureSet) -> list[float]:
    """Returns one weight for each feature, not negative, which sum to 1.

    `importance` is what shuffling a group of features loses on held-out rows, by the group's name
    (permutation importance; Breiman, Random Forests, Machine Learning 45, 2001). Such a loss grows with the
    square of an effect, so the weight is in proportion to its root: one strong column does not stand for all
    the others together. A group whose shuffling loses nothing weighs nothing. Where none loses anything all
    weigh the same. The first feature of a group, which alone knows an unseen text, has all of its weight.
    """
    effects = np.sqrt([max(importance[name], 0.0) for name in feature_set.group_names])
    if effects.sum() <= 0:
        effects = np.ones(len(effects))
    weights = np.zeros(len(feature_set.specs))
    weights[[group[0] for group in feature_set.groups]] = effects / effects.sum()
    listed: list[float] = weights.tolist()
    return listed


def measure_abstain_below(
    model: CalibratedModel,
    weights: Sequence[float],
    learnt: TrainingRows,
    held_out: TrainingRows,
    seed: int,
) -> float | None:
    """Returns the weighted coverage below which the base rate is the better answer, None for too few rows.

    Of all thresholds up to 0.6 it is the one that makes the Brier score lowest when leads below it get the
    base rate and all others the model's probability; of equally good ones the lowest.

    Real leads lack what they lack for a reason, and that may tell much. So it is measured on the out-of-fold
    leads of `learnt` as they are. Perhaps few of them have gaps: held-out leads from which columns are taken
    away at random, each losing another share of them, are added and count for 100.
    """
    if held_out.leads.n < _MIN_ROWS:
        return None
    fitted, told = model.fitted, model.out_of_fold

    def lose(matrix: FeatureMatrix, probability: FloatArray, outcome: IntArray) -> FloatArray:
        """Returns what each lead loses under each threshold (n, t) by getting the base rate."""
        coverage = check_features(matrix, fitted.feature_set, fitted.statistics, weights).weighted_coverage
        loss = (model.base_rate - outcome) ** 2 - (probability - outcome) ** 2
        # A lead of which nothing is known gets the base rate under any threshold, so it is for none.
        loss[coverage == 0] = 0.0
        return np.where(coverage[:, None] < _THRESHOLDS, loss[:, None], 0.0)

    losses = lose(fitted.build_matrix(learnt.take(told.rows)), told.probability, told.outcome).sum(axis=0)
    random = np.random.default_rng(seed)
    draws = -(-_MIN_SAMPLES // held_out.leads.n)
    for _ in range(draws):
        matrix = fitted.build_matrix(replace(held_out, leads=remove_cells(held_out.leads, random)))
        thinned = lose(matrix, model.probabilities(matrix), held_out.outcome)
        losses += thinned.mean(axis=0) * _RANDOM_LEADS / draws
    return float(_THRESHOLDS[losses.argmin()])


def remove_cells(leads: LeadColumns, random: np.random.Generator) -> LeadColumns:
    """Returns the leads with cells made missing at random: of each lead a share of its own, 0 to 1."""
    lost = random.random(leads.n)
    columns = {}
    for name, column in leads.columns.items():
        kept = column.present & (random.random(leads.n) >= lost)
        values = column.values.copy()
        values[~kept] = "" if column.kind == "text" else np.nan
        columns[name] = Column(column.kind, values, kept)
    return LeadColumns(leads.n, columns)
