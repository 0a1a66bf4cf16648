"""Calibration: raw scores to probabilities a person may act on, how sure they are, and how good.

Pure and vectorised. Element i of a result depends on element i of the input alone, to the last bit: only
element-by-element operations on contiguous arrays, no BLAS. Any float goes in (NaN, infinities, subnormals);
what comes out is finite, within the calibrator's bounds, and never ranks a higher score below a lower one.
Training fits, on scores of rows the model has not seen; the predictor applies, and never fits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from app.ai.domain import ConfidenceMethod, FloatArray, IntArray, JsonObject
from app.ai.score_kernels import ScoreKernels, installed_kernels
from app.ai.venn_abers import VennAbersTable, look_up, merge

CalibrationMethod = Literal["sigmoid", "spread", "isotonic", "venn_abers", "none"]

_PARAMS: Mapping[str, frozenset[str]] = {
    "sigmoid": frozenset({"slope", "intercept"}),
    "spread": frozenset({"steepness", "centre"}),
    "isotonic": frozenset({"scores", "probabilities"}),
    "venn_abers": frozenset({"scores", "p0", "p1"}),
    "none": frozenset(),
}
MAX_TIE_BREAK, MAX_SHIFT = 1e-3, 20.0
_OPTIONAL = frozenset({"tie_break", "shift"})
_HUGE = 1e150
"""Scores beyond it are taken for it, so that differences and products of two are finite."""
_LOGISTIC_STEP, _LOGISTIC_END = 2.0**-40, 750.0


@dataclass(frozen=True, slots=True)
class Calibrator:
    """How raw scores become probabilities, and the bounds they are kept in.

    - `sigmoid`: 1 / (1 + exp(-(slope * score + intercept))), fitted by `fit_sigmoid`; slope >= 0.
    - `spread`: 1 / (1 + exp(-steepness * (score - centre))): a fixed logistic spreading of scores that huddle
      round `centre`; steepness > 0. It makes numbers easier to tell apart, not truer.
    - `isotonic`: linear between the points (`scores`, `probabilities`), both ascending; level beyond them;
      fitted by `fit_isotonic`.
    - `venn_abers`: p1 / (1 - p0 + p1) out of the table (`scores`, `p0`, `p1`) of `app.ai.venn_abers`.
    - `none`: the score itself.

    Steps and bounds give one probability to leads that the model tells apart. `tie_break` is the small share
    in which the score itself, laid out between the bounds, is mixed into every probability: a ranking that is
    kept to the last lead, for a change no larger than that share. 0 leaves ties as they are.

    `shift` is added to the log-odds of what the method gives, before the bounds: how much more or less often
    leads come true of late than when the method was fitted.

    Raises:
        ValueError: unknown method, missing, superfluous or unusable parameters, or bounds outside [0, 1].
    """

    method: CalibrationMethod
    params: Mapping[str, Any]
    lower: float = 0.0
    upper: float = 1.0
    tie_break: float = 0.0
    shift: float = 0.0
    curve: "_Curve | VennAbersTable | None" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.method not in get_args(CalibrationMethod):
            raise ValueError(f"there is no calibration method {self.method!r}")
        if set(self.params) != _PARAMS[self.method]:
            raise ValueError(f"{self.method} has the parameters {sorted(_PARAMS[self.method])}")
        if not 0 <= self.lower <= self.upper <= 1:
            raise ValueError("the bounds of a probability are 0 <= lower <= upper <= 1")
        if not 0 <= self.tie_break <= MAX_TIE_BREAK:
            raise ValueError(f"a tie is broken by a share of 0 to {MAX_TIE_BREAK}")
        if not -MAX_SHIFT <= self.shift <= MAX_SHIFT:
            raise ValueError(f"log-odds are shifted by {-MAX_SHIFT} to {MAX_SHIFT}")
        object.__setattr__(self, "curve", _build_curve(self.method, self.params))

    def to_json(self) -> JsonObject:
        """Returns the calibrator as JSON values; `from_json` gives an equal one."""
        data = {"method": self.method, "params": dict(self.params), "lower": self.lower, "upper": self.upper}
        # Only where they are used: manifests written before there were any keep their digest.
        return data | {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Calibrator":
        """Reads a calibrator back.

        Raises:
            ValueError: a field is missing or unknown, or see the class.
        """
        if set(data) - _OPTIONAL != {"method", "params", "lower", "upper"}:
            raise ValueError(
                "a calibrator has the fields lower, method, params, upper and perhaps shift and tie_break"
            )
        return cls(**data)


def calibrate(
    raw: FloatArray,
    calibrator: Calibrator,
    find_kernels: Callable[[], ScoreKernels | None] = installed_kernels,
) -> FloatArray:
    """Returns the probabilities (n,) of raw scores (n,), within the calibrator's bounds.

    A NaN says nothing, so it must not put a lead above any other: it is taken for the lowest score there is.
    Without kernels it is NumPy that follows an isotonic curve, with the same result.
    """
    raw = np.ascontiguousarray(raw, dtype=np.float64)
    params, curve, kernels = calibrator.params, calibrator.curve, find_kernels()
    if isinstance(curve, _Curve) and kernels is not None:
        return kernels.calibrate_by_curve(
            curve, raw,
            lower=calibrator.lower, upper=calibrator.upper, tie_break=calibrator.tie_break,
            shift=_odds_factor(calibrator.shift) if calibrator.shift else 0.0,
        )  # fmt: skip
    scores = np.fmin(np.fmax(raw, -_HUGE), _HUGE)
    if calibrator.method == "sigmoid":
        scores = _logistic(params["slope"] * scores + params["intercept"])
    elif calibrator.method == "spread":
        scores = _logistic(params["steepness"] * (scores - params["centre"]))
    elif isinstance(curve, _Curve):
        scores = _interpolate(scores, curve)
    elif curve is not None:
        scores = merge(*look_up(curve, scores))
    if calibrator.shift:
        scores = shift_log_odds(scores, calibrator.shift)
    # Adding zero turns -0.0 into 0.0: which of the two a maximum returns is not defined.
    probability = np.minimum(np.maximum(scores, calibrator.lower), calibrator.upper) + 0.0
    return _break_ties(probability, raw, calibrator) if calibrator.tie_break else probability


def shift_log_odds(p: FloatArray, shift: float) -> FloatArray:
    """Returns probabilities (n,) whose log-odds are greater by `shift` (`MAX_SHIFT` at most, either way).

    0 and 1, and what lies beyond, become or stay 0 and 1. Never less for a greater probability: each of the
    steps, correctly rounded, keeps the order of the step before it, or reverses it.
    """
    inside = np.minimum(np.maximum(p, 0.0), 1.0)
    with np.errstate(divide="ignore", over="ignore"):
        shifted: FloatArray = 1.0 / (1.0 + (1.0 - inside) / inside * _odds_factor(shift))
    return shifted


def _odds_factor(shift: float) -> float:
    return float(np.exp(-shift))


def confidence(p: FloatArray, method: ConfidenceMethod, intervals: FloatArray | None = None) -> FloatArray:
    """Returns how sure each probability (n,) is of its side, in [0, 1].

    - `max_probability`: max(p, 1 - p), never under a half.
    - `margin`: |2 p - 1|, twice the distance from a half.
    - `entropy`: one less the binary entropy in bits (Shannon 1948).
    - `interval`: one less the width of `intervals` (n, 2), which this method alone needs.
    """
    if method == "interval":
        if intervals is None:
            raise ValueError("the confidence method interval needs intervals")
        width: FloatArray = intervals[:, 1] - intervals[:, 0]
        return 1.0 - width
    # Beyond 0 and 1 it is sure, and of a NaN as unsure as can be.
    likelier = np.fmax(np.minimum(np.maximum(p, 1.0 - p), 1.0), 0.5)
    if method == "max_probability":
        return likelier
    if method == "margin":
        return 2.0 * likelier - 1.0
    other = 1.0 - likelier
    bits = likelier * np.log2(likelier) + other * np.log2(np.where(other > 0, other, 1.0))
    return np.minimum(np.maximum(1.0 + bits, 0.0), 1.0)


def fit_sigmoid(raw: FloatArray, outcome: IntArray) -> dict[str, float]:
    """Fits slope and intercept of the sigmoid to raw scores (n,) and 0/1 outcomes (n,).

    Maximum likelihood on Platt's smoothed targets (Platt, Probabilistic Outputs for Support Vector Machines,
    1999), by Newton's method with backtracking on scores brought to mean 0 and deviation 1 (Lin, Lin and
    Weng, A Note on Platt's Probabilistic Outputs, Machine Learning 68, 2007). If the scores rank the outcomes
    the wrong way round, the best slope that reverses no ranking is 0: every lead gets the (smoothed) base
    rate.

    Raises:
        ValueError: no rows, unequal lengths, a score that is not finite, or an outcome other than 0 and 1.
    """
    scores, happened = _check_sample(raw, outcome)
    positives = float(happened.sum())
    negatives = len(happened) - positives
    target = np.where(happened == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre, scale = float(scores.mean()), float(scores.std())
    slope, intercept = 0.0, 0.0
    if scale > 1e-100:
        slope, intercept = _newton((scores - centre) / scale, target)
    if slope <= 0:
        share = float(target.mean())
        return {"slope": 0.0, "intercept": float(np.log(share / (1 - share)))}
    return {"slope": slope / scale, "intercept": intercept - slope * centre / scale}


def fit_isotonic(raw: FloatArray, outcome: IntArray) -> dict[str, list[float]]:
    """Fits a rising curve to raw scores (n,) and 0/1 outcomes (n,).

    The pool-adjacent-violators algorithm (Ayer et al. 1955; Zadrozny and Elkan, KDD 2002), then one point for
    each pooled block at its mean score, joined by straight lines (centred isotonic regression; Oron and
    Flournoy, Statistics in Biopharmaceutical Research 9, 2017). Unlike steps, the lines keep apart scores
    that the model keeps apart; only beyond the first and the last point are there ties.

    Raises:
        ValueError: see `fit_sigmoid`.
    """
    scores, happened = _check_sample(raw, outcome)
    distinct, group, weights = np.unique(scores, return_inverse=True, return_counts=True)
    hits = np.bincount(group, weights=happened)
    blocks: list[_Block] = []
    for score, rows, positives in zip(distinct.tolist(), weights.tolist(), hits.tolist(), strict=True):
        block = _Block(score, score, score * rows, rows, positives)
        # Rates are compared crosswise, which is exact: they are quotients of whole numbers.
        while blocks and blocks[-1].positives * block.rows >= block.positives * blocks[-1].rows:
            before = blocks.pop()
            block = _Block(
                before.first,
                block.last,
                before.total + block.total,
                before.rows + block.rows,
                before.positives + block.positives,
            )
        blocks.append(block)
    return {
        "scores": [min(max(block.total / block.rows, block.first), block.last) for block in blocks],
        "probabilities": [block.positives / block.rows for block in blocks],
    }


def calibration_statistics(p: FloatArray, outcome: IntArray, bins: int = 15) -> dict[str, float]:
    """Measures probabilities (n,) against 0/1 outcomes (n,).

    - `brier`: mean squared error (Brier 1950). `log_loss`: mean negative log-likelihood, in nats.
    - `ece`: expected calibration error over bins of equal mass (Nguyen and O'Connor, EMNLP 2015): the mean
      distance between predicted and observed share. Equal probabilities share their outcomes evenly among
      the bins they fall in, so the order of the rows does not matter.
    - `ece_floor`: what `ece` would be on average if every probability were true: the distance in a bin
      is then nearly half-normal, with mean sqrt(2 / pi) times the standard deviation of the observed share
      (the consistency idea of Broecker and Smith, Weather and Forecasting 22, 2007, in closed form).
    - `mean_predicted`, `mean_observed`.

    Raises:
        ValueError: see `fit_sigmoid`; or a probability outside [0, 1].
    """
    predicted, happened = _check_sample(p, outcome)
    if predicted.min() < 0 or predicted.max() > 1:
        raise ValueError("a probability lies outside [0, 1]")
    ece, floor = _calibration_error(predicted, happened, bins)
    given = np.where(happened == 1, predicted, 1 - predicted)
    return {
        "brier": float(((predicted - happened) ** 2).mean()),
        "log_loss": float(-np.log(np.maximum(given, np.finfo(np.float64).eps)).mean()),
        "ece": ece,
        "ece_floor": floor,
        "mean_predicted": float(predicted.mean()),
        "mean_observed": float(happened.mean()),
    }


def equal_mass_bins(p: FloatArray, bins: int = 15) -> list[IntArray]:
    """Returns the places of probabilities (n,) in bins of equal size, lowest first; never an empty bin."""
    order = np.argsort(p, kind="stable")
    return np.array_split(order, min(bins, len(order)))


def _break_ties(probability: FloatArray, raw: FloatArray, calibrator: Calibrator) -> FloatArray:
    """Moves each probability towards its score's place between the bounds, by the share that breaks ties."""
    place = np.minimum(np.fmax(raw, 0.0), 1.0)
    target = calibrator.lower + place * (calibrator.upper - calibrator.lower)
    moved: FloatArray = (1 - calibrator.tie_break) * probability + calibrator.tie_break * target
    return np.minimum(np.maximum(moved, calibrator.lower), calibrator.upper) + 0.0


def _logistic(z: FloatArray) -> FloatArray:
    """Returns 1 / (1 + exp(-z)), and never less for a greater z.

    An exponential is right to a last bit or two, so neighbouring floats may come out the wrong way round.
    Steps of 2**-40 in z are hundreds of times wider than that error, and change a probability by less than
    one part in 10**12.
    """
    steps = np.rint(np.minimum(np.maximum(z, -_LOGISTIC_END), _LOGISTIC_END) / _LOGISTIC_STEP)
    # Both branches take the exponential of a number <= 0, which cannot overflow.
    shrunk = np.exp(-np.abs(steps * _LOGISTIC_STEP))
    probability: FloatArray = np.where(steps >= 0, 1.0, shrunk) / (1.0 + shrunk)
    return probability


class _Curve(NamedTuple):
    """The points (p,) of an isotonic curve, and how far it is to the next one (p,), 1 where there is none."""

    scores: FloatArray
    probabilities: FloatArray
    widths: FloatArray


def _interpolate(scores: FloatArray, curve: _Curve) -> FloatArray:
    """Interpolates; each result lies between its two points, so rounding cannot reverse a ranking."""
    x, y = curve.scores, curve.probabilities
    inside = np.minimum(np.maximum(scores, x[0]), x[-1])
    right = np.minimum(x.searchsorted(inside, side="right"), len(x) - 1)
    left = np.maximum(right - 1, 0)
    start = y[left]
    share = (inside - x[left]) / curve.widths[left]
    probability: FloatArray = np.minimum(start + share * (y[right] - start), y[right])
    return probability


class _Block(NamedTuple):
    """Neighbouring scores that share one rate: the first and the last, their sum, rows and positives."""

    first: float
    last: float
    total: float
    rows: int
    positives: float


def _newton(scores: FloatArray, target: FloatArray) -> tuple[float, float]:
    """Minimises the cross-entropy of a sigmoid against `target`; scores have mean 0 and deviation 1."""
    share = float(target.mean())
    slope, intercept = 0.0, float(np.log(share / (1 - share)))
    loss = _cross_entropy(slope * scores + intercept, target)
    for _ in range(100):
        predicted = _logistic(slope * scores + intercept)
        error, weight = predicted - target, predicted * (1 - predicted)
        gradient = float((error * scores).sum()), float(error.sum())
        if max(abs(gradient[0]), abs(gradient[1])) < 1e-9 * len(scores):
            break
        h11, h12 = float((weight * scores * scores).sum()) + 1e-12, float((weight * scores).sum())
        h22 = float(weight.sum()) + 1e-12
        determinant = h11 * h22 - h12 * h12
        step = (
            -(h22 * gradient[0] - h12 * gradient[1]) / determinant,
            -(h11 * gradient[1] - h12 * gradient[0]) / determinant,
        )
        descent = gradient[0] * step[0] + gradient[1] * step[1]
        size = 1.0
        while size >= 1e-10:
            tried = slope + size * step[0], intercept + size * step[1]
            new = _cross_entropy(tried[0] * scores + tried[1], target)
            if new < loss + 1e-4 * size * descent:
                (slope, intercept), loss = tried, new
                break
            size /= 2
        else:
            break
    return slope, intercept


def _cross_entropy(z: FloatArray, target: FloatArray) -> float:
    return float((np.maximum(z, 0) - z * target + np.log1p(np.exp(-np.abs(z)))).sum())


def _calibration_error(p: FloatArray, happened: FloatArray, bins: int) -> tuple[float, float]:
    _, group, rows = np.unique(p, return_inverse=True, return_counts=True)
    shared = (np.bincount(group, weights=happened) / rows)[group]
    error = floor = 0.0
    for part in equal_mass_bins(p, bins):
        error += abs(float((p[part] - shared[part]).sum()))
        floor += float(np.sqrt(2 / np.pi * (p[part] * (1 - p[part])).sum()))
    return error / len(p), floor / len(p)


def _check_sample(raw: npt.ArrayLike, outcome: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    scores, happened = np.asarray(raw, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    if scores.ndim != 1 or scores.shape != happened.shape or scores.size == 0:
        raise ValueError("needs as many outcomes as scores, and at least one")
    if not np.all(np.abs(scores) <= _HUGE) or not np.all((happened == 0) | (happened == 1)):
        raise ValueError("needs finite scores, and outcomes that are 0 or 1")
    return scores, happened


def _build_curve(method: CalibrationMethod, params: Mapping[str, Any]) -> _Curve | VennAbersTable | None:
    """Checks the parameters, and returns the curve they describe, if they do."""
    if method == "isotonic":
        x, y = (np.array(params[name], dtype=np.float64) for name in ("scores", "probabilities"))
        _check_curve(x, y)
        return _Curve(x, y, np.append(np.diff(x), 1.0))
    if method == "venn_abers":
        return VennAbersTable.from_json(params)
    if not all(isinstance(number, int | float) and abs(number) <= _HUGE for number in params.values()):
        raise ValueError(f"a parameter of {method} is not a finite number")
    if method == "sigmoid" and params["slope"] < 0:
        raise ValueError("a negative slope would reverse the ranking")
    if method == "spread" and params["steepness"] <= 0:
        raise ValueError("the steepness must be above 0")
    return None


def _check_curve(x: FloatArray, y: FloatArray) -> None:
    if x.ndim != 1 or x.shape != y.shape or x.size == 0:
        raise ValueError("isotonic needs as many probabilities as scores, and at least one")
    if not np.all(np.abs(x) <= _HUGE) or not np.all((y >= 0) & (y <= 1)):
        raise ValueError("isotonic needs finite scores, and probabilities in [0, 1]")
    if np.any(np.diff(x) <= 0) or np.any(np.diff(y) < 0):
        raise ValueError("isotonic needs ascending scores, and probabilities that do not fall")
