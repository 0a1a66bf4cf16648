"""Who asks, and what that client may do: the dependency that routers are mounted behind.

A request carries one credential, `Authorization: Bearer ...`: an API key or a JSON Web Token, told apart by
their dots. Never decides by the request's path: a router is guarded or it is not. Nothing a credential holds
is repeated in an error or a log line. `main` mounts guards, `wiring` builds the authenticator they find in
the request's state.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from fastapi import Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase

from app.errors import KeysUnavailableError, LeadScoringError, NotAllowedError, NotAuthenticatedError

Scope = Literal["score", "read", "admin"]
"""Ask for predictions; see health, models, cards, metrics and the API's description; both."""

GUARD_ERRORS: tuple[type[LeadScoringError], ...] = (
    NotAuthenticatedError,
    NotAllowedError,
    KeysUnavailableError,
)
"""Whatever a guard may answer with, for OpenAPI."""

MAX_CREDENTIAL_BYTES = 8192

_is_bearer = re.compile(rb"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)").fullmatch


@dataclass(frozen=True, slots=True)
class Client:
    """Whom a valid credential belongs to, and the scopes it has."""

    name: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Tells whether this client has the scope, or is an administrator."""
        return scope in self.scopes or "admin" in self.scopes


class KeyVerifier(Protocol):
    """Knows API keys; `verify` raises `NotAuthenticatedError` or `KeysUnavailableError`."""

    def verify(self, key: str) -> Client:
        """Returns the client whose key this is."""


class TokenVerifier(Protocol):
    """Verifies JSON Web Tokens; `verify` raises `NotAuthenticatedError` or `KeysUnavailableError`."""

    async def verify(self, token: str) -> Client:
        """Returns the client whom the token is about."""


class Authenticator:
    """Finds out whom a request is from; a kind of credential without a verifier is not accepted."""

    def __init__(self, *, keys: KeyVerifier | None, tokens: TokenVerifier | None) -> None:
        self._keys = keys
        self._tokens = tokens

    async def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Client:
        """Returns the client that sent these headers.

        Raises:
            NotAuthenticatedError: no credential, several, or none that is valid.
            KeysUnavailableError: what it would be verified with has never been read.
        """
        credential = read_credential(headers)
        if self._tokens is not None and credential.count(".") == 2:
            return await self._tokens.verify(credential)
        if self._keys is not None:
            return self._keys.verify(credential)
        raise NotAuthenticatedError


def read_credential(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Returns what the one Authorization header carries after `Bearer` (RFC 6750).

    Raises:
        NotAuthenticatedError: none, several, another scheme, or longer than `MAX_CREDENTIAL_BYTES`.
    """
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) == 1 and len(values[0]) <= MAX_CREDENTIAL_BYTES:
        found = _is_bearer(values[0])
        if found:
            return found[1].decode("ascii")
    raise NotAuthenticatedError


class Guard(SecurityBase):
    """A dependency that lets pass who has `scope`; FastAPI also describes it in OpenAPI.

    Leaves the client's name in `request.state.client`.

    Raises:
        NotAuthenticatedError, KeysUnavailableError: see `Authenticator.identify`.
        NotAllowedError: the client does not have the scope.
    """

    def __init__(self, scope: Scope) -> None:
        self.model = HTTPBearer(description="An API key, or a token of the configured issuer.")
        self.scheme_name = "bearer"
        self._scope = scope

    async def __call__(self, request: Request) -> None:
        """Called by FastAPI before the route is, and before any of the body is read."""
        state = request.scope["state"]
        authenticator: Authenticator = state["authenticator"]
        client = await authenticator.identify(request.scope["headers"])
        if not client.may(self._scope):
            raise NotAllowedError
        state["client"] = client.name
