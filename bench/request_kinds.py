"""Requests of every kind a service gets, each with its share: good, wrong, cut short, beside the point.

Names nobody has heard of (leads, paths, request IDs, headers) are new in every request: what is kept by name
grows with them. A service that answers one of the kinds with another status than its own has failed it. For
`prove_memory`.
"""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from bench.hostile_cases import LEGACY, SCORE
from bench.load import build_request

HOT_LEADS = 500
_HALF = 2  # of a request's bytes are sent by who leaves half-way


class Kind(NamedTuple):
    """How often it comes, how it is drawn, the status that answers it; None: the answer is not waited for."""

    name: str
    share: float
    draw: Callable[[Random], bytes]
    status: int | None


def list_kinds(lead_ids: Sequence[str]) -> list[Kind]:
    """Returns the kinds of requests for these leads; the first `HOT_LEADS` of them are asked for most."""
    hot = lead_ids[:HOT_LEADS]
    return [
        Kind("1 lead, asked before", 40, _score(hot, 1), 200),
        Kind("1 lead", 25, _score(lead_ids, 1), 200),
        Kind("50 leads, asked before", 3, _score(hot, 50), 200),
        Kind("50 leads", 2, _score(lead_ids, 50), 200),
        Kind("500 leads", 0.5, _score(lead_ids, 500), 200),
        Kind("2,000 leads", 0.2, _score(lead_ids, 2000), 200),
        Kind("all included", 1, _score(lead_ids, 3, SCORE + "?include=interval,reasons,features"), 200),
        Kind("legacy router", 5, _score(lead_ids, 1, LEGACY), 200),
        Kind("unknown leads", 4, lambda random: _post([_name(random), _name(random)]), 200),
        Kind("2,001 leads", 0.2, lambda random: _post([_name(random)] * 2001), 413),
        Kind("no JSON", 3, lambda random: build_request(b'["' + _name(random).encode()), 422),
        Kind("a field nobody knows", 2, lambda random: _post({"lead_ids": ["a"], _name(random): 1}), 422),
        Kind("a lead ID that is none", 2, lambda random: _post([_name(random) + " "]), 422),
        Kind("no lead", 1, lambda _: _post([]), 422),
        Kind("gzip", 1, lambda random: _bare("POST", SCORE, "Content-Encoding: gzip", random), 415),
        Kind("a length that is too large", 1, _too_large, 413),
        Kind("wrong method", 2, lambda random: _bare("PUT", SCORE, "Content-Length: 0", random), 405),
        Kind("no such path", 2, lambda random: _bare("GET", f"/{_name(random)}", "Accept: */*", random), 404),
        Kind("no HTTP", 1, lambda random: _name(random).encode() + b"\r\n\r\n", 400),
        *(Kind(path, 0.5, _read(path), 200) for path in
          ("/livez", "/readyz", "/ai/advanced-ml/health", "/ai/advanced-ml/models", "/metrics", "/docs")),
        Kind("gone half-way", 1, lambda random: _halve(_score(lead_ids, 50)(random)), None),
        Kind("gone before the answer", 1, _score(lead_ids, 500), None),
    ]  # fmt: skip


def _score(lead_ids: Sequence[str], leads: int, path: str = SCORE) -> Callable[[Random], bytes]:
    return lambda random: _post(random.sample(lead_ids, leads), path)


def _read(path: str) -> Callable[[Random], bytes]:
    return lambda random: _bare("GET", path, "Accept: */*", random)


def _post(content: object, path: str = SCORE) -> bytes:
    return build_request(json.dumps(content).encode(), path)


def _bare(method: str, path: str, header: str, random: Random) -> bytes:
    """Returns a request without a body, with a request ID and a header of its own."""
    head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n{header}\r\n"
    return f"{head}X-Request-Id: {_name(random)}\r\n{_name(random)}: 1\r\n\r\n".encode()


def _too_large(random: Random) -> bytes:
    return _bare("POST", SCORE, "Content-Length: 100000000\r\nConnection: close", random)


def _halve(request: bytes) -> bytes:
    return request[: len(request) // _HALF]


def _name(random: Random) -> str:
    return f"name-{random.getrandbits(64):016x}"
