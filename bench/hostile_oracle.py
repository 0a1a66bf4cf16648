"""What is wrong with an answer to a hostile request, judged without any of the code that gave it.

The OpenAPI document says which statuses an operation may answer with, the standard library's JSON reader made
strict says whether a body is a scoring request, and a mark that comes back tells of an echo. For
`prove_hostile_input`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from app.errors import LeadScoringError
from bench.hostile_cases import LEGACY, SCORE, Case
from bench.in_memory_service import HttpAnswer

SERVER_ERROR = "server errors"
UNDOCUMENTED = "undocumented codes"
ACCEPTED_NEGATIVE = "accepted negatives"
REFUSED_POSITIVE = "refused positives"
ECHO = "echoed values"
FINDINGS = (SERVER_ERROR, UNDOCUMENTED, ACCEPTED_NEGATIVE, REFUSED_POSITIVE, ECHO)

MOST_LEADS = 2000
LONGEST_PROBLEM = 4096

_ID_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}\Z", re.ASCII)


class Findings:
    """Counts cases and what was wrong with them; keeps the first of each kind for whoever mends it."""

    def __init__(self) -> None:
        self.cases = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def note(self, kind: str | None, example: object) -> None:
        """Counts a case, and a finding unless `kind` is None."""
        self.cases += 1
        if kind is not None:
            self.counts[kind] += 1
            self.examples.setdefault(kind, repr(example)[:600])

    def add(self, other: "Findings") -> None:
        """Takes over what another part found."""
        self.cases += other.cases
        self.counts += other.counts
        self.examples = {**other.examples, **self.examples}


class Oracle:
    """Judges answers by an OpenAPI document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._operations = {
            (method.upper(), re.compile(re.sub(r"\{[^}]*\}", "[^/]+", path) + r"\Z")): set(spec["responses"])
            for path, operations in document["paths"].items()
            for method, spec in operations.items()
        }
        self._statuses = dict(_list_errors(LeadScoringError))

    def judge(self, case: Case, answer: HttpAnswer) -> str | None:
        """Returns what is wrong, the worst first; None if the answer is as it should be."""
        if answer.failure is not None or answer.status == 0 or answer.status in range(500, 503):
            return SERVER_ERROR
        if not self._is_documented(case, answer):
            return UNDOCUMENTED
        if self._is_echoed(case, answer):
            return ECHO
        return _judge_verdict(case, answer)

    def _is_documented(self, case: Case, answer: HttpAnswer) -> bool:
        method, path = case.request.method, case.request.path
        wanted = "GET" if method == "HEAD" else method
        matching = [
            statuses
            for (name, rule), statuses in self._operations.items()
            if name == wanted and rule.match(path)
        ]
        # A preflight is answered before any route is looked for, and so is what HTTP itself forbids.
        allowed = set().union(*matching) | {"400"} if matching else {"400", "404", "405"}
        if method == "OPTIONS":
            allowed |= {"200"}
        undocumented_page = not matching and path in ("/docs", "/openapi.json") and wanted == "GET"
        if str(answer.status) not in allowed and not undocumented_page:
            return False
        return answer.status < 400 or method == "HEAD" or self._is_problem(answer)

    def _is_problem(self, answer: HttpAnswer) -> bool:
        if answer.header(b"content-type") != "application/problem+json" or len(answer.body) > LONGEST_PROBLEM:
            # Health tells what is wrong in its own shape.
            return answer.status == 503 and b'"status":"unhealthy"' in answer.body
        problem = answer.json()
        named = answer.header(b"x-request-id") == problem["request_id"] and problem["status"] == answer.status
        return named and self._statuses.get(problem["error_code"]) == answer.status

    def _is_echoed(self, case: Case, answer: HttpAnswer) -> bool:
        heads = b"\n".join(name + b": " + value for name, value in answer.headers)
        # An answer says which lead it is about in the caller's words.
        told = b"" if answer.status == 200 else answer.body
        return case.mark in (heads + told).lower()


def is_scoring_request(body: bytes) -> bool:
    """Whether the body is one of the two shapes, by RFC 8259 and the rule for lead IDs."""
    try:
        content = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse,
            parse_float=_parse_finite,
            object_pairs_hook=refuse_key_twice,
        )
    except (ValueError, RecursionError):
        return False
    ids = content["lead_ids"] if isinstance(content, dict) and content.keys() == {"lead_ids"} else content
    if not isinstance(ids, list) or not 1 <= len(ids) <= MOST_LEADS:
        return False
    return all(isinstance(value, str) and _ID_RULE.match(value) for value in ids)


def _judge_verdict(case: Case, answer: HttpAnswer) -> str | None:
    request = case.request
    plain = request.headers == ((b"content-type", b"application/json"),) and not request.query
    if request.method != "POST" or request.path not in (SCORE, LEGACY) or not plain:
        return None
    right = is_scoring_request(request.body)
    if answer.status == 200 and not right:
        return ACCEPTED_NEGATIVE
    return REFUSED_POSITIVE if right and answer.status in range(400, 500) else None


def _refuse(_text: str) -> None:
    raise ValueError


def _parse_finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def refuse_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raises `ValueError` for an object with the same key twice; an `object_pairs_hook`."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError
    return dict(pairs)


def _list_errors(root: type[LeadScoringError]) -> list[tuple[str, int]]:
    found = [(root.code, root.status)]
    for kind in root.__subclasses__():
        found += _list_errors(kind)
    return found
