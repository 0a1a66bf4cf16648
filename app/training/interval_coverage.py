"""Whether intervals lie where the outcomes are: observed rates against mean intervals, bin by bin.

The check allows for the sampling error of a bin, which is mostly wider than the intervals. So it notices
intervals in the wrong place, and proves nothing of their width. Pure; never fits. Called by `describe` on
the test part, for the manifest's report, and by `evaluation`.
"""

from collections.abc import Sequence

import numpy as np

from app.ai.calibration import equal_mass_bins
from app.ai.domain import FloatArray, IntArray, JsonObject

NINETY_FIVE_PERCENT = 1.959964
"""Standard errors to either side within which 95 of 100 normal estimates lie."""


def measure_coverage(
    intervals: FloatArray, probability: FloatArray, outcome: IntArray, bins: int = 15
) -> JsonObject:
    """Measures intervals (n, 2) of leads with these probabilities (n,) against 0/1 outcomes (n,).

    In bins of equal size by probability, `covered` counts those where the observed rate lies within the mean
    interval widened by its sampling error: the 95 % margin of a rate of that many leads, at either end.
    `covered_within_one_error` widens by one standard error only, which even true probabilities leave in one
    bin of three. `covered_without_width` is what `covered` would be if each interval were but its lead's
    probability: as much of it is no merit of the intervals. `rows` are [mean lower end, mean upper end,
    observed rate, leads], lowest first; `mean_width` is that of all leads.
    """
    parts = equal_mass_bins(probability, bins)
    rows = _average(intervals, outcome, parts)
    bare = _average(np.column_stack([probability, probability]), outcome, parts)
    return {
        "bins": len(rows),
        "covered": sum(_is_covered(*row, margin=NINETY_FIVE_PERCENT) for row in rows),
        "covered_within_one_error": sum(_is_covered(*row, margin=1.0) for row in rows),
        "covered_without_width": sum(_is_covered(*row, margin=NINETY_FIVE_PERCENT) for row in bare),
        "mean_width": round(float((intervals[:, 1] - intervals[:, 0]).mean()), 6),
        "rows": [[round(low, 6), round(high, 6), round(rate, 6), leads] for low, high, rate, leads in rows],
    }


def _average(
    intervals: FloatArray, outcome: IntArray, parts: Sequence[IntArray]
) -> list[tuple[float, float, float, int]]:
    """Returns the mean ends, the observed rate and the leads of each part."""
    return [
        (*intervals[part].mean(axis=0).tolist(), float(outcome[part].mean()), len(part)) for part in parts
    ]


def _is_covered(low: float, high: float, rate: float, leads: int, *, margin: float) -> bool:
    below, above = (margin * float(np.sqrt(end * (1 - end) / leads)) for end in (low, high))
    return low - below <= rate <= high + above
