"""What every contender uses: the demo CRM's leads, many times over, in one PostgreSQL, and one model.

The relation is called `bench_leads` and has the columns of the default view as a plain table, so that what is
compared is the services and not the plan of a view. The model is a random forest of a usual size, 100 trees
of depth 10 and about 120,000 nodes, whatever type the shipped one is: it costs the most to score with. What
it has learnt is what a small forest says of these leads. Both are made once, then kept where they lie.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psycopg
from sklearn.ensemble import RandomForestClassifier

from app.ai.domain import FloatArray
from app.ai.feature_safety import apply_rules
from app.ai.features import build_features
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_manifest import ModelDescription
from app.ai.model_registry import ModelRegistry
from app.db.demo_crm import load_demo
from app.db.embedded import open_embedded
from app.db.leads import fetch_all_chunks
from app.db.migrations import upgrade
from app.training.options import TrainingOptions
from app.training.publish import publish_model
from app.training.shipped_model import MOMENT
from app.training.train import train

RELATION = "bench_leads"
_PEOPLE = 10_000
_FOREST_ROWS = 60_000


@dataclass(frozen=True)
class Stage:
    """Where the contenders play: the database's URL and the directory of the one model."""

    url: str
    model_dir: Path


@contextmanager
def open_stage(directory: Path, leads: int) -> Iterator[Stage]:
    """Yields a database with `leads` leads in `bench_leads`, and the model."""
    stage_dir, models = directory / f"{leads}", directory / f"{leads}" / "models"
    with open_embedded(stage_dir) as url:
        with (stage_dir / "preparing").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two proofs may want the same stage
            upgrade(url)
            if _count(url) != leads:
                _fill(url, leads)
            if not list(models.glob("*.manifest.json")):
                _publish_forest(url, models, stage_dir / "small")
        yield Stage(url, models)


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
    with psycopg.connect(url, autocommit=True) as connection:
        people = min(_PEOPLE, leads)
        if connection.execute("SELECT count(*) FROM people").fetchone() == (0,):
            load_demo(url, people=people, seed=1, until=MOMENT)
        connection.execute(f"DROP TABLE IF EXISTS {RELATION}")
        columns = connection.execute("SELECT * FROM lead_source LIMIT 0").description or []
        kept = [column.name for column in columns if column.name not in ("lead_id", "external_ref")]
        # Random keys: the leads of a request lie on pages all over the table, as they do in a CRM.
        connection.execute(
            f"CREATE TABLE {RELATION} AS SELECT gen_random_uuid() AS lead_id, 'lead_' || n AS external_ref,"
            f" {', '.join(kept)} FROM generate_series(1, %s) AS n JOIN (SELECT row_number() OVER () AS place,"
            " * FROM lead_source) AS source ON source.place = 1 + n %% %s",
            [leads, people],
        )
        connection.execute(f"ALTER TABLE {RELATION} ADD PRIMARY KEY (lead_id)")
        connection.execute(f"CREATE UNIQUE INDEX ON {RELATION} (external_ref)")
        connection.execute(f"VACUUM ANALYZE {RELATION}")
        connection.execute("CHECKPOINT")


def _publish_forest(url: str, models: Path, small: Path) -> None:
    shutil.rmtree(small, ignore_errors=True)
    train(TrainingOptions(url=url, model_dir=small, model="random_forest", seed=1, now=MOMENT))
    bundle = ModelRegistry(ModelCatalogue(small)).load()
    rows: list[FloatArray] = []
    for chunk in fetch_all_chunks(url, RELATION, bundle.input_columns):
        built = build_features(chunk.leads, bundle.feature_set, MOMENT.timestamp())
        rows.append(apply_rules(built, bundle.safety).values)
        if sum(map(len, rows)) >= _FOREST_ROWS:
            break
    values = np.concatenate(rows)
    outcome = np.random.default_rng(1).random(len(values)) < bundle.scorer(values)
    forest = RandomForestClassifier(100, max_depth=10, n_jobs=2, random_state=1).fit(values, outcome)
    forest.n_jobs = 1
    manifest = bundle.manifest
    known = {name: getattr(manifest, name) for name in ModelDescription.__struct_fields__}
    publish_model(models, forest, ModelDescription(**known))
