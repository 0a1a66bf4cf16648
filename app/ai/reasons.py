"""Reasons in words: what is known of a lead, feature by feature, and the sentences a salesperson reads.

The words are the feature's description, the training statistics and the levels the manifest names; of the
lead comes only the class its value falls in. A text that is not a level is "another one", whatever it says; a
number keeps three digits; a time is told in days, later in months and years. Pure: no I/O, no clock. Called
by `explanation`, for a hundred leads or so at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, expm1
from typing import NamedTuple

import numpy as np

from app.ai.column_blocks import encode_text
from app.ai.domain import FloatArray, LeadColumns
from app.ai.feature_safety import FeatureStatistics
from app.ai.feature_transforms import CellState, TextCodes, named_texts
from app.ai.features import FeatureMatrix, FeatureSet, FeatureSpec

MAX_REASONS = 5
REST = "everything else"
ABSTAINED = "too little is known of this lead: the probability is the base rate"
NOTHING_LEARNT = "too few outcomes are known yet to tell leads apart: the probability is the base rate"

_UNKNOWN, _UNUSABLE, _ANOTHER = "unknown", "not usable", "another one"
_MOST = 0.75
_DAYS_IN_MONTH, _DAYS_IN_YEAR = 30.44, 365.25


class GroupWords(NamedTuple):
    """One group of features in words: what it is about, and the class of each lead's value (n)."""

    about: str
    classes: list[str]
    is_time: bool


def put_into_words(
    leads: LeadColumns,
    matrix: FeatureMatrix,
    feature_set: FeatureSet,
    statistics: Sequence[FeatureStatistics],
) -> list[GroupWords]:
    """Returns the words for each group of features of `n` leads; `matrix` holds their features as built."""
    groups = []
    for group, name in zip(feature_set.groups, feature_set.group_names, strict=True):
        # Whether a value is there goes without saying where the value itself is told.
        told = [index for index in group if feature_set.specs[index].transform != "is_present"] or group
        spec = feature_set.specs[told[0]]
        if spec.transform in {"level", "one_of"}:
            classes = _classify_texts(leads, [feature_set.specs[index] for index in told])
        else:
            values, states = matrix.values[:, told[0]], matrix.states[:, told[0]]
            classes = _classify_numbers(spec.transform, values, states.tolist(), statistics[told[0]])
        # Of several features the columns they share say best what they are all about.
        about = spec.description.strip().rstrip(".") if len(group) == 1 else name.replace("_", " ")
        groups.append(GroupWords(about, classes, spec.transform in {"age_days", "days_until"}))
    return groups


def write_reasons(
    groups: Sequence[GroupWords], row: int, contributions: Sequence[float], total: float
) -> list[str]:
    """Returns what moved the lead in this row most, by group, as sentences; half a point is no reason.

    `total` is how far the probability is from the base rate. What the sentences leave of it (other groups,
    and calibration, which may be more than any of them) is the last one, so that the points add up to it.
    """
    points = [round(100 * contribution) for contribution in contributions]
    ranked = sorted(range(len(groups)), key=lambda group: -abs(contributions[group]))
    told = [group for group in ranked[:MAX_REASONS] if points[group]]
    sentences = [_say(_name(groups[group], row), points[group]) for group in told]
    rest = round(100 * total) - sum(points[group] for group in told)
    return [*sentences, _say(REST, rest)] if rest else sentences


def _name(group: GroupWords, row: int) -> str:
    value = group.classes[row]
    return f"{group.about} {value}" if group.is_time else f"{group.about} ({value})"


def _say(what: str, points: int) -> str:
    return f"{what}: {points:+d} point{'' if abs(points) == 1 else 's'}"


def _classify_texts(leads: LeadColumns, specs: Sequence[FeatureSpec]) -> list[str]:
    """Names the levels the model has a number for, in the manifest's words, and no other text."""
    levels = list(dict.fromkeys(text for spec in specs for text in named_texts(spec.params)))
    words = [_UNKNOWN, _ANOTHER, *levels]  # by code
    texts = leads.columns[specs[0].inputs[0].name].values.tolist()
    return [words[code] for code in TextCodes(levels).code(list(map(encode_text, texts)))]


def _classify_numbers(
    transform: str, values: FloatArray, states: Sequence[int], statistics: FeatureStatistics
) -> list[str]:
    word = _WORDS[transform]
    ranks = _rank(values, statistics) if transform in _RANKED else [""] * len(values)
    gaps = {CellState.MISSING: _UNKNOWN, CellState.INVALID: _UNUSABLE}
    return [
        word(value) + rank if state == CellState.PRESENT else gaps[CellState(state)]
        for value, state, rank in zip(values.tolist(), states, ranks, strict=True)
    ]


def _rank(values: FloatArray, statistics: FeatureStatistics) -> list[str]:
    """Tells which values (n,) are above or below those of three quarters of the training rows."""
    counts = np.array(statistics.counts[:-1])
    bins = np.searchsorted(np.array(statistics.edges), values, side="left")
    below = np.append(0, np.cumsum(counts))[bins]
    above = counts.sum() - below - counts[bins]
    most = _MOST * max(int(counts.sum()), 1)
    words = np.where(below >= most, ", more than most", np.where(above >= most, ", less than most", ""))
    return [str(word) for word in words]


def _say_number(value: float) -> str:
    rounded = float(f"{value:.3g}")
    return f"{'' if abs(rounded - value) <= 1e-9 * abs(value) else 'about '}{rounded:,.15g}"


def _say_age(days: float) -> str:
    # Counted from the midnight that today begins with: an hour before it was yesterday.
    return "today" if days <= 0 else f"{_say_span(ceil(days))} ago"


def _say_until(days: float) -> str:
    return f"in {_say_span(days)}" if days >= 1 else _say_age(-days)


def _say_span(days: float) -> str:
    span = abs(days)
    if span < 60:
        return _count(int(span), "day")
    if span < 2 * _DAYS_IN_YEAR:
        return _count(round(span / _DAYS_IN_MONTH), "month")
    return _count(round(span / _DAYS_IN_YEAR), "year")


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def _say_whether(value: float) -> str:
    return "yes" if value else "no"


_RANKED = frozenset({"value", "log1p", "ratio"})
_WORDS: Mapping[str, Callable[[float], str]] = {
    "value": _say_number,
    "log1p": lambda value: _say_number(expm1(value)),
    "ratio": _say_number,
    "flag": _say_whether,
    "is_present": _say_whether,
    "age_days": _say_age,
    "days_until": _say_until,
    "days_between": lambda days: f"{'-' if days <= -1 else ''}{_say_span(days)}",
}
"""How a value of each transform is said; texts have their levels."""
