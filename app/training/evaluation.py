"""What a published model is worth on any leads whose outcome is known; behind `leadscore evaluate`.

Leads are read by the rules of training and answered by the lines that serve (`score_leads`), so an evaluation
and an answer cannot differ: verdicts, bounds and all. Never fits, never writes. Called by the `leadscore
evaluate` command.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from app.ai.domain import VERDICTS, AnswerArray, BoolArray, ColumnKind, IntArray, JsonObject, Progress
from app.ai.model_bundle import ModelBundle
from app.ai.predictor import ScoringPolicy, find_intervals, score_leads
from app.db.leads import fetch_columns, is_same_relation
from app.errors import TrainingError
from app.training.bootstrap import bootstrap_intervals
from app.training.interval_coverage import measure_coverage
from app.training.model_metrics import evaluate, measure_rate_alone
from app.training.options import TrainingOptions
from app.training.reliability import describe_reliability
from app.training.rows import TrainingRows, begins_at_creation, fetch_rows

_ROWS_AT_ONCE = 20_000
_SEED = 0
_SECONDS_PER_DAY = 86_400.0
MIN_LEADS, MIN_OF_EACH_OUTCOME = 50, 10
"""With fewer, every interval is so wide that the figures say nothing."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model's worth on the decided leads of a source.

    `metrics` and their `intervals` are those of a manifest; `base_rate_alone` has what some of them would be
    if all were answered the model's base rate; `verdicts` has leads, share and Brier score (None for no
    leads) of each; `interval_coverage` is None for a model without intervals. `rejected` leads get no answer
    and count nowhere else. `warnings` say what makes the figures look better than they are.
    """

    model_id: str
    version: str
    model_type: str
    source: str
    outcome: str
    leads: int
    positives: int
    undecided: int
    beforehand: int
    later: int
    rejected: int
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    base_rate_alone: dict[str, float]
    verdicts: dict[str, JsonObject]
    interval_coverage: JsonObject | None
    reliability: list[list[float]]
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Returns the evaluation as one JSON-ready object."""
        return asdict(self)


def evaluate_model(
    options: TrainingOptions, bundle: ModelBundle, policy: ScoringPolicy, progress: Progress
) -> Evaluation:
    """Answers every decided lead of `options.source` with this model and compares with what became of it.

    Of a source with several moments of a lead it takes one: rows of a lead tell nearly the same.
    Of the options it takes the database, the source, its outcome, and the moment up to which anything is
    known.

    Raises:
        TrainingError: the source lacks a column, has too few decided leads, or only one outcome occurs.
        DatabaseUnavailableError: the database does not answer.
    """
    kinds = fetch_columns(options.url, options.source)
    _require_columns(options, bundle, kinds)
    every_row, _, left_out = fetch_rows(options, bundle.input_columns, progress)
    rows = every_row.take_one_a_lead()
    _require_enough(rows.outcome)
    answers, rejected = _answer(bundle, rows, policy, progress)
    answered, outcome = answers[~rejected], rows.outcome[~rejected]
    _require_enough(outcome)
    probability = np.ascontiguousarray(answered["probability"])
    manifest = bundle.manifest
    warnings = (_explain_overlap(options, bundle, rows), _explain_times(options, bundle, kinds))
    return Evaluation(
        model_id=manifest.model_id,
        version=manifest.version,
        model_type=manifest.model_type,
        source=options.source,
        outcome=options.label or options.outcome,
        leads=len(outcome),
        positives=int(outcome.sum()),
        undecided=left_out.undecided,
        beforehand=left_out.beforehand,
        later=left_out.later,
        rejected=int(rejected.sum()),
        metrics=evaluate(probability, outcome, manifest.threshold),
        intervals=bootstrap_intervals(probability, outcome, _SEED),
        base_rate_alone=measure_rate_alone(manifest.base_rate, outcome),
        verdicts=_describe_verdicts(answered, outcome),
        interval_coverage=(
            measure_coverage(find_intervals(bundle, answered), probability, outcome)
            if bundle.venn_abers
            else None
        ),
        reliability=describe_reliability(probability, outcome),
        warnings=tuple(warning for warning in warnings if warning),
    )


def _require_columns(options: TrainingOptions, bundle: ModelBundle, kinds: Mapping[str, ColumnKind]) -> None:
    lacking = [
        f"{column.name} ({column.kind})"
        for column in bundle.input_columns
        if kinds.get(column.name) != column.kind
    ]
    if lacking:
        raise TrainingError(
            f"{options.source} lacks columns that model {bundle.ref.version} reads, or has them with another "
            f"type: {', '.join(lacking)}. Evaluate on a source that has them, or choose another --model."
        )
    outcome = options.label or options.outcome
    if outcome in {column.name for column in bundle.input_columns}:
        raise TrainingError(f"{outcome} feeds model {bundle.ref.version}, so it cannot be what it foretells.")


def _require_enough(outcome: IntArray) -> None:
    positives = int(outcome.sum())
    negatives = len(outcome) - positives
    if len(outcome) < MIN_LEADS or min(positives, negatives) < MIN_OF_EACH_OUTCOME:
        raise TrainingError(
            f"too few decided leads to measure a model on: {positives} with the outcome and {negatives} "
            f"without; at least {MIN_LEADS} are needed, {MIN_OF_EACH_OUTCOME} of each."
        )


def _answer(
    bundle: ModelBundle, rows: TrainingRows, policy: ScoringPolicy, progress: Progress
) -> tuple[AnswerArray, BoolArray]:
    answers, rejected = [], []
    for start in range(0, rows.leads.n, _ROWS_AT_ONCE):
        page = rows.take(np.arange(start, min(start + _ROWS_AT_ONCE, rows.leads.n)))
        scored = score_leads(bundle, page.leads, page.as_of, policy)
        answers.append(scored.answers)
        rejected.append(scored.rejected)
        progress("score", start + page.leads.n, rows.leads.n)
    return np.concatenate(answers), np.concatenate(rejected)


def _describe_verdicts(answers: AnswerArray, outcome: IntArray) -> dict[str, JsonObject]:
    squared = (np.ascontiguousarray(answers["probability"]) - outcome) ** 2
    told: dict[str, JsonObject] = {}
    for code, verdict in enumerate(VERDICTS):
        those = answers["verdict"] == code
        leads = int(those.sum())
        told[verdict] = {
            "leads": leads,
            "share": round(leads / len(those), 6),
            "brier": round(float(squared[those].mean()), 6) if leads else None,
        }
    return told


def _explain_overlap(options: TrainingOptions, bundle: ModelBundle, rows: TrainingRows) -> str | None:
    """Says how many leads are of the time the model was trained on: it may have learnt their outcomes."""
    manifest = bundle.manifest
    trained_from, trained_to = manifest.training.as_of_from, manifest.training.as_of_to
    if trained_from is None or trained_to is None:
        return None
    if rows.order is None:
        if not is_same_relation(options.url, options.source, manifest.source):
            return None
        return (
            f"model {manifest.version} was trained on {manifest.source}, and these leads have no time of "
            "their own: it has learnt from most of them, and will do worse on new ones."
        )
    start, end = (datetime.fromisoformat(text).timestamp() for text in (trained_from, trained_to))
    # Without as-of times of their own all leads were taken as of the day of training, those of that day too.
    snapshot = start == end
    came_by = end + _SECONDS_PER_DAY if snapshot else end
    within = int(((rows.order <= came_by) & ((rows.order >= start) | snapshot)).sum())
    if not within:
        return None
    window = f"up to {_day(end)}" if snapshot else f"{_day(start)} to {_day(end)}"
    return (
        f"{within:,} of {rows.leads.n:,} leads are of the time model {manifest.version} was trained on "
        f"({window}): if it has learnt from them, it will do worse on new ones."
    )


def _explain_times(
    options: TrainingOptions, bundle: ModelBundle, kinds: Mapping[str, ColumnKind]
) -> str | None:
    """Says which columns the service would read otherwise, as it does not take leads as of their creation."""
    times = sorted(column.name for column in bundle.input_columns if column.kind == "timestamp")
    if not times or not begins_at_creation(options, kinds):
        return None
    named = " and ".join(filter(None, (", ".join(times[:-1]), times[-1])))
    return (
        f"{options.source} has no as_of, so {named} count from created_at here and from today in serving: "
        "the model will do otherwise on the same leads."
    )


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
