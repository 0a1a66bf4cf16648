"""Feature safety: makes built features fit for a model, and says how much of them rests on data.

Training learns each feature's statistics; serving fills gaps and bounds values by them, counts what is really
there, rejects the leads the feature specs say cannot be made safe, and measures drift against the training
sample. Pure; a lead's result depends on that lead alone, to the last bit. Rules are applied by the compiled
loops of `_score_kernels.c`, or by NumPy to the same bits. Never imputes with anything but training
statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.ai.domain import VERDICTS, BoolArray, CodeArray, FloatArray, IntArray, JsonObject
from app.ai.feature_transforms import PRESENT, UNSEEN
from app.ai.features import FeatureMatrix, FeatureSet
from app.ai.score_kernels import CHECKED, RULE, ScoreKernels, installed_kernels

DriftState = Literal["stable", "moderate", "drifting"]

MODERATE_PSI, DRIFTING_PSI = 0.1, 0.25
"""Customary thresholds of the population stability index (Lewis, An Introduction to Credit Scoring, 1992;
Siddiqi, Credit Risk Scorecards, 2006): below 0.1 no change worth acting on, from 0.25 a major one."""

_CHECKED = tuple(CHECKED.fields or ())
_TAIL = 0.001
_CAUTION, _ABSTAIN = np.uint8(VERDICTS.index("caution")), np.uint8(VERDICTS.index("abstain"))
_SMALLEST = 5e-324  # no coverage but 0 is less
_ONE_IN_A_THOUSAND = 3.0902
_WEIGHT_UNITS = 2.0**40


@dataclass(frozen=True, slots=True)
class FeatureStatistics:
    """What training knows of one feature's distribution.

    `impute` is the lower median, a value that really occurred; `lower` and `upper` bound the training range.
    `edges` are ascending bin edges and `counts` the training cells in each bin: up to the first edge, between
    neighbours, above the last, and last of all the cells without a number.

    Raises:
        ValueError: the numbers do not fit together.
    """

    impute: float
    lower: float
    upper: float
    mean: float
    std: float
    present_share: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.impute, self.lower, self.upper, self.mean, self.std, self.present_share, *self.edges)
        if not np.all(np.isfinite(numbers)) or not self.lower <= self.impute <= self.upper or self.std < 0:
            raise ValueError("feature statistics need finite numbers, and the median inside the range")
        if any(left >= right for left, right in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("the edges of feature statistics must ascend")
        if len(self.counts) != len(self.edges) + 2 or min(self.counts) < 0:
            raise ValueError("feature statistics need a count of 0 or more for every bin")

    def to_json(self) -> JsonObject:
        """Returns the statistics as JSON values; `from_json` gives equal ones."""
        return {**asdict(self), "edges": list(self.edges), "counts": list(self.counts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FeatureStatistics":
        """Reads statistics back.

        Raises:
            ValueError: a field is missing or unknown, or see the class.
        """
        names = {entry.name for entry in fields(cls)}
        if set(data) != names:
            raise ValueError(f"feature statistics have exactly the fields {sorted(names)}")
        return cls(**{**data, "edges": tuple(data["edges"]), "counts": tuple(data["counts"])})


class SafetyRules(NamedTuple):
    """Strategies and statistics of `k` features.

    `table` (k,) are `RULE`: the training range and what is far outside it, the bounds of values, what is put
    in the place of one outside and, by state, of a gap, and which of them reject a lead; what the feature is
    worth in whole numbers, `units`, and whether it `speaks` for one of the `groups`. `units_in_all` are their
    sum, 1 at least.
    """

    table: NDArray[np.void]
    groups: int
    units_in_all: int

    @classmethod
    def of(
        cls,
        feature_set: FeatureSet,
        statistics: Sequence[FeatureStatistics],
        weights: Sequence[float] | None = None,
    ) -> "SafetyRules":
        """Returns the rules of a model.

        `weights` (k,) say what each feature is worth, none less than nothing; without them all groups are
        worth the same.
        """
        specs = feature_set.specs
        lower, upper, impute = np.array([(s.lower, s.upper, s.impute) for s in statistics]).T
        outside = np.array([spec.out_of_range for spec in specs])
        gaps = np.array([("impute", spec.missing, spec.invalid, spec.unseen) for spec in specs]).T
        clip = outside == "clip"
        speakers = np.array([group[0] for group in feature_set.groups])
        worth = np.isin(np.arange(len(specs)), speakers) if not weights else np.asarray(weights)
        # Whole numbers add up the same in any order, so a lead's share cannot depend on its batch.
        units = np.rint(worth * _WEIGHT_UNITS).astype(np.int64)
        table = np.zeros(len(specs), RULE)
        table["lower"], table["upper"], table["impute"] = lower, upper, impute
        table["far_below"], table["far_above"] = lower - (upper - lower), upper + (upper - lower)
        table["clip_below"], table["clip_above"] = (
            np.where(clip, lower, -np.inf),
            np.where(clip, upper, np.inf),
        )
        table["impute_outside"], table["reject_outside"] = outside == "impute", outside == "reject"
        table["fill"] = np.where(gaps == "keep", np.nan, np.where(gaps == "zero", 0.0, impute)).T
        table["reject_gap"] = (gaps == "reject").T
        table["indicator"] = [spec.transform == "is_present" for spec in specs]
        table["units"] = units
        table["speaks"][speakers] = True
        return cls(table, len(speakers), max(int(units.sum()), 1))


class CheckedFeatures(NamedTuple):
    """Features of `n` leads as the model gets them.

    `values` (n, k) is finite except where a spec says `keep`. `coverage` (n,) is the share of features that
    rest on data, those that read the same columns counting as one. `weighted_coverage` (n,) weighs each by
    what it is worth to the model, and counts only what is like the values the model has learnt from: nothing
    far outside the training range, no unseen text. `rejected` (n,) tells whether a feature rejects the lead,
    whose values then mean nothing. `out_of_range` (n,) counts values that lie far outside the training range.
    """

    values: FloatArray
    coverage: FloatArray
    weighted_coverage: FloatArray
    rejected: BoolArray
    out_of_range: IntArray


class FeatureDrift(NamedTuple):
    """How far one feature moved.

    `psi` is the population stability index, `noise` what it stays under by chance when nothing changed.
    """

    psi: float
    noise: float
    state: DriftState


@dataclass(frozen=True, slots=True)
class DriftStatistics:
    """Drift of leads against the training sample: feature by feature, and the worst state of all."""

    features: tuple[FeatureDrift, ...]
    state: DriftState


def build_statistics(matrix: FeatureMatrix) -> tuple[FeatureStatistics, ...]:
    """Learns the statistics of each feature from the training rows (n, k), n > 0.

    The range is that of the rows, except that an extreme farther from the central 99.8 % than these are wide
    is taken for a mistake and left outside (a fence after Tukey, Exploratory Data Analysis, 1977).
    """
    present = (matrix.states == PRESENT).mean(axis=0)
    return tuple(_describe(matrix.values[:, column], float(share)) for column, share in enumerate(present))


def check_features(
    matrix: FeatureMatrix,
    feature_set: FeatureSet,
    statistics: Sequence[FeatureStatistics],
    weights: Sequence[float] | None = None,
) -> CheckedFeatures:
    """Applies each feature's strategies to `n` leads; see `SafetyRules`, which whoever calls often keeps."""
    return apply_rules(matrix, SafetyRules.of(feature_set, statistics, weights))


def apply_rules(
    matrix: FeatureMatrix,
    rules: SafetyRules,
    find_kernels: Callable[[], ScoreKernels | None] = installed_kernels,
) -> CheckedFeatures:
    """Applies each feature's strategies to `n` leads; without kernels NumPy does, with the same result.

    A number beyond the training range is bounded, replaced, kept or rejected first; then every gap is filled.
    "Far outside" is farther from the range than the range is wide.
    """
    kernels = find_kernels()
    if kernels is None:
        return _apply_rules(matrix, rules)
    values, checked = kernels.check_features(*rules, matrix.values, matrix.states)
    return CheckedFeatures(values, **{name: checked[name] for name in _CHECKED})


def _apply_rules(matrix: FeatureMatrix, rules: SafetyRules) -> CheckedFeatures:
    """Does what `check_features` of the C source does, and is what that is tested against."""
    numbers, table = matrix.values, rules.table
    outside = (numbers < table["lower"]) | (numbers > table["upper"])
    unseen, gaps = matrix.states == UNSEEN, np.isnan(numbers)
    far = ((numbers < table["far_below"]) | (numbers > table["far_above"])) & ~unseen
    values = np.minimum(np.maximum(numbers, table["clip_below"]), table["clip_above"])
    np.copyto(values, table["impute"], where=outside & table["impute_outside"])
    reasons = outside & table["reject_outside"]
    rows, features = np.nonzero(gaps)
    states = matrix.states[rows, features]
    values[rows, features] = table["fill"][features, states]
    reasons[rows, features] = table["reject_gap"][features, states]
    # An indicator of absence does not rest on data, a rare text with a number does.
    there = (matrix.states == PRESENT) & ~(table["indicator"] & (numbers == 0)) | unseen & ~gaps
    return CheckedFeatures(
        values=values + 0.0,  # which zero a maximum returns is not defined
        coverage=there[:, table["speaks"]].sum(axis=1) / rules.groups,
        weighted_coverage=((there & ~far & ~unseen) @ table["units"]) / rules.units_in_all,
        out_of_range=far.sum(axis=1),
        rejected=np.any(reasons, axis=1),
    )


def build_verdicts(
    coverage: FloatArray, out_of_range: IntArray, min_coverage: float, abstain_below: float | None = None
) -> CodeArray:
    """Returns the verdict of each lead (n,) as an index into `VERDICTS`; `coverage` (n,) is the weighted one.

    `abstain` where nothing is there, or less than `abstain_below`, which the training measured, or without
    that less than a quarter of `min_coverage`: there is nothing to go on. `caution` where coverage is under
    `min_coverage`, or a value lies far outside the training range.
    """
    enough = min_coverage / 4 if abstain_below is None else min(abstain_below, min_coverage)
    verdicts = ((coverage < min_coverage) | (out_of_range > 0)) * _CAUTION  # otherwise 0, which is ok
    verdicts[coverage < max(enough, _SMALLEST)] = _ABSTAIN
    return verdicts


def drift_statistics(statistics: Sequence[FeatureStatistics], values: FloatArray) -> DriftStatistics:
    """Compares `r` rows of built features (r, k), before feature safety, with the training sample.

    Per feature the population stability index over the training bins, a gap being a bin of its own, with half
    a cell added to each so that an empty one stays finite. Without any change the index times r n / (r + n)
    follows a chi-squared distribution with one degree of freedom less than there are bins (Yurdakul,
    Statistical Properties of Population Stability Index, 2018): an index that chance exceeds once in a
    thousand is stable.
    """
    columns = enumerate(statistics if len(values) else ())
    features = tuple(_drift(entry, values[:, column]) for column, entry in columns)
    states = {feature.state for feature in features}
    worst: DriftState = (
        "drifting" if "drifting" in states else "moderate" if "moderate" in states else "stable"
    )
    return DriftStatistics(features, worst)


def _describe(values: FloatArray, present_share: float) -> FeatureStatistics:
    numbers = np.sort(values[~np.isnan(values)])
    if numbers.size == 0:
        return FeatureStatistics(0.0, 0.0, 0.0, 0.0, 0.0, present_share, (), (0, len(values)))
    low, median, high = np.quantile(numbers, (_TAIL, 0.5, 1 - _TAIL), method="inverted_cdf")
    fence = high - low if high > low else np.inf
    # Below the smallest value lies an empty bin, so that a sample that leaves the range downwards is seen.
    floor = np.nextafter(numbers[0], -np.inf)
    deciles = np.quantile(numbers, np.arange(1, 11) / 10, method="inverted_cdf")
    edges = np.unique(np.concatenate([[floor], deciles]))
    return FeatureStatistics(
        impute=float(median),
        lower=float(max(numbers[0], low - fence)),
        upper=float(min(numbers[-1], high + fence)),
        mean=float(numbers.mean()),
        std=float(numbers.std()),
        present_share=present_share,
        edges=tuple(edges.tolist()),
        counts=tuple(_histogram(values, edges).tolist()),
    )


def _histogram(values: FloatArray, edges: FloatArray) -> IntArray:
    gap = np.isnan(values)
    bins = np.where(gap, len(edges) + 1, np.searchsorted(edges, values, side="left"))
    return np.bincount(bins, minlength=len(edges) + 2)


def _drift(reference: FeatureStatistics, values: FloatArray) -> FeatureDrift:
    before = np.array(reference.counts)
    after = _histogram(values, np.array(reference.edges))
    expected = (before + 0.5) / (before + 0.5).sum()
    observed = (after + 0.5) / (after + 0.5).sum()
    psi = float(((observed - expected) * np.log(observed / expected)).sum())
    noise = _psi_noise(len(before), int(before.sum()), len(values))
    if psi < MODERATE_PSI or psi <= noise:
        return FeatureDrift(psi, noise, "stable")
    return FeatureDrift(psi, noise, "moderate" if psi < DRIFTING_PSI else "drifting")


def _psi_noise(bins: int, reference_rows: int, rows: int) -> float:
    """Returns the index that chance exceeds once in a thousand samples.

    The chi-squared quantile is Wilson and Hilferty's approximation (PNAS 17, 1931).
    """
    freedom = bins - 1
    spread = 2 / (9 * freedom)
    quantile = freedom * (1 - spread + _ONE_IN_A_THOUSAND * spread**0.5) ** 3
    return float(quantile * (1 / max(reference_rows, 1) + 1 / rows))
