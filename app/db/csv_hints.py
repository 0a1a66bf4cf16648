"""What kept a column of a CSV file from being numbers or times, for whoever can write the file again.

Only ever a hint: 12/05 is two dates and 1,100 two numbers, so nothing is guessed. Pure, and repeats no value
but the usual words for nothing. Called by `app.db.csv_inspection`.
"""

import re
import shlex
from collections import Counter
from functools import lru_cache
from typing import Literal

from app.db.csv_columns import TypeGuess, read_number, read_timestamp

_PLACEHOLDERS = {
    "null", "(null)", "nil", "none", "n/a", "na", "n.a.", "#n/a", "#null!", "#value!", "#div/0!", "#ref!",
    r"\n", "-", "--", "?", "unknown", "missing", "(blank)", "(empty)", "0000-00-00", "0000-00-00 00:00:00",
}  # fmt: skip
_SIGN = r"[+\u2212-]?"
_CURRENCY = (
    r"(?:(?:US|A|C)?\$|[£€¥₹₽₺₩฿]|Rs\.?|kr|zł"
    "|EUR|USD|GBP|CHF|INR|JPY|CNY|AUD|CAD|SEK|NOK|DKK|PLN|CZK|BRL|ZAR)"
)
_DIGITS = r"\d[\d.,'\u2019 \u00a0\u202f]*"
_WRITTEN_NUMBERS = (
    rf"{_SIGN}\s?{_CURRENCY}\s?{_SIGN}{_DIGITS}|{_SIGN}{_DIGITS}(?:{_CURRENCY}|%)",
    rf"{_SIGN}(?:0|[1-9]\d*),\d+",
    rf"{_SIGN}[1-9]\d{{0,2}}(?:,\d{{2,3}})*,\d{{3}}(?:\.\d+)?",
    rf"{_SIGN}[1-9]\d{{0,2}}(?:['\u2019\u00a0\u202f]\d{{3}})+(?:[.,]\d+)?",
    # With nothing after it, 612.345.678 or 612 345 678 is rather a telephone number.
    rf"{_SIGN}[1-9]\d{{0,2}}(?:[. ]\d{{3}})+,\d+",
    r"[+-]?[1-9]\d*(?:\.\d*)?e\+?\d{3,}|[1-9]\d{308,}",  # too large
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_YEAR = r"(?:19|20)\d\d"
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
_WRITTEN_DATES = (
    rf"{_DAY}([./-]){_DAY}\1{_YEAR}|{_DAY}/{_DAY}/\d\d|\d\d\.\d\d\.\d\d|{_YEAR}[./-]\d\d?[./-]\d\d?",
    rf"{_DAY}[ .-]{{0,2}}{_MONTH}[ -](?:{_YEAR}|\d\d)|{_MONTH} {_DAY},? {_YEAR}",
)
_CLOCK = (
    r",?[ T]+\d\d?[:.]\d\d(?:[:.]\d\d(?:[.,]\d+)?)?(?: ?[ap]\.?m\.?)?(?: ?(?:Z|UTC|GMT))?(?:[+-]\d\d:?\d\d)?"
)
_WRITTEN_NUMBER = re.compile("|".join(_WRITTEN_NUMBERS), re.ASCII | re.IGNORECASE)
_WRITTEN_TIME = re.compile(f"(?:{'|'.join(_WRITTEN_DATES)})(?:{_CLOCK})?", re.ASCII | re.IGNORECASE)
_LONGEST = 400  # as the longest number that is too large
_MOST_STRAYS = 0.1
_has_digit = re.compile(r"\d").search

_Shape = Literal["number", "written number", "time", "written time", "word", "other"]
_KINDS: tuple[tuple[_Shape, _Shape, str, str], ...] = (
    (
        "number", "written number", "numbers",
        "write them 1234.50: no decimal comma, thousands mark, currency or percent sign, and below 1e308",
    ),
    ("time", "written time", "dates", "write them YYYY-MM-DD, or 2026-01-31T23:59:00"),
)  # fmt: skip


class TextHints:
    """Counts what the values of one column look like, from the first that is neither number nor time."""

    def __init__(self) -> None:
        self._shapes = Counter[_Shape]()
        self._placeholders = Counter[str]()
        self._first: dict[_Shape, int] = {}

    def see(self, value: str, line: int) -> None:
        """Takes one value into account, and the line it stands in."""
        if value.casefold() in _PLACEHOLDERS:
            self._placeholders[value] += 1
            return
        shape = _find_shape(value) if len(value) <= _LONGEST else "other"
        self._shapes[shape] += 1
        self._first.setdefault(shape, line)

    def tell(self, guess: TypeGuess) -> tuple[str, ...]:
        """Returns what to write otherwise where all but a few values are numbers, or dates; else nothing.

        A column of numbers and of others with digits in them (house numbers, postcodes) is what it should be.
        """
        shapes = self._shapes + Counter[_Shape]({"number": guess.numbers, "time": guess.times})
        values = shapes.total()
        for plain, written, noun, remedy in _KINDS:
            strays = shapes.keys() - {plain, written}
            lost = sum(shapes[shape] for shape in strays)
            if not values or lost > values * _MOST_STRAYS or (strays - {"word"} and not shapes[written]):
                continue
            hints = []
            if shapes[written]:
                hints.append(f"{shapes[written]:,} of {guess.present:,} values look like {noun}: {remedy}")
            for word, count in self._placeholders.most_common():
                found = f"{count:,} of {guess.present:,} values are {word}"
                hints.append(f"{found}: if that means missing, give --missing {shlex.quote(word)}")
            if lost:
                first = min(self._first[shape] for shape in strays)
                hints.append(f"{lost:,} of {guess.present:,} values are no {noun}, the first in line {first}")
            return tuple(hints)
        return ()


@lru_cache(4096)  # most columns of text have few values
def _find_shape(value: str) -> _Shape:
    if read_number(value) is not None:
        return "number"
    if read_timestamp(value) is not None:
        return "time"
    if not _has_digit(value):
        return "word"
    if _WRITTEN_NUMBER.fullmatch(value):
        return "written number"
    return "written time" if _WRITTEN_TIME.fullmatch(value) else "other"
