"""The verdict keeps its word: the less a lead is known, the worse its answer, on real leads and on the demo.

Each model is trained on some leads and asked of others, whose cells are taken away at random.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psycopg
import pytest

from app.ai.domain import VERDICTS, Column, LeadColumns
from app.ai.model_bundle import ModelBundle
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy, score_leads
from app.db.csv_import import import_csv
from app.db.demo_crm import load_demo
from app.training.options import TrainingOptions
from app.training.rows import TrainingRows, choose_columns, fetch_rows
from app.training.train import train
from app.training.verdict import build_weights, remove_cells
from tests.builders import number_features
from tests.conftest import DEMO_UNTIL
from tests.real_leads import CSV, TRAPS, needs_real_leads

POLICY = ScoringPolicy(min_coverage=0.6, confidence_method="margin")
OK, CAUTION, ABSTAIN = range(3)


@pytest.fixture(scope="module")
def real_options(
    create_database: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> TrainingOptions:
    url = create_database("verdict_real")
    import_csv(
        url, CSV, table="leads", id_column="Prospect ID", label_column="Converted", missing=("Select",)
    )
    return TrainingOptions(url=url, model_dir=tmp_path_factory.mktemp("real"), source="leads",
                           label="converted", exclude=TRAPS, model="random_forest")  # fmt: skip


@pytest.fixture(scope="module")
def demo_options(
    create_database: Callable[..., str], migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> TrainingOptions:
    url = create_database("verdict_demo", migrated_template)
    load_demo(url, people=6000, seed=1, until=DEMO_UNTIL)
    return TrainingOptions(url=url, model_dir=tmp_path_factory.mktemp("demo"), features="declared",
                           now=DEMO_UNTIL, model="random_forest")  # fmt: skip


def train_and_set_aside(options: TrainingOptions) -> tuple[ModelBundle, TrainingRows]:
    """Trains on half of the leads; returns the model and the decided leads of the other half."""
    with psycopg.connect(options.url) as connection:
        for name, half in (("seen", "= 0"), ("unseen", "= 1")):
            connection.execute(
                f"CREATE VIEW {name} AS SELECT * FROM {options.source} "
                f"WHERE get_byte(uuid_send(lead_id), 15) % 2 {half}"
            )
    train(replace(options, source="seen"))
    others = replace(options, source="unseen")
    return ModelRegistry(ModelCatalogue(options.model_dir)).load(), fetch_rows(
        others, choose_columns(others)[0], lambda *_: None
    )[0]


def brier_by_verdict(bundle: ModelBundle, rows: TrainingRows) -> list[float]:
    random, errors, verdicts = np.random.default_rng(7), [], []
    for _ in range(5):
        answers = score_leads(bundle, remove_cells(rows.leads, random), rows.as_of, POLICY).answers
        errors.append((answers["probability"] - rows.outcome) ** 2)
        verdicts.append(answers["verdict"])
    every, verdict = np.concatenate(errors), np.concatenate(verdicts)
    assert min(np.bincount(verdict, minlength=len(VERDICTS))) > 200
    return [float(every[verdict == code].mean()) for code in range(len(VERDICTS))]


def check_honest(bundle: ModelBundle, rows: TrainingRows, record: Callable[[str, object], None]) -> None:
    weights = bundle.manifest.feature_weights or []
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1)
    brier = brier_by_verdict(bundle, rows)
    for verdict, score in zip(VERDICTS, brier, strict=True):
        record(verdict, round(score, 4))
    assert brier[OK] < brier[CAUTION] < brier[ABSTAIN]
    intact = score_leads(bundle, rows.leads, rows.as_of, POLICY).answers["verdict"]
    assert (intact == OK).mean() > 0.9
    empty = score_leads(bundle, empty_leads(rows.leads), rows.as_of[:1], POLICY).answers
    assert (empty["verdict"][0], empty["coverage"][0]) == (ABSTAIN, 0.0)
    assert empty["probability"][0] == bundle.manifest.base_rate


def empty_leads(like: LeadColumns) -> LeadColumns:
    gone = {
        name: Column(
            one.kind, np.array([""], object) if one.kind == "text" else np.array([np.nan]), np.array([False])
        )
        for name, one in like.columns.items()
    }
    return LeadColumns(1, gone)


@needs_real_leads
def test_real_leads_are_answered_worse_from_ok_to_caution_to_abstain(
    real_options: TrainingOptions, record_property: Callable[[str, object], None]
) -> None:
    check_honest(*train_and_set_aside(real_options), record_property)


def test_demo_leads_are_answered_worse_from_ok_to_caution_to_abstain(
    demo_options: TrainingOptions, record_property: Callable[[str, object], None]
) -> None:
    check_honest(*train_and_set_aside(demo_options), record_property)


def test_weights_follow_the_root_of_what_shuffling_loses() -> None:
    weights = build_weights({"a": 0.09, "b": 0.01, "c": -0.02}, number_features("a", "b", "c"))
    assert weights == pytest.approx([0.75, 0.25, 0.0])


def test_where_no_feature_is_worth_anything_all_weigh_the_same() -> None:
    assert build_weights({"a": 0.0, "b": -0.01}, number_features("a", "b")) == [0.5, 0.5]


def test_cells_are_only_ever_taken_away_and_each_lead_loses_a_share_of_its_own(
    demo_options: TrainingOptions,
) -> None:
    rows, _ = fetch_rows(demo_options, choose_columns(demo_options)[0], lambda *_: None)
    before = {name: column.values.copy() for name, column in rows.leads.columns.items()}
    left = remove_cells(rows.leads, np.random.default_rng(0))
    for name, column in left.columns.items():
        assert not (column.present & ~rows.leads.columns[name].present).any()
        np.testing.assert_array_equal(rows.leads.columns[name].values, before[name])
    share = np.mean([column.present for column in left.columns.values()], axis=0)
    assert share.min() < 0.1
    assert share.max() > 0.8
