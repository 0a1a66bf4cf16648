"""The hostile-input proof itself: the same seed draws the same, and the judge knows right from wrong."""

import hashlib
import json

import pytest

from app.schemas.openapi import complete_document
from bench.hostile_cases import JSON, SCORE, Case, draw_cases
from bench.hostile_http import is_echoed, list_probes
from bench.hostile_oracle import (
    ACCEPTED_NEGATIVE,
    ECHO,
    REFUSED_POSITIVE,
    SERVER_ERROR,
    UNDOCUMENTED,
    Oracle,
    is_scoring_request,
)
from bench.in_memory_service import HttpAnswer, HttpRequest
from bench.prove_hostile_input import fuzz_decoder

MARK = b"mark0123456789abcdef"
DOCUMENT = {"paths": {SCORE: {"post": {"responses": {"200": {}, "422": {}, "500": {}, "503": {}}}}}}


def digest_of(seed: int) -> str:
    return hashlib.sha256(repr(list(draw_cases(seed, 300, ["lead_1"]))).encode()).hexdigest()


def test_the_same_seed_draws_the_same_cases_and_another_one_others() -> None:
    assert digest_of(1) == digest_of(1) != digest_of(2)


def test_no_two_probes_share_a_name() -> None:
    names = [probe.name for probe in list_probes()]
    assert len(names) == len(set(names)) >= 40


def test_the_decoder_and_the_reader_beside_it_agree() -> None:
    findings = fuzz_decoder(seed=3, count=1000)
    assert (findings.cases, findings.counts) == (1000, {})


@pytest.mark.parametrize("body", [b'["a"]', b'{"lead_ids": ["a", "b"]}', b' ["A:b@c.d-e_f"] '])
def test_a_scoring_request_is_known(body: bytes) -> None:
    assert is_scoring_request(body)


@pytest.mark.parametrize(
    "body",
    [b"[]", b"[NaN]", b'["a\\u0000"]',
     b'["\\ud800"]', b'{"lead_ids":["a"],"lead_ids":["b"]}', b'\xef\xbb\xbf["a"]',
     b'["a"]x',
     b"[" * 100_000, b'{"lead_ids":"a"}', json.dumps(["a"] * 2001).encode()],
)  # fmt: skip
def test_what_is_none_is_known_too(body: bytes) -> None:
    assert not is_scoring_request(body)


def answer(status: int, code: str = "INVALID_PAYLOAD_FORMAT", detail: str = "") -> HttpAnswer:
    body = {"status": status, "error_code": code, "request_id": "r", "detail": detail}
    headers = [(b"content-type", b"application/problem+json"), (b"x-request-id", b"r")]
    return HttpAnswer(status, headers, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "given", "finding"),
    [
        (b"[NaN]", answer(422), None),
        (b"[NaN]", answer(500, "INTERNAL_ERROR"), SERVER_ERROR),
        (b"[NaN]", HttpAnswer(0, [], b"", ValueError()), SERVER_ERROR),
        (b"[NaN]", answer(418), UNDOCUMENTED),
        (b"[NaN]", answer(422, "NOT_FOUND"), UNDOCUMENTED),
        (b"[NaN]", HttpAnswer(422, [], b"{}"), UNDOCUMENTED),
        (b"[NaN]", answer(422, detail=MARK.decode()), ECHO),
        (b"[NaN]", HttpAnswer(200, [], b"{}"), ACCEPTED_NEGATIVE),
        (b'["a"]', answer(422), REFUSED_POSITIVE),
        (b'["a"]', HttpAnswer(200, [], b"{}"), None),
        (b'["a"]', answer(503, "OVERLOADED"), None),
    ],
)
def test_the_judge_finds_what_is_wrong(body: bytes, given: HttpAnswer, finding: str | None) -> None:
    case = Case(HttpRequest("POST", SCORE, b"", (JSON,), body), MARK)
    assert Oracle(DOCUMENT).judge(case, given) == finding


@pytest.mark.parametrize(
    ("status", "request_id", "body", "found"),
    [
        (422, MARK + b"-1", b"{}", False),
        (422, MARK + b"!", b"{}", True),
        (422, MARK + b"-1", MARK.upper() + b" x", True),
        (200, b"r", MARK, False),
        (200, MARK + b"!", b"{}", True),
    ],
)
def test_a_valid_request_id_and_the_lead_of_an_answer_may_be_repeated_and_nothing_else(
    status: int, request_id: bytes, body: bytes, found: bool
) -> None:
    named = b"x-request-id: %b\r\n\r\n" % request_id
    sent, answered = b"POST / HTTP/1.1\r\n" + named, b"HTTP/1.1 %d x\r\n" % status + named + body
    assert is_echoed(MARK, sent, answered) == found


def test_answers_that_name_a_version_link_to_its_card() -> None:
    card = "/ai/advanced-ml/models/{version}/card"
    document = {
        "paths": {SCORE: {"post": {"responses": {"200": {}}}}, card: {"get": {"operationId": "get_card"}}}
    }
    link = complete_document(document, 7, ())["paths"][SCORE]["post"]["responses"]["200"]["links"]["card"]
    assert link["operationId"] == "get_card"
    assert link["parameters"] == {"version": "$response.body#/model_version"}
