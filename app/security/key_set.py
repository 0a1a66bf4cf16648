"""The public keys of the token issuer, as it publishes them (a JSON Web Key Set, RFC 7517).

However many unknown keys are asked for, the issuer is asked at most once a minute, by one request for all,
which is sent once more when the network fails it; while the issuer is away the last set stays. A set that was
read replaces the last one whatever is in it: a key that is not there any more is withdrawn. Only keys for the
one configured algorithm are taken, and none that is a secret. Built by `wiring`, asked by `tokens`.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx2
import jwt
import msgspec
import stamina
import structlog

from app.errors import KeysUnavailableError, NotAuthenticatedError
from app.metrics import AUTH_REFRESH_FAILURES

MIN_PAUSE_SECONDS = 60.0
MAX_AGE_SECONDS = 300.0
FETCH_SECONDS = 3.0
MAX_SET_BYTES = 262_144

PublicKey = Any  # a public key of the cryptography library, of the configured algorithm's kind
Keys = Mapping[str, PublicKey]
_NO_KEYS: Keys = {}

_fetch_again = stamina.AsyncRetryingCaller(attempts=2, wait_initial=0.1, wait_jitter=0.4).on(
    httpx2.TransportError
)

_KINDS = {"RS256": "RSA", "PS256": "RSA", "ES256": "P-256", "EdDSA": "Ed25519"}

_log = structlog.get_logger()


class _Document(msgspec.Struct):
    keys: list[Any]


class KeySet:
    """The issuer's keys by key ID; `fetch` gets the document, `clock` gives monotonic seconds.

    A fetch that takes longer than `fetch_seconds` is given up; a set is used for `max_age_seconds` and then
    asked for again, whether anybody needs it or not: a key that the issuer withdrew must not wait for a use.
    After a fetch that failed it is asked for again a minute later.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[bytes]],
        algorithm: str,
        *,
        fetch_seconds: float = FETCH_SECONDS,
        max_age_seconds: float = MAX_AGE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._fetch_seconds = fetch_seconds
        self._max_age_seconds = max_age_seconds
        self._algorithm = algorithm
        self._clock = clock
        self._keys: Keys | None = None
        self._asked_at = -math.inf
        self._ask_after = max_age_seconds
        self._refresh: asyncio.Task[None] | None = None

    def current(self) -> Keys:
        """Returns the keys of the last set that was read, none if none was."""
        return _NO_KEYS if self._keys is None else self._keys

    async def run(self) -> None:
        """Asks at once, and whenever the set is too old, until it is cancelled."""
        try:
            while True:
                self._refresh_after(self._ask_after)
                if self._refresh is not None:
                    await asyncio.wait({self._refresh})  # by then it is known whether it failed
                await asyncio.sleep(self._asked_at + self._ask_after - self._clock())
        finally:
            if self._refresh is not None:
                self._refresh.cancel()

    async def find(self, key_id: str) -> PublicKey:
        """Returns the key of this ID; an unknown one waits for a new answer, if one may be asked for.

        Raises:
            NotAuthenticatedError: the issuer has no such key.
            KeysUnavailableError: the issuer has never told its keys.
        """
        if key_id not in self.current():
            self._refresh_after(MIN_PAUSE_SECONDS)
            if self._refresh is not None:
                await asyncio.wait({self._refresh})
        if self._keys is None:
            raise KeysUnavailableError(retry_after=max(1, math.ceil(self._pause_left())))
        if key_id not in self._keys:
            raise NotAuthenticatedError
        return self._keys[key_id]

    def _pause_left(self) -> float:
        return self._asked_at + MIN_PAUSE_SECONDS - self._clock()

    def _refresh_after(self, seconds: float) -> None:
        now = self._clock()
        if now - self._asked_at >= seconds:
            self._asked_at = now
            self._refresh = asyncio.create_task(self._replace(), name="key-set")

    async def _replace(self) -> None:
        try:
            async with asyncio.timeout(self._fetch_seconds):
                keys, unreadable = build_keys(await _fetch_again(self._fetch), self._algorithm)
        except (httpx2.HTTPError, OSError, ValueError) as exc:  # TimeoutError is an OSError
            AUTH_REFRESH_FAILURES.labels("key_set").inc()
            _log.warning("key_set_not_read", error=type(exc).__name__, keys=len(self.current()))
            self._ask_after = MIN_PAUSE_SECONDS
            return
        self._keys = keys
        self._ask_after = self._max_age_seconds
        if unreadable or not keys:
            _log.warning("key_set_lacks_keys", keys=len(keys), unreadable=unreadable)


def build_keys(document: bytes, algorithm: str) -> tuple[Keys, int]:
    """Returns the keys of a set that may verify signatures of this algorithm, and how many cannot be read.

    The keys are by their IDs; there may be none.

    Raises:
        ValueError: the document is no key set.
    """
    try:
        entries = msgspec.json.decode(document, type=_Document).keys
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise ValueError("not a key set") from exc
    usable = [entry for entry in entries if _is_usable(entry, algorithm)]
    read = [(entry["kid"], _read_key(entry, algorithm)) for entry in usable]
    keys = {key_id: key for key_id, key in read if key is not None}
    return keys, sum(key is None for _, key in read)


def _is_usable(entry: Any, algorithm: str) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("kid"), str)
        and entry.get("use", "sig") == "sig"
        and entry.get("alg", algorithm) == algorithm
        and entry.get("crv", entry.get("kty")) == _KINDS[algorithm]
        and "d" not in entry  # a private key has no business there
    )


def _read_key(entry: dict[str, Any], algorithm: str) -> PublicKey | None:
    try:
        return jwt.PyJWK(entry, algorithm).key
    except Exception:  # noqa: BLE001 - whatever is wrong with one key, the others are still told and withdrawn
        return None


class KeySetEndpoint:
    """Fetches the document over HTTP: no redirect is followed, no more than `MAX_SET_BYTES` are read."""

    def __init__(self, url: str, client: httpx2.AsyncClient) -> None:
        self._url = url
        self._client = client

    async def fetch(self) -> bytes:
        """Returns the document as it was sent.

        Raises:
            httpx2.HTTPError: no answer.
            ValueError: another status than 200, or too long.
        """
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        document = bytearray()
        async with self._client.stream("GET", self._url, headers=headers) as response:
            if response.status_code != httpx2.codes.OK:
                raise ValueError("not answered with 200")
            async for part in response.aiter_raw():
                document += part
                if len(document) > MAX_SET_BYTES:
                    raise ValueError("too long")
        return bytes(document)
