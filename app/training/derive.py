"""Derives a feature set for whatever columns a relation has.

Each column gets its value, and whether it is there when that varies. A text gets a feature for each of its
levels, or where these are many the log-odds behind them as one number. The first feature of a column goes by
the column's name. Decisions rest on the training rows alone and every column left out is named with its
reason; nothing is tuned to a particular relation. Never reads the database.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.ai.domain import Column, FloatArray, InputColumn, IntArray, LeadColumns
from app.ai.features import FeatureSet, FeatureSpec
from app.errors import TrainingError
from app.training.levels import MIN_LEVEL_ROWS, learn_levels
from app.training.repeats import distinct_codes, find_repeats

_IDENTIFIER_SHARE = 0.5
_HEAVY_TAIL = 3.0

MAX_ONE_HOT = 30
"""A text column with more levels than this becomes one number: a feature for each would drown the others."""


@dataclass(frozen=True, slots=True)
class DerivedFeatures:
    """The feature set, and a sentence for each column that feeds no feature."""

    feature_set: FeatureSet
    dropped: dict[str, str]


def derive_features(
    leads: LeadColumns, outcome: IntArray, as_of: FloatArray, columns: Sequence[InputColumn]
) -> DerivedFeatures:
    """Builds specs for these columns from `n` training rows; `as_of` (n,) is in seconds UTC.

    Raises:
        TrainingError: no column is left to learn from, or one is called like a feature of another.
    """
    specs: list[FeatureSpec] = []
    dropped: dict[str, str] = {}
    repeats = find_repeats({column.name: leads.columns[column.name] for column in columns})
    for column in columns:
        cells = leads.columns[column.name]
        reason = reason_to_drop(cells)
        if reason is None and column.name in repeats:
            reason = f"says the same as {repeats[column.name]}"
        if reason is not None:
            dropped[column.name] = reason
            continue
        specs += _specs(column, cells, outcome, as_of)
    if not specs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
        raise TrainingError(f"no column tells the {leads.n:,} leads to learn from apart ({reasons}).")
    try:
        return DerivedFeatures(FeatureSet(tuple(specs)), dropped)
    except ValueError as exc:  # whether `city` is known is the feature `city__present`
        raise TrainingError("a column is called like a feature made of another one; exclude it.") from exc


def reason_to_drop(cells: Column) -> str | None:
    """Returns why a column of `n` rows by itself has nothing to teach, or None."""
    codes = distinct_codes(cells)
    rows = np.bincount(codes)
    odd_ones = len(codes) - int(rows.max(initial=0))
    if odd_ones == 0:
        return "constant"
    if odd_ones < MIN_LEVEL_ROWS:
        return f"the same in all but {odd_ones} rows"
    present, distinct = int(cells.present.sum()), len(np.unique(codes[cells.present]))
    if cells.kind == "text" and distinct > _IDENTIFIER_SHARE * present:
        return f"looks like an identifier or free text: {distinct} distinct values in {present} rows"
    if cells.kind == "text" and np.bincount(codes[cells.present]).max() < MIN_LEVEL_ROWS:
        return f"no value occurs in {MIN_LEVEL_ROWS} rows"
    if cells.kind == "number" and distinct == present and _whole(cells):
        return "looks like an identifier: every value is a whole number of its own"
    return None


def _specs(column: InputColumn, cells: Column, outcome: IntArray, as_of: FloatArray) -> list[FeatureSpec]:
    specs = []
    if len(np.unique(distinct_codes(cells)[cells.present])) > 1:
        if cells.kind == "text":
            specs += _text_specs(column, learn_levels(cells, outcome))
        else:
            specs.append(_value_spec(column, cells, as_of))
    if _emptiness_varies(cells) and not _has_number_for_missing(specs):
        specs.append(FeatureSpec(
            name=f"{column.name}__present", transform="is_present", inputs=(column,), params={},
            description=f"whether {_words(column)} is known",
        ))  # fmt: skip
    return specs


def _text_specs(column: InputColumn, learnt: Mapping[str, Any]) -> list[FeatureSpec]:
    """Returns a feature for each level after one for any other text, or a single one for many levels."""
    name, words, levels = column.name, _words(column), list(learnt["levels"])
    if len(levels) > MAX_ONE_HOT:
        return [FeatureSpec(
            name=name, transform="level", inputs=(column,), params=learnt,
            description=words,
        )]  # fmt: skip
    other = FeatureSpec(
        name=name, transform="level", inputs=(column,), description=f"{words} is none of the usual ones",
        params={"levels": dict.fromkeys(levels, 0.0), "unseen": 1.0, "missing": 0.0},
    )  # fmt: skip
    return [other, *(
        FeatureSpec(
            name=f"{name}={level}", transform="one_of", inputs=(column,), params={"values": [level]},
            description=f"{words} is {level}", missing="zero",
        ) for level in levels
    )]  # fmt: skip


def _has_number_for_missing(specs: Sequence[FeatureSpec]) -> bool:
    return len(specs) == 1 and "missing" in specs[0].params


def _value_spec(column: InputColumn, cells: Column, as_of: FloatArray) -> FeatureSpec:
    return FeatureSpec(
        name=column.name, transform=_transform(cells, as_of), inputs=(column,), params={},
        description=_words(column),
    )  # fmt: skip


def _transform(cells: Column, as_of: FloatArray) -> str:
    if cells.kind == "boolean":
        return "flag"
    numbers = np.asarray(cells.values, dtype=np.float64)
    if cells.kind == "timestamp":
        return "days_until" if np.median((as_of - numbers)[cells.present]) < 0 else "age_days"
    # A logarithm, where the largest values are far from the rest.
    return "log1p" if _heavy_tailed(numbers[cells.present & np.isfinite(numbers)]) else "value"


def _words(column: InputColumn) -> str:
    """Returns the column's name as a salesperson reads it; the transform says how it is counted."""
    return column.name.replace("_", " ").strip() or column.name


def _emptiness_varies(cells: Column) -> bool:
    present = int(cells.present.sum())
    return MIN_LEVEL_ROWS <= present <= len(cells.present) - MIN_LEVEL_ROWS


def _whole(cells: Column) -> bool:
    numbers = np.asarray(cells.values, dtype=np.float64)[cells.present]
    return bool(np.isfinite(numbers).all() and (numbers == np.floor(numbers)).all())


def _heavy_tailed(numbers: FloatArray) -> bool:
    """Tells whether non-negative numbers have a skewness beyond 3 (an exponential distribution has 2)."""
    if len(numbers) == 0 or numbers.min() < 0 or numbers.std() == 0:
        return False
    return bool((((numbers - numbers.mean()) / numbers.std()) ** 3).mean() > _HEAVY_TAIL)
