"""Remembers answers for a few minutes, so that a lead asked again costs neither database nor model.

An answer depends on the model, the as-of time and the lead; the key holds all three, so a new model or a new
day never meets an old answer. Only answers are remembered: a lead that was unknown or declined is looked up
again. Called from the event loop; it never waits.

An answer counts only if the read it came from began after the last change of its lead, and its age is that of
the read. Of two reads of a lead the one that began later stays, whichever ends last. So a change heard of
while a read is under way needs no care: what that read finds is remembered, and never counts. Changes come
from whoever hears of them (`app.db.change_listener`), on one other thread, which also says for how long its
silence may be trusted; beyond that nothing is found.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np

from app.ai.domain import ANSWER, AnswerArray, BoolArray, FloatArray, IntArray, ModelRef
from app.ai.score_kernels import ENTRY, SET, AnswerTable, HashKey, ScoreKernels
from app.metrics import observe_lookups

CacheFreshness = Literal["notified", "expiry_only", "suspended", "off"]
"""What keeps remembered answers fresh: word of every change, their age alone, nothing right now, no cache."""

_LEADS_PER_SET = 8
"""Each set has twice the room it needs on average: of a full cache, one answer in 1,500 leaves early."""

_CHANGE_MARKS = 131_072
"""Leads share marks: the change of one takes one answer in so many along, which costs a look-up."""


class Moment(NamedTuple):
    """When a read began: after so many changes that were heard of, and in seconds."""

    changes: int
    seconds: float


class AnswerCache(Protocol):
    """Where answers may be remembered. Lead IDs are canonical; equal ones, in one call, fare alike."""

    def moment(self) -> Moment:
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

    def count(self, result: Literal["miss", "recalled"], leads: int) -> None:
        """Counts lead IDs that were not found: they were read instead, or answered by what was recalled."""
        ...

    def remember(
        self,
        model: ModelRef,
        as_of: float,
        lead_ids: Sequence[str],
        answers: AnswerArray,
        *,
        uuids: Sequence[str],
        since: Moment,
    ) -> None:
        """Remembers one answer for each ID; `uuids` are their leads, `since` the moment the read began."""
        ...


class PredictionCache:
    """The last `size` answers, each for at most `ttl_seconds`: the oldest leaves first.

    It takes 104 bytes an answer and no object: answers lie in a ring, and a table of sets of sixteen, indexed
    by 64 bits of the key's hash, holds their numbers; another 64 bits beside the answer make sure. The hash
    is SipHash under a secret of this object. Looking up and entering are loops in C, one call for a batch.
    `monotonic` gives seconds.
    """

    def __init__(
        self, kernels: ScoreKernels, size: int, ttl_seconds: float, monotonic: Callable[[], float]
    ) -> None:
        self._kernels = kernels
        self._size = size
        self._ttl_seconds = ttl_seconds
        self._monotonic = monotonic
        self._written = 0
        self._secret = np.frombuffer(bytearray(secrets.token_bytes(16)), np.uint64)
        self._key_of_world = lru_cache(maxsize=4)(self._build_key)
        # Written by the thread that hears of changes, each value in one step, and read on the event loop.
        self._changes = 0  # how many were heard of
        self._changed = np.zeros(_CHANGE_MARKS, np.int64)
        self._emptied_by = 0
        self._trusted_until = -math.inf
        self._sets, self._ring = np.zeros(-(-size // _LEADS_PER_SET), SET), np.zeros(size, ENTRY)
        self._table = AnswerTable(self._sets, self._ring, self._changed)

    def __len__(self) -> int:
        """Tells how many answers are held, whether they still hold or not."""
        return min(self._written, self._size)

    def moment(self) -> Moment:
        """See `AnswerCache.moment`."""
        return Moment(self._changes, self._monotonic())

    def find(self, model: ModelRef, as_of: float, lead_ids: Sequence[str]) -> tuple[BoolArray, AnswerArray]:
        """See `AnswerCache.find`."""
        if self.is_trusted():
            hit, answers, _ = self._find(model, as_of, lead_ids, self._monotonic())
        else:
            hit, answers = NullCache().find(model, as_of, lead_ids)
        observe_lookups("hit", int(np.count_nonzero(hit)))
        return hit, answers

    def recall(
        self, model: ModelRef, as_of: float, lead_ids: Sequence[str]
    ) -> tuple[BoolArray, AnswerArray, FloatArray]:
        """See `AnswerCache.recall`."""
        now = self._monotonic()
        hit, answers, expires = self._find(model, as_of, lead_ids, now)
        return hit, answers, now + self._ttl_seconds - expires

    def count(self, result: Literal["miss", "recalled"], leads: int) -> None:
        """See `AnswerCache.count`."""
        observe_lookups(result, leads)

    def _find(
        self, model: ModelRef, as_of: float, lead_ids: Sequence[str], now: float
    ) -> tuple[BoolArray, AnswerArray, FloatArray]:
        key = self._key_of_world(model.manifest_sha256, as_of)
        return self._kernels.find_answers(self._table, lead_ids, key, now, self._emptied_by)

    def remember(
        self,
        model: ModelRef,
        as_of: float,
        lead_ids: Sequence[str],
        answers: AnswerArray,
        *,
        uuids: Sequence[str],
        since: Moment,
    ) -> None:
        """See `AnswerCache.remember`; of more answers than there is room for, the last ones stay."""
        self._written += self._kernels.remember_answers(
            self._table,
            lead_ids,
            self._key_of_world(model.manifest_sha256, as_of),
            answers,
            number=self._written + 1,
            expires=since.seconds + self._ttl_seconds,
            since=since.changes,
            marks=_marks(uuids),
        )

    def forget(self, uuids: Sequence[str]) -> None:
        """Lets every answer for these leads count no more, whichever ID it was asked by."""
        changes = self._changes + 1
        self._changed[_marks(uuids)] = changes
        self._changes = changes

    def forget_all(self) -> None:
        """Lets no answer count any more."""
        changes = self._changes + 1
        self._emptied_by = changes
        self._changes = changes

    def emptied_by(self) -> int:
        """Returns the number of the change that last emptied the whole cache, 0 before any did."""
        return self._emptied_by

    def trust_until(self, monotonic_seconds: float) -> None:
        """Says until when whatever was not forgotten holds."""
        self._trusted_until = monotonic_seconds

    def is_trusted(self) -> bool:
        """Tells whether answers are found at present."""
        return self._monotonic() < self._trusted_until

    def _build_key(self, manifest_sha256: str, as_of: float) -> HashKey:
        """Returns what lead IDs are hashed under, together with the model and the as-of time."""
        return self._kernels.hash_text(f"{manifest_sha256} {as_of}".encode(), self._secret)


class NullCache:
    """A cache that is turned off: remembers nothing."""

    def moment(self) -> Moment:
        """Is always the same one."""
        return Moment(0, 0.0)

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

    def count(self, result: Literal["miss", "recalled"], leads: int) -> None:
        """Counts nothing: there was no look."""

    def remember(
        self,
        model: ModelRef,
        as_of: float,
        lead_ids: Sequence[str],
        answers: AnswerArray,
        *,
        uuids: Sequence[str],
        since: Moment,
    ) -> None:
        """Forgets the answers."""


def _marks(uuids: Sequence[str]) -> IntArray:
    return np.fromiter(map(hash, uuids), np.int64, len(uuids)) % _CHANGE_MARKS
