"""What authentication and rate limits add to a request, by kind of credential.

A route that does nothing, of the kind that leads are asked by, is asked in this process, without sockets,
bare and behind each guard in turn; the figure is the median of what a guard adds. `python -m bench.guard`
"""

import asyncio
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security

from app.ai.dependencies import DirectRoute
from app.security.access import Authenticator, Client, Guard
from app.security.api_keys import ApiKey, ApiKeyTable, digest_key, generate_key
from app.security.key_set import KeySet
from app.security.rate_limit import RateLimiter, limit_rate
from app.security.tokens import MAX_REMEMBERED, JwtVerifier

ROUNDS, REQUESTS = 40, 500
PEPPER, ISSUER, AUDIENCE = b"x" * 32, "issuer", "audience"


class OneKey:
    """A table with one key in it."""

    def __init__(self, key: ApiKey) -> None:
        self._key = key

    async def fetch_keys(self) -> Sequence[ApiKey]:
        """Returns the key."""
        return [self._key]


async def main() -> None:
    """Prints microseconds for each kind."""
    key, private = generate_key(), rsa.generate_private_key(65537, 2048)
    row = ApiKey(key.partition(".")[0], Client("bench", frozenset({"score"})), digest_key(PEPPER, key))
    table = ApiKeyTable(OneKey(row), PEPPER)
    await table.refresh()
    public = jwt.get_algorithm_by_name("RS256").to_jwk(private.public_key(), as_dict=True)

    async def fetch() -> bytes:
        return json.dumps({"keys": [{**public, "kid": "1"}]}).encode()

    verifier = JwtVerifier(KeySet(fetch, "RS256"), issuer=ISSUER, audience=AUDIENCE, algorithm="RS256")
    state = {
        "authenticator": Authenticator(keys=table, tokens=verifier),
        "rate_limiter": RateLimiter("999999/second"),
    }
    tokens = [sign(private, number) for number in range(MAX_REMEMBERED)]
    guard, rate = Security(Guard("score"), scopes=["score"]), Depends(limit_rate)
    cases: dict[str, tuple[FastAPI, list[str]]] = {
        "bare": (build_app([]), [""]),
        "API key": (build_app([guard]), [key]),
        "API key and rate limit": (build_app([guard, rate]), [key]),
        "rate limit alone": (build_app([rate]), [""]),
        "RS256 token seen before": (build_app([guard]), tokens[:1]),
        "RS256 token never seen": (build_app([guard]), tokens[1:]),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(ROUNDS):
        for name, (app, credentials) in cases.items():
            asked = min(REQUESTS, len(tokens) // ROUNDS - 1)
            chosen = [credentials[(number * asked + n) % len(credentials)] for n in range(asked)]
            times[name].append(await ask(app, chosen, state))
    for name, values in times.items():
        print(f"{name:<26} {(median(values) - median(times['bare'])) * 1e6:6.1f} us")


def sign(private: rsa.RSAPrivateKey, number: int) -> str:
    """Returns a token like no other."""
    now = int(time.time())
    claims: dict[str, Any] = {"iss": ISSUER, "aud": AUDIENCE, "sub": "bench", "scope": "score"}
    claims |= {"iat": now, "exp": now + 3600, "jti": str(number)}
    return jwt.encode(claims, private, algorithm="RS256", headers={"kid": "1"})


def build_app(dependencies: list[Any]) -> FastAPI:
    """Returns an application with one route that does nothing."""
    app, router = FastAPI(), APIRouter(route_class=DirectRoute, dependencies=dependencies)

    async def nothing(_request: Request) -> Response:
        return Response()

    router.add_api_route("/", nothing, methods=["POST"])
    app.router.routes.extend(router.routes)
    return app


async def ask(app: FastAPI, credentials: Sequence[str], state: dict[str, Any]) -> float:
    """Returns seconds a request."""

    async def receive() -> Any:
        raise AssertionError("nobody reads the body")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise AssertionError(message)

    began = time.perf_counter()
    for credential in credentials:
        headers = [(b"host", b"x"), (b"content-type", b"application/json")]
        headers.append((b"authorization", f"Bearer {credential}".encode()))
        scope = {
            "type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers,
            "client": ("127.0.0.1", 1), "state": dict(state),
        }  # fmt: skip
        await app(scope, receive, send)
    return (time.perf_counter() - began) / len(credentials)


if __name__ == "__main__":
    asyncio.run(main())
