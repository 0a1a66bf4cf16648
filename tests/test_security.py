"""Credentials, keys, tokens and rates, each by itself: no server, no database, a clock that a test turns."""

import asyncio
import base64
import contextlib
import hmac
import itertools
import json
import time
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.errors import (
    DatabaseUnavailableError,
    KeysUnavailableError,
    NotAuthenticatedError,
    RateLimitedError,
)
from app.security.access import MAX_CREDENTIAL_BYTES, Authenticator, Client, read_credential
from app.security.api_keys import ApiKey, ApiKeyTable, digest_key, generate_key
from app.security.key_set import (
    MIN_PAUSE_SECONDS,
    KeySet,
    KeySetEndpoint,
    build_keys,
)
from app.security.rate_limit import MAX_CLIENTS, RateLimiter
from app.security.tokens import MAX_REMEMBERED, JwtVerifier
from tests.fakes import FakeClock, FakeKeySource
from tests.issuer import AUDIENCE, ISSUER, Issuer, encode, published

PEPPER = b"a pepper of thirty-two characters"
SCORER = Client("crm", frozenset({"score"}))


def make_key(client: Client = SCORER) -> tuple[str, ApiKey]:
    key = generate_key()
    return key, ApiKey(key.partition(".")[0], client, digest_key(PEPPER, key))


def b64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def build_verifier(issuer: Issuer, **parts: Any) -> JwtVerifier:
    key_set = KeySet(issuer.fetch, issuer.algorithm, clock=parts.pop("clock", FakeClock()))
    return JwtVerifier(key_set, issuer=ISSUER, audience=AUDIENCE, algorithm=issuer.algorithm, **parts)


# --- The header -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [], [b""], [b"Bearer"], [b"Bearer "], [b"Basic YTpi"], [b"abc.def"], [b"Bearer a b"],
        [b"Bearer a, b"],
        [b"Bearer \xff"], [b"Bearer a\x00"], [b"Bearer a.b", b"Bearer a.b"], [b"Bearer\ta.b"],
        [b"Bearer " + b"a" * MAX_CREDENTIAL_BYTES],
    ],
)  # fmt: skip
def test_anything_but_one_bearer_credential_is_none(values: list[bytes]) -> None:
    with pytest.raises(NotAuthenticatedError):
        read_credential([(b"host", b"x"), *((b"authorization", value) for value in values)])


@pytest.mark.parametrize("value", [b"Bearer a.b", b"bearer a.b", b"BEARER  a.b"])
def test_the_scheme_is_read_in_any_case(value: bytes) -> None:
    assert read_credential([(b"authorization", value)]) == "a.b"


@given(st.binary(max_size=200))
def test_no_header_whatever_is_in_it_is_more_than_refused(value: bytes) -> None:
    with contextlib.suppress(NotAuthenticatedError):
        assert read_credential([(b"authorization", value)]).isascii()


async def test_a_kind_that_is_off_is_not_accepted() -> None:
    key, row = make_key()
    table = ApiKeyTable(FakeKeySource([row]), PEPPER)
    await table.refresh()
    issuer = Issuer("EdDSA")
    only_keys = Authenticator(keys=table, tokens=None)
    only_tokens = Authenticator(keys=None, tokens=build_verifier(issuer))
    both = Authenticator(keys=table, tokens=build_verifier(issuer))
    as_key, as_token = ([(b"authorization", b"Bearer " + c.encode())] for c in (key, issuer.sign()))
    assert await only_keys.identify(as_key) == await both.identify(as_key) == SCORER
    assert (await only_tokens.identify(as_token)).name == (await both.identify(as_token)).name == "jwt:clerk"
    for authenticator, headers in ((only_keys, as_token), (only_tokens, as_key)):
        with pytest.raises(NotAuthenticatedError):
            await authenticator.identify(headers)


def test_a_client_may_what_its_scopes_say_and_an_administrator_everything() -> None:
    assert SCORER.may("score")
    assert not SCORER.may("read")
    assert not Client("nobody", frozenset()).may("read")
    assert Client("ops", frozenset({"admin"})).may("score")


# --- API keys ---------------------------------------------------------------------------------------------


async def test_a_key_is_its_clients_and_no_other_text_is() -> None:
    key, row = make_key()
    other, _ = make_key()
    table = ApiKeyTable(FakeKeySource([row]), PEPPER)
    await table.refresh()
    assert table.verify(key) == SCORER
    key_id, _, secret = key.partition(".")
    wrong = [key[:-1], f"{key}x", key_id, f"{key_id}.", f".{secret}", f"{key_id}.{other.partition('.')[2]}"]
    for text in [*wrong, other, f"{other.partition('.')[0]}.{secret}", "", "."]:
        with pytest.raises(NotAuthenticatedError):
            table.verify(text)


async def test_a_key_means_nothing_under_another_pepper() -> None:
    key, row = make_key()
    table = ApiKeyTable(FakeKeySource([row]), b"another pepper, also long enough")
    await table.refresh()
    with pytest.raises(NotAuthenticatedError):
        table.verify(key)


def test_a_key_has_256_random_bits_and_is_never_shown_by_what_is_kept_of_it() -> None:
    key, row = make_key()
    secret = key.partition(".")[2]
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    assert len({generate_key() for _ in range(1000)}) == 1000
    assert secret not in repr(row)
    assert row.digest.hex() not in repr(row)


async def test_before_the_table_was_ever_read_nobody_is_let_in_and_it_says_so() -> None:
    key, row = make_key()
    source = FakeKeySource([row])
    source.error = DatabaseUnavailableError()
    table = ApiKeyTable(source, PEPPER)
    await table.refresh()
    with pytest.raises(KeysUnavailableError):
        table.verify(key)
    source.error = None
    await table.refresh()
    assert table.verify(key) == SCORER


async def test_the_last_table_stays_while_the_database_is_away_and_a_revoked_key_ends_with_the_next() -> None:
    key, row = make_key()
    source = FakeKeySource([row])
    table = ApiKeyTable(source, PEPPER, refresh_seconds=0)
    await table.refresh()
    source.error, source.keys = DatabaseUnavailableError(), []
    await table.refresh()
    assert table.verify(key) == SCORER
    source.failed.clear()
    source.answered.clear()
    source.error = RuntimeError()  # a defect, which must not end the reading either
    running = asyncio.create_task(table.run())
    await source.failed.wait()
    source.error = None
    await source.answered.wait()
    running.cancel()
    with pytest.raises(NotAuthenticatedError):
        table.verify(key)


# --- Tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_token_of_the_issuer_is_its_subjects_with_its_scopes(algorithm: str) -> None:
    issuer = Issuer(algorithm)
    token = issuer.sign(scope="score read somethings-else")
    client = await build_verifier(issuer).verify(token)
    assert client == Client("jwt:clerk", frozenset({"score", "read", "somethings-else"}))


@pytest.mark.parametrize("scope", [None, 1, ["score"], "", "SCORE", "score,read"])
async def test_scopes_are_words_separated_by_spaces_and_nothing_else(scope: object) -> None:
    issuer = Issuer("EdDSA")
    client = await build_verifier(issuer).verify(issuer.sign(scope=scope))
    assert not client.may("score")
    assert not client.may("read")


@pytest.mark.parametrize("claim", ["exp", "iat", "iss", "aud", "sub"])
async def test_every_claim_that_matters_is_required(claim: str) -> None:
    issuer = Issuer("EdDSA")
    with pytest.raises(NotAuthenticatedError):
        await build_verifier(issuer).verify(issuer.sign(without=claim))


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://other.example/"}, {"iss": None}, {"iss": [ISSUER]}, {"aud": "other"}, {"aud": []},
        {"aud": None}, {"sub": 1}, {"exp": "soon"}, {"exp": None}, {"exp": 10**400},
        {"iat": "now"},
        {"headers": {"crit": ["b64"]}}, {"headers": {"crit": ["x"], "x": 1}}, {"headers": {"kid": "unknown"}},
        {"headers": {"kid": None}}, {"headers": {"kid": 1}}, {"headers": {"b64": False, "crit": ["b64"]}},
    ],
    ids=str,
)  # fmt: skip
async def test_a_token_that_is_wrong_in_any_way_is_refused(changes: dict[str, Any]) -> None:
    issuer = Issuer("EdDSA")
    with pytest.raises(NotAuthenticatedError):
        await build_verifier(issuer).verify(issuer.sign(**changes))


async def test_times_hold_but_for_half_a_minute() -> None:
    issuer = Issuer("EdDSA")
    now = int(time.time())
    for changes in ({"exp": now - 20}, {"iat": now + 20}, {"nbf": now + 20}):
        await build_verifier(issuer).verify(issuer.sign(**changes))
    for changes in ({"exp": now - 40}, {"iat": now + 60}, {"nbf": now + 60}):
        with pytest.raises(NotAuthenticatedError):
            await build_verifier(issuer).verify(issuer.sign(**changes))


async def test_an_unsigned_token_or_one_signed_with_what_is_public_is_refused() -> None:
    issuer = Issuer("RS256")
    header, payload, signature = issuer.sign().split(".")
    none, shared = (encode({"alg": algorithm, "kid": "first"}) for algorithm in ("none", "HS256"))
    pem = issuer.private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    by_public_key = hmac.digest(pem, f"{shared}.{payload}".encode(), "sha256")
    forged = [
        f"{none}.{payload}.", f"{none}.{payload}.{signature}", f"{header}.{payload}.",
        f"{header}.{payload}.{signature[:-4]}AAAA", f"{header}.{encode({})}.{signature}",
        f"{shared}.{payload}.{b64(by_public_key)}",
    ]  # fmt: skip
    issuer.private_key, own = rsa.generate_private_key(65537, 2048), issuer.private_key
    embedded = jwt.get_algorithm_by_name("RS256").to_jwk(issuer.private_key.public_key(), as_dict=True)
    for more in ({"jwk": embedded}, {"jku": "https://evil.example/keys"}, {"x5u": "https://evil.example/"}):
        forged += [issuer.sign(headers=more)]
    issuer.private_key = own
    verifier = build_verifier(issuer)
    for algorithm in ("RS384", "PS256"):  # the issuer's own key, but not the pinned algorithm
        issuer.algorithm = algorithm
        forged += [issuer.sign()]
    issuer.algorithm = "RS256"
    for token in forged:
        with pytest.raises(NotAuthenticatedError):
            await verifier.verify(token)
    assert await verifier.verify(issuer.sign())
    assert issuer.asked == 1


@pytest.mark.parametrize(
    "header", [b"[" * 5000, b'{"a":' * 1000, b"", b"null", b"[]", b"\xff", b'{"kid":{}}', b'{"kid":"first"}']
)
async def test_a_hostile_head_is_refused_like_any_other(header: bytes) -> None:
    issuer = Issuer("EdDSA")
    with pytest.raises(NotAuthenticatedError):
        await build_verifier(issuer).verify(f"{b64(header)}.{b64(b'[' * 900)}.{b64(b'x' * 64)}")


async def test_a_token_is_remembered_until_it_expires_and_not_beyond_the_key_it_was_signed_with() -> None:
    issuer, clock, now = Issuer("EdDSA"), FakeClock(), FakeClock(time.time())
    verifier = build_verifier(issuer, clock=clock, now=now)
    token = issuer.sign()
    client = await verifier.verify(token)
    assert await verifier.verify(token) is client  # the same object: nothing was verified again
    issuer.rotate("second")
    clock.now += MIN_PAUSE_SECONDS
    await verifier.verify(issuer.sign())
    with pytest.raises(NotAuthenticatedError):
        await verifier.verify(token)

    short = issuer.sign(exp=int(now.now) + 5)
    again = await verifier.verify(short)
    now.now += 40  # PyJWT, whose clock nobody turns, still finds it valid: so this is not the remembered one
    assert await verifier.verify(short) is not again


async def test_what_is_remembered_is_bounded() -> None:
    issuer = Issuer("EdDSA")
    verifier = build_verifier(issuer)
    for number in range(MAX_REMEMBERED + 10):
        await verifier.verify(issuer.sign(jti=str(number)))
    assert len(verifier._verified) <= MAX_REMEMBERED


# --- The key set ------------------------------------------------------------------------------------------


async def test_ten_thousand_unknown_keys_ask_the_issuer_once_a_minute() -> None:
    issuer, clock = Issuer("EdDSA"), FakeClock()
    key_set = KeySet(issuer.fetch, "EdDSA", clock=clock)
    assert await key_set.find("first")

    async def ask(number: int) -> None:
        with pytest.raises(NotAuthenticatedError):
            await key_set.find(f"unknown {number}")

    for minute in range(1, 4):
        await asyncio.gather(*(ask(number) for number in range(10_000)))
        assert issuer.asked == minute
        clock.now += MIN_PAUSE_SECONDS


async def test_a_new_key_is_found_by_everybody_who_waits_with_one_fetch() -> None:
    issuer, clock = Issuer("EdDSA"), FakeClock()
    key_set = KeySet(issuer.fetch, "EdDSA", clock=clock)
    await key_set.find("first")
    issuer.rotate("second")
    clock.now += MIN_PAUSE_SECONDS
    found = await asyncio.gather(*(key_set.find("second") for _ in range(100)))
    assert len(set(map(id, found))) == 1
    assert issuer.asked == 2


@pytest.mark.parametrize(
    "error", [httpx2.ConnectError("down"), ValueError("nonsense"), OSError(), TimeoutError()], ids=repr
)
async def test_the_last_set_stays_while_the_issuer_is_away(error: Exception) -> None:
    issuer, clock = Issuer("EdDSA"), FakeClock()
    key_set = KeySet(issuer.fetch, "EdDSA", clock=clock)
    await key_set.find("first")
    issuer.error = error
    for _ in range(5):
        clock.now += MIN_PAUSE_SECONDS
        assert await key_set.find("first")
        with pytest.raises(NotAuthenticatedError):
            await key_set.find("unknown")
    assert issuer.asked > 2


@pytest.mark.parametrize(("failures", "found"), [(1, True), (2, False)])
async def test_a_connection_to_the_issuer_that_fails_is_tried_once_more(failures: int, found: bool) -> None:
    issuer, asked = Issuer("EdDSA"), itertools.count(1)

    async def fail_at_first() -> bytes:
        if next(asked) <= failures:
            raise httpx2.ReadError("reset")
        return await issuer.fetch()

    key_set = KeySet(fail_at_first, "EdDSA", clock=FakeClock())
    if found:
        assert await key_set.find("first")
    else:
        with pytest.raises(KeysUnavailableError):
            await key_set.find("first")
    assert next(asked) == 3


async def test_an_issuer_that_never_answered_is_not_a_reason_to_call_a_token_bad() -> None:
    issuer, clock = Issuer("EdDSA"), FakeClock()
    issuer.error = OSError()
    key_set = KeySet(issuer.fetch, "EdDSA", clock=clock)
    with pytest.raises(KeysUnavailableError) as unavailable:
        await key_set.find("first")
    assert unavailable.value.retry_after == MIN_PAUSE_SECONDS
    issuer.error = None
    clock.now += MIN_PAUSE_SECONDS
    assert await key_set.find("first")


async def test_a_fetch_that_hangs_is_given_up() -> None:
    async def hang() -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(KeysUnavailableError):
        await KeySet(hang, "EdDSA", fetch_seconds=0.01).find("first")


async def test_a_withdrawn_key_goes_without_anybody_asking() -> None:
    issuer = Issuer("EdDSA")
    key_set = KeySet(issuer.fetch, "EdDSA", max_age_seconds=0.001, clock=time.monotonic)
    running = asyncio.create_task(key_set.run())
    await issuer.answered.wait()
    issuer.rotate("second")
    for _ in range(2):  # the first may have begun before
        issuer.answered.clear()
        await issuer.answered.wait()
    running.cancel()
    await asyncio.wait({running})
    assert set(key_set.current()) == {"second"}
    assert running.cancelled()


async def test_a_fetch_that_failed_is_made_up_for_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = FakeClock(), asyncio.sleep
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        clock.now += seconds
        await waited(0)

    async def fail_now_and_then() -> bytes:
        asked.append(clock.now - 1000)
        if len(asked) in {1, 3, 4}:
            raise ValueError("not answered with 200")
        if len(asked) == 6:
            running.cancel()
        return issuer.key_set()

    issuer = Issuer("EdDSA")
    monkeypatch.setattr(asyncio, "sleep", sleep)
    running = asyncio.create_task(KeySet(fail_now_and_then, "EdDSA", clock=clock).run())
    await asyncio.wait({running})
    assert asked == [0, 60, 360, 420, 480, 780]


UNREADABLE: list[dict[str, Any]] = [
    {"kty": "OKP", "crv": "Ed25519", "kid": "no point", "x": "AAAA"},
    {"kty": "OKP", "crv": "Ed25519", "kid": "no text", "x": 1},
    {"kty": "OKP", "crv": "Ed25519", "kid": "nothing"},
]


@pytest.mark.parametrize(
    ("entries", "unreadable"), [([], 0), ([1, None, "key", []], 0), ([{"kty": "RSA"}], 0), (UNREADABLE, 3)]
)
async def test_a_set_without_a_usable_key_withdraws_all_there_were(
    entries: list[Any], unreadable: int
) -> None:
    issuer, clock = Issuer("EdDSA"), FakeClock()
    documents = [issuer.key_set(), json.dumps({"keys": entries}).encode(), issuer.key_set()]

    async def fetch() -> bytes:
        return documents.pop(0)

    key_set = KeySet(fetch, "EdDSA", clock=clock)
    verifier = JwtVerifier(key_set, issuer=ISSUER, audience=AUDIENCE, algorithm="EdDSA")
    token = issuer.sign()
    assert await verifier.verify(token)
    clock.now += MIN_PAUSE_SECONDS
    with capture_logs() as lines:
        with pytest.raises(NotAuthenticatedError):
            await key_set.find("unknown")
        with pytest.raises(NotAuthenticatedError):
            await verifier.verify(token)
    assert not key_set.current()
    assert lines == [
        {"event": "key_set_lacks_keys", "keys": 0, "unreadable": unreadable, "log_level": "warning"}
    ]
    clock.now += MIN_PAUSE_SECONDS
    assert await verifier.verify(token)


async def test_one_key_that_cannot_be_read_keeps_no_other_from_coming_or_going() -> None:
    issuer, clock = Issuer("EdDSA"), FakeClock()
    key_set = KeySet(lambda: answer(issuer.key_set(*UNREADABLE)), "EdDSA", clock=clock)
    assert await key_set.find("first")
    issuer.rotate("second")
    clock.now += MIN_PAUSE_SECONDS
    with capture_logs() as lines:
        assert await key_set.find("second")
    with pytest.raises(NotAuthenticatedError):
        await key_set.find("first")
    assert lines == [{"event": "key_set_lacks_keys", "keys": 1, "unreadable": 3, "log_level": "warning"}]


async def answer(document: bytes) -> bytes:
    return document


def test_only_public_keys_for_the_pinned_algorithm_are_taken() -> None:
    issuer = Issuer("RS256")
    private = jwt.get_algorithm_by_name("RS256").to_jwk(issuer.private_key, as_dict=True)
    others = [
        {"kty": "oct", "k": b64(b"s" * 32), "kid": "shared"},
        {**issuer.publish(), "kid": "other algorithm", "alg": "RS512"},
        {**issuer.publish(), "kid": "for encryption", "use": "enc"},
        {**private, "kid": "private"},
        {name: value for name, value in issuer.publish().items() if name != "kid"},
        {**Issuer("ES256").publish(), "kid": "curve", "alg": "RS256"},
        {},
    ]
    keys, unreadable = build_keys(issuer.key_set(*others), "RS256")
    assert (set(keys), unreadable) == ({"first"}, 0)


@pytest.mark.parametrize(
    "document",
    [b"", b"null", b"[]", b"{}", b'{"keys": {}}', b"\xff", b'{"keys":' + b"[" * 100_000],
    ids=lambda document: document[:12],
)
def test_what_is_no_key_set_is_a_value_error(document: bytes) -> None:
    with pytest.raises(ValueError, match="key"):
        build_keys(document, "RS256")


async def test_the_endpoint_follows_no_redirect_and_reads_no_more_than_it_must() -> None:
    issuer = Issuer("EdDSA")
    with published(issuer) as base:
        async with httpx2.AsyncClient(follow_redirects=False) as client:
            keys, _ = build_keys(await KeySetEndpoint(f"{base}/keys", client).fetch(), "EdDSA")
            assert keys
            with pytest.raises(ValueError, match="200"):
                await KeySetEndpoint(f"{base}/elsewhere", client).fetch()
            with pytest.raises(ValueError, match="long"):
                await KeySetEndpoint(f"{base}/endless", client).fetch()
    async with httpx2.AsyncClient() as client:
        with pytest.raises(httpx2.HTTPError):
            await KeySetEndpoint(f"{base}/keys", client).fetch()


# --- Rates ------------------------------------------------------------------------------------------------


def test_a_client_is_let_through_as_often_as_it_may_and_told_when_it_may_again() -> None:
    clock = FakeClock()
    limiter = RateLimiter("3/minute", clock)
    for _ in range(3):
        limiter.admit("crm")
    with pytest.raises(RateLimitedError) as limited:
        limiter.admit("crm")
    assert limited.value.retry_after == 20
    limiter.admit("somebody else")
    clock.now += 20
    limiter.admit("crm")
    with pytest.raises(RateLimitedError):
        limiter.admit("crm")
    clock.now += 3600
    for _ in range(3):
        limiter.admit("crm")


def test_the_clients_that_are_remembered_are_bounded_and_the_quiet_ones_go_first() -> None:
    limiter = RateLimiter("1/hour", FakeClock())
    limiter.admit("quiet")
    limiter.admit("busy")
    for number in range(MAX_CLIENTS + 5):
        limiter.admit(str(number))
        with pytest.raises(RateLimitedError):
            limiter.admit("busy")
    limiter.admit("quiet")
    assert len(limiter._states) == MAX_CLIENTS
