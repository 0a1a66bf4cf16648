"""How long a batch of 100 leads takes with its receipts and without, over HTTP, from the demo CRM.

python bench/reasons.py [REQUESTS]
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEADS = 100


@contextmanager
def started(var_dir: str) -> Iterator[str]:
    """Yields where a service listens that computes every answer."""
    with subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve"],
        cwd=ROOT,
        env={**os.environ, "VAR_DIR": var_dir, "PORT": "0", "DATABASE_URL": "",
             "ML_PREDICTION_CACHE_TTL_SECONDS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        found = (re.search(r"listens on (http://\S+:\d+)", line) for line in process.stdout)
        url = next((match[1] for match in found if match), None)
        try:
            if url is None:
                raise SystemExit("the service did not start")
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def ask(url: str, query: str, first: int) -> float:
    """Asks for 100 leads and returns the milliseconds until the last byte was there."""
    body = json.dumps([f"lead_{first + number}" for number in range(LEADS)]).encode()
    request = urllib.request.Request(  # noqa: S310  the URL is our own
        f"{url}/ai/advanced-ml/predict-batch{query}", body, {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        answer = response.read()
    elapsed = (time.perf_counter() - began) * 1000
    assert len(json.loads(answer)["predictions"]) == LEADS
    return elapsed


def main() -> None:
    """Prints the first request with reasons, and the later ones beside those without."""
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as var_dir, started(var_dir) as url:
        ask(url, "", 1)
        print(f"first batch of {LEADS} with reasons: {ask(url, '?include=reasons', 1):.0f} ms")
        times = {query: [ask(url, query, 1 + LEADS * n) for n in range(requests)]
                 for query in ("", "?include=reasons")}  # fmt: skip
    for query, took in times.items():
        name = "with reasons" if query else "without"
        print(f"{name}: median {statistics.median(took):.1f} ms of {requests}, slowest {max(took):.1f} ms")


if __name__ == "__main__":
    main()
