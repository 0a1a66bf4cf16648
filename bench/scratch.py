"""Directories for the files of a proof that nothing has to outlive."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it


@contextmanager
def open_scratch() -> Iterator[Path]:
    """Yields a new directory, in memory where the system has that, and removes it in the end."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as directory:
        yield Path(directory)
