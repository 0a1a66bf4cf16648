"""Whether probabilities are true, bin by bin: what was predicted, what happened, and what chance explains.

Pure. Called by `describe` for the manifest, by `evaluation`, and by the model card.
"""

from dataclasses import astuple, dataclass

from scipy.stats import binom

from app.ai.calibration import equal_mass_bins
from app.ai.domain import FloatArray, IntArray

BINS = 15


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Leads with similar probabilities: their mean, the share that reached the outcome, how many they are.

    In 95 of 100 samples this size the share of a perfectly calibrated model lies in `low` to `high`.
    """

    predicted: float
    observed: float
    low: float
    high: float
    leads: int

    @property
    def inside(self) -> bool:
        """Whether the share is one that chance alone explains."""
        return self.low <= self.observed <= self.high


def build_reliability_bins(probability: FloatArray, outcome: IntArray) -> list[ReliabilityBin]:
    """Returns up to 15 bins of equal size, lowest first.

    The band is that of the binomial distribution (consistency bars; Broecker and Smith, Weather and
    Forecasting 22, 2007). Probabilities that differ within a bin vary less, so it is never too narrow.
    """
    bins = []
    for part in equal_mass_bins(probability, BINS):
        n, predicted = len(part), float(probability[part].mean())
        low, high = binom.ppf((0.025, 0.975), n, min(predicted, 1.0)) / n
        bins.append(ReliabilityBin(predicted, float(outcome[part].mean()), float(low), float(high), n))
    return bins


def describe_reliability(probability: FloatArray, outcome: IntArray) -> list[list[float]]:
    """Returns the bins for JSON: [mean predicted, share that happened, band from, band to, leads]."""
    return [
        [round(number, 6) for number in astuple(one)] for one in build_reliability_bins(probability, outcome)
    ]
