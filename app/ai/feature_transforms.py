"""The vocabulary of features: which transforms there are, what they read, and what they mean.

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

A text becomes a small number, its code, at once: blank, or one of those a feature of the column names, or any
other. What a feature of texts makes of each code is tabulated here, once; how numbers are computed is
`feature_plan`'s. Pure: no I/O, no clock.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from app.ai.column_blocks import NULL_TEXT, decode_text
from app.ai.domain import ColumnKind
from app.ai.score_kernels import KNOWN_TEXT, TEXT_BYTES, Operation

LARGEST = float(np.finfo(np.float32).max)
"""No usable number is farther from 0: forests compute in single precision."""

_YEAR_1, _YEAR_10000 = -62_135_596_800.0, 253_402_300_800.0
# PostgreSQL has timestamps at infinity, and others that no calendar of ours can name.
RANGES: Mapping[ColumnKind, tuple[float, float]] = {
    "number": (-LARGEST, LARGEST),
    "boolean": (0.0, 1.0),
    "timestamp": (_YEAR_1, float(np.nextafter(_YEAR_10000, 0.0))),
}
"""The smallest and the largest usable number of each kind."""

_MOST_REMEMBERED = 1000
_NONE_SEEN = np.zeros(0, KNOWN_TEXT)

BLANK, OTHER, FIRST_KNOWN = range(3)
"""The codes of no text and of a text no feature names, and the first of those that are named."""


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

Level = tuple[float, CellState]
"""What a feature makes of a text: its value, and the state of the cell."""
Tabulate = Callable[[Mapping[str, Any], Sequence[str]], list[Level]]
"""From a feature's parameters and the named texts to the level of each code."""


class Transform(NamedTuple):
    """Which kinds it reads position by position, how numbers and texts are built, which parameters it has."""

    kinds: tuple[tuple[ColumnKind, ...], ...]
    operation: Operation = Operation.LOOK_UP
    tabulate: Tabulate | None = None
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


class TextCodes(dict[bytes, int]):
    """The codes of texts as they are stored, in UTF-8: a column repeats a few, so they are remembered.

    `named` are distinct and as they are compared. The first ones met are entered into `seen`, too, which are
    `KNOWN_TEXT` for the loops in C: half of them at most such as are not named. Several threads may ask.
    """

    def __init__(self, named: Sequence[str], seen: NDArray[np.void] = _NONE_SEEN) -> None:
        super().__init__()
        codes = range(FIRST_KNOWN, FIRST_KNOWN + len(named))
        self._codes = dict(zip(named, codes, strict=True)) | {"": BLANK}
        self._seen = seen
        self._entered: set[bytes] = set()

    def __missing__(self, text: bytes) -> int:
        code = BLANK if text == NULL_TEXT else self._codes.get(normalise_text(decode_text(text)), OTHER)
        if len(text) < TEXT_BYTES:
            if len(self) >= _MOST_REMEMBERED:
                self.clear()
            self[text] = code
            self._enter(text, code)
        return code

    def _enter(self, text: bytes, code: int) -> None:
        # Two threads that meet here may leave a place free, and what stands after it is not found: no more.
        place, room = len(self._entered), len(self._seen) // (2 if code == OTHER else 1)
        if place < room and text not in self._entered:
            self._entered.add(text)
            self._seen[place] = text, len(text) + 1, code

    def code(self, texts: Sequence[bytes]) -> list[int]:
        """Returns the code of each text."""
        return list(map(self.__getitem__, texts))


def named_texts(params: Mapping[str, Any]) -> list[str]:
    """Returns the texts a feature with these parameters names, as they are compared; blank is none."""
    return [text for text in (*params.get("levels", ()), *params.get("values", ())) if text]


def check_params(transform: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters as they are used: texts as they are compared, numbers as floats.

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


def _tabulate_presence(_params: Mapping[str, Any], texts: Sequence[str]) -> list[Level]:
    return [(0.0, CellState.PRESENT)] + [(1.0, CellState.PRESENT)] * (1 + len(texts))


def _tabulate_level(params: Mapping[str, Any], texts: Sequence[str]) -> list[Level]:
    blank = params.get("missing", np.nan), CellState.MISSING
    other = params.get("unseen", np.nan), CellState.UNSEEN
    known = {text: (number, CellState.PRESENT) for text, number in params["levels"].items()}
    return [blank, other, *(known.get(text, other) for text in texts)]


def _tabulate_one_of(params: Mapping[str, Any], texts: Sequence[str]) -> list[Level]:
    hits = [(float(text in params["values"]), CellState.PRESENT) for text in texts]
    return [(np.nan, CellState.MISSING), (0.0, CellState.PRESENT), *hits]


TRANSFORMS: Mapping[str, Transform] = {
    "value": Transform((("number",),), Operation.VALUE),
    "log1p": Transform((("number",),), Operation.LOG1P),
    "flag": Transform((("boolean",),), Operation.VALUE),
    "is_present": Transform((get_args(ColumnKind),), Operation.IS_PRESENT, _tabulate_presence),
    "age_days": Transform((("timestamp",),), Operation.AGE_DAYS),
    "days_until": Transform((("timestamp",),), Operation.DAYS_UNTIL),
    "days_between": Transform((("timestamp",), ("timestamp",)), Operation.DAYS_BETWEEN),
    "ratio": Transform((("number",), ("number",)), Operation.RATIO, optional=frozenset({"zero_over_zero"})),
    "level": Transform(
        (("text",),),
        tabulate=_tabulate_level,
        required=frozenset({"levels"}),
        optional=frozenset({"missing", "unseen"}),
    ),
    "one_of": Transform((("text",),), tabulate=_tabulate_one_of, required=frozenset({"values"})),
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
