"""API keys: how one is made, what is kept of it, and a table in memory that requests are verified against.

A key is `id.secret`. Only a keyed hash of it is kept: the secret is 256 random bits, so a slow hash would
guard against nothing, and would let anybody keep the service busy. A request never waits for the database:
the table is read in the background, and the last one read is used for as long as the database is away.
"""

import asyncio
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from app.errors import DatabaseUnavailableError, KeysUnavailableError, NotAuthenticatedError
from app.metrics import AUTH_REFRESH_FAILURES
from app.security.access import Client

REFRESH_SECONDS = 2.0
"""With a second for reading, a revoked key is refused within three; five are promised."""

_NO_HASH = bytes(32)

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key that is not revoked."""

    id: str
    client: Client
    digest: bytes = field(repr=False)


class ApiKeySource(Protocol):
    """Where keys are kept; `fetch_keys` raises `DatabaseUnavailableError`."""

    async def fetch_keys(self) -> Sequence[ApiKey]:
        """Returns every key that is not revoked."""


def generate_key() -> str:
    """Returns a new `id.secret`; the part before the dot is no secret."""
    return f"{secrets.token_hex(8)}.{secrets.token_urlsafe(32)}"


def digest_key(pepper: bytes, key: str) -> bytes:
    """Returns the HMAC-SHA256 of the whole key, 32 bytes."""
    return hmac.digest(pepper, key.encode(), "sha256")


class ApiKeyTable:
    """The keys as of the last time they were read; implements `KeyVerifier`."""

    def __init__(
        self, source: ApiKeySource, pepper: bytes, *, refresh_seconds: float = REFRESH_SECONDS
    ) -> None:
        self._source = source
        self._pepper = pepper
        self._refresh_seconds = refresh_seconds
        self._keys: dict[str, ApiKey] | None = None
        self._readable: bool | None = None

    def verify(self, key: str) -> Client:
        """Returns the client whose key this is; takes as long for an ID that exists as for one that does not.

        Raises:
            NotAuthenticatedError: there is no such key, or not any more.
            KeysUnavailableError: the table has never been read.
        """
        if self._keys is None:
            raise KeysUnavailableError
        found = self._keys.get(key.partition(".")[0])
        digest = digest_key(self._pepper, key)
        if not hmac.compare_digest(digest, found.digest if found else _NO_HASH) or found is None:
            raise NotAuthenticatedError
        return found.client

    async def refresh(self) -> None:
        """Reads the table once; if that fails, the last one read stays."""
        try:
            self._keys = {key.id: key for key in await self._source.fetch_keys()}
        except DatabaseUnavailableError:
            AUTH_REFRESH_FAILURES.labels("api_keys").inc()
            self._note(readable=False)
        else:
            self._note(readable=True)

    async def run(self) -> None:
        """Refreshes until it is cancelled."""
        while True:
            await asyncio.sleep(self._refresh_seconds)
            try:
                await self.refresh()
            except Exception:  # noqa: BLE001 - were this to end, no key could be revoked any more
                _log.exception("api_keys_not_read")

    def _note(self, *, readable: bool) -> None:
        if readable != self._readable:
            log = _log.info if readable else _log.warning
            log("api_keys", readable=readable, keys=None if self._keys is None else len(self._keys))
        self._readable = readable
