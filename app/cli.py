"""The commands for people: `leadscore`, also `python -m app.cli`.

Each command reads the settings, opens what it needs, calls one function and prints what came back. Nothing is
decided here. Heavy imports live inside the commands, so that `--help` and a wrong argument answer at once.
"""

# ruff: noqa: PLC0415

import dataclasses
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from app import __version__
from app.errors import ArtifactError, LeadScoringError, ModelNotReadyError, SettingsError

if TYPE_CHECKING:
    from app.ai.domain import Progress
    from app.ai.model_bundle import ModelBundle
    from app.ai.model_catalogue import AvailableModel, Incompatible, ModelCatalogue
    from app.ai.served_versions import ServedVersions
    from app.security.access import Scope
    from app.settings import Settings

ModelType = Literal["auto", "random_forest", "logistic_regression", "hist_gradient_boosting"]
ArtifactFormat = Literal["skops", "joblib"]


def _names(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


_SHOWN_RATE = 10  # steps a second
_ONE_OUTCOME = "Give --label or --outcome: one column says what became of a lead."

_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
)
_existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)
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
    import structlog

    # What a command prints is its result, which may be read by a program; its log is not part of it.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


@cli.command()
def serve() -> None:
    """Serve over HTTP until Ctrl-C or SIGTERM.

    Listens on HOST:PORT with WORKERS processes. With DATABASE_URL unset it starts its own PostgreSQL under
    VAR_DIR, migrates it and fills it with a demo CRM the first time.
    """
    from app.ai.artifact_process import dismiss, prepare

    prepare()  # it takes longest: beside all that is imported and opened from here on
    try:
        settings = _settings()
        if settings.workers > 1:
            dismiss()  # each of them starts one of its own
        # Numeric thread pools cost more than they give at these batch sizes; they read this at import.
        for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(pool, "1")
        from app.serve import serve as run

        run(settings)
    finally:
        dismiss()


@cli.group()
def db() -> None:
    """Look after the database's schema."""


@db.command("upgrade")
def db_upgrade() -> None:
    """Apply every migration that is not applied yet."""
    from app.db.migrations import upgrade

    with _database(_settings()) as url:
        upgrade(url)
    click.echo("The database is up to date.")


@cli.command()
@click.option(
    "--people", type=click.IntRange(1, 5_000_000), default=10_000, show_default=True, help="How many leads."
)
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, help="The same seed gives the same CRM."
)
@click.option("--until", type=_moment, help="The last moment of the CRM's history (UTC); by default now.")
@_json_option
def demo(people: int, seed: int, until: datetime | None, as_json: bool) -> None:
    """Fill a database that has no people yet with a demo admissions CRM."""
    from app.db.demo_crm import load_demo

    with _database(_settings()) as url, _progress() as progress:
        summary = load_demo(url, people=people, seed=seed, until=_utc(until), progress=progress)
    _print_facts(dataclasses.asdict(summary), as_json)


@cli.command("import")
@click.argument("file", type=_existing_file)
@click.option("--table", required=True, help="Table to create; name it in LEAD_SOURCE to serve it.")
@click.option("--id", "id_column", required=True, help="Column that identifies a lead.")
@click.option(
    "--label",
    "label_column",
    help="Column that holds the outcome: yes/no, true/false, y/n, t/f, 1/0, or two words and --positive.",
)
@click.option("--positive", metavar="WORD", help="The word in the label that means yes (won of won/lost).")
@click.option("--missing", multiple=True, metavar="TEXT", help="Placeholder that means missing (repeatable).")
@click.option("--replace", is_flag=True, help="Replace the table if it exists.")
@_json_option
def import_file(
    *,
    file: Path,
    table: str,
    id_column: str,
    label_column: str | None,
    positive: str | None,
    missing: tuple[str, ...],
    replace: bool,
    as_json: bool,
) -> None:
    """Load leads from a CSV file, typed, all or nothing.

    FILE is in UTF-8 and its first line names the columns, separated by commas, semicolons, tabs or bars. An
    empty value is missing. A column is

    \b
    numbers  where every value is like 1234.50 or 1.2e3: no decimal comma, thousands
             mark, currency or percent sign; a leading zero makes it a code, and text
    times    where every value is like 2026-01-31 or 2026-01-31T23:59:00+01:00
             (UTC without an offset)
    yes/no   where the values are yes/no, true/false, y/n or t/f
    text     otherwise

    Nothing is guessed: where text looks like numbers or dates written otherwise, a hint says so.
    """  # noqa: D301  (click asks for the escape)
    from app.db.csv_import import import_csv

    if positive is not None and label_column is None:
        raise click.UsageError("Give --label as well: --positive is a word of that column.")
    with _database(_settings()) as url, _progress() as progress:
        summary = import_csv(
            url,
            file,
            table=table,
            id_column=id_column,
            label_column=label_column,
            positive=positive,
            missing=missing,
            replace=replace,
            progress=progress,
        )
    facts = dataclasses.asdict(summary)
    columns = () if as_json else facts.pop("columns")
    _print_facts(facts, as_json)
    for column in columns:
        click.echo(
            f"  {column['name']}: {column['kind']}, {column['missing']:,} missing ({column['header']})"
        )
    if summary.unaskable_ids and not as_json:
        click.echo(
            f"hint: IDs that cannot be asked for over HTTP: {summary.unaskable_ids:,} (allowed are 1 to 64 of"
            " A-Z a-z 0-9 . _ : @ -, a letter or digit first); ask for those leads by their lead_id"
        )
    for column in columns:
        for hint in column["hints"]:
            click.echo(f"hint: {column['name']} is text: {hint}")


@cli.command()
@click.option(
    "--source", default="lead_training", show_default=True, metavar="RELATION", help="Table or view to read."
)
@click.option(
    "--label", metavar="COLUMN", help="0/1 outcome; by default: outcome_at within the horizon after as_of."
)
@click.option(
    "--outcome",
    metavar="COLUMN",
    help="Time of the outcome, empty where there is none (yet); counted from as_of or else created_at.",
)
@click.option(
    "--horizon-days", type=click.IntRange(1, 3650), default=90, show_default=True, help="Outcome horizon."
)
@click.option("--exclude", metavar="A,B", default="", callback=_names, help="Columns the model must not see.")
@click.option(
    "--allow-leaky", metavar="A,B", default="", callback=_names, help="Columns the leakage guard lets pass."
)
@click.option(
    "--model",
    type=click.Choice(get_args(ModelType)),
    default="auto",
    show_default=True,
    help="Model type; auto compares all of them and takes the one with the lowest log-loss.",
)
@click.option(
    "--base-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of leads you expect to reach the outcome; needed while none is decided, used while few are.",
)
@click.option("--format", "fmt", type=click.Choice(["skops", "joblib"]), default="skops", show_default=True)
@click.option("--as-of", type=_moment, help="Train as if it were this moment (UTC); by default now.")
@click.option("--since", type=_moment, help="Leave out leads of an earlier time (UTC).")
@click.option(
    "--order-by",
    metavar="COLUMN",
    help="Time or number that rises as leads come in; by default as_of or created_at. Never a feature.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Same seed and data, same model.",
)
@click.option("--sign-key", type=_existing_file, help="Sign what is published with this private key.")
@_json_option
def train(
    *,
    source: str,
    label: str | None,
    outcome: str | None,
    horizon_days: int,
    exclude: tuple[str, ...],
    allow_leaky: tuple[str, ...],
    model: ModelType,
    base_rate: float | None,
    fmt: ArtifactFormat,
    as_of: datetime | None,
    since: datetime | None,
    order_by: str | None,
    seed: int,
    sign_key: Path | None,
    as_json: bool,
) -> None:
    """Train, calibrate, evaluate on leads nothing has seen, and publish to ML_MODEL_DIR."""
    from rich.console import Console

    from app.training.options import TrainingOptions
    from app.training.report import print_report
    from app.training.signing import read_key_file
    from app.training.train import train as run

    if label and outcome:
        raise click.UsageError(_ONE_OUTCOME)
    settings = _settings()
    with _database(settings) as url, _progress() as progress:
        options = TrainingOptions(
            url=url,
            model_dir=settings.ml_model_dir,
            source=source,
            label=label,
            outcome=outcome or "outcome_at",
            horizon_days=horizon_days,
            exclude=exclude,
            allow_leaky=allow_leaky,
            model=model,
            base_rate=base_rate,
            fmt=fmt,
            as_of=_utc(as_of) if as_of else None,
            since=_utc(since) if since else None,
            order_by=order_by,
            seed=seed,
            signing_key=read_key_file(sign_key) if sign_key else None,
        )
        report = run(options, progress)
    if as_json:
        click.echo(json.dumps(report.facts()))
    else:
        print_report(report, Console())


@cli.command()
@click.option("--source", metavar="RELATION", help="Table or view to read; by default the model's own.")
@click.option("--label", metavar="COLUMN", help="0/1 outcome; by default the model's own label or outcome.")
@click.option(
    "--outcome", metavar="COLUMN", help="Time of the outcome, counted over the model's horizon (or 90 days)."
)
@click.option("--as-of", type=_moment, help="The moment up to which anything is known (UTC); by default now.")
@click.option(
    "--model",
    "version",
    metavar="VERSION",
    help="Version to evaluate; by default ML_MODEL_VERSION, or the newest.",
)
@_json_option
def evaluate(
    *,
    source: str | None,
    label: str | None,
    outcome: str | None,
    as_of: datetime | None,
    version: str | None,
    as_json: bool,
) -> None:
    """Measure a published model on leads whose outcome is known, answered as the service would."""
    from rich.console import Console

    from app.ai.predictor import ScoringPolicy
    from app.training.evaluation import evaluate_model
    from app.training.options import TrainingOptions
    from app.training.report import print_evaluation

    if label and outcome:
        raise click.UsageError(_ONE_OUTCOME)
    settings = _settings()
    bundle = _load_model(settings, version or settings.ml_model_version)
    manifest = bundle.manifest
    if not label and not outcome:
        label, outcome = (None, manifest.label) if manifest.horizon_days else (manifest.label, None)
    policy = ScoringPolicy(settings.ml_min_feature_coverage, settings.ml_confidence_method)
    with _database(settings) as url, _progress() as progress:
        options = TrainingOptions(
            url=url,
            model_dir=settings.ml_model_dir,
            source=source or manifest.source,
            label=label,
            outcome=outcome or "outcome_at",
            horizon_days=manifest.horizon_days or 90,
            as_of=_utc(as_of) if as_of else None,
        )
        evaluation = evaluate_model(options, bundle, policy, progress)
    if as_json:
        click.echo(json.dumps(evaluation.facts()))
    else:
        print_evaluation(evaluation, Console())


@cli.command()
@_json_option
def score(*, as_json: bool) -> None:
    """Score every lead of LEAD_SOURCE with the active model, into the table lead_scores."""
    from app.ai.predictor import ScoringPolicy
    from app.ai.served_versions import ServedVersions
    from app.bulk_scoring import score_source
    from app.db.leads import fetch_columns
    from app.wiring import find_incompatibility

    settings = _settings()
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    policy = ScoringPolicy(settings.ml_min_feature_coverage, settings.ml_confidence_method)
    with _database(settings) as url, _progress() as progress:
        columns = fetch_columns(url, settings.lead_source)
        # Chosen as the service chooses: what is recorded here as served binds the service, too.
        bundle = _load_model(
            settings,
            settings.ml_model_version,
            ServedVersions(settings.var_dir),
            lambda manifest: find_incompatibility(manifest, columns),
        )
        summary = score_source(
            url, settings.lead_source, bundle, as_of=today, policy=policy, progress=progress
        )
    _print_facts(dataclasses.asdict(summary), as_json)


@cli.group()
def models() -> None:
    """Look at what is in the registry, whether it can be trusted, and sign it."""


@models.command("list")
@_json_option
def models_list(as_json: bool) -> None:
    """List every artifact found; hashes are verified, nothing is loaded."""
    _print_models(_catalogue(_settings()).list_models(), as_json)


@models.command("verify")
@_json_option
def models_verify(as_json: bool) -> None:
    """Load every artifact through the full gate; exit status 1 if any cannot be trusted, or none is found."""
    catalogue = _catalogue(_settings())
    with _progress() as progress:
        found = catalogue.verify_models(progress)
    _print_models(found, as_json)
    bad = [model.file for model in found if model.state != "verified"]
    if bad or not found:
        raise ArtifactError(
            "refused", f"not verified: {', '.join(bad)}" if bad else "there is no model to verify"
        )


@models.command("keygen")
@click.argument("file", type=click.Path(path_type=Path))
def models_keygen(file: Path) -> None:
    """Make a private key to sign models with, in a new FILE that only you can read.

    Prints the public key as a line for the environment of the service. Keep FILE away from where models are
    served.
    """
    from app.training.signing import make_key_file

    click.echo(f"ML_TRUSTED_KEYS={make_key_file(file)}")


@models.command("sign")
@click.argument("version")
@click.option("--key", "key_file", required=True, type=_existing_file, help="Private key of `models keygen`.")
def models_sign(version: str, key_file: Path) -> None:
    """Sign the manifest of VERSION, or of every version with the word `all`; hashes are verified first."""
    from app.training.signing import read_key_file, sign_models

    settings = _settings()
    key = read_key_file(key_file)
    only = None if version == "all" else version
    for name in sign_models(settings.ml_model_dir, settings.ml_model_pattern, only, key):
        click.echo(f"signed: {name}")


@cli.group()
def keys() -> None:
    """Look after the API keys of clients (AUTH_MODE=api_key)."""


@keys.command("create")
@click.option("--client", required=True, metavar="NAME", help="Whose key it is.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["score", "read", "admin"]),
    multiple=True,
    required=True,
    help="What it allows (repeatable): predictions; health, models, metrics, API description; both.",
)
@_json_option
def keys_create(client: str, scopes: "tuple[Scope, ...]", as_json: bool) -> None:
    """Make a key and show it, this once; a client may have two at a time."""
    from app.db.api_keys import create_key

    settings = _settings()
    if settings.auth_key_pepper is None:
        raise SettingsError("AUTH_KEY_PEPPER: must be set to make keys, to what the service has")
    with _database(settings) as url:
        key = create_key(url, client, scopes, settings.auth_key_pepper.get_secret_value().encode())
    _print_facts({"id": key.partition(".")[0], "client": client, "key": key}, as_json)


@keys.command("list")
@_json_option
def keys_list(as_json: bool) -> None:
    """List every key by its ID, the revoked ones too; a key itself is never shown."""
    from app.db.api_keys import list_keys

    with _database(_settings()) as url:
        rows = list_keys(url)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows], default=str))
        return
    for row in rows:
        state = f"revoked {row.revoked_at:%Y-%m-%d %H:%M}" if row.revoked_at else "live"
        click.echo(
            f"{row.id}  {row.client:<24} {','.join(row.scopes):<16} {row.created_at:%Y-%m-%d}  {state}"
        )


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
def keys_revoke(key_id: str) -> None:
    """End a key; the service refuses it within five seconds."""
    from app.db.api_keys import revoke_key

    with _database(_settings()) as url:
        revoke_key(url, key_id)
    click.echo(f"{key_id} is revoked.")


def _load_model(
    settings: "Settings",
    version: str | None,
    served: "ServedVersions | None" = None,
    incompatible: "Incompatible" = lambda _: None,
) -> "ModelBundle":
    from app.ai.model_registry import REMEDIES, ModelRegistry

    catalogue = _catalogue(settings, incompatible)
    registry = ModelRegistry(catalogue, served=served, pinned_version=version)
    try:
        return registry.load()
    except ModelNotReadyError as exc:
        reason = registry.status().reason or "internal_error"
        remedy = REMEDIES.get(reason, "`leadscore models list` shows what is there")
        if reason == "incompatible":
            sentences = (
                f"why: {model.reason}".rstrip(".")
                for model in registry.available()
                if model.state == "incompatible" and version in {None, model.version}
            )
            remedy = next(sentences, remedy)
        if reason == "no_artifact":
            there = [artifact.version for artifact in catalogue.find() if artifact.manifest_name]
            remedy = f"the newest there: {', '.join(there[:5])}" if there else remedy
        raise ArtifactError(
            reason,
            f"{f'no model {version}' if version else 'no model'} in {settings.ml_model_dir} can be loaded "
            f"({reason}); {remedy}.",
        ) from exc
    finally:
        registry.close()


def _catalogue(settings: "Settings", incompatible: "Incompatible" = lambda _: None) -> "ModelCatalogue":
    from app.ai.model_catalogue import ModelCatalogue

    if not settings.ml_model_dir.is_dir():
        raise SettingsError(f"ML_MODEL_DIR: there is no directory {settings.ml_model_dir.resolve()}")
    return ModelCatalogue(
        settings.ml_model_dir,
        settings.ml_model_pattern,
        incompatible=incompatible,
        trusted_keys=settings.ml_trusted_keys,
    )


def _print_models(found: "Sequence[AvailableModel]", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(model) for model in found]))
        return
    for model in found:
        reason = f"  ({model.reason})" if model.reason else ""
        signature = f"signed by {model.signed_by}" if model.signed_by else f"signature {model.signature}"
        click.echo(
            f"{model.version}  {model.model_type:<24} {model.state:<12} {signature:<26} {model.file}{reason}"
        )


def _utc(moment: datetime | None) -> datetime:
    if moment is None:
        return datetime.now(UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _settings() -> "Settings":
    from app.settings import load_settings

    return load_settings()


@contextmanager
def _database(settings: "Settings") -> Iterator[str]:
    from app.serve import open_database

    with open_database(settings) as url:
        yield url


@contextmanager
def _progress() -> Iterator["Progress"]:
    """Yields `progress(stage, done, total)`, drawn on standard error when a person is watching."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=None, completed=done, rate="")
        bar.update(tasks[stage], completed=done, total=total or None)  # 0: nobody knows yet
        task = next(task for task in bar.tasks if task.id == tasks[stage])
        # A stage of a few long steps has no rate worth reading.
        if task.speed and task.speed >= _SHOWN_RATE:
            bar.update(task.id, rate=f"{task.speed:,.0f}/s, left")

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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign the terminal cannot show is no reason to fail
    try:
        cli()
    except OSError as exc:
        *_, (frame, _) = traceback.walk_tb(exc.__traceback__)
        if frame.f_globals["__name__"].partition(".")[0] not in {"click", "rich"}:  # whatever prints
            raise
        with suppress(OSError):
            click.echo(f"Error: output cannot be written: {os.strerror(exc.errno or 0)}", err=True)
        # What is still to be written would fail once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
