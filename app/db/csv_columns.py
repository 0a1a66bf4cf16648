"""What the columns of a CSV file are called in the database, and what type their values have.

Pure: texts in, decisions out, one value at a time. Missing values never reach it. Called by
`app.db.csv_inspection`, `app.db.csv_hints` and `app.db.csv_import`.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime

from app.ai.domain import ColumnKind, is_uuid

_LONGEST_NAME = 63
_HEADER = re.compile(rf"(?!.*\d{{3}})[^\W\d][^@]{{0,{_LONGEST_NAME - 1}}}", re.DOTALL)
_SYSTEM_NAMES = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
_TRUE = frozenset({"true", "yes", "t", "y"})
_WORD_PAIRS = tuple(map(frozenset, (("true", "false"), ("yes", "no"), ("t", "f"), ("y", "n"))))
_FALSE = frozenset({"false", "no", "f", "n"})
# A number written with a leading zero is a code (a postcode, a telephone number), and would lose it.
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_TIMESTAMP = re.compile(
    r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)


def build_names(headers: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Returns a distinct snake_case name for each header, none of them among `taken` or PostgreSQL's own."""
    names: list[str] = []
    used = {*taken, *_SYSTEM_NAMES}
    for position, header in enumerate(headers, start=1):
        wanted = _snake_case(header) or f"column_{position}"
        name, copy = wanted, 1
        while name in used:
            copy += 1
            suffix = f"_{copy}"
            name = wanted[: _LONGEST_NAME - len(suffix)] + suffix
        used.add(name)
        names.append(name)
    return names


def could_be_header(text: str) -> bool:
    """Tells whether a text could be the name of a column, and is no address, number, ID or date of a lead.

    The name of a person or a place could be either.
    """
    return _HEADER.fullmatch(text) is not None and not is_uuid(text)


def _snake_case(header: str) -> str:
    plain = unicodedata.normalize("NFKD", header).encode("ascii", "ignore").decode()
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain)
    name = re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_")
    return (f"c_{name}" if name[:1].isdigit() else name)[:_LONGEST_NAME].rstrip("_")


class TypeGuess:
    """Narrows down the type of a column, value by value: boolean, number, timestamp, or else text.

    Booleans are words (yes/no, true/false, y/n, t/f in any case); 0 and 1 are numbers. `numbers` and `times`
    count the values before the first that is something else.
    """

    def __init__(self) -> None:
        self.present = self.numbers = self.times = 0
        self._words: set[str] = set()
        self._numbers = True
        self._any_finite = False
        self._timestamps = True

    def see(self, value: str) -> None:
        """Takes one value into account."""
        self.present += 1
        if len(self._words) < 3:
            self._words.add(value.casefold())
        if self._numbers:
            number = read_number(value)
            self._numbers = number is not None
            self.numbers += self._numbers
            self._any_finite |= number is not None and math.isfinite(number)
        if self._timestamps:
            self._timestamps = read_timestamp(value) is not None
            self.times += self._timestamps

    @property
    def is_word(self) -> bool:
        """Whether the column can be neither numbers nor timestamps any more."""
        return not (self._numbers or self._timestamps)

    @property
    def kind(self) -> ColumnKind:
        """The narrowest type that every value seen fits."""
        if not self.present:
            return "text"
        if any(self._words <= pair for pair in _WORD_PAIRS):
            return "boolean"
        if self._numbers and self._any_finite:
            return "number"
        return "timestamp" if self._timestamps else "text"


def read_number(value: str) -> float | None:
    """Returns the number a text stands for, NaN and infinity included, or None."""
    if _NUMBER.fullmatch(value):
        number = float(value)
        return number if math.isfinite(number) else None
    return float(value) if _NOT_FINITE.fullmatch(value) else None


def read_timestamp(value: str) -> datetime | None:
    """Returns the moment an ISO 8601 date or time stands for, or None; without an offset it is UTC."""
    if not _TIMESTAMP.fullmatch(value):
        return None
    try:
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def read_label(value: str) -> bool | None:
    """Returns the outcome a label stands for (yes/no, true/false, y/n, t/f, 1/0), or None."""
    word = value.casefold()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    number = read_number(value)
    return bool(number) if number in {0.0, 1.0} else None


def _boolean_text(value: str) -> str:
    return "t" if read_label(value) else "f"


def _number_text(value: str) -> str | None:
    number = read_number(value)
    return None if number is None else repr(number)


def _timestamp_text(value: str) -> str | None:
    moment = read_timestamp(value)
    return None if moment is None else moment.isoformat()


TO_POSTGRES: Mapping[ColumnKind, tuple[str, Callable[[str], str | None]]] = {
    "boolean": ("boolean", _boolean_text),
    "number": ("double precision", _number_text),
    "timestamp": ("timestamptz", _timestamp_text),
    "text": ("text", str),
}
"""For each type: its name in PostgreSQL, and how a value is written for COPY."""
