"""What a disk may hold after a power cut, given the operations on files that came before it.

`RecordingFiles` writes down what the telemetry log does; `Disk` replays that, one operation after another,
and draws what could be left if the power went now. The model is harsher than the file systems the service
runs on: of what was not synchronised each sector of 512 bytes and each change of a name is there or not, in
any combination. What was synchronised is there; a sector is never half old and half new.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.watched_files import WatchedFiles

_SECTOR = 512

Operation = tuple[Any, ...]
"""The operation's name and arguments; a file is named by the path it was created with."""


class RecordingFiles(WatchedFiles):
    """Real operations that are written down in `operations`, which others may add marks to."""

    def __init__(self) -> None:
        super().__init__(self._record)
        self.operations: list[Operation] = []
        self._created: dict[int, Path] = {}

    def _record(self, operation: str, subject: Path | int, *arguments: Any) -> None:
        if operation not in ("pread", "count_names"):  # they change nothing
            file = self._created[subject] if isinstance(subject, int) else subject
            self.operations.append((operation, file, *arguments))

    def create(self, path: Path) -> int:
        """Remembers under which name a descriptor was made."""
        descriptor = super().create(path)
        self._created[descriptor] = path
        return descriptor


@dataclass
class Disk:
    """A disk: what is on it for good, and what may or may not be yet."""

    root: Path
    names: dict[Path, Path | None] = field(default_factory=dict)
    """Durable names and the files they mean; None for a directory."""
    contents: dict[Path, bytes] = field(default_factory=dict)
    name_changes: list[Operation] = field(default_factory=list)
    sectors: list[tuple[Path, int, bytes]] = field(default_factory=list)

    def apply(self, operation: Operation) -> None:
        """Does one more operation."""
        name, subject, *arguments = operation
        if name in ("make_directory", "create", "rename", "unlink"):
            self.name_changes.append(operation)
        elif name == "sync_directory":
            synced = [change for change in self.name_changes if change[1].parent == subject]
            self.names = _change_names(self.names, synced)
            self.name_changes = [change for change in self.name_changes if change[1].parent != subject]
        elif name == "pwrite":
            self.sectors += [(subject, *part) for part in _split(*arguments)]
        elif name == "fdatasync":
            self.contents = _write(self.contents, [part for part in self.sectors if part[0] == subject])
            self.sectors = [part for part in self.sectors if part[0] != subject]

    def draw(self, rng: random.Random, share: float) -> dict[Path, bytes | None]:
        """Returns what is found after a cut that spared a `share` of what could be lost.

        That is names and their contents, None for a directory, each after the directory it is in.
        """
        spared = [change for change in self.name_changes if rng.random() < share]
        contents = _write(self.contents, [part for part in self.sectors if rng.random() < share])
        names = _change_names(self.names, spared)
        return {
            path: None if file is None else contents.get(file, b"")
            for path, file in sorted(names.items())
            if all(parent in names for parent in path.parents if self.root in parent.parents)
        }


def _change_names(names: dict[Path, Path | None], changes: Sequence[Operation]) -> dict[Path, Path | None]:
    names = dict(names)
    for name, path, *arguments in changes:
        if name == "create":
            names[path] = path
        elif name == "make_directory":
            names[path] = None
        elif path in names:  # otherwise it was created by a change that is lost
            file = names.pop(path)
            if name == "rename":
                names[arguments[0]] = file
    return names


def _split(content: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    while content:
        length = _SECTOR - position % _SECTOR
        yield position, content[:length]
        position, content = position + length, content[length:]


def _write(contents: dict[Path, bytes], parts: Sequence[tuple[Path, int, bytes]]) -> dict[Path, bytes]:
    contents = dict(contents)
    for file, position, part in parts:
        old = contents.get(file, b"").ljust(position, b"\0")
        contents[file] = old[:position] + part + old[position + len(part) :]
    return contents
