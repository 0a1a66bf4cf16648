"""What a model is worth on leads it has not seen: the metrics of the manifest.

Pure; never fits and never sees a training row.
"""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from app.ai.calibration import calibration_statistics
from app.ai.domain import FloatArray, IntArray
from app.ai.features import FeatureMatrix
from app.errors import TrainingError
from app.training.fit import FittedCandidate

_IMPORTANCE_ROWS = 2000


def evaluate(probability: FloatArray, outcome: IntArray, threshold: float) -> dict[str, float]:
    """Returns the metrics of calibrated probabilities (n,) against 0/1 outcomes.

    `lift_at_10_percent` is the outcome rate of the top tenth over that of all. The standard error of the ROC
    AUC is Hanley and McNeil's (Radiology 143, 1982). Brier, log-loss and calibration error come from
    `app.ai.calibration`.

    Raises:
        TrainingError: only one outcome occurs, so nothing can be told apart.
    """
    if len(np.unique(outcome)) < 2:
        raise TrainingError(
            f"{int(outcome.sum())} of {len(outcome)} leads reached the outcome: nothing can be measured "
            "unless some did and some did not."
        )
    chosen = probability >= threshold
    hits = int((chosen & (outcome == 1)).sum())
    positives, predicted = int(outcome.sum()), int(chosen.sum())
    roc_auc = float(roc_auc_score(outcome, probability))
    return {
        "roc_auc": roc_auc,
        "roc_auc_standard_error": _auc_standard_error(roc_auc, positives, len(outcome) - positives),
        "pr_auc": float(average_precision_score(outcome, probability)),
        "accuracy": float((chosen == (outcome == 1)).mean()),
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / positives,
        "f1_score": 2 * hits / (predicted + positives),
        "lift_at_10_percent": _lift(probability, outcome, 0.1),
        **{name: float(value) for name, value in calibration_statistics(probability, outcome).items()},
    }


def measure_rate_alone(rate: float, outcome: IntArray) -> dict[str, float]:
    """Returns Brier score and log-loss of answering this rate to all leads (n,): what a model has to beat."""
    told = calibration_statistics(np.full(len(outcome), rate), outcome)
    return {name: round(float(told[name]), 6) for name in ("brier", "log_loss")}


def measure_importance(
    fitted: FittedCandidate, matrix: FeatureMatrix, outcome: IntArray, seed: int
) -> dict[str, float]:
    """Returns the ROC AUC each group of features is worth, by its name.

    That is what is lost when it is shuffled as a whole among at most 2,000 rows. Groups that say the same
    share their worth, so each of them looks less important than it is.
    """
    random = np.random.default_rng(seed)
    rows = np.sort(random.permutation(len(outcome))[:_IMPORTANCE_ROWS])
    values, states, happened = matrix.values[rows], matrix.states[rows], outcome[rows]
    full = roc_auc_score(happened, fitted.raw_scores(FeatureMatrix(values, states)))
    losses = {}
    for group, name in zip(fitted.feature_set.groups, fitted.feature_set.group_names, strict=True):
        order, columns = random.permutation(len(rows))[:, None], list(group)
        shuffled, told = values.copy(), states.copy()
        shuffled[:, columns], told[:, columns] = values[order, columns], states[order, columns]
        losses[name] = round(
            float(full - roc_auc_score(happened, fitted.raw_scores(FeatureMatrix(shuffled, told)))), 6
        )
    return losses


def _auc_standard_error(auc: float, positives: int, negatives: int) -> float:
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    return float(np.sqrt(max(auc * (1 - auc) + spread, 0.0) / (positives * negatives)))


def _lift(probability: FloatArray, outcome: IntArray, share: float) -> float:
    # Equal probabilities share their outcomes evenly, so the order of the rows does not matter.
    _, group, rows = np.unique(probability, return_inverse=True, return_counts=True)
    shared = (np.bincount(group, weights=outcome) / rows)[group]
    top = np.argsort(-probability, kind="stable")[: max(1, round(share * len(outcome)))]
    return float(shared[top].mean() / outcome.mean())
