"""One file of the telemetry log: records one after another, in space that was written before.

The file begins with a line that names its format and itself, followed by records and then zeros to its end.
A record is a mark, the length of its payload, a CRC-32 of all that identifies it (which segment, where in it,
how long, what), and the payload: one event as JSON. All of the space is written and synchronised before the
first record, so that a record changes blocks the file already has: no length and no allocation is left to
write with it, and a full disk cannot cut it short. `telemetry_log` is the only caller.
"""

import errno
import fcntl
import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec

from app.ai.domain import StoredEvent

_HEADER = "leadscore telemetry log 1 {}\n"
_MARK = b"\xf5\xfeEV"
"""Begins a record; the first two bytes occur in no UTF-8 text, so no payload contains it."""
_HEAD = struct.Struct("<4sII")
_PLACE = struct.Struct("<II")

_decode = msgspec.json.Decoder(StoredEvent).decode


class Files:
    """The operations on files that durability rests on; a subclass can record them, or make them fail."""

    def make_directory(self, path: Path) -> None:
        """Makes a directory that only its owner may read, unless it is there."""
        path.mkdir(mode=0o700, exist_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Makes the names in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def create(self, path: Path) -> int:
        """Creates a file that only its owner may read; returns its descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def pread(self, descriptor: int, size: int, position: int) -> bytes:
        """Returns `size` bytes, or fewer where the file ends."""
        return os.pread(descriptor, size, position)

    def pwrite(self, descriptor: int, content: bytes, position: int) -> None:
        """Writes all of `content`, or raises `OSError`."""
        if os.pwrite(descriptor, content, position) < len(content):
            raise OSError(errno.ENOSPC, "written in part")

    def fdatasync(self, descriptor: int) -> None:
        """Makes durable what was written."""
        os.fdatasync(descriptor)

    def count_names(self, descriptor: int) -> int:
        """Returns how many names an open file has; 0 once somebody removed it."""
        return os.fstat(descriptor).st_nlink

    def rename(self, path: Path, target: Path) -> None:
        """Gives a file another name."""
        path.rename(target)

    def unlink(self, path: Path) -> None:
        """Removes a file."""
        path.unlink()


class Segment:
    """An open segment, locked against every other process; `create` or `adopt` makes one.

    One thread may append while another one reads and forgets. Whatever touches the file raises `OSError` when
    that fails.
    """

    def __init__(self, files: Files, path: Path, descriptor: int) -> None:
        self._files = files
        self._path = path
        self._descriptor = descriptor
        self._header = _HEADER.format(path.stem).encode()
        self._seed = zlib.crc32(self._header)
        self._size: int  # of the file; whichever makes the segment tells
        self._end = len(self._header)
        self._starts = array("I")  # where each record begins
        self._shipped = 0  # how many of them are safe elsewhere
        self._damaged = False

    @classmethod
    def create(cls, files: Files, path: Path, size: int) -> Self:
        """Makes a segment of `size` bytes, durable with its name."""
        segment = cls(files, path, files.create(path))
        try:
            segment._lock()
            files.pwrite(segment._descriptor, segment._header.ljust(size, b"\0"), 0)
            files.fdatasync(segment._descriptor)
            files.sync_directory(path.parent)
        except BaseException:  # no memory for so many zeros, for one
            with suppress(OSError):
                files.unlink(path)
            segment.close()
            raise
        segment._size = size
        return segment

    @classmethod
    def adopt(cls, files: Files, path: Path) -> Self:
        """Opens what another process left; raises `BlockingIOError` while that process lives."""
        segment = cls(files, path, os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
        try:
            segment._lock()
            segment._size = os.fstat(segment._descriptor).st_size
            segment._find_records(files.pread(segment._descriptor, segment._size, 0))
        except BaseException:  # while it is open it is locked, and nobody else takes it over
            segment.close()
            raise
        return segment

    def _lock(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, another process may have taken it for an orphan, or done with it.
        if self._files.count_names(self._descriptor) == 0:
            raise BlockingIOError

    @property
    def pending(self) -> int:
        """How many events are not yet safe elsewhere."""
        return len(self._starts) - self._shipped

    @property
    def pending_bytes(self) -> int:
        """How many bytes they take in the file, with whatever is between them."""
        return self._end - self._starts[self._shipped] if self.pending else 0

    @property
    def name(self) -> str:
        """The file's name."""
        return self._path.name

    @property
    def damaged(self) -> bool:
        """Whether the file holds anything that cannot be read."""
        return self._damaged

    @property
    def free(self) -> int:
        """How many bytes of records there is room for."""
        return self._size - self._end

    def append(self, payloads: Sequence[bytes]) -> None:
        """Writes the payloads in one piece; they are durable when this returns.

        More than there is room for makes the file longer, which takes longer. After an `OSError` nothing more
        may be appended: what the system could not write it may have forgotten, and a second synchronisation
        would not tell.
        """
        records: list[bytes] = []
        starts, position = array("I"), self._end
        for payload in payloads:
            starts.append(position)
            records += (_HEAD.pack(_MARK, len(payload), self._check(position, payload)), payload)
            position += _HEAD.size + len(payload)
        self._files.pwrite(self._descriptor, b"".join(records), self._end)
        self._files.fdatasync(self._descriptor)
        if self._files.count_names(self._descriptor) == 0:
            raise FileNotFoundError(errno.ENOENT, "somebody removed the file; no other process will find it")
        # In this order, for the thread that reads.
        self._end = position
        self._starts.extend(starts)

    def read(self, limit: int) -> tuple[list[StoredEvent], int]:
        """Returns the oldest pending events, at most `limit`, and what `forget` wants to hear of them."""
        starts = self._starts[self._shipped : self._shipped + limit]
        if not starts:
            return [], self._shipped
        first, reached = starts[0], self._shipped + len(starts)
        stop = self._starts[reached] if reached < len(self._starts) else self._end
        content = self._files.pread(self._descriptor, stop - first, first)
        payloads = [self._read_record(content, first, start - first) for start in starts]
        events = [event for payload in payloads if (event := _decode_event(payload)) is not None]
        self._damaged |= len(events) < len(starts)
        return events, reached

    def forget(self, shipped: int) -> None:
        """Takes note that events are safe elsewhere."""
        self._shipped = shipped

    def remove(self) -> None:
        """Deletes the file, or renames it should a person have to look at it."""
        with suppress(FileNotFoundError):  # somebody else has removed it
            if self._damaged:
                self._files.rename(self._path, self._path.with_name(f"damaged-{self._path.name}"))
            else:
                self._files.unlink(self._path)
        self.close()

    def close(self) -> None:
        """Closes the file, and so unlocks it."""
        os.close(self._descriptor)

    def _find_records(self, content: bytes) -> None:
        # Records follow each other without gaps, and zeros follow the last one. Anything else is damage, or
        # the rest of a write that a power cut interrupted; the records on both sides of it are good.
        self._damaged = not content.startswith(self._header) and bool(content.strip(b"\0"))
        position = self._end
        while (start := content.find(_MARK, position)) >= 0:
            payload = self._read_record(content, 0, start)
            if payload is None:
                position = start + 1
                continue
            self._damaged |= start != self._end
            self._starts.append(start)
            self._end = position = start + _HEAD.size + len(payload)
        self._damaged |= bool(content[self._end :].strip(b"\0"))

    def _read_record(self, content: bytes, content_starts: int, start: int) -> bytes | None:
        if start + _HEAD.size > len(content):
            return None
        _, length, check = _HEAD.unpack_from(content, start)
        payload = content[start + _HEAD.size : start + _HEAD.size + length]
        return payload if self._check(content_starts + start, payload) == check else None

    def _check(self, position: int, payload: bytes) -> int:
        return zlib.crc32(payload, zlib.crc32(_PLACE.pack(position, len(payload)), self._seed))


def count_bytes(payloads: Sequence[bytes]) -> int:
    """Tells how much room the payloads take as records."""
    return sum(map(len, payloads)) + _HEAD.size * len(payloads)


def _decode_event(payload: bytes | None) -> StoredEvent | None:
    try:
        return None if payload is None else _decode(payload)
    except msgspec.MsgspecError:
        return None
