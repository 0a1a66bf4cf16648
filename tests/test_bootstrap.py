"""Bootstrap intervals: the metrics of every resample are the true ones, and the intervals keep their word."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from app.ai.calibration import calibration_statistics
from app.ai.domain import FloatArray, IntArray
from app.errors import TrainingError
from app.training.bootstrap import RESAMPLES, _Sample, bootstrap_intervals
from app.training.model_metrics import evaluate


def draw(n: int, seed: int) -> tuple[FloatArray, IntArray]:
    """True probabilities, and outcomes drawn from them."""
    random = np.random.default_rng(seed)
    probability = random.beta(1, 2, n)
    return probability, (random.random(n) < probability).astype(np.int64)


@pytest.mark.parametrize("decimals", [15, 1], ids=["all distinct", "many ties"])
def test_the_metrics_of_a_resample_are_those_of_its_leads(decimals: int) -> None:
    probability, outcome = draw(200, 1)
    probability = probability.round(decimals)
    sample = _Sample(probability, outcome)
    counts = sample.resample(5, np.random.default_rng(2))
    assert (counts.sum(axis=1) == 200).all()
    order = np.argsort(probability, kind="stable")
    for number, measured in enumerate(zip(*sample.measure(counts).values(), strict=True)):
        drawn = np.repeat(order, counts[number])
        p, happened = probability[drawn], outcome[drawn]
        statistics = calibration_statistics(p, happened)
        expected = [
            roc_auc_score(happened, p),
            average_precision_score(happened, p),
            *(statistics[name] for name in ("brier", "log_loss", "ece")),
        ]
        np.testing.assert_allclose(measured, expected, rtol=1e-9)


def test_an_interval_holds_the_measured_value_and_shrinks_with_the_root_of_the_leads() -> None:
    widths = {}
    for n in (500, 8000):
        probability, outcome = draw(n, 3)
        metrics, intervals = evaluate(probability, outcome, 0.5), bootstrap_intervals(probability, outcome, 0)
        assert set(intervals) == {"roc_auc", "pr_auc", "brier", "log_loss", "ece", "ece_floor"}
        for name, (low, high) in intervals.items():
            assert low < metrics[name] < high, name
        widths[n] = {name: high - low for name, (low, high) in intervals.items()}
    for name, width in widths[500].items():
        assert width / widths[8000][name] == pytest.approx(4, rel=0.4), name


def test_nineteen_in_twenty_intervals_hold_the_true_value() -> None:
    everybody = evaluate(*draw(400_000, 4), 0.5)
    held = dict.fromkeys(("roc_auc", "pr_auc", "brier", "log_loss"), 0)
    for seed in range(100):
        intervals = bootstrap_intervals(*draw(400, 100 + seed), seed)
        for name in held:
            held[name] += intervals[name][0] <= everybody[name] <= intervals[name][1]
    # 95 expected; fewer than 88 has a chance of one in 500.
    assert min(held.values()) >= 88, held


def test_the_floor_is_what_true_probabilities_show_and_others_exceed() -> None:
    inside = 0
    for seed in range(60):
        probability, outcome = draw(600, 200 + seed)
        low, high = bootstrap_intervals(probability, outcome, seed)["ece_floor"]
        inside += low <= calibration_statistics(probability, outcome)["ece"] <= high
    assert inside >= 51
    wrong = 0.5 + 0.5 * probability
    assert (
        bootstrap_intervals(wrong, outcome, 0)["ece"][0]
        > bootstrap_intervals(wrong, outcome, 0)["ece_floor"][1]
    )


def test_the_same_seed_gives_the_same_intervals() -> None:
    sample = draw(300, 5)
    assert bootstrap_intervals(*sample, 1) == bootstrap_intervals(*sample, 1)
    assert bootstrap_intervals(*sample, 1) != bootstrap_intervals(*sample, 2)


def test_resamples_without_both_outcomes_are_left_out() -> None:
    probability = np.linspace(0.1, 0.9, 12)
    outcome = np.zeros(12, dtype=np.int64)
    outcome[-1] = 1
    lacking = (_Sample(probability, outcome).resample(RESAMPLES, np.random.default_rng(0))[:, -1] == 0).sum()
    assert lacking > 0.2 * RESAMPLES
    intervals = bootstrap_intervals(probability, outcome, 0)
    assert np.isfinite(list(intervals.values())).all()
    assert intervals["roc_auc"] == [1.0, 1.0]


@pytest.mark.parametrize("outcome", [[0, 0, 0], [1, 1, 1]])
def test_one_outcome_alone_cannot_be_evaluated_and_is_said_clearly(outcome: list[int]) -> None:
    with pytest.raises(TrainingError, match=rf"{sum(outcome)} of 3 leads reached the outcome"):
        evaluate(np.array([0.2, 0.4, 0.6]), np.array(outcome), 0.5)
