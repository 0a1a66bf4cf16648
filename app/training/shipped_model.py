"""Makes the model that ships in `models/`: the demo CRM, in a throwaway database, at one fixed moment.

The same seed gives the same manifest fingerprint and the same predictions, so anybody can make it again and
compare. Never touches the service's own database. Run by `make model`.
"""

import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from app.ai.domain import Progress
from app.ai.model_manifest import manifest_fingerprint
from app.db.demo_crm import load_demo
from app.db.embedded import open_embedded
from app.db.migrations import upgrade
from app.errors import CommandError
from app.training.options import TrainingOptions
from app.training.publish import check_writable, write_durably
from app.training.report import TrainingReport, print_report
from app.training.train import train

PEOPLE, SEED = 10_000, 1
MOMENT = datetime(2026, 1, 1, 12, tzinfo=UTC)


def train_shipped_model(model_dir: Path, progress: Progress) -> TrainingReport:
    """Trains the shipped model from nothing and publishes it to `model_dir`."""
    with tempfile.TemporaryDirectory(prefix="leadscore-") as var, open_embedded(Path(var)) as url:
        upgrade(url)
        load_demo(url, people=PEOPLE, seed=SEED, until=MOMENT, progress=progress)
        return train(TrainingOptions(url=url, model_dir=model_dir, seed=SEED, now=MOMENT), progress)


def replace_shipped_model(model_dir: Path, progress: Progress) -> TrainingReport:
    """Makes the shipped model again in a directory that may hold it already; the manifest goes last.

    What is left of an earlier one, of another type perhaps, is removed: a version is one model.

    Raises:
        ArtifactError: `not_writable`.
    """
    check_writable(model_dir)
    with tempfile.TemporaryDirectory(prefix="leadscore-model-") as folder:
        report = train_shipped_model(Path(folder), progress)
        manifest_name = report.manifest_path.name
        made = sorted(Path(folder).iterdir(), key=lambda path: path.name == manifest_name)
        for path in made:
            write_durably(model_dir / path.name, path.read_bytes())
        for path in set(model_dir.glob(f"*_{report.manifest.version}.*")) - {
            model_dir / path.name for path in made
        }:
            path.unlink()
    return replace(
        report,
        manifest_path=model_dir / manifest_name,
        card_path=model_dir / report.card_path.name,
    )


def main() -> None:
    """Entry point of `make model`."""
    console = Console()
    with console.status("working") as status:

        def show(stage: str, done: int, total: int) -> None:
            status.update(f"{stage} {done:,}" + (f" of {total:,}" if total else ""))

        try:
            report = replace_shipped_model(Path("models"), show)
        except CommandError as exc:
            raise SystemExit(f"Error: {exc}") from exc
    print_report(report, console)
    console.print(f"fingerprint {manifest_fingerprint(report.manifest)}")


if __name__ == "__main__":
    main()
