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


PRESENT, MISSING, INVALID, UNSEEN = map(np.uint8, CellState)
"""The states as NumPy has them: it takes three times as long to compare an array with an enumeration."""


class Reading(NamedTuple):
    """How the input columns of a feature set are read: the `a` of numbers first, then those of text.

    `names` and `kinds` are those of the columns. `lower` and `upper` (a, 1) bound what is usable, `flags` are
    the rows of booleans.
    """

    columns: tuple[InputColumn, ...]
    names: list[str]
    kinds: list[ColumnKind]
    numbers: int
    lower: FloatArray
    upper: FloatArray
    flags: NDArray[np.intp]

    @classmethod
    def of(cls, wanted: Sequence[InputColumn]) -> "Reading":
        """Returns how these columns are read, in an order of its own."""
        columns = tuple(sorted(wanted, key=lambda column: column.kind == "text"))
        names, kinds = [column.name for column in columns], [column.kind for column in columns]
        numbers = len(kinds) - kinds.count("text")
        lower, upper = np.array([_RANGES[kind] for kind in kinds[:numbers]]).reshape(-1, 2).T[:, :, None]
        flags = np.array([row for row, kind in enumerate(kinds) if kind == "boolean"], dtype=np.intp)
        return cls(columns, names, kinds, numbers, lower, upper, flags)


class Cells(NamedTuple):
    """The `c` input columns of `n` leads in the order of their `Reading`, made ready.

    `states` (c, n) is PRESENT, MISSING or INVALID. Numbers are in `values` (a, n), NaN where not PRESENT.
    Text is in `indices` (c - a, n) into `texts` (c - a), the distinct ones of each column in the form they
    are compared in.
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


def read_cells(leads: LeadColumns, reading: Reading) -> Cells:
    """Makes columns ready; done once, however many features read them.

    Raises:
        ValueError: a column is absent or of another kind.
    """
    columns = _find_columns(leads, reading)
    absent = ~np.array([column.present for column in columns])
    states = absent.view(np.uint8)  # as long as nothing is found wrong: PRESENT or MISSING
    numbers, texts = columns[: reading.numbers], columns[reading.numbers :]
    values = np.array([column.values for column in numbers], dtype=np.float64).reshape(len(numbers), leads.n)
    wrong = ~((values >= reading.lower) & (values <= reading.upper))
    if reading.flags.size:
        wrong[reading.flags] |= values[reading.flags] != np.rint(values[reading.flags])
    if wrong.any():
        values[wrong] = np.nan
        states[: len(numbers)][wrong & ~absent[: len(numbers)]] = INVALID
    indices = np.empty((len(texts), leads.n), np.intp)
    distinct: list[Sequence[str]] = []
    for row, column in enumerate(texts):
        indices[row], found = _number_texts(column.values)
        if "" in found:
            blank = np.array([not text for text in found])
            states[len(numbers) + row, blank[indices[row]]] = MISSING
        distinct.append(found)
    return Cells(states, values, indices, distinct)


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


def _find_columns(leads: LeadColumns, reading: Reading) -> list[Column]:
    try:
        columns = [leads.columns[name] for name in reading.names]
    except KeyError as exc:
        raise ValueError(f"column {exc} is absent") from None
    if [column.kind for column in columns] != reading.kinds:
        pairs = zip(reading.columns, columns, strict=True)
        wanted = next(wanted for wanted, found in pairs if wanted.kind != found.kind)
        raise ValueError(f"column {wanted.name!r} is not a {wanted.kind}")
    return columns


def _number_texts(values: NDArray[Any]) -> tuple[NDArray[np.intp], Sequence[str]]:
    """Numbers the distinct texts, so that each is normalised once and a feature is one table look-up."""
    texts = values.tolist()
    index_of = dict(zip(dict.fromkeys(texts), count(), strict=False))
    indices = np.fromiter(map(index_of.__getitem__, texts), np.intp, len(texts))
    return indices, [normalise_text(str(text)) for text in index_of]


def _value(cells: Cells, places: Places, _params: Params, _as_of: AsOf) -> Built:
    return Built(cells.values[places[0]], cells.states[places[0]])


def _log1p(cells: Cells, places: Places, _params: Params, _as_of: AsOf) -> Built:
    numbers = cells.values[places[0]]
    return Built(np.log1p(np.where(numbers < 0, np.nan, numbers)), cells.states[places[0]])


def _is_present(cells: Cells, places: Places, _params: Params, _as_of: AsOf) -> Built:
    states = cells.states[places[0]]
    return Built((states == PRESENT).astype(np.float64), np.zeros_like(states))


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
    missing, unseen = states == MISSING, np.isnan(numbers)
    values = np.where(unseen, _column_of(params, "unseen"), numbers)
    return Built(
        np.where(missing, _column_of(params, "missing"), values),
        np.where(unseen & ~missing, UNSEEN, states).astype(np.uint8),
    )


def _one_of(cells: Cells, places: Places, params: Params, _as_of: AsOf) -> Built:
    states, lists = cells.states[places[0]], [rules["values"] for rules in params]
    hits = _look_up(cells, places[0], lambda feature, text: float(text in lists[feature]))
    return Built(np.where(states == PRESENT, hits, np.nan), states)


def _look_up(cells: Cells, place: NDArray[np.intp], number_of: Callable[[int, str], float]) -> FloatArray:
    """Returns the number (f, n) each feature has for each lead's text; asks once for each distinct text."""
    rows = place - len(cells.values)
    tables = [
        [number_of(feature, text) for text in cells.texts[row]] for feature, row in enumerate(rows.tolist())
    ]
    starts = np.array([[0], *([end] for end in accumulate(map(len, tables[:-1])))])
    numbers = np.array([number for table in tables for number in table], dtype=np.float64)
    found: FloatArray = numbers[cells.indices[rows] + starts]
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
