"""What a lead that has not changed costs: answered from memory, from the database, and by a bare echo.

python -m bench.warm [--singles N] [--batches N]

Three services side by side, asked in turn: the service as it runs by default, every lead in its cache;
the same without a cache; and a route of the same framework and server that returns the body it was sent. Each
of the first two has an embedded PostgreSQL and a demo CRM of its own. Loopback, one connection each.
"""

import argparse
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fastapi import FastAPI, Request, Response

ROOT = Path(__file__).parent.parent
PATH = "/ai/advanced-ml/predict-batch"
PEOPLE, WARM_UP = 10_000, 30
NAMES = ("warm", "cold", "echo")

app = FastAPI()


@app.post(PATH)
async def echo(request: Request) -> Response:
    """Answers with the body."""
    return Response(await request.body(), media_type="application/json")


def main() -> None:
    """Prints the latencies for 1 and for 2,000 leads, and what the cache is measured by."""
    parser = argparse.ArgumentParser(prog="warm", description=__doc__.partition("\n")[0])
    parser.add_argument("--singles", type=int, default=3000, help="requests of 1 lead")
    parser.add_argument("--batches", type=int, default=200, help="requests of 2,000 leads")
    asked = parser.parse_args()
    service = [sys.executable, "-m", "app.cli", "serve"]
    server = [sys.executable, "-m", "uvicorn", "bench.warm:app", "--port", "0", "--no-access-log"]
    with (
        tempfile.TemporaryDirectory(prefix="leadscore-") as folder,
        started(service, VAR_DIR=f"{folder}/warm") as warm,
        started(service, VAR_DIR=f"{folder}/cold", ML_PREDICTION_CACHE_TTL_SECONDS="0") as cold,
        started(server) as bare,
    ):
        for leads, requests in ((1, asked.singles), (2000, asked.batches)):
            times = measure((warm, cold, bare), leads, requests)
            print(f"{leads:,} lead{'s' if leads > 1 else ''}, {requests:,} requests each")
            for name, column in zip(NAMES, times.T, strict=True):
                p50, p99 = np.percentile(column, (50, 99))
                print(f"  {name:<6} p50 {p50:7.3f} ms   p99 {p99:7.3f} ms")
            warm_p50, cold_p50, echo_p50 = np.median(times, axis=0)
            print(f"  warm / echo {warm_p50 / echo_p50:.2f}   warm / cold {warm_p50 / cold_p50:.3f}")


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[socket.socket]:
    """Starts a server and yields a connection to it; stopped at the end."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": "", "PORT": "0", "LOG_LEVEL": "INFO", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = (re.search(r"(?:listens|running) on http://[^ ]*:(\d+)", line) for line in process.stdout)
            found = next(filter(None, lines), None)
            if found is None:
                raise SystemExit(f"{' '.join(command)} did not start; start it by hand to see why")
            # Whatever it logs is read by nobody, as little as by /dev/null.
            drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
            with socket.create_connection(("127.0.0.1", int(found[1]))) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield connection
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            drain.wait(30)


def measure(services: tuple[socket.socket, ...], leads: int, requests: int) -> np.ndarray:
    """Returns the wall times (requests, 3) in milliseconds; the first ones, which warm up, are left out."""
    batches = [
        json.dumps([f"lead_{person + 1}" for person in range(start, start + leads)]).encode()
        for start in range(0, min(PEOPLE, 100 * leads), leads)
    ]
    for body in batches:
        ask(services[0], body)
    times = np.empty((requests + WARM_UP, len(services)))
    for number, body in zip(range(len(times)), itertools.cycle(batches), strict=False):
        for place in np.roll(range(len(services)), number):
            times[number, place], answer = ask(services[place], body)
            if place < 2 and number >= WARM_UP:
                hits = json.loads(answer)["cache_hits"]
                if hits != (leads if place == 0 else 0):
                    times[number, place] = np.nan
    kept = times[WARM_UP:]
    lost = np.isnan(kept).any(axis=1)
    if lost.any():
        print(f"{np.count_nonzero(lost)} requests met a suspended cache and are left out", file=sys.stderr)
    return kept[~lost]


def ask(connection: socket.socket, body: bytes) -> tuple[float, bytes]:
    """Returns the milliseconds until the last byte of a good answer, and its body."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n"
    message = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
    began = time.perf_counter()
    connection.sendall(message)
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1 << 20)
    header, _, answer = received.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", header)[1])  # type: ignore[index]
    parts, size = [answer], len(answer)
    while size < length:
        parts.append(connection.recv(1 << 20))
        size += len(parts[-1])
    took = 1000 * (time.perf_counter() - began)
    if not header.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"not answered: {header[:40]!r}")
    return took, b"".join(parts)


if __name__ == "__main__":
    main()
