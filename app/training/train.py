"""The story of a training, top to bottom: read, guard, split, derive, choose, calibrate, evaluate, publish.

Reads leads through the same columns and builds the same features as serving. The test part is set aside
before anything is learnt and looked at when all is fitted. Never decides which model serves. Called by the
`leadscore train` command and `app.training.shipped_model`.
"""

import time
from collections.abc import Callable

from app.ai.domain import InputColumn, Progress
from app.ai.features import FeatureSet
from app.ai.model_manifest import ModelDescription, ModelManifest, build_card_name, read_manifest
from app.training.candidates import list_candidates
from app.training.choose import choose_model
from app.training.day_one import is_day_one
from app.training.declared import build_declared_features
from app.training.derive import DerivedFeatures, derive_features
from app.training.describe import Notes, describe_model
from app.training.describe_day_one import train_day_one
from app.training.fit import FeatureBuilder
from app.training.held_out import HeldOut, look_at_held_out
from app.training.leakage import check_leakage
from app.training.model_card import build_cards
from app.training.options import TrainingOptions
from app.training.publish import check_writable, publish_model
from app.training.report import TrainingReport
from app.training.rows import TrainingRows, choose_columns, fetch_rows
from app.training.splits import split_rows


def train(options: TrainingOptions, progress: Progress = lambda *_: None) -> TrainingReport:
    """Trains, calibrates, evaluates and publishes one model.

    Raises:
        TrainingError: the data cannot be trained on, or must not be; the message says what to do.
        DatabaseUnavailableError: the database does not answer.
        ArtifactError: this version exists already, or the models directory cannot be written.
    """
    started = time.monotonic()
    check_writable(options.model_dir)
    columns, denied = choose_columns(options)
    rows, everyone, left_out = fetch_rows(options, columns, progress)
    one_each = rows.take_one_a_lead()
    if is_day_one(one_each.outcome):
        notes = Notes(denied, (), left_out)
        estimator, description = train_day_one(options, columns, one_each, everyone.take_one_a_lead(), notes)
        return _publish(options, estimator, description, lambda _: None, started)
    suspicious = check_leakage(one_each.leads, one_each.outcome, one_each.as_of, columns, options.allow_leaky)
    train_part, test_part = split_rows(rows, options.seed)
    left_out = left_out._replace(repeated=rows.leads.n - train_part.leads.n - test_part.leads.n)
    build, dropped = choose_features(options, columns, train_part)
    model = choose_model(train_part, build, list_candidates(options.model), options.seed, progress)
    notes = Notes({**denied, **dropped}, (*map(str, suspicious), *_name_unused(options)), left_out)
    description = describe_model(options, train_part, test_part, model, notes)
    return _publish(
        options,
        model.fitted.estimator,
        description,
        lambda manifest: look_at_held_out(model, test_part, manifest),
        started,
    )


def _publish(
    options: TrainingOptions,
    estimator: object,
    description: ModelDescription,
    look: Callable[[ModelManifest], HeldOut | None],
    started: float,
) -> TrainingReport:
    """Publishes a model and its card, for which `look` goes once more to the leads that were set aside."""
    manifest_path = publish_model(
        options.model_dir,
        estimator,
        description,
        options.fmt,
        options.signing_key,
        build_cards=lambda manifest: build_cards(manifest, look(manifest)),
    )
    manifest = read_manifest(manifest_path.read_bytes())
    card_path = manifest_path.with_name(build_card_name(manifest_path.name, "html"))
    return TrainingReport(manifest, manifest_path, card_path, time.monotonic() - started)


def _name_unused(options: TrainingOptions) -> list[str]:
    if options.base_rate is None:
        return []
    return ["the expected base rate is not used: there are enough outcomes to tell the real one"]


def choose_features(
    options: TrainingOptions, columns: tuple[InputColumn, ...], train_part: TrainingRows
) -> tuple[FeatureBuilder, dict[str, str]]:
    """Returns how features are built from any training rows, and what the rows at hand leave out and why.

    One row of each lead decides: what names a lead would not be told from what leads have in common.
    """

    def declare(rows: TrainingRows) -> FeatureSet:
        one_each = rows.take_one_a_lead()
        return build_declared_features(one_each.leads, one_each.outcome)

    def derive(rows: TrainingRows) -> DerivedFeatures:
        one_each = rows.take_one_a_lead()
        return derive_features(one_each.leads, one_each.outcome, one_each.as_of, columns)

    if options.declared:
        return declare, {}
    return lambda rows: derive(rows).feature_set, derive(train_part).dropped
