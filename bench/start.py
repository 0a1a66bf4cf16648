"""How long the service takes from command to ready: in an empty directory, and with its database there.

python bench/start.py [STARTS]
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def seconds_to_ready(var_dir: str) -> float:
    """Starts the service, waits until it says that it listens, stops it."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=ROOT,
        env={**os.environ, "VAR_DIR": var_dir, "PORT": "0", "DATABASE_URL": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        ready = next((time.perf_counter() for line in process.stdout if "listens on" in line), None)
        process.send_signal(signal.SIGTERM)
        if process.wait(30) != 0 or ready is None:
            raise SystemExit("the service did not start, or did not end with status 0")
    return ready - began


def main() -> None:
    """Prints the first start and the median, fastest and slowest of the later ones."""
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as var_dir:
        first = seconds_to_ready(var_dir)
        later = sorted(seconds_to_ready(var_dir) for _ in range(starts))
    print(f"first start (database made, demo CRM filled): {first:.2f} s")
    print(f"later starts: median {statistics.median(later):.2f} s of {starts}, slowest {later[-1]:.2f} s")


if __name__ == "__main__":
    main()
