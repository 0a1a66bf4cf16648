"""Bytes on a socket that are not quite HTTP, and what the running service makes of them.

The probes are the ways two HTTP parsers are known to read one request differently, and the bodies that are
known to have cost a service its composure; the rest are sound requests with bytes changed. Each probe has the
status that is right for it. For `prove_hostile_input`.
"""

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import NamedTuple

from bench.hostile_cases import LEGACY, SCORE, mutate
from bench.hostile_oracle import (
    ACCEPTED_NEGATIVE,
    ECHO,
    REFUSED_POSITIVE,
    SERVER_ERROR,
    UNDOCUMENTED,
    Findings,
)

Address = tuple[str, int]

QUIET_SECONDS, LONGEST_SECONDS = 0.3, 20.0
CONNECTIONS = 16

DOCUMENTED = {200, 400, 404, 405, 413, 415, 422, 503}
_BODY = b'["lead_1"]'
_KIND = b"Content-Type: application/json"
_LENGTH = b"Content-Length: %d" % len(_BODY)
_STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)
_VALID_REQUEST_ID = re.compile(
    rb"^x-request-id:[ \t]*([a-z0-9._-]{1,64})[ \t]*\r$", re.MULTILINE | re.IGNORECASE
)


class Probe(NamedTuple):
    """What is sent, and the status it is to be answered with."""

    name: str
    sent: bytes
    status: int


def _post(
    *headers: bytes, body: bytes = _BODY, host: tuple[bytes, ...] = (b"Host: x",), path: str = SCORE
) -> bytes:
    line = f"POST {path} HTTP/1.1".encode()
    return b"\r\n".join([line, *host, _KIND, *headers, b"Connection: close", b"", body])


def _sized(body: bytes) -> bytes:
    return _post(b"Content-Length: %d" % len(body), body=body)


def list_probes() -> list[Probe]:
    """Returns the probes: differences between parsers, then lengths and encodings that lie."""
    field, megabyte = b"a: b", b"a" * 1_000_000
    last = b"a\r\n" + _BODY + b"\r\n0"
    return [
        Probe("sound", _post(_LENGTH), 200),
        Probe("length and chunks", _post(_LENGTH, b"Transfer-Encoding: chunked"), 400),
        Probe("two lengths", _post(_LENGTH, b"Content-Length: 3"), 400),
        Probe("length with a sign", _post(b"Content-Length: +10"), 400),
        Probe("length beyond numbers", _post(b"Content-Length: " + b"9" * 30), 400),
        Probe("negative length", _post(b"Content-Length: -1"), 400),
        Probe("line feeds alone", _post(_LENGTH).replace(b"\r\n", b"\n"), 400),
        Probe("no host", _post(_LENGTH, host=()), 400),
        Probe("two hosts", _post(_LENGTH, host=(b"Host: x", b"Host: y")), 400),
        Probe("folded header", _post(_LENGTH, b"folded: a\r\n b"), 400),
        Probe("line feed in a value", _post(_LENGTH, b"a: b\nc: d"), 400),
        Probe("carriage return in a value", _post(_LENGTH, b"a: b\rc: d"), 400),
        Probe("NUL in a value", _post(_LENGTH, b"a: b\x00c"), 400),
        Probe("space before the colon", _post(_LENGTH, b"a : b"), 400),
        Probe("no colon", _post(_LENGTH, b"nothing"), 400),
        Probe("chunk extension with a line feed", _chunked(b"a;\nb\r\n" + _BODY + b"\r\n0\r\n\r\n"), 400),
        Probe("chunk size that is none", _chunked(b"zz\r\n" + _BODY + b"\r\n0\r\n\r\n"), 400),
        Probe("chunk longer than it says", _chunked(b"2\r\n" + _BODY + b"\r\n0\r\n\r\n"), 400),
        Probe("chunks, sound", _chunked(b"a\r\n" + _BODY + b"\r\n0\r\n\r\n"), 200),
        Probe("another coding", _chunked(b"a\r\n" + _BODY + b"\r\n0\r\n\r\n", b"gzip, chunked"), 400),
        # RFC 9110 7.8: a server may ignore it, and the body is one all the same.
        Probe("an offer of another protocol", _post(_LENGTH, b"Connection: Upgrade", b"Upgrade: h2c"), 200),
        Probe("no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", 400),
        Probe("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        Probe("version nobody speaks", _post(_LENGTH).replace(b"HTTP/1.1", b"HTTP/9.9"), 400),
        Probe("100 headers", _post(_LENGTH, *[field] * 100), 200),
        Probe("1 MB in a header", _post(_LENGTH, b"a: " + megabyte), 400),
        Probe("1 MB in the name of a header", _post(_LENGTH, megabyte + b": a"), 400),
        Probe("1 MB in headers", _post(_LENGTH, *[field] * 170_000), 400),
        Probe("2,000 headers", _post(_LENGTH, *[field] * 2000), 400),
        Probe("1 MB in the target", _post(_LENGTH, path=f"{SCORE}?{megabyte.decode()}"), 400),
        Probe("1 MB in line ends", b"\r\n" * 500_000 + _post(_LENGTH), 400),
        Probe("trailer, sound", _chunked(last + b"\r\na: b\r\n\r\n"), 200),
        Probe("1 MB in a trailer", _chunked(last + b"\r\na: " + megabyte + b"\r\n\r\n"), 400),
        Probe("1 MB in trailers", _chunked(last + (b"\r\n" + field) * 170_000 + b"\r\n\r\n"), 400),
        Probe("1 MB in a chunk extension", _chunked(last + b";" + megabyte + b"\r\n\r\n"), 400),
        Probe("100 MB", _post(b"Content-Length: 100000000", b"Expect: 100-continue", body=b""), 413),
        Probe("300 kB in chunks", _chunked(b"%x\r\n" % 300_000 + b"1" * 300_000 + b"\r\n0\r\n\r\n"), 413),
        Probe("300 kB", _sized(b" " * 300_000), 413),
        Probe("10,000 digits", _sized(b"[" + b"1" * 10_000 + b"]"), 422),
        Probe("100,000 deep", _sized(b"[" * 100_000), 422),
        Probe("20,000 keys", _sized(b"{" + b",".join(b'"k%d":0' % n for n in range(20_000)) + b"}"), 422),
        Probe("NaN", _sized(b"[NaN]"), 422),
        Probe("lone surrogate", _sized(b'["\\ud800"]'), 422),
        Probe("UTF-16", _sized('["lead_1"]'.encode("utf-16")), 422),
        Probe("byte order mark", _sized(b'\xef\xbb\xbf["lead_1"]'), 422),
        Probe("a key twice", _sized(b'{"lead_ids":["lead_1"],"lead_ids":["lead_2"]}'), 422),
        Probe("no lead", _sized(b"[]"), 422),
        Probe("2,000 leads", _sized(json.dumps(["a"] * 2000).encode()), 200),
        Probe("2,001 leads", _sized(json.dumps(["a"] * 2001).encode()), 413),
        Probe("gzip", _post(_LENGTH, b"Content-Encoding: gzip"), 415),
        Probe("CONNECT", b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
        # RFC 9112 3.2.2: a server takes it, and what is asked is the path.
        Probe("absolute target", _post(_LENGTH, path="http://evil.example" + SCORE), 200),
        Probe("two slashes", _post(_LENGTH, path="//evil.example" + SCORE), 404),
        Probe("encoded dots", _post(_LENGTH, path="/ai/%2e%2e" + SCORE), 404),
    ]  # fmt: skip


def _chunked(body: bytes, coding: bytes = b"chunked") -> bytes:
    return _post(b"Transfer-Encoding: " + coding, body=body)


def probe_socket(address: Address) -> Findings:
    """Sends each probe on a connection of its own."""
    findings = Findings()
    for probe in list_probes():
        answer = exchange(address, probe.sent)
        status = _first_status(answer)
        kind = _judge(answer)
        if kind is None and status != probe.status:
            kind = (
                REFUSED_POSITIVE
                if probe.status == 200
                else ACCEPTED_NEGATIVE
                if status == 200
                else UNDOCUMENTED
            )
        findings.note(kind, (probe.name, answer[:300]))
    return findings


def fuzz_socket(address: Address, seed: int, count: int) -> Findings:
    """Sends sound requests with bytes changed."""
    findings = Findings()
    drawn = list(_draw_bytes(Random(seed), count))  # noqa: S311
    with ThreadPoolExecutor(CONNECTIONS) as executor:
        answers = executor.map(lambda case: exchange(address, case[0]), drawn)
        for (sent, mark), answer in zip(drawn, answers, strict=True):
            # Without a whole request there is nothing to answer.
            kind = None if not answer else ECHO if is_echoed(mark, sent, answer) else _judge(answer)
            findings.note(kind, (sent, answer[:300]))
    return findings


def _draw_bytes(random: Random, count: int) -> Iterator[tuple[bytes, bytes]]:
    for _ in range(count):
        mark = b"mark%016x" % random.getrandbits(64)
        path = random.choice((SCORE, LEGACY, f"{SCORE}?include=interval", f"/{mark.decode()}"))
        body = json.dumps([f"{mark.decode()} x", "lead_1"]).encode()
        headers = (b"Content-Length: %d" % len(body), b"x-request-id: " + mark + b"!", b"cookie: " + mark)
        yield mutate(random, _post(*headers, body=body, path=path)), mark


def is_echoed(mark: bytes, sent: bytes, answer: bytes) -> bool:
    """Whether an answer repeats the mark of what was sent, where it may not.

    A changed byte may make a lead ID of it, which a 200 names, or a request ID, which every answer carries.
    """
    told = answer.partition(b"\r\n\r\n")[0] if _first_status(answer) == 200 else answer
    for request_id in _VALID_REQUEST_ID.findall(sent):
        told = told.replace(request_id, b"")
    return mark in told.lower()


def exchange(address: Address, sent: bytes) -> bytes:
    """Sends the bytes and returns everything that comes back; whoever stays quiet is told that it was all."""
    received = bytearray()
    with socket.create_connection(address, timeout=QUIET_SECONDS) as connection, suppress(ConnectionError):
        with suppress(ConnectionError):  # refused before all of it was sent: the answer says why
            connection.sendall(sent)
        with suppress(TimeoutError):
            _receive(connection, received)
            return bytes(received)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(LONGEST_SECONDS)
        _receive(connection, received)
    return bytes(received)


def _receive(connection: socket.socket, received: bytearray) -> None:
    while piece := connection.recv(65536):
        received += piece


def _judge(answer: bytes) -> str | None:
    statuses = [int(status) for status in _STATUS.findall(answer)]
    if any(status in (500, 502) for status in statuses) or not statuses:
        return SERVER_ERROR
    refused = [status for status in statuses if status >= 400]
    shaped = answer.count(b"application/problem+json")
    return None if DOCUMENTED.issuperset({*statuses} - {100}) and shaped >= len(refused) else UNDOCUMENTED


def _first_status(answer: bytes) -> int:
    statuses = [int(status) for status in _STATUS.findall(answer) if status != b"100"]
    return statuses[0] if statuses else 0
