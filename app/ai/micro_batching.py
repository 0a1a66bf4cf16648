"""Micro-batching: small look-ups of requests that are under way at the same time share one.

Most of what one lead costs is not its own: a round trip to the database, and a hundred calls of NumPy. A
request that meets fewer than `SLOTS` look-ups under way begins its own: two turns of the event loop later as
long as that brings others (`Patience`), because callers who were answered together ask again together;
otherwise at once. Those that find no room are collected, and set out together when a look-up ends, or after
`LONGEST_WAIT_SECONDS`. Each gets what it would have got alone, because no lead's answer depends on the others
in its batch; should a shared look-up fail, and not because the database is away, its halves are tried, one
after the other, down to the request at fault. Knows nothing of leads. Called by `predictor`, on its event
loop.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context, copy_context
from typing import Generic, NamedTuple, TypeVar

from app.ai.patience import Patience
from app.errors import LeadScoringError, PredictionFailedError

W = TypeVar("W", bound=Hashable)
T = TypeVar("T")
Places = list[int] | None
"""Where the answers of a request are among those of a shared look-up; None if it was not shared."""

SLOTS = 2
"""So many look-ups keep the database busy with one while the other is being scored."""

MOST_LEADS = 64
"""A request with more leads goes by itself: it has nothing to gain."""

MOST_SHARED = 256
"""With so many leads together a look-up sets out without waiting for others."""

LONGEST_WAIT_SECONDS = 0.005


class _Joined(NamedTuple, Generic[T]):
    """A request that waits for a shared look-up."""

    lead_ids: Sequence[str]
    part: "asyncio.Future[tuple[T, Places]]"
    context: Context


class MicroBatching(Generic[W, T]):
    """Shares look-ups. `look_up` takes distinct lead IDs and what else its answers depend on."""

    def __init__(
        self,
        look_up: Callable[[W, Sequence[str]], Awaitable[T]],
        longest_wait_seconds: float = LONGEST_WAIT_SECONDS,
    ) -> None:
        self._look_up = look_up
        self._longest_wait_seconds = longest_wait_seconds
        self._under_way = 0
        self._patience = Patience()
        self._waiting: dict[W, list[_Joined[T]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def look_up(self, world: W, lead_ids: Sequence[str]) -> tuple[T, Places]:
        """Returns what was found for these distinct IDs or more, and the places of these in it.

        Look-ups are shared within one `world` (model, as-of time), never across.
        """
        if len(lead_ids) > MOST_LEADS:
            return await self._look_up(world, lead_ids), None
        has_room = self._under_way < SLOTS and not self._waiting
        if has_room and not self._patience.take():
            return await self._run(world, lead_ids), None
        loop = asyncio.get_running_loop()
        joined = _Joined[T](lead_ids, loop.create_future(), copy_context())
        waiting = self._waiting.setdefault(world, [])
        waiting.append(joined)
        if has_room:
            # In the first turn others are read, and have come this far in the second.
            loop.call_soon(loop.call_soon, self._end_turns, world, waiting)
        elif len(waiting) == 1:
            loop.call_later(self._longest_wait_seconds, self._set_out, world, waiting)
        if sum(len(other.lead_ids) for other in waiting) >= MOST_SHARED:
            self._set_out(world, waiting)
        return await joined.part

    def _end_turns(self, world: W, waiting: list[_Joined[T]]) -> None:
        self._patience.note(len(waiting))
        self._set_out(world, waiting)

    async def _run(self, world: W, lead_ids: Sequence[str]) -> T:
        self._under_way += 1
        try:
            return await self._look_up(world, lead_ids)
        finally:
            self._under_way -= 1
            if self._waiting:
                self._set_out(*next(iter(self._waiting.items())))

    def _set_out(self, world: W, waiting: list[_Joined[T]]) -> None:
        if self._waiting.get(world) is not waiting:
            return  # they have set out already
        del self._waiting[world]
        self._begin(world, waiting)

    def _begin(self, world: W, waiting: Sequence[_Joined[T]]) -> "asyncio.Task[None]":
        present = [joined for joined in waiting if not joined.part.done()]
        # What is logged meanwhile carries the ID of the request it is for; of several it is nobody's word.
        context = present[0].context if len(present) == 1 else Context()
        task = asyncio.create_task(self._share(world, present), name="micro-batch", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _share(self, world: W, present: Sequence[_Joined[T]]) -> None:
        place: dict[str, int] = {}
        for joined in present:
            for lead_id in joined.lead_ids:
                place.setdefault(lead_id, len(place))
        try:
            found = await self._run(world, list(place))
        except Exception as exc:  # noqa: BLE001 - told to whoever waits, once nobody else can be at fault
            if len(present) <= 1 or _is_of_all(exc):
                _fail(present, exc)
                return
            # Not at once: hundreds of requests would fill the pool with a look-up each.
            for half in (present[: len(present) // 2], present[len(present) // 2 :]):
                await self._begin(world, half)
        else:
            for joined in present:
                if not joined.part.done():
                    joined.part.set_result((found, [place[lead_id] for lead_id in joined.lead_ids]))


def _is_of_all(error: Exception) -> bool:
    """Tells whether it is not the fault of any lead: the database is away, say."""
    return isinstance(error, LeadScoringError) and not isinstance(error, PredictionFailedError)


def _fail(waiting: Sequence[_Joined[T]], error: Exception) -> None:
    for joined in waiting:
        if not joined.part.done():
            joined.part.set_exception(error)
