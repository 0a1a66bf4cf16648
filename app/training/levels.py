"""Learns the number that stands for each level of a text column, on training rows only.

A level becomes the smoothed log-odds of the outcome among its rows: one number that trees can split and
linear models can weigh, however many levels there are. Never sees a row that is used to calibrate or
evaluate. Called by `app.training.derive` and `app.training.declared`.
"""

from collections import Counter
from collections.abc import Hashable
from math import log
from typing import Any

import numpy as np

from app.ai.domain import Column, IntArray
from app.ai.feature_transforms import normalise_text

MIN_LEVEL_ROWS = 10
"""A level with fewer training rows is pooled with the other rare ones, and not named in the manifest: a value
that belongs to a handful of people may say who they are."""

MAX_LEVELS = 500

_PRIOR_ROWS = 10.0


def learn_levels(column: Column, outcome: IntArray) -> dict[str, Any]:
    """Returns the params of a `level` feature for a text column of `n` rows with 0/1 outcomes.

    Each number is `log(r / (1 - r))` with `r = (positives + m * base) / (rows + m)`, `m` = 10 rows of the
    base rate (additive smoothing; Micci-Barreca, SIGKDD Explorations 3(1), 2001). Missing cells get the
    number of their own rate, unseen and rare levels that of all rare rows together. The commonest level is
    kept however few rows it has.

    Raises:
        ValueError: no row has a text.
    """
    keys: list[str | None] = [
        (normalise_text(value) or None) if there else None
        for value, there in zip(column.values, column.present, strict=True)
    ]
    rows: Counter[Hashable] = Counter(keys)
    positives: Counter[Hashable] = Counter(key for key, won in zip(keys, outcome, strict=True) if won)
    base = float(np.clip(outcome.mean(), 1e-6, 1 - 1e-6))
    ranked = sorted((key for key in rows if key is not None), key=lambda key: (-rows[key], str(key)))
    if not ranked:
        raise ValueError("no row has a text to learn from")
    kept = [key for key in ranked[:MAX_LEVELS] if rows[key] >= MIN_LEVEL_ROWS] or ranked[:1]
    rare = [key for key in rows if key is not None and key not in set(kept)]
    params: dict[str, Any] = {
        "levels": {str(key): _log_odds(rows[key], positives[key], base) for key in kept},
        "unseen": _log_odds(sum(rows[key] for key in rare), sum(positives[key] for key in rare), base),
    }
    if rows[None]:
        params["missing"] = _log_odds(rows[None], positives[None], base)
    return params


def _log_odds(rows: int, positives: int, base: float) -> float:
    rate = (positives + _PRIOR_ROWS * base) / (rows + _PRIOR_ROWS)
    return round(log(rate / (1 - rate)), 6)
