"""Which model versions have served here: an empty file for each, so that it outlives the process.

Several workers may record at once without a lock: files are only ever added. Never deletes one, never looks
at a model. `model_registry` refuses to go back behind the highest of them unasked.
"""

import os
import re
from pathlib import Path

from app.errors import ArtifactError

_VERSION = re.compile(r"[0-9]{8}_[0-9]{6}\Z")


class ServedVersions:
    """The versions recorded in `served_models` under `var_dir`; the first of them makes the directory."""

    def __init__(self, var_dir: Path) -> None:
        self._directory = var_dir / "served_models"

    def highest(self) -> str:
        """Returns the highest version that has served, "" if none has.

        Raises:
            ArtifactError: `served_unknown`: the directory cannot be read.
        """
        try:
            return max(filter(_VERSION.match, os.listdir(self._directory)), default="")  # noqa: PTH208  names
        except FileNotFoundError:
            return ""
        except OSError as exc:
            raise ArtifactError("served_unknown", "Which versions have served cannot be read.") from exc

    def record(self, version: str) -> None:
        """Records a version, durably when it returns; one that is recorded already costs no write.

        Raises:
            ArtifactError: `served_unknown`: it cannot be written.
        """
        try:
            if (self._directory / version).exists():
                return
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / version).touch()
            for folder in (self._directory, self._directory.parent):
                sync_directory(folder)
        except OSError as exc:
            raise ArtifactError("served_unknown", "That this version serves cannot be recorded.") from exc


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
