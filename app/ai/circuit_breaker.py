"""A circuit breaker: after repeated failures of the service it refuses at once, then lets one probe find out.

States: closed (calls pass), open (calls are refused), half-open (exactly one probe passes, the rest are
refused). Errors of the caller say nothing about the service and never count; neither does a call that was
cancelled. Time is monotonic. Single-threaded by design: every step runs on the event loop without waiting, so
no lock is needed. Called by the legacy router.
"""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

from app.errors import CallerError, CircuitOpenError, OverloadedError

BreakerState = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Opens after `failures` service failures in a row, for `open_seconds`; then one probe decides."""

    def __init__(self, failures: int, open_seconds: float, monotonic: Callable[[], float]) -> None:
        self._limit = failures
        self._open_seconds = open_seconds
        self._monotonic = monotonic
        self._failures = 0
        self._opened_at: float | None = None
        self._probing = False
        self._period = 0

    @property
    def state(self) -> BreakerState:
        """The state a call would meet now."""
        if self._opened_at is None:
            return "closed"
        return "half_open" if self._remaining(self._opened_at) <= 0 else "open"

    @asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """Lets the body run if the circuit allows it, and learns from how it ends.

        Raises:
            CircuitOpenError: the circuit is open, or another call is the probe; `retry_after` in seconds.
        """
        period = self._admit()
        try:
            yield
        except (CallerError, OverloadedError):
            # The service works, well enough to find the caller's mistake or to have too much to do. But a
            # probe must see a real success.
            self._release(period)
            raise
        except Exception:
            self._count_failure(period)
            raise
        except BaseException:
            self._release(period)
            raise
        else:
            self._count_success(period)

    def _admit(self) -> int:
        """Returns the period the call belongs to: every opening and closing begins a new one.

        How a call ends is heard in its own period only; after that it is old news. While the circuit is not
        closed, the probe is the only call of its period.
        """
        if self._opened_at is not None:
            remaining = self._remaining(self._opened_at)
            if remaining > 0 or self._probing:
                raise CircuitOpenError(retry_after=max(1, math.ceil(remaining)))
            self._probing = True
        return self._period

    def _count_failure(self, period: int) -> None:
        if period != self._period:
            return
        self._failures += 1
        if self._probing or self._failures >= self._limit:
            self._turn(self._monotonic())

    def _count_success(self, period: int) -> None:
        if period != self._period:
            return
        self._failures = 0
        if self._probing:
            self._turn(None)

    def _release(self, period: int) -> None:
        if period == self._period:
            self._probing = False

    def _turn(self, opened_at: float | None) -> None:
        self._opened_at = opened_at
        self._probing = False
        self._period += 1

    def _remaining(self, opened_at: float) -> float:
        return opened_at + self._open_seconds - self._monotonic()
