"""What several workers share: the modules of the application, imported once in the process they fork from.

That process does nothing else: it has no event loop, no thread, no connection and no model.
"""

import gc
import os
import signal
from pathlib import Path

import app.main  # noqa: F401
from app import own_memory

own_memory.close_to_others()  # a program of its own until here, whatever `serve` has closed

# It ends with the supervisor. If SIGTERM, sent to all processes at once, ended it before, the supervisor
# would take the workers for dead while they drain.
signal.signal(signal.SIGTERM, signal.SIG_IGN)

# Looking for garbage writes to every object it looks at, and a page that is written to is shared no longer.
gc.collect()
gc.freeze()

# To whoever adds up the workers' metrics, this process would be one that never has a model.
for _counts in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob(f"*_{os.getpid()}.db"):
    _counts.unlink()
