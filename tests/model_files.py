"""Small real models, published into a directory, and ways to damage or forge what was published."""

import hashlib
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from app.ai.calibration import Calibrator
from app.ai.domain import InputColumn
from app.ai.feature_safety import build_statistics
from app.ai.features import CellState, FeatureMatrix, FeatureSet, FeatureSpec
from app.ai.model_manifest import (
    MANIFEST_SUFFIX,
    ModelDescription,
    ModelManifest,
    TrainingFacts,
    build_model_id,
    build_signature_name,
    encode_manifest,
    read_manifest,
    seal_manifest,
)
from app.ai.model_signature import sign_manifest
from app.training.publish import publish_model

V1, V2, V3 = "20260101_120000", "20260201_120000", "20260301_120000"

ROWS = np.random.default_rng(11).normal(size=(400, 3))
LABELS = (ROWS[:, 0] + 0.5 * np.random.default_rng(12).normal(size=400) > 0).astype(int)
FEATURES = FeatureSet(
    tuple(
        FeatureSpec(name, "value", (InputColumn(name, "number"),), {}, f"The number {name}.")
        for name in "abc"
    )
)
GOLDEN = [[*map(float, row)] for row in ROWS[:6]] + [
    [None, 0.5, None],
    [None, None, None],
    [99.0, -99.0, 0.0],
]


@cache
def fitted(model_type, seed=1):
    """Returns a fitted estimator; another seed gives another model."""
    estimators = {
        "random_forest": RandomForestClassifier(8, max_depth=4, random_state=seed),
        "gradient_boosting": HistGradientBoostingClassifier(
            max_iter=5, random_state=seed, max_leaf_nodes=4 + seed
        ),
        "logistic_regression": LogisticRegression(C=1.0 / seed),
    }
    return estimators[model_type].fit(ROWS, LABELS)


def describe(version=V1, model_type="logistic_regression", **changes):
    """Returns the description of a model of `fitted`."""
    statistics = build_statistics(FeatureMatrix(ROWS, np.full(ROWS.shape, CellState.PRESENT, np.uint8)))
    fields = {
        "model_type": model_type,
        "version": version,
        "feature_set": FEATURES.to_json(),
        "statistics": [entry.to_json() for entry in statistics],
        "calibrator": Calibrator("sigmoid", {"slope": 4.0, "intercept": -2.0}, 0.01, 0.99).to_json(),
        "threshold": 0.5,
        "base_rate": float(LABELS.mean()),
        "horizon_days": None,
        "source": "made_up",
        "label": "label",
        "training": TrainingFacts(
            as_of_from=None,
            as_of_to=None,
            train_rows=400,
            calibrate_rows=0,
            test_rows=0,
            positives=int(LABELS.sum()),
            seed=1,
        ),
        "metrics": {"roc_auc": 0.9},
        "golden_inputs": GOLDEN,
        "created_at": "2026-01-01T12:00:00Z",
    }
    return ModelDescription(**{**fields, **changes})


def publish(
    directory,
    version=V1,
    model_type="logistic_regression",
    *,
    fmt="joblib",
    seed=1,
    signing_key=None,
    cards=None,
    **changes,
):
    """Publishes a small model, with these texts as its cards, and returns the path of its artifact."""
    manifest_path = publish_model(
        directory,
        fitted(model_type, seed),
        describe(version, model_type, **changes),
        fmt,
        signing_key,
        build_cards=lambda _: cards or {},
    )
    return directory / read_manifest(manifest_path.read_bytes()).file_name


def manifest_of(artifact: Path) -> Path:
    """Returns the path of the manifest beside an artifact."""
    return artifact.with_name(artifact.name.removesuffix(artifact.suffix) + MANIFEST_SUFFIX)


def signature_of(artifact: Path) -> Path:
    """Returns the path of the signature beside an artifact's manifest."""
    return artifact.with_name(build_signature_name(manifest_of(artifact).name))


def sign(artifact: Path, key: Ed25519PrivateKey) -> None:
    """Signs the manifest of an artifact as it is, without looking at it."""
    signature_of(artifact).write_bytes(sign_manifest(manifest_of(artifact).read_bytes(), key))


def read(artifact: Path) -> ModelManifest:
    """Returns the manifest beside an artifact."""
    return read_manifest(manifest_of(artifact).read_bytes())


def forge(artifact: Path, data: bytes | None = None, **changes) -> None:
    """Replaces the artifact's bytes and fields of its manifest, with every digest made right again."""
    manifest = read(artifact)
    if data is not None:
        artifact.write_bytes(data)
        changes = {"file_size": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}
    manifest_of(artifact).write_bytes(
        encode_manifest(seal_manifest(msgspec.structs.replace(manifest, **changes)))
    )


def republish_as(artifact: Path, version: str) -> Path:
    """Copies a published model under another version, sealed; returns the path of the copy."""
    manifest = read(artifact)
    name = manifest.file_name.replace(manifest.version, version)
    changed = msgspec.structs.replace(
        manifest, version=version, model_id=build_model_id(version), file_name=name
    )
    copy = artifact.with_name(name)
    copy.write_bytes(artifact.read_bytes())
    manifest_of(copy).write_bytes(encode_manifest(seal_manifest(changed)))
    return copy


class FakeClock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
