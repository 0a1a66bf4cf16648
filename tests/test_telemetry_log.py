"""The telemetry log keeps what it was given, and gives itself up rather than the service."""

import os
import random
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.ai.domain import StoredEvent
from app.ai.events import PredictionError, encode_event
from app.ai.telemetry_log import TelemetryLog
from app.errors import TelemetryUnavailableError


def make_events(first: int, count: int) -> list[StoredEvent]:
    event = PredictionError(
        route="/ai/advanced-ml/predict-batch", status=422, trace_id="a" * 32, latency_ms=1.0,
        error_code="EMPTY_BATCH", asked=None,
    )  # fmt: skip
    return [
        encode_event(event, f"id-{number:06}", "2026-01-01T00:00:00Z", f"req-{number}")
        for number in range(first, first + count)
    ]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[TelemetryLog]:
    log = TelemetryLog(tmp_path / "telemetry")
    yield log
    log.close()


def database_file(directory: Path) -> Path:
    return directory / "telemetry" / "current" / "events.sqlite3"


def read_all(log: TelemetryLog) -> list[StoredEvent]:
    return log.read_batch(10_000).events


def test_events_come_back_oldest_first_and_are_gone_once_deleted(log: TelemetryLog) -> None:
    events = make_events(0, 5)
    log.write(events[:2])
    log.write(events[2:])
    batch = log.read_batch(3)
    assert batch.events == events[:3]
    log.delete(batch)
    assert read_all(log) == events[3:]
    assert log.count() == 2


def test_the_log_outlives_its_process_object(log: TelemetryLog, tmp_path: Path) -> None:
    log.write(make_events(0, 3))
    again = TelemetryLog(tmp_path / "telemetry")
    assert read_all(again) == make_events(0, 3)
    again.close()


def test_a_commit_waits_for_the_disk_and_only_the_owner_may_read_it(
    log: TelemetryLog, tmp_path: Path
) -> None:
    log.write(make_events(0, 1))
    connection = log._connect()
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    file = database_file(tmp_path)
    for path in (file, file.with_name(file.name + "-wal")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_full_log_refuses_and_takes_events_again_once_there_is_room(tmp_path: Path) -> None:
    log = TelemetryLog(tmp_path / "telemetry", max_bytes=40 * 4096)
    written = 0
    with pytest.raises(TelemetryUnavailableError):  # noqa: PT012 - which write fails is not the point
        for written in range(10_000):
            log.write(make_events(written, 1))
    with pytest.raises(TelemetryUnavailableError):
        log.check_writable()
    assert log.count() == written
    log.delete(log.read_batch(written))
    log.check_writable()
    log.write(make_events(0, 1))
    assert log.count() == 1
    log.close()


def test_a_log_that_cannot_be_made_says_so_and_recovers(tmp_path: Path) -> None:
    in_the_way = tmp_path / "telemetry"
    in_the_way.write_text("a file where the directory belongs")
    log = TelemetryLog(in_the_way)
    with pytest.raises(TelemetryUnavailableError):
        log.write(make_events(0, 1))
    in_the_way.unlink()
    log.write(make_events(0, 1))
    assert log.count() == 1
    log.close()


def test_a_file_that_is_no_database_is_set_aside(log: TelemetryLog, tmp_path: Path) -> None:
    log.write(make_events(0, 1))
    log.close()
    database_file(tmp_path).write_bytes(b"not a database at all" * 1000)
    log.write(make_events(1, 1))
    assert read_all(log) == make_events(1, 1)
    assert len(list((tmp_path / "telemetry").glob("salvaged-*"))) == 1


def test_what_is_readable_of_a_damaged_log_is_kept(log: TelemetryLog, tmp_path: Path) -> None:
    events = make_events(0, 400)
    log.write(events)
    log.close()
    file = database_file(tmp_path)
    size = file.stat().st_size
    with file.open("r+b") as content:
        content.seek(size // 2 // 4096 * 4096)
        content.write(os.urandom(4096))
    log.write(make_events(1000, 1))
    kept = read_all(log)
    assert len(list((tmp_path / "telemetry").glob("salvaged-*"))) == 1
    assert set(kept) <= {*events, *make_events(1000, 1)}
    assert {events[0], events[-1], *make_events(1000, 1)} <= set(kept)


def test_no_damage_keeps_the_log_from_starting_or_lets_a_false_event_out(tmp_path: Path) -> None:
    events = make_events(0, 60)
    rng = random.Random(1)  # noqa: S311 - a repeatable choice of places
    original = TelemetryLog(tmp_path / "original")
    original.write(events)
    original.close()
    pristine = (tmp_path / "original" / "current" / "events.sqlite3").read_bytes()
    for round_number in range(60):
        directory = tmp_path / f"round-{round_number}"
        (directory / "current").mkdir(parents=True)
        place = rng.randrange(len(pristine))
        damaged = pristine[:place] if round_number % 2 else (
            pristine[:place] + bytes([pristine[place] ^ 1 << rng.randrange(8)]) + pristine[place + 1 :]
        )  # fmt: skip
        (directory / "current" / "events.sqlite3").write_bytes(damaged)
        log = TelemetryLog(directory)
        log.write(make_events(1000, 1))
        batch = log.read_batch(1000)
        assert set(batch.events) <= {*events, *make_events(1000, 1)}
        assert make_events(1000, 1)[0] in batch.events
        log.delete(batch)
        assert read_all(log) == []
        log.close()


def test_a_worker_notices_that_another_one_set_the_log_aside(log: TelemetryLog, tmp_path: Path) -> None:
    other = TelemetryLog(tmp_path / "telemetry")
    log.write(make_events(0, 2))
    assert other.count() == 2
    log._set_aside()
    other.write(make_events(2, 1))
    log.write(make_events(3, 1))
    assert sorted(read_all(log), key=lambda event: event.id) == make_events(0, 4)
    other.close()


def test_a_log_killed_while_setting_aside_still_takes_over_what_was_readable(tmp_path: Path) -> None:
    log = TelemetryLog(tmp_path / "telemetry")
    log.write(make_events(0, 2))
    log._set_aside()
    log.close()
    log.write(make_events(2, 1))
    assert sorted(read_all(log), key=lambda event: event.id) == make_events(0, 3)
    log.close()


def test_a_batch_read_before_the_log_was_set_aside_deletes_nothing_else(log: TelemetryLog) -> None:
    log.write(make_events(0, 2))
    batch = log.read_batch(10)
    log._set_aside()
    log.write(make_events(2, 1))
    log.delete(batch)
    assert read_all(log) == make_events(2, 1)


def test_one_worker_ships_at_a_time(log: TelemetryLog, tmp_path: Path) -> None:
    other = TelemetryLog(tmp_path / "telemetry")
    assert log.own_shipping()
    assert not other.own_shipping()
    log.release_shipping()
    assert other.own_shipping()
    other.close()
    assert log.own_shipping()


def test_a_reader_of_another_program_does_not_stop_the_log(log: TelemetryLog, tmp_path: Path) -> None:
    log.write(make_events(0, 1))
    reader = sqlite3.connect(database_file(tmp_path), isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
    log.write(make_events(1, 1))
    reader.close()
    assert log.count() == 2
