"""The leads every contender reads: the demo CRM's, many times over, as a table in the embedded PostgreSQL.

The relation is called `bench_leads` and has the columns of the default view as a plain table, so that what is
compared is the services and not the plan of a view. Made once, then kept in the directory it lies in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from app.db.demo_crm import load_demo
from app.db.embedded import open_embedded
from app.db.migrations import upgrade
from app.training.shipped_model import MOMENT

RELATION = "bench_leads"
_PEOPLE = 10_000


@contextmanager
def open_leads(directory: Path, leads: int) -> Iterator[str]:
    """Yields the URL of a database with `leads` leads in `bench_leads`."""
    with open_embedded(directory) as url:
        if _count(url) != leads:
            _fill(url, leads)
        yield url


def sample_lead_ids(url: str, count: int, seed: float) -> list[str]:
    """Returns the UUIDs of `count` distinct leads in random order; equal `seed` (0 to 1), equal leads."""
    with psycopg.connect(url) as connection:
        connection.execute("SELECT setseed(%s)", [seed])
        rows = connection.execute(
            f"SELECT lead_id::text FROM (SELECT lead_id FROM {RELATION} ORDER BY lead_id) AS leads"
            " ORDER BY random() LIMIT %s",
            [count],
        )
        return [row[0] for row in rows]


def _count(url: str) -> int:
    with psycopg.connect(url) as connection:
        if connection.execute("SELECT to_regclass(%s)", [RELATION]).fetchone() == (None,):
            return 0
        row = connection.execute(f"SELECT count(*) FROM {RELATION}").fetchone()
        return row[0] if row else 0


def _fill(url: str, leads: int) -> None:
    upgrade(url)
    with psycopg.connect(url, autocommit=True) as connection:
        if connection.execute("SELECT count(*) FROM people").fetchone() == (0,):
            load_demo(url, people=_PEOPLE, seed=1, until=MOMENT, progress=lambda _stage, _done, _total: None)
        connection.execute(f"DROP TABLE IF EXISTS {RELATION}")
        columns = connection.execute("SELECT * FROM lead_source LIMIT 0").description or []
        kept = [column.name for column in columns if column.name not in ("lead_id", "external_ref")]
        # Random keys: the leads of a request lie on pages all over the table, as they do in a CRM.
        connection.execute(
            f"CREATE TABLE {RELATION} AS SELECT gen_random_uuid() AS lead_id, 'lead_' || n AS external_ref,"
            f" {', '.join(kept)} FROM generate_series(1, %s) AS n JOIN (SELECT row_number() OVER () AS place,"
            " * FROM lead_source) AS source ON source.place = 1 + n %% %s",
            [leads, _PEOPLE],
        )
        connection.execute(f"ALTER TABLE {RELATION} ADD PRIMARY KEY (lead_id)")
        connection.execute(f"CREATE UNIQUE INDEX ON {RELATION} (external_ref)")
        connection.execute(f"VACUUM ANALYZE {RELATION}")
        connection.execute("CHECKPOINT")
