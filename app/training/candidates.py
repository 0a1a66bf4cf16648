"""The models a training chooses between: three model types, each with a small search.

The settings span what tables of leads of very different size and strength have asked for, from nearly linear
to many interactions; none is tuned to a particular relation. Pure. Called by `app.training.fit`,
`app.training.choose` and `app.training.train`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from app.training.options import ModelType

EstimatorType = Literal["random_forest", "logistic_regression", "hist_gradient_boosting"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model type with its settings, under the name people read.

    With a `half_life` recent leads weigh more in its fit (see `recency.recency_weights`).
    """

    model_type: EstimatorType
    name: str
    params: Mapping[str, Any]
    half_life: float | None = None


def _logistic(strength: float) -> Candidate:
    return Candidate("logistic_regression", f"logistic regression, C {strength}", {"C": strength})


def _forest(trees: int, depth: int | None, leaf: int, weight: str | None) -> Candidate:
    shape = f"depth {depth}" if depth else "any depth"
    return Candidate(
        "random_forest",
        f"random forest, {trees} trees of {shape}, leaves of {leaf}{', balanced' if weight else ''}",
        {"n_estimators": trees, "max_depth": depth, "min_samples_leaf": leaf, "class_weight": weight},
    )


def _boosting(rate: float, rounds: int, leaves: int, share: float, ridge: float) -> Candidate:
    return Candidate(
        "hist_gradient_boosting",
        f"boosting, {rounds} trees of {leaves} leaves, rate {rate}, {share:.0%} of features a split",
        {
            "learning_rate": rate, "max_iter": rounds, "max_leaf_nodes": leaves, "max_features": share,
            "l2_regularization": ridge,
        },
    )  # fmt: skip


CANDIDATES = (
    _logistic(0.1),
    _logistic(0.01),
    _logistic(1.0),
    _forest(100, 8, 15, "balanced"),
    _forest(300, 10, 1, "balanced"),
    _forest(200, None, 5, None),
    _boosting(0.06, 100, 15, 1.0, 0.0),
    _boosting(0.03, 400, 15, 0.1, 1.0),
    _boosting(0.03, 200, 4, 0.5, 5.0),
)
"""The first of each type is what is fitted when somebody asks for that type."""


def list_candidates(model: ModelType) -> tuple[Candidate, ...]:
    """Returns every candidate for `auto`, and otherwise the one that stands for the model type."""
    if model == "auto":
        return CANDIDATES
    return (next(candidate for candidate in CANDIDATES if candidate.model_type == model),)


def build_estimator(candidate: Candidate, seed: int) -> Any:
    """Returns an unfitted estimator that takes one core."""
    params = dict(candidate.params)
    if candidate.model_type == "logistic_regression":
        return make_pipeline(StandardScaler(), LogisticRegression(**params, max_iter=1000))
    if candidate.model_type == "hist_gradient_boosting":
        return HistGradientBoostingClassifier(**params, early_stopping=False, random_state=seed)
    return RandomForestClassifier(**params, n_jobs=1, random_state=seed)
