"""Raw scores: equal to scikit-learn, and the same for a row whatever batch it stands in."""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pkgutil import get_data

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from threadpoolctl import threadpool_limits

from app.ai.estimators import build_scorer
from app.ai.score_kernels import ScoreKernels, installed_kernels, load_kernels

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


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small fits on several threads take ten times as long where the cores are shared."""
    with threadpool_limits(1):
        yield


needs_kernels = pytest.mark.skipif(installed_kernels() is None, reason="installed without a C compiler")


@pytest.fixture(params=[pytest.param("compiled", marks=needs_kernels), "scikit-learn"])
def way(request):
    """Where `build_scorer` finds its loops."""
    return installed_kernels if request.param == "compiled" else lambda: None


@cache
def fitted(name):
    return clone(ESTIMATORS[name]).fit(ROWS, LABELS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_scorer_gives_what_scikit_learn_gives(name, way):
    estimator = fitted(name)
    scores = build_scorer(estimator, way)(ROWS)
    tolerance = 5e-16 if "logistic" in name else 0.0
    assert scores.dtype == np.float64
    assert scores.shape == (600,)
    assert np.abs(scores - estimator.predict_proba(ROWS)[:, 1]).max() <= tolerance


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 65, 255, 599])
def test_a_row_scores_the_same_bit_for_bit_in_a_batch_of_any_size(name, size, way):
    score = build_scorer(fitted(name), way)
    whole = score(ROWS)
    for start in range(0, 600 - size, max(size, 61)):
        assert_array_equal(score(ROWS[start : start + size]), whole[start : start + size], strict=True)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_memory_layout_of_a_batch_changes_nothing(name, way):
    score = build_scorer(fitted(name), way)
    whole = score(ROWS)
    assert_array_equal(score(np.asfortranarray(ROWS)), whole)
    assert_array_equal(score(ROWS[::-3]), whole[::-3])
    assert_array_equal(score(np.repeat(ROWS, 2, axis=1)[:, ::2]), whole)


@pytest.mark.parametrize("name", ["forest", "boosting"])
def test_missing_values_take_the_way_the_trees_learned_for_them(name, way):
    estimator = clone(ESTIMATORS[name]).fit(WITH_NAN, LABELS)
    score = build_scorer(estimator, way)
    assert_array_equal(score(WITH_NAN), estimator.predict_proba(WITH_NAN)[:, 1])
    assert_array_equal(np.concatenate([score(row[None]) for row in WITH_NAN[:50]]), score(WITH_NAN)[:50])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_beyond_float32_are_scored_and_the_score_stays_in_bounds(name, way):
    score = build_scorer(fitted(name), way)
    huge = np.array([[1e300] * 6, [-1e300] * 6, [3.5e38] * 6, [5e-324] * 6])
    scores = score(huge)
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_the_input_is_left_as_it_was(way):
    for name in ESTIMATORS:
        score, rows = build_scorer(fitted(name), way), ROWS.copy()
        scores = score(rows)
        assert_array_equal(rows, ROWS)
        rows.setflags(write=False)
        assert_array_equal(score(rows), scores)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_empty_batch_has_no_scores(name, way):
    assert build_scorer(fitted(name), way)(ROWS[:0]).shape == (0,)


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
        (_forest_with, "left_child", 2),
        (_forest_with, "feature", 6),
        (_forest_with, "feature", -1),
        (_forest_with, "threshold", np.nan),
        (_boosting_with, "left", 10**6),
        (_boosting_with, "right", 0),
        (_boosting_with, "left", 2),
        (_boosting_with, "num_threshold", np.nan),
        (_boosting_with, "feature_idx", 6),
        (_boosting_with, "feature_idx", -1),
        (_boosting_with, "is_categorical", 1),
    ],
)
def test_a_crafted_tree_that_would_crash_the_process_is_refused(build, field, value, way):
    def change(nodes):
        nodes[field][0] = value

    with pytest.raises(ValueError, match=r"tree|categorical"):
        build_scorer(build(change), way)


def test_a_forest_whose_trees_belong_to_another_forest_is_refused():
    forest = RandomForestClassifier(2, random_state=1).fit(ROWS, LABELS)
    forest.estimators_[0] = RandomForestClassifier(2).fit(ROWS[:, :3], LABELS).estimators_[0]
    with pytest.raises(ValueError, match="another shape"):
        build_scorer(forest)


@pytest.mark.parametrize("kept", [np.s_[:0], np.s_[None, :]])
def test_a_tree_without_nodes_or_of_another_shape_is_refused(kept, way):
    boosting = _boosting_with(lambda nodes: None)
    boosting._predictors[1][0].nodes = boosting._predictors[1][0].nodes[kept]
    with pytest.raises(ValueError, match="a tree"):
        build_scorer(boosting, way)


@pytest.mark.parametrize("attribute", ["mean_", "scale_"])
def test_a_scaler_for_another_number_of_features_is_refused(attribute, way):
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, LABELS)
    setattr(pipeline[0], attribute, np.ones(5))
    with pytest.raises(ValueError, match="shape"):
        build_scorer(pipeline, way)


@needs_kernels
@pytest.mark.parametrize("name", ESTIMATORS)
def test_rows_that_do_not_fit_the_model_never_reach_the_compiled_loops(name):
    score = build_scorer(fitted(name))
    for rows in (ROWS[:, :5], ROWS[0], np.hstack([ROWS, ROWS])):
        with pytest.raises(ValueError, match=r"features|broadcast"):
            score(rows)


SPECIAL = np.array(
    [
        np.nan,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        5e-324,
        -2.2e-308,
        1e-45,
        1.4e-40,
        1e300,
        -1e300,
        3.4028235e38,
        3.5e38,
    ]
)


def _thresholds(estimator):
    """Every value the estimator splits at."""
    if isinstance(estimator, RandomForestClassifier):
        return np.concatenate([member.tree_.threshold for member in estimator.estimators_])
    if isinstance(estimator, HistGradientBoostingClassifier):
        return np.concatenate([predictor.nodes["num_threshold"] for (predictor,) in estimator._predictors])
    return np.zeros(1)


@st.composite
def models_and_rows(draw, kind):
    """A fitted model of any shape, from single leaves to deep trees, and rows that are hard for it."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, width = draw(st.integers(3, 80)), draw(st.integers(1, 6))
    rows = random.normal(size=(n, width)) * 10.0 ** random.integers(-3, 4, width)
    if draw(st.booleans()):
        rows = np.round(rows)  # many equal values
    rows[:2] = [[-7.0], [7.0]]  # histograms need two different values
    outcomes = np.arange(n) % 2
    if kind == "forest":
        estimator = RandomForestClassifier(
            draw(st.integers(1, 35)),
            max_depth=draw(st.sampled_from([None, 1, 3])),
            min_samples_split=draw(st.sampled_from([2, 5, 1000])),
            max_leaf_nodes=draw(st.sampled_from([None, 2, 9])),
            random_state=0,
        )
    elif kind == "boosting":
        estimator = HistGradientBoostingClassifier(
            max_iter=draw(st.integers(1, 20)),
            min_samples_leaf=draw(st.sampled_from([1, 5, 1000])),
            max_depth=draw(st.sampled_from([None, 1, 3])),
            early_stopping=False,
            random_state=0,
        )
    else:
        scaler = StandardScaler(with_mean=draw(st.booleans()), with_std=draw(st.booleans()))
        estimator = make_pipeline(*[scaler][: draw(st.integers(0, 1))], LogisticRegression(max_iter=5000))
    if kind in ("forest", "boosting") and draw(st.booleans()):
        rows[2:][random.random(rows[2:].shape) < 0.2] = np.nan
    estimator.fit(rows, outcomes)
    ties = _thresholds(estimator)
    ties = np.concatenate(
        [ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), ties.astype(np.float32)]
    )
    asked = random.choice(np.concatenate([ties, SPECIAL, rows.ravel()]), (draw(st.integers(1, 70)), width))
    return estimator, np.vstack([rows, asked])


@needs_kernels
@pytest.mark.parametrize("kind", ["forest", "boosting", "logistic"])
def test_compiled_loops_give_the_bits_that_scikit_learn_gives_for_any_model_and_any_row(kind):
    @settings(max_examples=60, deadline=None)
    @given(models_and_rows(kind))
    def check(drawn):
        estimator, rows = drawn
        score = build_scorer(estimator)
        with np.errstate(all="ignore"):
            expected = build_scorer(estimator, lambda: None)(rows)
        assert_array_equal(score(rows), expected)
        assert_array_equal(np.concatenate([score(row[None]) for row in rows]), expected)

    check()


def test_trees_far_deeper_than_any_that_is_trained_are_followed_to_their_leaves(way):
    rows = np.arange(1000.0)[:, None]
    forest = RandomForestClassifier(2, bootstrap=False, random_state=1).fit(rows, np.arange(1000) % 2)
    assert forest.estimators_[0].get_depth() > 400
    assert_array_equal(build_scorer(forest, way)(rows), forest.predict_proba(rows)[:, 1])


@needs_kernels
@pytest.mark.parametrize("name", ESTIMATORS)
def test_threads_may_score_at_the_same_time(name):
    score = build_scorer(fitted(name))
    whole = score(ROWS)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(score, [ROWS] * 40):
            assert_array_equal(scores, whole)


@pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no C compiler")
def test_where_there_is_a_compiler_the_loops_are_built_with_the_package():
    assert installed_kernels() is not None, "build them: python setup.py build_ext --inplace"


def test_without_its_library_the_log_says_once_what_that_means_and_what_to_do(caplog):
    caplog.set_level("WARNING")  # an application opened by another test may have raised it
    assert load_kernels(None) is None
    (line,) = caplog.messages
    assert "scikit-learn" in line
    assert "compiler" in line


def test_a_library_that_is_missing_or_another_is_not_used(tmp_path, caplog):
    another = find_spec("numpy._core._multiarray_umath").origin
    for path in (str(tmp_path / "none.so"), another):
        with pytest.raises(OSError, match=r"none\.so|not the library"):
            ScoreKernels(path)
        assert load_kernels(path) is None


@needs_kernels
def test_a_library_of_another_source_than_the_one_at_hand_is_not_used():
    library = find_spec("app.ai._score_kernels").origin
    source = get_data("app.ai", "_score_kernels.c")
    ScoreKernels(library, source)
    with pytest.raises(OSError, match="another version of its source"):
        ScoreKernels(library, source.replace(b"86400", b"3600"))
