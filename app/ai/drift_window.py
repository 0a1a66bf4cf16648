"""The drift window: the last leads a worker scored, compared with the training sample when somebody asks.

Adding rows is a copy into a ring; the statistics are computed on demand and remembered until there are new
rows. Holds built features only, in memory only, never an ID. Single-threaded by design: everything happens on
the event loop. The predictor adds, health asks.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from app.ai.domain import FloatArray
from app.ai.feature_safety import DriftState, FeatureStatistics, drift_statistics

MIN_ROWS = 200
"""With fewer leads nothing is said: ten bins of twenty leads each are the least that is worth comparing."""


class WindowStatus(NamedTuple):
    """What the last `rows` leads say; `unknown` while they are too few."""

    status: DriftState | Literal["unknown"]
    rows: int


class DriftWindow:
    """Remembers the built features of the last `capacity` leads of one feature set."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ring: FloatArray = np.empty((0, 0))
        self._fingerprint = ""
        self._added = 0
        self._known: tuple[int, Sequence[FeatureStatistics], WindowStatus] | None = None

    def add(self, values: FloatArray, feature_fingerprint: str) -> None:
        """Adds rows of built features (r, k), before feature safety; another feature set starts afresh."""
        if feature_fingerprint != self._fingerprint:
            self._ring = np.empty((self._capacity, values.shape[1]))
            self._fingerprint, self._added = feature_fingerprint, 0
        kept = values[-self._capacity :]
        start = self._added + len(values) - len(kept)
        self._ring[np.arange(start, start + len(kept)) % self._capacity] = kept
        self._added += len(values)

    def statistics(self, reference: Sequence[FeatureStatistics], feature_fingerprint: str) -> WindowStatus:
        """Compares the window with a model's training statistics, whose feature set is named."""
        rows = min(self._added, self._capacity) if feature_fingerprint == self._fingerprint else 0
        if rows < MIN_ROWS:
            return WindowStatus("unknown", rows)
        if self._known is None or self._known[0] != self._added or self._known[1] is not reference:
            state = drift_statistics(reference, self._ring[:rows]).state
            self._known = (self._added, reference, WindowStatus(state, rows))
        return self._known[2]
