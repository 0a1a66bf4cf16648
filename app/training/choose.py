"""Chooses a model by evidence: candidates cross-validated on the same folds, then the winner's calibrator.

All candidates meet on one round of folds; the best of each model type go on to further rounds, so that the
last word is not the luck of one split. What counts is the log-loss of honestly calibrated probabilities: raw
scores of a balanced forest are no probabilities, and need not be. The winner's out-of-fold scores of the
first round then serve calibrators, threshold and intervals. Pure. Called by `app.training.train`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import joblib
import numpy as np
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

from app.ai.calibration import calibration_statistics, shift_log_odds
from app.ai.domain import BoolArray, FloatArray, IntArray, JsonObject, Progress
from app.ai.estimators import build_scorer
from app.ai.venn_abers import build_table
from app.errors import TrainingError
from app.training.calibrators import choose_calibrator, cross_fit, fit_calibrator
from app.training.candidates import Candidate
from app.training.fit import (
    CalibratedModel,
    FeatureBuilder,
    OutOfFold,
    choose_threshold,
    fit_estimator,
    fit_model,
    learn_features,
)
from app.training.model_metrics import measure_rate_alone
from app.training.recency import (
    HALF_LIVES,
    NEVER,
    Recency,
    choose_recency,
    fit_recent_shift,
    measure_base_rate,
    shift_table,
)
from app.training.rows import TrainingRows
from app.training.splits import Fold, build_folds

_METRICS = ("log_loss", "roc_auc", "brier")
Measured = list[tuple[float, float, float]]
"""Log-loss, ROC AUC and Brier score, fold by fold."""

ROUNDS = 3
"""How often the best of each model type are cross-validated where folds are drawn at random."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A candidate on one round of folds: raw scores, outcomes and folds of all test rows, each (m,)."""

    candidate: Candidate
    raw: FloatArray
    outcome: IntArray
    fold: IntArray

    def measure(self) -> Measured:
        """Measures cross-fitted Venn-Abers probabilities.

        One method for all candidates, which suits any shape and any number of scores: which calibrator the
        winner gets is another question.
        """
        probability = cross_fit("venn_abers", self.raw, self.outcome, self.fold)
        return [_measure(probability[part], self.outcome[part]) for part in _parts(self.fold)]


def choose_model(
    rows: TrainingRows,
    build: FeatureBuilder,
    candidates: Sequence[Candidate],
    seed: int,
    progress: Progress,
) -> CalibratedModel:
    """Returns the candidate that evidence favours, fitted on all rows and calibrated; names are distinct.

    Raises:
        TrainingError: the rows cannot be parted into folds, or nothing tells those of a fold apart.
    """
    folds = build_folds(rows, seed)
    trials = run_trials(rows, build, candidates, folds, seed=seed, progress=_under(progress, "compare"))
    measured = {trial.candidate.name: trial.measure() for trial in trials}
    finalists = _best_of_each_type(candidates, measured)
    # In the order of time there is but one way to part the rows.
    rounds = ROUNDS if rows.order is None and len(finalists) > 1 else 1
    for number in range(1, rounds):
        others, stage = build_folds(rows, seed + number), f"compare again ({number} of {rounds - 1})"
        for trial in run_trials(rows, build, finalists, others, seed=seed, progress=_under(progress, stage)):
            measured[trial.candidate.name] += trial.measure()
    ranked = sorted(
        candidates, key=lambda one: (-len(measured[one.name]), _mean_log_loss(measured[one.name]))
    )
    won = next(trial for trial in trials if trial.candidate == ranked[0])
    recency = NEVER
    if rows.order is not None:
        won, recency = _ask_recency(rows, build, won, seed, _under(progress, "weigh recent leads"))
    progress("fit", 0, 2)
    choice = choose_calibrator(won.raw, won.outcome, won.fold)
    progress("fit", 1, 2)
    fitted = fit_model(rows, build, won.candidate, seed)
    progress("fit", 2, 2)
    model = CalibratedModel(
        fitted=fitted,
        calibrator=choice.calibrator,
        threshold=choose_threshold(choice.probability, won.outcome),
        venn_abers=build_table(won.raw, won.outcome),
        base_rate=measure_base_rate(rows.outcome, rows.order, recency.half_life),
        out_of_fold=OutOfFold(
            np.concatenate([fold.test for fold in folds]), won.raw, choice.probability, won.outcome
        ),
        choice={
            "order": "random" if rows.order is None else "time",
            "folds": len(measured[ranked[0].name]),
            "candidates": [_describe(one, measured[one.name]) for one in ranked],
            "base_rate_alone": _measure_rate_alone(rows.outcome, folds),
            "chosen": ranked[0].name,
            "runner_up": ranked[1].name if len(ranked) > 1 else None,
            "calibrators": choice.evidence,
            "calibrator": choice.calibrator.method,
            "recency": recency.evidence,
        },
    )
    return _set_level_anew(model, won.fold) if recency.intercept else model


def run_trials(
    rows: TrainingRows,
    build: FeatureBuilder,
    candidates: Sequence[Candidate],
    folds: Sequence[Fold],
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Trial]:
    """Fits each candidate on each fold's training rows and scores its test rows the way serving does.

    Features are learnt once a fold, for all candidates. Fits share the cores; the result does not depend on
    how many there are.

    Raises:
        TrainingError: nothing tells the training rows of a fold apart.
    """
    total = len(candidates) * len(folds)
    progress(0, total)

    def list_fits() -> Iterator[Any]:
        for fold in folds:
            train = rows.take(fold.train)
            try:
                learnt = learn_features(train, build)
            except TrainingError as exc:
                raise TrainingError(f"models are compared on parts of the leads, and in one {exc}") from exc
            strangers = learnt.values_of(rows.take(fold.test))
            for one in candidates:
                yield joblib.delayed(_score)(one, learnt.values, train, strangers, seed)

    scores: list[list[FloatArray]] = [[] for _ in candidates]
    # Threads: fitting leaves Python for most of its time, and nothing has to be copied to another process.
    with threadpool_limits(1):
        done = joblib.Parallel(-1, prefer="threads", return_as="generator")(list_fits())
        for number, raw in enumerate(done):
            scores[number % len(candidates)].append(raw)
            progress(number + 1, total)
    outcome = np.concatenate([rows.outcome[fold.test] for fold in folds])
    fold_of = np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])
    return [
        Trial(candidate, np.concatenate(raw), outcome, fold_of)
        for candidate, raw in zip(candidates, scores, strict=True)
    ]


def _ask_recency(
    rows: TrainingRows,
    build: FeatureBuilder,
    won: Trial,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[Trial, Recency]:
    """Returns the trial with the half-life that foretells best, or as it was, and what was found."""
    weighted = [replace(won.candidate, half_life=half_life) for half_life in HALF_LIVES]
    trials = run_trials(rows, build, weighted, build_folds(rows, seed), seed=seed, progress=progress)
    by_half_life = {trial.candidate.half_life: trial for trial in (won, *trials)}
    method = choose_calibrator(won.raw, won.outcome, won.fold).evidence[0]["method"]
    recency = choose_recency(
        {half_life: trial.raw for half_life, trial in by_half_life.items()},
        won.outcome,
        won.fold,
        lambda raw, outcome: fit_calibrator(method, raw, outcome),
    )
    return by_half_life[recency.half_life], recency


def _set_level_anew(model: CalibratedModel, fold: IntArray) -> CalibratedModel:
    """Returns the model with all that it answers at the level of the latest fold, the base rate included."""
    told = model.out_of_fold
    shift = fit_recent_shift(model.calibrator, told.raw, told.outcome, fold)
    probability = shift_log_odds(told.probability, shift)
    return replace(
        model,
        calibrator=replace(model.calibrator, shift=shift),
        threshold=choose_threshold(probability, told.outcome),
        venn_abers=shift_table(model.venn_abers, shift),
        # Counted, not shifted: the shift starts from the level of the calibrator, not from that of all leads.
        base_rate=float(told.outcome[fold == fold.max()].mean()),
        out_of_fold=replace(told, probability=probability),
    )


def _score(
    candidate: Candidate, values: FloatArray, rows: TrainingRows, strangers: FloatArray, seed: int
) -> FloatArray:
    return build_scorer(fit_estimator(candidate, values, rows, seed, cores=1))(strangers)


def _under(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total)


def _parts(fold: IntArray) -> list[BoolArray]:
    return [fold == number for number in np.unique(fold)]


def _measure(probability: FloatArray, outcome: IntArray) -> tuple[float, float, float]:
    told = calibration_statistics(probability, outcome)
    return told["log_loss"], float(roc_auc_score(outcome, probability)), told["brier"]


def _measure_rate_alone(outcome: IntArray, folds: Sequence[Fold]) -> dict[str, float]:
    """Measures what the rate of each fold's training rows alone foretells of its test rows."""
    told = [measure_rate_alone(float(outcome[fold.train].mean()), outcome[fold.test]) for fold in folds]
    return {name: round(float(np.mean([one[name] for one in told])), 6) for name in ("brier", "log_loss")}


def _mean_log_loss(measured: Measured) -> float:
    return float(np.mean(measured, axis=0)[0])


def _best_of_each_type(
    candidates: Sequence[Candidate], measured: Mapping[str, Measured]
) -> tuple[Candidate, ...]:
    best: dict[str, Candidate] = {}
    for one in sorted(candidates, key=lambda one: _mean_log_loss(measured[one.name])):
        best.setdefault(one.model_type, one)
    return tuple(best.values())


def _describe(candidate: Candidate, measured: Measured) -> JsonObject:
    means, spreads = np.mean(measured, axis=0), np.std(measured, axis=0)
    told: JsonObject = {
        "name": candidate.name, "model_type": candidate.model_type, "params": dict(candidate.params),
        "folds": len(measured),
    }  # fmt: skip
    for name, mean, spread in zip(_METRICS, means.tolist(), spreads.tolist(), strict=True):
        told |= {name: round(mean, 6), f"{name}_sd": round(spread, 6)}
    return told
