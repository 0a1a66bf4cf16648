"""A token issuer: keys of its own, the key set it publishes, tokens it signs, an endpoint on loopback."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

ISSUER, AUDIENCE = "https://issuer.example/", "lead-scoring"
COOKIE = "of-the-issuer-4d1b9e"
"""What the endpoint sends as a cookie with its key set."""

_MAKE = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


class Issuer:
    """Signs with one key at a time; `asked` counts how often its key set was fetched, `answered` tells of it.

    `error` is raised by `fetch` instead of an answer while it is set.
    """

    def __init__(self, algorithm: str = "RS256") -> None:
        self.algorithm = algorithm
        self.asked = 0
        self.answered = asyncio.Event()
        self.error: Exception | None = None
        self.rotate("first")

    def rotate(self, key_id: str) -> None:
        """Signs with a new key from now on, and publishes that one only."""
        self.key_id = key_id
        self.private_key: Any = _MAKE[self.algorithm]()

    def publish(self) -> dict[str, Any]:
        """Returns its public key as a JSON Web Key."""
        kind = jwt.get_algorithm_by_name(self.algorithm)
        public: dict[str, Any] = kind.to_jwk(self.private_key.public_key(), as_dict=True)  # type: ignore[call-overload]
        return {**public, "kid": self.key_id, "use": "sig", "alg": self.algorithm}

    def key_set(self, *more: dict[str, Any]) -> bytes:
        """Returns the document it publishes, with more entries in front."""
        return json.dumps({"keys": [*more, self.publish()]}).encode()

    async def fetch(self) -> bytes:
        """Answers like the endpoint."""
        self.asked += 1
        self.answered.set()
        if self.error is not None:
            raise self.error
        return self.key_set()

    def sign(
        self, *, without: str | None = None, headers: dict[str, Any] | None = None, **changes: Any
    ) -> str:
        """Returns a token for `clerk` with the scope `score`, valid for five minutes, but for the changes."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "clerk", "scope": "score"}
        claims |= {"iat": now, "exp": now + 300, **changes}
        claims.pop(without or "", None)
        given = {"kid": self.key_id, **(headers or {})}
        # Below the level at which the library checks what it is given to sign.
        head, body = encode({"alg": self.algorithm, **given}), encode(claims)
        signed = f"{head}.{body}".encode()
        signature = jwt.get_algorithm_by_name(self.algorithm).sign(signed, self.private_key)
        return f"{head}.{body}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def encode(part: dict[str, Any]) -> str:
    """Returns a part of a token in its URL-safe form."""
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


@contextmanager
def published(issuer: Issuer, path: str = "/keys") -> Iterator[str]:
    """Yields the URL of an endpoint that answers with the issuer's key set; `/elsewhere` redirects there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.asked += 1
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", path)
                self.end_headers()
                return
            body = issuer.key_set() if self.path == path else b"x" * 1_000_000
            self.send_response(200)
            self.send_header("Set-Cookie", f"session={COOKIE}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
