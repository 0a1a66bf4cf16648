"""A logistic regression that trusts its features only as far as few outcomes speak for them.

A lead's log-odds are those of the base rate plus a weighted sum of its standardised features. How strong that
sum is at all is not chosen but averaged over: from nothing, which is believed beforehand and given up only on
evidence, to effects as large as real ones are. So with ten outcomes every lead is answered about the base
rate, and with eighty the features speak. Pure. Called by `app.training.day_one`.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from app.ai.domain import FloatArray, IntArray

STRENGTHS = (0.25, 0.5, 1.0, 2.0)
"""Prior variances of a lead's log-odds round the base rate; 1 is that of a model with a ROC AUC of 0.74."""

BELIEF_IN_NOTHING = 0.8
"""Prior probability that the features say nothing; the rest is spread evenly over `STRENGTHS`."""

CREDIBILITY_ROWS = 20.0
"""Outcomes at which the weights count for half."""

_STEPS, _CLOSE_ENOUGH, _RISE = 50, 1e-8, 1e-4
"""Newton's method: steps at most, the size of the last one, the share of the promised rise to reach."""


@dataclass(frozen=True, slots=True, eq=False)
class ShrunkFit:
    """Weights (k,) of the features, the intercept, and the posterior probability that the features matter."""

    weights: FloatArray
    intercept: float
    evidence: float

    def log_odds(self, values: FloatArray) -> FloatArray:
        """Returns the log-odds (n,) of standardised features (n, k)."""
        total: FloatArray = self.intercept + values @ self.weights
        return total


def fit_shrunk(values: FloatArray, outcome: IntArray, base_rate: float) -> ShrunkFit:
    """Fits standardised features (n, k) to 0/1 outcomes (n,), n >= 0.

    The leads at hand have the base rate's log-odds on average. The weights have independent normal priors
    whose variance gives a lead's log-odds one of `STRENGTHS`; each strength is fitted and judged by its
    evidence in Laplace's approximation (MacKay, Neural Computation 4(5), 1992; Bishop, Pattern Recognition
    and Machine Learning, 2006, 4.4), and the weights are averaged by posterior probability (Hoeting et al.,
    Statistical Science 14(4), 1999). With outcomes of one kind or none the weights are 0.

    Raises:
        ValueError: the base rate is not between 0 and 1.
    """
    if not 0 < base_rate < 1:
        raise ValueError("a base rate lies between 0 and 1")
    centre = values.mean(axis=0) if len(values) else np.zeros(values.shape[1])
    centred, start = values - centre, float(logit(base_rate))
    spread = float((centred**2).sum(axis=1).mean()) if len(values) else 0.0
    if len(np.unique(outcome)) < 2 or spread == 0:
        return ShrunkFit(np.zeros(values.shape[1]), start, 0.0)
    fits = [_fit(centred, outcome, start, spread / strength) for strength in STRENGTHS]
    share = (1 - BELIEF_IN_NOTHING) / len(STRENGTHS)
    nothing = np.log(BELIEF_IN_NOTHING) + _log_likelihood(np.full(len(outcome), start), outcome)
    scores = np.array([nothing, *(np.log(share) + evidence for _, evidence in fits)])
    belief = np.exp(scores - scores.max())
    belief /= belief.sum()
    credibility = len(outcome) / (len(outcome) + CREDIBILITY_ROWS)
    weights = credibility * (belief[1:] @ np.array([found for found, _ in fits]))
    return ShrunkFit(weights, start - float(centre @ weights), float(1 - belief[0]))


def _fit(values: FloatArray, outcome: IntArray, start: float, precision: float) -> tuple[FloatArray, float]:
    """Returns the most probable weights under a normal prior of this precision, and the log-evidence."""
    features = values.shape[1]

    def log_posterior(weights: FloatArray) -> float:
        return _log_likelihood(start + values @ weights, outcome) - precision * float(weights @ weights) / 2

    def curvature(weights: FloatArray) -> FloatArray:
        rate = expit(start + values @ weights)
        bent: FloatArray = (values.T * (rate * (1 - rate))) @ values + precision * np.eye(features)
        return bent

    weights = np.zeros(features)
    for _ in range(_STEPS):
        gradient = values.T @ (outcome - expit(start + values @ weights)) - precision * weights
        step = np.linalg.solve(curvature(weights), gradient)
        # A full step overshoots where a rare feature tells much: where it starts, the curve is flat.
        while (
            np.abs(step).max() >= _CLOSE_ENOUGH
            and log_posterior(weights + step) < log_posterior(weights) + _RISE * gradient @ step
        ):
            step = step / 2
        weights = weights + step
        if np.abs(step).max() < _CLOSE_ENOUGH:
            break
    spread = np.linalg.slogdet(curvature(weights))[1] - features * np.log(precision)
    return weights, float(log_posterior(weights) - spread / 2)


def _log_likelihood(log_odds: FloatArray, outcome: IntArray) -> float:
    return float((outcome * log_odds - np.logaddexp(0, log_odds)).sum())
