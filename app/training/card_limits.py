"""What a model is not good for, as far as its own figures say so: the known limits of a model card.

Every sentence rests on something measured on this model's data; nothing that would be true of any model is
said. Pure. Called by `model_card`.
"""

from collections.abc import Sequence

import numpy as np

from app.ai.domain import VERDICTS
from app.ai.model_manifest import ModelManifest
from app.training.card_slices import MIN_SLICE_ROWS, OTHERS, Division, find_off_slices
from app.training.held_out import HeldOut
from app.training.interval_coverage import NINETY_FIVE_PERCENT
from app.training.reliability import ReliabilityBin
from app.training.report import describe_worth, explain_fall, measured_beside

_FEW_ROWS = 1000


def describe_data_limits(manifest: ModelManifest) -> list[str]:
    """Returns the limits that lie in what the model was made from."""
    training, report = manifest.training, manifest.report
    limits = []
    if training.as_of_from != training.as_of_to:
        limits.append(
            f"It has learnt from leads of {_days(training.as_of_from, training.as_of_to)}"
            + (f", and was tested on leads of {_days(*report['tested'])}" if report.get("tested") else "")
            + "; what changed after that it cannot know."
        )
    elif report.get("split") != "time" and "day_one" not in report:
        limits.append(
            "No column as_of or created_at tells of every lead when it came, so nothing is known of how the "
            "model keeps up with change: newer leads may behave otherwise."
        )
    if report.get("undecided"):
        limits.append(
            f"{report['undecided']:,} leads whose outcome was still open were left out; it has learnt from "
            "finished stories only."
        )
    if report.get("beforehand"):
        limits.append(
            f"{report['beforehand']:,} leads that had the outcome before their as-of time were left out: "
            "there was nothing left to foretell."
        )
    if training.train_rows < _FEW_ROWS:
        limits.append(f"It has learnt from only {training.train_rows:,} leads; more would make it better.")
    if manifest.learnt_nothing:
        limits.append("It gives all leads the same probability, and cannot put them in an order.")
    limits += [f"Suspicious column: {warning}" for warning in report.get("warnings", ())]
    lower, upper = manifest.calibrator["lower"], manifest.calibrator["upper"]
    if lower > 0 or upper < 1:
        limits.append(
            f"It never says less than {lower:.1%} or more than {upper:.1%}: its data do not support more."
        )
    return limits


def _days(start: str | None, end: str | None) -> str:
    return f"{str(start)[:10]} to {str(end)[:10]}"


def describe_held_out_limits(
    manifest: ModelManifest,
    held_out: HeldOut,
    bins: Sequence[ReliabilityBin],
    divisions: Sequence[Division],
) -> list[str]:
    """Returns the limits that show on the held-out leads."""
    # Of leads drawn at random, what differs from those it learnt from differs by the draw.
    later = manifest.report.get("split") == "time"
    found = (
        *describe_worth(*measured_beside(manifest)),
        _base_rate(manifest, held_out) if later else "",
        *explain_fall(manifest),
        _calibration(bins),
        *(
            f"Where {title} is {part.name!r} the predictions are too {'low' if part.gap > 0 else 'high'} by "
            f"{abs(part.gap) * 100:.1f} percentage points, more than chance explains ({part.leads:,} leads)."
            for title, part in find_off_slices(divisions)[:5]
        ),
        _drift(held_out) if later else "",
        _idle(held_out),
        _verdicts(held_out),
        _small_slices(divisions),
    )
    return [text for text in found if text]


def _base_rate(manifest: ModelManifest, held_out: HeldOut) -> str:
    before, now, n = manifest.base_rate, float(held_out.outcome.mean()), len(held_out.outcome)
    spread = before * (1 - before) * (1 / n + 1 / manifest.training.train_rows)
    if abs(now - before) <= NINETY_FIVE_PERCENT * spread**0.5:
        return ""
    return (
        f"The outcome rate moved: it goes by {before:.1%}, and {now:.1%} of the held-out leads reached the "
        "outcome. If it goes on moving, the probabilities will be off by as much."
    )


def _calibration(bins: Sequence[ReliabilityBin]) -> str:
    outside = sum(not entry.inside for entry in bins)
    # Of 15 bins four or more fall outside their 95 % band in one sample of 200 by chance.
    if outside < 4:
        return ""
    return (
        f"In {outside} of {len(bins)} groups of the reliability diagram the share that happened lies outside "
        "what chance explains: read the probabilities as an order rather than as shares."
    )


def _drift(held_out: HeldOut) -> str:
    moved = [name for name, state in held_out.drift.items() if state != "stable"]
    if not moved:
        return ""
    return (
        f"Between the leads it learnt from and the held-out ones the values changed in: {', '.join(moved)}."
    )


def _idle(held_out: HeldOut) -> str:
    idle = [name for name, losses in held_out.importance.items() if max(losses) <= 0]
    if not idle:
        return ""
    return f"These tell it nothing that the others do not (shuffling them costs nothing): {', '.join(idle)}."


def _verdicts(held_out: HeldOut) -> str:
    counts = np.bincount(held_out.verdict, minlength=len(VERDICTS))
    careful = [
        f"{count / counts.sum():.1%} {verdict}"
        for verdict, count in zip(VERDICTS, counts, strict=True)
        if verdict != "ok" and count
    ]
    if not careful:
        return ""
    return (
        f"Of some leads too little is known to rely on the number; of the held-out ones {', '.join(careful)}."
    )


def _small_slices(divisions: Sequence[Division]) -> str:
    pooled = [
        division.title for division in divisions if any(part.name == OTHERS for part in division.slices)
    ]
    if not pooled:
        return ""
    return (
        f"Of values that fewer than {MIN_SLICE_ROWS} held-out leads have, or that are not among the most "
        f"frequent, nothing is known one by one; that concerns {', '.join(pooled)}."
    )
