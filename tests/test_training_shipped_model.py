"""The model that ships is the one `make model` makes from today's code."""

from pathlib import Path

import pytest

from app.ai.model_registry import ModelRegistry
from app.training.shipped_model import replace_shipped_model

MODELS = Path(__file__).resolve().parents[1] / "models"


def test_the_shipped_model_is_made_again_with_the_same_predictions(tmp_path: Path) -> None:
    shipped = ModelRegistry(MODELS, pinned_version="20260101_120000").load().manifest
    (tmp_path / "advanced_ml_random_forest_20260101_120000.skops").write_bytes(
        b"an older one, to be replaced"
    )
    report = replace_shipped_model(tmp_path, lambda *_: None)
    made = ModelRegistry(tmp_path).load().manifest
    hint = "the shipped model is not what the code makes: run `make model` and commit models/"
    assert made.feature_fingerprint == shipped.feature_fingerprint, hint
    assert made.training == shipped.training, hint
    # Not the fingerprint: another processor may round the last bit of a logarithm differently.
    assert made.golden_outputs == pytest.approx(shipped.golden_outputs, abs=1e-9), hint
    assert report.manifest_path == tmp_path / "advanced_ml_random_forest_20260101_120000.manifest.json"
    assert report.card_path.exists()


def test_the_shipped_model_is_small_and_worth_serving() -> None:
    manifest = ModelRegistry(MODELS, pinned_version="20260101_120000").load().manifest
    assert manifest.file_size < 3_000_000
    assert len(manifest.feature_set) == 20
    assert manifest.metrics["roc_auc"] > 0.8
    assert manifest.metrics["ece"] < 2 * manifest.metrics["ece_floor"]
    assert manifest.report["warnings"] == []
