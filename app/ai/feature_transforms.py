"""The vocabulary of features: which transforms there are, what they read, and how they compute.

    value         number                the number itself
    log1p         number                log(1 + x); a negative x is invalid
    flag          boolean               1 for true, 0 for false
    is_present    any kind              1 where a usable value is there, else 0; never a gap itself
    age_days      timestamp             days from the timestamp to the as-of time; the future has age 0
    days_until    timestamp             days from the as-of time to the timestamp, negative once it is past
    days_between  timestamp, timestamp  days from the first to the second
    ratio         number, number        first / second; anything over zero is invalid
    level         text                  the number that `levels` gives this text
    one_of        text                  1 if the text is one of `values`, else 0

Parameters: `level` needs `levels` ({text: number}) and may have `missing` and `unseen`, the numbers that
stand for no text and for any other text; `one_of` needs `values` ([text, ...]); `ratio` may have
`zero_over_zero`, the number that stands for 0 / 0. Text is compared trimmed and casefolded, and blank text is
missing.

Pure: no I/O, no clock, no loop over leads. Every step works element by element on contiguous arrays, so a
lead's numbers depend on that lead alone, to the last bit. Only `features` calls this module.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from itertools import count
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from app.ai.domain import CodeArray, Column, ColumnKind, FloatArray, InputColumn, LeadColumns

LARGEST = float(np.finfo(np.float32).max)
"""No usable number is farther from 0: forests compute in single precision."""

_SECONDS_PER_DAY = 86_400.0
_YEAR_1, _YEAR_10000 = -62_135_596_800.0, 253_402_300_800.0

AsOf = float | FloatArray


class CellState(IntEnum):
    """Why a cell of the feature matrix holds what it holds."""

    PRESENT = 0
    MISSING = 1
    """The database holds nothing."""
    INVALID = 2
    """NaN, infinite, beyond single precision, outside the calendar, or impossible for this transform."""
    UNSEEN = 3
    """A text that the feature has no number for."""


class Cells(NamedTuple):
    """One input column of `n` leads, made ready.

    `states` (n,) is PRESENT, MISSING or INVALID. Numbers are in `values` (n,), NaN where not PRESENT. Text is
    in `indices` (n,) into `texts`, the distinct ones in the form they are compared in.
    """

    states: CodeArray
    values: FloatArray = np.empty(0)
    indices: NDArray[np.intp] = np.empty(0, np.intp)
    texts: tuple[str, ...] = ()


class Built(NamedTuple):
    """One feature of `n` leads; a present value that is not a usable number becomes INVALID later."""

    values: FloatArray
    states: CodeArray


class Transform(NamedTuple):
    """How a feature is built, which kinds it reads position by position, which parameters it has."""

    build: Callable[[Sequence[Cells], Mapping[str, Any], AsOf], Built]
    kinds: tuple[tuple[ColumnKind, ...], ...]
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


def read_cells(leads: LeadColumns, wanted: InputColumn) -> Cells:
    """Makes one column ready; done once, however many features read it.

    Raises:
        ValueError: the column is absent or of another kind.
    """
    column = leads.columns.get(wanted.name)
    if column is None or column.kind != wanted.kind:
        raise ValueError(f"column {wanted.name!r} is absent or not a {wanted.kind}")
    states = np.where(column.present, CellState.PRESENT, CellState.MISSING).astype(np.uint8)
    if column.kind == "text":
        return _read_texts(column, states)
    values = np.asarray(column.values, dtype=np.float64)
    usable = np.abs(values) <= LARGEST
    if column.kind == "timestamp":
        # PostgreSQL has timestamps at infinity, and others that no calendar of ours can name.
        usable &= (values >= _YEAR_1) & (values < _YEAR_10000)
    elif column.kind == "boolean":
        usable &= (values == 0) | (values == 1)
    states[column.present & ~usable] = CellState.INVALID
    return Cells(states, np.where(states == CellState.PRESENT, values, np.nan))


def check_params(transform: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters in the form `build` takes: texts as they are compared, numbers as floats.

    Raises:
        ValueError: a parameter is missing, superfluous or unusable, or two texts are the same.
    """
    rule = TRANSFORMS[transform]
    if not rule.required <= set(params) <= rule.required | rule.optional:
        raise ValueError(f"{transform} has the parameters {sorted(rule.required | rule.optional)}")
    checked: dict[str, Any] = {name: _number(params[name]) for name in rule.optional & set(params)}
    if "levels" in rule.required:
        levels = dict(params["levels"])
        checked["levels"] = dict(zip(_distinct_texts(levels), map(_number, levels.values()), strict=True))
    if "values" in rule.required:
        checked["values"] = _distinct_texts(params["values"])
    return checked


def normalise_text(text: str) -> str:
    """Returns the form in which texts are compared."""
    return text.strip().casefold()


def _read_texts(column: Column, states: CodeArray) -> Cells:
    """Numbers the distinct texts, so that each is normalised once and a feature is one table look-up."""
    index_of: defaultdict[object, int] = defaultdict(count().__next__)
    indices = np.fromiter(map(index_of.__getitem__, column.values.tolist()), np.intp, len(column.values))
    texts = tuple(normalise_text(str(text)) for text in index_of)
    blank = np.fromiter((not text for text in texts), np.bool_, len(texts))
    states[blank[indices]] = CellState.MISSING
    return Cells(states, indices=indices, texts=texts)


def _value(inputs: Sequence[Cells], _params: Mapping[str, Any], _as_of: AsOf) -> Built:
    return Built(inputs[0].values, inputs[0].states)


def _log1p(inputs: Sequence[Cells], _params: Mapping[str, Any], _as_of: AsOf) -> Built:
    numbers = inputs[0].values
    return Built(np.log1p(np.where(numbers < 0, np.nan, numbers)), inputs[0].states)


def _is_present(inputs: Sequence[Cells], _params: Mapping[str, Any], _as_of: AsOf) -> Built:
    states = inputs[0].states
    return Built((states == CellState.PRESENT).astype(np.float64), np.zeros_like(states))


def _age_days(inputs: Sequence[Cells], _params: Mapping[str, Any], as_of: AsOf) -> Built:
    return Built(np.maximum((as_of - inputs[0].values) / _SECONDS_PER_DAY, 0.0), inputs[0].states)


def _days_until(inputs: Sequence[Cells], _params: Mapping[str, Any], as_of: AsOf) -> Built:
    return Built((inputs[0].values - as_of) / _SECONDS_PER_DAY, inputs[0].states)


def _days_between(inputs: Sequence[Cells], _params: Mapping[str, Any], _as_of: AsOf) -> Built:
    start, end = inputs
    return Built((end.values - start.values) / _SECONDS_PER_DAY, np.maximum(start.states, end.states))


def _ratio(inputs: Sequence[Cells], params: Mapping[str, Any], _as_of: AsOf) -> Built:
    above, below = inputs
    quotient = above.values / below.values
    if "zero_over_zero" in params:
        quotient[(above.values == 0) & (below.values == 0)] = params["zero_over_zero"]
    return Built(quotient, np.maximum(above.states, below.states))


def _level(inputs: Sequence[Cells], params: Mapping[str, Any], _as_of: AsOf) -> Built:
    states, _, indices, texts = inputs[0]
    levels, unseen = params["levels"], params.get("unseen", np.nan)
    numbers = np.array([levels.get(text, unseen) for text in texts], dtype=np.float64)
    known = np.array([text in levels for text in texts], dtype=np.bool_)
    missing = states == CellState.MISSING
    return Built(
        np.where(missing, params.get("missing", np.nan), numbers[indices]),
        np.where(missing | known[indices], states, CellState.UNSEEN).astype(np.uint8),
    )


def _one_of(inputs: Sequence[Cells], params: Mapping[str, Any], _as_of: AsOf) -> Built:
    states, _, indices, texts = inputs[0]
    hits = np.array([text in params["values"] for text in texts], dtype=np.float64)
    return Built(np.where(states == CellState.PRESENT, hits[indices], np.nan), states)


TRANSFORMS: Mapping[str, Transform] = {
    "value": Transform(_value, (("number",),)),
    "log1p": Transform(_log1p, (("number",),)),
    "flag": Transform(_value, (("boolean",),)),
    "is_present": Transform(_is_present, (get_args(ColumnKind),)),
    "age_days": Transform(_age_days, (("timestamp",),)),
    "days_until": Transform(_days_until, (("timestamp",),)),
    "days_between": Transform(_days_between, (("timestamp",), ("timestamp",))),
    "ratio": Transform(_ratio, (("number",), ("number",)), optional=frozenset({"zero_over_zero"})),
    "level": Transform(_level, (("text",),), frozenset({"levels"}), frozenset({"missing", "unseen"})),
    "one_of": Transform(_one_of, (("text",),), frozenset({"values"})),
}
"""Every transform there is, by the name a feature spec calls it."""


def _distinct_texts(texts: Any) -> list[str]:
    """Returns the texts as they are compared, in the order given."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts are given as a list of texts")
    normalised = [normalise_text(text) for text in texts]
    if not normalised or len(set(normalised)) != len(normalised):
        raise ValueError("there is no text, or two differ in case and surrounding blanks only")
    return normalised


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError("a parameter is not a usable number")
    return float(value)
