"""A model for the first day: with few outcomes or none the service answers all the same, and honestly.

What leads look like is learnt from all of them, decided or not; what becomes of them only from those that are
decided, and only as far as these speak (`shrinkage`). No part is set aside to test on: it would be too small
to tell anything. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from app.ai.domain import FloatArray, InputColumn, IntArray
from app.ai.feature_safety import FeatureStatistics, build_statistics, check_features
from app.ai.features import FeatureMatrix, FeatureSet, FeatureSpec, build_features
from app.ai.venn_abers import VennAbersTable
from app.errors import TrainingError
from app.training.derive import MAX_ONE_HOT, derive_features
from app.training.fit import choose_threshold
from app.training.rate_bands import build_band
from app.training.rows import TrainingRows
from app.training.shrinkage import ShrunkFit, fit_shrunk

ENOUGH_ROWS, ENOUGH_OF_EACH_CLASS = 200, 40
"""Decided leads from which on a model can be chosen, calibrated and tested on what they say."""

PRIOR_ROWS = 10.0
"""Decided leads that the operator's own base rate counts for."""

_ALIKE = 0.95
_TOO_ALIKE = f"the same in more than {_ALIKE:.0%} of leads"
_TOO_MANY = "too many levels for so few outcomes"
_FOLDS = 10


@dataclass(frozen=True, slots=True, eq=False)
class DayOneModel:
    """A logistic regression shrunk towards the base rate, and what serves it.

    `matrix` holds the features of all leads at hand, decided or not; `worth` has what each group of features
    adds to the spread of their log-odds (a variance); `evidence` is the posterior probability that the
    features say anything.
    """

    estimator: Pipeline
    feature_set: FeatureSet
    statistics: tuple[FeatureStatistics, ...]
    matrix: FeatureMatrix
    base_rate: float
    threshold: float
    band: VennAbersTable
    worth: dict[str, float]
    evidence: float
    dropped: dict[str, str]


def is_day_one(outcome: IntArray) -> bool:
    """Tells whether these outcomes (n,), 0 or 1, are too few for anything but a day-one model."""
    positives = int(outcome.sum())
    return len(outcome) < ENOUGH_ROWS or min(positives, len(outcome) - positives) < ENOUGH_OF_EACH_CLASS


def estimate_base_rate(outcome: IntArray, expected: float | None) -> float:
    """Returns the rate of outcomes (n,) as far as they tell, between 0 and 1.

    Without an `expected` rate half a positive and half a negative are added (Jeffreys' prior); an expected
    rate counts for as much as `PRIOR_ROWS` leads.

    Raises:
        TrainingError: there is neither an outcome nor an expected rate.
    """
    if expected is not None:
        return float((outcome.sum() + PRIOR_ROWS * expected) / (len(outcome) + PRIOR_ROWS))
    if len(outcome) == 0:
        raise TrainingError(
            "no lead is decided yet, so there is no rate to start from: give the share of leads that you "
            "expect to reach the outcome, for example --base-rate 0.1, and train again when outcomes come in."
        )
    return float((outcome.sum() + 0.5) / (len(outcome) + 1))


def fit_day_one(
    rows: TrainingRows,
    everyone: TrainingRows,
    columns: Sequence[InputColumn],
    expected: float | None,
    seed: int,
) -> DayOneModel:
    """Fits the model on the decided `rows`; `everyone` holds all leads, of which only the looks count.

    Raises:
        TrainingError: see `estimate_base_rate`.
    """
    base_rate = estimate_base_rate(rows.outcome, expected)
    feature_set, dropped = choose_features(everyone, columns)
    matrix = build_features(everyone.leads, feature_set, everyone.as_of)
    statistics = build_statistics(matrix)
    looks = check_features(matrix, feature_set, statistics).values
    scaler = StandardScaler().fit(looks)
    decided = build_features(rows.leads, feature_set, rows.as_of)
    known = (check_features(decided, feature_set, statistics).values - scaler.mean_) / scaler.scale_
    fit = fit_shrunk(known, rows.outcome, base_rate)
    log_odds = score_strangers(known, rows.outcome, base_rate, seed)
    contributions = looks / scaler.scale_ * fit.weights
    return DayOneModel(
        estimator=make_pipeline(scaler, _as_estimator(fit)),
        feature_set=feature_set,
        statistics=statistics,
        matrix=matrix,
        base_rate=base_rate,
        threshold=choose_threshold(expit(log_odds), rows.outcome) if fit.weights.any() else 0.5,
        band=build_band(log_odds, rows.outcome),
        worth={
            name: float(contributions[:, list(group)].sum(axis=1).var())
            for name, group in zip(feature_set.group_names, feature_set.groups, strict=True)
        },
        evidence=fit.evidence,
        dropped=dropped,
    )


def choose_features(
    everyone: TrainingRows, columns: Sequence[InputColumn]
) -> tuple[FeatureSet, dict[str, str]]:
    """Derives features that tell leads apart without looking at any outcome, and says what is left out.

    A feature that is the same for nearly all leads is left out: few outcomes meet the others, and one that
    does would count too much. So is a text of many levels, which only outcomes could put in order. Where
    nothing is left, whether the first column is known is the only feature.
    """
    nobody = np.zeros(everyone.leads.n, dtype=np.int64)
    try:
        derived = derive_features(everyone.leads, nobody, everyone.as_of, columns)
    except TrainingError:
        return _only_feature(columns)
    matrix = build_features(everyone.leads, derived.feature_set, everyone.as_of)
    specs = tuple(
        spec
        for spec, values in zip(derived.feature_set.specs, matrix.values.T, strict=True)
        if not _has_many_levels(spec) and _tells_apart(values)
    )
    if not specs:
        return _only_feature(columns)
    read = {column.name for spec in specs for column in spec.inputs}
    many = {spec.name for spec in derived.feature_set.specs if _has_many_levels(spec)}
    missed = {
        column.name: _TOO_MANY if column.name in many else _TOO_ALIKE
        for column in columns
        if column.name not in read
    }
    return FeatureSet(specs), {**missed, **derived.dropped}


def score_strangers(values: FloatArray, outcome: IntArray, base_rate: float, seed: int) -> FloatArray:
    """Returns for each of the leads (n, k) the log-odds (n,) by a fit without it and those equal to it."""
    equal = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
    fold = np.random.default_rng(seed).permutation(equal.max(initial=0) + 1)[equal] % _FOLDS
    log_odds = np.empty(len(outcome))
    for number in np.unique(fold):
        held_out = fold == number
        # The base rate stays that of all: without a positive it would be lower, just for this positive.
        fit = fit_shrunk(values[~held_out], outcome[~held_out], base_rate)
        log_odds[held_out] = fit.log_odds(values[held_out])
    return log_odds


def _only_feature(columns: Sequence[InputColumn]) -> tuple[FeatureSet, dict[str, str]]:
    first, *others = columns
    spec = FeatureSpec(
        name=f"{first.name}__present", transform="is_present", inputs=(first,), params={},
        description=f"whether {first.name} is known",
    )  # fmt: skip
    return FeatureSet((spec,)), {column.name: "tells too few leads apart" for column in others}


def _has_many_levels(spec: FeatureSpec) -> bool:
    return len(spec.params.get("levels", ())) > MAX_ONE_HOT


def _tells_apart(values: FloatArray) -> bool:
    commonest = np.unique(values, return_counts=True)[1].max()
    return bool(commonest <= _ALIKE * len(values))


def _as_estimator(fit: ShrunkFit) -> LogisticRegression:
    """Returns the fit in the form the registry knows: a `LogisticRegression` cannot average over fits."""
    estimator = LogisticRegression()
    estimator.classes_ = np.array([0, 1])
    estimator.coef_, estimator.intercept_ = fit.weights[None, :], np.array([fit.intercept])
    estimator.n_features_in_ = len(fit.weights)
    estimator.n_iter_ = np.array([1], dtype=np.int32)
    return estimator
