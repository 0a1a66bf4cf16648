"""`make bench-peers`: the service, cold and with its database look-up, beside peers handed ready features.

MLServer, BentoML, LitServe, Ray Serve and MLflow serve the very random forest of `make bench`, each out of
its own virtual environment, on one worker as the service does. They get the features in the request and
answer the uncalibrated probability: no database, no safety rules, no calibration, no telemetry. The service
gets lead IDs and does all of that. Before anything is timed the peers' answers, calibrated, must equal the
service's for the same leads. Then all take turns, a burst each, round after round. A peer that does not
install or start is named with the reason. The floor of `make bench` plays too: where a peer is ahead of it,
no service that reads a database first can win.

python -m bench.peers [--leads N] [--seconds S] [--rounds R] [--json FILE] [--var DIR]
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import joblib
import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from app.ai.calibration import calibrate
from app.ai.domain import FetchedLeads, FloatArray
from app.ai.feature_safety import apply_rules
from app.ai.features import build_features
from app.ai.model_bundle import ModelBundle
from app.db.engine import Database
from app.db.leads import PostgresLeadSource
from bench.contenders import load_model, start_of_day
from bench.data import RELATION, Stage, open_stage, sample_lead_ids
from bench.figures import Figure, print_figures
from bench.load import Cell, Sample, ask, build_request, cycle, measure_in_turns
from bench.peer_protocols import PEERS, Peer, Rows
from bench.peer_servers import PeerFailedError, install_peer, read_version, start_peer
from bench.servers import ROOT, Server, start_contender, start_service
from bench.suite import TOLERANCE, describe_cells, print_cells

US, FLOOR = "cold", "floor"
CELLS = ((1, 1), (1, 16), (2000, 1), (2000, 8), (2000, 16))
"""Rows in a request, connections."""
_REQUESTS = {1: 400, 2000: 20}
_LOOK_UPS = 2000
_CHECKED = 200
_DEADLINE_SECONDS = 60


async def fetch_features(stage: Stage, bundle: ModelBundle, lead_ids: Sequence[str]) -> FloatArray:
    """Returns what the model is given for these leads (n, k), as the service would give it today."""
    database = Database(stage.url, pool_size=1, deadline_seconds=_DEADLINE_SECONDS)
    values: list[FloatArray] = []

    def use_part(_first: int, found: FetchedLeads) -> None:
        matrix = build_features(found.leads, bundle.feature_set, start_of_day().timestamp())
        values.append(apply_rules(matrix, bundle.safety).values[found.row_of])

    try:
        await PostgresLeadSource(database, RELATION).fetch(lead_ids, bundle.input_columns, use_part)
    finally:
        await database.close()
    return np.concatenate(values)


@contextmanager
def start_peers(
    directory: Path, model: Path, probe: Rows
) -> Iterator[tuple[dict[str, Server], dict[str, str]]]:
    """Yields the peers that answer, and what there is to say of each peer: its version, or why it is absent.

    `directory` is where their environments are kept.
    """
    servers: dict[str, Server] = {}
    remarks: dict[str, str] = {}
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(peer: Peer) -> None:
            try:
                python = install_peer(peer, directory / peer.name)
                servers[peer.name] = stack.enter_context(start_peer(peer, python, model, probe))
                remarks[peer.name] = read_version(peer, python)
            except PeerFailedError as exc:
                remarks[peer.name] = str(exc)

        list(pool.map(start, PEERS))
        yield servers, remarks


class PeerBench:
    """The service, the floor and the running peers, and what was measured of them."""

    def __init__(self, servers: Mapping[str, Server], lead_ids: Sequence[str], rows: FloatArray) -> None:
        """`rows` (n, k) are the features of the first n leads."""
        self.samples: dict[Cell, Sample] = {}
        self._servers = servers
        self._lead_ids = lead_ids
        self._rows = rows
        self._peers = {peer.name: peer for peer in PEERS if peer.name in servers}

    async def check_answers(self, bundle: ModelBundle) -> None:
        """Compares every peer's probabilities, calibrated, with the service's.

        Raises:
            SystemExit: they differ.
        """
        body = json.dumps(self._lead_ids[:_CHECKED]).encode()
        answer = json.loads(await ask(self._servers[US].port, build_request(body)))
        expected = np.array([entry["probability"] for entry in answer["predictions"]])
        rows = self._rows[:_CHECKED].tolist()
        for name, peer in self._peers.items():
            body = await ask(self._servers[name].port, build_request(peer.encode(rows), peer.path))
            given = calibrate(np.array(peer.decode(body)), bundle.calibrator)
            if given.shape != expected.shape or not np.allclose(given, expected, rtol=0, atol=TOLERANCE):
                raise SystemExit(f"{name} answers other probabilities: nothing was timed")

    async def measure(self, *, seconds: float, rounds: int) -> None:
        """Times everyone in turns, every round in another order."""
        requests = {(name, size): self._requests(name, size) for name in self._servers for size in _REQUESTS}
        await measure_in_turns(
            [(name, size, connections) for name in self._servers for size, connections in CELLS],
            self.samples,
            {name: server.port for name, server in self._servers.items()},
            lambda name, size: requests[name, size],
            seconds=seconds,
            rounds=rounds,
        )

    def p50(self, name: str, size: int) -> float:
        """Returns the median latency at one connection in milliseconds."""
        return self.samples[name, size, 1].percentile(0.5)

    def rate(self, name: str, size: int) -> float:
        """Returns the rows a second, at the number of connections that does best."""
        return max(
            sample.rate * size
            for (other, rows, connections), sample in self.samples.items()
            if (other, rows) == (name, size) and connections > 1
        )

    def _requests(self, name: str, size: int) -> Iterator[bytes]:
        if name not in self._peers:
            # Ever other leads, many more than the peers' requests hold: the look-up is a real one.
            starts = range(0, len(self._lead_ids) - size + 1, size)[:_LOOK_UPS]
            return cycle(
                [build_request(json.dumps(self._lead_ids[at : at + size]).encode()) for at in starts]
            )
        peer, rows = self._peers[name], self._rows.tolist()
        starts = range(0, _REQUESTS[size] * size, size)
        return cycle([build_request(peer.encode(rows[at : at + size]), peer.path) for at in starts])


def build_figures(bench: PeerBench, names: Sequence[str]) -> list[Figure]:
    """Returns the lines of the table: latency and throughput against every peer that answers."""
    figures = []
    for name in names:
        for size in _REQUESTS:
            rows = "1 row" if size == 1 else f"{size:,} rows"
            latency = bench.p50(US, size) / bench.p50(name, size)
            rate = bench.rate(US, size) / bench.rate(name, size)
            figures += [
                Figure(f"cold / {name}, {rows}, p50", latency, 1.0),
                Figure(f"cold / {name}, {rows}, rows/s", rate, 1.0, at_least=True),
            ]
    return figures


def print_remarks(console: Console, remarks: Mapping[str, str]) -> None:
    """Prints each peer with its version, or why it is not in the tables."""
    table = Table(title="peers", title_justify="left")
    table.add_column("peer")
    table.add_column("version, or why it is absent")
    for peer in PEERS:
        table.add_row(peer.name, remarks[peer.name])
    console.print(table)


async def run(bench: PeerBench, bundle: ModelBundle, *, seconds: float, rounds: int) -> None:
    """Checks, then times everything."""
    await bench.check_answers(bundle)
    await bench.measure(seconds=seconds, rounds=rounds)


def main() -> None:
    """Measures and prints; exit status 1 only if a peer answers differently."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leads", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a burst")
    parser.add_argument("--rounds", type=int, default=3, help="bursts of each contender in each cell")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--var", type=Path, default=ROOT / "var" / "bench", help="what is kept between runs")
    given = parser.parse_args()
    console, peers = Console(width=110), given.var / "peers"
    with open_stage(given.var, given.leads) as stage, tempfile.TemporaryDirectory() as directory:
        bundle, estimator = load_model(stage.model_dir)
        peers.mkdir(parents=True, exist_ok=True)
        joblib.dump(estimator.set_params(n_jobs=1), peers / "peer_model.joblib")
        lead_ids = sample_lead_ids(stage.url, min(400_000, given.leads), 0.5)
        wanted = max(count * size for size, count in _REQUESTS.items())
        rows = asyncio.run(fetch_features(stage, bundle, lead_ids[:wanted]))
        with (
            start_service(US, stage, Path(directory), ML_PREDICTION_CACHE_TTL_SECONDS="0") as service,
            start_contender(FLOOR, stage) as floor,
            start_peers(peers, peers / "peer_model.joblib", rows[:1].tolist()) as (servers, remarks),
        ):
            bench = PeerBench({US: service, FLOOR: floor, **servers}, lead_ids, rows)
            uvloop.run(run(bench, bundle, seconds=given.seconds, rounds=given.rounds))
    print_remarks(console, remarks)
    print_cells(console, bench.samples)
    print_figures(
        console,
        "the cold service, its database look-up included / each peer",
        build_figures(bench, list(servers)),
    )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        measured = {"cells": describe_cells(bench.samples), "peers": remarks}
        given.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
