"""Slices: how good the model is on parts of the held-out leads, each with its size and its noise.

A value is named only where many leads share it; a rare one may say who somebody is and is counted with the
others. The parts of a division are disjoint and cover all leads. Pure.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from app.ai.domain import VERDICTS, BoolArray, Column, FloatArray, IntArray, TextArray
from app.ai.feature_transforms import normalise_text
from app.training.held_out import HeldOut
from app.training.interval_coverage import NINETY_FIVE_PERCENT

MIN_SLICE_ROWS = 30
"""A value that fewer held-out leads have is not named, and nothing is said of it."""

MAX_LEVELS = 6
MAX_COLUMNS = 12
OTHERS, UNKNOWN = "all others", "not known"


@dataclass(frozen=True, slots=True)
class Slice:
    """One part of the held-out leads.

    `gap` is the observed less the mean predicted share; `noise` is the 95 % margin of the observed share if
    every probability were true. `roc_auc` is None where only one outcome occurs.
    """

    name: str
    leads: int
    observed: float
    predicted: float
    noise: float
    roc_auc: float | None

    @property
    def told(self) -> bool:
        """Whether the leads are enough to say anything of them."""
        return self.leads >= MIN_SLICE_ROWS

    @property
    def gap(self) -> float:
        """How far the predictions are from what happened; positive where they are too low."""
        return self.observed - self.predicted


@dataclass(frozen=True, slots=True)
class Division:
    """A way to divide the held-out leads, and its parts."""

    title: str
    slices: tuple[Slice, ...]


def build_divisions(held_out: HeldOut) -> list[Division]:
    """Returns the divisions by verdict, by time where that is known, and by the values of columns.

    Columns come with the most important first, at most 12 of them.
    """
    parts: list[tuple[str, TextArray, Sequence[str]]] = [
        ("verdict", np.array(VERDICTS, dtype=object)[held_out.verdict], VERDICTS)
    ]
    if held_out.order is not None:
        halves = ("earlier half", "later half")
        later = (held_out.order > np.median(held_out.order)).astype(int)
        parts.append(("time", np.array(halves, dtype=object)[later], halves))
    for name in _by_importance(held_out.columns, held_out.importance):
        labels = _label(held_out.columns[name])
        levels = Counter(labels)
        if sum(rows >= MIN_SLICE_ROWS for rows in levels.values()) < 2 or len(parts) == MAX_COLUMNS + 2:
            continue
        last = [level for level in (OTHERS, UNKNOWN) if levels.pop(level, 0)]
        parts.append((name, labels, [*(level for level, _ in levels.most_common()), *last]))
    return [
        Division(
            title,
            tuple(
                _measure(level, labels == level, held_out.probability, held_out.outcome)
                for level in levels
                if (labels == level).any()
            ),
        )
        for title, labels, levels in parts
    ]


def find_off_slices(divisions: Sequence[Division]) -> list[tuple[str, Slice]]:
    """Returns the parts whose gap is more than chance explains, worst first, with the division's title.

    With so many parts some lie outside their own 95 % by chance: all of them together do so in 5 of 100
    samples (Bonferroni's correction).
    """
    parts = [(division.title, part) for division in divisions for part in division.slices if part.told]
    limit = float(norm.ppf(1 - 0.025 / max(len(parts), 1))) / NINETY_FIVE_PERCENT
    off = [(title, part) for title, part in parts if abs(part.gap) > limit * part.noise]
    return sorted(off, key=lambda entry: -abs(entry[1].gap))


def _by_importance(columns: Mapping[str, Column], importance: Mapping[str, tuple[float, ...]]) -> list[str]:
    return sorted(columns, key=lambda name: -max(importance.get(name, (0.0,))))


def _label(column: Column) -> TextArray:
    """Returns what each lead (n,) is counted under."""
    if column.kind == "boolean":
        flags = np.where(np.asarray(column.values) == 1, "yes", "no").astype(object)
        return np.where(column.present, flags, UNKNOWN)
    texts = [
        (normalise_text(str(value)) or UNKNOWN) if there else UNKNOWN
        for value, there in zip(column.values, column.present, strict=True)
    ]
    counts = Counter(texts)
    del counts[UNKNOWN]
    kept = {level for level, rows in counts.most_common(MAX_LEVELS) if rows >= MIN_SLICE_ROWS}
    return np.array([text if text in kept or text == UNKNOWN else OTHERS for text in texts], dtype=object)


def _measure(name: str, chosen: BoolArray, probability: FloatArray, outcome: IntArray) -> Slice:
    predicted, happened = probability[chosen], outcome[chosen]
    leads = len(happened)
    both = 0 < happened.sum() < leads
    return Slice(
        name=name,
        leads=leads,
        observed=float(happened.mean()),
        predicted=float(predicted.mean()),
        noise=NINETY_FIVE_PERCENT * float(np.sqrt((predicted * (1 - predicted)).sum()) / leads),
        roc_auc=float(roc_auc_score(happened, predicted)) if both else None,
    )
