"""Keeps the newest leads scored ahead of being asked: at start, for a new model or day, before they expire.

A few leads at a time, then a pause three times as long as they took, on a database connection of its own. It
is nobody's request: it leaves no event, and drift does not see it. Off unless `ML_PREWARM_LEADS` says how
many leads. Started and ended by `app.wiring`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

import structlog

from app.ai.domain import RequestContext, start_of_day
from app.ai.prediction_cache import PredictionCache
from app.ai.predictor import Models, Predictor
from app.errors import LeadScoringError, PredictionFailedError
from app.metrics import LEADS_AHEAD

CHUNK_IDS = 50
"""Scored in one go, on the event loop, in a millisecond or two; a lead counts once for each of its IDs."""

PAUSE_FACTOR = 3
"""A quarter of the time for this, at most, and the rest for requests."""

REFRESH_AT = 0.75
"""The share of an answer's life after which it is made anew."""

_LOOK_SECONDS = 1.0

_log = structlog.get_logger()


class RecentLeads(Protocol):
    """Where the newest leads are known; implemented by `app.db.leads`."""

    async def fetch_recent(self, leads: int) -> Sequence[str]:
        """Returns every ID that the newest leads may be asked by, newest first, canonical and distinct.

        Raises:
            DatabaseUnavailableError: no answer within the deadline.
            PredictionFailedError: the relation cannot be read.
        """
        ...


class RefreshAhead:
    """Has `predictor` answer the newest `leads` anew whenever `cache` would lack them.

    The answers of `cache` live for `ttl_seconds`. `now` gives seconds UTC, `monotonic` seconds.
    """

    def __init__(
        self,
        predictor: Predictor,
        models: Models,
        cache: PredictionCache,
        recent: RecentLeads,
        *,
        leads: int,
        ttl_seconds: float,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._predictor = predictor
        self._models = models
        self._cache = cache
        self._recent = recent
        self._leads = leads
        self._ttl_seconds = ttl_seconds
        self._now = now
        self._monotonic = monotonic
        self._sleep = sleep
        self._done: tuple[str, float, int] | None = None
        self._began = 0.0

    async def run(self) -> None:
        """Looks every second whether there is something to do, until it is cancelled."""
        while True:
            try:
                with suppress(LeadScoringError):  # health and the log tell of what is missing
                    await self.look()
            except Exception:  # noqa: BLE001 - a defect met now must not end what is done for the next model
                _log.exception("refresh_ahead_failed")
            await self._sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Answers the newest leads anew if the model, the day or the whole cache changed, or time has passed.

        A few leads among which one cannot be scored are left to requests, and tried again with all others.

        Raises:
            LeadScoringError: there is no model, or the lead source does not answer; look again.
        """
        model = (await self._models.active()).ref
        began, as_of = self._monotonic(), start_of_day(self._now())
        state = (model.manifest_sha256, as_of, self._cache.emptied_by())
        fresh = state == self._done and began < self._began + REFRESH_AT * self._ttl_seconds
        if fresh or not self._cache.is_trusted():
            return
        lead_ids = await self._recent.fetch_recent(self._leads)
        told = False
        for start in range(0, len(lead_ids), CHUNK_IDS):
            chunk_began = self._monotonic()
            chunk = lead_ids[start : start + CHUNK_IDS]
            try:
                await self._predictor.refresh(chunk, RequestContext(as_of))
                LEADS_AHEAD.inc(len(chunk))
                pause = PAUSE_FACTOR * (self._monotonic() - chunk_began)
            except PredictionFailedError:
                # The fault of one lead, or of all: the next ones are tried, but without a flood in the log.
                if not told:
                    _log.exception("refresh_ahead_incomplete")
                told, pause = True, _LOOK_SECONDS
            await self._sleep(pause)
        self._done, self._began = state, began
