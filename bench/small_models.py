"""Two small models over three columns of the bench leads, published as one version after the other.

Even and odd versions give different numbers for the same lead, so that an answer shows which of the two it
comes from. Used by proofs that swap models.
"""

from functools import cache
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from app.ai.calibration import Calibrator
from app.ai.domain import InputColumn
from app.ai.feature_safety import build_statistics
from app.ai.features import CellState, FeatureMatrix, FeatureSet, FeatureSpec
from app.ai.model_manifest import ModelDescription, TrainingFacts
from app.training.publish import publish_model

_COLUMNS = ("gpa", "touchpoint_count", "minutes_on_site")
_ROWS = np.random.default_rng(1).normal(2.5, 1.0, (400, len(_COLUMNS)))
_FEATURES = FeatureSet(
    tuple(
        FeatureSpec(name, "value", (InputColumn(name, "number"),), {}, f"The number {name}.")
        for name in _COLUMNS
    )
)


def publish_small_model(model_dir: Path, number: int) -> None:
    """Publishes the model of the parity of `number` (0 to 999,999) as a version that ends with it."""
    parity = number % 2
    statistics = build_statistics(FeatureMatrix(_ROWS, np.full(_ROWS.shape, CellState.PRESENT, np.uint8)))
    slope = 2.0 + parity
    description = ModelDescription(
        model_type="logistic_regression",
        version=f"20260101_{number:06}",
        feature_set=_FEATURES.to_json(),
        statistics=[entry.to_json() for entry in statistics],
        calibrator=Calibrator("sigmoid", {"slope": slope, "intercept": -slope / 2}, 0.01, 0.99).to_json(),
        threshold=0.5,
        base_rate=0.5,
        horizon_days=None,
        source="made_up",
        label="label",
        training=TrainingFacts(
            as_of_from=None, as_of_to=None, train_rows=400, calibrate_rows=0, test_rows=0, positives=200,
            seed=1,
        ),
        metrics={"roc_auc": 0.9},
        golden_inputs=[[*map(float, row)] for row in _ROWS[:6]],
        created_at="2026-01-01T12:00:00Z",
    )  # fmt: skip
    publish_model(model_dir, _fit(parity), description)


def remove_small_model(model_dir: Path, number: int) -> None:
    """Removes that version, if it is there."""
    for file in model_dir.glob(f"*_{number:06}.*"):
        file.unlink()


@cache
def _fit(parity: int) -> LogisticRegression:
    labels = _ROWS[:, parity] > np.median(_ROWS[:, parity])
    return LogisticRegression().fit(_ROWS, labels)
