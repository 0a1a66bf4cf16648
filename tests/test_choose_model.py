"""The choice of a model: evidence decides, identical rows never help, and the manifest tells all of it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from app.ai.domain import FloatArray, InputColumn
from app.ai.features import FeatureSet
from app.ai.venn_abers import build_table
from app.errors import TrainingError
from app.training.candidates import CANDIDATES, Candidate, list_candidates
from app.training.choose import Trial, choose_model, run_trials
from app.training.derive import derive_features
from app.training.fit import CalibratedModel, choose_threshold, fit_model
from app.training.recency import recency_weights
from app.training.rows import TrainingRows
from app.training.splits import build_folds
from app.training.verdict import measure_abstain_below, measure_rule
from tests.fakes import build_columns

COLUMNS = tuple(InputColumn(name, "number") for name in ("a", "b", "c"))
AS_OF = 1_767_225_600.0

LOGISTIC = Candidate("logistic_regression", "logistic", {"C": 1.0})
SMALL = (
    LOGISTIC,
    Candidate("random_forest", "forest", {"n_estimators": 20, "min_samples_leaf": 5}),
    Candidate("hist_gradient_boosting", "boosting", {"max_iter": 20, "max_leaf_nodes": 8}),
    Candidate("hist_gradient_boosting", "one split", {"max_iter": 1, "max_leaf_nodes": 2}),
)
"""One or two of each type, quick to fit."""


def build_rows(numbers: FloatArray, log_odds: FloatArray, seed: int) -> TrainingRows:
    """Leads with these numbers (n, 3), whose outcomes are drawn with these log-odds (n,)."""
    n = len(numbers)
    outcome = (np.random.default_rng(seed).random(n) < 1 / (1 + np.exp(-log_odds))).astype(np.int64)
    leads = build_columns([dict(zip("abc", map(float, row), strict=True)) for row in numbers], COLUMNS)
    return TrainingRows(leads, outcome, np.full(n, AS_OF))


def build(rows: TrainingRows) -> FeatureSet:
    return derive_features(rows.leads, rows.outcome, rows.as_of, COLUMNS).feature_set


def choose(rows: TrainingRows, candidates: Sequence[Candidate] = SMALL) -> CalibratedModel:
    return choose_model(rows, build, candidates, 0, lambda *_: None)


@pytest.fixture(scope="module")
def linear() -> CalibratedModel:
    numbers = np.random.default_rng(1).normal(size=(500, 3))
    return choose(build_rows(numbers, numbers @ [1.5, -1.0, 0.5], seed=2))


def test_where_the_truth_is_linear_a_logistic_regression_is_chosen(linear: CalibratedModel) -> None:
    assert linear.fitted.candidate.model_type == "logistic_regression"


def test_where_only_an_interaction_tells_trees_are_chosen() -> None:
    numbers = np.random.default_rng(3).normal(size=(500, 3))
    model = choose(build_rows(numbers, 2.5 * np.sign(numbers[:, 0] * numbers[:, 1]), seed=4))
    assert model.fitted.candidate.model_type in {"random_forest", "hist_gradient_boosting"}


def test_the_choice_tells_every_candidate_its_spread_the_winner_and_the_runner_up(
    linear: CalibratedModel,
) -> None:
    choice = linear.choice
    told = choice["candidates"]
    assert choice["order"] == "random"
    assert {one["name"] for one in told} == {candidate.name for candidate in SMALL}
    assert all(0 < one["log_loss"] < 0.7 and one["log_loss_sd"] > 0 and one["params"] for one in told)
    assert all(0.5 < one["roc_auc"] < 1 and 0 < one["brier"] < 0.25 for one in told)
    assert [choice["chosen"], choice["runner_up"]] == [one["name"] for one in told[:2]]
    assert choice["chosen"] == linear.fitted.candidate.name
    finalists = [one for one in told if one["folds"] == 15]
    assert told[:3] == finalists
    assert {one["model_type"] for one in finalists} == {candidate.model_type for candidate in SMALL}
    assert [one["log_loss"] for one in finalists] == sorted(one["log_loss"] for one in finalists)
    assert {one["folds"] for one in told[3:]} == {5}
    assert choice["calibrator"] == choice["calibrators"][0]["method"] == linear.calibrator.method


def test_the_base_rate_alone_stands_beside_the_candidates(linear: CalibratedModel) -> None:
    alone, chosen = linear.choice["base_rate_alone"], linear.choice["candidates"][0]
    assert chosen["log_loss"] < alone["log_loss"] == pytest.approx(np.log(2), abs=0.01)
    assert chosen["brier"] < alone["brier"] == pytest.approx(0.25, abs=0.01)
    noise = np.random.default_rng(7).normal(size=(500, 3))
    told = choose(build_rows(noise, np.zeros(500), seed=8), [LOGISTIC]).choice
    assert told["candidates"][0]["log_loss"] > told["base_rate_alone"]["log_loss"]


def test_finalists_are_the_best_of_their_type(linear: CalibratedModel) -> None:
    assert [one["name"] for one in linear.choice["candidates"][3:]] == ["one split"]


def test_auto_has_every_type_more_than_once_and_a_type_by_itself_stands_for_it() -> None:
    assert list_candidates("auto") == CANDIDATES
    assert len({candidate.name for candidate in CANDIDATES}) == len(CANDIDATES)
    types = [candidate.model_type for candidate in CANDIDATES]
    for name in ("logistic_regression", "random_forest", "hist_gradient_boosting"):
        assert types.count(name) > 1
        assert [candidate.model_type for candidate in list_candidates(name)] == [name]


def test_a_type_that_is_asked_for_is_the_only_one_tried() -> None:
    numbers = np.random.default_rng(5).normal(size=(300, 3))
    model = choose(build_rows(numbers, numbers[:, 0], seed=6), [LOGISTIC])
    (told,) = model.choice["candidates"]
    assert (told["model_type"], told["folds"]) == ("logistic_regression", 5)
    assert (model.choice["chosen"], model.choice["runner_up"]) == (told["name"], None)


@pytest.mark.parametrize("bad", range(5))
def test_a_fold_with_nothing_to_learn_from_is_a_clear_refusal_whenever_it_comes(bad: int) -> None:
    numbers = np.random.default_rng(5).normal(size=(300, 3))
    rows, folds = build_rows(numbers, numbers[:, 0], seed=6), iter(range(5))

    def build_or_refuse(part: TrainingRows) -> FeatureSet:
        if next(folds) == bad:
            raise TrainingError("no column tells them apart")
        return build(part)

    with pytest.raises(TrainingError, match="compared on parts of the leads, and in one no column"):
        choose_model(rows, build_or_refuse, SMALL, 0, lambda *_: None)


def test_leads_in_order_are_compared_on_later_ones_only() -> None:
    """What told the outcomes apart says the opposite later: only the past may speak for the future."""
    n = 600
    numbers = np.random.default_rng(7).normal(size=(n, 3))
    turned = np.where(np.arange(n) < n / 2, 1.0, -1.0)
    rows = build_rows(numbers, 2 * numbers[:, 0] * turned, seed=8)
    (at_random,) = choose(rows, [LOGISTIC]).choice["candidates"]
    in_order = choose(replace(rows, order=np.arange(float(n))), [LOGISTIC])
    (told,) = in_order.choice["candidates"]
    assert in_order.choice["order"] == "time"
    assert told["folds"] == 5
    assert told["roc_auc"] < at_random["roc_auc"]
    assert told["roc_auc"] < 0.5
    # Nobody can say of the first leads what a model without them says.
    assert len(in_order.out_of_fold.raw) < n


def test_the_base_rate_is_that_of_all_leads_where_recency_is_off(linear: CalibratedModel) -> None:
    numbers = np.random.default_rng(1).normal(size=(500, 3))
    rows = build_rows(numbers, numbers @ [1.5, -1.0, 0.5], seed=2)
    assert linear.base_rate == rows.outcome.mean()
    still = choose(replace(rows, order=np.arange(500.0)), [LOGISTIC])
    assert not still.choice["recency"]["half_life"]
    assert not still.choice["recency"]["intercept"]
    assert still.base_rate == rows.outcome.mean()


def test_the_base_rate_moves_with_the_probabilities() -> None:
    """The rate falls at two thirds of the window: a lead of which nothing is known is told the new one."""
    n = 3000
    numbers, order = np.random.default_rng(9).normal(size=(n, 3)), np.arange(float(n))
    rows = replace(
        build_rows(numbers, numbers[:, 0] + np.where(order < 2000, 0.6, -1.0), seed=10), order=order
    )
    moved = choose(rows, [LOGISTIC])
    assert moved.choice["recency"]["intercept"]
    latest = build_folds(rows, 0)[-1].test
    assert moved.base_rate == rows.outcome[latest].mean() < rows.outcome.mean() - 0.1
    rule = measure_rule(moved, {"a": 1.0, "b": 0.0, "c": 0.0}, rows, rows, 0)
    assert rule.base_rate == moved.base_rate


def test_with_a_half_life_alone_the_base_rate_is_weighed_as_the_leads_are() -> None:
    n = 2000
    numbers, order = np.random.default_rng(11).normal(size=(n, 3)), np.arange(float(n))
    turned = 4 * (order / n - 0.35) * numbers[:, 0] - 0.5 * order / n
    rows = replace(build_rows(numbers, turned, seed=12), order=order)
    weighed = choose(rows, [LOGISTIC])
    half_life = weighed.choice["recency"]["half_life"]
    assert half_life
    assert not weighed.choice["recency"]["intercept"]
    weights = recency_weights(order, half_life)
    assert weighed.base_rate == pytest.approx((weights * rows.outcome).sum() / n)
    assert weighed.base_rate < rows.outcome.mean()


def test_the_threshold_of_abstaining_is_measured_with_the_base_rate_that_is_answered() -> None:
    numbers = np.random.default_rng(13).normal(size=(1000, 3))
    rows = build_rows(numbers, 0.1 * numbers[:, 0] - 2, seed=14)
    model = choose(rows, [LOGISTIC])
    told = measure_abstain_below(model, [0.6, 0.2, 0.2], rows, rows, 0)
    far_off = measure_abstain_below(replace(model, base_rate=0.9), [0.6, 0.2, 0.2], rows, rows, 0)
    assert told is not None
    assert told > 0
    assert far_off == 0, "no lead is better answered by a rate that is not theirs"


def test_knowing_identical_leads_by_heart_does_not_help() -> None:
    """Each row stands four times with one outcome, drawn at random: memory would foretell, nothing else."""
    numbers = np.repeat(np.random.default_rng(9).normal(size=(150, 3)), 4, axis=0)
    outcome = np.repeat(np.random.default_rng(10).permutation(150) % 2, 4)
    rows = replace(build_rows(numbers, np.zeros(600), seed=10), outcome=outcome)
    by_heart = Candidate("random_forest", "by heart", {"n_estimators": 20, "min_samples_leaf": 1})
    (trial,) = run_trials(rows, build, [by_heart], build_folds(rows, 0), seed=0, progress=lambda *_: None)
    log_loss, roc_auc, _ = np.mean(trial.measure(), axis=0)
    assert 0.35 < roc_auc < 0.65
    assert log_loss > 0.68
    scores = fit_model(rows, build, by_heart, 0)
    known = scores.raw_scores(scores.build_matrix(rows))
    assert known[rows.outcome == 1].min() > known[rows.outcome == 0].max()


def test_raw_scores_that_are_no_probabilities_do_not_lose_for_it() -> None:
    random = np.random.default_rng(11)
    truth = random.random(2000)
    outcome = (random.random(2000) < truth).astype(np.int64)
    fold = np.arange(2000) % 5
    honest = Trial(SMALL[0], truth, outcome, fold).measure()
    bent = Trial(SMALL[1], truth**4, outcome, fold).measure()
    # But for the trace of itself in every probability, by which calibration keeps scores apart.
    np.testing.assert_allclose(bent, honest, atol=1e-4)


def test_scores_come_from_models_that_have_not_seen_the_lead() -> None:
    rows = build_rows(np.random.default_rng(12).normal(size=(200, 3)), np.zeros(200), seed=13)
    folds = build_folds(rows, 0)
    (trial,) = run_trials(rows, build, [LOGISTIC], folds, seed=0, progress=lambda *_: None)
    for number, fold in enumerate(folds):
        without = fit_model(rows.take(fold.train), build, LOGISTIC, 0)
        expected = without.raw_scores(without.build_matrix(rows.take(fold.test)))
        assert trial.raw[trial.fold == number].tolist() == expected.tolist()
        assert trial.outcome[trial.fold == number].tolist() == rows.outcome[fold.test].tolist()


def test_calibrator_threshold_and_intervals_rest_on_the_out_of_fold_scores(linear: CalibratedModel) -> None:
    told = linear.out_of_fold
    assert len(told.raw) == len(told.probability) == len(told.outcome) == 500
    assert linear.venn_abers.to_json() == build_table(told.raw, told.outcome).to_json()
    assert linear.threshold == choose_threshold(told.probability, told.outcome)


def test_the_same_seed_chooses_and_fits_the_same_on_any_number_of_cores(linear: CalibratedModel) -> None:
    numbers = np.random.default_rng(1).normal(size=(500, 3))
    again = choose(build_rows(numbers, numbers @ [1.5, -1.0, 0.5], seed=2))
    assert again.choice == linear.choice
    assert again.out_of_fold.raw.tobytes() == linear.out_of_fold.raw.tobytes()
    assert again.calibrator == linear.calibrator
    values = np.random.default_rng(0).normal(size=(50, 3))
    assert again.fitted.scorer(values).tobytes() == linear.fitted.scorer(values).tobytes()


def test_every_fit_is_told_as_it_is_done() -> None:
    rows = build_rows(np.random.default_rng(14).normal(size=(200, 3)), np.zeros(200), seed=15)
    seen: list[tuple[str, int, int]] = []
    choose_model(rows, build, [LOGISTIC], 0, lambda *told: seen.append(told))
    assert seen == [*(("compare", done, 5) for done in range(6)), *(("fit", done, 2) for done in range(3))]
