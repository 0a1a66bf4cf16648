"""Building features: the edges of every transform, and that a lead's row is its own to the last bit."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ai.column_blocks import NULL_TEXT
from app.ai.domain import Column, InputColumn, LeadColumns
from app.ai.feature_transforms import TRANSFORMS, TextCodes
from app.ai.features import FeatureSet, FeatureSpec, build_features
from app.ai.score_kernels import KNOWN_TEXT
from tests.builders import (
    AS_OF,
    DAY,
    EVERY_TRANSFORM,
    INF,
    INVALID,
    MISSING,
    NAN,
    ODD_FLOATS,
    PRESENT,
    UNSEEN,
    build_one,
    column,
    leads,
    number_features,
    plausible_leads,
    spec,
    take,
)

STORED_TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=6)
FLOATS = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.tobytes() == right.tobytes()


def test_every_transform_of_the_vocabulary_is_tested_here() -> None:
    assert {feature.transform for feature in EVERY_TRANSFORM.specs} == set(TRANSFORMS)


def test_two_thousand_leads_equal_the_same_leads_one_by_one_bit_for_bit() -> None:
    many = plausible_leads(2000, seed=1)
    batch = build_features(many, EVERY_TRANSFORM, AS_OF)
    for row in range(2000):
        alone = build_features(take(many, [row]), EVERY_TRANSFORM, AS_OF)
        assert same_bits(alone.values[0], batch.values[row])
        assert same_bits(alone.states[0], batch.states[row])


@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 15, 17, 31, 33, 64, 1000])
def test_neither_the_size_of_a_batch_nor_a_leads_place_in_it_changes_a_bit(size: int) -> None:
    many = plausible_leads(2000, seed=2)
    batch = build_features(many, EVERY_TRANSFORM, AS_OF)
    order = np.random.default_rng(size).permutation(2000)[:size]
    part = build_features(take(many, order), EVERY_TRANSFORM, AS_OF)
    assert same_bits(part.values, batch.values[order])
    assert same_bits(part.states, batch.states[order])


def test_columns_in_any_memory_layout_give_the_same_bits() -> None:
    many = plausible_leads(500, seed=3)
    strided = {
        name: Column(c.kind, np.repeat(c.values, 3)[::3], np.repeat(c.present, 2)[::2])
        for name, c in many.columns.items()
    }
    expected = build_features(many, EVERY_TRANSFORM, AS_OF)
    found = build_features(leads(**strided), EVERY_TRANSFORM, AS_OF)
    assert same_bits(found.values, expected.values)


def test_one_as_of_time_equals_the_same_time_given_for_each_lead() -> None:
    many = plausible_leads(300, seed=4)
    one = build_features(many, EVERY_TRANSFORM, AS_OF)
    each = build_features(many, EVERY_TRANSFORM, np.full(300, AS_OF))
    assert same_bits(one.values, each.values)


def test_the_input_is_left_as_it_was() -> None:
    many = plausible_leads(100, seed=5)
    before = {name: (c.values.copy(), c.present.copy()) for name, c in many.columns.items()}
    build_features(many, EVERY_TRANSFORM, AS_OF)
    for name, (values, present) in before.items():
        np.testing.assert_array_equal(many.columns[name].values, values)
        np.testing.assert_array_equal(many.columns[name].present, present)


def test_the_matrix_is_float64_in_rows_and_states_are_bytes() -> None:
    matrix = build_features(plausible_leads(10, seed=6), EVERY_TRANSFORM, AS_OF)
    assert matrix.values.shape == matrix.states.shape == (10, len(EVERY_TRANSFORM.specs))
    assert matrix.values.flags.c_contiguous
    assert (matrix.values.dtype, matrix.states.dtype) == (np.float64, np.uint8)


def test_no_leads_make_an_empty_matrix() -> None:
    matrix = build_features(plausible_leads(0, seed=7), EVERY_TRANSFORM, AS_OF)
    assert matrix.values.shape == (0, len(EVERY_TRANSFORM.specs))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, STORED_TEXTS), min_size=1, max_size=9))
def test_whatever_is_stored_a_present_cell_is_finite_in_single_precision_and_others_are_gaps(
    rows: list,
) -> None:
    gpa, minutes, opted_in, created, intake, source = zip(*rows, strict=True)
    stored = leads(
        gpa=column("number", *gpa), minutes=column("number", *minutes), opted_in=column("boolean", *opted_in),
        created=column("timestamp", *created), intake=column("timestamp", *intake),
        source=column("text", *source),
    )  # fmt: skip
    matrix = build_features(stored, EVERY_TRANSFORM, AS_OF)
    present = matrix.states == PRESENT
    assert np.isfinite(matrix.values[present].astype(np.float32)).all()
    pooled = EVERY_TRANSFORM.names.index("pooled")
    gaps = np.delete(~present, pooled, axis=1)
    assert np.isnan(np.delete(matrix.values, pooled, axis=1)[gaps]).all()
    assert not np.signbit(matrix.values[matrix.values == 0]).any()


def test_null_is_missing_and_a_stored_nan_or_infinity_is_invalid() -> None:
    values, states = build_one("value", column("number", 3.5, None, NAN, INF, -INF, 1e39))
    assert states == [PRESENT, MISSING, INVALID, INVALID, INVALID, INVALID]
    assert values[0] == 3.5
    assert all(map(math.isnan, values[1:]))


def test_log1p_of_a_negative_number_is_invalid_even_where_the_logarithm_exists() -> None:
    values, states = build_one("log1p", column("number", 0, math.e - 1, -0.5, -1, -2, None, 5e-324))
    assert states == [PRESENT, PRESENT, INVALID, INVALID, INVALID, MISSING, PRESENT]
    assert values[0] == 0.0
    assert values[1] == pytest.approx(1.0)
    assert values[6] == 5e-324


def test_a_flag_is_zero_or_one_and_nothing_else() -> None:
    values, states = build_one("flag", column("boolean", True, False, None, 0.5, NAN))
    assert values[:2] == [1.0, 0.0]
    assert states == [PRESENT, PRESENT, MISSING, INVALID, INVALID]


@pytest.mark.parametrize(
    ("stored", "there"),
    [
        (column("number", 0.0, None, NAN, INF), [1, 0, 0, 0]),
        (column("boolean", False, None), [1, 0]),
        (column("timestamp", AS_OF, None, INF), [1, 0, 0]),
        (column("text", "x", None, "", "  "), [1, 0, 0, 0]),
    ],
)
def test_is_present_tells_whether_a_usable_value_is_there_and_is_never_a_gap_itself(
    stored: Column, there: list[int]
) -> None:
    values, states = build_one("is_present", stored)
    assert values == there
    assert set(states) == {PRESENT}


def test_age_is_in_days_and_the_future_has_age_zero() -> None:
    values, states = build_one("age_days", column("timestamp", AS_OF - 36 * 3600, AS_OF, AS_OF + DAY, None))
    assert values[:3] == [1.5, 0.0, 0.0]
    assert states == [PRESENT, PRESENT, PRESENT, MISSING]


def test_days_until_turns_negative_once_the_moment_is_past() -> None:
    values, _ = build_one("days_until", column("timestamp", AS_OF + 2 * DAY, AS_OF - DAY))
    assert values == [2.0, -1.0]


def test_each_lead_has_its_own_as_of_time_in_training() -> None:
    created = column("timestamp", AS_OF, AS_OF)
    values, _ = build_one("age_days", created, as_of=np.array([AS_OF + DAY, AS_OF + 3 * DAY]))
    assert values == [1.0, 3.0]


@pytest.mark.parametrize("transform", ["age_days", "days_until"])
@pytest.mark.parametrize("moment", [INF, -INF, NAN, 253_402_300_800.0, -62_135_596_801.0, 9.2e12])
def test_a_moment_outside_the_calendar_is_invalid(transform: str, moment: float) -> None:
    _, states = build_one(transform, column("timestamp", moment))
    assert states == [INVALID]


def test_days_between_is_a_gap_when_either_end_is_and_the_worse_of_two_gaps_counts() -> None:
    start = column("timestamp", AS_OF, None, AS_OF, INF)
    end = column("timestamp", AS_OF + 3 * DAY, AS_OF, None, None)
    values, states = build_one("days_between", start, end)
    assert values[0] == 3.0
    assert states == [PRESENT, MISSING, MISSING, INVALID]


def test_anything_over_zero_is_invalid() -> None:
    above, below = column("number", 3, 3, 0, 0, -1), column("number", 4, 0, 5, 0, 0)
    values, states = build_one("ratio", above, below)
    assert values[0] == 0.75
    assert values[2] == 0.0
    assert states == [PRESENT, INVALID, PRESENT, INVALID, INVALID]


def test_zero_over_zero_may_have_a_number_but_something_over_zero_stays_invalid() -> None:
    above, below = column("number", 0, 3, None, -0.0), column("number", 0, 0, 0, 0)
    values, states = build_one("ratio", above, below, zero_over_zero=0.5)
    assert values[0] == values[3] == 0.5
    assert states == [PRESENT, INVALID, MISSING, PRESENT]


def test_a_ratio_that_overflows_is_invalid() -> None:
    _, states = build_one("ratio", column("number", 3e38, 1), column("number", 1e-300, 5e-324))
    assert states == [INVALID, INVALID]


def test_levels_are_compared_trimmed_and_casefolded() -> None:
    stored = column("text", "Web", " web\t", "WEB", "straße", "STRASSE", "fair", None, " ")
    values, states = build_one("level", stored, levels={"WEB ": 0.5, "Strasse": 2})
    assert values[:5] == [0.5, 0.5, 0.5, 2.0, 2.0]
    assert states == [PRESENT] * 5 + [UNSEEN, MISSING, MISSING]
    assert all(map(math.isnan, values[5:]))


def test_a_level_may_have_numbers_for_no_text_and_for_unseen_text_and_still_says_what_it_was() -> None:
    values, states = build_one(
        "level", column("text", "web", "owl", None), levels={"web": 1}, missing=7, unseen=9
    )
    assert values == [1.0, 9.0, 7.0]
    assert states == [PRESENT, UNSEEN, MISSING]


def test_one_of_knows_every_text_but_not_the_absence_of_one() -> None:
    values, states = build_one("one_of", column("text", "Web", "owl", None), values=["web", "fair"])
    assert values[:2] == [1.0, 0.0]
    assert states == [PRESENT, PRESENT, MISSING]


def test_equal_numbers_have_equal_bits() -> None:
    values, _ = build_one("value", column("number", -0.0))
    assert math.copysign(1, values[0]) == 1


@pytest.mark.parametrize("as_of", [NAN, INF, np.array([AS_OF, NAN])])
def test_an_as_of_time_that_is_not_finite_is_a_mistake_of_ours(as_of: float) -> None:
    with pytest.raises(ValueError, match="as-of"):
        build_one("age_days", column("timestamp", AS_OF, AS_OF), as_of=as_of)


def test_a_column_that_is_absent_or_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="'gpa'"):
        build_features(leads(other=column("number", 1)), number_features("gpa"), AS_OF)
    with pytest.raises(ValueError, match="'gpa'"):
        build_features(leads(gpa=column("text", "1")), number_features("gpa"), AS_OF)


def test_a_feature_set_survives_json_with_its_fingerprint() -> None:
    again = FeatureSet.from_json(json.loads(json.dumps(EVERY_TRANSFORM.to_json())))
    assert again == EVERY_TRANSFORM
    assert again.fingerprint == EVERY_TRANSFORM.fingerprint


def test_the_fingerprint_follows_every_part_of_a_spec_and_the_order() -> None:
    base = spec("level", ("a", "text"), params={"levels": {"web": 1.0}})
    other = spec("level", ("b", "text"), name="y", params={"levels": {"web": 1.0}})
    variants = [
        dataclasses.replace(base, params={"levels": {"web": 1.5}}),
        dataclasses.replace(base, name="z"),
        dataclasses.replace(base, inputs=(InputColumn("c", "text"),)),
        dataclasses.replace(base, missing="zero"),
        dataclasses.replace(base, unseen="reject"),
        dataclasses.replace(base, out_of_range="keep"),
    ]
    sets = [FeatureSet((base, other)), FeatureSet((other, base))]
    sets += [FeatureSet((variant, other)) for variant in variants]
    assert len({feature_set.fingerprint for feature_set in sets}) == len(sets)


def test_spelling_of_levels_and_whole_numbers_do_not_change_the_fingerprint() -> None:
    one = FeatureSet((spec("level", ("a", "text"), params={"levels": {"Web ": 1, "fair": 2}}),))
    two = FeatureSet((spec("level", ("a", "text"), params={"levels": {"web": 1.0, "Fair": 2.0}}),))
    assert one.fingerprint == two.fingerprint


def test_features_that_read_the_same_columns_are_one_group_under_the_columns_name() -> None:
    features = FeatureSet(
        (
            spec("level", ("source", "text"), name="source", params={"levels": {"web": 0.0}}),
            spec("value", ("gpa", "number"), name="grade"),
            spec("one_of", ("source", "text"), name="source=web", params={"values": ["web"]}),
            spec("ratio", ("gpa", "number"), ("minutes", "number"), name="ratio"),
            spec("value", ("minutes", "number"), name="minutes"),
            spec("is_present", ("minutes", "number"), name="minutes__present"),
        )
    )
    assert features.groups == ((0, 2), (1,), (3,), (4, 5))
    assert features.group_names == ("source", "grade", "ratio", "minutes")


def test_a_column_read_twice_is_asked_for_once_in_order_of_first_use() -> None:
    names = [entry.name for entry in EVERY_TRANSFORM.input_columns]
    assert names == ["gpa", "minutes", "opted_in", "source", "created", "intake"]


NUMBER, TEXT = ("a", "number"), ("a", "text")
GOOD = spec("value", NUMBER).to_json()


@pytest.mark.parametrize(
    "make",
    [
        lambda: spec("sqrt", NUMBER),
        lambda: spec("value", NUMBER, name=""),
        lambda: spec("value", TEXT),
        lambda: spec("value", NUMBER, NUMBER),
        lambda: spec("ratio", NUMBER),
        lambda: spec("value"),
        lambda: spec("age_days", NUMBER),
        lambda: spec("value", NUMBER, params={"levels": {}}),
        lambda: spec("level", TEXT),
        lambda: spec("level", TEXT, params={"levels": {}}),
        lambda: spec("level", TEXT, params={"levels": {"a": 1, " A": 2}}),
        lambda: spec("level", TEXT, params={"levels": {"a": NAN}}),
        lambda: spec("level", TEXT, params={"levels": {"a": True}}),
        lambda: spec("level", TEXT, params={"levels": {"a": "1"}}),
        lambda: spec("level", TEXT, params={"levels": {"a": 10**400}}),
        lambda: spec("level", TEXT, params={"levels": {1: 1}}),
        lambda: spec("level", TEXT, params={"levels": {"a": 1}, "missing": INF}),
        lambda: spec("level", TEXT, params={"levels": {"a": 1}, "missing": 1}, missing="reject"),
        lambda: spec("level", TEXT, params={"levels": {"a": 1}, "unseen": 1}, unseen="zero"),
        lambda: spec("one_of", TEXT, params={"values": "web"}),
        lambda: spec("one_of", TEXT, params={"values": []}),
        lambda: spec("one_of", TEXT, params={"values": ["web", "WEB"]}),
        lambda: spec("ratio", NUMBER, NUMBER, params={"zero_over_zero": NAN}),
        lambda: spec("value", NUMBER, missing="guess"),
        lambda: spec("value", NUMBER, out_of_range="zero"),
        lambda: FeatureSet(()),
        lambda: number_features("a", "a"),
        lambda: FeatureSet((spec("value", NUMBER), spec("one_of", TEXT, name="y", params={"values": ["b"]}))),
        lambda: FeatureSpec.from_json({"name": "x"}),
        lambda: FeatureSpec.from_json({**GOOD, "surprise": 1}),
        lambda: FeatureSpec.from_json({**GOOD, "inputs": [{"name": "a", "kind": "blob"}]}),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_mean_anything_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"."):
        make()


def test_odd_floats_never_warn_and_never_leak_into_neighbours() -> None:
    plain = column("number", *[3.0] * len(ODD_FLOATS))
    mixed = leads(gpa=column("number", *ODD_FLOATS), other=plain)
    matrix = build_features(mixed, number_features("gpa", "other"), AS_OF)
    assert (matrix.values[:, 1] == 3.0).all()
    assert (matrix.states[:, 1] == PRESENT).all()


def test_codes_of_texts_are_remembered_up_to_a_limit_and_stay_right() -> None:
    seen = np.zeros(8, KNOWN_TEXT)
    codes = TextCodes(["web", "fair"], seen)
    others = [f"other {n}".encode() for n in range(2500)]
    texts = [b" Web", b"FAIR ", b"", NULL_TEXT, b"x" * 1000, *others, b"web"]
    expected = [2, 3, 0, 0, 1, *[1] * 2500, 2]
    assert codes.code(texts) == expected
    assert codes.code(texts) == expected
    assert len(codes) <= 1000
    assert max(map(len, codes)) < 64
    assert seen["code"].tolist() == [2, 3, 0, 0, 2, 0, 0, 0]
    assert seen["size"].tolist() == [5, 6, 1, 2, 4, 0, 0, 0]


def test_texts_beyond_those_a_column_was_first_seen_to_hold_have_their_codes_too() -> None:
    first = {"levels": {"web": 1.0}, "unseen": 2.0, "missing": 3.0}
    second = {"levels": {"fair": 4.0}, "unseen": 5.0, "missing": 6.0}
    features = FeatureSet((
        spec("level", ("city", "text"), name="a", params=first),
        spec("level", ("source", "text"), name="b", params=second),
    ))  # fmt: skip
    words = [*(f"other {number} " + "x" * (number % 90) for number in range(300)), "Web ", "fair", "", "web"]
    leads = LeadColumns(len(words), {name: column("text", *words) for name in ("city", "source")})
    for _ in range(2):
        values = build_features(leads, features, AS_OF).values
        assert values[:, 0].tolist() == [2.0] * 300 + [1.0, 2.0, 3.0, 1.0]
        assert values[:, 1].tolist() == [5.0] * 300 + [5.0, 4.0, 6.0, 5.0]
