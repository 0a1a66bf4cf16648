"""The trees of a forest or booster as plain arrays, checked: nothing that follows them can go astray.

scikit-learn follows a tree's indices without looking, and so does our own C code: a crafted file could make
either read outside the tree or never end. What passes here is a tree. Pure.
"""

from typing import NamedTuple

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


def check_tree(tree: Tree, n_features: int) -> None:
    """Refuses what is no tree over `n_features` features.

    Raises:
        ValueError: says why.
    """
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
