"""The choice of a calibrator: each where it is right, judged on leads it has not seen, ranking untouched."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from app.ai.calibration import calibrate, calibration_statistics
from app.ai.domain import FloatArray, IntArray
from app.training.calibrators import choose_calibrator, cross_fit, fit_calibrator

METHODS = ("sigmoid", "isotonic", "venn_abers")


def draw(chance: FloatArray, seed: int) -> IntArray:
    return (np.random.default_rng(seed).random(len(chance)) < chance).astype(np.int64)


def folds(n: int) -> IntArray:
    return np.arange(n) % 5


def test_scores_that_a_sigmoid_bent_get_a_sigmoid() -> None:
    for seed in range(5):
        raw = np.random.default_rng(seed).uniform(-3, 3, 600)
        outcome = draw(1 / (1 + np.exp(-(2 * raw - 1))), seed + 100)
        choice = choose_calibrator(raw, outcome, folds(600))
        assert choice.calibrator.method == "sigmoid"
        assert choice.calibrator.params["slope"] == pytest.approx(2, abs=0.5)


def test_chances_that_go_up_in_steps_get_no_sigmoid() -> None:
    for seed in range(5):
        raw = np.random.default_rng(seed).random(3000)
        outcome = draw(np.select([raw < 0.3, raw < 0.7], [0.05, 0.5], 0.6), seed + 100)
        choice = choose_calibrator(raw, outcome, folds(3000))
        assert choice.calibrator.method in {"isotonic", "venn_abers"}
        assert choice.evidence[-1]["method"] == "sigmoid"
        for score, chance in ((0.15, 0.05), (0.5, 0.5), (0.85, 0.6)):
            assert calibrate(np.array([score]), choice.calibrator)[0] == pytest.approx(chance, abs=0.08)


def test_the_evidence_has_every_method_beside_the_noise_floor() -> None:
    raw = np.random.default_rng(1).random(2000)
    choice = choose_calibrator(raw, draw(raw**2, 2), folds(2000))
    assert {one["method"] for one in choice.evidence} == set(METHODS)
    assert choice.evidence[0]["method"] == choice.calibrator.method
    told = calibration_statistics(choice.probability, draw(raw**2, 2))
    assert choice.evidence[0] == {
        "method": choice.calibrator.method,
        "log_loss": pytest.approx(told["log_loss"], abs=1e-6),
        "calibration_error": pytest.approx(told["ece"], abs=1e-6),
        "noise_floor": pytest.approx(told["ece_floor"], abs=1e-6),
    }
    assert 0.005 < choice.evidence[0]["noise_floor"] < 0.03


def test_of_methods_the_log_loss_cannot_tell_apart_the_one_with_the_least_error_wins() -> None:
    decided_by_error = 0
    for seed in range(20):
        raw = np.random.default_rng(seed).random(1000)
        evidence = choose_calibrator(raw, draw(0.1 + 0.8 * raw, seed + 100), folds(1000)).evidence
        lowest = min(evidence, key=lambda one: one["log_loss"])
        assert evidence[0]["calibration_error"] <= lowest["calibration_error"]
        decided_by_error += evidence[0] != lowest
    assert decided_by_error > 0


def test_probabilities_are_judged_that_knew_nothing_of_their_outcome() -> None:
    # A score says nothing here, so whoever looks at the outcomes seems to know more than their rate.
    raw = np.random.default_rng(3).random(300)
    outcome = draw(np.full(300, 0.5), 4)
    for method in METHODS:
        probability = cross_fit(method, raw, outcome, folds(300))
        assert calibration_statistics(probability, outcome)["log_loss"] > 0.68
        for part in range(5):
            rest = folds(300) != part
            alone = calibrate(raw[~rest], fit_calibrator(method, raw[rest], outcome[rest]))
            assert probability[~rest].tolist() == alone.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_calibration_leaves_the_ranking_of_a_real_model_as_it_is_to_the_last_lead(method: str) -> None:
    random = np.random.default_rng(5)
    values = random.normal(size=(4000, 4))
    outcome = draw(1 / (1 + np.exp(-3 * values[:, 0] * (values[:, 1] > 0) + 1)), 6)
    forest = RandomForestClassifier(30, min_samples_leaf=5, random_state=0).fit(values[:2000], outcome[:2000])
    # Sums of the same leaves in another order differ in their last bit, and tell no leads apart.
    raw, happened = forest.predict_proba(values[2000:])[:, 1].round(12), outcome[2000:]
    calibrator = fit_calibrator(method, raw[:1000], happened[:1000])
    probability = calibrate(raw, calibrator)
    assert roc_auc_score(happened, probability) == roc_auc_score(happened, raw)
    ranked = np.argsort(raw, kind="stable")
    assert ((np.diff(raw[ranked]) > 0) == (np.diff(probability[ranked]) > 0)).all()
    plain = calibrate(raw, replace(calibrator, tie_break=0.0))
    assert np.abs(plain - probability).max() <= 1e-4
    if method != "sigmoid":
        # Steps and bounds make leads equal that the model tells apart.
        assert len(np.unique(plain)) < len(np.unique(probability))


def test_a_certain_looking_sample_never_gives_certainty() -> None:
    raw = np.linspace(0, 1, 200)
    for method in METHODS:
        probability = calibrate(raw, fit_calibrator(method, raw, (raw > 0.5).astype(np.int64)))
        assert 0 < probability.min() < probability.max() < 1


def test_a_lone_fold_is_parted_so_that_nothing_is_judged_by_its_own_outcome() -> None:
    raw = np.random.default_rng(7).random(400)
    outcome = draw(raw, 8)
    choice = choose_calibrator(raw, outcome, np.zeros(400, np.int64))
    assert calibration_statistics(choice.probability, outcome)["log_loss"] < 0.6
