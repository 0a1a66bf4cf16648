"""Which calibrator suits a model's scores: sigmoid, isotonic and Venn-Abers, compared on out-of-fold scores.

Each is judged by probabilities it did not see the outcomes of. None changes the model's ranking: ties that
steps and bounds create are broken by the score itself. Pure. Called by `app.training.choose`, and by
`recency` for `log_losses`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from app.ai.calibration import Calibrator, calibrate, calibration_statistics, fit_isotonic, fit_sigmoid
from app.ai.domain import FloatArray, IntArray, JsonObject
from app.ai.venn_abers import build_table

Method = Literal["sigmoid", "isotonic", "venn_abers"]

_FITS: Mapping[Method, Callable[[FloatArray, IntArray], Mapping[str, Any]]] = {
    "sigmoid": fit_sigmoid,
    "isotonic": fit_isotonic,
    "venn_abers": lambda raw, outcome: build_table(raw, outcome).to_json(),
}
TIE_BREAK = 1e-4
"""The share of the score itself in a probability: it moves none by more, and keeps apart scores that differ
by as little as 1e-11."""


class CalibratorChoice(NamedTuple):
    """A calibrator fitted on all out-of-fold scores, its cross-fitted probabilities, how all compared."""

    calibrator: Calibrator
    probability: FloatArray
    evidence: list[JsonObject]


def choose_calibrator(raw: FloatArray, outcome: IntArray, fold: IntArray) -> CalibratorChoice:
    """Chooses how to calibrate, on out-of-fold scores (m,), 0/1 outcomes (m,) and the folds (m,) they are of.

    The lowest log-loss wins, except that all within one standard error of it (of the difference, lead by
    lead) compete on calibration error instead: beyond that, the log-loss cannot tell them apart. The evidence
    has each method's log-loss, calibration error, and the error a perfect one would show with as many leads.
    """
    probability = {method: cross_fit(method, raw, outcome, fold) for method in _FITS}
    told = {method: calibration_statistics(each, outcome) for method, each in probability.items()}
    losses = {method: log_losses(each, outcome) for method, each in probability.items()}
    best = min(losses, key=lambda method: losses[method].mean())
    close = [method for method in losses if _is_close(losses[method] - losses[best])]
    chosen = min(close, key=lambda method: told[method]["ece"])
    evidence: list[JsonObject] = [
        {
            "method": method,
            "log_loss": round(told[method]["log_loss"], 6),
            "calibration_error": round(told[method]["ece"], 6),
            "noise_floor": round(told[method]["ece_floor"], 6),
        }
        for method in sorted(told, key=lambda method: (method != chosen, told[method]["log_loss"]))
    ]
    return CalibratorChoice(fit_calibrator(chosen, raw, outcome), probability[chosen], evidence)


def cross_fit(method: Method, raw: FloatArray, outcome: IntArray, fold: IntArray) -> FloatArray:
    """Returns probabilities (m,): those of a fold come from a calibrator fitted on the other folds.

    A lone fold is parted in two.
    """
    parts = fold if len(np.unique(fold)) > 1 else np.arange(len(raw)) % 2
    probability = np.empty(len(raw))
    for part in np.unique(parts):
        rest = parts != part
        probability[~rest] = calibrate(raw[~rest], fit_calibrator(method, raw[rest], outcome[rest]))
    return probability


def fit_calibrator(method: Method, raw: FloatArray, outcome: IntArray) -> Calibrator:
    """Fits within bounds of Laplace's rule of succession for a tenth of the rows.

    Even if the outermost tenth knows no exception, that is all the certainty it supports; and a bound that is
    never 0 or 1 keeps every log-loss finite.
    """
    edge = 1 / (len(raw) / 10 + 2)
    return Calibrator(method, _FITS[method](raw, outcome), lower=edge, upper=1 - edge, tie_break=TIE_BREAK)


def log_losses(probability: FloatArray, outcome: IntArray) -> FloatArray:
    """Returns the log-loss of each lead (n,), in nats, of probabilities (n,) none of which is 0 or 1."""
    losses: FloatArray = -np.log(np.where(outcome == 1, probability, 1 - probability))
    return losses


def _is_close(excess: FloatArray) -> bool:
    return bool(excess.mean() <= excess.std() / np.sqrt(len(excess)))
