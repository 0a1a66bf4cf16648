"""Recording is durable before it returns, and every event reaches the database exactly once."""

import asyncio
import inspect
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.ai.domain import StoredEvent
from app.ai.events import PredictionError
from app.ai.ml_telemetry import MlTelemetry, NullTelemetry
from app.ai.patience import Patience
from app.ai.telemetry_log import TelemetryLog
from app.errors import DatabaseUnavailableError, TelemetryUnavailableError
from tests.test_telemetry_log import broken_logging, make_events

EVENT = PredictionError(
    route="/ai/advanced-ml/predict-batch", status=422, trace_id=None, latency_ms=1.5,
    error_code="EMPTY_BATCH", asked=None,
)  # fmt: skip


def make_event() -> PredictionError:
    return EVENT


class Table:
    """A sink with a primary key, which can be away, and which can fail after it committed."""

    def __init__(self) -> None:
        self.rows: dict[str, StoredEvent] = {}
        self.deliveries = 0
        self.sizes: list[int] = []
        self.away = False
        self.failures_after_commit = 0

    async def write_events(self, events: Sequence[StoredEvent]) -> None:
        if self.away:
            raise DatabaseUnavailableError
        for event in events:
            self.rows.setdefault(event.id, event)
        self.deliveries += len(events)
        self.sizes += [len(events)] if events else []
        if self.failures_after_commit:
            self.failures_after_commit -= 1
            raise DatabaseUnavailableError

    def request_ids(self) -> list[str | None]:
        return sorted(event.request_id or "" for event in self.rows.values())


class GatedLog(TelemetryLog):
    """A log whose disk waits for `gate`, and which counts its commits."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.commits = 0

    def write(self, events: Sequence[StoredEvent]) -> None:
        self.reached.set()
        self.gate.wait(10)
        self.commits += 1
        super().write(events)


class WatchedLog(TelemetryLog):
    """A log that knows which thread wrote to it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.writers: list[str] = []

    def write(self, events: Sequence[StoredEvent]) -> None:
        self.writers.append(threading.current_thread().name)
        super().write(events)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on another thread
            await asyncio.sleep(0.002)


async def turns() -> None:
    """Lets the event loop do what it can without waiting."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def opened(
    log: TelemetryLog,
    sink: Table,
    deadline_seconds: float = 5.0,
    quick_disk_seconds: float = 0.0,
    company_seconds: float = 0.0,
) -> AsyncIterator[MlTelemetry]:
    """Telemetry over a disk that is never quick, unless it says how quick a disk has to be."""
    telemetry = MlTelemetry(
        log,
        sink,
        ship_interval_seconds=0.005,
        record_deadline_seconds=deadline_seconds,
        quick_disk_seconds=quick_disk_seconds,
        company_seconds=company_seconds,
        group_size=50,
    )
    await telemetry.open()
    try:
        yield telemetry
    finally:
        await telemetry.close()


async def test_what_is_recorded_arrives_once_with_its_request_id(tmp_path: Path) -> None:
    table = Table()
    async with opened(TelemetryLog(tmp_path), table) as telemetry:
        await asyncio.gather(*(telemetry.record(make_event, f"req-{n:03}") for n in range(200)))
        await until(lambda: len(table.rows) == 200)
        await until(lambda: telemetry.backlog() == 0)
        assert telemetry.state() == "ok"
    assert table.request_ids() == [f"req-{n:03}" for n in range(200)]
    assert table.deliveries == 200


async def test_nothing_is_acknowledged_before_the_log_committed(tmp_path: Path) -> None:
    log = GatedLog(tmp_path)
    async with opened(log, Table()) as telemetry:
        log.gate.clear()
        recording = asyncio.create_task(telemetry.record(make_event, "req"))
        await until(log.reached.is_set)
        assert not recording.done()
        log.gate.set()
        await recording


async def test_requests_that_wait_together_share_a_commit(tmp_path: Path) -> None:
    log = GatedLog(tmp_path)
    async with opened(log, Table()) as telemetry:
        log.gate.clear()
        recordings = [asyncio.create_task(telemetry.record(make_event, f"req-{n}")) for n in range(40)]
        await until(log.reached.is_set)
        log.gate.set()
        await asyncio.gather(*recordings)
    assert log.commits <= 3


async def test_requests_ready_at_once_share_a_commit_where_they_stand(tmp_path: Path) -> None:
    log = WatchedLog(tmp_path)
    async with opened(log, Table(), quick_disk_seconds=60) as telemetry:
        await asyncio.gather(*(telemetry.record(make_event, f"req-{n}") for n in range(40)))
    assert log.writers == [threading.current_thread().name]


async def test_a_lone_caller_does_not_wait_for_a_turn_of_the_loop_after_having_been_alone(
    tmp_path: Path,
) -> None:
    turned = asyncio.Event()
    async with opened(TelemetryLog(tmp_path), Table(), quick_disk_seconds=60) as telemetry:
        await telemetry.record(make_event, "first", under_way=1)
        asyncio.get_running_loop().call_soon(turned.set)
        await telemetry.record(make_event, "second", under_way=1)
        assert not turned.is_set()


async def test_requests_that_are_read_in_the_same_turn_share_a_commit(tmp_path: Path) -> None:
    log, loop = GatedLog(tmp_path), asyncio.get_running_loop()
    recordings: list[asyncio.Task[None]] = []

    async with opened(log, Table(), quick_disk_seconds=60) as telemetry:

        def read(name: str) -> None:
            recordings.append(asyncio.create_task(telemetry.record(make_event, name, under_way=1)))

        for _ in range(3):  # a request is read, and others in the turn in which the first has its event
            recordings.clear()
            log.commits = 0
            read("first")
            loop.call_soon(read, "second")
            loop.call_soon(read, "third")
            await turns()
            await asyncio.gather(*recordings)
            assert log.commits == 1


async def test_an_event_among_other_requests_waits_for_more_than_half_of_theirs(tmp_path: Path) -> None:
    log = GatedLog(tmp_path)
    async with opened(log, Table(), quick_disk_seconds=60, company_seconds=60) as telemetry:
        recordings = [
            asyncio.create_task(telemetry.record(make_event, f"{n}", under_way=4)) for n in range(2)
        ]
        await turns()
        assert log.commits == 0
        await telemetry.record(make_event, "the third", under_way=4)
        await asyncio.gather(*recordings)
        assert log.commits == 1


async def test_an_event_whose_company_does_not_come_is_written_all_the_same(tmp_path: Path) -> None:
    log = GatedLog(tmp_path)
    async with opened(log, Table(), quick_disk_seconds=60, company_seconds=0.001) as telemetry:
        await telemetry.record(make_event, "alone", under_way=100)
        assert log.commits == 1


async def test_an_event_that_waits_for_others_is_shipped_when_the_telemetry_closes(tmp_path: Path) -> None:
    table = Table()
    async with opened(TelemetryLog(tmp_path), table, quick_disk_seconds=60, company_seconds=60) as telemetry:
        recording = asyncio.create_task(telemetry.record(make_event, "waits", under_way=100))
        await turns()
    await recording
    assert table.request_ids() == ["waits"]


def test_who_does_not_come_is_waited_for_less_and_less() -> None:
    patience = Patience()
    spared = []
    for _ in range(8):
        assert patience.take()
        patience.note(1)
        spared.append(next(n for n in range(100) if patience.take()))
    assert spared == [1, 3, 7, 15, 31, 63, 63, 63]


def test_who_comes_is_waited_for_again() -> None:
    patience = Patience()
    for _ in range(6):
        patience.note(1)
    for _ in range(6):
        patience.note(2)
    assert patience.take()


async def test_a_disk_that_was_slow_is_waited_for_on_the_thread(tmp_path: Path) -> None:
    log = WatchedLog(tmp_path)
    async with opened(log, Table(), quick_disk_seconds=1e-9) as telemetry:
        await telemetry.record(make_event, "req-0")
        await telemetry.record(make_event, "req-1")
    assert log.writers == [threading.current_thread().name, "telemetry-writer"]


async def test_a_sink_that_fails_after_its_commit_makes_no_second_row(tmp_path: Path) -> None:
    table = Table()
    table.failures_after_commit = 3
    async with opened(TelemetryLog(tmp_path), table) as telemetry:
        await asyncio.gather(*(telemetry.record(make_event, f"req-{n}") for n in range(20)))
        await until(lambda: table.failures_after_commit == 0 and telemetry.backlog() == 0)
    assert len(table.rows) == 20
    assert table.deliveries > 20


async def test_an_absent_database_delays_events_and_loses_none(tmp_path: Path) -> None:
    table = Table()
    table.away = True
    async with opened(TelemetryLog(tmp_path), table) as telemetry:
        for number in range(120):
            await telemetry.record(make_event, f"req-{number:03}")
        await until(lambda: telemetry.state() == "shipping_delayed" and telemetry.backlog() == 120)
        table.away = False
        await until(lambda: len(table.rows) == 120)
        await until(lambda: telemetry.state() == "ok")
    assert table.request_ids() == [f"req-{n:03}" for n in range(120)]


async def test_a_look_at_the_log_that_fails_is_told_and_ends_nothing(tmp_path: Path) -> None:
    class NoMemory(TelemetryLog):
        failures = 0

        def prepare_next(self) -> None:
            if self.failures:
                self.failures -= 1
                raise MemoryError
            super().prepare_next()

    def count_failures() -> float | None:
        return REGISTRY.get_sample_value("leadscore_telemetry_failures_total", {"step": "ship"})

    log, table, before = NoMemory(tmp_path), Table(), count_failures() or 0
    async with opened(log, table) as telemetry:
        with capture_logs() as lines:
            log.failures = 3
            await until(lambda: not log.failures)
            await telemetry.record(make_event, "after it")
            await until(lambda: table.request_ids() == ["after it"] and telemetry.state() == "ok")
        assert count_failures() == before + 3
        assert [line["event"] for line in lines] == [
            "telemetry_shipping_delayed",
            "telemetry_shipping_resumed",
        ]
        assert lines[0]["error"] == "MemoryError"


async def ship(log: TelemetryLog, count: int) -> list[int]:
    """Returns the sizes of the groups in which so many events go to the database."""
    table = Table()
    log.write(make_events(0, count))
    telemetry = MlTelemetry(log, table, ship_interval_seconds=0.005)
    await telemetry.open()
    await until(lambda: len(table.rows) == count)
    await telemetry.close()
    return table.sizes


async def test_few_events_go_to_the_database_in_small_groups(tmp_path: Path) -> None:
    assert await ship(TelemetryLog(tmp_path), 250) == [100, 100, 50]


async def test_a_backlog_goes_to_the_database_in_large_groups(tmp_path: Path) -> None:
    sizes = await ship(TelemetryLog(tmp_path), 4500)
    assert sizes[0] == 500
    assert sizes[-1] <= 100


async def test_closing_ships_what_is_left(tmp_path: Path) -> None:
    table = Table()
    telemetry = MlTelemetry(TelemetryLog(tmp_path), table, ship_interval_seconds=3600)
    await telemetry.open()
    await telemetry.record(make_event, "recorded")
    telemetry.submit(make_event, "submitted")
    await telemetry.close()
    assert table.request_ids() == ["recorded", "submitted"]
    with pytest.raises(TelemetryUnavailableError):
        await telemetry.record(make_event, "late")


async def test_closing_with_the_database_away_ends_in_time_and_the_next_run_ships(tmp_path: Path) -> None:
    class Frozen(Table):
        async def write_events(self, events: Sequence[StoredEvent]) -> None:
            await asyncio.Event().wait()

    telemetry = MlTelemetry(TelemetryLog(tmp_path), Frozen())
    await telemetry.open()
    await telemetry.record(make_event, "kept")
    async with asyncio.timeout(2):
        await telemetry.close(deadline_seconds=0.05)
    table = Table()
    async with opened(TelemetryLog(tmp_path), table):
        await until(lambda: table.request_ids() == ["kept"])


async def test_a_cancelled_request_leaves_exactly_one_event(tmp_path: Path) -> None:
    log, table = GatedLog(tmp_path), Table()
    async with opened(log, table) as telemetry:
        log.gate.clear()
        recordings = [asyncio.create_task(telemetry.record(make_event, f"req-{n}")) for n in range(10)]
        await until(log.reached.is_set)
        for recording in recordings:
            recording.cancel()
        outcomes = await asyncio.gather(*recordings, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        log.gate.set()
    assert table.request_ids() == [f"req-{n}" for n in range(10)]


def test_nobody_waits_longer_for_the_disk_than_two_seconds_unless_told_to() -> None:
    assert inspect.signature(MlTelemetry).parameters["record_deadline_seconds"].default == 2.0


async def test_disk_and_database_gone_give_an_error_in_time_and_no_event_for_it(tmp_path: Path) -> None:
    log, table = GatedLog(tmp_path), Table()
    async with opened(log, table, deadline_seconds=0.05) as telemetry:
        log.gate.clear()
        table.away = True
        first = asyncio.create_task(telemetry.record(make_event, "already on its way to the disk"))
        await until(log.reached.is_set)
        with pytest.raises(TelemetryUnavailableError):
            await telemetry.record(make_event, "withdrawn")
        with pytest.raises(TelemetryUnavailableError):
            await first
        assert telemetry.state() == "unavailable"
        table.away = False
        log.gate.set()
        await until(lambda: telemetry.state() == "ok")
    assert table.request_ids() == ["already on its way to the disk"]


@pytest.mark.parametrize("quick_disk_seconds", [0, 60], ids=["on the thread", "where they stand"])
async def test_nobody_waits_for_ever_when_a_failed_disk_cannot_be_logged_either(
    tmp_path: Path, quick_disk_seconds: float
) -> None:
    class Failing(TelemetryLog):
        fails = False

        def write(self, events: Sequence[StoredEvent]) -> None:
            if self.fails:
                raise TelemetryUnavailableError
            super().write(events)

    log, table = Failing(tmp_path), Table()
    async with opened(log, table, quick_disk_seconds=quick_disk_seconds) as telemetry, asyncio.timeout(10):
        log.fails = True
        with broken_logging():
            await asyncio.gather(*(telemetry.record(make_event, f"direct-{n}") for n in range(3)))
            assert table.request_ids() == ["direct-0", "direct-1", "direct-2"]
        log.fails = False
        await until(lambda: telemetry.state() == "ok")
        await telemetry.record(make_event, "logged")
    assert table.request_ids() == ["direct-0", "direct-1", "direct-2", "logged"]


async def test_an_event_that_waited_in_vain_goes_to_the_database_even_if_that_cannot_be_logged(
    tmp_path: Path,
) -> None:
    log, table = GatedLog(tmp_path), Table()
    async with opened(log, table, deadline_seconds=0.05) as telemetry, asyncio.timeout(10):
        log.gate.clear()
        with broken_logging():
            await telemetry.record(make_event, "late")
            assert table.request_ids() == ["late"]
        log.gate.set()


async def test_what_ends_the_making_of_a_group_leaves_nobody_else_of_it_waiting(
    tmp_path: Path,
) -> None:
    class Ended(BaseException):
        pass

    def end() -> PredictionError:
        raise Ended

    table = Table()
    async with opened(TelemetryLog(tmp_path), table, quick_disk_seconds=60) as telemetry, asyncio.timeout(10):
        outcomes = await asyncio.gather(
            *(telemetry.record(build, name) for build, name in ((make_event, "first"), (end, "none"))),
            return_exceptions=True,
        )
        assert table.request_ids() == ["first"]
    assert [type(outcome) for outcome in outcomes] == [type(None), Ended]


async def test_a_log_that_cannot_be_written_refuses_and_recovers(tmp_path: Path) -> None:
    in_the_way = tmp_path / "telemetry"
    in_the_way.write_text("a file where the directory belongs")
    table = Table()
    table.away = True
    async with opened(TelemetryLog(in_the_way), table) as telemetry:
        assert telemetry.state() == "unavailable"
        with pytest.raises(TelemetryUnavailableError):
            await telemetry.record(make_event, "refused")
        in_the_way.unlink()
        await until(lambda: telemetry.state() in ("ok", "shipping_delayed"))
        await telemetry.record(make_event, "taken")
        table.away = False
    assert table.request_ids() == ["taken"]


async def test_while_the_log_cannot_be_written_events_go_to_the_database_at_once(tmp_path: Path) -> None:
    in_the_way = tmp_path / "telemetry"
    in_the_way.write_text("a file where the directory belongs")
    table = Table()
    async with opened(TelemetryLog(in_the_way), table) as telemetry:
        assert telemetry.state() == "direct"
        await telemetry.record(make_event, "direct")
        assert table.request_ids() == ["direct"]
        table.away = True
        with pytest.raises(TelemetryUnavailableError):
            await telemetry.record(make_event, "refused")
        assert telemetry.state() == "unavailable"
        table.away = False
        await until(lambda: telemetry.state() == "direct")  # without an event to try it on
        in_the_way.unlink()
        await until(lambda: telemetry.state() == "ok")
        await telemetry.record(make_event, "logged")
    assert table.request_ids() == ["direct", "logged"]


async def test_an_event_the_log_fails_under_is_in_the_database_before_the_answer(tmp_path: Path) -> None:
    class Failing(TelemetryLog):
        def write(self, events: Sequence[StoredEvent]) -> None:
            raise TelemetryUnavailableError

    table = Table()
    async with opened(Failing(tmp_path), table) as telemetry:
        assert telemetry.state() == "ok"
        await telemetry.record(make_event, "first")
        assert table.request_ids() == ["first"]


class GatedTable(Table):
    """A table that takes events only while its gate is open, and counts the INSERTs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.inserts = 0

    async def write_events(self, events: Sequence[StoredEvent]) -> None:
        if events:
            self.inserts += 1
            await self.gate.wait()
        await super().write_events(events)


def make_unusable(directory: Path) -> TelemetryLog:
    (directory / "in-the-way").write_text("a file where the directory belongs")
    return TelemetryLog(directory / "in-the-way")


async def test_events_that_go_to_the_database_at_the_same_time_share_an_insert(tmp_path: Path) -> None:
    table = GatedTable()
    async with opened(make_unusable(tmp_path), table) as telemetry:
        recordings = [asyncio.create_task(telemetry.record(make_event, f"{n:03}")) for n in range(80)]
        await until(lambda: table.inserts == 1)
        table.gate.set()
        await asyncio.gather(*recordings)
    assert table.request_ids() == [f"{n:03}" for n in range(80)]
    assert table.inserts == 2  # at most 50 in one


async def test_a_frozen_database_behind_a_failed_disk_gives_an_error_in_time(tmp_path: Path) -> None:
    table = GatedTable()
    async with opened(make_unusable(tmp_path), table, deadline_seconds=0.05) as telemetry:
        with pytest.raises(TelemetryUnavailableError):
            await telemetry.record(make_event, "late")
        table.gate.set()
    assert table.request_ids() == ["late"]


async def test_behind_a_frozen_database_only_those_whose_callers_left_or_still_wait_are_kept(
    tmp_path: Path,
) -> None:
    table = GatedTable()
    async with opened(make_unusable(tmp_path), table) as telemetry:
        first = asyncio.create_task(telemetry.record(make_event, "on its way"))
        await until(lambda: table.inserts == 1)
        gone = asyncio.create_task(telemetry.record(make_event, "caller gone"))
        await turns()
        gone.cancel()
        late = (telemetry.record(make_event, f"late-{n}", deadline_seconds=0.05) for n in range(200))
        outcomes = await asyncio.gather(*late, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {TelemetryUnavailableError}
        waits = asyncio.create_task(telemetry.record(make_event, "waits"))
        await turns()
        table.gate.set()
        await asyncio.gather(first, waits)
    assert table.request_ids() == ["caller gone", "on its way", "waits"]
    assert table.inserts == 2


async def test_disk_and_database_together_take_no_longer_than_the_request_has_left(tmp_path: Path) -> None:
    log, table = GatedLog(tmp_path), GatedTable()
    async with opened(log, table, deadline_seconds=60.0) as telemetry, asyncio.timeout(10):
        log.gate.clear()
        with pytest.raises(TelemetryUnavailableError):
            await telemetry.record(make_event, "late", deadline_seconds=0.05)
        log.gate.set()
        table.gate.set()


async def test_a_request_cancelled_on_its_way_to_the_database_leaves_its_event(tmp_path: Path) -> None:
    table = GatedTable()
    async with opened(make_unusable(tmp_path), table) as telemetry:
        recordings = [asyncio.create_task(telemetry.record(make_event, f"req-{n}")) for n in range(3)]
        await until(lambda: table.inserts == 1)
        for recording in recordings:
            recording.cancel()
        await asyncio.gather(*recordings, return_exceptions=True)
        asyncio.get_running_loop().call_later(0.05, table.gate.set)  # while the telemetry is being closed
    assert table.request_ids() == ["req-0", "req-1", "req-2"]


async def test_an_event_outside_its_schema_is_refused_and_stops_nothing(tmp_path: Path) -> None:
    table = Table()
    bad = PredictionError(
        route="/ai/zoe quicksilver", status=422, trace_id=None, latency_ms=1.0, error_code="X", asked=None
    )
    async with opened(TelemetryLog(tmp_path), table) as telemetry:
        with pytest.raises(TelemetryUnavailableError):
            await telemetry.record(lambda: bad, "bad")
        telemetry.submit(lambda: bad, "bad")
        await telemetry.record(make_event, "good")
    assert table.request_ids() == ["good"]


async def test_an_event_that_cannot_be_made_stops_no_other_of_its_group(tmp_path: Path) -> None:
    table, log = Table(), GatedLog(tmp_path)

    def fail() -> PredictionError:
        raise ZeroDivisionError

    async with opened(log, table, quick_disk_seconds=60, company_seconds=0.001) as telemetry:
        outcomes = await asyncio.gather(
            *(telemetry.record(build, name, under_way=6)
              for build, name in ((make_event, "first"), (fail, "none"), (make_event, "last"))),
            return_exceptions=True,
        )  # fmt: skip
        assert log.commits == 1
        assert telemetry.state() == "ok"
    assert [type(outcome) for outcome in outcomes] == [type(None), ZeroDivisionError, type(None)]
    assert table.request_ids() == ["first", "last"]


async def test_two_workers_on_one_log_deliver_each_event_once(tmp_path: Path) -> None:
    table = Table()
    numbers = itertools.count()
    async with opened(TelemetryLog(tmp_path), table) as one, opened(TelemetryLog(tmp_path), table) as other:
        recordings = [telemetry.record(make_event, f"{next(numbers):03}") for telemetry in (one, other) * 100]
        await asyncio.gather(*recordings)
        await until(lambda: len(table.rows) == 200)
    assert table.request_ids() == [f"{n:03}" for n in range(200)]
    assert table.deliveries == 200


async def test_submitting_from_other_threads_loses_nothing(tmp_path: Path) -> None:
    table = Table()
    async with opened(TelemetryLog(tmp_path), table) as telemetry:
        submit = [asyncio.to_thread(telemetry.submit, make_event, f"{number}") for number in range(20)]
        await asyncio.gather(*submit)
    assert len(table.rows) == 20


async def test_telemetry_that_is_off_accepts_everything() -> None:
    telemetry = NullTelemetry()
    await telemetry.record(make_event, "req")
    telemetry.submit(make_event)
    assert (telemetry.backlog(), telemetry.state()) == (0, "off")
