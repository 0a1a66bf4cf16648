"""The commands for people: `leadscore`, also `python -m app.cli`.

Each command reads the settings, opens what it needs, calls one function and prints what came back. Nothing is
decided here. Heavy imports live inside the commands, so that `--help` and a wrong argument answer at once.
"""

# ruff: noqa: PLC0415

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from app import __version__
from app.errors import ArtifactError, CommandError, LeadScoringError, SettingsError
from app.settings import Settings, load_settings

Progress = Callable[[str, int, int], None]

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
_moment = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S%z"])


class _Commands(click.Group):
    """Turns what the project can name into one clear line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LeadScoringError as exc:
            raise click.ClickException(str(exc)) from exc


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="leadscore")
def cli() -> None:
    """Calibrated, audited lead scoring over PostgreSQL."""


@cli.command()
def serve() -> None:
    """Serve over HTTP until Ctrl-C or SIGTERM.

    Listens on HOST:PORT with WORKERS processes. With DATABASE_URL unset it starts its own PostgreSQL under VAR_DIR,
    migrates it and fills it with a demo CRM the first time.
    """
    settings = load_settings()
    # Numeric thread pools cost more than they give at these batch sizes; they read this when they are imported.
    for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(pool, "1")
    from app.serve import serve as run

    run(settings)


@cli.group()
def db() -> None:
    """Look after the database's schema."""


@db.command("upgrade")
def db_upgrade() -> None:
    """Apply every migration that is not applied yet."""
    from app.db.migrations import upgrade

    with _database(load_settings()) as url:
        upgrade(url)
    click.echo("The database is up to date.")


@cli.command()
@click.option("--people", type=click.IntRange(1, 5_000_000), default=10_000, show_default=True, help="How many leads.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="The same seed gives the same CRM.")
@click.option("--until", type=_moment, help="The last moment of the CRM's history (UTC); by default now.")
@_json_option
def demo(people: int, seed: int, until: datetime | None, as_json: bool) -> None:
    """Fill a database that has no people yet with a demo admissions CRM."""
    from app.db.demo_crm import load_demo

    with _database(load_settings()) as url, _progress() as progress:
        summary = load_demo(url, people=people, seed=seed, until=_utc(until), progress=progress)
    _print_facts(dataclasses.asdict(summary), as_json)


@cli.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--table", required=True, help="Table to create; name it in LEAD_SOURCE to serve it.")
@click.option("--id", "id_column", required=True, help="Column that identifies a lead.")
@click.option("--label", "label_column", help="Column that holds the outcome as two values.")
@click.option("--missing", multiple=True, metavar="TEXT", help="Placeholder that means missing (repeatable).")
@click.option("--replace", is_flag=True, help="Replace the table if it exists.")
@_json_option
def import_file(
    file: Path, table: str, id_column: str, label_column: str | None, missing: tuple[str, ...], replace: bool,
    as_json: bool,
) -> None:
    """Load leads from a CSV file, typed, all or nothing."""
    from app.db.csv_import import import_csv

    with _database(load_settings()) as url, _progress() as progress:
        summary = import_csv(
            url, file, table=table, id_column=id_column, label_column=label_column, missing=missing, replace=replace,
            progress=progress,
        )
    _print_facts(dataclasses.asdict(summary), as_json)


@cli.group()
def models() -> None:
    """Look at what is in the registry, and whether it can be trusted."""


def _utc(moment: datetime | None) -> datetime:
    if moment is None:
        return datetime.now(UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@contextmanager
def _database(settings: Settings) -> Iterator[str]:
    from app.serve import open_database

    with open_database(settings) as url:
        yield url


@contextmanager
def _progress() -> Iterator[Progress]:
    """Yields `progress(stage, done, total)`, drawn on standard error when a person is watching."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
              console=console, disable=not console.is_terminal)
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done, total=total)

    with bar:
        yield report


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, default=str))
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {value}")


def main() -> None:
    """Entry point of the `leadscore` program."""
    cli()


if __name__ == "__main__":
    main()
