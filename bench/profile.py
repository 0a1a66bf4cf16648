"""`make profile`: where the time of a request goes, stage by stage, as the service itself recorded it.

Every prediction event in `ai_events` says how long each stage of its request took. What the stages do not
cover is the rest of the request inside the service (parsing, checks, encoding, the event on disk) and, around
it, HTTP and this client.

python -m bench.profile [--leads N] [--requests N] [--var DIR]
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import psycopg
import uvloop
from rich.console import Console
from rich.table import Table

from bench.data import open_stage, sample_lead_ids
from bench.load import Sample, build_request, cycle, run_load
from bench.servers import ROOT, Server, start_service
from bench.suite import SIZES

_SAMPLE = 100_000
_STAGES = ("model", "cache", "database", "features", "safety", "scoring", "calibration")


def main() -> None:
    """Times requests of every size, one at a time, and prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leads", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=200, help="requests of each size")
    parser.add_argument("--var", type=Path, default=ROOT / "var" / "bench", help="where the database is kept")
    given = parser.parse_args()
    with open_stage(given.var, given.leads) as stage, tempfile.TemporaryDirectory() as var:
        lead_ids = sample_lead_ids(stage.url, min(_SAMPLE, given.leads), 0.7)
        with start_service("profiled", stage, Path(var), ML_PREDICTION_CACHE_TTL_SECONDS="0") as server:
            whole = {size: _time(server, lead_ids, size, given.requests) for size in SIZES}
            events = {size: _fetch_events(stage.url, size, given.requests) for size in SIZES}
    _print(whole, events)


def _time(server: Server, lead_ids: list[str], size: int, requests: int) -> float:
    starts = random.Random(size).sample(range(len(lead_ids) - size), requests)  # noqa: S311  nothing secret
    bodies = [build_request(json.dumps(lead_ids[at : at + size]).encode()) for at in starts]
    sample = Sample()
    uvloop.run(run_load(server.port, cycle(bodies), sample, connections=1, seconds=0, at_least=requests))
    return sample.percentile(0.5)


def _fetch_events(url: str, size: int, requests: int) -> list[dict[str, float]]:
    statement = (
        "SELECT meta->'stages_ms' || jsonb_build_object('request', meta->'latency_ms') FROM ai_events"
        " WHERE meta->>'asked' = %s ORDER BY created_at DESC LIMIT %s"
    )
    deadline = time.monotonic() + 30
    with psycopg.connect(url, autocommit=True) as connection:
        while True:  # events are shipped a moment after their answers
            rows = connection.execute(statement, [str(size), requests]).fetchall()
            if len(rows) == requests:
                return [row[0] for row in rows]
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(rows)} of {requests} events reached the database within 30 s")
            time.sleep(0.2)


def _print(whole: dict[int, float], events: dict[int, list[dict[str, float]]]) -> None:
    medians = {
        size: {
            stage: statistics.median(event.get(stage, 0.0) for event in events[size])
            for stage in (*_STAGES, "request")
        }
        for size in SIZES
    }
    table = Table(
        title="median milliseconds by leads in a request (cold, one connection)", title_justify="left"
    )
    table.add_column("stage")
    for size in SIZES:
        table.add_column(f"{size:,}", justify="right")
    for stage in _STAGES:
        table.add_row(stage, *(f"{medians[size][stage]:.3f}" for size in SIZES))
    rest = {size: medians[size]["request"] - sum(medians[size][stage] for stage in _STAGES) for size in SIZES}
    table.add_row("parsing, checks, encoding", *(f"{rest[size]:.3f}" for size in SIZES))
    around = {size: whole[size] - medians[size]["request"] for size in SIZES}
    table.add_row("event on disk, HTTP, client", *(f"{around[size]:.3f}" for size in SIZES))
    table.add_section()
    table.add_row("whole request", *(f"{whole[size]:.3f}" for size in SIZES))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
