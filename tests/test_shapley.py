"""Contributions to the raw score: equal to Shapley's own formula, worked out coalition by coalition."""

from collections.abc import Callable
from functools import cache, partial
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from app.ai.estimators import build_scorer, read_estimator
from app.ai.score_shapley import ScoreExplainer, build_score_explainer

RANDOM = np.random.default_rng(5)
ROWS = np.round(RANDOM.normal(size=(400, 6)) * [1, 5, 1, 0.2, 2, 1], 2)
LABELS = (ROWS[:, 0] + ROWS[:, 1] * ROWS[:, 2] / 5 + RANDOM.normal(size=400) > 0).astype(int)
MEANS = ROWS.mean(axis=0)
WITH_NAN = np.where(RANDOM.random(ROWS.shape) < 0.25, np.nan, ROWS)
ALONE = tuple((feature,) for feature in range(6))
GROUPED = ((0, 3), (1,), (2, 4, 5))
NAN = float("nan")


@cache
def forest(gaps: bool = False) -> RandomForestClassifier:
    model = RandomForestClassifier(5, max_depth=7, class_weight="balanced", random_state=1)
    return model.fit(WITH_NAN if gaps else ROWS, LABELS)


@cache
def boosting(gaps: bool = True) -> HistGradientBoostingClassifier:
    model = HistGradientBoostingClassifier(
        max_iter=6, max_leaf_nodes=15, min_samples_leaf=5, early_stopping=False, random_state=1
    )
    return model.fit(WITH_NAN if gaps else ROWS, LABELS)


@cache
def logistic(scaled: bool = True) -> Any:
    model = LogisticRegression(C=0.5)
    return (make_pipeline(StandardScaler(), model) if scaled else model).fit(ROWS, LABELS)


def shapley(worth: Callable[[frozenset[int]], float], players: int) -> list[float]:
    """Shapley's formula (1953), word for word."""
    values = []
    for player in range(players):
        others = [other for other in range(players) if other != player]
        values.append(
            sum(
                factorial(size)
                * factorial(players - size - 1)
                / factorial(players)
                * (worth(frozenset({*coalition, player})) - worth(frozenset(coalition)))
                for size in range(players)
                for coalition in combinations(others, size)
            )
        )
    return values


def walk_forest(model: RandomForestClassifier, row: Any, known: set[int]) -> float:
    """What the forest expects when only these features are known: both ways at the others."""

    def expect(tree: Any, node: int) -> float:
        left, right = tree.children_left[node], tree.children_right[node]
        if left == -1:
            return float(tree.value[node, 0, 1])
        if tree.feature[node] in known:
            value = np.float32(row[tree.feature[node]])
            goes_left = tree.missing_go_to_left[node] if np.isnan(value) else value <= tree.threshold[node]
            return expect(tree, left if goes_left else right)
        rows = tree.n_node_samples
        return float((rows[left] * expect(tree, left) + rows[right] * expect(tree, right)) / rows[node])

    return sum(expect(member.tree_, 0) for member in model.estimators_) / len(model.estimators_)


def walk_boosting(model: HistGradientBoostingClassifier, row: Any, known: set[int]) -> float:
    """The same of boosting, in log-odds."""

    def expect(nodes: Any, place: int) -> float:
        node = nodes[place]
        if node["is_leaf"]:
            return float(node["value"])
        if node["feature_idx"] in known:
            value = row[node["feature_idx"]]
            goes_left = node["missing_go_to_left"] if np.isnan(value) else value <= node["num_threshold"]
            return expect(nodes, node["left"] if goes_left else node["right"])
        sides = [(int(nodes[node[side]]["count"]), expect(nodes, node[side])) for side in ("left", "right")]
        return sum(rows * value for rows, value in sides) / int(node["count"])

    trees = sum(expect(predictor.nodes, 0) for (predictor,) in model._predictors)
    return float(model._baseline_prediction[0, 0]) + trees


def walk_logistic(model: Any, row: Any, known: set[int]) -> float:
    """The same of logistic regression, in log-odds: unknown features have their training means."""
    filled = np.where([feature in known for feature in range(len(row))], row, MEANS)
    return float(model.decision_function(filled[None])[0])


def by_brute_force(walk: Any, model: Any, row: Any, groups: Any) -> tuple[float, list[float]]:
    """The baseline and each group's Shapley value on the scale `walk` works on."""

    @cache
    def worth(coalition: frozenset[int]) -> float:
        return float(walk(model, row, {feature for group in coalition for feature in groups[group]}))

    return worth(frozenset()), shapley(worth, len(groups))


def explain(model: Any, groups: Any = ALONE) -> ScoreExplainer:
    return build_score_explainer(read_estimator(model), groups, MEANS)


@pytest.mark.parametrize("groups", [ALONE, GROUPED])
@pytest.mark.parametrize("gaps", [False, True])
def test_a_forests_contributions_are_shapley_values_of_its_score(groups: Any, gaps: bool) -> None:
    rows = (WITH_NAN if gaps else ROWS)[:8]
    explainer = explain(forest(gaps), groups)
    for row, found in zip(rows, explainer.contributions(rows), strict=True):
        baseline, expected = by_brute_force(walk_forest, forest(gaps), row, groups)
        assert_allclose(found, expected, rtol=0, atol=1e-12)
        assert explainer.baseline == pytest.approx(baseline, abs=1e-12)


@pytest.mark.parametrize("groups", [ALONE, GROUPED])
@pytest.mark.parametrize(
    ("walk", "fit"),
    [
        (walk_boosting, partial(boosting, gaps=False)),
        (walk_boosting, partial(boosting, gaps=True)),
        (walk_logistic, partial(logistic, scaled=False)),
        (walk_logistic, partial(logistic, scaled=True)),
    ],
    ids=["boosting", "boosting with gaps", "logistic", "scaled logistic"],
)
def test_log_odds_contributions_are_shapley_values_brought_to_the_scale_of_scores(
    walk: Any, fit: Callable[[], Any], groups: Any
) -> None:
    model = fit()
    rows = (ROWS if walk is walk_logistic else WITH_NAN)[:8]
    explainer = explain(model, groups)
    for row, found in zip(rows, explainer.contributions(rows), strict=True):
        baseline, log_odds = by_brute_force(walk, model, row, groups)
        slope = (expit(baseline + sum(log_odds)) - expit(baseline)) / sum(log_odds)
        assert_allclose(found, slope * np.array(log_odds), rtol=0, atol=1e-12)
        assert explainer.baseline == pytest.approx(float(expit(baseline)), abs=1e-12)


@settings(deadline=None)  # the first example fits its model
@given(
    st.sampled_from(["forest", "boosting", "logistic"]),
    st.lists(
        st.one_of(st.floats(-20, 20), st.sampled_from([NAN, 0.0, 1e300, -1e300, 5e-324])),
        min_size=6,
        max_size=6,
    ),
)
def test_baseline_and_contributions_add_up_to_the_raw_score_of_any_lead(
    name: str, values: list[float]
) -> None:
    model = {"forest": forest(gaps=True), "boosting": boosting(), "logistic": logistic()}[name]
    row = np.nan_to_num(np.array([values]), nan=0.0) if name == "logistic" else np.array([values])
    explainer = explain(model, GROUPED)
    contributions = explainer.contributions(row)
    assert np.isfinite(contributions).all()
    total = explainer.baseline + contributions.sum()
    assert total == pytest.approx(build_scorer(model)(row)[0], abs=1e-12)


def test_a_lead_that_is_just_like_the_baseline_has_finite_contributions_that_add_up() -> None:
    explainer = explain(logistic())
    for distance in (0.0, 1e-12, 1e-7, 1e-5, 1e-4):
        row = (MEANS + distance * np.array([1, -1, 1, 1, -1, 1]))[None]
        total = explainer.baseline + explainer.contributions(row).sum()
        assert total == pytest.approx(build_scorer(logistic())(row)[0], abs=1e-14)


@pytest.mark.parametrize("fit", [forest, boosting, logistic], ids=["forest", "boosting", "logistic"])
def test_a_leads_contributions_do_not_depend_on_its_batch_to_the_last_bit(fit: Callable[[], Any]) -> None:
    model = fit()
    rows = np.tile(ROWS, (20, 1))
    explainer = explain(model)
    together = explainer.contributions(rows)
    assert_array_equal(together[:400], together[-400:])
    assert_array_equal(
        np.concatenate([explainer.contributions(row[None]) for row in ROWS[:60]]), together[:60]
    )
    assert explainer.contributions(ROWS[:0]).shape == (0, 6)


def test_a_feature_the_model_never_asks_contributes_nothing() -> None:
    model = RandomForestClassifier(3, max_depth=3, random_state=1).fit(ROWS * [1, 0, 1, 0, 0, 0], LABELS)
    assert not explain(model).contributions(ROWS)[:, [1, 3, 4, 5]].any()


def test_trees_that_never_ask_anything_explain_everything_by_the_baseline() -> None:
    model = RandomForestClassifier(3, max_depth=1, min_samples_leaf=300, random_state=1).fit(ROWS, LABELS)
    explainer = explain(model)
    assert not explainer.contributions(ROWS).any()
    assert explainer.baseline == pytest.approx(build_scorer(model)(ROWS)[0])


def test_a_tree_whose_counts_of_rows_are_gone_is_refused() -> None:
    model = RandomForestClassifier(2, max_depth=3, random_state=1).fit(ROWS, LABELS)
    tree = model.estimators_[0].tree_
    state = tree.__getstate__()
    nodes = state["nodes"].copy()
    nodes["n_node_samples"] = 0
    tree.__setstate__({**state, "nodes": nodes})
    with pytest.raises(ValueError, match="without training rows"):
        explain(model)
