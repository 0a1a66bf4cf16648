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
from itertools import accumulate, count
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from app.ai.domain import CodeArray, Column, ColumnKind, FloatArray, InputColumn, LeadColumns

LARGEST = float(np.finfo(np.float32).max)
"""No usable number is farther from 0: forests compute in single precision."""

_SECONDS_PER_DAY = 86_400.0
_YEAR_1, _YEAR_10000 = -62_135_596_800.0, 253_402_300_800.0
# PostgreSQL has timestamps at infinity, and others that no calendar of ours can name.
_RANGES: Mapping[ColumnKind, tuple[float, float]] = {
    "number": (-LARGEST, LARGEST),
    "boolean": (0.0, 1.0),
    "timestamp": (_YEAR_1, float(np.nextafter(_YEAR_10000, 0.0))),
    "text": (np.nan, np.nan),
}

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
    """The `c` input columns of `n` leads, made ready.

    `states` (c, n) is PRESENT, MISSING or INVALID. Numbers are in `values` (c, n), NaN where not PRESENT.
    Text is in `indices` (c, n) into `texts` (c), the distinct ones of each column in the form they are
    compared in.
    """

    states: CodeArray
    values: FloatArray
    indices: NDArray[np.intp]
    texts: Sequence[Sequence[str]]


class Built(NamedTuple):
    """`f` features (f, n) of `n` leads; a present value that is not a usable number becomes INVALID later."""

    values: FloatArray
    states: CodeArray


Places = Sequence[NDArray[np.intp]]
"""For each position of a transform's inputs, which columns `f` features read there (f,)."""

Params = Sequence[Mapping[str, Any]]
"""The parameters of `f` features."""


class Transform(NamedTuple):
    """How features are built, which kinds they read position by position, which parameters they have."""

    build: Callable[[Cells, Places, Params, AsOf], Built]
    kinds: tuple[tuple[ColumnKind, ...], ...]
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


def read_cells(leads: LeadColumns, wanted: Sequence[InputColumn]) -> Cells:
    """Makes columns ready; done once, however many features read them.

    Raises:
        ValueError: a column is absent or of another kind.
    """
    columns = [_find_column(leads, column) for column in wanted]
    shape = (len(columns), leads.n)
    present = np.array([column.present for column in columns], dtype=np.bool_).reshape(shape)
    states = np.where(present, CellState.PRESENT, CellState.MISSING).astype(np.uint8)
    values, indices = np.full(shape, np.nan), np.zeros(shape, np.intp)
    texts: list[Sequence[str]] = [()] * len(columns)
    numbers = [row for row, column in enumerate(columns) if column.kind != "text"]
    if numbers:
        values[numbers] = [columns[row].values for row in numbers]
        lower, upper = np.array([_RANGES[column.kind] for column in columns]).T[:, :, None]
        usable = (values >= lower) & (values <= upper)
        flags = [row for row, column in enumerate(columns) if column.kind == "boolean"]
        if flags:
            usable[flags] &= values[flags] == np.rint(values[flags])
        states[present & ~usable] = CellState.INVALID
        values[states != CellState.PRESENT] = np.nan
    for row, column in enumerate(columns):
        if column.kind == "text":
            states[row] = ~column.present  # text is there or MISSING, never INVALID
            indices[row], texts[row] = _number_texts(column.values)
            blank = [not text for text in texts[row]]
            if any(blank):
                states[row, np.array(blank)[indices[row]]] = CellState.MISSING
    return Cells(states, values, indices, texts)


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


def _find_column(leads: LeadColumns, wanted: InputColumn) -> Column:
    column = leads.columns.get(wanted.name)
    if column is None or column.kind != wanted.kind:
        raise ValueError(f"column {wanted.name!r} is absent or not a {wanted.kind}")
    return column


def _number_texts(values: NDArray[Any]) -> tuple[NDArray[np.intp], Sequence[str]]:
    """Numbers the distinct texts, so that each is normalised once and a feature is one table look-up."""
    index_of: defaultdict[object, int] = defaultdict(count().__next__)
    indices = np.fromiter(map(index_of.__getitem__, values.tolist()), np.intp, len(values))
    return indices, [normalise_text(str(text)) for text in index_of]


def _value(cells: Cells, places: Places, _params: Params, _as_of: AsOf) -> Built:
    return Built(cells.values[places[0]], cells.states[places[0]])


def _log1p(cells: Cells, places: Places, _params: Params, _as_of: AsOf) -> Built:
    numbers = cells.values[places[0]]
    return Built(np.log1p(np.where(numbers < 0, np.nan, numbers)), cells.states[places[0]])


def _is_present(cells: Cells, places: Places, _params: Params, _as_of: AsOf) -> Built:
    states = cells.states[places[0]]
    return Built((states == CellState.PRESENT).astype(np.float64), np.zeros_like(states))


def _age_days(cells: Cells, places: Places, _params: Params, as_of: AsOf) -> Built:
    age = (as_of - cells.values[places[0]]) / _SECONDS_PER_DAY
    return Built(np.maximum(age, 0.0), cells.states[places[0]])


def _days_until(cells: Cells, places: Places, _params: Params, as_of: AsOf) -> Built:
    return Built((cells.values[places[0]] - as_of) / _SECONDS_PER_DAY, cells.states[places[0]])


def _days_between(cells: Cells, places: Places, _params: Params, _as_of: AsOf) -> Built:
    start, end = places
    days = (cells.values[end] - cells.values[start]) / _SECONDS_PER_DAY
    return Built(days, np.maximum(cells.states[start], cells.states[end]))


def _ratio(cells: Cells, places: Places, params: Params, _as_of: AsOf) -> Built:
    above, below = (cells.values[place] for place in places)
    zero_over_zero = _column_of(params, "zero_over_zero")
    quotient = np.where((above == 0) & (below == 0), zero_over_zero, above / below)
    return Built(quotient, np.maximum(cells.states[places[0]], cells.states[places[1]]))


def _level(cells: Cells, places: Places, params: Params, _as_of: AsOf) -> Built:
    states, tables = cells.states[places[0]], [rules["levels"] for rules in params]
    # No level is NaN, so a text without one is told by it.
    numbers = _look_up(cells, places[0], lambda feature, text: tables[feature].get(text, np.nan))
    missing, unseen = states == CellState.MISSING, np.isnan(numbers)
    values = np.where(unseen, _column_of(params, "unseen"), numbers)
    return Built(
        np.where(missing, _column_of(params, "missing"), values),
        np.where(unseen & ~missing, CellState.UNSEEN, states).astype(np.uint8),
    )


def _one_of(cells: Cells, places: Places, params: Params, _as_of: AsOf) -> Built:
    states, lists = cells.states[places[0]], [rules["values"] for rules in params]
    hits = _look_up(cells, places[0], lambda feature, text: float(text in lists[feature]))
    return Built(np.where(states == CellState.PRESENT, hits, np.nan), states)


def _look_up(cells: Cells, place: NDArray[np.intp], number_of: Callable[[int, str], float]) -> FloatArray:
    """Returns the number (f, n) each feature has for each lead's text; asks once for each distinct text."""
    tables = [[number_of(feature, text) for text in cells.texts[row]] for feature, row in enumerate(place)]
    starts = np.array([0, *accumulate(map(len, tables[:-1]))], dtype=np.intp)
    numbers = np.array([number for table in tables for number in table], dtype=np.float64)
    found: FloatArray = numbers[cells.indices[place] + starts[:, None]]
    return found


def _column_of(params: Params, name: str) -> FloatArray:
    """Returns an optional parameter of `f` features (f, 1), NaN where it is not given."""
    return np.array([[rules.get(name, np.nan)] for rules in params])


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
