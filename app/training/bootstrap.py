"""How far held-out metrics could lie from what they are on all leads of this kind: 95 % bootstrap intervals.

Pure; never fits. Called by `app.training.describe` for the manifest and by `app.training.evaluation`.
"""

from collections.abc import Callable

import numpy as np

from app.ai.calibration import equal_mass_bins
from app.ai.domain import FloatArray, IntArray

RESAMPLES = 1000
_CELLS_AT_ONCE = 2_000_000
_ENDS = (0.025, 0.975)

Sampler = Callable[[int], dict[str, FloatArray]]


def bootstrap_intervals(probability: FloatArray, outcome: IntArray, seed: int) -> dict[str, list[float]]:
    """Returns [lower, upper] of each metric of probabilities (n,) against 0/1 outcomes in which both occur.

    The percentile method (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) over
    1,000 plain resamples of the leads, outcomes as they fall; a resample without both classes is left out.

    A resample has the noise of the sample and its own, which inflates `ece`: its resamples are moved down
    to the measured error, so the interval tells how far that error spreads at this many leads. `ece_floor`
    is what to compare it with: the range of 95 % of perfectly calibrated models, whose outcomes are drawn
    from these very probabilities.
    """
    sample = _Sample(probability, outcome)
    rng = np.random.default_rng(seed)
    measured = sample.measure(np.ones((1, sample.n), dtype=np.int64))["ece"][0]
    resampled = _collect(lambda resamples: sample.measure(sample.resample(resamples, rng)), sample.n)
    resampled["ece"] = np.maximum(resampled["ece"] - resampled["ece"].mean() + measured, 0.0)
    perfect = _collect(lambda draws: {"ece_floor": sample.perfect_errors(draws, rng)}, sample.n)
    return {
        name: [round(float(end), 6) for end in np.nanquantile(values, _ENDS)]
        for name, values in {**resampled, **perfect}.items()
    }


class _Sample:
    """The leads in ascending order of probability; equal probabilities are one group."""

    def __init__(self, probability: FloatArray, outcome: IntArray) -> None:
        order = np.argsort(probability, kind="stable")
        self.n = len(order)
        self.p = np.asarray(probability, dtype=np.float64)[order]
        self.happened = outcome[order]
        _, self.group_starts, self.group = np.unique(self.p, return_index=True, return_inverse=True)
        self.bin_starts = np.array([part[0] for part in equal_mass_bins(np.arange(self.n, dtype=np.float64))])
        given = np.where(self.happened == 1, self.p, 1 - self.p)
        self.log_losses = -np.log(np.maximum(given, np.finfo(np.float64).eps))

    def resample(self, resamples: int, rng: np.random.Generator) -> IntArray:
        """Returns how often each lead was drawn (resamples, n)."""
        drawn = rng.integers(0, self.n, (resamples, self.n)) + self.n * np.arange(resamples)[:, None]
        return np.bincount(drawn.ravel(), minlength=resamples * self.n).reshape(resamples, self.n)

    def measure(self, counts: IntArray) -> dict[str, FloatArray]:
        """Returns the metrics of samples that hold each lead so many times (samples, n)."""
        rows = np.add.reduceat(counts, self.group_starts, axis=1)
        hits = np.add.reduceat(counts * self.happened, self.group_starts, axis=1)
        positives = hits.sum(axis=1).astype(np.float64)
        negatives = self.n - positives
        misses = rows - hits
        below = np.cumsum(misses, axis=1) - 0.5 * misses
        from_top_rows, from_top_hits = (np.cumsum(part[:, ::-1], axis=1)[:, ::-1] for part in (rows, hits))
        precision = from_top_hits / np.maximum(from_top_rows, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            roc_auc = (hits * below).sum(axis=1) / (positives * negatives)
            pr_auc = (hits * precision).sum(axis=1) / np.where(negatives > 0, positives, np.nan)
        place = np.repeat(np.tile(np.arange(self.n), len(counts)), counts.ravel()).reshape(counts.shape)
        shares = hits / np.maximum(rows, 1)
        return {
            "roc_auc": roc_auc,
            "pr_auc": pr_auc,
            "brier": counts @ (self.p - self.happened) ** 2 / self.n,
            "log_loss": counts @ self.log_losses / self.n,
            "ece": self._errors(self.p[place], np.take_along_axis(shares, self.group[place], axis=1)),
        }

    def perfect_errors(self, draws: int, rng: np.random.Generator) -> FloatArray:
        """Returns the calibration errors (draws,) of models whose every probability is true."""
        hits = np.add.reduceat(
            rng.random((draws, self.n)) < self.p, self.group_starts, axis=1, dtype=np.int64
        )
        shares = hits / np.bincount(self.group)
        return self._errors(np.broadcast_to(self.p, (draws, self.n)), shares[:, self.group])

    def _errors(self, predicted: FloatArray, observed: FloatArray) -> FloatArray:
        """Returns the mean distance (samples,) over bins of equal mass, as `calibration_statistics` does."""
        distances = np.abs(np.add.reduceat(predicted - observed, self.bin_starts, axis=1))
        errors: FloatArray = distances.sum(axis=1) / self.n
        return errors


def _collect(draw: Sampler, n: int) -> dict[str, FloatArray]:
    """Draws all samples, in parts that keep the memory bounded."""
    at_once = min(max(_CELLS_AT_ONCE // n, 1), RESAMPLES)
    parts = [draw(min(at_once, RESAMPLES - done)) for done in range(0, RESAMPLES, at_once)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
