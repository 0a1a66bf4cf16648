"""Reasons in words: classes of values a salesperson understands, and never the lead's own text."""

import pytest

from app.ai.domain import Column
from app.ai.feature_safety import build_statistics
from app.ai.feature_transforms import TRANSFORMS
from app.ai.features import FeatureSet, FeatureSpec, build_features
from app.ai.reasons import _WORDS, MAX_REASONS, GroupWords, put_into_words, write_reasons
from tests.builders import AS_OF, DAY, INF, NAN, column, leads, spec

HUNDRED = column("number", *range(1, 101))


def say(
    *specs: FeatureSpec, training: dict[str, Column] | None = None, **columns: Column
) -> list[GroupWords]:
    """The words for leads with these columns; statistics are of `training`, or of the leads themselves."""
    features = FeatureSet(specs)
    stored = leads(**columns)
    statistics = build_statistics(build_features(leads(**(training or columns)), features, AS_OF))
    return put_into_words(stored, build_features(stored, features, AS_OF), features, statistics)


def say_one(transform: str, *columns: Column, **changes: object) -> list[str]:
    names = [f"c{position}" for position in range(len(columns))]
    feature = spec(transform, *((n, c.kind) for n, c in zip(names, columns, strict=True)), **changes)
    training = (
        dict(zip(names, [HUNDRED] * len(columns), strict=True)) if columns[0].kind == "number" else None
    )
    (group,) = say(feature, training=training, **dict(zip(names, columns, strict=True)))
    return group.classes


def test_every_transform_has_its_words() -> None:
    assert {*_WORDS, "level", "one_of"} == set(TRANSFORMS)


def days_ago(*days: float | None) -> Column:
    return column("timestamp", *(None if d is None else AS_OF - d * DAY for d in days))


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (0, "today"), (-0.4, "today"), (-3, "today"), (1e-6, "1 day ago"), (0.9, "1 day ago"),
        (1, "1 day ago"), (1.1, "2 days ago"), (41, "41 days ago"), (41.7, "42 days ago"),
        (59, "59 days ago"), (59.1, "2 months ago"), (400, "13 months ago"), (731, "2 years ago"),
        (43_461, "119 years ago"), (None, "unknown"), (INF, "not usable"),
    ],
)  # fmt: skip
def test_a_time_that_lies_back_is_told_in_days_then_in_months_and_years(
    days: float | None, said: str
) -> None:
    """The as-of time is the midnight that today begins with: an hour before it was yesterday."""
    assert say_one("age_days", days_ago(days)) == [said]


def test_a_midnight_is_as_many_days_ago_as_lie_between() -> None:
    days = range(1, 60)
    assert say_one("age_days", days_ago(*days))[1:] == [f"{count} days ago" for count in days[1:]]


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (-30, "in 30 days"), (-1.9, "in 1 day"), (-1, "in 1 day"), (-0.9, "today"), (0, "today"),
        (0.5, "1 day ago"), (4.2, "5 days ago"), (5, "5 days ago"), (-100, "in 3 months"),
    ],
)  # fmt: skip
def test_a_time_to_come_is_told_as_one(days: float, said: str) -> None:
    assert say_one("days_until", days_ago(days)) == [said]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (50, "50"), (0, "0, less than most"), (20, "20, less than most"), (85, "85, more than most"),
        (12_500, "12,500, more than most"), (447_700_900_461, "about 448,000,000,000, more than most"),
        (3.14159 * 10, "about 31.4"), (NAN, "not usable"), (None, "unknown"), (-7.5, "-7.5, less than most"),
    ],
)  # fmt: skip
def test_a_number_keeps_three_digits_and_is_compared_with_the_training_rows(
    value: float | None, said: str
) -> None:
    assert say_one("value", column("number", value)) == [said]
    if value is not None and value >= 0:
        assert say_one("log1p", column("number", value)) == [said]


def test_ratios_and_spans_are_numbers_too() -> None:
    half = say_one("ratio", column("number", 1), column("number", 2))
    assert half == ["0.5, less than most"]
    assert say_one("days_between", days_ago(40, 10), days_ago(10, 40)) == ["30 days", "-30 days"]


def test_yes_no_and_unknown() -> None:
    assert say_one("flag", column("boolean", True, False, None)) == ["yes", "no", "unknown"]
    assert say_one("is_present", column("text", "something", None)) == ["yes", "no"]


LEVELS = {"levels": {"web": 0.25, "open day": 0.25}}
TEXTS = column("text", " WEB ", "open day", "Zoë Quillfeather", None, "  ")
NAMED = ["web", "open day", "another one", "unknown", "unknown"]


@pytest.mark.parametrize(
    ("transform", "params"),
    [
        ("level", LEVELS),
        ("level", {**LEVELS, "unseen": 0.5, "missing": -1}),
        ("one_of", {"values": ["open day", "web"]}),
    ],
)
def test_a_text_is_named_if_the_manifest_names_it_and_never_else(
    transform: str, params: dict[str, object]
) -> None:
    assert say_one(transform, TEXTS, params=params) == NAMED


def test_features_of_one_column_are_one_line_about_that_column() -> None:
    source = ("lead_source", "text")
    other = {"levels": {"web": 0.0, "open day": 0.0}, "unseen": 1.0, "missing": 0.0}
    groups = say(
        spec("level", source, name="lead_source", params=other, description="is none of the usual ones"),
        spec("one_of", source, name="lead_source=web", params={"values": ["web"]}),
        spec("one_of", source, name="lead_source=open day", params={"values": ["open day"]}),
        spec("is_present", ("gpa", "number"), name="gpa__present"),
        spec("value", ("gpa", "number"), name="gpa"),
        spec("is_present", ("notes", "text"), name="notes__present", description="whether notes is known"),
        lead_source=TEXTS,
        gpa=column("number", 1, 2, 3, 4, None),
        notes=column("text", "private", None, None, None, None),
    )
    assert [group.about for group in groups] == ["lead source", "gpa", "whether notes is known"]
    assert groups[0].classes == NAMED
    assert groups[1].classes[1:] == ["2", "3", "4, more than most", "unknown"]
    assert groups[2].classes == ["yes", "no", "no", "no", "no"]


def test_the_largest_contributions_are_told_first_and_less_than_half_a_point_is_none() -> None:
    groups = [
        GroupWords("last contact", ["41 days ago"], is_time=True),
        GroupWords("country", ["another one"], is_time=False),
        GroupWords("e-mails opened", ["7"], is_time=False),
        GroupWords("grade", ["3.4"], is_time=False),
    ]
    told = [
        "e-mails opened (7): +12 points",
        "last contact 41 days ago: -6 points",
        "grade (3.4): -1 point",
    ]
    added = [-0.0612, 0.0049, 0.12, -0.0099]
    assert write_reasons(groups, 0, added, 0.0549) == told
    assert write_reasons(groups, 0, added, -0.1049) == [*told, "everything else: -15 points"]
    assert write_reasons(groups, 0, [0.0, 0.001, -0.0049, 0.0], -0.0049) == []
    assert write_reasons(groups, 0, [0.0, 0.001, -0.0049, 0.0], 0.01) == ["everything else: +1 point"]
    assert len(write_reasons(groups * 3, 0, [0.1] * 12, 0.5)) == MAX_REASONS
