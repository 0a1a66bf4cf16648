"""The trees of a fitted forest or booster as plain arrays, checked: nothing that follows them can go astray.

scikit-learn follows a tree's indices without looking, and so does our own C code: a crafted file could make
either read outside the tree or never end. What passes here is a tree. Pure. Called by `inference` and
`score_shapley`.
"""

from typing import Any, NamedTuple

import numpy as np

from app.ai.domain import BoolArray, FloatArray, IntArray


class Tree(NamedTuple):
    """One tree of `m` nodes, the first of which is the root; every array is (m,).

    `left` and `right` are the children's places, -1 at a leaf. A value up to `threshold` goes left, and a NaN
    where `missing_left` says so. `cover` counts the training rows of a node. `value` matters at leaves only.
    """

    left: IntArray
    right: IntArray
    feature: IntArray
    threshold: FloatArray
    missing_left: BoolArray
    cover: FloatArray
    value: FloatArray


def read_forest(model: Any) -> list[Tree]:
    """Returns the trees of a fitted binary `RandomForestClassifier`; a leaf's value is its positive share.

    Raises:
        ValueError: a tree is not sound, or has another shape than the forest.
    """
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
        _check_tree(trees[-1], model.n_features_in_)
    return trees


def read_boosting(model: Any) -> list[Tree]:
    """Returns the trees of a fitted binary `HistGradientBoostingClassifier`; values are log-odds.

    Raises:
        ValueError: a tree is not sound, or splits on categories.
    """
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
        _check_tree(trees[-1], model.n_features_in_)
    return trees


def _check_tree(tree: Tree, n_features: int) -> None:
    index = np.arange(len(tree.left))
    if not len(index) or any(column.shape != index.shape for column in tree):
        raise ValueError("a tree has no nodes, or not all of their parts")
    inner = tree.left != -1
    above, children = index[inner], np.concatenate([tree.left[inner], tree.right[inner]])
    if not ((children > np.tile(above, 2)) & (children < len(index))).all():
        raise ValueError("a tree has a child outside itself")
    if np.bincount(children).max(initial=0) > 1:
        raise ValueError("a tree has a node below two others")
    feature = tree.feature[inner]
    if not ((feature >= 0) & (feature < n_features)).all():
        raise ValueError("a tree splits on a feature that does not exist")
    if np.isnan(tree.threshold[inner]).any():
        raise ValueError("a tree splits at a threshold that is not a number")
