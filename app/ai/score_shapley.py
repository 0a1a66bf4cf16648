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

import numpy as np

from app.ai.domain import FloatArray, IntArray
from app.ai.fitted_model import FittedModel
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
    model: FittedModel, groups: Sequence[Sequence[int]], means: FloatArray
) -> ScoreExplainer:
    """Returns the explainer of a model; `means` (k,) are the training means of its features.

    Raises:
        ValueError: a tree without its counts of training rows.
    """
    player_of = np.empty(len(means), np.int64)
    for player, group in enumerate(groups):
        player_of[list(group)] = player
    inner = _explain(model, player_of, model.scaling(means[None])[0])
    return ScoreExplainer(inner.baseline, lambda values: inner.contributions(model.scaling(values)))


def _explain(model: FittedModel, player_of: IntArray, means: FloatArray) -> ScoreExplainer:
    if model.kind == "forest":
        return _explain_forest(model, player_of)
    if model.kind == "boosting":
        game = build_tree_game(model.trees, player_of)
        return _link(game.baseline + model.start, game.values)
    return _explain_logistic(model, player_of, means)


def _explain_forest(model: FittedModel, player_of: IntArray) -> ScoreExplainer:
    count = len(model.trees)
    game = build_tree_game([tree._replace(value=tree.value / count) for tree in model.trees], player_of)

    def contributions(values: FloatArray) -> FloatArray:
        # As the scorer does: trees compare in single precision.
        return game.values(np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX).astype(np.float32))

    return ScoreExplainer(game.baseline, contributions)


def _explain_logistic(model: FittedModel, player_of: IntArray, means: FloatArray) -> ScoreExplainer:
    weights = model.weights
    start = model.start + float((weights * means).sum())

    def contributions(values: FloatArray) -> FloatArray:
        phi = np.zeros((len(values), int(player_of.max()) + 1))
        for column, weight in enumerate(weights):
            phi[:, player_of[column]] += weight * (values[:, column] - means[column])
        return phi

    return _link(start, contributions)


def _link(start: float, log_odds: Callable[[FloatArray], FloatArray]) -> ScoreExplainer:
    """Brings contributions to the log-odds, which begin at `start`, to the scale of scores."""
    baseline = float(_logistic(np.array(start)))

    def contributions(values: FloatArray) -> FloatArray:
        phi = log_odds(values)
        way = np.zeros(len(phi))
        for column in range(phi.shape[1]):
            way += phi[:, column]
        middle = _logistic(start + way / 2)
        near = np.abs(way) < 1e-5
        slope = np.where(
            near, middle * (1 - middle), (_logistic(start + way) - baseline) / np.where(near, 1.0, way)
        )
        points: FloatArray = phi * slope[:, None]
        return points

    return ScoreExplainer(baseline, contributions)


def _logistic(log_odds: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        probability: FloatArray = 1 / (1 + np.exp(-log_odds))
    return probability
