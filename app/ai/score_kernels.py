"""The compiled loops of scoring: `_score_kernels.c`, built when the package is installed, opened by ctypes.

Trees are laid out once, when a model is loaded, as one array of small nodes; a call then walks 16 rows at a
time down each tree, without a branch and without the interpreter's lock. Equal to scikit-learn to the last
bit, see `_score_kernels.c`. Pure but for opening the library. Called by `inference`.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from app.ai.domain import FloatArray
from app.ai.fitted_trees import Tree

RowSum = Callable[[FloatArray], FloatArray]
"""Feature values (n, k) to one sum a row (n,)."""

NODE = np.dtype(
    [("threshold", np.float64), ("child", np.int32, 2), ("feature", np.int32), ("nan_child", np.int32)]
)
"""`struct node` of the C source: leaves hold their value in `threshold` and are their own children."""

_LOG = logging.getLogger(__name__)
_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class ScoreKernels:
    """The loops of one shared library.

    Raises:
        OSError: there is no such library, or it is not of this version of the source.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        try:
            if _I32.in_dll(library, "node_bytes").value != NODE.itemsize:
                raise OSError("built from another version of its source")
            self._sum_trees, self._sum_terms = library.sum_trees, library.sum_terms
        except (ValueError, AttributeError) as exc:
            raise OSError("not the library of the scoring loops") from exc
        self._sum_trees.argtypes = [_POINTER] * 3 + [_I64, _POINTER, _I64, _I64, _I32, _POINTER]
        self._sum_trees.restype = _I32
        self._sum_terms.argtypes = [_POINTER] * 2 + [_I64, _POINTER, _POINTER, _I64, _I64, _POINTER]
        self._sum_terms.restype = None

    def build_tree_sum(
        self, trees: Sequence[Tree], n_features: int, *, start: float = 0.0, single_precision: bool = False
    ) -> RowSum:
        """Returns the sum of `start` and what the trees say of a row, added in their order.

        `trees` are checked, see `fitted_trees`. With `single_precision` values are rounded to float32 before
        they are compared, and held within its range.

        Raises:
            ValueError: more nodes than an index can name.
        """
        nodes, roots = _lay_out(trees)
        depths = _measure_depths(nodes, roots)
        # These pointers keep the arrays they point to alive.
        fixed = [array.ctypes.data_as(_POINTER) for array in (nodes, roots, depths)]
        sum_trees, single = self._sum_trees, int(single_precision)

        def sum_rows(values: FloatArray) -> FloatArray:
            rows = _check_rows(values, n_features)
            sums = np.full(len(rows), start)
            if sum_trees(
                *fixed, len(roots), rows.ctypes.data, len(rows), n_features, single, sums.ctypes.data
            ):
                raise MemoryError
            return sums

        return sum_rows

    def build_linear_sum(
        self, weights: FloatArray, intercept: float, means: FloatArray, scales: FloatArray
    ) -> RowSum:
        """Returns the sum of `intercept` and a row's features times `weights` (k,), added in their order.

        Before that each feature is scaled `s` times: a mean is taken away and it is divided by a scale, both
        (s, k).
        """
        n_scalings, n_features = means.shape
        arrays = (means, scales, weights)
        if weights.shape != (n_features,) or scales.shape != means.shape:
            raise ValueError("weights and scalings are for different numbers of features")
        fixed = [np.ascontiguousarray(array, dtype=np.float64).ctypes.data_as(_POINTER) for array in arrays]
        sum_terms = self._sum_terms

        def sum_rows(values: FloatArray) -> FloatArray:
            rows = _check_rows(values, n_features)
            sums = np.full(len(rows), intercept)
            sum_terms(
                *fixed[:2], n_scalings, fixed[2], rows.ctypes.data, len(rows), n_features, sums.ctypes.data
            )
            return sums

        return sum_rows


@cache
def installed_kernels() -> ScoreKernels | None:
    """Returns the loops that were built when this package was installed, see `load_kernels`."""
    found = find_spec("app.ai._score_kernels")
    return load_kernels(found.origin if found else None)


def load_kernels(path: str | None) -> ScoreKernels | None:
    """Returns the loops of the library at `path`, or None, with a line in the log, if they cannot be used."""
    reason = "they were not built when the package was installed"
    if path is not None:
        try:
            return ScoreKernels(path)
        except OSError as exc:
            reason = str(exc)
    _LOG.warning(
        "models are scored by scikit-learn, with the same results but several times slower, without the "
        "compiled loops (%s); have a C compiler on the path and install the package again",
        reason,
    )
    return None


def _lay_out(trees: Sequence[Tree]) -> tuple[NDArray[np.void], NDArray[np.int32]]:
    """Returns the nodes of all trees as one array of `NODE`, and the places of the roots in it."""
    sizes = np.array([len(tree.left) for tree in trees])
    if sizes.sum() > np.iinfo(np.int32).max:
        raise ValueError("the trees have too many nodes")
    roots = (np.cumsum(sizes) - sizes).astype(np.int32)
    left, right, feature, threshold, missing_left, _, value = map(np.concatenate, zip(*trees, strict=True))
    itself, root = np.arange(len(left)), np.repeat(roots, sizes)
    leaf = left == -1
    nodes = np.empty(len(left), NODE)
    nodes["threshold"] = np.where(leaf, value, threshold)
    nodes["child"][:, 0] = np.where(leaf, itself, root + left)
    nodes["child"][:, 1] = np.where(leaf, itself, root + right)
    nodes["feature"] = np.where(leaf, 0, feature)
    nodes["nan_child"] = ~missing_left
    return nodes, roots


def _measure_depths(nodes: NDArray[np.void], roots: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns how many steps lead from each root (t,) to its deepest leaf."""
    depths = np.zeros(len(roots), np.int32)
    tree, at = np.arange(len(roots)), roots
    while True:
        inner = nodes["child"][at, 0] != at
        tree, at = np.repeat(tree[inner], 2), nodes["child"][at[inner]].ravel()
        if not at.size:
            return depths
        depths[tree] += 1


def _check_rows(values: FloatArray, n_features: int) -> FloatArray:
    rows: FloatArray = np.ascontiguousarray(values, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != n_features:
        raise ValueError(f"the model scores rows of {n_features} features")
    return rows
