"""What it takes to make one event durable: the log's own way beside the ways it does not go.

Four ways take turns, one event each time: a SQLite commit (WAL, `synchronous=FULL`), an append to a growing
file and fdatasync, a write into space that was written before and fdatasync, and the telemetry log itself,
which is the third way with checksums. The disk is that of the directory given.

python -m bench.durable_write [--rounds N] [DIRECTORY]
"""

import argparse
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from uuid_utils import uuid7

from app.ai.domain import StoredEvent
from app.ai.telemetry_log import TelemetryLog

EVENT = StoredEvent(str(uuid7()), "ml.prediction.success", "x" * 640, "r" * 32, "2026-01-01T00:00:00.000000Z")
SPACE = 64 * 1024 * 1024
Write = Callable[[bytes], object]


def prepare_sqlite(directory: Path) -> Write:
    """A transaction of its own for each event."""
    connection = sqlite3.connect(directory / "events.sqlite3", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, body BLOB NOT NULL)")
    return lambda body: connection.execute("INSERT INTO events (body) VALUES (?)", (body,))


def prepare_append(directory: Path) -> Write:
    """The file grows with each event."""
    descriptor = os.open(directory / "append", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(body: bytes) -> None:
        os.write(descriptor, body)
        os.fdatasync(descriptor)

    return write


def prepare_overwrite(directory: Path) -> Write:
    """The space was filled with zeros, and synchronised, before."""
    descriptor, position = os.open(directory / "overwrite", os.O_RDWR | os.O_CREAT, 0o600), 0
    os.write(descriptor, bytes(SPACE))
    os.fsync(descriptor)

    def write(body: bytes) -> None:
        nonlocal position
        os.pwrite(descriptor, body, position)
        os.fdatasync(descriptor)
        position = (position + len(body)) % (SPACE - len(body))

    return write


def prepare_log(directory: Path) -> Write:
    """The product's own log; its next segments are made while nobody waits, as the service does."""
    log = TelemetryLog(directory / "log", segment_bytes=SPACE)
    log.check_writable()
    return lambda _: log.write([EVENT])


WAYS = {
    "SQLite commit": prepare_sqlite,
    "append, fdatasync": prepare_append,
    "write into space written before, fdatasync": prepare_overwrite,
    "the telemetry log": prepare_log,
}


def measure(directory: Path, rounds: int) -> dict[str, list[float]]:
    """Returns the microseconds of each way's events; the first tenth warms up and is not among them."""
    writes = {name: prepare(directory) for name, prepare in WAYS.items()}
    body, taken = msgspec.json.encode(EVENT), {name: list[float]() for name in writes}
    for number in range(rounds + rounds // 10):
        for name, write in writes.items():
            began = time.perf_counter_ns()
            write(body)
            if number >= rounds // 10:
                taken[name].append((time.perf_counter_ns() - began) / 1000)
    return taken


def main() -> None:
    """Prints median and 99th percentile of each way."""
    parser = argparse.ArgumentParser(prog="python -m bench.durable_write", description=__doc__)
    parser.add_argument(
        "directory", nargs="?", type=Path, help="where to write; default: a temporary directory"
    )
    parser.add_argument("--rounds", type=int, default=3000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        taken = measure(Path(directory), given.rounds)
    table = Table(
        title=f"one event of {len(msgspec.json.encode(EVENT))} bytes made durable, {given.rounds} times"
    )
    for heading in ("way", "p50", "p99"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, values in taken.items():
        p99 = statistics.quantiles(values, n=100)[98]
        table.add_row(name, f"{statistics.median(values):.0f} µs", f"{p99:.0f} µs")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
