"""Look-ups that are shared: who waits, who never does, and that nobody gets another's outcome."""

import asyncio
from collections.abc import Sequence

import pytest

from app.ai.micro_batching import MOST_LEADS, MOST_SHARED, SLOTS, MicroBatching
from app.errors import DatabaseUnavailableError, PredictionFailedError


class Database:
    """Answers a look-up when it is told to; notes what was asked in each."""

    def __init__(
        self, poison: str | None = None, error: Exception | None = None, *, away: bool = False
    ) -> None:
        self.asked: list[list[str]] = []
        self._under_way = self.most_at_once = 0
        self.open, self.third = asyncio.Event(), asyncio.Event()
        self._poison, self._error, self._away = poison, error or PredictionFailedError(), away

    async def look_up(self, world: str, lead_ids: Sequence[str]) -> list[str]:
        self.asked.append(list(lead_ids))
        if len(self.asked) > SLOTS:
            self.third.set()
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        await self.open.wait()
        await asyncio.sleep(0)
        self._under_way -= 1
        if self._away:
            raise DatabaseUnavailableError
        if self._poison in lead_ids:
            raise self._error
        return [f"{world}/{lead_id}" for lead_id in lead_ids]


def build(database: Database, longest_wait_seconds: float = 60.0) -> MicroBatching[str, list[str]]:
    """Returns what no slow machine lets set out by the clock, unless the test is about that."""
    return MicroBatching(database.look_up, longest_wait_seconds)


async def ask(
    batching: MicroBatching[str, list[str]], lead_ids: Sequence[str], world: str = "w"
) -> list[str]:
    found, places = await batching.look_up(world, lead_ids)
    return found if places is None else [found[place] for place in places]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def start(
    batching: MicroBatching[str, list[str]], *calls: Sequence[str]
) -> list["asyncio.Task[list[str]]"]:
    """Begins the calls, each when those before it have come as far as they can."""
    tasks = []
    for lead_ids in calls:
        tasks.append(asyncio.create_task(ask(batching, lead_ids)))
        await settle()
    return tasks


BUSY = [[f"busy{slot}"] for slot in range(SLOTS)]


async def test_a_request_sets_out_by_itself_while_there_is_room() -> None:
    database = Database()
    tasks = await start(build(database), *BUSY)
    assert database.asked == BUSY
    database.open.set()
    assert await asyncio.gather(*tasks) == [["w/busy0"], ["w/busy1"]]


async def test_requests_that_are_read_in_the_same_turn_set_out_together_although_there_is_room() -> None:
    database, loop = Database(), asyncio.get_running_loop()
    database.open.set()
    batching = build(database)
    tasks: list[asyncio.Task[list[str]]] = []

    def read(lead_id: str) -> None:
        tasks.append(asyncio.create_task(ask(batching, [lead_id])))

    for turn in range(1, 4):  # one is read, and the others in the turn in which it asks
        read("a")
        loop.call_soon(read, "b")
        loop.call_soon(read, "c")
        await settle()
        assert database.asked == [["a", "b", "c"]] * turn
    assert await asyncio.gather(*tasks) == [["w/a"], ["w/b"], ["w/c"]] * 3


async def test_who_was_alone_the_last_time_sets_out_at_once() -> None:
    database = Database()
    database.open.set()
    batching = build(database)
    await start(batching, ["first"])
    second = asyncio.create_task(ask(batching, ["second"]))
    await asyncio.sleep(0)
    assert database.asked == [["first"], ["second"]]
    assert await second == ["w/second"]


async def test_those_that_come_meanwhile_share_one_look_up_and_each_gets_its_own() -> None:
    database = Database()
    batching = build(database)
    tasks = await start(batching, *BUSY, ["a", "b"], ["b", "c"], ["c"])
    assert database.asked == BUSY
    database.open.set()
    answers = await asyncio.gather(*tasks)
    assert database.asked[SLOTS:] == [["a", "b", "c"]]
    assert answers[SLOTS:] == [["w/a", "w/b"], ["w/b", "w/c"], ["w/c"]]


async def test_nobody_waits_for_a_look_up_that_does_not_end() -> None:
    database = Database()
    await start(build(database, 0.25), *BUSY, ["a"], ["b"])
    async with asyncio.timeout(5):
        await database.third.wait()
    assert database.asked[SLOTS:] == [["a", "b"]]
    database.open.set()
    await settle()


async def test_different_worlds_are_never_mixed() -> None:
    database = Database()
    batching = build(database)
    busy = await start(batching, *BUSY)
    others = [asyncio.create_task(ask(batching, ["a"], world)) for world in ("old", "new")]
    await settle()
    database.open.set()
    assert await asyncio.gather(*others) == [["old/a"], ["new/a"]]
    await asyncio.gather(*busy)
    assert database.asked[SLOTS:] == [["a"], ["a"]]


async def test_a_large_request_goes_by_itself() -> None:
    database = Database()
    large = [f"x{number}" for number in range(MOST_LEADS + 1)]
    await start(build(database), *BUSY, ["a"], large)
    assert database.asked == [*BUSY, large]
    database.open.set()
    await settle()


async def test_enough_leads_do_not_wait_for_more() -> None:
    database = Database()
    size = MOST_LEADS // 2
    calls = [[f"{call}-{number}" for number in range(size)] for call in range(MOST_SHARED // size)]
    await start(build(database), *BUSY, *calls)
    assert [len(asked) for asked in database.asked[SLOTS:]] == [MOST_SHARED]
    database.open.set()
    await settle()


@pytest.mark.parametrize("error", [PredictionFailedError(), ValueError()])
async def test_a_lead_that_fails_its_look_up_fails_no_other_request(error: Exception) -> None:
    database = Database("bad", error)
    tasks = await start(build(database), *BUSY, ["a"], ["bad"], ["c"])
    database.open.set()
    good, bad, also_good = await asyncio.gather(*tasks[SLOTS:], return_exceptions=True)
    assert (good, bad, also_good) == (["w/a"], error, ["w/c"])
    assert database.asked[SLOTS:] == [["a", "bad", "c"], ["a"], ["bad", "c"], ["bad"], ["c"]]


async def test_a_lead_that_fails_a_large_look_up_is_found_by_a_few_more_one_at_a_time() -> None:
    database = Database("bad")
    others = [[f"lead_{number}"] for number in range(100)]
    tasks = await start(build(database), *BUSY, *others, ["bad"], *others)
    database.open.set()
    outcomes = await asyncio.gather(*tasks[SLOTS:], return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert [type(error) for error in failed] == [PredictionFailedError]
    assert outcomes[100] is failed[0]
    assert len(database.asked) < 25
    assert database.most_at_once <= SLOTS


async def test_a_database_that_is_away_is_told_to_all_and_asked_once() -> None:
    database = Database(away=True)
    tasks = await start(build(database), *BUSY, ["a"], ["b"])
    database.open.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {DatabaseUnavailableError}
    assert len(database.asked) == SLOTS + 1


async def test_a_caller_that_leaves_takes_nobody_along() -> None:
    database = Database()
    tasks = await start(build(database), *BUSY, ["a"], ["b"])
    tasks[0].cancel()
    tasks[SLOTS].cancel()
    await settle()
    database.open.set()
    assert await tasks[SLOTS + 1] == ["w/b"]
    for gone in (tasks[0], tasks[SLOTS]):
        with pytest.raises(asyncio.CancelledError):
            await gone
