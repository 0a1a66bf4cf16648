"""Puts the evidence of a model card into words and tables, one function for each section.

Written for people who call leads, not for statisticians. Never computes a figure. Called by `model_card`.
"""

from collections.abc import Iterable, Sequence

from app.ai.features import FeatureSet, FeatureSpec
from app.ai.model_manifest import ModelManifest
from app.training.card_evidence import Evidence
from app.training.card_page import Chart, Section, Table
from app.training.card_slices import MIN_SLICE_ROWS, Division
from app.training.held_out import SHUFFLES
from app.training.report import HEADLINES, describe_coverage, measured_beside

_MEANINGS = {
    "roc_auc": "how often it puts a lead with the outcome above one without; 0.5 is guessing",
    "pr_auc": "how pure the top of the list is, averaged over how far down one goes",
    "lift_at_10_percent": "how many times more outcomes the top tenth has than a random tenth",
    "brier": "mean squared error of the probabilities; lower is better",
    "log_loss": "punishes confident mistakes; lower is better",
    "ece": "how far the probabilities are from what happened, on average",
    "ece_floor": "what a perfect model would show by chance at this size",
    "accuracy": "share called right at the decision threshold",
    "precision": "share of those above the threshold that reach the outcome",
    "recall": "share of the outcomes that are above the threshold",
    "f1_score": "balance of precision and recall",
}
_COUNTED = {"age_days": "days since {}", "days_until": "days until {}"}
"""What a transform makes of a time; elsewhere a feature's description says it all."""


def describe_metrics(manifest: ModelManifest) -> Section:
    """Returns the section with the held-out metrics and, where they were measured, their intervals."""
    metrics, intervals, alone = measured_beside(manifest)
    rows = [
        (
            heading,
            f"{metrics[name]:.4f}",
            "{:.4f} to {:.4f}".format(*intervals[name]) if name in intervals else "",
            _MEANINGS.get(name, "")
            + (f"; the base rate alone has {alone[name]:.4f}" if name in alone else ""),
        )
        for name, heading in HEADLINES
        if name in metrics
    ]
    head, drawn = ("metric", "value", "95% interval", "meaning"), any(row[2] for row in rows)
    table = Table(head, rows) if drawn else Table(_without(head), [_without(row) for row in rows])
    latest = ", the most recent ones" if manifest.report.get("split") == "time" else ""
    text = f"Measured once, on {manifest.training.test_rows:,} leads that nothing was learnt from{latest}."
    return Section("How good it is on leads it has not seen", (text,), tables=(table,))


def describe_calibration(manifest: ModelManifest, evidence: Evidence) -> Section:
    """Returns the section on whether the probabilities are true, and what the intervals are."""
    bins = evidence.bins
    inside = sum(entry.inside for entry in bins)
    text = (
        f"The held-out leads in {len(bins)} groups of equal size, by predicted probability. In {inside} of "
        "them the share that reached the outcome lies where a perfect model's would lie 95 times in 100."
    )
    texts = [text]
    if coverage := manifest.report.get("interval_coverage"):
        texts.append(
            "The interval of a lead says how far one more outcome could move its probability. It is no "
            "confidence interval: the true rate of such leads often lies outside. On the held-out leads the "
            f"intervals, {describe_coverage(coverage)}."
        )
    caption = (
        "How to read it: a dot on the dashed line means that 30% is 30 in 100. Dots within the shaded band "
        "are as close as a perfect model with this many leads would be."
    )
    table = Table(
        ("predicted", "happened", "noise band", "leads", ""),
        [
            (
                f"{entry.predicted:.1%}",
                f"{entry.observed:.1%}",
                f"{entry.low:.1%} to {entry.high:.1%}",
                f"{entry.leads:,}",
                "" if entry.inside else "outside",
            )
            for entry in bins
        ],
    )
    return Section("Are the probabilities true", texts, _charts(evidence, ("reliability", caption)), (table,))


def describe_ranking(evidence: Evidence) -> Section:
    """Returns the section on how well leads are told apart."""
    roc = (
        "How to read it: the farther the curve bends to the upper left, the fewer calls are in vain for the "
        "same outcomes found."
    )
    precision_recall = (
        "How to read it: as one calls more leads (to the right), outcomes become rarer among them; the "
        "dashed line is what calling at random would give."
    )
    table = Table(
        ("probability from", "leads called", "outcomes found", "of those called", "others called"),
        [
            (f"{one.probability:.1%}", *(f"{share:.1%}" for share in shares))
            for one in evidence.thresholds
            for shares in [(one.called, one.found, one.precision, one.false_alarms)]
        ],
        "What calling every lead from a probability on means",
    )
    charts = _charts(evidence, ("roc", roc), ("precision_recall", precision_recall))
    return Section("Does it tell leads apart", charts=charts, tables=(table,))


def describe_gain(evidence: Evidence) -> Section:
    """Returns the section on what calling in the model's order gains."""
    found = evidence.gain[:, 1]
    text = (
        f"Who calls the tenth of the leads with the highest probabilities reaches {found[10]:.0%} of all "
        f"outcomes, who calls the first third {found[33]:.0%}."
    )
    caption = (
        "How to read it: go across to the share of leads a team can call, then up to the share of outcomes "
        "among them. No order could be above the dotted line."
    )
    table = Table(
        ("leads called", "outcomes found", "times better than at random"),
        [
            (f"{share}%", f"{found[share]:.1%}", f"{100 * found[share] / share:.2f}")
            for share in (5, 10, 20, 30, 50)
        ],
    )
    return Section("What calling in its order gains", (text,), _charts(evidence, ("gain", caption)), (table,))


def describe_features(manifest: ModelManifest, evidence: Evidence) -> Section:
    """Returns the section on what the model goes by."""
    feature_set = FeatureSet.from_json(manifest.feature_set)
    groups = dict(zip(feature_set.group_names, feature_set.groups, strict=True))
    meanings = {
        name: _meaning([feature_set.specs[index] for index in group]) for name, group in groups.items()
    }
    text = (
        "What is lost of the ROC AUC on held-out leads when the values of a feature are shuffled among them; "
        f"mean and range of {SHUFFLES} shuffles. Features that say the same share their worth."
    )
    caption = "How to read it: the longer the bar, the more the model goes by it; the line is the range."
    rows = [
        (
            name,
            f"{sum(losses) / len(losses):.4f}",
            f"{min(losses):.4f} to {max(losses):.4f}",
            meanings.get(name, ""),
        )
        for name, losses in evidence.importance.items()
    ]
    table = Table(("feature", "loss", "range", "meaning"), rows)
    return Section("What it goes by", (text,), _charts(evidence, ("importance", caption)), (table,))


def describe_slices(evidence: Evidence) -> list[Section]:
    """Returns the section on how it does on parts of the held-out leads."""
    text = (
        "The gap is what happened less what was predicted, in percentage points; beside it what chance alone "
        "explains (95 in 100). With so many parts some gaps are larger by chance. Of fewer than "
        f"{MIN_SLICE_ROWS} leads nothing is said."
    )
    tables = [_slice_table(division) for division in evidence.divisions]
    return [Section("Parts of the held-out leads", (text,), tables=tables)]


def _slice_table(division: Division) -> Table:
    rows = [
        (
            part.name,
            f"{part.leads:,}",
            *(
                (
                    f"{part.observed:.1%}",
                    f"{part.predicted:.1%}",
                    f"{100 * part.gap:+.1f} ± {100 * part.noise:.1f}",
                    "-" if part.roc_auc is None else f"{part.roc_auc:.3f}",
                )
                if part.told
                else ("-",) * 4
            ),
        )
        for part in division.slices
    ]
    return Table(("", "leads", "happened", "predicted", "gap", "ROC AUC"), rows, f"By {division.title}")


def _meaning(group: Sequence[FeatureSpec]) -> str:
    levels = sum(spec.transform == "one_of" for spec in group)
    if levels:
        return f"which of {levels} usual values it is, none of them, or not known"
    first, known = group[0], any(spec.transform == "is_present" for spec in group[1:])
    told = _COUNTED.get(first.transform, "{}").format(first.description)
    return f"{told}, and whether it is known" if known else told


def _charts(evidence: Evidence, *wanted: tuple[str, str]) -> list[Chart]:
    return [Chart(evidence.charts[name], caption) for name, caption in wanted if name in evidence.charts]


def _without(row: Iterable[str]) -> tuple[str, ...]:
    """Leaves out the third cell, which no row has."""
    return tuple(cell for place, cell in enumerate(row) if place != 2)
