"""The telemetry log: events that are durable on this machine and not yet in the database.

Every process writes segments of its own in one directory (`telemetry_segment` has their format) and holds a
lock on each; a segment nobody holds belonged to a process that died, and whoever finds it ships it. A segment
goes when all its events are in the database, or in another segment; one that holds anything unreadable is
renamed `damaged-*` instead. The log never talks to the database and never waits for the network.

`write` and `check_writable` are called by one thread at a time, whichever it is, and so are the other
methods; the two kinds may run at the same time.
"""

import errno
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog
from uuid_utils import uuid7

from app.ai.domain import StoredEvent
from app.ai.telemetry_segment import Files, Segment, count_bytes
from app.errors import TelemetryUnavailableError
from app.metrics import TELEMETRY_FAILURES

_NAMES = "events-*.log"
_ATTEMPTS = 5

_encode = msgspec.json.Encoder().encode
_log = structlog.get_logger()


class Batch(NamedTuple):
    """Events read from the log, and how far that got in each segment."""

    events: list[StoredEvent]
    reached: list[tuple[Segment, int]]


class TelemetryLog:
    """The log in `directory`; `max_bytes` bounds it for all processes, beyond it nothing more is written.

    Nothing is opened before the first call, and whatever fails is tried again at the next one, so a log that
    could not be written recovers by itself. The methods raise `TelemetryUnavailableError` when the disk
    fails them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int = 512 * 1024 * 1024,
        segment_bytes: int = 4 * 1024 * 1024,
        new_name: Callable[[], str] = lambda: uuid7().hex,
        files: Files | None = None,
    ) -> None:
        self._directory = directory
        self._max_segments = max_bytes // segment_bytes
        self._segment_bytes = segment_bytes
        self._new_name = new_name
        self._files = files or Files()
        self._segments: list[Segment] = []
        self._current: Segment | None = None
        self._prepared: list[Segment] = []
        self._unread: set[str] = set()

    def write(self, events: Sequence[StoredEvent]) -> None:
        """Adds the events; they are durable when this returns."""
        try:
            self._write([_encode(event) for event in events])
        except OSError as exc:
            raise TelemetryUnavailableError from exc

    def check_writable(self) -> None:
        """Makes sure that there is a segment to write to: making one writes and synchronises all of it."""
        try:
            if self._current is None:
                self._begin_segment()
        except OSError as exc:
            raise TelemetryUnavailableError from exc

    def prepare_next(self) -> None:
        """Makes the next segment once half of the current one is used, lest a request wait for that."""
        current = self._current
        if current is None or self._prepared or current.free > self._segment_bytes // 2:
            return
        with suppress(OSError):  # whoever needs it makes it, or is told
            self._prepared.append(self._create_segment())

    def read_batch(self, limit: int) -> Batch:
        """Returns the oldest events of each segment, at most `limit` in all.

        When the segments in hand do not fill the batch, what dead processes left is taken over as well; a
        file that cannot be opened is told of, and tried again each time. What cannot be read now of the
        segments in hand is read later; that is an error only while there is nothing else to return.
        """
        failures: list[OSError] = []
        batch = self._read(limit, failures)
        if len(batch.events) < limit and self._adopt_orphans(failures):
            batch = self._read(limit, failures)
        if failures and not batch.events:
            raise TelemetryUnavailableError from failures[0]
        return batch

    def delete(self, batch: Batch) -> None:
        """Forgets events that are safe elsewhere."""
        for segment, reached in batch.reached:
            segment.forget(reached)
        try:
            self._remove_finished()
        except OSError as exc:
            raise TelemetryUnavailableError from exc

    def count(self) -> int:
        """Tells how many events are in the segments in hand."""
        return sum(segment.pending for segment in list(self._segments))

    def close(self) -> None:
        """Closes the files, and removes those nothing is left in; the next call would begin anew."""
        self._current = None
        self._segments += self._prepared
        self._prepared.clear()
        with suppress(OSError):  # the next run removes them
            self._remove_finished()
        for segment in self._segments:
            segment.close()
        self._segments.clear()

    def _write(self, payloads: Sequence[bytes]) -> None:
        if self._current is not None and self._current.free >= count_bytes(payloads):
            try:
                self._current.append(payloads)
            except OSError as exc:
                self._current = None  # before anything else can go wrong: it must not be written to again
                _log.error("telemetry_segment_abandoned", error=type(exc).__name__)
            else:
                return
        segment = self._begin_segment()
        try:
            segment.append(payloads)
        except OSError:
            self._current = None
            raise

    def _begin_segment(self) -> Segment:
        self._current = None
        segment = self._prepared.pop() if self._prepared else self._create_segment()
        # In this order: the thread that removes what is finished never removes the current one.
        self._current = segment
        self._segments.append(segment)
        return segment

    def _create_segment(self) -> Segment:
        for path in reversed(self._directory.parents):
            if not path.exists():
                self._files.make_directory(path)
                self._files.sync_directory(path.parent)
        self._files.make_directory(self._directory)
        # Even if it was there: another process may have made it a moment ago, and not got any further.
        self._files.sync_directory(self._directory.parent)
        if len(list(self._directory.glob(_NAMES))) >= self._max_segments:
            raise OSError(errno.EDQUOT, "the telemetry log is full")
        for _ in range(_ATTEMPTS):
            path = self._directory / f"events-{self._new_name()}.log"
            with suppress(BlockingIOError):  # somebody took it for an orphan before it was locked
                return Segment.create(self._files, path, self._segment_bytes)
        raise OSError(errno.EAGAIN, "no segment could be locked")

    def _read(self, limit: int, failures: list[OSError]) -> Batch:
        batch = Batch([], [])
        for segment in list(self._segments):
            try:
                events, reached = segment.read(limit - len(batch.events))
            except OSError as exc:
                failures.append(exc)
                continue
            if events:
                batch.events.extend(events)
                batch.reached.append((segment, reached))
            else:
                segment.forget(reached)  # nothing there, or nothing that can be read
        return batch

    def _adopt_orphans(self, failures: list[OSError]) -> bool:
        adopted = False
        for path in sorted(self._directory.glob(_NAMES)):
            try:
                self._segments.append(Segment.adopt(self._files, path))
                adopted = True
            except (BlockingIOError, FileNotFoundError):
                continue  # a living process has it, or had
            except OSError as exc:  # no concern of the events in hand, which are shipped all the same
                self._note_unread(path.name, exc)
        if adopted:
            with suppress(OSError):  # what could not be moved stays where it is
                self._gather()
        try:
            self._remove_finished()
        except OSError as exc:
            failures.append(exc)
        return adopted

    def _note_unread(self, file: str, cause: OSError) -> None:
        TELEMETRY_FAILURES.labels("adopt").inc()
        if file not in self._unread:
            self._unread.add(file)
            _log.error("telemetry_segment_unread", file=file, error=errno.errorcode.get(cause.errno or 0))

    def _gather(self) -> None:
        """Moves the events of files that hold few into one file, the others being finished by that.

        Every process that dies leaves such a file, and as many as the log may have are soon left while the
        database is away.
        """
        few = [
            segment
            for segment in list(self._segments)
            if segment is not self._current and 0 < segment.pending_bytes <= self._segment_bytes // 4
        ]
        if len(few) < 2:
            return
        target: Segment | None = None
        for segment in few:
            events, reached = segment.read(segment.pending)
            payloads = [_encode(event) for event in events]
            if target is None or target.free < count_bytes(payloads):
                target = self._create_segment()
                self._segments.append(target)
            target.append(payloads)
            # In this order: for a moment both have them, and their IDs make the second copies harmless.
            segment.forget(reached)

    def _remove_finished(self) -> None:
        for segment in list(self._segments):
            if segment is self._current or segment.pending:
                continue
            segment.remove()
            self._segments.remove(segment)
            if segment.damaged:
                _log.error("telemetry_segment_set_aside", file=segment.name)
