"""Bulk scoring against its floor: all leads read, scored and written, with and without our guarantees.

The floor reads pages by key, one value a column, scores them as the other floor does, and copies lead ID and
probability into a fresh table in the binary format: no look at what is there already, nothing to resume from.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import psycopg

from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy
from app.bulk_scoring import score_source
from bench.contenders import Floor
from bench.data import RELATION, Stage

_PAGE = 50_000
_ROW = np.dtype(
    [("fields", ">i2"), ("id_size", ">i4"), ("id", "V16"), ("size", ">i4"), ("probability", ">f8")]
)
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)


@dataclass(frozen=True)
class BulkRates:
    """Leads a second, of a first run over the whole source."""

    service: float
    floor: float


def measure_bulk(stage: Stage, leads: int) -> BulkRates:
    """Scores the whole relation once by `leadscore score`'s own function, and once by the floor."""
    return BulkRates(leads / _time(lambda: _score(stage)), leads / _time(lambda: _score_leanly(stage)))


def _time(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _score(stage: Stage) -> None:
    with psycopg.connect(stage.url) as connection:
        connection.execute("TRUNCATE lead_scores")
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    score_source(
        stage.url,
        RELATION,
        ModelRegistry(stage.model_dir).load(),
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
                rows["probability"] = floor.score(row[1:])
                copy.write(rows.tobytes())
                last = rows["id"][-1].tobytes().hex()
            copy.write(b"\xff\xff")
        writer.execute("ALTER TABLE bench_scores ADD PRIMARY KEY (lead_id)")
        writer.commit()
