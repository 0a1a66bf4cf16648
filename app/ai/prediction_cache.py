"""Remembers answers for a few minutes, so that a lead asked again costs neither database nor model.

An answer depends on the model, the as-of time and the lead; the key holds all three, so a new model or a new
day never meets an old answer. Only answers are remembered: a lead that was unknown or declined is looked up
again. Called by `predictor`, from the event loop; it never waits.

An answer counts only if the read it came from began after the last change of its lead. So a change heard of
while a read is under way needs no care: what that read finds is remembered, and never counts. Changes come
from whoever hears of them (`app.db.change_listener`), on one other thread, which also says for how long its
silence may be trusted; beyond that nothing is found.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from app.ai.domain import ANSWER, ANSWER_BYTES, AnswerArray, BoolArray, FloatArray, IntArray, ModelRef

CacheFreshness = Literal["notified", "expiry_only", "suspended", "off"]
"""What keeps remembered answers fresh: word of every change, their age alone, nothing right now, no cache."""

_WAYS = 16
_LEADS_PER_SET = 8
"""Each set has twice the room it needs on average: of a full cache, one answer in 1,500 leaves early."""

_CHANGE_MARKS = 131_072
"""Leads share marks: the change of one takes one answer in so many along, which costs a look-up."""

_NEVER = -1
_HashArray = NDArray[np.uint64]


class AnswerCache(Protocol):
    """Where answers may be remembered. Lead IDs are canonical and, in one call, distinct."""

    def moment(self) -> int:
        """Returns the present moment, to be taken before a read begins and handed to `remember`."""
        ...

    def find(self, model: ModelRef, as_of: float, lead_ids: Sequence[str]) -> tuple[BoolArray, AnswerArray]:
        """Returns, for each ID, if an answer is remembered and holds, and that answer (else undefined)."""
        ...

    def recall(
        self, model: ModelRef, as_of: float, lead_ids: Sequence[str]
    ) -> tuple[BoolArray, AnswerArray, FloatArray]:
        """Does what `find` does, also while nobody hears of changes: the last that is known of each lead.

        Besides, it tells each answer's age in seconds.
        """
        ...

    def remember(
        self,
        model: ModelRef,
        as_of: float,
        lead_ids: Sequence[str],
        answers: AnswerArray,
        *,
        uuids: Sequence[str],
        since: int,
    ) -> None:
        """Remembers one answer for each ID; `uuids` are their leads, `since` the moment the read began."""
        ...


class PredictionCache:
    """The last `size` answers, each for at most `ttl_seconds`: the oldest, first to expire, leaves first.

    It takes 100 bytes an answer and no object: answers lie in a ring, and a table of sets of sixteen, indexed
    by 64 bits of the key's hash, holds their numbers; another 64 bits beside the answer make sure. The hash
    is Python's own for text, SipHash with a secret of the process. `monotonic` gives seconds.
    """

    def __init__(self, size: int, ttl_seconds: float, monotonic: Callable[[], float]) -> None:
        self._size = size
        self._ttl_seconds = ttl_seconds
        self._monotonic = monotonic
        self._written = 0
        sets = -(-size // _LEADS_PER_SET)
        self._hashes = np.zeros((_WAYS, sets), np.uint64)
        self._numbers = np.zeros(
            (_WAYS, sets), np.int64
        )  # from 1 on; an answer's place is its number mod size
        self._checks = np.zeros(size, np.uint64)
        self._answers = np.zeros(size, ANSWER_BYTES)
        self._expires = np.zeros(size, np.float64)
        self._since = np.zeros(size, np.int64)
        self._marks = np.zeros(size, np.uint32)
        # Written by the thread that hears of changes, each value in one step, and read on the event loop.
        self._moment = 0
        self._changed = np.zeros(_CHANGE_MARKS, np.int64)
        self._emptied = 0
        self._trusted_until = -math.inf

    def __len__(self) -> int:
        """Tells how many answers are held, whether they still hold or not."""
        return min(self._written, self._size)

    def moment(self) -> int:
        """See `AnswerCache.moment`; it passes with every change that is heard of."""
        return self._moment

    def find(self, model: ModelRef, as_of: float, lead_ids: Sequence[str]) -> tuple[BoolArray, AnswerArray]:
        """See `AnswerCache.find`."""
        hit, places = self._look_up(model, as_of, lead_ids)
        return hit & self.is_trusted(), self._answers[places].view(ANSWER)

    def recall(
        self, model: ModelRef, as_of: float, lead_ids: Sequence[str]
    ) -> tuple[BoolArray, AnswerArray, FloatArray]:
        """See `AnswerCache.recall`."""
        hit, places = self._look_up(model, as_of, lead_ids)
        ages = self._monotonic() + self._ttl_seconds - self._expires[places]
        return hit, self._answers[places].view(ANSWER), ages

    def _look_up(self, model: ModelRef, as_of: float, lead_ids: Sequence[str]) -> tuple[BoolArray, IntArray]:
        hashes, checks = _hash(model, as_of, lead_ids)
        sets = self._sets(hashes)
        ways = (self._hashes.take(sets, axis=1) == hashes).argmax(axis=0)
        places = self._numbers[ways, sets] % self._size
        hit = (self._hashes[ways, sets] == hashes) & (self._checks[places] == checks)
        hit &= self._expires[places] > self._monotonic()
        hit &= self._since[places] >= np.maximum(self._changed[self._marks[places]], self._emptied)
        return hit, places

    def remember(
        self,
        model: ModelRef,
        as_of: float,
        lead_ids: Sequence[str],
        answers: AnswerArray,
        *,
        uuids: Sequence[str],
        since: int,
    ) -> None:
        """See `AnswerCache.remember`; of more answers than there is room for, the last ones stay."""
        hashes, checks = _hash(model, as_of, lead_ids[-self._size :])
        numbers = self._written + 1 + np.arange(len(hashes))
        self._written += len(hashes)
        places = numbers % self._size
        self._checks[places] = checks
        self._answers[places] = answers[-self._size :].view(ANSWER_BYTES)
        self._expires[places] = self._monotonic() + self._ttl_seconds
        self._since[places] = since
        self._marks[places] = _marks(uuids[-self._size :])
        self._enter(hashes, numbers)

    def forget(self, uuids: Sequence[str]) -> None:
        """Lets every answer for these leads count no more, whichever ID it was asked by."""
        moment = self._moment + 1
        self._changed[_marks(uuids)] = moment
        self._moment = moment

    def forget_all(self) -> None:
        """Lets no answer count any more."""
        moment = self._moment + 1
        self._emptied = moment
        self._moment = moment

    def emptied(self) -> int:
        """Returns the moment the whole cache was last emptied."""
        return self._emptied

    def trust_until(self, monotonic_seconds: float) -> None:
        """Says until when whatever was not forgotten holds."""
        self._trusted_until = monotonic_seconds

    def is_trusted(self) -> bool:
        """Tells whether answers are found at present."""
        return self._monotonic() < self._trusted_until

    def _sets(self, hashes: _HashArray) -> IntArray:
        return (hashes % np.uint64(self._hashes.shape[1])).astype(np.int64)

    def _enter(self, hashes: _HashArray, numbers: IntArray) -> None:
        sets = self._sets(hashes)
        left = np.arange(len(hashes))
        while left.size:
            # Of several that belong into one set, one at a time: each takes the place of the oldest.
            _, first = np.unique(sets[left], return_index=True)
            now = left[first]
            known = self._hashes.take(sets[now], axis=1) == hashes[now]
            ways = np.where(known, _NEVER, self._numbers.take(sets[now], axis=1)).argmin(axis=0)
            self._hashes[ways, sets[now]] = hashes[now]
            self._numbers[ways, sets[now]] = numbers[now]
            left = np.delete(left, first)


class NullCache:
    """A cache that is turned off: remembers nothing."""

    def moment(self) -> int:
        """Is always the same one."""
        return 0

    def find(
        self,
        model: ModelRef,  # noqa: ARG002
        as_of: float,  # noqa: ARG002
        lead_ids: Sequence[str],
    ) -> tuple[BoolArray, AnswerArray]:
        """Finds nothing."""
        return np.zeros(len(lead_ids), np.bool_), np.empty(len(lead_ids), ANSWER)

    def recall(
        self, model: ModelRef, as_of: float, lead_ids: Sequence[str]
    ) -> tuple[BoolArray, AnswerArray, FloatArray]:
        """Recalls nothing."""
        return *self.find(model, as_of, lead_ids), np.zeros(len(lead_ids))

    def remember(
        self,
        model: ModelRef,
        as_of: float,
        lead_ids: Sequence[str],
        answers: AnswerArray,
        *,
        uuids: Sequence[str],
        since: int,
    ) -> None:
        """Forgets the answers."""


def _hash(model: ModelRef, as_of: float, lead_ids: Sequence[str]) -> tuple[_HashArray, _HashArray]:
    """Returns twice 64 bits for each key. No ID begins with the character that tells the two apart."""
    first, second = _hash_world(model.sha256, as_of)
    return _hash_texts(lead_ids) ^ first, _hash_texts(["\0" + lead_id for lead_id in lead_ids]) ^ second


@lru_cache(maxsize=4)
def _hash_world(sha256: str, as_of: float) -> tuple[np.uint64, np.uint64]:
    first, second = _hash_texts([f" {sha256} {as_of}", f"\0 {sha256} {as_of}"])
    return first, second


def _marks(uuids: Sequence[str]) -> _HashArray:
    return _hash_texts(uuids) % np.uint64(_CHANGE_MARKS)


def _hash_texts(texts: Sequence[str]) -> _HashArray:
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)
