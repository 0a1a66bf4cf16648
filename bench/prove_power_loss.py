"""No acknowledged event is lost to a power cut, wherever it hits: modelled crash states of the telemetry log.

A log with small segments writes, ships and is opened again, while its file operations are recorded. Then,
for every prefix of them, disks are drawn as a power cut might leave them (`crash_states`), a log is opened on
each, and what it ships is put beside what had been acknowledged.

python -m bench.prove_power_loss [--long] [--seed N]
"""

import itertools
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from app.ai.domain import StoredEvent
from app.ai.telemetry_log import TelemetryLog
from bench.crash_states import Disk, RecordingFiles
from bench.figures import Figure
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.scratch import open_scratch

SHORT_STATES, LONG_STATES, PLANTED_STATES = 2_000, 100_000, 1_000
STATES_A_WORK = 500
LOST = "acknowledged events lost"
SEGMENT_BYTES = 4096
STEPS = 50


@dataclass
class Found:
    """What the disks showed."""

    states: int = 0
    lost: int = 0
    false: int = 0
    left: int = 0
    events: dict[str, StoredEvent] = field(default_factory=dict)


class Work:
    """A log at work: writes groups of events, ships some, is closed and opened again."""

    def __init__(self, directory: Path, rng: random.Random, files: RecordingFiles) -> None:
        self.events: dict[str, StoredEvent] = {}
        self.files = files
        self._directory, self._rng = directory, rng
        self._log = self._open()

    def run(self) -> None:
        """Takes all the steps; `files.operations` holds marks of what was acknowledged and what committed."""
        actions = (self._write, self._write, self._write, self._ship, self._prepare, self._reopen)
        for _ in range(STEPS):
            self._rng.choices(actions, weights=(4, 4, 4, 4, 3, 1))[0]()
        self._log.close()

    def _open(self) -> TelemetryLog:
        return TelemetryLog(self._directory, segment_bytes=SEGMENT_BYTES, files=self.files)

    def _write(self) -> None:
        events = [self._make_event() for _ in range(self._rng.choice((1, 1, 1, 2, 5)))]
        self._log.write(events)
        self.files.operations.append(("acknowledged", [event.id for event in events]))

    def _make_event(self) -> StoredEvent:
        number = len(self.events)
        meta = "x" * self._rng.randrange(20, 900)
        event = StoredEvent(f"event-{number}", "ml.prediction.success", meta, None, "2026-01-01T00:00:00Z")
        self.events[event.id] = event
        return event

    def _ship(self) -> None:
        batch = self._log.read_batch(self._rng.randrange(1, 12))
        self._commit(batch.events)
        self._log.delete(batch)

    def _commit(self, events: Sequence[StoredEvent]) -> None:
        self.files.operations.append(("committed", [event.id for event in events]))

    def _prepare(self) -> None:
        self._log.prepare_next()

    def _reopen(self) -> None:
        self._log.close()
        self._log = self._open()


class FilesWithoutDatasync(RecordingFiles):
    """Planted bug: what is written is acknowledged before it is durable."""

    def fdatasync(self, descriptor: int) -> None:
        """Does nothing."""


class FilesWithoutDirectorySync(RecordingFiles):
    """Planted bug: a file is durable, its name is not."""

    def sync_directory(self, path: Path) -> None:
        """Does nothing."""


class WorkThatDeletesFirst(Work):
    """Planted bug: events leave the log before the database has them."""

    def _ship(self) -> None:
        batch = self._log.read_batch(100)
        self._log.delete(batch)
        self._commit(batch.events)


def measure(
    run: ProofRun,
    states: int | None = None,
    make_files: Callable[[], RecordingFiles] = RecordingFiles,
    kind: type[Work] = Work,
) -> list[Figure]:
    """Draws the states, a few hundred works' worth in the long run, and counts what is wrong."""
    wanted = states or (LONG_STATES if run.long else SHORT_STATES)
    rng, found = random.Random(run.seed), Found()  # noqa: S311 - repeatable
    while found.states < wanted:
        with open_scratch() as directory:
            work = kind(directory / "work" / "telemetry", rng, make_files())
            work.run()
            _crash_everywhere(work, directory, rng, min(wanted - found.states, STATES_A_WORK), found)
    return [
        Figure("crash states tried", found.states, wanted, at_least=True, unit=""),
        Figure(LOST, found.lost, 0, unit=""),
        Figure("events that were never written as they are read", found.false, 0, unit=""),
        Figure("events left in the log after all were shipped", found.left, 0, unit=""),
    ]


def _crash_everywhere(work: Work, root: Path, rng: random.Random, states: int, found: Found) -> None:
    operations = work.files.operations
    each = math.ceil(states / (len(operations) + 1))
    disk, owed, kept = Disk(root), set[str](), set[str]()
    for operation in itertools.chain([("begin", None)], operations):
        if operation[0] == "acknowledged":
            owed.update(operation[1])
        elif operation[0] == "committed":
            kept.update(operation[1])
        else:
            disk.apply(operation)
        for share in _shares(each, rng):
            shutil.rmtree(root / "work", ignore_errors=True)
            _lay_out(disk.draw(rng, share))
            _recover(root / "work" / "telemetry", work.events, owed - kept, found)


def _shares(count: int, rng: random.Random) -> Iterator[float]:
    """Nothing spared, everything spared, and then something in between."""
    yield from itertools.islice(itertools.chain((0.0, 1.0), iter(rng.random, None)), count)


def _lay_out(entries: dict[Path, bytes | None]) -> None:
    for path, content in entries.items():
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)


def _recover(directory: Path, written: dict[str, StoredEvent], owed: set[str], found: Found) -> None:
    log, shipped = TelemetryLog(directory, segment_bytes=SEGMENT_BYTES), dict[str, StoredEvent]()
    while (batch := log.read_batch(7)).events:
        shipped |= {event.id: event for event in batch.events}
        log.delete(batch)
    found.left += log.count()
    log.close()
    found.left += len(list(directory.glob("events-*")))
    found.states += 1
    found.lost += len(owed - shipped.keys())
    found.false += sum(written.get(name) != event for name, event in shipped.items())


PLANTED_BUGS = {
    "acknowledged before fdatasync": PlantedBug(
        lambda run: measure(run, PLANTED_STATES, FilesWithoutDatasync), LOST
    ),
    "a new file used before its name is durable": PlantedBug(
        lambda run: measure(run, PLANTED_STATES, FilesWithoutDirectorySync), LOST
    ),
    "deleted before the database committed": PlantedBug(
        lambda run: measure(run, PLANTED_STATES, kind=WorkThatDeletesFirst), LOST
    ),
}

if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    run_proof("No acknowledged event is lost to a power cut.", measure, PLANTED_BUGS)
