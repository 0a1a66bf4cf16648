"""Fits a model on training rows, and holds what a finished one consists of.

Everything learnt from rows (levels, statistics, estimator) is learnt from those handed in and no others.
Pure: no I/O, and the seed is a parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

from app.ai.calibration import Calibrator, calibrate
from app.ai.domain import FloatArray, IntArray, JsonObject
from app.ai.estimators import build_scorer
from app.ai.feature_safety import FeatureStatistics, build_statistics, check_features
from app.ai.features import FeatureMatrix, FeatureSet, build_features
from app.ai.inference import Scorer
from app.ai.venn_abers import VennAbersTable
from app.training.candidates import Candidate, build_estimator
from app.training.recency import recency_weights
from app.training.rows import TrainingRows

FeatureBuilder = Callable[[TrainingRows], FeatureSet]


@dataclass(frozen=True, slots=True, eq=False)
class FittedCandidate:
    """An estimator with the feature set and the statistics it was fitted under, and what it was chosen as."""

    estimator: Any
    feature_set: FeatureSet
    statistics: tuple[FeatureStatistics, ...]
    scorer: Scorer
    candidate: Candidate

    def build_matrix(self, rows: TrainingRows) -> FeatureMatrix:
        """Builds the features of these rows, before feature safety."""
        return build_features(rows.leads, self.feature_set, rows.as_of)

    def raw_scores(self, matrix: FeatureMatrix) -> FloatArray:
        """Scores built features the way serving does; returns (n,)."""
        return self.scorer(check_features(matrix, self.feature_set, self.statistics).values)


@dataclass(frozen=True, slots=True, eq=False)
class OutOfFold:
    """What models without a lead say of it: raw scores, cross-fitted probabilities; its outcome; all (m,).

    `rows` (m,) are the places of these leads among those the model has learnt from.
    """

    rows: IntArray
    raw: FloatArray
    probability: FloatArray
    outcome: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class CalibratedModel:
    """A fitted model, the calibrator of its scores, and the probability from which on a lead is positive.

    Calibrator, threshold and the table `venn_abers` rest on the scores `out_of_fold`. `base_rate` is the rate
    of the outcome at the level of the probabilities, to answer a lead of which nothing is known. `choice` is
    what was compared on the way and how it came out, for the manifest.
    """

    fitted: FittedCandidate
    calibrator: Calibrator
    threshold: float
    venn_abers: VennAbersTable
    base_rate: float
    out_of_fold: OutOfFold
    choice: JsonObject

    def probabilities(self, matrix: FeatureMatrix) -> FloatArray:
        """Returns the calibrated probabilities (n,) of built features."""
        return calibrate(self.fitted.raw_scores(matrix), self.calibrator)


@dataclass(frozen=True, slots=True, eq=False)
class LearntFeatures:
    """Features as some training rows teach them, and their safe values (n, k) for these rows."""

    feature_set: FeatureSet
    statistics: tuple[FeatureStatistics, ...]
    values: FloatArray

    def values_of(self, rows: TrainingRows) -> FloatArray:
        """Returns the values (n, k) of other rows under the same features and statistics."""
        matrix = build_features(rows.leads, self.feature_set, rows.as_of)
        return check_features(matrix, self.feature_set, self.statistics).values


def learn_features(rows: TrainingRows, build: FeatureBuilder) -> LearntFeatures:
    """Learns feature set and statistics from these rows."""
    feature_set = build(rows)
    matrix = build_features(rows.leads, feature_set, rows.as_of)
    statistics = build_statistics(matrix)
    return LearntFeatures(feature_set, statistics, check_features(matrix, feature_set, statistics).values)


def fit_estimator(candidate: Candidate, values: FloatArray, rows: TrainingRows, seed: int, cores: int) -> Any:
    """Fits a candidate to the feature values (n, k) of `n` rows; the cores do not change the result.

    Recent rows weigh more if the candidate has a half-life; the rows then have an order.
    """
    estimator = build_estimator(candidate, seed)
    forest = isinstance(estimator, RandomForestClassifier)
    if forest:
        estimator.n_jobs = cores
    weights: dict[str, FloatArray] = {}
    if candidate.half_life and rows.order is not None:
        weight = "logisticregression__sample_weight" if isinstance(estimator, Pipeline) else "sample_weight"
        weights = {weight: recency_weights(rows.order, candidate.half_life)}
    # OpenMP's threads wait for each other on shared cores: boosting took ten times as long. Not for forests.
    with threadpool_limits(1, user_api="openmp"):
        estimator.fit(values, rows.outcome, **weights)
    if forest:
        estimator.n_jobs = 1
    return estimator


def fit_model(rows: TrainingRows, build: FeatureBuilder, candidate: Candidate, seed: int) -> FittedCandidate:
    """Learns feature set, statistics and estimator from these rows and no others."""
    learnt = learn_features(rows, build)
    with threadpool_limits(1):
        estimator = fit_estimator(candidate, learnt.values, rows, seed, cores=-1)
    return FittedCandidate(
        estimator, learnt.feature_set, learnt.statistics, build_scorer(estimator), candidate
    )


def choose_threshold(probability: FloatArray, outcome: IntArray) -> float:
    """Returns the probability from which on a lead counts as positive: the one with the highest F1 score.

    Choose it on calibrated out-of-fold probabilities (n,), so that the test part stays untouched. Of equal
    scores the lowest threshold wins, which finds more of the leads that apply.
    """
    order = np.argsort(-probability, kind="stable")
    ranked, hits = probability[order], np.cumsum(outcome[order])
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + outcome.sum())
    candidates = np.flatnonzero(np.append(np.diff(ranked) != 0, [True]))
    best = candidates[f1[candidates] >= f1[candidates].max() - 1e-12]
    return float(ranked[best[-1]])
