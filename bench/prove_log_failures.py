"""No acknowledged event is lost when the disk of the telemetry log fails it, and it is used again soon.

One operation on files fails, or all from one on, with an I/O error or a full disk, for every place in turn:
telemetry records groups of events meanwhile, with a database that is there, and with one that is away. Then
the real thing: the kernel refuses to let any file grow. What was acknowledged is put beside what is in the
database in the end.

python -m bench.prove_log_failures [--long] [--seed N]
"""

import asyncio
import errno
import itertools
import logging
import os
import random
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from app.ai.domain import StoredEvent
from app.ai.events import PredictionError
from app.ai.ml_telemetry import MlTelemetry
from app.ai.telemetry_log import TelemetryLog
from app.errors import DatabaseUnavailableError, TelemetryUnavailableError
from bench.figures import Figure
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.scratch import open_scratch
from tests.watched_files import WatchedFiles

SHORT_GROUPS, LONG_GROUPS, LARGEST_GROUP = 14, 150, 3
SEGMENT_BYTES = 4096
RECOVERY_SECONDS = 1.0
EVENT = PredictionError(
    route="/ai/advanced-ml/predict-batch", status=422, trace_id=None, latency_ms=1.0,
    error_code="EMPTY_BATCH", asked=None,
)  # fmt: skip
MakeLog = Callable[[Path, WatchedFiles], TelemetryLog]


class Database:
    """A table with a primary key, which can be away."""

    def __init__(self, *, away: bool) -> None:
        self.away = away
        self.rows: dict[str, StoredEvent] = {}

    async def write_events(self, events: Sequence[StoredEvent]) -> None:
        """Writes all of them or none, and leaves those alone that are there."""
        if self.away:
            raise DatabaseUnavailableError
        for event in events:
            self.rows.setdefault(event.id, event)


class FailingDisk:
    """Fails the operations whose number, from 1, is in `places`, until it is mended; reading always works."""

    def __init__(self, places: Container[int], number: int) -> None:
        self.places = places
        self._errno = number
        self.count = 0

    def __call__(self, operation: str, *_: object) -> None:
        """Counts the operation, and fails it if that is its fate."""
        if operation == "pread":
            return
        self.count += 1
        if self.count in self.places:
            raise OSError(self._errno, os.strerror(self._errno))


@dataclass
class Tally:
    """What was found wrong, over all cases."""

    places: int = 0
    cases: int = 0
    lost: int = 0
    refused_in_vain: int = 0
    slowest: float = 0.0


@dataclass(frozen=True)
class Case:
    """How many groups of events are recorded, of which sizes (`seed`), and by which log."""

    groups: int
    seed: int
    make_log: MakeLog


def open_log(directory: Path, files: WatchedFiles) -> TelemetryLog:
    """The product's log, with segments so small that there are many."""
    return TelemetryLog(directory, segment_bytes=SEGMENT_BYTES, files=files)


class SwallowingLog(TelemetryLog):
    """Planted bug: an event that could not be written is acknowledged all the same."""

    def write(self, events: Sequence[StoredEvent]) -> None:
        """Writes the events, or not."""
        with suppress(TelemetryUnavailableError):
            super().write(events)


def open_swallowing_log(directory: Path, files: WatchedFiles) -> TelemetryLog:
    """The log with the planted bug."""
    return SwallowingLog(directory, segment_bytes=SEGMENT_BYTES, files=files)


def measure(run: ProofRun, make_log: MakeLog = open_log) -> list[Figure]:
    """Lets the disk fail in every place and way."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    tally = asyncio.run(_measure(LONG_GROUPS if run.long else SHORT_GROUPS, run.seed, make_log))
    return [
        Figure("places the disk failed in, one by one", tally.places, SHORT_GROUPS, at_least=True, unit=""),
        Figure(
            "cases: each place once and for good, two errors, database there and away",
            tally.cases,
            8 * tally.places,
            at_least=True,
            unit="",
        ),
        Figure("acknowledged events lost", tally.lost, 0, unit=""),
        Figure("requests refused while the database was there", tally.refused_in_vain, 0, unit=""),
        Figure("slowest return to the log, once there is space", tally.slowest, RECOVERY_SECONDS, unit="s"),
    ]


async def _measure(groups: int, seed: int, make_log: MakeLog) -> Tally:
    tally, undisturbed = Tally(), FailingDisk((), 0)
    await _try_disk(Case(groups, seed, make_log), undisturbed, Database(away=False), tally)
    tally.places = undisturbed.count
    for place in range(1, tally.places + 1):
        kinds = itertools.product(
            ((place,), range(place, sys.maxsize)), (errno.EIO, errno.ENOSPC), (False, True)
        )
        await asyncio.gather(
            *(
                _try_disk(
                    Case(groups, seed, make_log), FailingDisk(places, number), Database(away=away), tally
                )
                for places, number, away in kinds
            )
        )
    for away in (False, True):
        await _try_full_disk(make_log, Database(away=away), tally)
    return tally


@asynccontextmanager
async def _open(
    log: TelemetryLog, database: Database, ship_interval_seconds: float = 0.25
) -> AsyncIterator[MlTelemetry]:
    telemetry = MlTelemetry(log, database, ship_interval_seconds=ship_interval_seconds)
    await telemetry.open()
    try:
        yield telemetry
    finally:
        await telemetry.close()


async def _try_disk(case: Case, disk: FailingDisk, database: Database, tally: Tally) -> None:
    rng, answered = random.Random(case.seed), list[str]()  # noqa: S311 - repeatable
    with open_scratch() as directory:
        async with _open(case.make_log(directory, WatchedFiles(disk)), database, 0.01) as telemetry:
            for number in range(case.groups):
                names = [f"{number}-{member}" for member in range(rng.randint(1, LARGEST_GROUP))]
                answered += await _record(telemetry, names, database, tally)
            disk.places = ()
            await _seconds_until_logging(telemetry)
            database.away = False
        await _compare(directory, database, answered, tally)


async def _record(telemetry: MlTelemetry, names: list[str], database: Database, tally: Tally) -> list[str]:
    outcomes = await asyncio.gather(
        *(telemetry.record(lambda: EVENT, name) for name in names), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert all(isinstance(outcome, TelemetryUnavailableError) for outcome in refused), refused
    tally.refused_in_vain += 0 if database.away else len(refused)
    return [name for name, outcome in zip(names, outcomes, strict=True) if outcome is None]


async def _seconds_until_logging(telemetry: MlTelemetry) -> float:
    began = time.monotonic()
    while telemetry.state() in ("direct", "unavailable"):
        if time.monotonic() - began > 10 * RECOVERY_SECONDS:
            break
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def _compare(directory: Path, database: Database, answered: list[str], tally: Tally) -> None:
    """Lets the next run of the service ship what is left, and looks what is missing then."""
    async with _open(TelemetryLog(directory), database, 0.01):
        pass
    arrived = {event.request_id for event in database.rows.values()}
    tally.lost += len(set(answered) - arrived)
    tally.cases += 1


async def _try_full_disk(make_log: MakeLog, database: Database, tally: Tally) -> None:
    """The kernel lets no file grow, as on a full disk, and then does again; with the product's own pauses."""
    answered = list[str]()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_scratch() as directory:
        async with _open(make_log(directory, WatchedFiles(lambda *_: None)), database) as telemetry:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES // 2, hard))
            try:
                for number in range(100):
                    answered += await _record(telemetry, [f"full-{number}"], database, tally)
                with suppress(OSError):
                    (directory / "large").write_bytes(bytes(SEGMENT_BYTES))
                    raise AssertionError("the limit has no effect here")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            tally.slowest = max(tally.slowest, await _seconds_until_logging(telemetry))
            database.away = False
        await _compare(directory, database, answered, tally)


PLANTED_BUGS = {
    "an error of the disk is swallowed": PlantedBug(
        lambda run: measure(run, open_swallowing_log), "acknowledged events lost"
    ),
}

if __name__ == "__main__":
    run_proof(
        "No acknowledged event is lost when the telemetry log cannot be written.", measure, PLANTED_BUGS
    )
