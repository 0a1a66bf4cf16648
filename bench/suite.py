"""`make bench`: what the service costs, side by side with what it could cost and what it usually costs.

Everything runs in one go on one machine: the service (cold, without its cache; warm, with it), a bare echo
and the floor, each also with an event on the disk before an answer, the textbook way, and the row-by-row way,
all on the same leads in the same PostgreSQL, with the same model. Before anything is timed all of them must
give the same probabilities. Then they take turns, a burst each, round after round, so that whatever else the
machine does hits all of them. What safety costs is measured the same way, among services of its own
(`bench.cost`).

python -m bench.suite [--leads N] [--seconds S] [--rounds R] [--short] [--json FILE] [--var DIR]
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench import cost
from bench.bulk import BulkRates, measure_bulk
from bench.data import Stage, open_stage, sample_lead_ids
from bench.figures import Figure, print_figures
from bench.load import Cell, Sample, ask, build_request, cycle, measure_in_turns, run_load
from bench.servers import ROOT, Server, start_contender, start_service

SIZES = (1, 50, 500, 2000)
CONNECTIONS = (1, 8, 64)
TOLERANCE = 1e-9
DURABLE = ("durable_echo", "durable_floor")
_ROW_BY_ROW_LEADS = 1000
_MEMORY_REQUESTS = 100_000
_SAMPLE = 400_000


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    leads: int
    seconds: float
    rounds: int
    short: bool


class Bench:
    """The running contenders and what was measured of them."""

    def __init__(self, servers: Mapping[str, Server], lead_ids: Sequence[str], options: Options) -> None:
        self.samples: dict[Cell, Sample] = {}
        self._servers = servers
        self._lead_ids = lead_ids
        self._options = options

    async def check_answers(self) -> None:
        """Compares the probabilities of all contenders, lead by lead.

        Raises:
            SystemExit: two of them differ.
        """
        lead_ids = list(self._lead_ids[: 20 if self._options.short else 200])
        request = build_request(json.dumps(lead_ids).encode())
        answers = {
            name: json.loads(await ask(server.port, request))["predictions"]
            for name, server in self._servers.items()
            if not name.endswith("echo")
        }
        expected = {entry["lead_id"]: entry["probability"] for entry in answers["cold"]}
        if len(expected) != len(lead_ids):
            raise SystemExit("the service did not answer every lead")
        for name, predictions in answers.items():
            given = {entry["lead_id"]: entry["probability"] for entry in predictions}
            worst = max(abs(given[lead_id] - expected[lead_id]) for lead_id in lead_ids)
            if given.keys() != expected.keys() or worst > TOLERANCE:
                raise SystemExit(f"{name} answers differently, by up to {worst}: nothing was timed")

    async def measure(self, cells: Sequence[Cell]) -> None:
        """Times the cells in turns, every round in another order."""
        await measure_in_turns(
            cells,
            self.samples,
            {name: server.port for name, server in self._servers.items()},
            lambda name, size: self._requests(size, warm=name == "warm"),
            seconds=self._options.seconds,
            rounds=self._options.rounds,
        )

    async def measure_row_by_row(self) -> float:
        """Returns the milliseconds the row-by-row way takes for one request of 1,000 leads."""
        leads = 20 if self._options.short else _ROW_BY_ROW_LEADS
        sample = Sample()
        request = build_request(json.dumps(list(self._lead_ids[:leads])).encode())
        await run_load(
            self._servers["row_by_row"].port, cycle([request]), sample, connections=1, seconds=0, at_least=1
        )
        return sample.percentile(0.5)

    async def grow(self) -> tuple[float, float]:
        """Returns the resident memory of the service (MB) before and after 100,000 requests of all sizes."""
        server, sample = self._servers["warm"], Sample()
        count = 200 if self._options.short else _MEMORY_REQUESTS
        for size, share in ((50, 0.02), (1, 0.1)):
            await run_load(server.port, self._requests(size, warm=False), Sample(), connections=16, seconds=0,
                           at_least=max(16, int(share * count)))  # fmt: skip
        before = server.resident_megabytes()
        await run_load(server.port, self._requests(1, warm=False), sample, connections=16, seconds=0,
                       at_least=count)  # fmt: skip
        return before, server.resident_megabytes()

    def p50(self, name: str, size: int, connections: int = 1) -> float:
        """Returns the median latency of a cell in milliseconds."""
        return self.samples[name, size, connections].percentile(0.5)

    def _requests(self, size: int, *, warm: bool) -> Iterator[bytes]:
        # A warm request asks for leads the cache has answered before: the first few of the sample.
        known = self._lead_ids[: max(2 * size, 2000)] if warm else self._lead_ids
        starts = range(0, len(known) - size + 1, size)
        order = random.Random(2).sample(starts, min(len(starts), 4 if warm and size > 1 else 400))  # noqa: S311
        return cycle([build_request(json.dumps(known[at : at + size]).encode()) for at in order])


@contextmanager
def start_all(stage: Stage, directory: Path) -> Iterator[dict[str, Server]]:
    """Starts every contender; all of them are up while one is timed, and idle."""
    uncached = {"ML_PREDICTION_CACHE_TTL_SECONDS": "0"}
    starting = [
        start_service("cold", stage, directory, **uncached),
        start_service("warm", stage, directory),
        *(start_contender(name, stage) for name in ("echo", "floor", *DURABLE, "textbook", "row_by_row")),
    ]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield {server.name: server for server in pool.map(stack.enter_context, starting)}


def choose_cells(*, short: bool) -> list[Cell]:
    """Returns what is timed: every size at every number of connections."""
    names = ("cold", "warm", "echo", "floor", "textbook")
    sizes, connections = ((1, 50), (1,)) if short else (SIZES, CONNECTIONS)
    cells = [(name, size, count) for name in names for size in sizes for count in connections]
    cells += [(name, 1, 1) for name in DURABLE]
    return cells if short else [*cells, ("cold", 1000, 1)]


def build_figures(
    bench: Bench, facts: Mapping[str, float], bulk: BulkRates, fewer: BulkRates
) -> list[Figure]:
    """Returns the lines of the table; `fewer` are the rates of bulk scoring with a tenth of the leads."""
    cold, warm, rate = bench.p50("cold", 2000), bench.p50("warm", 2000), bench.samples
    return [
        Figure("cold, 1 lead, p50 / floor", bench.p50("cold", 1) / bench.p50("floor", 1), 1.25),
        Figure("the disk alone: floor with an event on it first / floor",
               bench.p50("durable_floor", 1) / bench.p50("floor", 1), 1.25),
        Figure("cold, 1 lead, p50 / floor with an event on the disk first",
               bench.p50("cold", 1) / bench.p50("durable_floor", 1), 1.25),
        Figure("cold, 2,000 leads, p50 / floor", cold / bench.p50("floor", 2000), 1.15),
        Figure("cold, 2,000 leads, 8 connections, rate / floor",
               rate["cold", 2000, 8].rate / rate["floor", 2000, 8].rate, 0.85, at_least=True),
        Figure("textbook / cold, 1 lead", bench.p50("textbook", 1) / bench.p50("cold", 1), 7,
               at_least=True),
        Figure("textbook / cold, 2,000 leads", bench.p50("textbook", 2000) / cold, 2.2, at_least=True),
        Figure("row by row / cold, 1,000 leads", facts["row_by_row_ms"] / bench.p50("cold", 1000), 300,
               at_least=True),
        Figure("warm, 1 lead, p50 / bare echo", bench.p50("warm", 1) / bench.p50("echo", 1), 1.5),
        Figure("the disk alone: echo with an event on it first / bare echo",
               bench.p50("durable_echo", 1) / bench.p50("echo", 1), 1.5),
        Figure("warm, 1 lead, p50 / echo with an event on the disk first",
               bench.p50("warm", 1) / bench.p50("durable_echo", 1), 1.5),
        Figure("warm, 2,000 leads, p50", warm, max(4.0, 0.12 * cold), unit="ms"),
        Figure("bulk, read, score, write: rate / floor", bulk.service / bulk.floor, 0.6, at_least=True),
        Figure("bulk: rate / that of a tenth of the leads", bulk.service / fewer.service, 0.9, at_least=True),
        Figure("cold, time a lead, 2,000 / 50 leads", (cold / 2000) / (bench.p50("cold", 50) / 50), 1.0),
        Figure("start with an existing database to ready", facts["start_seconds"], 2.5, unit="s"),
        Figure("resident memory after the load", facts["resident_after_mb"], 260, unit="MB"),
        Figure("growth of it over the load",
               facts["resident_after_mb"] / facts["resident_before_mb"] - 1, 0.01, unit=""),
    ]  # fmt: skip


def print_cells(console: Console, samples: Mapping[Cell, Sample]) -> None:
    """Prints every cell: median and p99 in milliseconds, each from burst to burst, and leads a second."""
    title = "latency in ms: p50 and p99 of all answers (of the best burst, of the worst); leads a second"
    table = Table(title=title, title_justify="left")
    for heading in ("leads", "connections", "contender", "p50", "p99", "leads/s", "requests", "refused"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for (name, size, connections), sample in sorted(samples.items(), key=lambda item: item[0][1:]):
        table.add_row(
            f"{size:,}", str(connections), name, _say_latency(sample, 0.5), _say_latency(sample, 0.99),
            f"{sample.rate * size:,.0f}", f"{len(sample.milliseconds):,}", f"{sample.refused:,}",
        )  # fmt: skip
    console.print(table)


def _say_latency(sample: Sample, share: float) -> str:
    least, greatest = sample.spread(share)
    return "{} ({}, {})".format(*map(_say_milliseconds, (sample.percentile(share), least, greatest)))


def _say_milliseconds(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"


async def run(bench: Bench, options: Options) -> dict[str, float]:
    """Checks, then times everything; returns the facts that are not cells."""
    await bench.check_answers()
    await bench.measure(choose_cells(short=options.short))
    row_by_row_ms = await bench.measure_row_by_row()
    before, after = await bench.grow()
    return {"row_by_row_ms": row_by_row_ms, "resident_before_mb": before, "resident_after_mb": after}


def main() -> None:
    """Measures and prints; exit status 1 only if the contenders answer differently."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leads", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a burst")
    parser.add_argument("--rounds", type=int, default=3, help="bursts of each contender in each cell")
    parser.add_argument("--short", action="store_true", help="few leads, few cells: are the answers right?")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--var", type=Path, default=ROOT / "var" / "bench", help="where the database is kept")
    given = parser.parse_args()
    options = Options(
        leads=2_000 if given.short else given.leads,
        seconds=0.05 if given.short else given.seconds,
        rounds=1 if given.short else given.rounds,
        short=given.short,
    )
    console = Console(width=130)
    with open_stage(given.var, options.leads) as stage, tempfile.TemporaryDirectory() as directory:
        lead_ids = sample_lead_ids(stage.url, min(_SAMPLE, options.leads), 0.5)
        with start_all(stage, Path(directory)) as servers:
            bench = Bench(servers, lead_ids, options)
            facts = uvloop.run(run(bench, options))
        safety = dict[Cell, Sample]()
        if not options.short:
            differ, safety = cost.measure_cost(
                stage, lead_ids, seconds=options.seconds, rounds=options.rounds
            )
            if differ:
                raise SystemExit("with and without what makes it safe the service answers differently")
        bulk = measure_bulk(stage, options.leads)
        with start_service("again", stage, Path(directory)) as server:
            facts["start_seconds"] = server.seconds_to_ready
    print_cells(console, bench.samples)
    measured = {"cells": describe_cells(bench.samples), "facts": facts, "bulk": asdict(bulk)}
    if not options.short:
        with open_stage(given.var, options.leads // 10) as stage:
            measure_bulk(stage, options.leads // 10)  # brings the leads into memory, where the others are
            fewer = measure_bulk(stage, options.leads // 10)
        print_figures(
            console, "figures", [*build_figures(bench, facts, bulk, fewer), *cost.build_figures(safety)]
        )
        measured |= {"cells_of_safety": describe_cells(safety), "bulk_of_a_tenth": asdict(fewer)}
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(measured, indent=1))


def describe_cells(samples: Mapping[Cell, Sample]) -> list[dict[str, Any]]:
    """Returns every cell as JSON values."""
    return [
        {
            "contender": name, "leads": size, "connections": connections,
            "p50_ms": sample.percentile(0.5), "p50_ms_of_bursts": sample.spread(0.5),
            "p99_ms": sample.percentile(0.99), "p99_ms_of_bursts": sample.spread(0.99),
            "leads_per_second": sample.rate * size,
            "requests": len(sample.milliseconds), "refused": sample.refused,
        }
        for (name, size, connections), sample in samples.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
