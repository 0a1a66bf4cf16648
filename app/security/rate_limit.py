"""How often one client may ask: a token bucket for each, in the memory of one worker.

The algorithm is pyrate-limiter's, over a monotonic clock, so that a clock that is set back locks nobody out.
`main` mounts the dependency, `wiring` builds the limiter it finds in the request's state.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from fastapi import Request
from pyrate_limiter import Duration, Rate, TokenBucket

from app.errors import RateLimitedError

MAX_CLIENTS = 10_000

_BUCKET = TokenBucket()


class RateLimiter:
    """Lets each client through as often as `limit` says, for example `100/second`; all of them at once, too.

    Of more than `MAX_CLIENTS` the one not heard of for the longest time is forgotten, and starts anew.
    `clock` gives monotonic seconds.
    """

    def __init__(self, limit: str, clock: Callable[[], float] = time.monotonic) -> None:
        number, _, period = limit.partition("/")
        self._rates = [Rate(int(number), Duration[period.upper()])]
        self._clock = clock
        self._states: OrderedDict[str, tuple[float, ...]] = OrderedDict()

    def admit(self, client: str) -> None:
        """Counts one request of a client.

        Raises:
            RateLimitedError: it is one too many; not counted.
        """
        state = self._states.pop(client, None) or _BUCKET.initial(self._rates)
        self._states[client], decision = _BUCKET.step(self._rates, state, int(self._clock() * 1000), 1)
        if len(self._states) > MAX_CLIENTS:
            self._states.popitem(last=False)
        if not decision.allowed:
            raise RateLimitedError(retry_after=max(1, math.ceil((decision.retry_after_ms or 0) / 1000)))


async def limit_rate(request: Request) -> None:
    """A dependency: counts the request for the client that a guard found, or else for its address.

    Raises:
        RateLimitedError: see `RateLimiter.admit`.
    """
    state = request.scope["state"]
    limiter: RateLimiter = state["rate_limiter"]
    address = request.scope.get("client") or ("",)
    limiter.admit(state.get("client") or address[0])
