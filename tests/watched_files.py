"""File operations of the telemetry log that somebody watches, and may make fail."""

from collections.abc import Callable
from pathlib import Path

from app.ai.telemetry_segment import Files


class WatchedFiles(Files):
    """Real operations; `before(name, *arguments)` hears of each first, and what it raises is what happens."""

    def __init__(self, before: Callable[..., None]) -> None:
        self._before = before

    def make_directory(self, path: Path) -> None:
        self._before("make_directory", path)
        super().make_directory(path)

    def sync_directory(self, path: Path) -> None:
        self._before("sync_directory", path)
        super().sync_directory(path)

    def create(self, path: Path) -> int:
        self._before("create", path)
        return super().create(path)

    def pread(self, descriptor: int, size: int, position: int) -> bytes:
        self._before("pread", descriptor, size, position)
        return super().pread(descriptor, size, position)

    def pwrite(self, descriptor: int, content: bytes, position: int) -> None:
        self._before("pwrite", descriptor, content, position)
        super().pwrite(descriptor, content, position)

    def fdatasync(self, descriptor: int) -> None:
        self._before("fdatasync", descriptor)
        super().fdatasync(descriptor)

    def count_names(self, descriptor: int) -> int:
        self._before("count_names", descriptor)
        return super().count_names(descriptor)

    def rename(self, path: Path, target: Path) -> None:
        self._before("rename", path, target)
        super().rename(path, target)

    def unlink(self, path: Path) -> None:
        self._before("unlink", path)
        super().unlink(path)
