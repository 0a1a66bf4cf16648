"""Fits estimators and their calibrators, each on rows the other has not seen.

Everything learnt from outcomes (the numbers behind levels included) is learnt inside each fold, so out-of-fold scores
are what the model would say of strangers. Pure: no I/O, and the seed is a parameter. Called by `app.training.train`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from app.ai.calibration import Calibrator, calibrate, fit_isotonic, fit_sigmoid
from app.ai.domain import FloatArray, IntArray
from app.ai.feature_safety import FeatureStatistics, build_statistics, check_features
from app.ai.features import FeatureMatrix, FeatureSet, build_features
from app.ai.inference import Scorer, build_scorer
from app.training.options import ModelType
from app.training.rows import TrainingRows

FeatureBuilder = Callable[[TrainingRows], FeatureSet]
FoldProgress = Callable[[int, int], None]

FOLDS = 5
_METHODS = (("sigmoid", fit_sigmoid), ("isotonic", fit_isotonic))


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

    The limits of the forest keep it small enough to ship and to verify, and cost no accuracy in cross-validation:
    deeper trees or smaller leaves moved the ROC AUC by less than 0.001.
    """
    if model == "logistic_regression":
        return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    if model == "hist_gradient_boosting":
        return HistGradientBoostingClassifier(
            learning_rate=0.06, max_leaf_nodes=15, min_samples_leaf=20, early_stopping=False, random_state=seed
        )
    return RandomForestClassifier(
        100, max_depth=10, min_samples_leaf=5, class_weight="balanced", n_jobs=-1, random_state=seed
    )


def fit_model(rows: TrainingRows, build: FeatureBuilder, model: ModelType, seed: int) -> FittedModel:
    """Learns feature set, statistics and estimator from these rows and no others."""
    feature_set = build(rows)
    matrix = build_features(rows.leads, feature_set, rows.as_of)
    statistics = build_statistics(matrix)
    estimator = build_estimator(model, seed)
    estimator.fit(check_features(matrix, feature_set, statistics).values, rows.outcome)
    if isinstance(estimator, RandomForestClassifier):
        estimator.n_jobs = 1
    return FittedModel(estimator, feature_set, statistics, build_scorer(estimator))


def build_folds(outcome: IntArray, seed: int) -> IntArray:
    """Returns the fold (0 to `FOLDS` - 1) of each row, both classes spread evenly."""
    fold = np.empty(len(outcome), dtype=np.int64)
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(outcome, outcome)):
        fold[held_out] = number
    return fold


def score_out_of_fold(
    rows: TrainingRows, fold: IntArray, build: FeatureBuilder, model: ModelType, seed: int, progress: FoldProgress
) -> FloatArray:
    """Returns the raw score of each row from a model that was fitted without its fold."""
    raw = np.empty(rows.leads.n)
    for number in range(FOLDS):
        held_out = fold == number
        fitted = fit_model(rows.take(~held_out), build, model, seed)
        raw[held_out] = fitted.raw_scores(fitted.build_matrix(rows.take(held_out)))
        progress(number + 1, FOLDS)
    return raw


def fit_calibrator(raw: FloatArray, outcome: IntArray, fold: IntArray) -> tuple[Calibrator, FloatArray]:
    """Chooses sigmoid or isotonic by log-loss across folds and fits it on all out-of-fold scores (n,).

    Returns it with the cross-fitted probabilities (n,): those of a fold come from a calibrator fitted on the others,
    fit to choose a threshold on. The bounds are those of the rule of succession: `n` rows cannot support more
    certainty than (n + 1) / (n + 2).
    """
    best: tuple[float, Calibrator, FloatArray] | None = None
    for method, fit in _METHODS:
        probability = np.empty(len(raw))
        for number in range(FOLDS):
            rest = fold != number
            held_out = _calibrator(method, fit, raw[rest], outcome[rest])
            probability[~rest] = calibrate(raw[~rest], held_out)
        loss = float(log_loss(outcome, probability, labels=[0, 1]))
        if best is None or loss < best[0]:
            best = (loss, _calibrator(method, fit, raw, outcome), probability)
    assert best is not None  # noqa: S101
    return best[1], best[2]


def _calibrator(method: str, fit: Callable[..., Any], raw: FloatArray, outcome: IntArray) -> Calibrator:
    edge = 1 / (len(raw) + 2)
    return Calibrator(method=method, params=fit(raw, outcome), lower=edge, upper=1 - edge)
