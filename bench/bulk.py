"""Bulk scoring against its floor: all leads read, scored and written, with and without our guarantees.

The floor reads pages by key, one value a column, scores them as the other floor does, and copies lead ID and
probability into a fresh table in the binary format: no look at what is there already, nothing to resume from.

python -m bench.bulk [--leads N,N] [--rounds R] [--var DIR]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psycopg
from rich.console import Console
from rich.table import Table

from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy
from app.bulk_scoring import score_source
from bench.contenders import Floor
from bench.data import RELATION, Stage, open_stage
from bench.servers import ROOT

_PAGE = 50_000
_ROW = np.dtype(
    [("fields", ">i2"), ("id_size", ">i4"), ("id", "V16"), ("size", ">i4"), ("probability", ">f8")]
)
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)


@dataclass(frozen=True)
class BulkRates:
    """Leads a second: of a first run, of a second one over the same leads, of the floor."""

    service: float
    again: float
    floor: float


def measure_bulk(stage: Stage, leads: int) -> BulkRates:
    """Scores the whole relation twice by `leadscore score`'s own function, and once by the floor."""
    with psycopg.connect(stage.url) as connection:
        connection.execute("TRUNCATE lead_scores, lead_score_runs")
    ways = (lambda: _score(stage), lambda: _score(stage), lambda: _score_leanly(stage))
    return BulkRates(*(leads / _time(way) for way in ways))


def _time(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _score(stage: Stage) -> None:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    score_source(
        stage.url,
        RELATION,
        ModelRegistry(ModelCatalogue(stage.model_dir)).load(),
        as_of=today,
        policy=ScoringPolicy(0.6, "max_probability"),
        progress=lambda _stage, _done, _total: None,
    )


def _score_leanly(stage: Stage) -> None:
    floor = Floor(stage.url, stage.model_dir)
    page = (
        f"SELECT {floor.columns} FROM (SELECT * FROM {RELATION} WHERE lead_id > %s"
        f" ORDER BY lead_id LIMIT {_PAGE}) AS page"
    )
    with psycopg.connect(stage.url) as reader, psycopg.connect(stage.url) as writer:
        writer.execute("DROP TABLE IF EXISTS bench_scores")
        writer.execute("CREATE TABLE bench_scores (lead_id uuid, probability float8)")
        last = "00000000-0000-0000-0000-000000000000"
        with writer.cursor().copy("COPY bench_scores FROM STDIN (FORMAT binary)") as copy:
            copy.write(_HEADER)
            while True:
                with reader.cursor(binary=True) as cursor:
                    row = cursor.execute(page, [last]).fetchone()
                if row is None or row[0] is None:
                    break
                rows = np.empty(len(row[0]) // 16, _ROW)
                rows["fields"], rows["id_size"], rows["size"] = 2, 16, 8
                rows["id"] = np.frombuffer(row[0], "V16")
                rows["probability"] = floor.score(row[1:])[0]
                copy.write(rows.tobytes())
                last = rows["id"][-1].tobytes().hex()
            copy.write(b"\xff\xff")
        writer.execute("ALTER TABLE bench_scores ADD PRIMARY KEY (lead_id)")
        writer.commit()


def main() -> None:
    """Prints the rates at every number of leads, medians of the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leads", default="100000,1000000", help="numbers of leads, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--var", type=Path, default=ROOT / "var" / "bench", help="where the database is kept")
    given = parser.parse_args()
    table = Table(title="bulk scoring, leads a second", title_justify="left")
    for heading in ("leads", "first run", "unchanged leads", "floor", "first run / floor"):
        table.add_column(heading, justify="right")
    for leads in map(int, given.leads.split(",")):
        with open_stage(given.var, leads) as stage:
            rounds = [measure_bulk(stage, leads) for _ in range(given.rounds)]
        ratio = statistics.median(rates.service / rates.floor for rates in rounds)
        medians = [
            statistics.median(getattr(rates, name) for rates in rounds)
            for name in ("service", "again", "floor")
        ]
        table.add_row(f"{leads:,}", *(f"{rate:,.0f}" for rate in medians), f"{ratio:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
