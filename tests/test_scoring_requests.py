"""Strict decoding: what a scoring request may be, and that a refusal never repeats what it refuses."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.ai.domain import LEAD_ID_PATTERN, Extra
from app.ai.scoring_requests import check_media_type, decode_lead_ids, read_include
from app.errors import (
    BatchSizeExceededError,
    CallerError,
    EmptyBatchError,
    InvalidLeadIdError,
    InvalidParameterError,
    InvalidPayloadError,
    UnsupportedMediaTypeError,
)

LIMIT = 2000
UUID = "6F1C0C1E-5f0b-4a57-9a1c-0c6a3f0e9b11"


@pytest.mark.parametrize(
    "lead_id", ["lead_1", "a", "7", "A" * 64, UUID, "someone@example.org", "x:y.z-1_2", "0.5"]
)
def test_both_shapes_give_the_same_ids_exactly_as_sent(lead_id: str) -> None:
    assert decode_lead_ids(json.dumps([lead_id, lead_id]).encode(), LIMIT) == [lead_id, lead_id]
    assert decode_lead_ids(json.dumps({"lead_ids": [lead_id]}).encode(), LIMIT) == [lead_id]


def test_escapes_and_white_space_do_not_matter() -> None:
    assert decode_lead_ids(b' \n{"lead\\u005fids" : [ "lead\\u005f1" ] }\r\n', LIMIT) == ["lead_1"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"[", b'["a"', b'["a",]', b'["a"] x', b'["a"]["b"]', b"nothing", b"NaN", b"Infinity",
        b"[NaN]", b"[1e999]", b"1" * 10_000, b"[" + b"1" * 10_000 + b"]", b'["\\ud800"]',
        b'["\\ud800\\u0041"]',
        b'["\xff"]', b'["a\x00"]', b'\xef\xbb\xbf["a"]', '["a"]'.encode("utf-16"), '["a"]'.encode("utf-32"),
        b"[" * 100_000, b"[" * 900 + b"]" * 900 + b"x", b'{"lead_ids":' * 100_000, b"{'lead_ids': ['a']}",
        b'["a"] // comment', b'"a"', b"1", b"-0", b"true", b"null", b"{}", b'{"lead_ids": null}',
        b'{"lead_ids": "a"}', b'{"lead_ids": {"0": "a"}}', b'{"ids": ["a"]}', b'{"LEAD_IDS": ["a"]}',
        b'{"lead_ids": ["a"], "include": "reasons"}', b'{"lead_ids": ["a"], "lead_ids": ["b"]}',
        b'{"lead_ids": ["a"], "lead\\u005fids": ["a"]}', b'{"lead_ids": ' + b"[" * 900 + b"]" * 900
        + b', "lead_ids": ["a"]}', b'{"lead_ids": ' + b"9" * 5000 + b', "lead_ids": ["a"]}',
    ],
)  # fmt: skip
def test_what_is_not_one_of_the_two_shapes_in_json_is_an_invalid_payload(body: bytes) -> None:
    with pytest.raises(InvalidPayloadError) as caught:
        decode_lead_ids(body, LIMIT)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_byte_order_mark_is_named() -> None:
    with pytest.raises(InvalidPayloadError, match="byte order mark"):
        decode_lead_ids(b'\xef\xbb\xbf["a"]', LIMIT)
    with pytest.raises(InvalidPayloadError, match="not JSON"):
        decode_lead_ids(b'[\xef\xbb\xbf"a"]', LIMIT)


def test_hostile_bodies_are_refused_quickly() -> None:
    keys = b"{" + b",".join(b'"k%d":0' % number for number in range(20_000)) + b"}"
    began = time.process_time()
    for body in (keys, b"[" * 200_000, b'{"a":' * 40_000):
        with pytest.raises(InvalidPayloadError):
            decode_lead_ids(body, LIMIT)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("body", [b"[]", b'{"lead_ids": []}'])
def test_no_lead_id_at_all_is_an_empty_batch(body: bytes) -> None:
    with pytest.raises(EmptyBatchError):
        decode_lead_ids(body, LIMIT)


def test_the_limit_itself_is_allowed_and_one_more_is_refused_before_any_id_is_looked_at() -> None:
    assert len(decode_lead_ids(json.dumps(["a"] * 2000).encode(), 2000)) == 2000
    with pytest.raises(BatchSizeExceededError, match="2000"):
        decode_lead_ids(json.dumps([None] * 2001).encode(), 2000)


@pytest.mark.parametrize(
    "value",
    [
        "", " ", " a", "a ", "a" * 65, "a" * 100_000, "_a", "-a", ".a", "@a", ":a", "a/b", "a b", "a\n",
        "a\x00", "'; DROP TABLE people; --", "ä", "a\u202eb", "a\u2028b", "\U0001f600", "e\u0301", "٣", 7,
        7.5, True, False, None, [], ["a"], {}, {"lead_id": "a"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_bad_id_is_named_by_position_and_never_repeated(value: object, wrapped: bool) -> None:
    ids = ["lead_1", value, "lead_2"]
    body = json.dumps({"lead_ids": ids} if wrapped else ids).encode()
    with pytest.raises(InvalidLeadIdError) as caught:
        decode_lead_ids(body, LIMIT)
    (position,) = caught.value.positions
    assert position.pointer == ("/lead_ids/1" if wrapped else "/1")
    assert position.code == "INVALID_LEAD_ID"
    assert len(position.detail) < 100


@pytest.mark.parametrize(
    "lead_ids", [["a\nb"], ["a", "b\nc", "d"], ["a\n", "b"], ["a", "\nb"], ["a\n"], ["\n"]]
)
def test_a_line_break_does_not_pass_for_two_lead_ids(lead_ids: list[str]) -> None:
    with pytest.raises(InvalidLeadIdError):
        decode_lead_ids(json.dumps(lead_ids).encode(), LIMIT)


def test_at_most_twenty_positions_are_named_and_they_are_the_first() -> None:
    body = json.dumps(["fine"] + [""] * 1999).encode()
    with pytest.raises(InvalidLeadIdError) as caught:
        decode_lead_ids(body, LIMIT)
    assert [position.pointer for position in caught.value.positions] == [
        f"/{index}" for index in range(1, 21)
    ]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("lead_ids"), inner),
    max_leaves=20,
)


@given(st.binary() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_body_gives_lead_ids_or_an_error_of_ours(body: bytes) -> None:
    try:
        lead_ids = decode_lead_ids(body, 5)
    except CallerError:
        return
    assert 1 <= len(lead_ids) <= 5


@given(st.lists(st.from_regex(LEAD_ID_PATTERN, fullmatch=True), min_size=1, max_size=50))
def test_every_list_of_valid_ids_comes_back_unchanged(lead_ids: list[str]) -> None:
    assert decode_lead_ids(json.dumps(lead_ids).encode(), 50) == lead_ids


@pytest.mark.parametrize(
    "value",
    [
        "application/json", "Application/JSON", "application/json; charset=utf-8",
        "application/json;charset=UTF-8", 'application/json; charset="utf-8"',
    ],
)  # fmt: skip
def test_json_in_utf_8_is_accepted(value: str) -> None:
    check_media_type([(b"content-type", value.encode()), (b"content-encoding", b"identity")])


@pytest.mark.parametrize(
    "headers",
    [
        [], [("content-type", "")], [("content-type", "text/plain")], [("content-type", "application/jsonx")],
        [("content-type", "application/problem+json")], [("content-type", "multipart/form-data; boundary=x")],
        [("content-type", "application/json; charset=utf-16")], [("content-type", "application/json; x=y")],
        [("content-type", "application/json")] * 2, [("content-type", "application/json, text/plain")],
        [("content-type", "application/json"), ("content-encoding", "gzip")],
        [("content-type", "application/json"), ("content-encoding", "br, gzip")],
    ],
)  # fmt: skip
def test_anything_else_than_plain_json_is_an_unsupported_media_type(headers: list[tuple[str, str]]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    with pytest.raises(UnsupportedMediaTypeError):
        check_media_type(raw)


OFFERED: frozenset[Extra] = frozenset({"interval", "reasons"})


@pytest.mark.parametrize(
    ("query", "include"),
    [
        ("", set()),
        ("include=", set()),
        ("include=interval", {"interval"}),
        ("include=interval,interval", {"interval"}),
        ("include=reasons,interval", {"interval", "reasons"}),
        ("include=reasons&include=interval", {"interval", "reasons"}),
        ("include=&include=interval", {"interval"}),
    ],
)
def test_what_is_offered_may_be_included(query: str, include: set[str]) -> None:
    assert read_include(query.encode(), OFFERED) == include


@pytest.mark.parametrize(
    "query",
    [
        *("include=nonsense", "include=&include=nonsense", "include=interval,nonsense", "include=%20"),
        *("include=interval,", "include=Interval", "include= interval", "x=", "Include="),
    ],
)
def test_any_other_query_is_an_invalid_parameter_whose_text_is_ours(query: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        read_include(query.encode(), OFFERED)
    allowed = ", ".join(OFFERED)
    assert str(caught.value) == (
        f"The one query parameter is include; it may name {allowed}, separated by commas without spaces."
    )


def test_a_route_that_offers_nothing_lets_nothing_be_included() -> None:
    assert read_include(b"include=", frozenset()) == set()
    for query in (b"include=interval", b"nonsense="):
        with pytest.raises(InvalidParameterError, match=r"^This path takes no query parameter\.$"):
            read_include(query, frozenset())
