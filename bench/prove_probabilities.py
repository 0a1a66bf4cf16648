"""What the probabilities are worth on the leads of any CSV file, row by row beside what was to be reached.

python -m bench.prove_probabilities --csv FILE --id COLUMN --label COLUMN [--missing TEXT] [--exclude A,B]
    [--order-by COLUMN] [--target ROW=NUMBER] [--only ROW,ROW] [--learning-curve]

The file is imported into a throwaway database, read by the rules of `leadscore train`, and everything `train`
does to rows (derive, choose, fit, calibrate) is done inside each fold on the other four; what is judged is
what would be answered. Folds are `StratifiedKFold(5, shuffle=True, random_state=0)` over the rows in the
order of the file. The rows on later leads order all of them by a column, learn from the first four fifths and
judge the last. Other rows are proved by a test; they show the figures it measured. Ends with status 1 if a
target is missed.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from xml.etree import ElementTree as ET

import numpy as np
from rich.console import Console
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from app.ai.domain import BoolArray, FloatArray, InputColumn, IntArray, Progress
from app.db.csv_file import open_csv
from app.db.csv_import import import_csv
from app.db.embedded import open_embedded
from app.db.leads import fetch_all_chunks
from app.errors import CommandError, LeadScoringError
from app.training.answers import answer_leads
from app.training.bootstrap import bootstrap_intervals
from app.training.candidates import Candidate, list_candidates
from app.training.choose import choose_model
from app.training.fit import CalibratedModel
from app.training.interval_coverage import measure_coverage
from app.training.leakage import check_leakage
from app.training.model_metrics import evaluate, measure_importance
from app.training.options import ModelType, TrainingOptions
from app.training.rows import TrainingRows, choose_columns, fetch_rows
from app.training.splits import group_rows
from app.training.train import choose_features
from app.training.verdict import measure_rule

ROOT = Path(__file__).parent.parent
TABLE = "leads"
FOLDS = 5
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


class Judged(NamedTuple):
    """What a model says of leads it has not seen, and what became of them.

    `probability` is what is answered: `calibrated`, or the base rate where the verdict abstains.
    """

    raw: FloatArray
    calibrated: FloatArray
    probability: FloatArray
    intervals: FloatArray
    outcome: IntArray

    def metric(self, name: str) -> float:
        """Returns one of the metrics of a manifest."""
        return evaluate(self.probability, self.outcome, 0.5)[name]

    def take(self, rows: BoolArray) -> "Judged":
        """Returns these leads, by mask."""
        return Judged(*(part[rows] for part in self))


@dataclass(frozen=True, eq=False)
class Leads:
    """The decided leads of the file, in its order, and how `train` is asked to treat them."""

    options: TrainingOptions
    columns: tuple[InputColumn, ...]
    rows: TrainingRows
    candidates: Sequence[Candidate]
    progress: Progress

    @cached_property
    def folds(self) -> list[Judged]:
        """Each fold, judged by a model of the other four."""
        return self.judge_folds("fold", 1.0)

    @cached_property
    def pooled(self) -> Judged:
        """The folds, laid together."""
        return Judged(*map(np.concatenate, zip(*self.folds, strict=True)))

    @cached_property
    def later(self) -> tuple[Judged, BoolArray]:
        """The last fifth, judged by a model of those before; and which of them copy no earlier lead."""
        if self.rows.order is None:
            raise CommandError("which leads are the later ones? Name a column that says so with --order-by")
        turn = np.argsort(self.rows.order, kind="stable")
        cut = self.rows.leads.n - self.rows.leads.n // FOLDS
        before, after = np.sort(turn[:cut]), np.sort(turn[cut:])
        group = group_rows(self.rows)
        judged = self._judge("later leads", self.rows.take(before), self.rows.take(after))
        return judged, ~np.isin(group[after], group[before])

    def judge_folds(self, stage: str, share: float) -> list[Judged]:
        """Judges each fold by a model of this share of the other four, drawn at random."""
        splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        unordered = replace(self.rows, order=None)
        judged = []
        for number, (others, fold) in enumerate(splitter.split(unordered.outcome, unordered.outcome)):
            kept = np.random.default_rng(number).permutation(others)[: round(share * len(others))]
            part = f"{stage} {number + 1} of {FOLDS}"
            judged.append(self._judge(part, unordered.take(np.sort(kept)), unordered.take(fold)))
        return judged

    def choose(self, part: str, rows: TrainingRows) -> CalibratedModel:
        """Does to these rows what `train` does to its training part."""
        build, _ = choose_features(self.options, self.columns, rows)
        return choose_model(
            rows,
            build,
            self.candidates,
            self.options.seed,
            lambda stage, done, total: self.progress(f"{part}: {stage}", done, total),
        )

    def _judge(self, part: str, learnt: TrainingRows, held_out: TrainingRows) -> Judged:
        model, seed = self.choose(part, learnt), self.options.seed
        matrix = model.fitted.build_matrix(held_out)
        importance = measure_importance(model.fitted, matrix, held_out.outcome, seed)
        answers = answer_leads(model, matrix, measure_rule(model, importance, learnt, held_out, seed))
        return Judged(
            answers.raw,
            model.probabilities(matrix),
            answers.probability,
            answers.intervals,
            held_out.outcome,
        )


class Figure(NamedTuple):
    """A measured number, and what is worth knowing beside it."""

    value: float
    beside: str


class Row(NamedTuple):
    """A row of the table: what it is, on which side of a target it has to be, and how it is measured."""

    heading: str
    side: Literal["at least", "at most"]
    measure: Callable[[Leads], Figure]


class Proof(NamedTuple):
    """A row that a test proves: what it is, the file and the name of the test."""

    heading: str
    file: str
    test: str


def _mean_of_folds(name: str) -> Callable[[Leads], Figure]:
    def measure(leads: Leads) -> Figure:
        values = [fold.metric(name) for fold in leads.folds]
        return Figure(float(np.mean(values)), f"mean of {FOLDS} folds, sd {np.std(values, ddof=1):.4f}")

    return measure


def _measure_calibration(leads: Leads) -> Figure:
    pooled = leads.pooled
    low, high = bootstrap_intervals(pooled.probability, pooled.outcome, 0)["ece_floor"]
    beside = f"floor {pooled.metric('ece_floor'):.4f}; 95 % of perfect models show {low:.4f} to {high:.4f}"
    return Figure(pooled.metric("ece"), beside)


def _measure_ranking(leads: Leads) -> Figure:
    changes = [
        abs(roc_auc_score(fold.outcome, fold.raw) - roc_auc_score(fold.outcome, fold.calibrated))
        for fold in leads.folds
    ]
    return Figure(max(changes), f"largest of {FOLDS} folds")


def _measure_intervals(leads: Leads) -> Figure:
    pooled = leads.pooled
    told = measure_coverage(pooled.intervals, pooled.probability, pooled.outcome)
    beside = (
        f"of {told['bins']} bins, at the 95 % margin of a bin's rate; "
        f"{told['covered_within_one_error']} within one standard error, "
        f"{told['covered_without_width']} by the probability alone; mean width {told['mean_width']:.4f}"
    )
    return Figure(told["covered"], beside)


def _measure_later(name: str) -> Callable[[Leads], Figure]:
    def measure(leads: Leads) -> Figure:
        later, unlike = leads.later
        low, high = bootstrap_intervals(later.probability, later.outcome, 0)[name]
        beside = f"{len(unlike):,} leads, 95 %: {low:.4f} to {high:.4f}"
        others = later.take(unlike)
        if len(np.unique(others.outcome)) == 2:
            beside += f"; {others.metric(name):.4f} on the {len(others.outcome):,} that copy no earlier one"
        return Figure(later.metric(name), beside)

    return measure


ROWS = {
    "roc_auc": Row("ROC AUC", "at least", _mean_of_folds("roc_auc")),
    "pr_auc": Row("PR AUC, after calibration", "at least", _mean_of_folds("pr_auc")),
    "brier": Row("Brier score", "at most", _mean_of_folds("brier")),
    "log_loss": Row("log-loss", "at most", _mean_of_folds("log_loss")),
    "calibration_error": Row(
        "calibration error, 15 equal-mass bins, pooled", "at most", _measure_calibration
    ),
    "ranking": Row("ROC AUC changed by calibrating", "at most", _measure_ranking),
    "intervals": Row("bins whose rate lies in the mean interval", "at least", _measure_intervals),
    "later_roc_auc": Row("later leads: ROC AUC", "at least", _measure_later("roc_auc")),
    "later_brier": Row("later leads: Brier score", "at most", _measure_later("brier")),
}

PROOFS = {
    "receipts": Proof(
        "receipts add up to the probability, to 1e-9",
        "test_receipts",
        "test_receipts_of_leads_with_gaps_add_up_for_every_model_and_calibrator",
    ),
    "width": Proof(
        "a Venn-Abers pair is no confidence interval: true rates of groups lie outside most mean pairs",
        "test_interval_coverage",
        "test_a_pair_is_no_confidence_interval_for_the_rate_of_a_group",
    ),
    "verdict": Proof(
        "Brier score rises from ok to caution to abstain",
        "test_honest_verdict",
        "test_real_leads_are_answered_worse_from_ok_to_caution_to_abstain",
    ),
    "not_in_yet": Proof(
        "calibration error under 0.02 where young leads wait, over 0.05 where they are taken for lost",
        "test_outcomes_not_in_yet",
        "test_waiting_for_the_horizon_calibrates_and_taking_young_leads_for_lost_does_not",
    ),
    "day_one": Proof(
        "log-loss under 1 % above the base rate's at 10, 20, 40 and 80 outcomes",
        "test_day_one",
        "test_the_rule_holds_on_real_leads_and_where_their_features_are_made_to_say_nothing",
    ),
}
"""Rows on other points; each test says what it measured with `record_property`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the status the program ends with."""
    asked = parse(arguments)
    chosen = asked.only or [*ROWS, *PROOFS]
    missed = 0
    with _shown_progress() as progress:
        if asked.learning_curve or set(chosen) & set(ROWS):
            with open_leads(asked, progress) as leads:
                rate = leads.rows.outcome.mean()
                print(f"{leads.rows.leads.n:,} leads, {rate:.1%} with the outcome; model: {asked.model}\n")
                if asked.learning_curve:
                    _print_learning_curve(leads)
                    return 0
                if leads.rows.order is None and not asked.only:
                    chosen = [name for name in chosen if not name.startswith("later")]
                for name in (name for name in ROWS if name in chosen):
                    missed += not _print_row(asked, name, leads)
        for name in (name for name in PROOFS if name in chosen):
            progress(name, 0, 0)
            missed += not _print_proof(name)
    return 1 if missed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program when it asks for what there is not."""
    parser = argparse.ArgumentParser(prog="prove_probabilities", description=__doc__.partition("\n")[0])
    parser.add_argument("--csv", type=Path, required=True, help="the leads")
    parser.add_argument("--id", required=True, help="the column that identifies a lead")
    parser.add_argument("--label", required=True, help="the column with the outcome as two values")
    parser.add_argument("--missing", action="append", default=[], help="a text that means missing")
    parser.add_argument("--exclude", type=_names, default=(), help="columns the model must not see")
    parser.add_argument("--order-by", metavar="COLUMN", help="rises in the order in which leads came to be")
    parser.add_argument("--model", choices=get_args(ModelType), default="auto")
    parser.add_argument("--target", action="append", default=[], metavar="ROW=NUMBER", help="what to reach")
    parser.add_argument("--only", type=_names, default=(), metavar="ROW", help="these rows of the table")
    parser.add_argument(
        "--learning-curve", action="store_true", help="ROC AUC by the share of leads learnt from"
    )
    asked = parser.parse_args(arguments)
    asked.target = {name: float(number) for name, _, number in (one.partition("=") for one in asked.target)}
    if unknown := ({*asked.only} - {*ROWS, *PROOFS}) | ({*asked.target} - {*ROWS}):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; rows: {', '.join([*ROWS, *PROOFS])}")
    asked.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--only" in asked.arguments:
        at = asked.arguments.index("--only")
        del asked.arguments[at : at + 2]
    return asked


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextmanager
def open_leads(asked: argparse.Namespace, progress: Progress) -> Iterator[Leads]:
    """Imports the file into a database of its own, and reads it as `train` does; all gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="leadscore-") as var, open_embedded(Path(var)) as url:
        summary = import_csv(
            url,
            asked.csv,
            table=TABLE,
            id_column=asked.id,
            label_column=asked.label,
            missing=asked.missing,
            progress=progress,
        )
        options = TrainingOptions(
            url=url,
            model_dir=Path(var),
            source=TABLE,
            label=summary.label,
            exclude=asked.exclude,
            order_by=asked.order_by,
            model=asked.model,
        )
        columns, _ = choose_columns(options)
        rows = fetch_rows(options, columns, progress)[0]
        check_leakage(rows.leads, rows.outcome, rows.as_of, columns, ())
        in_file_order = rows.take(_find_file_order(asked, options))
        yield Leads(options, columns, in_file_order, list_candidates(options.model), progress)


def _find_file_order(asked: argparse.Namespace, options: TrainingOptions) -> IntArray:
    """Returns, for the decided leads in the order of the file, their places in the order they are read in."""
    with open_csv(asked.csv) as file:
        at = file.header.index(asked.id)
        line = {record.fields[at]: record.line for record in file.records("order")}
    lines: list[int] = []
    for chunk in fetch_all_chunks(options.url, TABLE, [InputColumn(str(options.label), "boolean")]):
        decided = chunk.leads.columns[str(options.label)].present.tolist()
        lines += [line[ref.decode()] for ref in compress(chunk.external_refs, decided) if ref is not None]
    return np.argsort(lines)


def _print_row(asked: argparse.Namespace, name: str, leads: Leads) -> bool:
    row, target = ROWS[name], asked.target.get(name)
    figure = row.measure(leads)
    reached = target is None or (figure.value >= target if row.side == "at least" else figure.value <= target)
    wanted = "" if target is None else f", {row.side} {target:g}: {'yes' if reached else 'NO'}"
    value = f"{figure.value:.4f}" if isinstance(figure.value, float) else str(figure.value)
    if 0 < figure.value < 5e-5:
        value = f"{figure.value:.0e}"
    _print(f"{row.heading}: {value}{wanted}", f"({figure.beside})", _command(asked, name))
    return reached


def _print_proof(name: str) -> bool:
    proof = PROOFS[name]
    test = f"tests/{proof.file}.py::{proof.test}"
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={told}", test]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        cases = list(ET.parse(told).iter("testcase")) if told.exists() else []  # noqa: S314 - pytest wrote it
    held = bool(cases) and all(
        case.find(word) is None for case in cases for word in ("failure", "error", "skipped")
    )
    measured = [f"{one.get('name')} {one.get('value')}" for case in cases for one in case.iter("property")]
    beside = f"({'; '.join(measured)})" if measured else "(the test holds the figures)"
    _print(f"{proof.heading}: {'yes' if held else 'NO'}", beside, f"pytest {test}")
    return held


def _print(headline: str, beside: str, command: str) -> None:
    print(f"{headline}\n    {beside}\n    $ {command}\n", flush=True)


def _command(asked: argparse.Namespace, name: str) -> str:
    if "MAKELEVEL" in os.environ:
        return f"make prove-probabilities ONLY={name}"
    return shlex.join(["python", "-m", "bench.prove_probabilities", *asked.arguments, "--only", name])


def _print_learning_curve(leads: Leads) -> None:
    """Prints the ROC AUC in the folds of the model chosen on all rows, by how many others it learns from."""
    chosen = leads.choose("all", replace(leads.rows, order=None)).fitted.candidate
    print(f"{chosen.name}; learnt from so many leads outside the fold, drawn at random:")
    alone = replace(leads, candidates=(chosen,))
    for share in SHARES:
        values = [
            fold.metric("roc_auc") for fold in alone.judge_folds(f"{share:.0%} of the leads, fold", share)
        ]
        rows = round(share * leads.rows.leads.n * (FOLDS - 1) / FOLDS)
        print(f"  {rows:,}: ROC AUC {np.mean(values):.4f} (sd {np.std(values, ddof=1):.4f})", flush=True)


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    console, last = Console(stderr=True), ""
    with console.status("starting") as status:

        def show(stage: str, done: int, total: int) -> None:
            nonlocal last
            status.update(f"{stage} {done:,}" + (f" of {total:,}" if total else ""))
            if stage != last and not console.is_terminal:
                console.print(f"... {stage}")
            last = stage

        yield show


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LeadScoringError as exc:
        sys.exit(str(exc))
