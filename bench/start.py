"""How long the service takes from command to ready, and how much memory several workers take together.

Ready in an empty directory, and with its database there. Memory is the sum over the service's processes of
their proportional sets (Pss): a page that three of them share counts a third for each.

python -m bench.start [STARTS]
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.servers import READABLE, proportional_megabytes

ROOT = Path(__file__).parent.parent


WORKERS = (1, 2, 3)


def start(var_dir: str, workers: int = 1) -> tuple[float, float]:
    """Starts the service, waits until it says that it listens, stops it; returns seconds and Pss in MB."""
    settings = {"VAR_DIR": var_dir, "PORT": "0", "DATABASE_URL": "", "WORKERS": str(workers)}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=ROOT,
        env={**os.environ, **READABLE, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        ready = next((time.perf_counter() for line in process.stdout if "listens on" in line), None)
        megabytes = proportional_megabytes(process.pid)
        process.send_signal(signal.SIGTERM)
        if process.wait(30) != 0 or ready is None:
            raise SystemExit("the service did not start, or did not end with status 0")
    return ready - began, megabytes


def main() -> None:
    """Prints the first start and the median, fastest and slowest of the later ones."""
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as var_dir:
        first, _ = start(var_dir)
        later = sorted(start(var_dir)[0] for _ in range(starts))
        memory = {workers: start(var_dir, workers)[1] for workers in WORKERS}
    print(f"first start (database made, demo CRM filled): {first:.2f} s")
    print(f"later starts: median {statistics.median(later):.2f} s of {starts}, slowest {later[-1]:.2f} s")
    for workers, megabytes in memory.items():
        print(f"{workers} worker(s), all processes but PostgreSQL: {megabytes:.0f} MB")


if __name__ == "__main__":
    main()
