"""What a model's verdicts rest on: the worth of each feature, and how little data is too little.

Both are measured on held-out leads; neither changes a score. Pure. Called by `app.training.describe`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from app.ai.domain import Column, LeadColumns
from app.ai.feature_safety import check_features
from app.ai.features import FeatureSet, build_features
from app.training.fit import CalibratedModel
from app.training.rows import TrainingRows

_MIN_ROWS, _MIN_SAMPLES = 100, 10_000
_THRESHOLDS = np.arange(1, 13) / 20


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
    base_rate = float(learnt.outcome.mean())
    return VerdictRule(base_rate, weights, measure_abstain_below(model, base_rate, weights, held_out, seed))


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
    model: CalibratedModel, base_rate: float, weights: Sequence[float], rows: TrainingRows, seed: int
) -> float | None:
    """Returns the weighted coverage below which the base rate is the better answer, None for too few rows.

    Columns are taken away from held-out leads at random, each lead losing another share of them. Of all
    thresholds up to 0.6 it is the one that makes the Brier score lowest when leads below it get the base
    rate and all others the model's probability; of equally good ones the lowest.
    """
    if rows.leads.n < _MIN_ROWS:
        return None
    random = np.random.default_rng(seed)
    fitted, losses, count = model.fitted, np.zeros(len(_THRESHOLDS)), 0
    while count < _MIN_SAMPLES:
        matrix = build_features(remove_cells(rows.leads, random), fitted.feature_set, rows.as_of)
        checked = check_features(matrix, fitted.feature_set, fitted.statistics, weights)
        by_model = (model.probabilities(matrix) - rows.outcome) ** 2
        by_base_rate = (base_rate - rows.outcome) ** 2
        for place, threshold in enumerate(_THRESHOLDS):
            losses[place] += np.where(checked.weighted_coverage < threshold, by_base_rate, by_model).sum()
        count += rows.leads.n
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
