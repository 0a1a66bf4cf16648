"""What reading leads costs, with a plan made for the very IDs asked and with one for any IDs.

The statements of the service over one connection, on a plain table and on the default view of five tables;
milliseconds, medians, the two kinds of plan in turns. `python -m bench.lead_read`
"""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from psycopg.pq import ExecStatus
from rich.console import Console
from rich.table import Table

from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.db.array_parameters import join_uuids, pack_uuids
from app.db.lead_cells import Rows, batch_statement
from app.db.leads import fetch_types
from bench.data import RELATION, open_stage

LEADS = 10_000
BATCHES: dict[int, Rows] = {1: "leads", 8: "leads", 50: "one", 500: "parts", 2000: "parts"}
PLANS = ("force_custom_plan", "force_generic_plan")
ROUNDS, SECONDS = 5, 0.3


def main() -> None:
    """Prints the table."""
    table = Table("relation", "leads", "plan for these IDs, ms", "plan for any, ms", title="reading leads")
    with (
        open_stage(Path("var/bench"), LEADS) as stage,
        psycopg.connect(stage.url, autocommit=True) as connection,
    ):
        connection.execute("SET jit = off; SET TimeZone = 'UTC'")
        columns = ModelRegistry(ModelCatalogue(stage.model_dir)).load().input_columns
        for relation in (RELATION, "lead_source"):
            types = fetch_types(connection, relation)
            found = connection.execute(f"SELECT lead_id::text FROM {relation} ORDER BY md5(lead_id::text)")
            lead_ids = [row[0] for row in found]
            for size, rows in BATCHES.items():
                statement = batch_statement(relation, types, columns, by_id=True, by_ref=False, rows=rows)
                batches = [lead_ids[at : at + size] for at in range(0, len(lead_ids) - size + 1, size)]
                times = _time(connection, f"{relation} {size}".encode(), statement, batches)
                table.add_row(relation, f"{size:,}", *(f"{median(times[plan]):.3f}" for plan in PLANS))
    Console().print(table)


def _time(
    connection: psycopg.Connection[Any], name: bytes, statement: str, batches: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    parameters = [pack_uuids(join_uuids(batch)) for batch in batches]
    connection.pgconn.prepare(name, statement.encode())
    times: dict[str, list[float]] = {plan: [] for plan in PLANS}
    for _ in range(ROUNDS):
        for plan, found in times.items():
            connection.execute(f"SET plan_cache_mode = {plan}")
            ends = time.perf_counter() + SECONDS
            while time.perf_counter() < ends:
                began = time.perf_counter()
                result = connection.pgconn.exec_prepared(
                    name, [parameters[len(found) % len(parameters)]], [1], 1
                )
                found.append((time.perf_counter() - began) * 1000)
                assert result.status == ExecStatus.TUPLES_OK, result.error_message
    return times


if __name__ == "__main__":
    main()
