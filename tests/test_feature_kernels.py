"""The loops that build features and make them safe give NumPy's bits, whatever the model and the leads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ai.column_blocks import NULL_NUMBER, NULL_TEXT, ColumnBlocks, encode_text, stack_columns
from app.ai.domain import InputColumn, LeadColumns
from app.ai.feature_plan import _OPERATIONS
from app.ai.feature_safety import SafetyRules, apply_rules, build_statistics
from app.ai.feature_transforms import RANGES, TRANSFORMS
from app.ai.features import FeatureMatrix, FeatureSet, build_features
from app.ai.score_kernels import CHECKED, Operation, installed_kernels
from tests.builders import (
    AS_OF,
    DAY,
    EVERY_TRANSFORM,
    ODD_FLOATS,
    column,
    matrix,
    number_features,
    plausible_leads,
    spec,
)

needs_kernels = pytest.mark.skipif(installed_kernels() is None, reason="installed without a C compiler")

COLUMNS = {
    "number": ("gpa", "minutes", "visits"),
    "boolean": ("opted_in", "called"),
    "timestamp": ("created", "intake"),
    "text": ("source", "city"),
}
EDGES = [edge for bounds in RANGES.values() for edge in bounds]
NUMBERS = st.one_of(
    st.none(),
    st.sampled_from(ODD_FLOATS),
    st.sampled_from(
        [*EDGES, *(float(np.nextafter(edge, side)) for edge in EDGES for side in (-np.inf, np.inf))]
    ),
    st.sampled_from([AS_OF, AS_OF - DAY, AS_OF + DAY / 3, 0.0, 1.0, 2.0, 3.25]),
    st.floats(),
)
WORDS = ["web", "fair", "Web ", "ﬁn", "fin", "", "  ", "pigeon"]
PARAMETERS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -2.5]), st.floats(-3e38, 3e38))
MOMENTS = st.one_of(st.just(AS_OF), st.floats(-1e12, 1e12), st.sampled_from([0.0, -0.0, 1e300, -1.7e308]))


def test_numpy_has_every_operation_on_numbers() -> None:
    assert {*_OPERATIONS, Operation.LOOK_UP} == set(Operation)


@st.composite
def feature_sets(draw) -> FeatureSet:
    """Any features over a few columns, with any strategies."""
    specs = []
    for place in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(sorted(TRANSFORMS)))
        inputs = []
        for kinds in TRANSFORMS[name].kinds:
            kind = draw(st.sampled_from(kinds))
            inputs.append((draw(st.sampled_from(COLUMNS[kind])), kind))
        params = {key: draw(PARAMETERS) for key in sorted(TRANSFORMS[name].optional) if draw(st.booleans())}
        if name == "level":
            texts = draw(st.lists(st.sampled_from(["web", "fair", "fin", ""]), min_size=1, unique=True))
            params["levels"] = {text: draw(PARAMETERS) for text in texts}
        if name == "one_of":
            params["values"] = draw(
                st.lists(st.sampled_from(["web", "Fair", "city", " "]), min_size=1, unique=True)
            )
        kept = st.sampled_from(["impute", "zero", "reject", "keep"])
        gaps = {gap: draw(kept) for gap in ("missing", "invalid", "unseen")}
        gaps |= {gap: "impute" for gap in ("missing", "unseen") if gap in params}
        outside = draw(st.sampled_from(["clip", "keep", "reject", "impute"]))
        specs.append(spec(name, *inputs, name=f"f{place}", params=params, out_of_range=outside, **gaps))
    return FeatureSet(tuple(specs))


def block_of(feature_set: FeatureSet, rows: list[list[float | str | None]]) -> LeadColumns:
    """Leads as the database sends them; a row has a number or text for each column in the plan's order."""
    inputs = feature_set.plan.inputs
    cells = [[row[at] for row in rows] for at in range(len(inputs))]
    a = sum(column.kind != "text" for column in inputs)
    numbers = np.empty((a, len(rows)))
    for place, values in enumerate(cells[:a]):
        numbers[place] = [np.nan if value is None else value for value in values]
        numbers.view(np.uint64)[place, [value is None for value in values]] = NULL_NUMBER
    texts = [NULL_TEXT if text is None else encode_text(text) for texts in cells[a:] for text in texts]
    return LeadColumns(len(rows), ColumnBlocks(inputs, numbers, b"".join(text + b"\0" for text in texts)))


def leads_for(feature_set: FeatureSet, most: int = 6) -> st.SearchStrategy[list]:
    stored = st.text(st.characters(exclude_characters="\0"), max_size=4)
    texts = st.one_of(st.none(), st.sampled_from(WORDS), stored)
    row = st.tuples(*(texts if column.kind == "text" else NUMBERS for column in feature_set.plan.inputs))
    return st.lists(row, max_size=most)


def without() -> None:
    """Where no kernels are found."""


def same_matrix(left: FeatureMatrix, right: FeatureMatrix) -> bool:
    return left.values.tobytes() == right.values.tobytes() and left.states.tobytes() == right.states.tobytes()


@needs_kernels
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_features_of_any_leads_are_built_and_made_safe_to_the_same_bits(data) -> None:
    features = data.draw(feature_sets())
    trained = block_of(features, data.draw(leads_for(features)))
    statistics = build_statistics(build_features(trained, features, AS_OF, without)) if trained.n else None
    leads = block_of(features, data.draw(leads_for(features)))
    as_of = data.draw(st.one_of(MOMENTS, st.lists(MOMENTS, min_size=leads.n, max_size=leads.n).map(np.array)))
    built = build_features(leads, features, as_of)
    assert same_matrix(built, build_features(leads, features, as_of, without))
    if statistics is not None:
        k = len(features.specs)
        weights = data.draw(st.one_of(st.none(), st.lists(st.floats(0, 2), min_size=k, max_size=k)))
        same_safety(built, SafetyRules.of(features, statistics, weights))


def same_safety(built: FeatureMatrix, rules: SafetyRules) -> None:
    compiled, reference = apply_rules(built, rules), apply_rules(built, rules, without)
    assert compiled.values.tobytes() == reference.values.tobytes()
    for name in CHECKED.fields:
        np.testing.assert_array_equal(getattr(compiled, name), getattr(reference, name), err_msg=name)


@needs_kernels
def test_many_leads_with_every_transform_are_built_and_made_safe_to_the_same_bits() -> None:
    leads = plausible_leads(3000, seed=8)
    each = AS_OF + np.arange(3000.0)
    built = build_features(leads, EVERY_TRANSFORM, each)
    assert same_matrix(built, build_features(leads, EVERY_TRANSFORM, each, without))
    same_safety(built, SafetyRules.of(EVERY_TRANSFORM, build_statistics(built)))


@needs_kernels
@settings(deadline=None)
@given(st.lists(st.floats(min_value=0, max_value=1e30), min_size=1, max_size=70))
def test_a_logarithm_has_the_same_bits_alone_and_among_others(numbers: list[float]) -> None:
    features = FeatureSet((spec("log1p", ("x", "number")),))
    many = build_features(block_of(features, [[number] for number in numbers]), features, AS_OF).values
    for row, number in enumerate(numbers):
        alone = build_features(block_of(features, [[number]]), features, AS_OF, without).values
        assert alone.tobytes() == many[row].tobytes()


@pytest.mark.parametrize("find_kernels", [installed_kernels, without])
def test_a_zero_that_is_made_safe_has_no_sign(find_kernels) -> None:
    trained = matrix([[-1.0], [1.0]])
    for strategy in ("clip", "keep", "impute"):
        rules = SafetyRules.of(number_features("x", out_of_range=strategy), build_statistics(trained))
        assert not np.signbit(apply_rules(matrix([[-0.0], [0.0]]), rules, find_kernels).values).any()


@needs_kernels
def test_states_and_rows_that_do_not_fit_the_rules_never_reach_the_loops() -> None:
    features = number_features("a", "b")
    rules = SafetyRules.of(features, build_statistics(matrix([[0.0, 1.0]])))
    for values, states in (((3, 1), (3, 1)), ((3, 2), (2, 2)), ((2,), (2,))):
        with pytest.raises(ValueError, match=r"rows of 2|as many states"):
            apply_rules(FeatureMatrix(np.zeros(values), np.zeros(states, np.uint8)), rules)


def test_as_of_times_are_one_or_one_for_each_lead() -> None:
    leads = plausible_leads(3, seed=9)
    for as_of in (np.zeros(2), np.zeros((3, 1)), np.nan, np.array([0.0, 0.0, np.inf])):
        with pytest.raises(ValueError, match="as-of"):
            build_features(leads, EVERY_TRANSFORM, as_of)


def test_blocks_hold_the_columns_they_were_stacked_from() -> None:
    leads = plausible_leads(50, seed=10)
    inputs = EVERY_TRANSFORM.plan.inputs
    blocks = stack_columns(leads, inputs)
    assert list(blocks) == [column.name for column in inputs]
    assert len(blocks) == len(inputs)
    for name, kind in inputs:
        expected, found = leads.columns[name], blocks[name]
        assert found.kind == kind
        np.testing.assert_array_equal(found.values, expected.values)
        if kind != "text":  # a blank text and none are the same to a feature
            np.testing.assert_array_equal(found.present, expected.present)
    assert stack_columns(LeadColumns(50, blocks), inputs) is blocks
    with pytest.raises(KeyError):
        blocks["nothing"]
    with pytest.raises(ValueError, match="'city' is absent"):
        stack_columns(leads, (InputColumn("city", "text"),))
    other_kind = InputColumn(inputs[0].name, "boolean" if inputs[0].kind == "number" else "number")
    with pytest.raises(ValueError, match=f"'{other_kind.name}' is not a {other_kind.kind}"):
        stack_columns(leads, (other_kind,))


def test_a_text_with_a_nul_in_it_is_refused() -> None:
    leads = LeadColumns(2, {"city": column("text", "a\0b", "c")})
    with pytest.raises(ValueError, match="NUL"):
        stack_columns(leads, (InputColumn("city", "text"),))


@needs_kernels
def test_texts_that_are_not_as_many_as_the_leads_never_reach_the_loops() -> None:
    features = FeatureSet((spec("is_present", ("city", "text")),))
    for texts in (b"a\0", b"a\0b\0c\0", b"a\0\0c"):
        blocks = ColumnBlocks(features.plan.inputs, np.empty((0, 2)), texts)
        with pytest.raises(ValueError, match="as many texts"):
            build_features(LeadColumns(2, blocks), features, AS_OF)
