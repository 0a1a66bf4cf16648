"""The telemetry log: events that are durable on this machine and not yet in the database.

One SQLite file for all workers (`<directory>/current/events.sqlite3`), in WAL mode with `synchronous=FULL`: a
commit that returned survives `kill -9` and a power cut. A file that turns out damaged is set aside whole,
what is readable of it is taken over, and a new one is begun. It never talks to the database and never waits
for the network. A log belongs to one thread, that of `telemetry_writer`.
"""

import fcntl
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import structlog
from uuid_utils import uuid7

from app.ai.domain import StoredEvent
from app.errors import TelemetryUnavailableError

_T = TypeVar("_T")
_Row = tuple[str, str, int]

_PAGE_BYTES = 4096
_LOCK_WAIT_SECONDS = 2.0
_SALVAGE_GROUP = 500
_PASSING = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
)
"""Failures of the disk or of the moment; any other failure of these fixed statements means a damaged file."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS events (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL, body TEXT NOT NULL, crc INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS probe (content BLOB);
"""
# One statement, one step, whatever the number of events: the sqlite3 module gives up and takes back the
# interpreter lock at every step, and under load each taking back may wait for the event loop.
_INSERT = """
    INSERT INTO events (id, body, crc)
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]')
    FROM json_each(?)
"""
_READ = """
    SELECT min(seq), max(seq), json_group_array(json_array(id, body, crc))
    FROM (SELECT seq, id, body, crc FROM events ORDER BY seq LIMIT ?)
"""
# The ID as well, because another worker may have begun a new file, and new numbers, since the batch was read.
_DELETE = "DELETE FROM events WHERE seq BETWEEN ? AND ? AND id IN (SELECT value FROM json_each(?))"
# Events are added without gaps and deleted from the oldest end, so the two ends tell their number.
_COUNT = "SELECT coalesce(max(seq) - min(seq) + 1, 0) FROM events"


class _DamageError(Exception):
    """The file is a database, but not one that holds what was written to it."""


# Text that does not decode is how the library reports a flipped bit.
_DAMAGE = (sqlite3.Error, _DamageError, msgspec.MsgspecError, UnicodeError)

_log = structlog.get_logger("app.telemetry_log")


class Batch(NamedTuple):
    """Events read from the log, and where they lie in it."""

    first: int
    last: int
    events: list[StoredEvent]


class TelemetryLog:
    """The log in `directory`; `max_bytes` bounds its file, beyond it nothing more is written.

    Nothing is opened before the first call, and whatever fails is tried again at the next one, so a log that
    could not be written recovers by itself. The methods raise `TelemetryUnavailableError` when the file
    cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int = 512 * 1024 * 1024,
        new_name: Callable[[], str] = lambda: uuid7().hex,
    ) -> None:
        self._directory = directory
        self._current = directory / "current"
        self._file = self._current / "events.sqlite3"
        self._max_pages = max_bytes // _PAGE_BYTES
        self._new_name = new_name
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._write_lock: int | None = None
        self._shipping_lock: int | None = None

    def write(self, events: Sequence[StoredEvent]) -> None:
        """Adds the events; they are durable when this returns."""
        rows = _encode_rows(events)
        self._run(lambda connection: connection.execute(_INSERT, (rows,)))

    def read_batch(self, limit: int) -> Batch:
        """Returns the oldest events, at most `limit`."""
        return self._run(lambda connection: _read_rows(connection, limit))

    def delete(self, batch: Batch) -> None:
        """Forgets events that are safe elsewhere."""
        self._run(lambda connection: _delete_rows(connection, batch))

    def count(self) -> int:
        """Tells how many events are in the log."""
        return self._run(lambda connection: int(connection.execute(_COUNT).fetchone()[0]))

    def check_writable(self) -> None:
        """Writes and takes back a page, as an event would."""
        self._run(_write_probe)

    def own_shipping(self) -> bool:
        """Becomes the one worker that ships, if no other is; the system releases it should we die."""
        try:
            if self._shipping_lock is None:
                self._shipping_lock = self._open_lock("shipping.lock")
            fcntl.flock(self._shipping_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release_shipping(self) -> None:
        """Lets another worker ship."""
        if self._shipping_lock is not None:
            with suppress(OSError):
                fcntl.flock(self._shipping_lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes the file; the next call would open it again."""
        self._disconnect()
        for descriptor in (self._write_lock, self._shipping_lock):
            if descriptor is not None:
                os.close(descriptor)
        self._write_lock = self._shipping_lock = None

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            with self._exclusive():
                try:
                    return work(self._connect())
                except _DAMAGE as exc:
                    if isinstance(exc, sqlite3.Error) and _is_passing(exc):
                        raise
                    _log.error("telemetry_log_damaged", error=type(exc).__name__)
                self._set_aside()
                return work(self._connect())
        except (*_DAMAGE, OSError) as exc:
            raise TelemetryUnavailableError from exc

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        # One lock for the writers of all workers: it waits in the kernel where SQLite would poll with growing
        # pauses, and a file that another worker set aside is noticed before anything is written to it.
        if self._write_lock is None:
            self._write_lock = self._open_lock("write.lock")
        fcntl.flock(self._write_lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._write_lock, fcntl.LOCK_UN)

    def _open_lock(self, name: str) -> int:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(self._directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity == self._identify():
            return self._connection
        self._disconnect()
        connection = self._open()
        for damaged in sorted(self._directory.glob("damaged-*")):
            self._salvage(damaged, connection)
        self._connection, self._identity = connection, self._identify()
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _identify(self) -> tuple[int, int] | None:
        try:
            status = self._file.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _open(self) -> sqlite3.Connection:
        self._current.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            self._file, timeout=_LOCK_WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA max_page_count={self._max_pages}")
            _check_structure(connection)
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        for directory in (self._current, self._directory):
            _sync_directory(directory)
        return connection

    def _set_aside(self) -> None:
        self._disconnect()
        # The directory moves as a whole: database and write-ahead log never part, whenever we are killed.
        aside = self._directory / f"damaged-{self._new_name()}"
        self._current.rename(aside)
        _sync_directory(self._directory)
        _log.error("telemetry_log_set_aside", directory=aside.name)

    def _salvage(self, damaged: Path, connection: sqlite3.Connection) -> None:
        saved = 0
        for events in _readable_events(damaged / self._file.name):
            saved += connection.execute(_INSERT, (_encode_rows(events),)).rowcount
        damaged.rename(damaged.with_name(damaged.name.replace("damaged-", "salvaged-")))
        _log.warning("telemetry_log_salvaged", directory=damaged.name, events=saved)


def _check_structure(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise _DamageError


def _read_rows(connection: sqlite3.Connection, limit: int) -> Batch:
    first, last, text = connection.execute(_READ, (limit,)).fetchone()
    rows = msgspec.json.decode(text, type=list[_Row])
    events = [event for row in rows if (event := _decode_row(row)) is not None]
    if len(events) < len(rows):
        raise _DamageError
    return Batch(first or 0, last or 0, events)


def _delete_rows(connection: sqlite3.Connection, batch: Batch) -> None:
    event_ids = msgspec.json.encode([event.id for event in batch.events]).decode()
    connection.execute(_DELETE, (batch.first, batch.last, event_ids))


def _readable_events(file: Path) -> Iterator[list[StoredEvent]]:
    seen: set[str] = set()
    # From both ends, because reading stops at the damage.
    for order in ("ASC", "DESC"):
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as source:
            cursor = source.execute(f"SELECT id, body, crc FROM events ORDER BY seq {order}")  # noqa: S608 - ours
            while rows := _fetch_some(cursor):
                events = [_decode_row(row) for row in rows if row[0] not in seen]
                yield [event for event in events if event is not None]
                seen.update(row[0] for row in rows)


def _fetch_some(cursor: sqlite3.Cursor) -> list[_Row]:
    rows: list[_Row] = []
    with suppress(sqlite3.Error):  # what precedes the damage is kept
        while len(rows) < _SALVAGE_GROUP and (row := cursor.fetchone()) is not None:
            rows.append(row)
    return rows


def _encode_rows(events: Sequence[StoredEvent]) -> str:
    bodies = [msgspec.json.encode(event) for event in events]
    rows = [(event.id, body.decode(), zlib.crc32(body)) for event, body in zip(events, bodies, strict=True)]
    return msgspec.json.encode(rows).decode()


def _decode_row(row: _Row) -> StoredEvent | None:
    # SQLite checks the structure of its pages and not what is in them, hence a checksum of our own.
    event_id, body, crc = row
    if not isinstance(body, str) or zlib.crc32(body.encode()) != crc:
        return None
    event = msgspec.json.decode(body, type=StoredEvent)
    return event if event.id == event_id else None


def _write_probe(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("INSERT INTO probe VALUES (zeroblob(?))", (_PAGE_BYTES,))
        connection.execute("DELETE FROM probe")
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def _is_passing(error: sqlite3.Error) -> bool:
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _PASSING


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
