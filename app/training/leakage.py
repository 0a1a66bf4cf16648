"""Keeps columns that know the outcome out of a model: a deny-list by name, and a guard by measurement.

The list is asked when columns are chosen, and of those the guard looks at each by itself. A column that alone
tells the classes apart almost perfectly is nearly always written after the outcome (a sales note, a closing
state), so training stops and names it. It never repairs anything and never drops a column in silence.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from app.ai.domain import Column, FloatArray, InputColumn, IntArray, LeadColumns
from app.errors import TrainingError
from app.training.repeats import distinct_codes

REFUSED_AUC, FLAGGED_AUC = 0.90, 0.75
"""Separation by a single column beyond which training stops, and beyond which the report warns."""

DENIED_COLUMNS = frozenset(
    {
        "applied",
        "applied_at",
        "application_count",
        "application_id",
        "application_status",
        "calibrated_probability",
        "closed_at",
        "conversion_date",
        "conversion_probability",
        "conversion_score",
        "converted",
        "converted_at",
        "deal_stage",
        "engagement_score",
        "enrolled",
        "enrolled_at",
        "enrolment_status",
        "enrollment_status",
        "funnel_stage",
        "is_converted",
        "is_won",
        "label",
        "lead_score",
        "lead_stage",
        "lead_status",
        "lifecycle_stage",
        "lifecycle_state",
        "lost_reason",
        "outcome",
        "outcome_at",
        "pipeline_stage",
        "stage",
        "status",
        "target",
        "won_at",
    }
)
"""Columns written because of the outcome, or holding an earlier model's answer; compared in lower case."""

_BINS, _ROWS_PER_BIN = 32, 20
_PRIOR_ROWS = 10.0


@dataclass(frozen=True, slots=True)
class Separation:
    """How well one column alone tells the classes apart (ROC AUC, 0.5 to 1), by value or by emptiness."""

    column: str
    auc: float
    by_emptiness: bool

    def __str__(self) -> str:
        """Words it for a report: what separates, and how well."""
        what = f"whether {self.column} is empty" if self.by_emptiness else self.column
        return f"{what} alone separates the outcomes with an AUC of {self.auc:.2f}"


def is_denied(name: str) -> bool:
    """Tells whether a column of this name may never feed a model."""
    return name.strip().casefold() in DENIED_COLUMNS


def check_leakage(
    leads: LeadColumns,
    outcome: IntArray,
    as_of: FloatArray,
    columns: Sequence[InputColumn],
    allowed: Collection[str],
) -> tuple[Separation, ...]:
    """Returns the columns that separate suspiciously well, strongest first.

    Raises:
        TrainingError: a column separates beyond `REFUSED_AUC` and is not `allowed`.
    """
    suspicious = find_suspicious(leads, outcome, as_of, columns)
    refused = [one for one in suspicious if one.auc > REFUSED_AUC and one.column not in allowed]
    if refused:
        names = ",".join(one.column for one in refused)
        raise TrainingError(
            f"{'; '.join(map(str, refused))} (limit {REFUSED_AUC:.2f}): probably written after the outcome. "
            f"Drop it with --exclude {names}, or keep it with --allow-leaky {names} if scoring knows it."
        )
    return suspicious


def find_suspicious(
    leads: LeadColumns, outcome: IntArray, as_of: FloatArray, columns: Sequence[InputColumn]
) -> tuple[Separation, ...]:
    """Returns the columns that separate the 0/1 outcomes beyond `FLAGGED_AUC`, strongest first."""
    found = (
        measure_separation(column.name, leads.columns[column.name], outcome, as_of) for column in columns
    )
    return tuple(
        sorted((one for one in found if one.auc > FLAGGED_AUC), key=lambda one: (-one.auc, one.column))
    )


def measure_separation(name: str, column: Column, outcome: IntArray, as_of: FloatArray) -> Separation:
    """Measures one column of `n` leads against the 0/1 outcome (both classes occur).

    A value stands for the outcome rate of its level or bin among the *other* half of the rows, so that a
    column of many levels does not look telling merely because it remembers each row. A number is measured by
    its rank as well, which needs no bins.
    """
    present = column.present.astype(np.float64)
    emptiness = abs(float(roc_auc_score(outcome, present)) - 0.5) + 0.5
    if column.kind == "text":
        by_value = float(roc_auc_score(outcome, _rates_of_other_half(distinct_codes(column), outcome)))
    else:
        numbers = _filled_numbers(column, as_of)
        by_rank = abs(float(roc_auc_score(outcome, numbers)) - 0.5) + 0.5
        by_bin = float(roc_auc_score(outcome, _rates_of_other_half(_bin_codes(numbers, column), outcome)))
        by_value = max(by_rank, by_bin)
    return Separation(name, max(by_value, emptiness), by_emptiness=emptiness >= by_value - 0.01)


def _filled_numbers(column: Column, as_of: FloatArray) -> FloatArray:
    """Returns the numbers (n,), timestamps as their age; whatever is missing or not finite is the median."""
    numbers = np.asarray(column.values, dtype=np.float64)
    if column.kind == "timestamp":
        numbers = as_of - numbers
    usable = column.present & np.isfinite(numbers)
    return np.where(usable, numbers, np.median(numbers[usable]) if usable.any() else 0.0)


def _bin_codes(numbers: FloatArray, column: Column) -> IntArray:
    """Numbers the quantile bins of numbers (n,), fewer for few rows; missing cells are 0."""
    bins = int(np.clip(len(numbers) // _ROWS_PER_BIN, 4, _BINS))
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.where(column.present, np.searchsorted(edges, numbers, side="left") + 1, 0)


def _rates_of_other_half(codes: IntArray, outcome: IntArray) -> FloatArray:
    base, rates = outcome.mean(), np.empty(len(codes))
    # Drawn, not alternating: rows may come in an order that knows the outcome.
    half = np.random.default_rng(0).random(len(codes)) < 0.5
    for seen in (half, ~half):
        rows = np.bincount(codes[seen], minlength=codes.max() + 1)
        positives = np.bincount(codes[seen], weights=outcome[seen], minlength=codes.max() + 1)
        rates[~seen] = ((positives + _PRIOR_ROWS * base) / (rows + _PRIOR_ROWS))[codes[~seen]]
    return rates
