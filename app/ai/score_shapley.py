"""What each group of features adds to the raw score: exact Shapley values of the models we serve.

They are taken on the scale on which a model adds up: the score itself for a forest, the log-odds for boosting
and logistic regression. A coalition knows the lead's values in its groups; the rest is averaged out over the
training rows, by the trees' own counts, or for a linear model by the training means.

Log-odds contributions come to the scale of scores by Aumann and Shapley's rule for the link between them
(Values of Non-Atomic Games, 1974; as integrated gradients: Sundararajan et al., ICML 2017): along the
straight way from the baseline to the lead every contribution is worth the same mean slope of the logistic
curve. So they keep their signs and proportions, and add up to the difference of the two scores.

Pure: never loads an estimator. Called by `model_bundle`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from app.ai.domain import FloatArray, IntArray
from app.ai.fitted_trees import read_boosting, read_forest
from app.ai.inference import split_pipeline
from app.ai.tree_shapley import build_tree_game

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreExplainer:
    """`baseline` is the raw score of a lead of which nothing is known.

    `contributions` takes safe feature values (n, k) to what each group adds to the baseline (n, groups);
    baseline and contributions add up to the raw score.
    """

    baseline: float
    contributions: Callable[[FloatArray], FloatArray]


def build_score_explainer(
    estimator: object, groups: Sequence[Sequence[int]], means: FloatArray
) -> ScoreExplainer:
    """Returns the explainer of an estimator that `build_scorer` takes; `means` (k,) are the training means.

    Raises:
        ValueError: not such an estimator, or a tree without its counts of training rows.
    """
    player_of = np.empty(len(means), np.int64)
    for player, group in enumerate(groups):
        player_of[list(group)] = player
    model: Any = estimator
    if isinstance(model, Pipeline):
        scale, last = split_pipeline(model)
        inner = _explain(last, player_of, scale(means[None])[0])
        return ScoreExplainer(inner.baseline, lambda values: inner.contributions(scale(values)))
    return _explain(model, player_of, means)


def _explain(model: Any, player_of: IntArray, means: FloatArray) -> ScoreExplainer:
    if type(model) is RandomForestClassifier:
        return _explain_forest(model, player_of)
    if type(model) is HistGradientBoostingClassifier:
        return _explain_boosting(model, player_of)
    if type(model) is LogisticRegression:
        return _explain_logistic(model, player_of, means)
    raise ValueError(f"there are no exact contributions for {type(model).__name__}")


def _explain_forest(model: Any, player_of: IntArray) -> ScoreExplainer:
    trees = read_forest(model)
    game = build_tree_game([tree._replace(value=tree.value / len(trees)) for tree in trees], player_of)

    def contributions(values: FloatArray) -> FloatArray:
        # As the scorer does: trees compare in single precision.
        return game.values(np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX).astype(np.float32))

    return ScoreExplainer(game.baseline, contributions)


def _explain_boosting(model: Any, player_of: IntArray) -> ScoreExplainer:
    game = build_tree_game(read_boosting(model), player_of)
    start = game.baseline + float(model._baseline_prediction[0, 0])  # noqa: SLF001
    return _link(start, game.values)


def _explain_logistic(model: Any, player_of: IntArray, means: FloatArray) -> ScoreExplainer:
    weights = model.coef_[0].astype(np.float64)
    start = float(model.intercept_[0]) + float((weights * means).sum())

    def contributions(values: FloatArray) -> FloatArray:
        phi = np.zeros((len(values), int(player_of.max()) + 1))
        for column, weight in enumerate(weights):
            phi[:, player_of[column]] += weight * (values[:, column] - means[column])
        return phi

    return _link(start, contributions)


def _link(start: float, log_odds: Callable[[FloatArray], FloatArray]) -> ScoreExplainer:
    """Brings contributions to the log-odds, which begin at `start`, to the scale of scores."""
    baseline = float(expit(start))

    def contributions(values: FloatArray) -> FloatArray:
        phi = log_odds(values)
        way = np.zeros(len(phi))
        for column in range(phi.shape[1]):
            way += phi[:, column]
        middle = expit(start + way / 2)
        near = np.abs(way) < 1e-5
        slope = np.where(
            near, middle * (1 - middle), (expit(start + way) - baseline) / np.where(near, 1.0, way)
        )
        points: FloatArray = phi * slope[:, None]
        return points

    return ScoreExplainer(baseline, contributions)
