"""The process that deserialises artifacts: it reads one, says what is in it, and ends.

scikit-learn takes a second to import and 100 MB to keep, and a service that has the arrays of a model needs
neither. What a crafted artifact could do it would do in a process that has no connection and is told none of
the service's settings; `own_memory` keeps it from reading them in the service. What it runs is
`artifact_loading`; what it answers is understood by `loaded_model`. Imports nothing that takes time, so that
it can be started before anything else is.
"""

import os
import signal
import subprocess
import sys

from app.errors import ArtifactError

DEADLINE_SECONDS = 60.0

# Nothing it makes is garbage before it ends, and looking for some would take a tenth of its time. Nearly as
# much would go to pytest, which scikit-learn imports where it is installed.
_PROGRAM = """
import gc, sys
gc.disable()
sys.modules["pytest"] = None
from app.ai.artifact_loading import main
main()
"""
_COMMAND = (sys.executable, "-P", "-c", _PROGRAM)  # else what lies in the current directory is imported first
TOLD = (
    *("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV"),
)
"""All that a program is told of its surroundings which is to know none of the settings."""

_waiting: "list[subprocess.Popen[bytes]]" = []
_reading: "set[subprocess.Popen[bytes]]" = set()


def prepare() -> None:
    """Starts the process that will read the next artifact: it imports its libraries beside the caller."""
    _waiting.append(_start())


def dismiss() -> None:
    """Ends a process that was prepared and is not needed."""
    while _waiting:
        with _waiting.pop() as process:
            process.kill()


def interrupt() -> None:
    """Ends the processes that read an artifact at the moment; whoever asked is told `not_loadable`."""
    for process in tuple(_reading):
        process.kill()


def ask(question: bytes) -> bytes:
    """Returns what `artifact_loading.answer` says to a question, in another process; blocks.

    Raises:
        ArtifactError: `not_loadable`: the process broke off, or took too long.
    """
    with _waiting.pop() if _waiting else _start() as process:
        _reading.add(process)
        try:
            answer, _ = process.communicate(question, DEADLINE_SECONDS)
        except subprocess.TimeoutExpired as exc:
            process.kill()
            raise ArtifactError("not_loadable", "Reading the artifact took too long.") from TimeoutError(exc)
        except BaseException:
            process.kill()
            raise
        finally:
            _reading.remove(process)
    if process.returncode:
        # Killed for want of memory, as likely as not, which is not the artifact's fault.
        passing = ChildProcessError() if process.returncode == -signal.SIGKILL else None
        raise ArtifactError(
            "not_loadable", f"The process that read the artifact ended with {process.returncode}."
        ) from passing
    return answer


def _start() -> "subprocess.Popen[bytes]":
    kept = {name: os.environ[name] for name in TOLD if name in os.environ}
    return subprocess.Popen(  # noqa: S603
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for the service, which ends it
    )
