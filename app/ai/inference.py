"""Raw scores: from a fitted estimator to a function of feature values, built once when a model is loaded.

Row i of a batch is scored as if it were alone, bit for bit, on one thread. scikit-learn's own `predict_proba`
does not promise that: matrix products sum in an order that depends on the batch. Pure: never loads an
estimator. Called by `model_bundle`. This is where another inference engine would be put in.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from app.ai.domain import FloatArray

Scorer = Callable[[FloatArray], FloatArray]
"""Feature values (n, k), float64, to raw scores of the positive class (n,), in [0, 1]."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LOG = logging.getLogger(__name__)


def build_scorer(estimator: object) -> Scorer:
    """Returns the scorer of a fitted binary classifier whose second class is the positive one.

    Raises:
        ValueError: not a fitted binary classifier, or its arrays contradict each other.
    """
    model: Any = estimator
    if isinstance(model, Pipeline):
        return _build_pipeline(model)
    if len(getattr(model, "classes_", ())) != 2:
        raise ValueError("not a fitted classifier of two classes")
    if type(model) is RandomForestClassifier:
        return _build_forest(model)
    if type(model) is HistGradientBoostingClassifier:
        return _build_boosting(model)
    if type(model) is LogisticRegression:
        return _build_logistic(model)
    _LOG.warning("no deterministic scorer for %s: batches may differ in the last bits", type(model).__name__)
    return lambda values: _predict_by_itself(model, values)


def _predict_by_itself(model: Any, values: FloatArray) -> FloatArray:
    if len(values) == 0:
        return np.empty(0)
    return np.ascontiguousarray(model.predict_proba(values)[:, 1], dtype=np.float64)


def _build_pipeline(pipeline: Any) -> Scorer:
    scale, last = split_pipeline(pipeline)
    score = build_scorer(last)
    return lambda values: score(scale(values))


def split_pipeline(pipeline: Any) -> tuple[Callable[[FloatArray], FloatArray], Any]:
    """Returns what the pipeline's scalers do to feature values (n, k), and its classifier.

    Raises:
        ValueError: something else than standard scalers stands before the classifier.
    """
    *scalers, last = (step for _, step in pipeline.steps)
    if not all(type(scaler) is StandardScaler for scaler in scalers):
        raise ValueError("only standard scalers may stand before the classifier")
    # What StandardScaler computes, one element at a time.
    means = [np.asarray(scaler.mean_ if scaler.with_mean else 0.0) for scaler in scalers]
    scales = [np.asarray(scaler.scale_ if scaler.with_std else 1.0) for scaler in scalers]

    def scale_values(values: FloatArray) -> FloatArray:
        for mean, scale in zip(means, scales, strict=True):
            values = (values - mean) / scale
        return values

    return scale_values, last


def _build_forest(model: Any) -> Scorer:
    trees = [member.tree_ for member in model.estimators_]
    for tree in trees:
        if tree.n_features != model.n_features_in_ or tree.n_outputs != 1 or int(tree.n_classes[0]) != 2:
            raise ValueError("a tree of the forest has another shape than the forest")
        _check_tree(tree.children_left, tree.children_right, tree.feature, tree.n_features)

    def score(values: FloatArray) -> FloatArray:
        # Trees compare in float32; the clip keeps a huge value a value instead of an infinity.
        rows = np.ascontiguousarray(np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX), dtype=np.float32)
        total = np.zeros(len(rows))
        for tree in trees:
            total += tree.predict(rows)[:, 1]
        return total / len(trees)

    return score


def _build_boosting(model: Any) -> Scorer:
    for (predictor,) in model._predictors:  # noqa: SLF001  the fitted trees have no public name
        nodes = predictor.nodes
        if nodes["is_categorical"].any():
            raise ValueError("categorical splits are not supported: encode categories as features")
        leaf = nodes["is_leaf"].astype(bool)
        left, right = (np.where(leaf, -1, nodes[side].astype(np.int64)) for side in ("left", "right"))
        _check_tree(left, right, nodes["feature_idx"], model.n_features_in_)

    def score(values: FloatArray) -> FloatArray:
        if len(values) == 0:
            return np.empty(0)
        # The public method takes all cores; a thread pool costs more than it gives for a batch.
        raw = model._raw_predict(np.ascontiguousarray(values), n_threads=1)  # noqa: SLF001
        probability: FloatArray = expit(raw[:, 0])
        return probability

    return score


def _build_logistic(model: Any) -> Scorer:
    weights, intercept = model.coef_[0].astype(np.float64), float(model.intercept_[0])
    if model.coef_.shape != (1, model.n_features_in_):
        raise ValueError("the coefficients do not fit the features")

    def score(values: FloatArray) -> FloatArray:
        # Column by column: every row adds its terms in the same order, whatever the size of the batch.
        total = np.full(len(values), intercept)
        for column, weight in enumerate(weights):
            total += values[:, column] * weight
        probability: FloatArray = expit(total)
        return probability

    return score


def _check_tree(left: Any, right: Any, feature: Any, n_features: int) -> None:
    """Refuses a tree whose indices point outside it or back up.

    scikit-learn follows them without looking, so a crafted file could crash the process or never end.
    """
    index = np.arange(len(left))
    inner = left != -1
    for child in (left[inner], right[inner]):
        if not ((child > index[inner]) & (child < len(index))).all():
            raise ValueError("a tree has a child outside itself")
    if not ((feature[inner] >= 0) & (feature[inner] < n_features)).all():
        raise ValueError("a tree splits on a feature that does not exist")
