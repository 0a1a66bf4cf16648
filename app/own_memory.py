"""What is nobody else's: the memory of a process that serves, and the environment it was started with.

Leads and secrets are in both, and the process that reads artifacts runs as the same user. Called by `serve`,
and by `preloaded` for all workers that are forked from it.
"""

import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def close_to_others() -> None:
    """Lets no core be written and, on Linux, none but root look into this process, through /proc or ptrace.

    What it forks is closed, too; a program it starts is not. A limit on cores alone would not keep the kernel
    from piping one to a program.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
