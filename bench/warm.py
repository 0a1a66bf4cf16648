"""What a lead that has not changed costs: answered from memory, from the database, and by a bare echo.

python -m bench.warm [--singles N] [--batches N]

Four services side by side, asked in turn: the service as it runs by default, every lead in its cache; the
same without events, which tells what it takes to have each on disk before its answer leaves; the same without
a cache; and a route of the same framework and server that returns the body it was sent. All but the last have
an embedded PostgreSQL and a demo CRM of their own. Loopback, one connection each.
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
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from fastapi import FastAPI, Request, Response

from bench.figures import count

ROOT = Path(__file__).parent.parent
PATH = "/ai/advanced-ml/predict-batch"
PEOPLE, WARM_UP = 10_000, 30
SERVICES = {"warm": {}, "warm, no events": {"AI_TELEMETRY_ENABLED": "false"},
            "cold": {"ML_PREDICTION_CACHE_TTL_SECONDS": "0"}}  # fmt: skip

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
    with tempfile.TemporaryDirectory(prefix="leadscore-") as folder, ExitStack() as stack:
        connections = {
            name: stack.enter_context(started(service, VAR_DIR=f"{folder}/{number}", **environment))
            for number, (name, environment) in enumerate(SERVICES.items())
        }
        connections["echo"] = stack.enter_context(started(server))
        for leads, requests in ((1, asked.singles), (2000, asked.batches)):
            times = measure(connections, leads, requests)
            report(count(leads, "lead"), dict(zip(connections, times.T, strict=True)))


def report(title: str, times: dict[str, np.ndarray]) -> None:
    """Prints the latencies, and their ratio to those of the echo and of the cold service."""
    medians = {name: float(np.median(column)) for name, column in times.items()}
    print(f"{title}, {len(times['echo']):,} requests each")
    for name, column in times.items():
        p5, p99 = np.percentile(column, (5, 99))
        to_echo, to_cold = medians[name] / medians["echo"], medians[name] / medians["cold"]
        print(
            f"  {name:<16} p50 {medians[name]:7.3f} ms   p5 {p5:7.3f}   p99 {p99:7.3f}"
            f"   {to_echo:6.2f} x echo   {to_cold:6.3f} x cold"
        )


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


def measure(connections: dict[str, socket.socket], leads: int, requests: int) -> np.ndarray:
    """Returns the wall times (requests, services) in milliseconds.

    The first ones, which warm up, are left out, and those that met a suspended cache.
    """
    batches = [
        json.dumps([f"lead_{person + 1}" for person in range(start, start + leads)]).encode()
        for start in range(0, min(PEOPLE, 100 * leads), leads)
    ]
    names = list(connections)
    for name, body in itertools.product(names[:2], batches):
        ask(connections[name], body)
    times = np.empty((requests + WARM_UP, len(names)))
    for number, body in zip(range(len(times)), itertools.cycle(batches), strict=False):
        for place in np.roll(range(len(names)), number):
            times[number, place], answer = ask(connections[names[place]], body)
            if names[place] != "echo":
                expected = leads if names[place].startswith("warm") else 0
                if json.loads(answer)["cache_hits"] != expected:
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
