"""Raw scores: equal to scikit-learn, and the same for a row whatever batch it stands in."""

import logging
from functools import cache

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from app.ai.inference import build_scorer

ROWS = np.random.default_rng(7).normal(size=(600, 6)) * [1, 10, 0.1, 1000, 1, 3]
LABELS = (ROWS[:, 0] + ROWS[:, 1] / 10 + np.random.default_rng(8).normal(size=600) > 0).astype(int)
WITH_NAN = np.where(np.random.default_rng(9).random(ROWS.shape) < 0.2, np.nan, ROWS)

ESTIMATORS = {
    "forest": RandomForestClassifier(30, max_depth=6, class_weight="balanced", random_state=1),
    "boosting": HistGradientBoostingClassifier(max_iter=30, random_state=1),
    "logistic": LogisticRegression(class_weight="balanced", max_iter=10_000),
    "scaled logistic": make_pipeline(StandardScaler(), LogisticRegression()),
    "half-scaled logistic": make_pipeline(StandardScaler(with_mean=False), LogisticRegression()),
    "centred forest": make_pipeline(
        StandardScaler(with_std=False), RandomForestClassifier(10, random_state=1)
    ),
}


@cache
def fitted(name):
    return clone(ESTIMATORS[name]).fit(ROWS, LABELS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_scorer_gives_what_scikit_learn_gives(name):
    estimator = fitted(name)
    scores = build_scorer(estimator)(ROWS)
    tolerance = 5e-16 if "logistic" in name else 0.0
    assert scores.dtype == np.float64
    assert scores.shape == (600,)
    assert np.abs(scores - estimator.predict_proba(ROWS)[:, 1]).max() <= tolerance


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 65, 255, 599])
def test_a_row_scores_the_same_bit_for_bit_in_a_batch_of_any_size(name, size):
    score = build_scorer(fitted(name))
    whole = score(ROWS)
    for start in range(0, 600 - size, max(size, 61)):
        assert_array_equal(score(ROWS[start : start + size]), whole[start : start + size], strict=True)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_memory_layout_of_a_batch_changes_nothing(name):
    score = build_scorer(fitted(name))
    whole = score(ROWS)
    assert_array_equal(score(np.asfortranarray(ROWS)), whole)
    assert_array_equal(score(ROWS[::-3]), whole[::-3])
    assert_array_equal(score(np.repeat(ROWS, 2, axis=1)[:, ::2]), whole)


@pytest.mark.parametrize("name", ["forest", "boosting"])
def test_missing_values_take_the_way_the_trees_learned_for_them(name):
    estimator = clone(ESTIMATORS[name]).fit(WITH_NAN, LABELS)
    score = build_scorer(estimator)
    assert_array_equal(score(WITH_NAN), estimator.predict_proba(WITH_NAN)[:, 1])
    assert_array_equal(np.concatenate([score(row[None]) for row in WITH_NAN[:50]]), score(WITH_NAN)[:50])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_beyond_float32_are_scored_and_the_score_stays_in_bounds(name):
    score = build_scorer(fitted(name))
    huge = np.array([[1e300] * 6, [-1e300] * 6, [3.5e38] * 6, [5e-324] * 6])
    scores = score(huge)
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_the_input_is_left_as_it_was():
    for name in ESTIMATORS:
        rows = ROWS.copy()
        build_scorer(fitted(name))(rows)
        assert_array_equal(rows, ROWS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_empty_batch_has_no_scores(name):
    assert build_scorer(fitted(name))(ROWS[:0]).shape == (0,)


def test_any_other_classifier_is_scored_by_its_own_method_and_the_log_says_so(caplog):
    estimator = GaussianNB().fit(ROWS, LABELS)
    with caplog.at_level(logging.WARNING):
        score = build_scorer(estimator)
    assert "GaussianNB" in caplog.text
    assert_array_equal(score(ROWS), estimator.predict_proba(ROWS)[:, 1])
    assert score(ROWS[:0]).shape == (0,)


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(),
        GaussianNB().fit(ROWS, np.arange(600) % 3),
        RandomForestClassifier(2).fit(ROWS, np.zeros(600)),
        make_pipeline(MinMaxScaler(), LogisticRegression()).fit(ROWS, LABELS),
        StandardScaler().fit(ROWS),
        object(),
    ],
    ids=["unfitted", "three classes", "one class", "another scaler", "no classifier", "anything"],
)
def test_what_is_not_a_fitted_binary_classifier_is_refused(estimator):
    with pytest.raises(ValueError, match=r"classifier|scaler"):
        build_scorer(estimator)


def _forest_with(change):
    forest = RandomForestClassifier(3, max_depth=3, random_state=1).fit(ROWS, LABELS)
    tree = forest.estimators_[1].tree_
    state = tree.__getstate__()
    nodes = state["nodes"].copy()
    change(nodes)
    tree.__setstate__({**state, "nodes": nodes})
    return forest


def _boosting_with(change):
    boosting = HistGradientBoostingClassifier(max_iter=3, random_state=1).fit(ROWS, LABELS)
    change(boosting._predictors[1][0].nodes)
    return boosting


@pytest.mark.parametrize(
    ("build", "field", "value"),
    [
        (_forest_with, "left_child", 10**6),
        (_forest_with, "right_child", 10**6),
        (_forest_with, "left_child", 0),
        (_forest_with, "right_child", -5),
        (_forest_with, "feature", 6),
        (_forest_with, "feature", -1),
        (_boosting_with, "left", 10**6),
        (_boosting_with, "right", 0),
        (_boosting_with, "feature_idx", 6),
        (_boosting_with, "feature_idx", -1),
        (_boosting_with, "is_categorical", 1),
    ],
)
def test_a_crafted_tree_that_would_crash_the_process_is_refused(build, field, value):
    def change(nodes):
        nodes[field][0] = value

    with pytest.raises(ValueError, match=r"tree|categorical"):
        build_scorer(build(change))


def test_a_forest_whose_trees_belong_to_another_forest_is_refused():
    forest = RandomForestClassifier(2, random_state=1).fit(ROWS, LABELS)
    forest.estimators_[0] = RandomForestClassifier(2).fit(ROWS[:, :3], LABELS).estimators_[0]
    with pytest.raises(ValueError, match="another shape"):
        build_scorer(forest)
