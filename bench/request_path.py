"""Whether scoring got slower: an older state of the code and this one, side by side, request by request.

python -m bench.request_path [--baseline REF] [--singles N] [--batches N]

Both services get the model that the older one shipped, a demo CRM of their own, and no prediction cache.
Every request goes to both of them, in turn first to one and first to the other, so whatever else the machine
does slows both. What it does not even out is luck at the start: two services of the same code may differ by
several per cent on a busy machine, and `--baseline HEAD` tells by how much. Loopback only; each service is
stopped by its own process.
"""

import argparse
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.figures import count

ROOT = Path(__file__).parent.parent
BASELINE = "9713f6a"
"""The last commit before intervals, receipts and verdicts by evidence came into the request path."""
PATH = "/ai/advanced-ml/predict-batch"
PEOPLE, WARM_UP = 10_000, 30
NAMES = ("baseline", "current")


def main() -> None:
    """Prints both latencies and their ratio, for 1 and for 2,000 leads."""
    parser = argparse.ArgumentParser(prog="request_path", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--baseline", default=BASELINE, metavar="REF", help="the older state, any name git knows"
    )
    parser.add_argument("--singles", type=int, default=2000, help="requests of 1 lead")
    parser.add_argument("--batches", type=int, default=200, help="requests of 2,000 leads")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="leadscore-") as folder:
        older = check_out(asked.baseline, Path(folder, "baseline"))
        build_loops(older)
        with (
            started(older, older, Path(folder, "var-baseline")) as first,
            started(ROOT, older, Path(folder, "var-current")) as second,
        ):
            for leads, requests in ((1, asked.singles), (2000, asked.batches)):
                report(leads, measure((first, second), leads, requests), asked.baseline)


def check_out(ref: str, folder: Path) -> Path:
    """Writes the files of a commit to a folder, writable by nobody else, as the registry asks of models."""
    archive = subprocess.run(
        ["git", "-c", "tar.umask=022", "archive", ref], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(f"git has no {ref} here: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="tar")
    return folder


def build_loops(code: Path) -> None:
    """Compiles the scoring loops of a commit, without which it would score by other means, if it has any."""
    if (code / "setup.py").exists():
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=code, check=True)
        if not list((code / "app" / "ai").glob("*.so")):
            raise SystemExit("the scoring loops of the baseline could not be compiled; see above")


@contextmanager
def started(code: Path, models_of: Path, var_dir: Path) -> Iterator[http.client.HTTPConnection]:
    """Starts the service out of this code and yields a connection to it; stopped at the end."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(code),  # of what it starts nothing looks in the current directory
        "VAR_DIR": str(var_dir),
        "ML_MODEL_DIR": str(models_of / "models"),
        "ML_PREDICTION_CACHE_TTL_SECONDS": "0",
        "DATABASE_URL": "",
        "PORT": "0",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=code,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            ports = (re.search(r"listens on http://[^ ]*:(\d+)", line) for line in process.stdout)
            found = next(filter(None, ports), None)
            if found is None:
                raise SystemExit(f"the service in {code} did not start; start it by hand to see why")
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
            yield connection
            connection.close()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def measure(services: Sequence[http.client.HTTPConnection], leads: int, requests: int) -> np.ndarray:
    """Returns the wall times (requests, 2) in milliseconds; the first ones, which warm up, are left out."""
    random = np.random.default_rng(leads)
    times = np.empty((requests + WARM_UP, len(services)))
    for number in range(len(times)):
        picked = random.choice(PEOPLE, leads, replace=False) + 1
        body = json.dumps([f"lead_{person}" for person in picked])
        for place in (0, 1) if number % 2 else (1, 0):
            times[number, place] = ask(services[place], body, leads)
        if sys.stderr.isatty():
            print(f"\r{leads:,} leads: {number + 1} of {len(times)}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return times[WARM_UP:]


def ask(service: http.client.HTTPConnection, body: str, leads: int) -> float:
    """Returns the milliseconds until the last byte of a good answer."""
    began = time.perf_counter()
    service.request("POST", PATH, body, {"Content-Type": "application/json"})
    answer = service.getresponse()
    data = answer.read()
    took = 1000 * (time.perf_counter() - began)
    if answer.status != 200 or json.loads(data)["successful_predictions"] != leads:
        raise SystemExit(f"not every lead was answered: status {answer.status}")
    return took


def report(leads: int, times: np.ndarray, ref: str) -> None:
    """Prints the latencies and their ratio, with the 95 % bootstrap interval over the paired requests."""
    print(f"{count(leads, 'lead')}, {len(times):,} requests each")
    for place, name in enumerate((f"{NAMES[0]} ({ref})", NAMES[1])):
        p50, p99 = np.percentile(times[:, place], (50, 99))
        print(f"  {name:<24} p50 {p50:7.2f} ms   p99 {p99:7.2f} ms")
    drawn = np.random.default_rng(0).integers(0, len(times), (1000, len(times)))
    for percentile in (50, 99):
        older, newer = np.percentile(times, percentile, axis=0)
        resampled = np.percentile(times[drawn], percentile, axis=1)
        low, high = np.quantile(resampled[:, 1] / resampled[:, 0], (0.025, 0.975))
        print(
            f"  current / baseline       p{percentile} {newer / older:.3f}  (95 %: {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
