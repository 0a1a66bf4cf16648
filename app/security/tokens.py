"""JSON Web Tokens of one issuer: one algorithm, every claim that matters required, keys from its key set.

Tokens that were verified are remembered until they expire or the key set is read again, because a signature
costs a hundred times what a look-up does. Nothing of a token is believed before its signature is verified,
except which key to verify it with. Asked by `access`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jwt

from app.errors import NotAuthenticatedError
from app.security.access import Client
from app.security.key_set import Keys, KeySet

LEEWAY_SECONDS = 30
REQUIRED_CLAIMS = ("exp", "iat", "iss", "aud", "sub")
MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class _Verified:
    client: Client
    until: float
    keys: Keys


class JwtVerifier:
    """Verifies tokens that `issuer` signed for `audience`; `now` gives seconds UTC.

    Implements `TokenVerifier`.
    """

    def __init__(
        self,
        key_set: KeySet,
        *,
        issuer: str,
        audience: str,
        algorithm: str,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._key_set = key_set
        self._issuer = issuer
        self._audience = audience
        self._algorithm = algorithm
        self._now = now
        self._verified: dict[str, _Verified] = {}

    async def verify(self, token: str) -> Client:
        """Returns the client that the token is about (`sub`), with the scopes of its `scope` claim.

        Raises:
            NotAuthenticatedError: the token cannot be verified, or is not valid now.
            KeysUnavailableError: the issuer has never told its keys.
        """
        keys = self._key_set.current()
        known = self._verified.get(token)
        if known is not None and known.keys is keys and self._now() < known.until:
            return known.client
        try:
            key = await self._key_set.find(_read_key_id(token))
            claims = jwt.decode(
                token,
                key,
                algorithms=[self._algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": list(REQUIRED_CLAIMS), "enforce_minimum_key_length": True},
            )
            until = float(claims["exp"]) + LEEWAY_SECONDS
        except jwt.ExpiredSignatureError as exc:
            raise NotAuthenticatedError("The token has expired.") from exc
        except (jwt.PyJWTError, ValueError, OverflowError) as exc:  # no float is as late as an `exp` may be
            raise NotAuthenticatedError from exc
        client = _build_client(claims)
        if len(self._verified) >= MAX_REMEMBERED:
            self._verified.clear()
        self._verified[token] = _Verified(client, until, self._key_set.current())
        return client


def _read_key_id(token: str) -> str:
    key_id = jwt.get_unverified_header(token).get("kid")
    if not isinstance(key_id, str):
        raise NotAuthenticatedError
    return key_id


def _build_client(claims: dict[str, object]) -> Client:
    scope = claims.get("scope")
    # A client that has API keys cannot be called this: its name has no colon.
    return Client(f"jwt:{claims['sub']}", frozenset(scope.split() if isinstance(scope, str) else ()))
