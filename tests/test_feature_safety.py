"""Feature safety: statistics, the strategies, coverage, verdicts, drift."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ai.domain import VERDICTS
from app.ai.drift_window import MIN_ROWS, DriftWindow
from app.ai.feature_safety import (
    FeatureStatistics,
    build_statistics,
    build_verdicts,
    check_features,
    drift_statistics,
)
from app.ai.features import FeatureMatrix, FeatureSet, build_features
from tests.builders import (
    AS_OF,
    EVERY_TRANSFORM,
    INVALID,
    MISSING,
    NAN,
    PRESENT,
    UNSEEN,
    check_one,
    column,
    leads,
    matrix,
    number_features,
    plausible_leads,
    spec,
    take,
)

TEN = range(1, 11)


def normal(rows: int, seed: int, mean: float = 0.0, gaps: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    values = random.normal(mean, 1, (rows, 1))
    values[random.random(rows) < gaps] = NAN
    return values


def statistics_of(values: np.ndarray) -> tuple[FeatureStatistics, ...]:
    return build_statistics(matrix(values))


def test_the_imputed_value_is_the_lower_median_a_value_that_occurred() -> None:
    (statistics,) = statistics_of(np.array([[1.0], [2.0], [10.0], [20.0], [NAN]]))
    assert statistics.impute == 2.0
    assert statistics.present_share == 0.8


def test_a_flag_is_imputed_with_its_more_frequent_value() -> None:
    assert statistics_of(np.array([[1.0], [0.0], [0.0]]))[0].impute == 0.0
    assert statistics_of(np.array([[1.0], [1.0], [0.0]]))[0].impute == 1.0


def test_the_range_is_that_of_the_training_rows() -> None:
    (statistics,) = statistics_of(np.arange(100.0)[:, None])
    assert (statistics.lower, statistics.upper) == (0.0, 99.0)


def test_a_wild_extreme_is_taken_for_a_mistake_and_left_outside_the_range() -> None:
    values = np.concatenate([np.linspace(0, 4, 5000), [4000.0, -4000.0]])[:, None]
    (statistics,) = statistics_of(values)
    assert statistics.upper == pytest.approx(8.0, abs=0.1)
    assert statistics.lower == pytest.approx(-4.0, abs=0.1)


def test_a_rare_flag_is_inside_the_range() -> None:
    values = np.zeros((5000, 1))
    values[7] = 1.0
    (statistics,) = statistics_of(values)
    assert (statistics.lower, statistics.upper) == (0.0, 1.0)


def test_a_feature_that_was_never_there_is_imputed_with_zero() -> None:
    (statistics,) = statistics_of(np.full((5, 1), NAN))
    assert (statistics.impute, statistics.lower, statistics.upper, statistics.present_share) == (0, 0, 0, 0)
    assert statistics.counts == (0, 5)
    assert (statistics.mean, statistics.std, statistics.edges) == (0.0, 0.0, ())


def test_the_statistics_of_a_small_sample_are_what_one_works_out_by_hand() -> None:
    (statistics,) = statistics_of(np.array([[float(number)] for number in range(20, 0, -1)] + [[NAN]] * 5))
    assert (statistics.mean, statistics.std) == (10.5, pytest.approx(math.sqrt((20**2 - 1) / 12)))
    assert (statistics.impute, statistics.present_share) == (10.0, 0.8)
    assert statistics.edges == (np.nextafter(1.0, 0.0), *(2.0 * decile for decile in range(1, 11)))
    assert statistics.counts == (0, *[2] * 10, 0, 5)


def test_gaps_are_counted_apart_from_every_number() -> None:
    (statistics,) = statistics_of(np.array([[1.0], [2.0], [2.0], [NAN]]))
    assert statistics.edges == (np.nextafter(1.0, 0.0), 1.0, 2.0)
    assert statistics.counts == (0, 1, 2, 0, 1)


def test_statistics_survive_json_and_count_every_training_cell() -> None:
    built = build_features(plausible_leads(3000, seed=1), EVERY_TRANSFORM, AS_OF)
    for statistics in build_statistics(built):
        assert FeatureStatistics.from_json(json.loads(json.dumps(statistics.to_json()))) == statistics
        assert sum(statistics.counts) == 3000


@pytest.mark.parametrize(
    "changes",
    [{"impute": NAN}, {"impute": 20.0}, {"std": -1.0}, {"edges": [2.0, 1.0]}, {"counts": [1]},
     {"lower": 11.0}, {"surprise": 1}, {"edges": [2.0, 2.0], "counts": [1, 1, 1, 1]},
     {"edges": [2.0, 3.0], "counts": [1, 1, -1, 1]}, {"edges": [2.0], "counts": [1, 1, 1, 1]}],
)  # fmt: skip
def test_statistics_that_do_not_fit_together_are_refused(changes: dict) -> None:
    data = statistics_of(np.arange(11.0)[:, None])[0].to_json()
    with pytest.raises(ValueError, match=r"."):
        FeatureStatistics.from_json({**data, **changes})


@pytest.mark.parametrize(("state", "field"), [(MISSING, "missing"), (INVALID, "invalid"), (UNSEEN, "unseen")])
def test_each_kind_of_gap_follows_its_own_strategy(state, field) -> None:
    assert check_one(NAN, state, TEN, **{field: "impute"}).values[0, 0] == 5.0
    assert check_one(NAN, state, TEN, **{field: "zero"}).values[0, 0] == 0.0
    assert np.isnan(check_one(NAN, state, TEN, **{field: "keep"}).values[0, 0])
    assert check_one(NAN, state, TEN, **{field: "reject"}).rejected[0]
    others = {name: "reject" for name in ("missing", "invalid", "unseen") if name != field}
    assert not check_one(NAN, state, TEN, **others).rejected[0]


@pytest.mark.parametrize(
    ("strategy", "value", "expected"),
    [("clip", 12.0, 10.0), ("clip", -3.0, 1.0), ("keep", 12.0, 12.0), ("impute", 12.0, 5.0),
     ("impute", -3.0, 5.0), ("clip", 10.0, 10.0), ("impute", 1.0, 1.0)],
)  # fmt: skip
def test_a_value_outside_the_training_range_follows_its_strategy(strategy, value, expected) -> None:
    checked = check_one(value, PRESENT, TEN, out_of_range=strategy)
    assert checked.values[0, 0] == expected
    assert not checked.rejected[0]


def test_a_value_outside_the_range_can_reject_the_lead_and_one_inside_cannot() -> None:
    assert check_one(10.5, PRESENT, TEN, out_of_range="reject").rejected.tolist() == [True]
    assert check_one(10.0, PRESENT, TEN, out_of_range="reject").rejected.tolist() == [False]


def test_far_outside_is_farther_from_the_range_than_the_range_is_wide() -> None:
    assert check_one(19.0, PRESENT, TEN).out_of_range[0] == 0
    assert check_one(19.1, PRESENT, TEN).out_of_range[0] == 1
    assert check_one(-8.1, PRESENT, TEN).out_of_range[0] == 1
    assert check_one(NAN, MISSING, TEN).out_of_range[0] == 0


def test_zero_and_nan_fillings_are_not_clipped_into_the_range() -> None:
    assert check_one(NAN, MISSING, range(5, 9), missing="zero").values[0, 0] == 0.0
    assert np.isnan(check_one(NAN, MISSING, range(5, 9), missing="keep").values[0, 0])


def test_one_feature_is_enough_to_reject_a_lead_and_its_neighbours_are_answered() -> None:
    features = FeatureSet((
        spec("value", ("a", "number"), name="a"),
        spec("value", ("b", "number"), name="b", missing="reject"),
        spec("value", ("c", "number"), name="c", missing="reject"),
    ))  # fmt: skip
    rows = matrix([[1, 2, 3], [NAN, NAN, 3], [1, NAN, NAN], [NAN, 2, 3]])
    checked = check_features(rows, features, build_statistics(rows))
    assert checked.rejected.tolist() == [False, True, True, False]


def test_coverage_counts_what_rests_on_data() -> None:
    rows = matrix([[1, 2], [1, NAN], [NAN, NAN]], [[PRESENT, PRESENT], [PRESENT, INVALID], [MISSING, UNSEEN]])
    checked = check_features(rows, number_features("a", "b"), build_statistics(rows))
    assert checked.coverage.tolist() == [1.0, 0.5, 0.0]


def test_an_indicator_of_something_absent_does_not_count_as_data() -> None:
    features = FeatureSet((
        spec("value", ("gpa", "number"), name="gpa"),
        spec("is_present", ("gpa", "number"), name="there"),
    ))  # fmt: skip
    built = build_features(leads(gpa=column("number", 3.0, None, NAN)), features, AS_OF)
    checked = check_features(built, features, build_statistics(built))
    assert checked.coverage.tolist() == [1.0, 0.0, 0.0]
    assert checked.values[:, 1].tolist() == [1.0, 0.0, 0.0]


def test_an_indicator_of_a_text_counts_as_data_where_there_is_a_text() -> None:
    features = FeatureSet((spec("is_present", ("source", "text")),))
    built = build_features(leads(source=column("text", "web", None)), features, AS_OF)
    checked = check_features(built, features, build_statistics(built))
    assert checked.coverage.tolist() == checked.weighted_coverage.tolist() == [1.0, 0.0]


def test_a_rare_text_with_a_number_of_its_own_counts_as_data_and_no_text_does_not() -> None:
    params = {"levels": {"web": 1.0}, "unseen": 0.5, "missing": 0.25}
    features = FeatureSet((spec("level", ("source", "text"), params=params),))
    built = build_features(leads(source=column("text", "web", "owl", None)), features, AS_OF)
    checked = check_features(built, features, build_statistics(built))
    assert checked.values[:, 0].tolist() == [1.0, 0.5, 0.25]
    assert checked.coverage.tolist() == [1.0, 1.0, 0.0]


def test_two_thousand_leads_equal_the_same_leads_one_by_one_bit_for_bit() -> None:
    many = plausible_leads(2000, seed=2)
    statistics = build_statistics(build_features(many, EVERY_TRANSFORM, AS_OF))
    batch = check_features(build_features(many, EVERY_TRANSFORM, AS_OF), EVERY_TRANSFORM, statistics)
    for row in range(2000):
        built = build_features(take(many, [row]), EVERY_TRANSFORM, AS_OF)
        alone = check_features(built, EVERY_TRANSFORM, statistics)
        assert alone.values[0].tobytes() == batch.values[row].tobytes()
        assert alone.coverage[0] == batch.coverage[row]
        assert alone.rejected[0] == batch.rejected[row]
        assert alone.out_of_range[0] == batch.out_of_range[row]


def test_the_input_is_left_as_it_was_and_no_leads_are_no_trouble() -> None:
    built = build_features(plausible_leads(200, seed=3), EVERY_TRANSFORM, AS_OF)
    before = built.values.copy(), built.states.copy()
    statistics = build_statistics(built)
    check_features(built, EVERY_TRANSFORM, statistics)
    np.testing.assert_array_equal(built.values, before[0])
    np.testing.assert_array_equal(built.states, before[1])
    empty = FeatureMatrix(built.values[:0], built.states[:0])
    assert check_features(empty, EVERY_TRANSFORM, statistics).coverage.shape == (0,)


CELL = st.one_of(
    st.tuples(st.floats(-3.4e38, 3.4e38), st.just(PRESENT)),
    st.tuples(st.just(NAN), st.sampled_from([MISSING, INVALID, UNSEEN])),
)
STRATEGIES = st.fixed_dictionaries({
    "missing": st.sampled_from(["impute", "zero", "reject"]),
    "invalid": st.sampled_from(["impute", "zero", "reject"]),
    "unseen": st.sampled_from(["impute", "zero", "reject"]),
    "out_of_range": st.sampled_from(["clip", "keep", "reject", "impute"]),
})  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(CELL, st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20), STRATEGIES)
def test_without_keep_every_value_is_finite_and_bounded(cell, training, strategies) -> None:
    checked = check_one(*cell, training, **strategies)
    (statistics,) = statistics_of(np.array(training)[:, None])
    value = checked.values[0, 0]
    assert np.isfinite(value)
    if not checked.rejected[0] and strategies["out_of_range"] != "keep" and value != 0.0:
        assert statistics.lower <= value <= statistics.upper


@pytest.mark.parametrize(
    ("coverage", "far", "verdict"),
    [(1.0, 0, "ok"), (0.6, 0, "ok"), (0.59, 0, "caution"), (1.0, 1, "caution"), (0.15, 0, "caution"),
     (0.149, 0, "abstain"), (0.0, 0, "abstain"), (0.0, 3, "abstain")],
)  # fmt: skip
def test_a_verdict_follows_coverage_and_values_far_outside(coverage, far, verdict) -> None:
    codes = build_verdicts(np.array([coverage]), np.array([far]), 0.6)
    assert codes.dtype == np.uint8
    assert VERDICTS[codes[0]] == verdict


@pytest.mark.parametrize(
    ("coverage", "verdict"), [(0.6, "ok"), (0.59, "caution"), (0.4, "caution"), (0.39, "abstain")]
)
def test_a_model_that_knows_how_little_is_too_little_abstains_below_it(coverage, verdict) -> None:
    codes = build_verdicts(np.array([coverage]), np.array([0]), 0.6, abstain_below=0.4)
    assert VERDICTS[codes[0]] == verdict


def test_a_lead_with_the_least_coverage_asked_for_is_never_abstained_from() -> None:
    codes = build_verdicts(np.array([0.2, 0.19, 0.0]), np.array([0, 0, 0]), 0.2, abstain_below=0.4)
    assert [VERDICTS[code] for code in codes] == ["ok", "abstain", "abstain"]


def test_with_no_least_coverage_only_an_empty_lead_is_abstained_from() -> None:
    codes = build_verdicts(np.array([0.0, 0.01]), np.array([0, 0]), 0.0)
    assert [VERDICTS[code] for code in codes] == ["abstain", "ok"]


def test_a_model_that_always_knows_better_than_the_base_rate_abstains_from_empty_leads_only() -> None:
    codes = build_verdicts(np.array([0.0, 0.01]), np.array([0, 0]), 0.6, abstain_below=0.0)
    assert [VERDICTS[code] for code in codes] == ["abstain", "caution"]


@pytest.mark.parametrize("rows", [1, 20, 200, 2000])
def test_a_sample_of_the_same_leads_is_stable_however_small(rows: int) -> None:
    reference = statistics_of(normal(5000, seed=1, gaps=0.3))
    states = [drift_statistics(reference, normal(rows, seed, gaps=0.3)).state for seed in range(100, 150)]
    assert states == ["stable"] * 50


def test_a_shift_is_seen_and_measured() -> None:
    reference = statistics_of(normal(5000, seed=1))
    slight, strong = (drift_statistics(reference, normal(2000, 2, mean)) for mean in (0.4, 1.0))
    assert (slight.state, strong.state) == ("moderate", "drifting")
    # Of two normals it is the mean's shift squared.
    assert slight.features[0].psi == pytest.approx(0.4**2, rel=0.25)
    assert strong.features[0].psi == pytest.approx(1, rel=0.25)


def test_drift_is_what_one_works_out_by_hand() -> None:
    before, after = [5] * 10 + [50], [10] * 10 + [0]
    edges = tuple(float(edge) for edge in range(9))
    reference = FeatureStatistics(4.0, 0.0, 9.0, 4.5, 3.0, 0.5, edges, tuple(before))
    values = np.array([[float(number)] for number in range(10)] * 10)
    (drift,) = drift_statistics([reference], values).features
    expected, observed = ([(count + 0.5) / 105.5 for count in counts] for counts in (before, after))
    pairs = list(zip(expected, observed, strict=True))
    assert drift.psi == pytest.approx(sum((new - old) * math.log(new / old) for old, new in pairs))
    assert drift.noise == pytest.approx(29.588 * (1 / 100 + 1 / 100), rel=0.01)  # chi-squared, 10 degrees
    (drift,) = drift_statistics([reference], np.array([[0.0]])).features
    assert drift.noise == pytest.approx(29.588 * (1 / 100 + 1), rel=0.01)


def test_values_that_went_missing_are_drift() -> None:
    reference = statistics_of(normal(5000, seed=1, gaps=0.1))
    assert drift_statistics(reference, normal(1000, 2, gaps=0.5)).state == "drifting"


@pytest.mark.parametrize("constant", [0.0, -7.5, 1e30])
@pytest.mark.parametrize("moved", [-1e31, 1e31])
def test_a_constant_that_moves_either_way_is_drift(constant: float, moved: float) -> None:
    reference = statistics_of(np.full((500, 1), constant))
    assert drift_statistics(reference, np.full((500, 1), constant)).state == "stable"
    assert drift_statistics(reference, np.full((500, 1), moved)).state == "drifting"


def test_the_worst_feature_gives_the_state() -> None:
    reference = build_statistics(matrix(np.hstack([normal(3000, 1), normal(3000, 2)])))
    current = np.hstack([normal(1000, 3), normal(1000, 4, mean=2)])
    drift = drift_statistics(reference, current)
    assert [feature.state for feature in drift.features] == ["stable", "drifting"]
    assert drift.state == "drifting"


def test_no_rows_say_nothing() -> None:
    assert drift_statistics(statistics_of(normal(100, 1)), np.empty((0, 1))).state == "stable"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-3.4e38, 3.4e38) | st.just(NAN), min_size=1, max_size=30),
    st.lists(st.floats(-3.4e38, 3.4e38) | st.just(NAN), min_size=1, max_size=30),
)
def test_drift_is_finite_for_any_two_samples(before: list[float], after: list[float]) -> None:
    (drift,) = drift_statistics(statistics_of(np.array(before)[:, None]), np.array(after)[:, None]).features
    assert np.isfinite([drift.psi, drift.noise]).all()
    assert drift.psi >= 0


def test_a_window_says_nothing_before_it_has_enough_rows() -> None:
    reference, window = statistics_of(normal(3000, 1)), DriftWindow(1000)
    window.add(normal(MIN_ROWS - 1, 2, mean=5), "a")
    assert window.statistics(reference, "a") == ("unknown", MIN_ROWS - 1)
    window.add(normal(1, 3, mean=5), "a")
    assert window.statistics(reference, "a") == ("drifting", MIN_ROWS)


def test_a_window_forgets_the_oldest_rows_first_however_they_come() -> None:
    reference, window = statistics_of(normal(3000, 1)), DriftWindow(300)
    for seed in range(7):
        window.add(normal(100, seed, mean=5), "a")
    assert window.statistics(reference, "a") == ("drifting", 300)
    window.add(normal(250, 20), "a")
    window.add(normal(10, 21), "a")
    assert window.statistics(reference, "a") == ("drifting", 300)
    window.add(normal(40, 22), "a")
    assert window.statistics(reference, "a") == ("stable", 300)
    window.add(normal(1000, 23), "a")
    assert window.statistics(reference, "a") == ("stable", 300)


def test_a_window_forgets_row_by_row() -> None:
    reference, window = statistics_of(np.zeros((5000, 1))), DriftWindow(MIN_ROWS)
    window.add(np.ones((3, 1)), "a")
    window.add(np.zeros((MIN_ROWS - 3, 1)), "a")
    assert window.statistics(reference, "a").status == "moderate"
    window.add(np.zeros((1, 1)), "a")
    assert window.statistics(reference, "a").status == "stable"


def test_a_window_never_compares_rows_of_one_feature_set_with_another() -> None:
    window = DriftWindow(300)
    window.add(normal(300, 1, mean=5), "a")
    wide = build_statistics(matrix(np.hstack([normal(500, 1), normal(500, 2)])))
    assert window.statistics(wide, "b") == ("unknown", 0)
    window.add(np.hstack([normal(250, 3), normal(250, 4)]), "b")
    assert window.statistics(wide, "b") == ("stable", 250)


def test_weighted_coverage_counts_what_the_present_features_are_worth() -> None:
    rows = matrix([[1, 2, 3], [1, NAN, NAN], [NAN, 2, 3], [NAN, NAN, NAN]])
    checked = check_features(rows, number_features("a", "b", "c"), build_statistics(rows), [0.75, 0.25, 0.0])
    assert checked.weighted_coverage == pytest.approx([1.0, 0.75, 0.25, 0.0])
    assert checked.weighted_coverage[0] == 1.0
    assert checked.coverage == pytest.approx([1.0, 1 / 3, 2 / 3, 0.0])


def test_a_feature_that_is_worth_a_millionth_counts_for_a_millionth() -> None:
    rows = matrix([[1, 2], [1, NAN], [NAN, 2]])
    weights = [1 - 1e-6, 1e-6]
    checked = check_features(rows, number_features("a", "b"), build_statistics(rows), weights)
    assert checked.weighted_coverage.tolist() == pytest.approx([1.0, *weights], rel=1e-5, abs=0)


def test_without_weights_all_features_are_worth_the_same() -> None:
    rows = matrix([[1, 2, 3], [1, NAN, NAN], [NAN, 2, 3], [NAN, NAN, NAN]])
    checked = check_features(rows, number_features("a", "b", "c"), build_statistics(rows))
    assert checked.weighted_coverage.tolist() == checked.coverage.tolist()


def test_an_unseen_text_and_a_value_far_outside_lend_no_weight() -> None:
    params = {"levels": {"web": 1.0}, "unseen": 0.5}
    features = FeatureSet((
        spec("level", ("source", "text"), name="source", params=params),
        spec("value", ("gpa", "number"), name="gpa"),
    ))  # fmt: skip
    trained = build_features(
        leads(source=column("text", "web", "web"), gpa=column("number", 1.0, 2.0)), features, AS_OF
    )
    new = build_features(
        leads(source=column("text", "owl", "web"), gpa=column("number", 1.5, 99.0)), features, AS_OF
    )
    checked = check_features(new, features, build_statistics(trained), [0.6, 0.4])
    assert checked.coverage.tolist() == [1.0, 1.0]
    assert checked.weighted_coverage == pytest.approx([0.4, 0.6])


def test_weighted_coverage_of_a_batch_equals_that_of_each_lead_bit_for_bit() -> None:
    many = build_features(plausible_leads(500, seed=5), EVERY_TRANSFORM, AS_OF)
    statistics = build_statistics(many)
    weights = np.random.default_rng(5).dirichlet(np.ones(many.values.shape[1])).tolist()
    batch = check_features(many, EVERY_TRANSFORM, statistics, weights).weighted_coverage
    for row in range(500):
        alone = FeatureMatrix(many.values[row : row + 1], many.states[row : row + 1])
        assert check_features(alone, EVERY_TRANSFORM, statistics, weights).weighted_coverage[0] == batch[row]
