"""Intervals out of very few outcomes: what rate they allow at each score, if it does not fall with the score.

Venn-Abers pairs are narrow as soon as two scores are pooled, and at ten to eighty outcomes miss the rate of
most groups of leads. A band of exact binomial limits does not: it starts as wide as it can be, and narrows
only as outcomes come in. Pure. Called by `app.training.day_one`.
"""

import numpy as np
from scipy.special import expit
from scipy.stats import beta

from app.ai.domain import FloatArray, IntArray
from app.ai.venn_abers import VennAbersTable

CONFIDENCE = 0.95
_STEP = 0.1
"""Log-odds closer than this count as equal: so few outcomes cannot tell them apart."""
_FARTHEST = 20.0


def build_band(log_odds: FloatArray, outcome: IntArray) -> VennAbersTable:
    """Builds the table of intervals, by probability, of log-odds (n,) and their 0/1 outcomes (n,), n >= 0.

    The rate at a score is no lower than that of any run of leads which ends there, and no higher than that of
    any which begins there. Each end is the tightest of the Clopper-Pearson limits (Biometrika 26, 1934) of
    such runs of 1, 2, 4, ... and all leads, each held at a confidence so high that at any one score all hold
    together with `CONFIDENCE`: the calibration bands of Dimitriadis et al. (Biometrika 110, 2023) over few
    runs instead of all. Below the lowest score the lower end is 0, beyond the highest the upper is 1.
    """
    leads = len(outcome)
    if leads == 0:
        return VennAbersTable(np.empty(0), np.zeros(1), np.ones(1))
    bins = np.floor(np.clip(log_odds, -_FARTHEST, _FARTHEST) / _STEP + 0.5).astype(np.int64)
    first = int(bins.min())
    rows = np.append(0, np.cumsum(np.bincount(bins - first)))
    hits = np.append(0, np.cumsum(np.bincount(bins - first, weights=outcome)))
    runs = [*(2**power for power in range(leads.bit_length()) if 2**power < leads), leads]
    risk = (1 - CONFIDENCE) / 2 / len(runs)
    lower, upper = np.zeros(len(rows) - 1), np.ones(len(rows) - 1)
    for run in runs:
        # Whole bins, with at least so many leads as far as there are so many on that side.
        start = np.searchsorted(rows, np.maximum(rows[1:] - run, 0), side="right") - 1
        end = np.searchsorted(rows, np.minimum(rows[:-1] + run, leads), side="left")
        ending, beginning = rows[1:] - rows[start], rows[end] - rows[:-1]
        lower = np.maximum(lower, _lower_limit(hits[1:] - hits[start], ending, risk))
        upper = np.minimum(upper, 1 - _lower_limit(beginning - (hits[end] - hits[:-1]), beginning, risk))
    lower, upper = np.maximum.accumulate(lower), np.minimum.accumulate(upper[::-1])[::-1]
    edges = expit((first + np.arange(len(rows)) - 0.5) * _STEP)
    p0, p1 = np.concatenate([[0.0], lower, lower[-1:]]), np.concatenate([upper[:1], upper, [1.0]])
    # Where outcomes fall as scores rise the ends may cross; the interval then holds both.
    p1[:-1] = np.maximum(p1[:-1], p0[1:])
    return VennAbersTable(edges, p0, p1)


def _lower_limit(hits: FloatArray, rows: FloatArray, risk: float) -> FloatArray:
    """Returns the lower Clopper-Pearson limit of `hits` (b,) in `rows` (b,), 0 where nothing was hit."""
    some = np.maximum(hits, 1)
    return np.where(hits > 0, beta.ppf(risk, some, np.maximum(rows - some + 1, 1)), 0.0)
