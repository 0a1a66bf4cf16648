"""The telemetry log keeps what it was given, and gives itself up rather than the service."""

import errno
import os
import random
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import structlog
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.ai.domain import StoredEvent
from app.ai.events import PredictionError, encode_event
from app.ai.telemetry_log import TelemetryLog
from app.ai.telemetry_segment import Files
from app.errors import TelemetryUnavailableError
from tests.watched_files import WatchedFiles

SEGMENT = 4096


def make_events(first: int, count: int) -> list[StoredEvent]:
    event = PredictionError(
        route="/ai/advanced-ml/predict-batch", status=422, trace_id="a" * 32, latency_ms=1.0,
        error_code="EMPTY_BATCH", asked=None,
    )  # fmt: skip
    return [
        encode_event(event, f"id-{number:06}", "2026-01-01T00:00:00Z", f"req-{number}")
        for number in range(first, first + count)
    ]


class FailingFiles(WatchedFiles):
    """Files whose named operations fail while they are in `failing`; `calls` tells what was asked of them."""

    def __init__(self) -> None:
        super().__init__(self._note)
        self.failing: dict[str, int] = {}
        self.calls: list[tuple[str, object]] = []

    def _note(self, operation: str, subject: object, *_: object) -> None:
        self.calls.append((operation, subject))
        if operation in self.failing:
            raise OSError(self.failing[operation], os.strerror(self.failing[operation]))


@contextmanager
def broken_logging() -> Iterator[None]:
    """Every log line raises meanwhile."""

    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "the log lines go to the same disk")

    processors = structlog.get_config()["processors"]
    before = processors.copy()
    processors[:] = [fail]
    try:
        yield
    finally:
        processors[:] = before


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "var" / "telemetry"


@pytest.fixture
def files() -> FailingFiles:
    return FailingFiles()


@pytest.fixture
def open_log(directory: Path, files: FailingFiles) -> Iterator[Callable[..., TelemetryLog]]:
    """Opens logs in one directory, with segments of 4 KB that hold about a dozen events."""
    logs: list[TelemetryLog] = []

    def open_one(max_bytes: int = 1 << 20) -> TelemetryLog:
        logs.append(TelemetryLog(directory, max_bytes=max_bytes, segment_bytes=SEGMENT, files=files))
        return logs[-1]

    yield open_one
    files.failing.clear()
    for log in logs:
        log.close()


@pytest.fixture
def log(open_log: Callable[..., TelemetryLog]) -> TelemetryLog:
    return open_log()


def list_segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("events-*.log"))


def read_all(log: TelemetryLog) -> list[StoredEvent]:
    return log.read_batch(10_000).events


def write_one_by_one(log: TelemetryLog, events: list[StoredEvent]) -> None:
    for event in events:
        log.write([event])


def ship_all(log: TelemetryLog, limit: int = 7) -> list[StoredEvent]:
    """Ships until nothing is left, in several groups."""
    shipped: list[StoredEvent] = []
    while (batch := log.read_batch(limit)).events:
        assert len(batch.events) <= limit
        shipped += batch.events
        log.delete(batch)
    return shipped


def measure_first_event(directory: Path) -> tuple[int, int]:
    """Tells how many bytes a segment with one event in it uses, and how many of them are the event's."""
    origin = TelemetryLog(directory, segment_bytes=SEGMENT)
    origin.write(make_events(0, 1))
    origin.close()
    (path,) = list_segments(directory)
    used = len(path.read_bytes().rstrip(b"\0"))
    path.unlink()
    return used, used - len(f"leadscore telemetry log 1 {path.stem}\n")


def list_open_files(directory: Path) -> list[Path]:
    """Tells what this process has open in a directory, the removed files, too, and the directory itself."""
    opened = (link.resolve() for link in Path("/proc/self/fd").iterdir())
    return [path for path in opened if path.is_relative_to(directory)]


# --- events go in and come out ---------------------------------------------------------------------------


def test_events_come_back_oldest_first_and_are_gone_once_deleted(log: TelemetryLog) -> None:
    events = make_events(0, 5)
    log.write(events[:2])
    log.write(events[2:])
    batch = log.read_batch(3)
    assert batch.events == events[:3]
    log.delete(batch)
    assert read_all(log) == events[3:]
    assert log.count() == 2


def test_the_log_outlives_its_process_object(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog]
) -> None:
    log.write(make_events(0, 3))
    log.close()
    assert read_all(open_log()) == make_events(0, 3)


def test_a_closed_log_can_be_used_again(log: TelemetryLog) -> None:
    log.write(make_events(0, 1))
    log.close()
    log.write(make_events(1, 1))
    assert sorted(read_all(log), key=lambda event: event.id) == make_events(0, 2)


def test_many_events_fill_many_segments_and_all_go_once_they_are_shipped(
    log: TelemetryLog, directory: Path
) -> None:
    events = make_events(0, 100)
    write_one_by_one(log, events)
    assert len(list_segments(directory)) > 5
    assert ship_all(log) == events
    assert len(list_segments(directory)) == 1
    log.close()
    assert list(directory.iterdir()) == []


def test_a_group_larger_than_a_segment_is_kept_whole(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog]
) -> None:
    events = make_events(0, 100)
    log.write(events)
    assert read_all(log) == events
    log.close()
    assert read_all(open_log()) == events


def test_by_default_it_holds_half_a_gigabyte_in_segments_of_four_megabytes(tmp_path: Path) -> None:
    for number in range(127):
        (tmp_path / f"events-{number}.log").touch()
    log = TelemetryLog(tmp_path)
    log.write(make_events(0, 1))
    (path,) = (path for path in list_segments(tmp_path) if path.stat().st_size)
    assert path.stat().st_size == 4 * 2**20
    other = TelemetryLog(tmp_path)
    with pytest.raises(TelemetryUnavailableError):
        other.write(make_events(1, 1))
    log.close()


@pytest.mark.parametrize("group", [1, 3])
def test_a_segment_is_used_to_its_last_byte_and_not_beyond(directory: Path, group: int) -> None:
    events = make_events(0, 1 + group)
    used, record = measure_first_event(directory)
    for room, segments in ((used + group * record, 1), (used + group * record - 1, 2)):
        log = TelemetryLog(directory, segment_bytes=room)
        log.write(events[:1])
        log.write(events[1:])
        assert [path.stat().st_size for path in list_segments(directory)] == [room] * segments
        assert ship_all(log) == events
        log.close()


def test_only_the_owner_may_read_it(log: TelemetryLog, directory: Path) -> None:
    log.write(make_events(0, 1))
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in list_segments(directory)] == [0o600]


def test_an_event_is_one_write_and_one_synchronisation_and_the_file_keeps_its_size(
    log: TelemetryLog, directory: Path, files: FailingFiles
) -> None:
    log.check_writable()
    files.calls.clear()
    log.check_writable()
    log.write(make_events(0, 1))
    log.write(make_events(1, 5))
    assert [operation for operation, _ in files.calls] == ["pwrite", "fdatasync", "count_names"] * 2
    assert [path.stat().st_size for path in list_segments(directory)] == [SEGMENT]


def test_names_are_durable_before_the_first_event_is(
    log: TelemetryLog, directory: Path, files: FailingFiles
) -> None:
    log.write(make_events(0, 1))
    operations = [operation for operation, _ in files.calls]
    synced = [path for operation, path in files.calls if operation == "sync_directory"]
    assert synced == [directory.parent.parent, directory.parent, directory]
    assert operations[-5:] == ["fdatasync", "sync_directory", "pwrite", "fdatasync", "count_names"]


def test_an_event_that_was_written_is_on_the_disk_with_all_names_that_lead_to_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: dict[Path, bytes | None] = {}

    def watch(synchronise: Callable[[int], None]) -> Callable[[int], None]:
        def watched(descriptor: int) -> None:
            synchronise(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            on_disk[path] = path.read_bytes() if path.is_file() else None

        return watched

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, watch(getattr(os, name)))
    log = TelemetryLog(directory, segment_bytes=SEGMENT)
    log.write(make_events(0, 1))
    (path,) = list_segments(directory)
    assert on_disk.pop(path) == path.read_bytes()
    assert set(on_disk) == {directory.parent.parent, directory.parent, directory}
    log.close()


def test_the_next_segment_is_made_ahead_once_and_then_used(
    log: TelemetryLog, directory: Path, files: FailingFiles
) -> None:
    log.prepare_next()
    log.write(make_events(0, 1))
    log.prepare_next()
    assert len(list_segments(directory)) == 1
    log.write(make_events(1, 7))
    log.prepare_next()
    log.prepare_next()
    assert len(list_segments(directory)) == 2
    files.calls.clear()
    write_one_by_one(log, make_events(8, 10))
    assert {operation for operation, _ in files.calls} == {"pwrite", "fdatasync", "count_names"}
    assert read_all(log) == make_events(0, 18)


@pytest.mark.parametrize(("more", "segments"), [(0, 2), (1, 1)])
def test_the_next_segment_is_made_once_half_of_the_current_one_is_used(
    directory: Path, more: int, segments: int
) -> None:
    used, _ = measure_first_event(directory)
    log = TelemetryLog(directory, segment_bytes=2 * (used + more))
    log.write(make_events(0, 1))
    log.prepare_next()
    assert len(list_segments(directory)) == segments
    log.close()


def test_a_segment_made_ahead_goes_when_the_log_is_closed(log: TelemetryLog, directory: Path) -> None:
    log.write(make_events(0, 8))
    log.prepare_next()
    assert len(list_segments(directory)) == 2
    log.close()
    assert len(list_segments(directory)) == 1


def test_one_thread_writes_while_another_one_ships(directory: Path) -> None:
    class Unsynchronised(Files):
        def fdatasync(self, descriptor: int) -> None:
            pass

    log = TelemetryLog(directory, segment_bytes=SEGMENT, files=Unsynchronised())
    events, shipped, written = make_events(0, 3000), list[StoredEvent](), threading.Event()

    def ship() -> None:
        while True:
            last = written.is_set()
            shipped.extend(ship_all(log))
            log.prepare_next()
            if last:
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        shipper = threading.Thread(target=ship)
        shipper.start()
        write_one_by_one(log, events)
    finally:
        written.set()
        shipper.join()
        sys.setswitchinterval(interval)
    assert shipped == events
    assert len(list_segments(directory)) <= 2
    log.close()
    assert list(directory.iterdir()) == []


# --- several processes -----------------------------------------------------------------------------------


def test_a_worker_leaves_the_segments_of_a_living_one_alone_and_takes_over_those_of_a_dead_one(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    other = open_log()
    log.write(make_events(0, 2))
    other.write(make_events(2, 1))
    assert read_all(other) == make_events(2, 1)
    log.close()
    assert sorted(read_all(other), key=lambda event: event.id) == make_events(0, 3)
    assert other.count() == 3
    assert len(ship_all(other)) == 3
    assert list(directory.iterdir()) == list_segments(directory)
    assert len(list_segments(directory)) == 1


def test_the_segment_of_a_living_worker_does_not_hide_a_later_one_of_a_dead_one(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    dead = open_log()
    log.write(make_events(0, 1))
    dead.write(make_events(1, 1))
    dead.close()
    assert read_all(open_log()) == make_events(1, 1)
    assert len(list_segments(directory)) == 2


def test_a_worker_whose_own_events_fill_the_batch_leaves_those_of_the_dead_to_others(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog]
) -> None:
    dead = open_log()
    dead.write(make_events(0, 1))
    dead.close()
    log.write(make_events(1, 2))
    assert log.read_batch(2).events == make_events(1, 2)
    assert read_all(open_log()) == make_events(0, 1)


def test_closed_logs_leave_no_file_open_whatever_they_met(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], tmp_path: Path
) -> None:
    living, dead = open_log(), open_log()
    living.write(make_events(0, 1))
    dead.write(make_events(1, 1))
    dead.close()
    write_one_by_one(log, make_events(2, 20))
    log.prepare_next()
    assert len(ship_all(log)) == 21
    assert list_open_files(tmp_path)
    log.close()
    living.close()
    assert list_open_files(tmp_path) == []


def test_however_many_processes_die_what_they_leave_takes_no_more_files(directory: Path) -> None:
    def open_one() -> TelemetryLog:
        return TelemetryLog(directory, max_bytes=4 * 2**16, segment_bytes=2**16)

    for number in range(30):
        log = open_one()
        log.write(make_events(number, 1))
        assert sorted(read_all(log), key=lambda event: event.id) == make_events(0, number + 1)
        log.close()
        assert len(list_segments(directory)) <= 2
    log = open_one()
    assert sorted(ship_all(log), key=lambda event: event.id) == make_events(0, 30)
    assert list(directory.iterdir()) == []


def leave_orphans(open_log: Callable[..., TelemetryLog], count: int, apart: int = 1, events: int = 1) -> None:
    """Leaves the segments of so many dead processes, all alive at once; their events are numbered `apart`."""
    dead = [open_log() for _ in range(count)]
    for number, orphan in enumerate(dead):
        orphan.write(make_events(apart * number, events))
    for orphan in dead:
        orphan.close()


def test_orphans_that_hold_much_are_not_moved(open_log: Callable[..., TelemetryLog], directory: Path) -> None:
    leave_orphans(open_log, 2, apart=10, events=4)
    before = list_segments(directory)
    assert len(read_all(open_log())) == 8
    assert list_segments(directory) == before


def test_what_orphans_hold_is_moved_to_as_many_files_as_it_takes(
    open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    leave_orphans(open_log, 16)
    log = open_log()
    assert sorted(read_all(log), key=lambda event: event.id) == make_events(0, 16)
    assert len(list_segments(directory)) == 2
    assert sorted(ship_all(log), key=lambda event: event.id) == make_events(0, 16)
    assert list_segments(directory) == []


@pytest.mark.parametrize("operation", ["create", "pwrite", "fdatasync"])
def test_orphans_that_cannot_be_moved_are_shipped_from_where_they_are(
    open_log: Callable[..., TelemetryLog], directory: Path, files: FailingFiles, operation: str
) -> None:
    leave_orphans(open_log, 3)
    files.failing[operation] = errno.EIO
    log = open_log()
    assert ship_all(log) == make_events(0, 3)
    assert list_segments(directory) == []


def test_a_damaged_orphan_whose_events_are_moved_is_set_aside(
    open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    leave_orphans(open_log, 2)
    path = list_segments(directory)[0]
    overwrite(path, 0, b"L")
    log = open_log()
    assert sorted(read_all(log), key=lambda event: event.id) == make_events(0, 2)
    assert [path.name for path in directory.glob("damaged-*")] == [f"damaged-{path.name}"]
    assert len(list_segments(directory)) == 1


def test_an_orphan_that_never_held_an_event_goes_at_once(log: TelemetryLog, directory: Path) -> None:
    directory.mkdir(parents=True)
    for number, content in enumerate((b"", b"\0" * SEGMENT, b"leadscore telemetry log 1 events-2\n")):
        (directory / f"events-{number}.log").write_bytes(content)
    assert read_all(log) == []
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(("times", "kept"), [(1, True), (4, True), (1000, False)])
def test_a_segment_somebody_took_while_it_was_being_made_is_not_written_to(
    directory: Path, times: int, kept: bool
) -> None:
    class Taken(Files):
        def create(self, path: Path) -> int:
            nonlocal times
            descriptor = super().create(path)
            if times:
                times -= 1
                path.unlink()
            return descriptor

    log = TelemetryLog(directory, segment_bytes=SEGMENT, files=Taken())
    if kept:
        log.write(make_events(0, 1))
    else:
        with pytest.raises(TelemetryUnavailableError):
            log.write(make_events(0, 1))
    assert read_all(log) == make_events(0, 1) * kept
    log.close()


def test_a_file_somebody_deleted_does_not_hold_up_the_log(log: TelemetryLog, directory: Path) -> None:
    write_one_by_one(log, make_events(0, 20))
    for path in list_segments(directory):
        path.unlink()
    assert ship_all(log) == make_events(0, 20)
    assert read_all(log) == []


def test_a_file_somebody_deleted_takes_no_more_events(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    log.write(make_events(0, 2))
    (path,) = list_segments(directory)
    path.unlink()
    with capture_logs() as lines:
        log.write(make_events(2, 1))
    told = {"event": "telemetry_segment_abandoned", "log_level": "error", "error": "FileNotFoundError"}
    assert lines == [told]
    assert len(list_segments(directory)) == 1
    # What was in it is shipped from the open file, and what was written since outlives the process.
    assert read_all(log) == make_events(0, 3)
    log.close()
    assert read_all(open_log()) == make_events(2, 1)


# --- a disk that is full, or fails -----------------------------------------------------------------------


def test_a_full_log_refuses_and_takes_events_again_once_there_is_room(
    open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    log, written = open_log(3 * SEGMENT), 0
    with pytest.raises(TelemetryUnavailableError):  # noqa: PT012 - which write fails is not the point
        for written in range(1000):
            log.write(make_events(written, 1))
    with pytest.raises(TelemetryUnavailableError):
        log.check_writable()
    assert len(list_segments(directory)) == 3
    assert log.count() == written
    assert ship_all(log) == make_events(0, written)
    log.check_writable()
    log.write(make_events(0, 1))
    assert log.count() == 1


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


def test_segments_never_take_more_room_than_the_log_may(
    open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    log = open_log(3 * SEGMENT - 1)
    with pytest.raises(TelemetryUnavailableError):
        write_one_by_one(log, make_events(0, 1000))
    assert sum(path.stat().st_size for path in list_segments(directory)) == 2 * SEGMENT


@pytest.mark.parametrize("operation", ["pwrite", "fdatasync"])
def test_a_segment_that_failed_is_never_written_to_again_and_still_read(
    log: TelemetryLog, files: FailingFiles, operation: str
) -> None:
    log.write(make_events(0, 2))
    files.calls.clear()
    files.failing[operation] = errno.EIO
    with capture_logs() as lines, pytest.raises(TelemetryUnavailableError):
        log.write(make_events(2, 1))
    assert [line["event"] for line in lines] == ["telemetry_segment_abandoned"]
    files.failing.clear()
    descriptor = files.calls[0][1]
    files.calls.clear()
    log.write(make_events(3, 1))
    assert descriptor not in {subject for _, subject in files.calls}
    assert [event.id for event in read_all(log)] == ["id-000000", "id-000001", "id-000003"]
    assert len(ship_all(log)) == 3


def test_a_segment_that_failed_is_never_written_to_again_even_if_that_cannot_be_logged(
    log: TelemetryLog, files: FailingFiles
) -> None:
    log.write(make_events(0, 1))
    files.calls.clear()
    files.failing["fdatasync"] = errno.EIO
    with broken_logging(), pytest.raises(TelemetryUnavailableError):
        log.write(make_events(1, 1))
    files.failing.clear()
    given_up = {subject for _, subject in files.calls}
    files.calls.clear()
    log.write(make_events(2, 1))
    assert given_up.isdisjoint(subject for _, subject in files.calls)


def test_an_event_the_disk_refused_once_is_kept_in_a_new_segment(
    directory: Path, open_log: Callable[..., TelemetryLog]
) -> None:
    class FailsOnce(FailingFiles):
        def fdatasync(self, descriptor: int) -> None:
            if self.failing.pop("once", None):
                raise OSError(errno.EIO, "fails once")
            super().fdatasync(descriptor)

    files = FailsOnce()
    log = TelemetryLog(directory, segment_bytes=SEGMENT, files=files)
    log.write(make_events(0, 1))
    files.failing["once"] = errno.EIO
    log.write(make_events(1, 1))
    assert read_all(log) == make_events(0, 2)
    assert len(list_segments(directory)) == 2
    log.close()
    # The refused write is in the first segment as well, and its ID makes the second copy harmless.
    assert {event.id for event in read_all(open_log())} == {"id-000000", "id-000001"}


def test_a_segment_made_ahead_whose_first_write_fails_is_given_up_too(
    log: TelemetryLog, files: FailingFiles, directory: Path
) -> None:
    log.write(make_events(0, 8))
    log.prepare_next()
    files.calls.clear()
    files.failing["pwrite"] = errno.EIO
    with pytest.raises(TelemetryUnavailableError):
        log.write(make_events(8, 1))
    files.failing.clear()
    given_up = {descriptor for _, descriptor in files.calls}
    assert len(given_up) == 2
    files.calls.clear()
    log.write(make_events(9, 1))
    assert given_up.isdisjoint(subject for _, subject in files.calls)
    assert read_all(log) == make_events(0, 8) + make_events(9, 1)
    ship_all(log)
    assert len(list_segments(directory)) == 1


@pytest.mark.parametrize("operation", ["create", "pwrite", "fdatasync", "sync_directory"])
def test_a_segment_that_could_not_be_made_leaves_nothing_behind(
    log: TelemetryLog, files: FailingFiles, directory: Path, operation: str
) -> None:
    log.write(make_events(0, 8))
    files.failing[operation] = errno.ENOSPC
    log.prepare_next()
    assert len(list_segments(directory)) == 1
    files.failing.clear()
    write_one_by_one(log, make_events(8, 12))
    assert read_all(log) == make_events(0, 20)


class NoMemory(WatchedFiles):
    """Files whose named operation finds no memory once it has been done `spared` times more."""

    def __init__(self) -> None:
        super().__init__(self._watch)
        self.operation, self.spared = "", 0

    def _watch(self, operation: str, *_: object) -> None:
        if operation == self.operation:
            self.spared -= 1
            if self.spared < 0:
                raise MemoryError


def test_a_segment_there_was_no_memory_for_leaves_nothing_behind(directory: Path, tmp_path: Path) -> None:
    files = NoMemory()
    log = TelemetryLog(directory, segment_bytes=SEGMENT, files=files)
    log.write(make_events(0, 8))
    opened = len(list_open_files(tmp_path))
    files.operation = "pwrite"
    with pytest.raises(MemoryError):
        log.prepare_next()
    files.operation = ""
    assert len(list_segments(directory)) == 1
    assert len(list_open_files(tmp_path)) == opened
    log.prepare_next()
    assert len(list_segments(directory)) == 2
    log.close()


def test_orphans_there_was_no_memory_for_are_taken_over_later(
    directory: Path, open_log: Callable[..., TelemetryLog]
) -> None:
    leave_orphans(open_log, 2)
    files = NoMemory()
    log = TelemetryLog(directory, segment_bytes=SEGMENT, files=files)
    files.operation, files.spared = "pread", 1
    with pytest.raises(MemoryError):
        log.read_batch(10)
    files.operation = ""
    assert sorted(ship_all(log), key=lambda event: event.id) == make_events(0, 2)
    assert list_segments(directory) == []
    log.close()


def test_a_segment_that_cannot_even_be_removed_is_an_orphan(
    log: TelemetryLog, files: FailingFiles, directory: Path
) -> None:
    files.failing |= {"fdatasync": errno.EIO, "unlink": errno.EIO}
    with pytest.raises(TelemetryUnavailableError):
        log.check_writable()
    files.failing.clear()
    assert len(list_segments(directory)) == 1
    assert read_all(log) == []
    assert list_segments(directory) == []


def test_a_partial_write_is_an_error(tmp_path: Path) -> None:
    class Short(bytes):
        def __len__(self) -> int:
            return super().__len__() + 1

    descriptor = Files().create(tmp_path / "file")
    with pytest.raises(OSError, match="in part"):
        Files().pwrite(descriptor, Short(b"x"), 0)
    os.close(descriptor)


def test_a_finished_segment_that_cannot_be_removed_now_is_removed_later_and_shipped_once(
    log: TelemetryLog, files: FailingFiles, directory: Path
) -> None:
    write_one_by_one(log, make_events(0, 20))
    batch = log.read_batch(100)
    files.failing["unlink"] = errno.EIO
    with pytest.raises(TelemetryUnavailableError):
        log.delete(batch)
    with pytest.raises(TelemetryUnavailableError):
        log.read_batch(100)
    files.failing.clear()
    log.delete(batch)
    assert read_all(log) == []
    assert len(list_segments(directory)) == 1


def test_an_orphan_that_cannot_be_opened_is_told_once_and_read_later(
    log: TelemetryLog, directory: Path, open_log: Callable[..., TelemetryLog]
) -> None:
    log.write(make_events(0, 1))
    log.close()
    (orphan,) = list_segments(directory)
    content = orphan.read_bytes()
    orphan.unlink()
    orphan.symlink_to("somewhere-else")
    other, before = open_log(), count_unread()
    with capture_logs() as lines:
        assert read_all(other) == []
        other.write(make_events(1, 1))
        batch = other.read_batch(10)
    assert batch.events == make_events(1, 1)
    told = {"event": "telemetry_segment_unread", "log_level": "error", "file": orphan.name, "error": "ELOOP"}
    assert lines == [told]
    assert count_unread() == before + 2
    other.delete(batch)
    orphan.unlink()
    orphan.write_bytes(content)
    assert read_all(other) == make_events(0, 1)
    assert count_unread() == before + 2


def count_unread() -> float:
    """Tells how often a file of the log could not be opened."""
    return REGISTRY.get_sample_value("leadscore_telemetry_failures_total", {"step": "adopt"}) or 0.0


def test_a_segment_that_cannot_be_read_now_does_not_hold_up_the_others(
    directory: Path, open_log: Callable[..., TelemetryLog]
) -> None:
    bad: set[int] = set()

    def fail_reading(operation: str, descriptor: object, *_: object) -> None:
        if operation == "pread" and descriptor in bad:
            raise OSError(errno.EIO, "a bad sector")

    files = WatchedFiles(fail_reading)
    log = TelemetryLog(directory, segment_bytes=SEGMENT, files=files)
    log.write(make_events(0, 8))
    assert log._current is not None
    bad.add(log._current._descriptor)
    with pytest.raises(TelemetryUnavailableError):
        log.read_batch(10)
    log.write(make_events(8, 8))
    batch = log.read_batch(10)
    assert batch.events == make_events(8, 8)
    log.delete(batch)
    bad.clear()
    assert ship_all(log) == make_events(0, 8)
    log.close()


# --- damage ----------------------------------------------------------------------------------------------


def leave_segment(open_log: Callable[..., TelemetryLog], directory: Path, events: list[StoredEvent]) -> Path:
    """Leaves the segment of a dead process."""
    log = open_log()
    log.write(events)
    log.close()
    (path,) = list_segments(directory)
    return path


def overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def test_a_file_that_is_no_segment_is_set_aside(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    path = leave_segment(open_log, directory, make_events(0, 1))
    path.write_bytes(b"no segment at all" * 100)
    log.write(make_events(1, 1))
    with capture_logs() as lines:
        assert ship_all(log) == make_events(1, 1)
        write_one_by_one(log, make_events(2, 30))
        assert ship_all(log) == make_events(2, 30)
    told = {"event": "telemetry_segment_set_aside", "log_level": "error", "file": path.name}
    assert lines == [told]
    assert [path.name for path in directory.glob("damaged-*")] == [f"damaged-{path.name}"]
    assert ship_all(log) == []


def test_a_file_whose_first_line_is_damaged_is_set_aside_and_its_events_are_shipped(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    path = leave_segment(open_log, directory, make_events(0, 3))
    overwrite(path, 0, b"L")
    assert ship_all(log) == make_events(0, 3)
    assert [path.name for path in directory.iterdir()] == [f"damaged-{path.name}"]


@pytest.mark.parametrize("damage", [os.urandom(512), bytes(512)], ids=["noise", "zeros"])
def test_what_is_readable_on_both_sides_of_the_damage_is_kept(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], directory: Path, damage: bytes
) -> None:
    events = make_events(0, 400)
    path = leave_segment(open_log, directory, events)
    overwrite(path, path.stat().st_size // 2 // 512 * 512, damage)
    kept = ship_all(log)
    assert set(kept) < set(events)
    assert len(kept) >= 396
    assert kept == sorted(kept, key=lambda event: event.id)
    assert len(list(directory.glob("damaged-*"))) == 1
    assert list_segments(directory) == []


def test_the_rest_of_an_interrupted_write_is_set_aside_with_its_file(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    path = leave_segment(open_log, directory, make_events(0, 3))
    overwrite(path, path.read_bytes().rindex(b"\xf5\xfeEV") + 100, bytes(1000))
    assert ship_all(log) == make_events(0, 2)
    assert len(list(directory.glob("damaged-*"))) == 1


def test_a_record_is_good_in_its_own_place_only(
    log: TelemetryLog, open_log: Callable[..., TelemetryLog], directory: Path
) -> None:
    path = leave_segment(open_log, directory, make_events(0, 1))
    content = path.read_bytes()
    start = content.index(b"\xf5\xfeEV")
    record = content[start:].rstrip(b"\0")
    overwrite(path, 2000, record)
    path.with_name("events-other.log").write_bytes(content)
    assert ship_all(log) == make_events(0, 1)
    assert len(list(directory.glob("damaged-*"))) == 2


def test_a_record_this_version_does_not_understand_is_not_thrown_away(
    log: TelemetryLog, directory: Path
) -> None:
    log.write(make_events(0, 1))
    assert log._current is not None
    log._current.append([b'{"of": "another version"}'])
    assert read_all(log) == make_events(0, 1)
    log.delete(log.read_batch(10))
    assert log.count() == 0
    log.close()
    assert len(list(directory.glob("damaged-*"))) == 1


def test_damage_under_a_living_log_costs_what_it_hit(log: TelemetryLog, directory: Path) -> None:
    log.write(make_events(0, 3))
    (path,) = list_segments(directory)
    content = path.read_bytes()
    overwrite(path, content.index(b"req-1"), b"REQ-1")
    assert ship_all(log) == [make_events(0, 3)[0], make_events(0, 3)[2]]
    write_one_by_one(log, make_events(3, 20))
    overwrite(path, 0, bytes(SEGMENT))
    ship_all(log)
    assert log.count() == 0
    assert len(list(directory.glob("damaged-*"))) == 1


def test_no_damage_keeps_the_log_from_starting_or_lets_a_false_event_out(tmp_path: Path) -> None:
    """One flipped bit at, and the file cut off at, every place in turn."""
    events = make_events(0, 4)
    origin = TelemetryLog(tmp_path, segment_bytes=1536)
    origin.write(events)
    origin.close()
    (path,) = list_segments(tmp_path)
    pristine = path.read_bytes()
    starts = [mark.start() for mark in re.finditer(b"\xf5\xfeEV", pristine)]
    ends = [*starts[1:], len(pristine.rstrip(b"\0"))]
    records = list(zip(events, map(range, starts, ends), strict=True))
    rng = random.Random(1)  # noqa: S311 - a repeatable choice of bits
    for place in range(len(pristine)):
        flipped = bytes([pristine[place] ^ 1 << rng.randrange(8)])
        path.write_bytes(pristine[:place] + flipped + pristine[place + 1 :])
        assert ship_damaged(tmp_path) == ([event for event, where in records if place not in where], 1), place
        path.write_bytes(pristine[:place])
        whole = [event for event, where in records if where.stop <= place]
        begun = 0 < place < starts[0] or any(place in where and place > where.start for _, where in records)
        assert ship_damaged(tmp_path) == (whole, int(begun)), place


def ship_damaged(directory: Path) -> tuple[list[StoredEvent], int]:
    """Returns the events of a log, and how many files were set aside, which the log lines say too."""
    log = TelemetryLog(directory, segment_bytes=1536)
    with capture_logs() as lines:
        kept = ship_all(log)
    log.close()
    aside = [left for left in directory.iterdir() if left.name.startswith("damaged-")]
    assert [line["event"] for line in lines] == ["telemetry_segment_set_aside"] * len(aside)
    for left in directory.iterdir():
        left.unlink()
    return kept, len(aside)
