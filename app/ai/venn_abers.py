"""Venn-Abers: what the outcomes of a calibration set allow a probability to be, as a table to look up.

For a score s, p0 is the value at s of the isotonic fit on the calibration set with (s, 0) added to it, and p1
that with (s, 1) added; whatever the outcome turns out to be, one of the two was fitted on it, so the pair is
calibrated without assumptions beyond exchangeability (Vovk, Petej and Fedorova, Large-scale probabilistic
predictors with and without guarantees of validity, NeurIPS 2015). Both are step functions of s, so the table
holds the scores at which one of them steps.

Pure: NumPy and whole numbers, no I/O. A looked up pair depends on its own score alone. Publishing builds the
table, on scores of rows the model has not seen; calibration and the predictor look up in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.ai.domain import BoolArray, FloatArray, IntArray, JsonObject

HALFWAY_SECONDS = 3600.0
"""The age at which an answer that cannot be checked has lost half of what its interval said."""

_FIELDS = frozenset({"scores", "p0", "p1"})


@dataclass(frozen=True, slots=True, eq=False)
class VennAbersTable:
    """Two rising step functions of the raw score.

    `scores` (k,) ascend; `p0` and `p1` (k + 1,) hold the values between them. At `scores[i]` itself p0 has
    stepped already (`p0[i + 1]`) and p1 has not yet (`p1[i]`).

    Raises:
        ValueError: the arrays do not describe such functions with 0 <= p0 <= p1 <= 1 everywhere.
    """

    scores: FloatArray
    p0: FloatArray
    p1: FloatArray

    def __post_init__(self) -> None:
        if self.scores.ndim != 1 or not self.p0.shape == self.p1.shape == (len(self.scores) + 1,):
            raise ValueError("needs one value of p0 and p1 more than scores")
        if not np.all(np.isfinite(self.scores)) or np.any(np.diff(self.scores) <= 0):
            raise ValueError("needs finite, ascending scores")
        if not all(np.all((p >= 0) & (p <= 1)) and np.all(np.diff(p) >= 0) for p in (self.p0, self.p1)):
            raise ValueError("needs probabilities in [0, 1] that do not fall")
        if np.any(self.p0 > self.p1) or np.any(self.p0[1:] > self.p1[:-1]):
            raise ValueError("p0 lies above p1")

    def to_json(self) -> JsonObject:
        """Returns the table as JSON values; `from_json` gives an equal one."""
        return {name: getattr(self, name).tolist() for name in ("scores", "p0", "p1")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "VennAbersTable":
        """Reads a table back.

        Raises:
            ValueError: a field is missing or unknown or not a list of numbers, or see the class.
        """
        if set(data) != _FIELDS:
            raise ValueError("a Venn-Abers table has the fields p0, p1 and scores")
        return cls(**{name: np.array(data[name], dtype=np.float64) for name in _FIELDS})


def build_table(scores: npt.ArrayLike, outcome: npt.ArrayLike) -> VennAbersTable:
    """Builds the table of calibration scores (n,) and their 0/1 outcomes (n,), in O(n log n).

    Scores at which neither function steps are left out.

    Raises:
        ValueError: no rows, unequal lengths, a score that is not finite, or an outcome other than 0 and 1.
    """
    sample, happened = np.asarray(scores, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    if sample.ndim != 1 or sample.shape != happened.shape or sample.size == 0:
        raise ValueError("needs as many outcomes as scores, and at least one")
    if not np.all(np.isfinite(sample)) or not np.all((happened == 0) | (happened == 1)):
        raise ValueError("needs finite scores, and outcomes that are 0 or 1")
    distinct, group, counts = np.unique(sample, return_inverse=True, return_counts=True)
    rows, hits = counts.astype(np.int64), np.bincount(group, weights=happened).astype(np.int64)
    # An added 1 always joins the rows just above it, an added 0 those just below: what holds at a score holds
    # in the gap beside it. Adding 0 is adding 1 after both the order and the outcomes are turned round.
    positives, size = _fit_with_one_added(rows, hits)
    p1 = np.append(positives / size, 1.0)
    negatives, size = (part[::-1] for part in _fit_with_one_added(rows[::-1], (rows - hits)[::-1]))
    p0 = np.append(0.0, (size - negatives) / size)
    steps = (np.diff(p0) > 0) | (np.diff(p1) > 0)
    kept = np.append(True, steps)
    return VennAbersTable(distinct[steps], p0[kept], p1[kept])


def look_up(table: VennAbersTable, raw: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Returns p0 (n,) and p1 (n,) of raw scores (n,): one binary search each.

    A NaN is taken for the lowest score there is, as `calibration.calibrate` does.
    """
    scores = np.fmax(np.ascontiguousarray(raw, dtype=np.float64), -np.inf)
    below = np.searchsorted(table.scores, scores)
    if not len(table.scores):
        return table.p0[below], table.p1[below]
    met = table.scores[np.minimum(below, len(table.scores) - 1)] == scores
    return table.p0[below + met], table.p1[below]


def build_intervals(
    table: VennAbersTable | None,
    raw: FloatArray,
    probability: FloatArray,
    *,
    unknown: BoolArray,
    bounds: tuple[float, float],
) -> FloatArray:
    """Returns the lower and the upper end (n, 2) of each lead's interval, within `bounds`.

    From p0 to p1 of its raw score (n,), made wide enough to hold the `probability` (n,) that is shown:
    another calibrator may have been chosen, and nobody should read a number outside its own interval. A lead
    of which all is `unknown` (n,) could have any score, so its interval reaches from the lowest p0 to the
    highest p1, which is as wide as the bounds; without a table that holds for every lead.
    """
    low, high = look_up(table, raw) if table else (np.zeros(len(raw)), np.ones(len(raw)))
    ends: FloatArray = np.column_stack([np.where(unknown, 0.0, low), np.where(unknown, 1.0, high)])
    ends = np.minimum(np.maximum(ends, bounds[0]), bounds[1])
    ends[:, 0] = np.minimum(ends[:, 0], probability)
    ends[:, 1] = np.maximum(ends[:, 1], probability)
    return ends


def widen(intervals: FloatArray, age_seconds: float, bounds: tuple[float, float]) -> FloatArray:
    """Returns the intervals (n, 2) of answers that are `age_seconds` old and cannot be checked.

    Each end is moved towards its bound, by a share of the way that is 0 for a fresh answer and a half after
    `HALFWAY_SECONDS`: the older an answer, the less it says, until it says nothing.
    """
    share = age_seconds / (age_seconds + HALFWAY_SECONDS)
    widened: FloatArray = intervals + share * (np.array(bounds) - intervals)
    return widened


def merge(p0: FloatArray, p1: FloatArray) -> FloatArray:
    """Returns the one probability (n,) between p0 and p1 whose largest regret in log-loss is the least.

    p1 / (1 - p0 + p1): Vovk, Petej and Fedorova 2015, section 4.
    """
    merged: FloatArray = p1 / (1.0 - p0 + p1)
    return merged


def _fit_with_one_added(rows: IntArray, hits: IntArray) -> tuple[IntArray, IntArray]:
    """Returns, for a 1 added at each distinct score, the positives and the size of the block it ends up in.

    Isotonic regression is the slope of the lower convex hull of the cumulative sums (Barlow et al. 1972). The
    added 1 parts the sums into those `before` and those from its score on, one step up and to the right; its
    block is the bridge between the two hulls. The bridge only gets steeper as the score rises, so both of
    its ends only move right: the walks take O(n) steps in all. Whole numbers, so every comparison is exact.
    """
    x, y = _sums(rows), _sums(hits)
    following = _suffix_hulls(x, y)
    before: list[int] = []
    start, end = 0, 1
    positives, size = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for place in range(1, len(x)):
        while len(before) > 1 and not _turns_left(x, y, before[-2], before[-1], place - 1):
            before.pop()
        before.append(place - 1)
        start, end = min(start, len(before) - 1), max(end, place)
        while True:
            first = before[start]
            width, rise = x[end] - x[first] + 1, y[end] - y[first] + 1
            after = following[end]
            if after and (y[after] - y[end]) * width < rise * (x[after] - x[end]):
                end = after
                continue
            if start + 1 == len(before):
                break
            second = before[start + 1]
            if (y[second] - y[first]) * width >= rise * (x[second] - x[first]):
                break
            start += 1
        positives[place - 1], size[place - 1] = rise, width
    return positives, size


def _suffix_hulls(x: Sequence[int], y: Sequence[int]) -> list[int]:
    """Returns, for each point, the next corner of the lower hull of it and all after it; 0 for none."""
    following = [0] * len(x)
    for point in range(len(x) - 2, -1, -1):
        corner = point + 1
        while following[corner] and not _turns_left(x, y, point, corner, following[corner]):
            corner = following[corner]
        following[point] = corner
    return following


def _turns_left(x: Sequence[int], y: Sequence[int], a: int, b: int, c: int) -> bool:
    return (y[b] - y[a]) * (x[c] - x[b]) < (y[c] - y[b]) * (x[b] - x[a])


def _sums(counts: IntArray) -> list[int]:
    sums: list[int] = np.append(0, np.cumsum(counts)).tolist()
    return sums
