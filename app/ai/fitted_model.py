"""A fitted model as plain arrays, without the library it was fitted with, and the bytes it travels in.

The process that serves needs no more of scikit-learn than this (`loaded_model`). Whoever builds one has
checked it: `check` is called wherever arrays come from, because the compiled loops follow them unseen. Pure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from app.ai.domain import FloatArray
from app.ai.fitted_trees import Tree, check_tree

ModelKind = Literal["forest", "boosting", "logistic"]

_TREE_DTYPES = Tree(np.int64, np.int64, np.int64, np.float64, np.bool_, np.float64, np.float64)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What `s` standard scalers, one after the other, do to feature values: `means` and `scales` (s, k)."""

    means: FloatArray
    scales: FloatArray

    def __call__(self, values: FloatArray) -> FloatArray:
        """Returns scaled values (n, k): what StandardScaler computes, one element at a time."""
        for mean, scale in zip(self.means, self.scales, strict=True):
            values = (values - mean) / scale
        return values


@dataclass(frozen=True, slots=True, eq=False)
class FittedModel:
    """A binary classifier over `k` features, whose second class is the positive one.

    A forest's score is the mean of its trees' values; of boosting, the logistic function of `start` and the
    sum of its trees' values; of logistic regression, that of `start` and the features times `weights` (k,).
    Values are scaled first.
    """

    kind: ModelKind
    scaling: Scaling
    trees: Sequence[Tree] = ()
    start: float = 0.0
    weights: FloatArray = field(default_factory=lambda: np.empty(0))

    @property
    def n_features(self) -> int:
        """How many features a row has."""
        return int(self.scaling.means.shape[1])

    def check(self) -> None:
        """Refuses arrays that contradict each other.

        Raises:
            ValueError: says why.
        """
        if self.scaling.scales.shape != self.scaling.means.shape:
            raise ValueError("a scaler has another shape than the model")
        if self.kind == "logistic" and self.weights.shape != (self.n_features,):
            raise ValueError("the coefficients do not fit the features")
        if self.kind != "logistic" and not self.trees:
            raise ValueError("a model of trees has no tree")
        for tree in self.trees:
            check_tree(tree, self.n_features)


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: ModelKind
    n_features: int
    scaling: tuple[bytes, bytes]
    trees: list[tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]]
    start: float
    weights: bytes


def encode_model(model: FittedModel) -> bytes:
    """Returns the model as bytes, for `decode_model` on the same machine."""
    trees = [
        tuple(
            np.ascontiguousarray(part, dtype).tobytes()
            for part, dtype in zip(tree, _TREE_DTYPES, strict=True)
        )
        for tree in model.trees
    ]
    scaling: Any = tuple(
        np.ascontiguousarray(part).tobytes() for part in (model.scaling.means, model.scaling.scales)
    )
    wire = _Wire(model.kind, model.n_features, scaling, trees, model.start, model.weights.tobytes())  # type: ignore[arg-type]
    return msgspec.msgpack.encode(wire)


def decode_model(content: bytes) -> FittedModel:
    """Reads a model back, and checks it: whoever sent it has read a file that may be anybody's.

    Raises:
        ValueError: these bytes hold no model.
    """
    try:
        wire = msgspec.msgpack.decode(content, type=_Wire)
    except msgspec.MsgspecError as exc:
        raise ValueError("these bytes hold no model") from exc
    read: Callable[[bytes, Any], NDArray[Any]] = np.frombuffer
    means, scales = (read(part, np.float64).reshape(-1, wire.n_features) for part in wire.scaling)
    trees = [
        Tree(*(read(part, dtype) for part, dtype in zip(tree, _TREE_DTYPES, strict=True)))
        for tree in wire.trees
    ]
    model = FittedModel(wire.kind, Scaling(means, scales), trees, wire.start, read(wire.weights, np.float64))
    model.check()
    return model
