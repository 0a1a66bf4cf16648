"""What is known of scikit-learn's estimators: their fitted parts as plain arrays, and how they score.

The only file besides `artifact_loading` that a service imports scikit-learn by, and it does so only where the
compiled loops are not installed, or for a classifier they do not know. Row i of a batch is scored as if it
were alone, bit for bit, on one thread, which `predict_proba` does not promise: matrix products sum in an
order that depends on the batch. Pure: never loads an estimator. Called by `artifact_loading`, `loaded_model`
and training.
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
from app.ai.fitted_model import FittedModel, Scaling
from app.ai.fitted_trees import Tree
from app.ai.inference import Scorer, build_compiled_scorer
from app.ai.score_kernels import RowSum, ScoreKernels, installed_kernels

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LOG = logging.getLogger(__name__)


def build_scorer(
    estimator: object, find_kernels: Callable[[], ScoreKernels | None] = installed_kernels
) -> Scorer:
    """Returns the scorer of a fitted binary classifier whose second class is the positive one.

    Without kernels it is scikit-learn that scores, with the same result.

    Raises:
        ValueError: not a fitted binary classifier, or its arrays contradict each other.
    """
    return build_scorer_of(estimator, read_estimator(estimator), find_kernels())


def build_scorer_of(estimator: object, fitted: FittedModel | None, kernels: ScoreKernels | None) -> Scorer:
    """Returns the scorer of a classifier whose arrays, if they are known, have been read."""
    if fitted is None:
        name = type(_split_pipeline(estimator)[1]).__name__
        _LOG.warning("no deterministic scorer for %s: batches may differ in the last bits", name)
    elif kernels is not None:
        return build_compiled_scorer(fitted, kernels)
    return _build_by_scikit_learn(estimator, fitted)


def read_estimator(estimator: object) -> FittedModel | None:
    """Returns the arrays of a fitted binary classifier; None for a kind whose arrays are not known.

    Raises:
        ValueError: not a fitted binary classifier, or its arrays contradict each other.
    """
    scaling, model = _split_pipeline(estimator)
    if len(getattr(model, "classes_", ())) != 2:
        raise ValueError("not a fitted classifier of two classes")
    if scaling is None:
        scaling = Scaling(*np.empty((2, 0, model.n_features_in_)))
    if type(model) is RandomForestClassifier:
        fitted = FittedModel("forest", scaling, _read_forest(model))
    elif type(model) is HistGradientBoostingClassifier:
        start = float(model._baseline_prediction[0, 0])  # noqa: SLF001
        fitted = FittedModel("boosting", scaling, _read_boosting(model), start)
    elif type(model) is LogisticRegression:
        if model.coef_.shape != (1, model.n_features_in_):
            raise ValueError("the coefficients do not fit the features")
        weights, start = model.coef_[0].astype(np.float64), float(model.intercept_[0])
        fitted = FittedModel("logistic", scaling, start=start, weights=weights)
    else:
        return None
    fitted.check()
    return fitted


def _split_pipeline(estimator: Any) -> tuple[Scaling | None, Any]:
    """Returns what the scalers of a pipeline do to feature values, and its classifier, or the estimator."""
    if not isinstance(estimator, Pipeline):
        return None, estimator
    *scalers, last = (step for _, step in estimator.steps)
    if not all(type(scaler) is StandardScaler for scaler in scalers):
        raise ValueError("only standard scalers may stand before the classifier")
    shape = (len(scalers), estimator.n_features_in_)
    scaling = Scaling(np.zeros(shape), np.ones(shape))
    for place, scaler in enumerate(scalers):
        if scaler.with_mean:
            scaling.means[place] = scaler.mean_
        if scaler.with_std:
            scaling.scales[place] = scaler.scale_
    return scaling, last


def _read_forest(model: Any) -> list[Tree]:
    """Returns the trees of a `RandomForestClassifier`; a leaf's value is its positive share."""
    trees = []
    for tree in (member.tree_ for member in model.estimators_):
        if tree.n_features != model.n_features_in_ or tree.n_outputs != 1 or int(tree.n_classes[0]) != 2:
            raise ValueError("a tree of the forest has another shape than the forest")
        trees.append(
            Tree(
                tree.children_left,
                tree.children_right,
                tree.feature,
                tree.threshold,
                tree.missing_go_to_left.astype(np.bool_),
                # Rows, not weights: what is expected of a lead is the mean over the leads there are.
                tree.n_node_samples.astype(np.float64),
                tree.value[:, 0, 1],
            )
        )
    return trees


def _read_boosting(model: Any) -> list[Tree]:
    """Returns the trees of a `HistGradientBoostingClassifier`; values are log-odds."""
    trees = []
    for (predictor,) in model._predictors:  # noqa: SLF001  the fitted trees have no public name
        nodes = predictor.nodes
        if nodes["is_categorical"].any():
            raise ValueError("categorical splits are not supported: encode categories as features")
        leaf = nodes["is_leaf"].astype(np.bool_)
        trees.append(
            Tree(
                np.where(leaf, -1, nodes["left"].astype(np.int64)),
                np.where(leaf, -1, nodes["right"].astype(np.int64)),
                nodes["feature_idx"].astype(np.int64),
                nodes["num_threshold"],
                nodes["missing_go_to_left"].astype(np.bool_),
                nodes["count"].astype(np.float64),
                nodes["value"],
            )
        )
    return trees


def _build_by_scikit_learn(estimator: Any, fitted: FittedModel | None) -> Scorer:
    scaling, model = _split_pipeline(estimator)
    if fitted is None:
        score = _build_by_itself(model)
    elif fitted.kind == "forest":
        score = _build_forest(model)
    else:
        log_odds = _build_boosting(model) if fitted.kind == "boosting" else _build_logistic(fitted)
        score = lambda values: np.asarray(expit(log_odds(values)))  # noqa: E731
    return score if scaling is None else lambda values: score(scaling(values))


def _build_by_itself(model: Any) -> Scorer:
    def score(values: FloatArray) -> FloatArray:
        if len(values) == 0:
            return np.empty(0)
        return np.ascontiguousarray(model.predict_proba(values)[:, 1], dtype=np.float64)

    return score


def _build_forest(model: Any) -> Scorer:
    members = [member.tree_ for member in model.estimators_]

    def score(values: FloatArray) -> FloatArray:
        # Trees compare in float32; the clip keeps a huge value a value instead of an infinity.
        rows = np.ascontiguousarray(np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX), dtype=np.float32)
        total = np.zeros(len(rows))
        for tree in members:
            total += tree.predict(rows)[:, 1]
        return total / len(members)

    return score


def _build_boosting(model: Any) -> RowSum:
    def log_odds(values: FloatArray) -> FloatArray:
        if len(values) == 0:
            return np.empty(0)
        # The public method takes all cores; a thread pool costs more than it gives for a batch.
        raw: FloatArray = model._raw_predict(np.ascontiguousarray(values), n_threads=1)  # noqa: SLF001
        return raw[:, 0]

    return log_odds


def _build_logistic(fitted: FittedModel) -> RowSum:
    def log_odds(values: FloatArray) -> FloatArray:
        # Column by column: every row adds its terms in the same order, whatever the size of the batch.
        total = np.full(len(values), fitted.start)
        for column, weight in enumerate(fitted.weights):
            total += values[:, column] * weight
        return total

    return log_odds
