"""The limit on requests in flight."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from app.ai.events import RequestRecord
from app.errors import OverloadedError
from app.middleware.in_flight import (
    ALWAYS,
    ARRIVED_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    RECORD_SECONDS,
    Admission,
    InFlightLimit,
)
from tests.fakes import FakeClock
from tests.test_telemetry_events import make_predictions, make_record

PATH = "/ai/advanced-ml/predict-batch"
GET = {"type": "http", "method": "GET", "path": PATH}
DEADLINE_SECONDS = 5.0


def build_post(record: RequestRecord | None = None) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": PATH, "state": {"record": record or make_record()}}


def limit_of(app: Any, limit: int, monotonic: Callable[[], float] = time.monotonic) -> InFlightLimit:
    return InFlightLimit(
        app,
        paths={PATH},
        admission=Admission(limit),
        deadline_seconds=DEADLINE_SECONDS,
        monotonic=monotonic,
    )


class _Busy:
    """An application that answers when it is told to."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[None] = asyncio.Queue()
        self.may_end = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, _send: Any) -> None:
        if "state" in scope:
            await receive()
        self.begun.put_nowait(None)
        await self.may_end.wait()


async def _arrive() -> Any:
    return {"type": "http.request", "body": b"[]", "more_body": False}


async def _never() -> Any:
    raise AssertionError("nothing is received or sent here")


async def _ignore(_message: Any) -> None:
    await _never()


async def test_one_more_than_the_limit_is_refused_and_the_place_is_given_back() -> None:
    busy = _Busy()
    limit = limit_of(busy, 2)
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(limit(build_post(), _arrive, _ignore))
        await busy.begun.get()
        await busy.begun.get()
        with pytest.raises(OverloadedError) as refused:
            await limit(build_post(), _arrive, _ignore)
        assert refused.value.retry_after in (1, 2, 3)
        for asks_for_none in (GET, GET | {"method": "POST", "path": "/docs"}):
            group.create_task(limit(asks_for_none, _never, _ignore))
            await busy.begun.get()
        busy.may_end.set()
    await limit(build_post(), _arrive, _ignore)


def test_whoever_is_refused_is_told_to_come_back_in_a_time_that_is_drawn() -> None:
    assert {OverloadedError().retry_after for _ in range(200)} == {1, 2, 3}


async def test_a_request_that_fails_or_is_given_up_gives_its_place_back() -> None:
    async def fail(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()
        raise ConnectionError

    limit = limit_of(fail, 1)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            await limit(build_post(), _arrive, _ignore)
    busy = _Busy()
    limit = limit_of(busy, 1)
    given_up = asyncio.create_task(limit(build_post(), _arrive, _ignore))
    await busy.begun.get()
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    busy.may_end.set()
    await limit(build_post(), _arrive, _ignore)


async def test_a_request_takes_its_place_when_it_has_arrived_and_not_while_its_body_trickles_in() -> None:
    busy, rest = _Busy(), asyncio.Event()
    limit = limit_of(busy, 1)

    async def trickle() -> Any:
        await rest.wait()
        return await _arrive()

    slow = asyncio.create_task(limit(build_post(), trickle, _ignore))
    quick = asyncio.create_task(limit(build_post(), _arrive, _ignore))
    await busy.begun.get()
    rest.set()
    with pytest.raises(OverloadedError):
        await slow
    busy.may_end.set()
    await quick


@pytest.mark.parametrize(("well_answered", "let_in"), [(True, ALWAYS), (False, ALWAYS + 1)])
async def test_a_few_are_always_let_in_and_more_only_if_answers_of_late_left_them_time(
    well_answered: bool, let_in: int
) -> None:
    busy, clock = _Busy(), FakeClock()
    limit = limit_of(busy, ALWAYS + 1, clock)
    age = None if well_answered else 1.0
    record = make_record(replace(make_predictions(["lead_1"], [0.5]), degraded_age_seconds=age))
    slow = asyncio.create_task(limit(build_post(record), _arrive, _ignore))
    await busy.begun.get()
    clock.now += 20 * LONGEST_WAIT_SECONDS
    busy.may_end.set()
    await slow
    busy.may_end.clear()
    async with asyncio.TaskGroup() as group:
        for _ in range(let_in):
            group.create_task(limit(build_post(), _arrive, _ignore))
            await busy.begun.get()
        with pytest.raises(OverloadedError):
            await limit(build_post(), _arrive, _ignore)
        busy.may_end.set()


async def test_the_deadline_of_a_request_begins_when_it_has_arrived() -> None:
    busy, rest, clock = _Busy(), asyncio.Event(), FakeClock()
    busy.may_end.set()

    async def trickle() -> Any:
        await rest.wait()
        return await _arrive()

    record = make_record()
    slow = asyncio.create_task(limit_of(busy, 1, clock)(build_post(record), trickle, _ignore))
    await asyncio.sleep(0)
    clock.now += 100
    assert record.answer_by is None
    rest.set()
    await slow
    assert record.answer_by == clock.now + DEADLINE_SECONDS - RECORD_SECONDS


def busy_with(requests: int, seconds_each: float) -> Admission:
    """An admission that has settled on this, with so many requests under way."""
    admission = Admission(limit=100)
    for number in range(200):
        admission.enter()
        admission.leave(number * seconds_each, (number + 1) * seconds_each, well_answered=True)
    for _ in range(requests):
        admission.enter()
    return admission


def test_one_that_has_arrived_whole_may_wait_longer_than_one_that_has_not() -> None:
    admission = busy_with(ALWAYS, 1.5 * LONGEST_WAIT_SECONDS / ALWAYS)
    assert admission.is_full()
    assert not admission.is_full(ARRIVED_WAIT_SECONDS)
    admission.leave(0.0, 1e6, well_answered=False)
    assert not admission.is_full()


def test_who_waits_is_counted_once_however_many_are_answered_one_after_the_other() -> None:
    admission, each = Admission(limit=100), LONGEST_WAIT_SECONDS / 10.5
    for number in range(200):  # twenty at a time, all of which wait for those before them
        admission.enter()
        admission.leave((number - 20) * each, number * each, well_answered=True)
    for under_way, full in ((10, False), (11, True)):
        for _ in range(under_way - admission.in_flight):
            admission.enter()
        assert admission.is_full() == full


@pytest.mark.parametrize("well_answered", [True, False])
def test_a_moment_in_which_all_stood_still_turns_nobody_away(well_answered: bool) -> None:
    admission = busy_with(16, 0.001)
    resumed = 100.0
    admission.leave(resumed - 1, resumed, well_answered=well_answered)
    for _ in range(15):  # what the disk, or the machine, kept from being answered is answered together
        admission.leave(resumed - 1, resumed, well_answered=True)
    for _ in range(16):
        assert not admission.is_full()
        admission.enter()


def test_requests_that_get_no_good_answer_are_not_held_against_those_that_do() -> None:
    admission, now = busy_with(0, 0.001), 0.2
    for number in range(1000):
        admission.enter()
        now += 0.001
        admission.leave(now - 0.1, now, well_answered=number % 100 == 0)
    for _ in range(50):
        assert not admission.is_full()
        admission.enter()
