"""What is answered of the held-out leads, lead by lead, and what became of them: the model card's evidence.

The manifest keeps figures only; the leads themselves are looked at once more here, while they are in memory.
Pure. Called by `app.training.train`, for `model_card`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from app.ai.domain import CodeArray, Column, FloatArray, IntArray
from app.ai.feature_safety import DriftState, drift_statistics
from app.ai.model_manifest import ModelManifest
from app.training.answers import answer_leads
from app.training.fit import CalibratedModel
from app.training.model_metrics import measure_importance
from app.training.rows import TrainingRows
from app.training.verdict import VerdictRule

SHUFFLES = 3
"""How often each column is shuffled to say how far its importance depends on the shuffle."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """`n` leads the model has not seen.

    `outcome` (n,) is 0 or 1. `probability` (n,) is what is answered and `verdict` (n,) an index into
    `VERDICTS`, under the default settings. `order` (n,) rises in the order in which the leads came, None
    where that is not known. `columns` are the texts and booleans the model reads. `importance` has the ROC
    AUC lost in each of several shuffles, `drift` the state of each group of features against the training
    leads, both by name.
    """

    outcome: IntArray
    probability: FloatArray
    verdict: CodeArray
    order: FloatArray | None
    columns: Mapping[str, Column]
    importance: Mapping[str, tuple[float, ...]]
    drift: Mapping[str, DriftState]


def look_at_held_out(model: CalibratedModel, rows: TrainingRows, manifest: ModelManifest) -> HeldOut:
    """Returns what is answered of these rows by the published model, which it must not have learnt from."""
    fitted = model.fitted
    feature_set = fitted.feature_set
    matrix = fitted.build_matrix(rows)
    rule = VerdictRule(
        base_rate=manifest.base_rate,
        weights=manifest.feature_weights or [],
        abstain_below=None if manifest.abstain_below is msgspec.UNSET else manifest.abstain_below,
    )
    answers = answer_leads(model, matrix, rule)
    seed = manifest.training.seed
    shuffles = [
        manifest.report["importance"],
        *(measure_importance(fitted, matrix, rows.outcome, seed + extra) for extra in range(1, SHUFFLES)),
    ]
    features = drift_statistics(fitted.statistics, matrix.values).features
    groups = dict(zip(feature_set.group_names, feature_set.groups, strict=True))
    return HeldOut(
        outcome=rows.outcome,
        probability=answers.probability,
        verdict=answers.verdict,
        order=rows.order,
        columns={
            column.name: rows.leads.columns[column.name]
            for column in feature_set.input_columns
            if column.kind in {"text", "boolean"}
        },
        importance={name: tuple(losses[name] for losses in shuffles) for name in groups},
        drift={
            name: max((features[index].state for index in group), key=_STATES.index)
            for name, group in groups.items()
        },
    )


_STATES: tuple[DriftState, ...] = ("stable", "moderate", "drifting")
