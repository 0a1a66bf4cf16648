"""Raw scores: from a fitted estimator to a function of feature values, built once when a model is loaded.

Row i of a batch is scored as if it were alone, bit for bit, on one thread. scikit-learn's own `predict_proba`
does not promise that: matrix products sum in an order that depends on the batch. Forests, boosting and
logistic regression are scored by compiled loops, and where these are not installed by scikit-learn's own
trees: the same bits, several times slower. Pure: never loads an estimator. Called by `model_bundle`. This is
where another inference engine would be put in.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from app.ai.domain import FloatArray
from app.ai.fitted_trees import read_boosting, read_forest
from app.ai.score_kernels import RowSum, ScoreKernels, installed_kernels

Scorer = Callable[[FloatArray], FloatArray]
"""Feature values (n, k), float64, to raw scores of the positive class (n,), in [0, 1]."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What `s` standard scalers, one after the other, do to feature values: `means` and `scales` (s, k)."""

    means: FloatArray
    scales: FloatArray

    def __call__(self, values: FloatArray) -> FloatArray:
        """Returns scaled values (n, k): what StandardScaler computes, one element at a time."""
        for mean, scale in zip(self.means, self.scales, strict=True):
            values = (values - mean) / scale
        return values


def build_scorer(
    estimator: object, find_kernels: Callable[[], ScoreKernels | None] = installed_kernels
) -> Scorer:
    """Returns the scorer of a fitted binary classifier whose second class is the positive one.

    Without kernels it is scikit-learn that scores, with the same result.

    Raises:
        ValueError: not a fitted binary classifier, or its arrays contradict each other.
    """
    model: Any = estimator
    scale, model = split_pipeline(model) if isinstance(model, Pipeline) else (None, model)
    if len(getattr(model, "classes_", ())) != 2:
        raise ValueError("not a fitted classifier of two classes")
    if type(model) is LogisticRegression:
        return _build_logistic(model, scale, find_kernels())
    if type(model) is RandomForestClassifier:
        score = _build_forest(model, find_kernels())
    elif type(model) is HistGradientBoostingClassifier:
        score = _build_boosting(model, find_kernels())
    else:
        name = type(model).__name__
        _LOG.warning("no deterministic scorer for %s: batches may differ in the last bits", name)
        score = _build_by_itself(model)
    return score if scale is None else lambda values: score(scale(values))


def split_pipeline(pipeline: Any) -> tuple[Scaling, Any]:
    """Returns what the pipeline's scalers do to feature values, and its classifier.

    Raises:
        ValueError: something else than standard scalers stands before the classifier.
    """
    *scalers, last = (step for _, step in pipeline.steps)
    if not all(type(scaler) is StandardScaler for scaler in scalers):
        raise ValueError("only standard scalers may stand before the classifier")
    shape = (len(scalers), pipeline.n_features_in_)
    scaling = Scaling(np.zeros(shape), np.ones(shape))
    for place, scaler in enumerate(scalers):
        if scaler.with_mean:
            scaling.means[place] = scaler.mean_
        if scaler.with_std:
            scaling.scales[place] = scaler.scale_
    return scaling, last


def _build_by_itself(model: Any) -> Scorer:
    def score(values: FloatArray) -> FloatArray:
        if len(values) == 0:
            return np.empty(0)
        return np.ascontiguousarray(model.predict_proba(values)[:, 1], dtype=np.float64)

    return score


def _build_forest(model: Any, kernels: ScoreKernels | None) -> Scorer:
    trees = read_forest(model)
    count = len(trees)
    if kernels is not None:
        sum_trees = kernels.build_tree_sum(trees, model.n_features_in_, single_precision=True)
        return lambda values: sum_trees(values) / count
    members = [member.tree_ for member in model.estimators_]

    def score(values: FloatArray) -> FloatArray:
        # Trees compare in float32; the clip keeps a huge value a value instead of an infinity.
        rows = np.ascontiguousarray(np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX), dtype=np.float32)
        total = np.zeros(len(rows))
        for tree in members:
            total += tree.predict(rows)[:, 1]
        return total / count

    return score


def _build_boosting(model: Any, kernels: ScoreKernels | None) -> Scorer:
    trees = read_boosting(model)
    if kernels is not None:
        start = float(model._baseline_prediction[0, 0])  # noqa: SLF001
        return _link(kernels.build_tree_sum(trees, model.n_features_in_, start=start))

    def log_odds(values: FloatArray) -> FloatArray:
        if len(values) == 0:
            return np.empty(0)
        # The public method takes all cores; a thread pool costs more than it gives for a batch.
        raw: FloatArray = model._raw_predict(np.ascontiguousarray(values), n_threads=1)  # noqa: SLF001
        return raw[:, 0]

    return _link(log_odds)


def _build_logistic(model: Any, scale: Scaling | None, kernels: ScoreKernels | None) -> Scorer:
    if model.coef_.shape != (1, model.n_features_in_):
        raise ValueError("the coefficients do not fit the features")
    weights, intercept = model.coef_[0].astype(np.float64), float(model.intercept_[0])
    if scale is None:
        scale = Scaling(*np.empty((2, 0, len(weights))))
    if kernels is not None:
        return _link(kernels.build_linear_sum(weights, intercept, scale.means, scale.scales))

    def log_odds(values: FloatArray) -> FloatArray:
        # Column by column: every row adds its terms in the same order, whatever the size of the batch.
        scaled = scale(values)
        total = np.full(len(scaled), intercept)
        for column, weight in enumerate(weights):
            total += scaled[:, column] * weight
        return total

    return _link(log_odds)


def _link(log_odds: RowSum) -> Scorer:
    def score(values: FloatArray) -> FloatArray:
        probability: FloatArray = expit(log_odds(values))
        return probability

    return score
