"""The model that ships is the one `make model` makes from today's code."""

from pathlib import Path

import pytest

from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.training.candidates import CANDIDATES
from app.training.report import TrainingReport
from app.training.shipped_model import main, replace_shipped_model

MODELS = Path(__file__).resolve().parents[1] / "models"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TrainingReport:
    folder = tmp_path_factory.mktemp("made")
    for model_type in ("random_forest", "logistic_regression"):
        for suffix in (".skops", ".manifest.json", ".card.html"):
            older = folder / f"advanced_ml_{model_type}_20260101_120000{suffix}"
            older.write_bytes(b"an older one, to be replaced")
    return replace_shipped_model(folder, lambda *_: None)


def test_the_intervals_cover_the_demos_held_out_leads_in_14_of_15_bins(report: TrainingReport) -> None:
    told = report.manifest.report["interval_coverage"]
    assert told["bins"] == 15
    assert told["covered"] >= 14
    assert 0 < told["mean_width"] < 0.05
    assert sum(leads for *_, leads in told["rows"]) == report.manifest.training.test_rows > 1000


def test_the_shipped_model_is_made_again_with_the_same_predictions(report: TrainingReport) -> None:
    shipped = ModelRegistry(ModelCatalogue(MODELS), pinned_version="20260101_120000").load().manifest
    folder = report.manifest_path.parent
    made = ModelRegistry(ModelCatalogue(folder)).load().manifest
    hint = "the shipped model is not what the code makes: run `make model` and commit models/"
    assert made.feature_fingerprint == shipped.feature_fingerprint, hint
    assert made.training == shipped.training, hint
    # Not the fingerprint: another processor may round the last bit of a logarithm differently.
    assert made.golden_outputs == pytest.approx(shipped.golden_outputs, abs=1e-9), hint


def test_the_default_chooses_among_all_candidates_and_publishes_the_one_it_chose(
    report: TrainingReport,
) -> None:
    choice = report.manifest.report["choice"]
    assert choice["order"] == "time"
    assert {one["name"] for one in choice["candidates"]} == {candidate.name for candidate in CANDIDATES}
    best, second = choice["candidates"][:2]
    assert (choice["chosen"], choice["runner_up"]) == (best["name"], second["name"])
    assert report.manifest.model_type == best["model_type"]
    assert report.manifest.calibrator["method"] == choice["calibrator"]
    assert report.manifest.training.train_rows > report.manifest.training.test_rows


def test_nothing_is_left_of_an_older_one_of_any_type(report: TrainingReport) -> None:
    stem = f"advanced_ml_{report.manifest.model_type}_20260101_120000"
    folder = report.manifest_path.parent
    assert {path.name for path in folder.iterdir()} == {
        f"{stem}{suffix}" for suffix in (".skops", ".manifest.json", ".card.md", ".card.html")
    }
    assert b"an older one" not in report.card_path.read_bytes()


def test_a_models_directory_that_cannot_be_written_is_one_line_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").write_text("a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == "Error: models cannot be written: file exists."


def test_the_shipped_model_is_small_and_worth_serving() -> None:
    manifest = ModelRegistry(ModelCatalogue(MODELS), pinned_version="20260101_120000").load().manifest
    assert manifest.file_size < 3_000_000
    assert len(manifest.feature_set) == 20
    assert manifest.metrics["roc_auc"] > 0.8
    assert manifest.metrics["ece"] < 2 * manifest.metrics["ece_floor"]
    assert manifest.report["warnings"] == []
