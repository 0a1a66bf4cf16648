"""Useful on day one: with few outcomes or none the service answers, never much worse than the base rate.

The rule is tried on many draws: of made-up leads whose features say something or nothing, and of real leads.
What is drawn is all that a model sees; it is judged on leads that were not drawn.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import beta

from app.ai.domain import Column, FloatArray, InputColumn, IntArray, LeadColumns
from app.ai.estimators import build_scorer
from app.ai.feature_safety import check_features
from app.ai.features import build_features
from app.ai.venn_abers import build_intervals, look_up
from app.db.csv_import import import_csv
from app.errors import TrainingError
from app.training.day_one import (
    ENOUGH_OF_EACH_CLASS,
    ENOUGH_ROWS,
    DayOneModel,
    choose_features,
    estimate_base_rate,
    fit_day_one,
    is_day_one,
    score_strangers,
)
from app.training.options import TrainingOptions
from app.training.rate_bands import build_band
from app.training.rows import TrainingRows, choose_columns, fetch_rows
from app.training.shrinkage import fit_shrunk
from tests.builders import AS_OF
from tests.conftest import DEMO_UNTIL
from tests.real_leads import CSV, TRAPS, needs_real_leads

OUTCOMES = (10, 20, 40, 80)
NOBODY = np.empty(0, np.int64)


def log_loss(probability: FloatArray | float, outcome: IntArray) -> float:
    return float(-np.log(np.where(outcome == 1, probability, 1 - np.asarray(probability))).mean())


def draw_pool(random: np.random.Generator, rate: float, strength: float) -> TrainingRows:
    """Leads of ten columns: numbers, a flag and a text, some of them missing; half of them say something."""
    n = 2500
    numbers = random.normal(size=(n, 8))
    there = random.random((n, 8)) > 0.1
    flag, word = (random.random(n) < 0.4).astype(np.float64), random.integers(0, 5, n)
    signal = numbers[:, :4] @ [0.9, -0.7, 0.5, 0.4] + 0.8 * flag - 0.3 * word
    signal = strength * (signal - signal.mean())
    shift = max(np.linspace(-4, 3, 141), key=lambda shift: -abs(expit(signal + shift).mean() - rate))
    outcome = (random.random(n) < expit(signal + shift)).astype(np.int64)
    columns = {
        f"number_{i}": Column("number", np.where(there[:, i], numbers[:, i], np.nan), there[:, i])
        for i in range(8)
    }
    columns["flag"] = Column("boolean", flag, np.ones(n, np.bool_))
    columns["word"] = Column("text", np.array(list("abcde"), object)[word], np.ones(n, np.bool_))
    return TrainingRows(LeadColumns(n, columns), outcome, np.full(n, AS_OF))


def columns_of(rows: TrainingRows) -> tuple[InputColumn, ...]:
    return tuple(InputColumn(name, column.kind) for name, column in rows.leads.columns.items())


def draw(pool: TrainingRows, random: np.random.Generator, leads: int) -> tuple[TrainingRows, TrainingRows]:
    order = random.permutation(pool.leads.n)
    return pool.take(order[:leads]), pool.take(order[leads : leads + 2000])


def fit(rows: TrainingRows) -> DayOneModel:
    return fit_day_one(rows, rows, columns_of(rows), None, 0)


def raw_scores(model: DayOneModel, rows: TrainingRows) -> FloatArray:
    matrix = build_features(rows.leads, model.feature_set, rows.as_of)
    safe = check_features(matrix, model.feature_set, model.statistics).values
    return build_scorer(model.estimator)(safe)


def losses_against_base_rate(pool: TrainingRows, leads: int, draws: int, seed: int) -> FloatArray:
    """Returns by how much, of the base rate's log-loss, each draw's model is worse (above 0) or better."""
    random, excess = np.random.default_rng(seed), []
    for _ in range(draws):
        seen, unseen = draw(pool, random, leads)
        model = fit(seen)
        by_base_rate = log_loss(estimate_base_rate(seen.outcome, None), unseen.outcome)
        excess.append(log_loss(raw_scores(model, unseen), unseen.outcome) / by_base_rate - 1)
    return np.array(excess)


@pytest.fixture(scope="module")
def real_leads(create_database: Callable[..., str]) -> TrainingRows:
    url = create_database("day_one_real")
    import_csv(
        url, CSV, table="leads", id_column="Prospect ID", label_column="Converted", missing=("Select",)
    )
    options = TrainingOptions(
        url=url, model_dir=Path(), source="leads", label="converted", exclude=(*TRAPS, "lead_number")
    )
    return fetch_rows(options, choose_columns(options)[0], lambda *_: None)[0]


@pytest.fixture(scope="module")
def demo_leads(demo_url: str) -> TrainingRows:
    options = TrainingOptions(url=demo_url, model_dir=Path(), now=DEMO_UNTIL)
    return fetch_rows(options, choose_columns(options)[0], lambda *_: None)[0]


@pytest.mark.parametrize("leads", OUTCOMES)
@pytest.mark.parametrize("rate", [0.39, 0.1])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_model_of_few_outcomes_is_never_a_hundredth_worse_than_the_base_rate(
    leads: int, rate: float, strength: float
) -> None:
    pool = draw_pool(np.random.default_rng(1), rate, strength)
    excess = losses_against_base_rate(pool, leads, draws=20, seed=leads)
    assert excess.mean() < 0.01
    assert np.quantile(excess, 0.9) < 0.01


@pytest.mark.parametrize("positives", OUTCOMES)
def test_the_rule_holds_as_well_where_outcomes_are_counted_in_positives(positives: int) -> None:
    for strength in (0.0, 1.0):
        pool = draw_pool(np.random.default_rng(2), 0.1, strength)
        excess = losses_against_base_rate(pool, 10 * positives, draws=6, seed=positives)
        assert excess.mean() < 0.01


@needs_real_leads
@pytest.mark.parametrize("leads", OUTCOMES)
def test_the_rule_holds_on_real_leads_and_where_their_features_are_made_to_say_nothing(
    real_leads: TrainingRows, leads: int, record_property: Callable[[str, object], None]
) -> None:
    shuffled = np.random.default_rng(leads).permutation(real_leads.outcome)
    for name, pool in (("real", real_leads), ("shuffled", replace(real_leads, outcome=shuffled))):
        excess = float(losses_against_base_rate(pool, leads, draws=12, seed=leads).mean())
        record_property(f"{leads} outcomes, {name}", f"{excess:+.1%}")
        assert excess < 0.01


@pytest.mark.parametrize("leads", OUTCOMES)
def test_the_rule_holds_on_the_demo_crm(demo_leads: TrainingRows, leads: int) -> None:
    assert losses_against_base_rate(demo_leads, leads, draws=12, seed=leads).mean() < 0.01


@needs_real_leads
def test_what_few_real_outcomes_say_is_used(real_leads: TrainingRows) -> None:
    forty, eighty = (losses_against_base_rate(real_leads, leads, 12, seed=5).mean() for leads in (40, 80))
    assert eighty < -0.08
    assert eighty < forty < -0.02


def test_weights_follow_the_evidence_and_are_none_for_outcomes_of_one_kind() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(2000, 3))
    outcome = (random.random(2000) < expit(values @ [1.0, -0.5, 0.0] - 1)).astype(np.int64)
    many = fit_shrunk(values, outcome, float(outcome.mean()))
    assert many.evidence > 0.999
    assert many.weights == pytest.approx([1.0, -0.5, 0.0], abs=0.15)
    one_kind = fit_shrunk(values[:30], np.zeros(30, np.int64), 0.02)
    assert not one_kind.weights.any()
    assert expit(one_kind.log_odds(values)) == pytest.approx(0.02)
    noise = fit_shrunk(values, random.permutation(outcome), float(outcome.mean()))
    assert noise.evidence < 0.1


def test_twenty_outcomes_count_for_half_however_clear_they_seem() -> None:
    clear = np.repeat([1.0, -1.0], 10)[:, None]
    fit = fit_shrunk(clear, (clear[:, 0] > 0).astype(np.int64), 0.5)
    assert fit.evidence > 0.99
    # The most probable weight w under the widest prior, of variance 2, solves 20 / (1 + exp(w)) = w / 2.
    assert 0.8 < fit.weights[0] < 2.65 / 2


@pytest.mark.parametrize(
    ("flagged", "won", "others", "others_won"), [(16, 10, 144, 2), (8, 5, 150, 2), (12, 11, 180, 4)]
)
def test_a_rare_flag_that_tells_much_is_believed_about_as_far_as_it_goes(
    flagged: int, won: int, others: int, others_won: int
) -> None:
    flag = np.repeat([1.0, 0.0], [flagged, others])
    outcome = np.repeat([1, 0, 1, 0], [won, flagged - won, others_won, others - others_won])
    base_rate = estimate_base_rate(outcome, None)
    fit = fit_shrunk((flag - flag.mean())[:, None] / flag.std(), outcome, base_rate)
    with_it, without = expit(fit.log_odds((np.array([1.0, 0.0]) - flag.mean())[:, None] / flag.std()))
    assert fit.evidence > 0.95
    assert abs(with_it - won / flagged) < abs(with_it - base_rate), "nearer to what was seen than to all"
    assert abs(without - others_won / others) < 0.06


def test_a_score_out_of_fold_does_not_know_its_own_outcome() -> None:
    random = np.random.default_rng(3)
    values = random.normal(size=(40, 4))
    values[7] = values[23]
    outcome = (random.random(40) < expit(2 * values[:, 0])).astype(np.int64)
    scores = score_strangers(values, outcome, 0.5, seed=0)
    for lead in (7, 11):
        turned = outcome.copy()
        turned[lead] = 1 - turned[lead]
        again = score_strangers(values, turned, 0.5, seed=0)
        assert again[lead] == scores[lead]
        assert (again != scores).any()
    turned = outcome.copy()
    turned[23] = 1 - turned[23]
    assert score_strangers(values, turned, 0.5, seed=0)[7] == scores[7], "nor that of a lead equal to it"


def test_intervals_are_made_of_scores_out_of_fold() -> None:
    seen, _ = draw(draw_pool(np.random.default_rng(8), 0.39, 1.0), np.random.default_rng(8), 60)
    model = fit(seen)
    safe = check_features(model.matrix, model.feature_set, model.statistics).values
    scores = score_strangers(model.estimator[0].transform(safe), seen.outcome, model.base_rate, 0)
    expected = build_band(scores, seen.outcome).to_json()
    for name, numbers in model.band.to_json().items():
        assert numbers == pytest.approx(expected[name])


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_rate_of_groups_of_leads_lies_within_their_intervals(strength: float) -> None:
    random, covered = np.random.default_rng(4), []
    pool = draw_pool(random, 0.39, strength)
    for leads in OUTCOMES:
        for _ in range(10):
            seen, unseen = draw(pool, random, leads)
            model = fit(seen)
            raw = raw_scores(model, unseen)
            ends = intervals_of(model, raw)
            for group in np.array_split(np.argsort(raw, kind="stable"), 5):
                low, high = ends[group].mean(axis=0)
                covered.append(low <= unseen.outcome[group].mean() <= high)
    assert np.mean(covered) > 0.93


def intervals_of(model: DayOneModel, raw: FloatArray) -> FloatArray:
    return build_intervals(model.band, raw, raw, unknown=np.zeros(len(raw), np.bool_), bounds=(0.0, 1.0))


def test_intervals_are_as_wide_as_can_be_without_outcomes_and_narrow_as_they_come_in() -> None:
    random = np.random.default_rng(5)
    pool = draw_pool(random, 0.39, 1.0)
    widths = []
    for leads in (*OUTCOMES, 160):
        wide = []
        for _ in range(6):
            seen, unseen = draw(pool, random, leads)
            model = fit(seen)
            wide.append(np.diff(intervals_of(model, raw_scores(model, unseen))).mean())
        widths.append(float(np.mean(wide)))
    assert 0.6 < widths[0] < 1
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.5
    seen, unseen = draw(pool, random, 0)
    without = fit_day_one(seen, unseen, columns_of(seen), 0.3, 0)
    assert intervals_of(without, raw_scores(without, unseen)).tolist() == [[0.0, 1.0]] * unseen.leads.n


def test_where_all_scores_are_equal_the_band_has_exact_binomial_limits_at_more_than_its_confidence() -> None:
    outcome = np.array([1] * 4 + [0] * 12)
    band = build_band(np.full(16, -1.0), outcome)
    low, high = (float(end[0]) for end in look_up(band, np.array([expit(-1.0)])))
    risk = 0.05 / 2 / 5  # runs of 1, 2, 4, 8 and 16, which all are the same leads here
    assert low == pytest.approx(beta.ppf(risk, 4, 13))
    assert high == pytest.approx(beta.ppf(1 - risk, 5, 12))
    lower, upper = look_up(band, np.array([0.001, 0.999]))
    assert (lower[0], upper[0]) == (0.0, pytest.approx(high)), "a lower score may go with any lower rate"
    assert (lower[1], upper[1]) == (pytest.approx(low), 1.0)


@pytest.mark.parametrize("leads", [1, 2, 3, 17, 200])
def test_a_band_is_a_sound_table_however_outcomes_lie(leads: int) -> None:
    random = np.random.default_rng(leads)
    for outcome in (np.zeros(leads), np.ones(leads), random.integers(0, 2, leads), np.arange(leads) % 3 == 0):
        log_odds = random.normal(size=leads) * random.choice([0.01, 1.0, 30.0])
        band = build_band(log_odds, np.asarray(outcome, dtype=np.int64))
        assert band.p0[0] == 0
        assert band.p1[-1] == 1
    falling = build_band(np.linspace(-2, 2, 60), (np.arange(60) < 30).astype(np.int64))
    assert (falling.p0 <= falling.p1).all()


def test_the_base_rate_weighs_what_was_expected_as_ten_leads() -> None:
    outcome = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert estimate_base_rate(outcome, None) == pytest.approx(3.5 / 11)
    assert estimate_base_rate(outcome, 0.1) == pytest.approx(0.2)
    assert estimate_base_rate(NOBODY, 0.12) == pytest.approx(0.12)
    assert 0 < estimate_base_rate(np.zeros(5, np.int64), None) < estimate_base_rate(NOBODY + 1, 0.5)
    with pytest.raises(TrainingError, match=r"no lead is decided yet.*--base-rate 0\.1"):
        estimate_base_rate(NOBODY, None)


def test_looks_are_learnt_from_everyone_and_no_outcome_changes_what_is_looked_at() -> None:
    pool = draw_pool(np.random.default_rng(6), 0.3, 1.0)
    many = np.array([f"level {i % 40}" for i in range(pool.leads.n)], object)
    pool.leads.columns["many"] = Column("text", many, np.ones(len(many), np.bool_))
    features, dropped = choose_features(pool, columns_of(pool))
    assert "too many levels" in dropped["many"]
    assert {"number_0", "flag", "word=a", "word=e"} <= set(features.names)
    turned = replace(pool, outcome=1 - pool.outcome)
    assert choose_features(turned, columns_of(pool))[0].fingerprint == features.fingerprint
    seen, _ = draw(pool, np.random.default_rng(6), 12)
    assert fit_day_one(seen, pool, columns_of(pool), None, 0).feature_set.fingerprint == features.fingerprint


def test_where_no_column_tells_leads_apart_there_is_a_model_all_the_same() -> None:
    n = 30
    same = LeadColumns(n, {"campus": Column("text", np.array(["north"] * n, object), np.ones(n, np.bool_))})
    rows = TrainingRows(same, (np.arange(n) % 3 == 0).astype(np.int64), np.full(n, AS_OF))
    model = fit(rows)
    assert model.feature_set.names == ("campus__present",)
    assert raw_scores(model, rows) == pytest.approx(10.5 / 31)


def test_the_first_day_ends_with_enough_outcomes_of_each_kind() -> None:
    enough = np.arange(ENOUGH_ROWS) < ENOUGH_OF_EACH_CLASS
    assert not is_day_one(enough.astype(np.int64))
    assert not is_day_one((~enough).astype(np.int64))
    assert is_day_one(enough[1:].astype(np.int64))
    assert is_day_one((np.arange(5000) < ENOUGH_OF_EACH_CLASS - 1).astype(np.int64))
    assert is_day_one(NOBODY)
