"""Fits estimators and their calibrators, each on rows the other has not seen.

Everything learnt from outcomes (the numbers behind levels included) is learnt inside each fold, so
out-of-fold scores are what the model would say of strangers. Pure: no I/O, and the seed is a parameter.
Called by `app.training.train`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

from app.ai.calibration import Calibrator, calibrate, fit_isotonic, fit_sigmoid
from app.ai.domain import FloatArray, IntArray
from app.ai.feature_safety import FeatureStatistics, build_statistics, check_features
from app.ai.features import FeatureMatrix, FeatureSet, build_features
from app.ai.inference import Scorer, build_scorer
from app.ai.venn_abers import VennAbersTable, build_table
from app.training.options import ModelType
from app.training.rows import TrainingRows

FeatureBuilder = Callable[[TrainingRows], FeatureSet]
FitProgress = Callable[[int, int], None]

FOLDS = 5
_Method = Literal["isotonic", "sigmoid"]
_METHODS: tuple[_Method, _Method] = ("isotonic", "sigmoid")
_ROWS_FOR_ISOTONIC = 1000


@dataclass(frozen=True, slots=True, eq=False)
class FittedModel:
    """An estimator with the feature set and the statistics it was fitted under."""

    estimator: Any
    feature_set: FeatureSet
    statistics: tuple[FeatureStatistics, ...]
    scorer: Scorer

    def build_matrix(self, rows: TrainingRows) -> FeatureMatrix:
        """Builds the features of these rows, before feature safety."""
        return build_features(rows.leads, self.feature_set, rows.as_of)

    def raw_scores(self, matrix: FeatureMatrix) -> FloatArray:
        """Scores built features the way serving does; returns (n,)."""
        return self.scorer(check_features(matrix, self.feature_set, self.statistics).values)


def build_estimator(model: ModelType, seed: int) -> Any:
    """Returns an unfitted estimator.

    The limits of the forest keep it small enough to ship and to verify, and cost no accuracy in
    cross-validation: deeper trees and smaller leaves moved the ROC AUC by less than 0.002.
    """
    if model == "logistic_regression":
        return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    if model == "hist_gradient_boosting":
        return HistGradientBoostingClassifier(
            learning_rate=0.06,
            max_leaf_nodes=15,
            min_samples_leaf=20,
            early_stopping=False,
            random_state=seed,
        )
    return RandomForestClassifier(
        100, max_depth=8, min_samples_leaf=15, class_weight="balanced", n_jobs=-1, random_state=seed
    )


def fit_model(rows: TrainingRows, build: FeatureBuilder, model: ModelType, seed: int) -> FittedModel:
    """Learns feature set, statistics and estimator from these rows and no others."""
    feature_set = build(rows)
    matrix = build_features(rows.leads, feature_set, rows.as_of)
    statistics = build_statistics(matrix)
    estimator = build_estimator(model, seed)
    # OpenMP's threads wait for each other on shared cores: boosting took ten times as long. Not for forests.
    with threadpool_limits(1):
        estimator.fit(check_features(matrix, feature_set, statistics).values, rows.outcome)
    if isinstance(estimator, RandomForestClassifier):
        estimator.n_jobs = 1
    return FittedModel(estimator, feature_set, statistics, build_scorer(estimator))


@dataclass(frozen=True, slots=True, eq=False)
class CalibratedModel:
    """A fitted model, the calibrator of its scores, and the probability from which on a lead is positive.

    `venn_abers` is the table of the same out-of-fold scores the calibrator was fitted on.
    """

    fitted: FittedModel
    calibrator: Calibrator
    threshold: float
    venn_abers: VennAbersTable

    def probabilities(self, matrix: FeatureMatrix) -> FloatArray:
        """Returns the calibrated probabilities (n,) of built features."""
        return calibrate(self.fitted.raw_scores(matrix), self.calibrator)


def fit_calibrated(
    rows: TrainingRows, build: FeatureBuilder, model: ModelType, seed: int, progress: FitProgress
) -> CalibratedModel:
    """Fits the model on all rows, its calibrator and threshold on what models without a row say of it."""
    fold, raw = _folds(rows.outcome, seed), np.empty(rows.leads.n)
    for number in range(FOLDS):
        progress(number, FOLDS + 1)
        held_out = fold == number
        without = fit_model(rows.take(~held_out), build, model, seed)
        raw[held_out] = without.raw_scores(without.build_matrix(rows.take(held_out)))
    calibrator, probability = fit_calibrator(raw, rows.outcome, fold)
    progress(FOLDS, FOLDS + 1)
    fitted = fit_model(rows, build, model, seed)
    progress(FOLDS + 1, FOLDS + 1)
    threshold = choose_threshold(probability, rows.outcome)
    return CalibratedModel(fitted, calibrator, threshold, build_table(raw, rows.outcome))


def fit_calibrator(raw: FloatArray, outcome: IntArray, fold: IntArray) -> tuple[Calibrator, FloatArray]:
    """Chooses how to calibrate and fits it on all out-of-fold scores (n,).

    Isotonic, which bends where the scores do, from 1,000 rows on, and below that the sigmoid, which few rows
    cannot bend (Niculescu-Mizil and Caruana, ICML 2005); the other one if its log-loss across folds is lower
    by more than one standard error of the difference. Returned with the cross-fitted probabilities (n,):
    those of a fold come from a calibrator fitted on the others, so a threshold may be chosen on them.
    """
    usual, other = _METHODS if len(raw) >= _ROWS_FOR_ISOTONIC else _METHODS[::-1]
    expected, rival = (_cross_fit(method, raw, outcome, fold) for method in (usual, other))
    excess = _log_losses(expected, outcome) - _log_losses(rival, outcome)
    if excess.mean() > excess.std() / np.sqrt(len(excess)):
        return _fit(other, raw, outcome), rival
    return _fit(usual, raw, outcome), expected


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


def _folds(outcome: IntArray, seed: int) -> IntArray:
    """Returns the fold (0 to `FOLDS` - 1) of each row, both classes spread evenly."""
    fold = np.empty(len(outcome), dtype=np.int64)
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(outcome, outcome)):
        fold[held_out] = number
    return fold


def _cross_fit(method: _Method, raw: FloatArray, outcome: IntArray, fold: IntArray) -> FloatArray:
    probability = np.empty(len(raw))
    for number in range(FOLDS):
        rest = fold != number
        probability[~rest] = calibrate(raw[~rest], _fit(method, raw[rest], outcome[rest]))
    return probability


def _log_losses(probability: FloatArray, outcome: IntArray) -> FloatArray:
    losses: FloatArray = -np.log(np.where(outcome == 1, probability, 1 - probability))
    return losses


def _fit(method: _Method, raw: FloatArray, outcome: IntArray) -> Calibrator:
    """Fits within bounds of Laplace's rule of succession for a tenth of the rows.

    Even if the outermost tenth knows no exception, that is all the certainty it supports; and a bound that is
    never 0 or 1 keeps every log-loss finite.
    """
    edge = 1 / (len(raw) / 10 + 2)
    params = fit_sigmoid(raw, outcome) if method == "sigmoid" else fit_isotonic(raw, outcome)
    return Calibrator(method=method, params=params, lower=edge, upper=1 - edge)
