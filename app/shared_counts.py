"""Where several workers count together: a directory of files that prometheus_client maps.

They belong in memory. A mapped page that a full disk has no block for ends whoever writes to it (SIGBUS):
every worker, and those that replace them. Called by `serve`, which owns the directory, before any worker is
started.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY = Path("/dev/shm")  # noqa: S108 - what is made there is its owner's alone, under a name nobody can know
_PREFIX = "leadscore-counts-"


@contextmanager
def open_shared_counts(
    var_dir: Path, *, memory: Path = MEMORY, room_bytes: int = 16 * 1024 * 1024
) -> Iterator[Path]:
    """Yields a new directory and removes it in the end, as it does those that killed services have left.

    It is in `memory`, a memory file system, if that has room for what many workers count; else in `var_dir`.
    """
    place = memory if _has_room(memory, room_bytes) else var_dir
    place.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(place)
    made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place))
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # Locked before it has the name by which others look for what is abandoned. Processes may not see each
    # other that share a memory file system, so their numbers would not tell who lives.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    path = made.rename(place / made.name.removeprefix("."))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _has_room(memory: Path, room_bytes: int) -> bool:
    return os.access(memory, os.W_OK | os.X_OK) and shutil.disk_usage(memory).free >= room_bytes


def _remove_abandoned(place: Path) -> None:
    for path in place.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # a living service has it, or it is not ours
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)
