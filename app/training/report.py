"""What a training or an evaluation says about itself: the report in memory, and the table a person reads.

The figures live in the manifest; this only words them. Never computes a metric. Called by
`app.training.train`, and by the commands `leadscore train` and `leadscore evaluate` to print.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.ai.model_manifest import ModelManifest, manifest_fingerprint
from app.training.card_evidence import NO_CHARTS, charts_available
from app.training.evaluation import Evaluation
from app.training.interval_coverage import NINETY_FIVE_PERCENT

HEADLINES: tuple[tuple[str, str], ...] = (
    ("roc_auc", "ROC AUC"), ("pr_auc", "PR AUC"), ("lift_at_10_percent", "lift in the top tenth"),
    ("brier", "Brier score"), ("log_loss", "log-loss"), ("ece", "calibration error (ECE)"),
    ("ece_floor", "ECE of a perfect model this size"), ("accuracy", "accuracy"), ("precision", "precision"),
    ("recall", "recall"), ("f1_score", "F1"),
)  # fmt: skip
"""The held-out metrics people ask for, in the order they are shown."""

_HOW_TESTED = {"time": ", the most recent ones", "random": ", drawn at random"}


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The outcome of a training; everything else is in the manifest, `manifest.report` included."""

    manifest: ModelManifest
    manifest_path: Path
    card_path: Path
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Returns the outcome as one JSON-ready object."""
        manifest = self.manifest
        return {
            "version": manifest.version, "model_id": manifest.model_id, "model_type": manifest.model_type,
            "manifest": str(self.manifest_path), "card": str(self.card_path), "sha256": manifest.sha256,
            "fingerprint": manifest_fingerprint(manifest), "file_size": manifest.file_size,
            "features": len(manifest.feature_set), "calibration": manifest.calibrator["method"],
            "threshold": manifest.threshold, "base_rate": manifest.base_rate, "metrics": manifest.metrics,
            "train_rows": manifest.training.train_rows, "test_rows": manifest.training.test_rows,
            "report": manifest.report, "seconds": round(self.seconds, 1),
        }  # fmt: skip


def describe_data(manifest: ModelManifest) -> list[tuple[str, str]]:
    """Returns what the model was made from as pairs of heading and text."""
    training = manifest.training
    how = _HOW_TESTED.get(str(manifest.report.get("split")), "")
    fitted = f"{training.train_rows:,} to fit and calibrate"
    if training.calibrate_rows != training.train_rows:
        fitted = f"{training.train_rows:,} to fit, {training.calibrate_rows:,} of them to calibrate"
    rows = [
        ("source", manifest.source),
        ("outcome", manifest.label),
        ("leads", f"{fitted}, {training.test_rows:,} to test{how}"),
        (
            "expected rate" if "day_one" in manifest.report else f"outcome rate{rate_of_when(manifest)}",
            f"{manifest.base_rate:.1%}",
        ),
        ("features", str(len(manifest.feature_set))),
        ("calibration", str(manifest.calibrator["method"])),
        ("decision threshold", f"{manifest.threshold:.3f}"),
        ("artifact", f"{manifest.file_size / 1e3:,.0f} kB, sha256 {manifest.sha256}"),
    ]
    if training.as_of_from:
        rows.insert(2, ("as-of times", _describe_window(manifest)))
    if manifest.report.get("since"):
        rows.insert(2, ("no lead from before", manifest.report["since"]))
    rows[3:3] = _describe_left_out(manifest.report)
    if "day_one" in manifest.report:
        rows.insert(0, ("day-one model", describe_day_one(manifest.report["day_one"])))
    return rows


def rate_of_when(manifest: ModelManifest) -> str:
    """Returns " of late" where recent leads count for more in the base rate (decision 11), otherwise ""."""
    recency = manifest.report.get("choice", {}).get("recency", {})
    return " of late" if recency.get("half_life") or recency.get("intercept") else ""


def describe_day_one(known: Mapping[str, Any]) -> str:
    """Returns what a reader of a day-one model's figures must know: how few outcomes it rests on."""
    outcomes, positives = known["outcomes"], known["positives"]
    if not outcomes:
        basis = "no outcome is known yet: every lead is answered the base rate that was expected"
    elif positives in {0, outcomes}:
        basis = f"{outcomes} outcomes, all of one kind: every lead is answered the base rate"
    else:
        basis = (
            f"{outcomes} outcomes, {positives} of them positive: answers are shrunk towards the base rate "
            f"(probability that the features say anything: {known['evidence']:.0%})"
        )
    return f"{basis}. Nothing was left to test on. {_when_again(known)}"


def _when_again(known: Mapping[str, Any]) -> str:
    """Says what is missing yet; of many outcomes of one kind perhaps none of the other will ever come."""
    outcomes, positives, enough_of_each = known["outcomes"], known["positives"], known["enough_of_each"]
    if outcomes < known["enough"]:
        return f"Train again at {known['enough']} outcomes, {enough_of_each} of each kind."
    rarer, kind = min((positives, "with"), (outcomes - positives, "without"))
    again = f"Train again at {enough_of_each} leads {kind} the outcome; {rarer} of {outcomes:,} are known."
    if rarer:
        return again
    return f"{again} Or is this not the label, or --positive of the import not the word that means yes?"


def measured_beside(
    manifest: ModelManifest,
) -> tuple[Mapping[str, float], Mapping[str, Sequence[float]], Mapping[str, float]]:
    """Returns the held-out metrics, their intervals, and metrics of the base rate alone, as far as known."""
    report = manifest.report
    return manifest.metrics, report.get("intervals", {}), report.get("base_rate_alone", {})


def describe_metrics(
    metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]], alone: Mapping[str, float]
) -> list[tuple[str, str]]:
    """Returns the metrics people ask for as pairs of heading and text, each with its interval if it has one.

    The interval is that of `bootstrap_intervals`: the 95 % range of the metric. After a metric comes that of
    the base rate `alone`, if it is there.
    """
    rows = []
    for name, heading in HEADLINES:
        if name in metrics:
            rows.append((heading, f"{metrics[name]:.4f}" + _range(intervals.get(name, ()))))
        if name in alone:
            rows.append((f"{heading}, the base rate alone", f"{alone[name]:.4f}"))
    return rows


def describe_worth(
    metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]], alone: Mapping[str, float]
) -> list[str]:
    """Returns what a reader must know of a model that does no better than one that knows nothing."""
    told = []
    if orders_by_chance(intervals):
        low, high = intervals["roc_auc"]
        told.append(
            "It may order leads no better than chance does: the 95 % interval of its ROC AUC is "
            f"{low:.4f} to {high:.4f}, and 0.5 is guessing."
        )
    if alone and metrics["log_loss"] >= alone["log_loss"]:
        told.append(
            "Its probabilities were no better than answering every lead the base rate: their log-loss is "
            f"{metrics['log_loss']:.4f}, the base rate's {alone['log_loss']:.4f}."
        )
    return told


def orders_by_chance(intervals: Mapping[str, Sequence[float]]) -> bool:
    """Tells whether guessing lies within what the ROC AUC may be."""
    return "roc_auc" in intervals and intervals["roc_auc"][0] <= 0.5


def explain_fall(manifest: ModelManifest) -> list[str]:
    """Says what else it may mean that fewer of the latest leads have a label of 1: some may be too young."""
    training, latest = manifest.training, manifest.metrics.get("mean_observed")
    if latest is None or manifest.horizon_days is not None or manifest.report.get("split") != "time":
        return []
    before = (training.positives - latest * training.test_rows) / training.train_rows
    spread = before * (1 - before) * (1 / training.train_rows + 1 / training.test_rows)
    if latest >= before or before - latest <= NINETY_FIVE_PERCENT * spread**0.5:
        return []
    text = (
        f"Of the latest leads, which it was tested on, {latest:.1%} reached the outcome, of those before "
        f"{before:.1%}. Either the rate fell, or their outcomes are not in yet and were taken for no: then "
        "its probabilities are too low, though they look too high here. Leave such outcomes empty, or name "
        "the time of the outcome with --outcome and --horizon-days."
    )
    return [text]


def describe_coverage(coverage: Mapping[str, Any]) -> str:
    """Returns what came of `measure_coverage`: what the intervals hold, and what no width would."""
    return (
        f"widened by the sampling error of a bin, hold the observed rate in {coverage['covered']} of "
        f"{coverage['bins']} bins, the bare probabilities in {coverage['covered_without_width']}; mean width "
        f"{coverage['mean_width']:.4f}"
    )


def _range(ends: Sequence[float]) -> str:
    return f"  (95 %: {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""


def print_report(report: TrainingReport, console: Console) -> None:
    """Prints the outcome as tables: the data, the held-out metrics, what was left out and what looks odd."""
    manifest = report.manifest
    table = Table(
        title=f"{manifest.model_id} ({manifest.model_type})", show_header=False, title_justify="left"
    )
    table.add_column()
    table.add_column(overflow="fold")
    for heading, text in describe_data(manifest):
        table.add_row(heading, escape(text))
    table.add_section()
    measured = measured_beside(manifest)
    for heading, text in describe_metrics(*measured):
        table.add_row(f"held-out {heading}", text)
    if coverage := manifest.report.get("interval_coverage"):
        table.add_row("held-out intervals", describe_coverage(coverage))
    console.print(table)
    if choice := manifest.report.get("choice"):
        console.print(_candidates_table(choice))
    for column, reason in manifest.report["dropped"].items():
        console.print(escape(f"left out: {column} ({reason})"))
    for warning in [*manifest.report["warnings"], *describe_worth(*measured), *explain_fall(manifest)]:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    console.print(f"published in {report.seconds:.1f} s, with a card:")
    for path in (report.manifest_path, report.card_path):
        # Whole, for whoever copies it or reads it from a pipe.
        console.print(escape(str(path)), soft_wrap=True)
    if not charts_available():
        console.print(escape(NO_CHARTS))


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Prints an evaluation: the leads, the metrics as `print_report` does, verdicts and intervals."""
    table = Table(
        title=f"{evaluation.model_id} ({evaluation.model_type})", show_header=False, title_justify="left"
    )
    table.add_column()
    table.add_column(overflow="fold")
    for heading, text in _describe_evaluated(evaluation):
        table.add_row(heading, escape(text))
    table.add_section()
    measured = evaluation.metrics, evaluation.intervals, evaluation.base_rate_alone
    for heading, text in describe_metrics(*measured):
        table.add_row(heading, text)
    table.add_section()
    for verdict, told in evaluation.verdicts.items():
        brier = "" if told["brier"] is None else f", Brier score {told['brier']:.4f}"
        table.add_row(f"verdict {verdict}", f"{told['share']:.1%} of the leads{brier}")
    if coverage := evaluation.interval_coverage:
        table.add_row("intervals", describe_coverage(coverage))
    console.print(table)
    for warning in [*evaluation.warnings, *describe_worth(*measured)]:
        console.print(f"[yellow]warning:[/] {escape(warning)}")


def _describe_evaluated(evaluation: Evaluation) -> list[tuple[str, str]]:
    rate = evaluation.positives / evaluation.leads
    rows = [
        ("source", evaluation.source),
        ("outcome", evaluation.outcome),
        ("leads", f"{evaluation.leads:,}, {rate:.1%} of them with the outcome"),
    ]
    rows += _describe_left_out(evaluation.facts())
    if evaluation.rejected:
        rows.append(("not answered", f"{evaluation.rejected:,} leads, rejected by feature safety"))
    return rows


def _describe_window(manifest: ModelManifest) -> str:
    training, tested = manifest.training, manifest.report.get("tested")
    if training.as_of_from == training.as_of_to:
        return f"{training.as_of_from}, the same for all"
    learnt = f"learnt from {training.as_of_from} to {training.as_of_to}"
    return learnt + (", tested on {} to {}".format(*tested) if tested else "")


def _describe_left_out(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    headings = {
        "undecided": "left out as undecided",
        "beforehand": "left out, outcome before the as-of time",
        "later": "left out, later than the moment named",
        "repeated": "left out as repeats of other leads",
    }
    return [(heading, f"{told[name]:,} leads") for name, heading in headings.items() if told.get(name)]


def _candidates_table(choice: Mapping[str, Any]) -> Table:
    order = "in the order of time" if choice["order"] == "time" else "at random"
    table = Table(title=f"Candidates, cross-validated {order}", title_justify="left")
    for heading in ("candidate", "log-loss", "ROC AUC", "Brier score", "folds"):
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    for one in choice["candidates"]:
        figures = (f"{one['log_loss']:.4f} ± {one['log_loss_sd']:.4f}", f"{one['roc_auc']:.4f}",
                   f"{one['brier']:.4f}", str(one["folds"]))  # fmt: skip
        table.add_row(
            escape(one["name"]), *figures, style="bold" if one["name"] == choice["chosen"] else None
        )
    alone = choice["base_rate_alone"]
    table.add_row("the base rate alone", f"{alone['log_loss']:.4f}", "0.5000", f"{alone['brier']:.4f}", "")
    return table
