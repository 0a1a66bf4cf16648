"""Describes a fitted model for its manifest: held-out metrics, golden inputs, and what people want to know.

Pure. Here the test part is scored for the first time; `held_out` scores it once more, for the model card.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import numpy as np

from app.ai.domain import JsonObject
from app.ai.features import FeatureMatrix
from app.ai.model_manifest import FeatureRow, ModelDescription, TrainingFacts
from app.training.answers import answer_leads
from app.training.bootstrap import bootstrap_intervals
from app.training.fit import CalibratedModel
from app.training.interval_coverage import measure_coverage
from app.training.model_metrics import evaluate, measure_importance, measure_rate_alone
from app.training.options import TrainingOptions
from app.training.reliability import describe_reliability
from app.training.rows import LeftOut, TrainingRows
from app.training.verdict import measure_rule

GOLDEN_ROWS = 32
"""Rows a published model must answer the same for ever; the last one has nothing in it."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What was noticed on the way: columns left out and why, warnings, leads that are not learnt from."""

    dropped: dict[str, str]
    warnings: tuple[str, ...]
    left_out: LeftOut


def describe_model(
    options: TrainingOptions,
    train_part: TrainingRows,
    test_part: TrainingRows,
    model: CalibratedModel,
    notes: Notes,
) -> ModelDescription:
    """Returns everything the manifest says but the facts of the file."""
    fitted = model.fitted
    matrix = fitted.build_matrix(test_part)
    importance = measure_importance(fitted, matrix, test_part.outcome, options.seed)
    rule = measure_rule(model, importance, train_part, test_part, options.seed)
    answers = answer_leads(model, matrix, rule)
    probability = answers.probability
    positives = int(train_part.outcome.sum() + test_part.outcome.sum())
    return ModelDescription(
        model_type=fitted.candidate.model_type,
        version=options.model_version,
        feature_set=fitted.feature_set.to_json(),
        statistics=[entry.to_json() for entry in fitted.statistics],
        calibrator=model.calibrator.to_json(),
        venn_abers=model.venn_abers.to_json(),
        threshold=model.threshold,
        base_rate=rule.base_rate,
        horizon_days=None if options.label else options.horizon_days,
        source=options.source,
        label=options.label or options.outcome,
        training=TrainingFacts(
            as_of_from=to_moment(train_part.as_of.min()),
            as_of_to=to_moment(train_part.as_of.max()),
            train_rows=train_part.leads.n,
            calibrate_rows=len(model.out_of_fold.rows),
            test_rows=test_part.leads.n,
            positives=positives,
            seed=options.seed,
        ),
        metrics=evaluate(probability, test_part.outcome, model.threshold),
        golden_inputs=build_golden_inputs(matrix, options.seed),
        created_at=to_moment(options.now.timestamp()),
        report={
            **build_notes(options, notes),
            "split": "random" if test_part.order is None else "time",
            "tested": [to_moment(test_part.as_of.min()), to_moment(test_part.as_of.max())],
            "choice": model.choice,
            "importance": importance,
            "reliability": describe_reliability(probability, test_part.outcome),
            "base_rate_alone": measure_rate_alone(rule.base_rate, test_part.outcome),
            "intervals": bootstrap_intervals(probability, test_part.outcome, options.seed),
            "interval_coverage": measure_coverage(answers.intervals, probability, test_part.outcome),
        },
        feature_weights=rule.weights,
        abstain_below=msgspec.UNSET if rule.abstain_below is None else rule.abstain_below,
    )


def build_notes(options: TrainingOptions, notes: Notes) -> JsonObject:
    """Returns what was noticed, for the manifest's report."""
    return {
        "dropped": notes.dropped,
        "excluded": sorted(options.exclude),
        "warnings": list(notes.warnings),
        **notes.left_out._asdict(),
        "since": to_moment(options.since.timestamp()) if options.since else None,
    }


def build_golden_inputs(matrix: FeatureMatrix, seed: int) -> list[FeatureRow]:
    """Draws rows of built features, gaps and all, and adds one that is nothing but gaps."""
    drawn = np.random.default_rng(seed).permutation(len(matrix.values))[: GOLDEN_ROWS - 1]
    rows = np.vstack([matrix.values[drawn], np.full(matrix.values.shape[1], np.nan)]).tolist()
    return [[value if np.isfinite(value) else None for value in row] for row in rows]


def to_moment(seconds: float) -> str:
    """Returns seconds UTC as RFC 3339."""
    return datetime.fromtimestamp(float(seconds), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
