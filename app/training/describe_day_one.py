"""The story of a day-one training: guard, fit, describe.

The description has no held-out metrics, because there is nothing to measure them on; it says how many
outcomes the model knows, and from how many on to train again. Pure. Called by `app.training.train`.
"""

from dataclasses import replace

from sklearn.pipeline import Pipeline

from app.ai.calibration import Calibrator
from app.ai.domain import InputColumn
from app.ai.model_manifest import ModelDescription, TrainingFacts
from app.errors import TrainingError
from app.training.day_one import ENOUGH_OF_EACH_CLASS, ENOUGH_ROWS, DayOneModel, fit_day_one
from app.training.describe import Notes, build_golden_inputs, build_notes, to_moment
from app.training.leakage import REFUSED_AUC, find_suspicious
from app.training.options import TrainingOptions
from app.training.rows import TrainingRows
from app.training.verdict import build_weights


def train_day_one(
    options: TrainingOptions,
    columns: tuple[InputColumn, ...],
    rows: TrainingRows,
    everyone: TrainingRows,
    notes: Notes,
) -> tuple[Pipeline, ModelDescription]:
    """Fits a day-one model on the decided `rows` and describes it; `everyone` holds all leads read.

    Of these only the looks are learnt from, and only of leads that had come by the moment of training. A
    column that separates the outcomes beyond the limit is left out, not refused: among so few of them a sound
    one may do so by chance, and the service has to answer. For the same reason nothing less is warned of.

    Raises:
        TrainingError: no lead is decided and no base rate is expected, or no column may be learnt from.
    """
    leaks = _find_leaks(options, columns, rows)
    kept = tuple(column for column in columns if column.name not in leaks)
    if not kept:
        raise TrainingError(
            "every column separates the outcomes almost perfectly: probably all were written after them. Let "
            "those that scoring knows pass with --allow-leaky, or train when there are more outcomes."
        )
    here = everyone.take(everyone.as_of <= options.known_until)
    model = fit_day_one(rows, here if here.leads.n else everyone, kept, options.base_rate, options.seed)
    notes = replace(notes, dropped={**notes.dropped, **leaks, **model.dropped})
    return model.estimator, describe_day_one(options, rows, model, notes)


def _find_leaks(
    options: TrainingOptions, columns: tuple[InputColumn, ...], rows: TrainingRows
) -> dict[str, str]:
    if len(set(rows.outcome.tolist())) < 2:
        return {}
    return {
        one.column: f"{one}: probably written after the outcome; --allow-leaky {one.column} keeps it"
        for one in find_suspicious(rows.leads, rows.outcome, rows.as_of, columns)
        if one.auc > REFUSED_AUC and one.column not in options.allow_leaky
    }


def describe_day_one(
    options: TrainingOptions, rows: TrainingRows, model: DayOneModel, notes: Notes
) -> ModelDescription:
    """Returns everything the manifest says but the facts of the file.

    No feature has a weight as long as none says anything: every lead is then answered the base rate, and the
    verdict abstains.
    """
    outcomes, positives = len(rows.outcome), int(rows.outcome.sum())
    says_nothing = not any(model.worth.values())
    features = model.feature_set
    return ModelDescription(
        model_type="logistic_regression",
        version=options.model_version,
        feature_set=features.to_json(),
        statistics=[entry.to_json() for entry in model.statistics],
        calibrator=Calibrator("none", {}).to_json(),
        venn_abers=model.band.to_json(),
        threshold=model.threshold,
        base_rate=model.base_rate,
        horizon_days=None if options.label else options.horizon_days,
        source=options.source,
        label=options.label or options.outcome,
        training=TrainingFacts(
            as_of_from=to_moment(rows.as_of.min()) if outcomes else None,
            as_of_to=to_moment(rows.as_of.max()) if outcomes else None,
            train_rows=outcomes,
            calibrate_rows=outcomes,
            test_rows=0,
            positives=positives,
            seed=options.seed,
        ),
        metrics={},
        golden_inputs=build_golden_inputs(model.matrix, options.seed),
        created_at=to_moment(options.now.timestamp()),
        report={
            **build_notes(options, notes),
            "day_one": {
                "outcomes": outcomes,
                "positives": positives,
                "expected_base_rate": options.base_rate,
                "evidence": round(model.evidence, 6),
                "enough": ENOUGH_ROWS,
                "enough_of_each": ENOUGH_OF_EACH_CLASS,
            },
        },
        feature_weights=[0.0] * len(features.specs) if says_nothing else build_weights(model.worth, features),
    )
