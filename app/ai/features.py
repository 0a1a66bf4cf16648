"""Features: what each one is made of, and how a batch of leads becomes a matrix.

A feature is a declared spec: a transform out of the small vocabulary of `feature_transforms`, the columns it
reads, its parameters, and what is to be done where it has no usable value. The specs are stored in the
manifest, so training and serving build the same numbers from the same lines. Pure: no I/O, no clock (`as_of`
is a parameter). Never fills a gap: that is `feature_safety`. Called by the predictor, by training, and by
whoever asks a model which columns it reads.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from app.ai.column_blocks import stack_columns
from app.ai.domain import CodeArray, ColumnKind, FloatArray, InputColumn, JsonObject, LeadColumns
from app.ai.feature_plan import FeaturePlan
from app.ai.feature_transforms import TRANSFORMS, CellState, check_params
from app.ai.score_kernels import ScoreKernels, installed_kernels

__all__ = ["CellState", "FeatureMatrix", "FeatureSet", "FeatureSpec", "Gap", "Outside", "build_features"]

Gap = Literal["impute", "zero", "reject", "keep"]
"""What becomes of a cell without a usable value: the training median, 0, no answer for this lead, or NaN
(for a model that routes NaN)."""
Outside = Literal["clip", "keep", "reject", "impute"]
"""What becomes of a value outside the training range: the nearest bound, the value itself, no answer for this
lead, or the training median."""


class FeatureMatrix(NamedTuple):
    """Built features of `n` leads: float64 `values` (n, k), C-contiguous, and uint8 `states` (n, k).

    A value is finite where the state is PRESENT and NaN elsewhere, unless the spec gives a missing or unseen
    text a number of its own.
    """

    values: FloatArray
    states: CodeArray


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """One feature: a transform over input columns, and what is done where it has no usable value.

    Raises:
        ValueError: the transform is unknown, or inputs, parameters or strategies do not suit it.
    """

    name: str
    transform: str
    inputs: tuple[InputColumn, ...]
    params: Mapping[str, Any]
    description: str
    missing: Gap = "impute"
    invalid: Gap = "impute"
    unseen: Gap = "impute"
    out_of_range: Outside = "clip"

    def __post_init__(self) -> None:
        if not self.name or self.transform not in TRANSFORMS:
            raise ValueError("a feature needs a name, and a transform of the vocabulary")
        kinds = TRANSFORMS[self.transform].kinds
        if len(kinds) != len(self.inputs) or any(
            column.kind not in allowed for column, allowed in zip(self.inputs, kinds, strict=True)
        ):
            raise ValueError(f"{self.name}: {self.transform} reads {kinds}")
        strategies = (self.missing, self.invalid, self.unseen)
        if not set(strategies) <= set(get_args(Gap)) or self.out_of_range not in get_args(Outside):
            raise ValueError(f"{self.name}: there is no such strategy")
        object.__setattr__(self, "params", check_params(self.transform, self.params))
        for gap in ("missing", "unseen"):
            if gap in self.params and getattr(self, gap) != "impute":
                raise ValueError(f"{self.name}: {gap} has a number of its own and a strategy as well")

    def to_json(self) -> JsonObject:
        """Returns the spec as JSON values; `from_json` gives an equal one."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        inputs = [{"name": column.name, "kind": column.kind} for column in self.inputs]
        return {**values, "inputs": inputs, "params": dict(self.params)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FeatureSpec":
        """Reads a spec back.

        Raises:
            ValueError: a field is missing or unknown, or see the class.
        """
        names = {entry.name for entry in fields(cls)}
        if set(data) != names:
            raise ValueError(f"a feature spec has exactly the fields {sorted(names)}")
        return cls(**{**data, "inputs": tuple(_input_column(column) for column in data["inputs"])})


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The ordered features of a model.

    `input_columns` are the columns they read, distinct and in order of first use. `groups` are the indices of
    features that read the same columns, and so come and go together, in order of first use; a group's first
    feature speaks for it. `group_names` are their names: a lone feature's own, or else the columns read.
    `plan` is how they are built. `fingerprint` is the SHA-256 of the canonical JSON of the specs.

    Raises:
        ValueError: there is no feature, two share a name, or a column is read as two kinds.
    """

    specs: tuple[FeatureSpec, ...]
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    input_columns: tuple[InputColumn, ...] = field(init=False, repr=False, compare=False)
    groups: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    group_names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    plan: FeaturePlan = field(init=False, repr=False, compare=False)
    fingerprint: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = tuple(spec.name for spec in self.specs)
        columns = tuple(dict.fromkeys(column for spec in self.specs for column in spec.inputs))
        if not names or len(set(names)) != len(names):
            raise ValueError("a feature set needs at least one feature, and a name of its own for each")
        if len({column.name for column in columns}) != len(columns):
            raise ValueError("a column is read as two kinds")
        groups = _group_by_inputs(self.specs)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "input_columns", columns)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "group_names", tuple(_group_name(self.specs, group) for group in groups))
        recipes = [(spec.transform, spec.inputs, spec.params) for spec in self.specs]
        object.__setattr__(self, "plan", FeaturePlan.of(recipes))
        object.__setattr__(self, "fingerprint", _fingerprint(self.to_json()))

    def to_json(self) -> list[JsonObject]:
        """Returns the specs as JSON values, in order."""
        return [spec.to_json() for spec in self.specs]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> "FeatureSet":
        """Reads a feature set back.

        Raises:
            ValueError: see `FeatureSpec.from_json` and the class.
        """
        return cls(tuple(FeatureSpec.from_json(entry) for entry in data))


def build_features(
    leads: LeadColumns,
    feature_set: FeatureSet,
    as_of: float | FloatArray,
    find_kernels: Callable[[], ScoreKernels | None] = installed_kernels,
) -> FeatureMatrix:
    """Builds the features of `n` leads; a lead's row depends on that lead alone, to the last bit.

    `as_of` is in seconds since 1970-01-01 UTC: one moment, or one for each lead (n,). Without kernels it is
    NumPy that builds, with the same result.

    Raises:
        ValueError: a column is absent or of another kind, or an as-of time is not finite.
    """
    moments = np.ascontiguousarray(as_of, dtype=np.float64)
    if not np.isfinite(moments).all() or moments.shape not in {(1,), (leads.n,)}:
        raise ValueError("an as-of time is not finite, or there are not as many as leads")
    plan = feature_set.plan
    blocks = stack_columns(leads, plan.inputs)
    return FeatureMatrix(*plan.build(blocks, moments, find_kernels()))


def _group_by_inputs(specs: Sequence[FeatureSpec]) -> tuple[tuple[int, ...], ...]:
    groups: dict[tuple[InputColumn, ...], list[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault(spec.inputs, []).append(index)
    return tuple(map(tuple, groups.values()))


def _group_name(specs: Sequence[FeatureSpec], group: tuple[int, ...]) -> str:
    first = specs[group[0]]
    return first.name if len(group) == 1 else ", ".join(column.name for column in first.inputs)


def _input_column(data: Mapping[str, Any]) -> InputColumn:
    if set(data) != {"name", "kind"} or data["kind"] not in get_args(ColumnKind):
        raise ValueError("an input column has a name and a known kind")
    return InputColumn(data["name"], data["kind"])


def _fingerprint(specs: list[JsonObject]) -> str:
    text = json.dumps(specs, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
