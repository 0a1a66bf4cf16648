"""Remembers answers for a few minutes, so that a lead asked again costs neither database nor model.

An answer depends on the model, the as-of time and the lead; the key holds all three, so a new model or a new
day never meets an old answer. Only answers are remembered: a lead that was unknown or declined is looked up
again. Called by `predictor` alone, from the event loop; it never waits and is not meant for several threads.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from app.ai.domain import ANSWER, AnswerArray, BoolArray, ModelRef

_Key = tuple[str, float, str]


class AnswerCache(Protocol):
    """Where answers may be remembered."""

    def find(self, model: ModelRef, as_of: float, lead_ids: Sequence[str]) -> tuple[BoolArray, AnswerArray]:
        """Returns, for each canonical ID, if an answer is remembered, and that answer (else undefined)."""
        ...

    def remember(self, model: ModelRef, as_of: float, lead_ids: Sequence[str], answers: AnswerArray) -> None:
        """Remembers one answer for each canonical ID."""
        ...


class PredictionCache:
    """At most `size` answers, each for at most `ttl_seconds`; the longest unused one leaves first.

    The answers lie in one array and the index maps a key to its place there, so a batch is read with one
    lookup an ID and one gather. `monotonic` gives seconds.
    """

    def __init__(self, size: int, ttl_seconds: float, monotonic: Callable[[], float]) -> None:
        self._size = size
        self._ttl_seconds = ttl_seconds
        self._monotonic = monotonic
        self._places: OrderedDict[_Key, int] = OrderedDict()
        self._answers = np.empty(size, ANSWER)
        self._expires = np.empty(size, np.float64)

    def __len__(self) -> int:
        """Tells how many answers are held, expired ones included."""
        return len(self._places)

    def find(self, model: ModelRef, as_of: float, lead_ids: Sequence[str]) -> tuple[BoolArray, AnswerArray]:
        """See `AnswerCache.find`."""
        places = np.fromiter((self._touch((model.sha256, as_of, lead_id)) for lead_id in lead_ids), np.int64)
        hit = places >= 0
        hit[hit] = self._expires[places[hit]] > self._monotonic()
        return hit, self._answers[places]

    def remember(self, model: ModelRef, as_of: float, lead_ids: Sequence[str], answers: AnswerArray) -> None:
        """See `AnswerCache.remember`."""
        # With more IDs than places an earlier one gives its place to a later one; the later assignment wins.
        places = np.fromiter((self._claim((model.sha256, as_of, lead_id)) for lead_id in lead_ids), np.int64)
        self._answers[places] = answers
        self._expires[places] = self._monotonic() + self._ttl_seconds

    def _touch(self, key: _Key) -> int:
        place = self._places.get(key, -1)
        if place >= 0:
            self._places.move_to_end(key)
        return place

    def _claim(self, key: _Key) -> int:
        place = self._places.pop(key, None)
        if place is None:
            full = len(self._places) == self._size
            place = self._places.popitem(last=False)[1] if full else len(self._places)
        self._places[key] = place
        return place


class NullCache:
    """A cache that is turned off: remembers nothing."""

    def find(
        self,
        model: ModelRef,  # noqa: ARG002
        as_of: float,  # noqa: ARG002
        lead_ids: Sequence[str],
    ) -> tuple[BoolArray, AnswerArray]:
        """Finds nothing."""
        return np.zeros(len(lead_ids), np.bool_), np.empty(len(lead_ids), ANSWER)

    def remember(self, model: ModelRef, as_of: float, lead_ids: Sequence[str], answers: AnswerArray) -> None:
        """Forgets the answers."""
