"""Features: what each one is made of, and how a batch of leads becomes a matrix.

A feature is a declared spec: a transform out of a small vocabulary, the columns it reads, its parameters, and what
is to be done when its value is unusable. The specs are stored in the manifest, so training and serving build the
same numbers from the same lines. Pure: no I/O, no clock (`as_of` is a parameter), no loop over leads; the only loop
is over features. Called by the predictor and by training; `feature_safety` decides what becomes of the gaps.

The vocabulary:

    value         number                the number itself
    log1p         number                log(1 + x); a negative x is invalid
    flag          boolean               1 for true, 0 for false
    is_present    any kind              1 where a usable value is there, else 0; the cell itself is always present
    age_days      timestamp             days from the timestamp to the as-of time; the future has age 0
    days_until    timestamp             days from the as-of time to the timestamp; negative once it is past
    days_between  timestamp, timestamp  days from the first to the second
    ratio         number, number        first / second; nothing over zero is invalid, but see `zero_over_zero`
    level         text                  the number that `levels` gives this text
    one_of        text                  1 if the text is one of `values`, else 0

Text is compared trimmed and casefolded; blank text is missing. Parameters: `level` needs `levels` ({text: number})
and may have `missing` and `unseen`, `one_of` needs `values` ([text, ...]), `ratio` may have `zero_over_zero`: the
number that stands where there is nothing, an unknown text, or 0/0.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from app.ai.domain import CodeArray, Column, ColumnKind, FloatArray, InputColumn, JsonObject, LeadColumns

Gap = Literal["impute", "zero", "reject", "keep"]
"""What becomes of a cell without a usable value: the training median, 0, no answer for this lead, or NaN for a model
that routes NaN."""
Outside = Literal["clip", "keep", "reject", "impute"]
"""What becomes of a value outside the training range: the nearest bound, itself, no answer, or the training median."""

_SECONDS_PER_DAY = 86_400.0
_YEAR_ONE, _YEAR_TEN_THOUSAND = -62_135_596_800.0, 253_402_300_800.0
_LARGEST = float(np.finfo(np.float32).max)


class CellState(IntEnum):
    """Why a cell of the matrix holds what it holds."""

    PRESENT = 0
    MISSING = 1
    """The database holds nothing."""
    INVALID = 2
    """NaN, infinite, beyond single precision (forests compute in it), or impossible for this transform."""
    UNSEEN = 3
    """A text the feature has no number for."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMatrix:
    """Built features of `n` leads: float64 `values` (n, k), C-contiguous, and uint8 `states` (n, k).

    A value is finite where the state is PRESENT and NaN elsewhere, unless the spec names a number that stands for
    a missing or unseen text.
    """

    values: FloatArray
    states: CodeArray


class _Cells(NamedTuple):
    """One input column made ready: numbers or text codes (n,), cell states (n,), and the distinct texts by code."""

    values: FloatArray | NDArray[np.intp]
    states: CodeArray
    texts: tuple[str, ...]


class _Built(NamedTuple):
    values: FloatArray
    states: CodeArray


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """One feature: a transform of the vocabulary over input columns, and what is done about unusable cells.

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
    table: Mapping[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a feature needs a name")
        if self.transform not in _VOCABULARY:
            raise ValueError(f"{self.name}: there is no transform {self.transform!r}")
        rule = _VOCABULARY[self.transform]
        kinds = tuple(column.kind for column in self.inputs)
        if len(kinds) != len(rule.kinds) or any(
            kind not in allowed for kind, allowed in zip(kinds, rule.kinds, strict=True)
        ):
            raise ValueError(f"{self.name}: {self.transform} does not read {kinds}")
        for strategy in (self.missing, self.invalid, self.unseen):
            _require(strategy in get_args(Gap), self.name, f"there is no strategy {strategy!r} for a gap")
        _require(self.out_of_range in get_args(Outside), self.name, "no such strategy for out_of_range")
        _check_params(self, rule)
        object.__setattr__(self, "table", _lookup_table(self))

    def to_json(self) -> JsonObject:
        """Returns the spec as JSON values; `from_json` gives an equal one."""
        return {
            "name": self.name,
            "transform": self.transform,
            "inputs": [{"name": column.name, "kind": column.kind} for column in self.inputs],
            "params": dict(self.params),
            "description": self.description,
            "missing": self.missing,
            "invalid": self.invalid,
            "unseen": self.unseen,
            "out_of_range": self.out_of_range,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FeatureSpec":
        """Reads a spec back.

        Raises:
            ValueError: a field is missing or unknown, or see the class.
        """
        names = {entry.name for entry in fields(cls) if entry.init}
        if set(data) != names:
            raise ValueError(f"a feature spec has exactly the fields {sorted(names)}")
        inputs = tuple(_input_column(column) for column in data["inputs"])
        return cls(**{**data, "inputs": inputs})


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The ordered features of a model, distinct by name.

    Raises:
        ValueError: there is none, two share a name, or they read one column as two kinds.
    """

    specs: tuple[FeatureSpec, ...]
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    input_columns: tuple[InputColumn, ...] = field(init=False, repr=False, compare=False)
    fingerprint: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = tuple(spec.name for spec in self.specs)
        columns = tuple(dict.fromkeys(column for spec in self.specs for column in spec.inputs))
        if not names or len(set(names)) != len(names):
            raise ValueError("a feature set needs at least one feature, and distinct names")
        if len({column.name for column in columns}) != len(columns):
            raise ValueError("a column is read as two kinds")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "input_columns", columns)
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


def build_features(leads: LeadColumns, feature_set: FeatureSet, as_of: float | FloatArray) -> FeatureMatrix:
    """Builds the features of `n` leads; row i depends on lead i alone, to the last bit.

    `as_of` is in seconds since 1970-01-01 UTC: one moment, or one for each lead (n,).

    Raises:
        ValueError: a column is absent or of another kind, or an as-of time is not finite.
    """
    if not np.all(np.isfinite(as_of)):
        raise ValueError("an as-of time is not finite")
    cells = {column.name: _read_cells(leads, column) for column in feature_set.input_columns}
    values = np.empty((len(feature_set.specs), leads.n))
    states = np.empty((len(feature_set.specs), leads.n), np.uint8)
    with np.errstate(all="ignore"):
        for row, spec in enumerate(feature_set.specs):
            build = _VOCABULARY[spec.transform].build
            values[row], states[row] = build(spec, [cells[column.name] for column in spec.inputs], as_of)
        unusable = ~(np.abs(values) <= _LARGEST)
    states[unusable & (states == CellState.PRESENT)] = CellState.INVALID
    values[unusable] = np.nan
    values += 0.0  # turns -0.0 into 0.0, which other code may tell apart by its bits
    return FeatureMatrix(np.ascontiguousarray(values.T), np.ascontiguousarray(states.T))


def normalise_text(text: str) -> str:
    """Returns the form in which texts are compared."""
    return text.strip().casefold()


def _read_cells(leads: LeadColumns, wanted: InputColumn) -> _Cells:
    column = leads.columns.get(wanted.name)
    if column is None or column.kind != wanted.kind:
        raise ValueError(f"column {wanted.name!r} is absent or not a {wanted.kind}")
    states = np.where(column.present, CellState.PRESENT, CellState.MISSING).astype(np.uint8)
    if column.kind == "text":
        return _read_texts(column, states)
    values = np.ascontiguousarray(column.values, dtype=np.float64)
    usable = np.abs(values) <= _LARGEST
    if column.kind == "timestamp":
        usable &= (values >= _YEAR_ONE) & (values < _YEAR_TEN_THOUSAND)
    elif column.kind == "boolean":
        usable &= (values == 0) | (values == 1)
    states[column.present & ~usable] = CellState.INVALID
    return _Cells(values, states, ())


def _read_texts(column: Column, states: CodeArray) -> _Cells:
    """Numbers the distinct texts, so that each is normalised once and every feature is one table look-up."""
    texts = column.values.tolist()
    code_of = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    codes = np.fromiter(map(code_of.__getitem__, texts), np.intp, len(texts))
    distinct = tuple(normalise_text(cast("str", text)) for text in code_of)
    blank = np.fromiter((not text for text in distinct), np.bool_, len(distinct))
    states[blank[codes]] = CellState.MISSING
    return _Cells(codes, states, distinct)


def _value(_spec: FeatureSpec, inputs: list[_Cells], _as_of: float | FloatArray) -> _Built:
    (numbers,) = inputs
    return _Built(_known(numbers), numbers.states)


def _log1p(_spec: FeatureSpec, inputs: list[_Cells], _as_of: float | FloatArray) -> _Built:
    (numbers,) = inputs
    known = _known(numbers)
    return _Built(np.where(known < 0, np.nan, np.log1p(known)), numbers.states)


def _is_present(_spec: FeatureSpec, inputs: list[_Cells], _as_of: float | FloatArray) -> _Built:
    (cells,) = inputs
    there = (cells.states == CellState.PRESENT).astype(np.float64)
    return _Built(there, np.zeros_like(cells.states))


def _age_days(_spec: FeatureSpec, inputs: list[_Cells], as_of: float | FloatArray) -> _Built:
    (moments,) = inputs
    return _Built(np.maximum((as_of - _known(moments)) / _SECONDS_PER_DAY, 0.0), moments.states)


def _days_until(_spec: FeatureSpec, inputs: list[_Cells], as_of: float | FloatArray) -> _Built:
    (moments,) = inputs
    return _Built((_known(moments) - as_of) / _SECONDS_PER_DAY, moments.states)


def _days_between(_spec: FeatureSpec, inputs: list[_Cells], _as_of: float | FloatArray) -> _Built:
    start, end = inputs
    return _Built((_known(end) - _known(start)) / _SECONDS_PER_DAY, np.maximum(start.states, end.states))


def _ratio(spec: FeatureSpec, inputs: list[_Cells], _as_of: float | FloatArray) -> _Built:
    above, below = (_known(cells) for cells in inputs)
    quotient = above / below
    if "zero_over_zero" in spec.params:
        quotient[(above == 0) & (below == 0)] = spec.params["zero_over_zero"]
    return _Built(quotient, np.maximum(inputs[0].states, inputs[1].states))


def _level(spec: FeatureSpec, inputs: list[_Cells], _as_of: float | FloatArray) -> _Built:
    (texts,) = inputs
    known = np.fromiter((text in spec.table for text in texts.texts), np.bool_, len(texts.texts))
    unseen = float(spec.params.get("unseen", np.nan))
    numbers = np.fromiter(
        (spec.table.get(text, unseen) for text in texts.texts), np.float64, len(texts.texts)
    )
    missing = texts.states == CellState.MISSING
    states = np.where(missing | known[texts.values], texts.states, CellState.UNSEEN).astype(np.uint8)
    return _Built(np.where(missing, float(spec.params.get("missing", np.nan)), numbers[texts.values]), states)


def _one_of(spec: FeatureSpec, inputs: list[_Cells], _as_of: float | FloatArray) -> _Built:
    (texts,) = inputs
    numbers = np.fromiter((text in spec.table for text in texts.texts), np.float64, len(texts.texts))
    found = numbers[texts.values]
    return _Built(np.where(texts.states == CellState.PRESENT, found, np.nan), texts.states)


def _known(cells: _Cells) -> FloatArray:
    return np.where(cells.states == CellState.PRESENT, cells.values, np.nan)


class _Rule(NamedTuple):
    """What a transform reads, position by position, which parameters it needs and may have, and how it is built."""

    build: Callable[[FeatureSpec, list[_Cells], float | FloatArray], _Built]
    kinds: tuple[tuple[ColumnKind, ...], ...]
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


_VOCABULARY: Mapping[str, _Rule] = {
    "value": _Rule(_value, (("number",),)),
    "log1p": _Rule(_log1p, (("number",),)),
    "flag": _Rule(_value, (("boolean",),)),
    "is_present": _Rule(_is_present, (get_args(ColumnKind),)),
    "age_days": _Rule(_age_days, (("timestamp",),)),
    "days_until": _Rule(_days_until, (("timestamp",),)),
    "days_between": _Rule(_days_between, (("timestamp",), ("timestamp",))),
    "ratio": _Rule(_ratio, (("number",), ("number",)), optional=frozenset({"zero_over_zero"})),
    "level": _Rule(_level, (("text",),), frozenset({"levels"}), frozenset({"missing", "unseen"})),
    "one_of": _Rule(_one_of, (("text",),), frozenset({"values"})),
}

TRANSFORMS: tuple[str, ...] = tuple(_VOCABULARY)
"""Every transform there is."""


def _check_params(spec: FeatureSpec, rule: _Rule) -> None:
    given = set(spec.params)
    _require(rule.required <= given, spec.name, f"{spec.transform} needs {sorted(rule.required)}")
    _require(
        given <= rule.required | rule.optional, spec.name, f"{spec.transform} does not know {sorted(given)}"
    )
    for name in rule.optional & given:
        _require(_is_number(spec.params[name]), spec.name, f"{name} must be a finite number")
    for stand_in, strategy in (("missing", spec.missing), ("unseen", spec.unseen)):
        _require(
            stand_in not in given or strategy == "impute", spec.name, f"{stand_in} is already given a number"
        )


def _lookup_table(spec: FeatureSpec) -> Mapping[str, float]:
    """Returns what a text feature looks up, by normalised text; empty for the other transforms."""
    if spec.transform == "level":
        entries = spec.params["levels"]
        _require(isinstance(entries, Mapping) and len(entries) > 0, spec.name, "levels is empty")
    elif spec.transform == "one_of":
        _require(isinstance(spec.params["values"], list | tuple), spec.name, "values is not a list")
        _require(len(spec.params["values"]) > 0, spec.name, "values is empty")
        entries = dict.fromkeys(spec.params["values"], 1.0)
    else:
        return {}
    _require(all(isinstance(text, str) for text in entries), spec.name, "a level is not a text")
    _require(
        all(_is_number(number) for number in entries.values()), spec.name, "a level has no finite number"
    )
    table = {normalise_text(text): float(number) for text, number in entries.items()}
    _require(len(table) == len(entries), spec.name, "two levels differ in case or blanks only")
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _require(condition: bool, name: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {problem}")


def _input_column(data: Mapping[str, Any]) -> InputColumn:
    if set(data) != {"name", "kind"} or data["kind"] not in get_args(ColumnKind):
        raise ValueError("an input column has a name and a known kind")
    return InputColumn(data["name"], data["kind"])


def _fingerprint(specs: list[JsonObject]) -> str:
    text = json.dumps(specs, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
