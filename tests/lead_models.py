"""A small real model over the columns of `lead_source`, for tests of the whole service."""

import math
from pathlib import Path

import numpy as np
from sklearn.ensemble import RandomForestClassifier

from app.ai.artifact_loading import dump_estimator
from app.ai.calibration import Calibrator
from app.ai.domain import InputColumn
from app.ai.feature_safety import build_statistics
from app.ai.features import FeatureMatrix, FeatureSet, FeatureSpec, build_features
from app.ai.model_bundle import ModelBundle, load_bundle
from app.ai.model_manifest import ModelDescription, TrainingFacts, read_manifest
from app.ai.venn_abers import build_table
from app.training.publish import build_manifest, publish_model
from tests.fakes import build_columns

VERSION = "20260101_120000"
AS_OF = 1_780_272_000.0  # 2026-06-01T00:00:00Z
DAY = 86_400.0

FEATURES = FeatureSet(
    (
        FeatureSpec("gpa", "value", (InputColumn("gpa", "number"),), {}, "Grade point average."),
        FeatureSpec("minutes", "log1p", (InputColumn("minutes_on_site", "number"),), {}, "Time on the site."),
        FeatureSpec("contacts", "value", (InputColumn("touchpoint_count", "number"),), {}, "Touchpoints."),
        FeatureSpec("newsletter", "flag", (InputColumn("newsletter_opt_in", "boolean"),), {}, "Subscribed."),
        FeatureSpec("age", "age_days", (InputColumn("created_at", "timestamp"),), {}, "Age of the lead."),
        FeatureSpec(
            "source",
            "level",
            (InputColumn("source", "text"),),
            {"levels": {"referral": 0.9, "open_day": 0.7, "website": 0.4, "fair": 0.3}},
            "Where the lead came from.",
        ),
        FeatureSpec(
            "fee", "value", (InputColumn("tuition_fee", "number"),), {}, "Tuition fee.", invalid="reject"
        ),
    )
)


def build_lead_rows(n: int, seed: int) -> list[dict[str, object]]:
    """Returns made-up leads with gaps."""
    rng = np.random.default_rng(seed)
    sources = ["referral", "open_day", "website", "fair", "carrier pigeon"]

    def maybe(value: object) -> object:
        return None if rng.random() < 0.15 else value

    return [
        {
            "gpa": maybe(float(rng.uniform(1, 4))),
            "minutes_on_site": maybe(float(rng.exponential(20))),
            "touchpoint_count": float(rng.poisson(4)),
            "newsletter_opt_in": maybe(bool(rng.random() < 0.4)),
            "created_at": AS_OF - float(rng.uniform(1, 200)) * DAY,
            "source": maybe(str(rng.choice(sources))),
            "tuition_fee": float(rng.uniform(1000, 9000)),
        }
        for _ in range(n)
    ]


def describe_model(version: str = VERSION, seed: int = 1) -> tuple[RandomForestClassifier, ModelDescription]:
    """Returns a fitted forest and its description."""
    matrix = build_features(
        build_columns(build_lead_rows(600, seed), FEATURES.input_columns), FEATURES, AS_OF
    )
    filled = np.nan_to_num(matrix.values, nan=0.0)
    chance = 1 / (1 + np.exp(-(filled[:, 0] - 2.5 + 0.2 * (filled[:, 2] - 4))))
    outcome = (np.random.default_rng(seed).random(len(chance)) < chance).astype(int)
    forest = RandomForestClassifier(12, max_depth=5, random_state=seed, class_weight="balanced")
    forest.fit(filled, outcome)
    statistics = build_statistics(FeatureMatrix(matrix.values, matrix.states))
    description = ModelDescription(
        model_type="random_forest",
        version=version,
        feature_set=FEATURES.to_json(),
        statistics=[entry.to_json() for entry in statistics],
        calibrator=Calibrator("sigmoid", {"slope": 4.0, "intercept": -2.2}, 0.01, 0.99).to_json(),
        threshold=0.5,
        base_rate=float(outcome.mean()),
        horizon_days=90,
        source="made_up",
        label="label",
        training=TrainingFacts(
            as_of_from=None,
            as_of_to=None,
            train_rows=600,
            calibrate_rows=0,
            test_rows=0,
            positives=int(outcome.sum()),
            seed=seed,
        ),
        metrics={"accuracy": 0.7, "precision": 0.6, "recall": 0.5, "f1_score": 0.55, "roc_auc": 0.75},
        golden_inputs=[[None if math.isnan(v) else v for v in row] for row in matrix.values[:5].tolist()],
        created_at="2026-01-01T12:00:00Z",
        venn_abers=build_table(forest.predict_proba(filled)[:, 1], outcome).to_json(),
    )
    return forest, description


def publish_lead_model(directory: Path, version: str = VERSION, seed: int = 1) -> Path:
    """Publishes the model and returns the path of its artifact."""
    manifest_path = publish_model(directory, *describe_model(version, seed))
    return directory / read_manifest(manifest_path.read_bytes()).file_name


def build_lead_bundle(version: str = VERSION, seed: int = 1) -> ModelBundle:
    """Returns the model as the registry would hold it, without touching the disk."""
    estimator, description = describe_model(version, seed)
    data = dump_estimator(estimator, "skops")
    return load_bundle(build_manifest(estimator, description, data, "skops"), data)
