"""The real application with authentication on: which route asks for what, and what comes of it."""

import asyncio
import base64
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest
from click.testing import CliRunner
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import ValidationError

from app.cli import cli
from app.db.api_keys import create_key, revoke_key
from app.db.demo_crm import load_demo
from app.security.access import Scope
from app.settings import Settings
from tests.in_process import build_settings, serve
from tests.issuer import AUDIENCE, COOKIE, ISSUER, Issuer, published
from tests.lead_models import VERSION, publish_lead_model
from tests.service import Service, count_events

PUBLIC = {"/livez", "/readyz"}
SCORE, LEGACY = "/ai/advanced-ml/predict-batch", "/ai/advanced-ml-legacy/predict-batch"
CARD = f"/ai/advanced-ml/models/{VERSION}/card"  # the model of these tests has none
READ = ("/ai/advanced-ml/health", "/ai/advanced-ml/models", CARD, "/metrics", "/openapi.json", "/docs")
PEPPER = "a pepper of thirty-two characters"
ORIGIN = "http://localhost:3000"


@dataclass
class Guarded:
    """A service that asks for credentials, its application, and a key or token for each scope."""

    http: httpx2.Client
    app: FastAPI
    url: str
    issuer: Issuer
    keys: dict[Scope, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, credential: str | None = None, **more: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        content = {"json": ["lead_1"]} if method == "POST" else {}
        return self.http.request(method, path, headers=headers | more, **content)


@contextmanager
def start(
    folder: Path, url: str, extend: Callable[[FastAPI], None] = lambda _: None, **changes: Any
) -> Iterator[Guarded]:
    issuer = Issuer("EdDSA")
    apps: list[FastAPI] = []

    def keep(app: FastAPI) -> None:
        apps.append(app)
        extend(app)

    with published(issuer) as base:
        settings = build_settings(
            folder,
            url,
            auth_mode="api_key,jwt",
            auth_key_pepper=PEPPER,
            auth_jwks_url=f"{base}/keys",
            auth_jwt_issuer=ISSUER,
            auth_jwt_audience=AUDIENCE,
            auth_jwt_algorithm="EdDSA",
            **changes,
        )
        with serve(settings, keep) as service, httpx2.Client(base_url=service) as http:
            yield Guarded(http, apps[0], url, issuer)


@pytest.fixture(scope="module")
def crm_url(create_database: Callable[..., str], migrated_template: str) -> str:
    url = create_database("authentication", migrated_template)
    load_demo(url, people=20, seed=3, until=datetime.now(UTC))
    return url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("authentication")
    publish_lead_model(path / "models")
    return path


@pytest.fixture(scope="module")
def guarded(crm_url: str, folder: Path) -> Iterator[Guarded]:
    scopes: tuple[Scope, ...] = ("score", "read", "admin")
    keys = {scope: create_key(crm_url, f"the-{scope}", [scope], PEPPER.encode()) for scope in scopes}
    with start(folder, crm_url) as service:
        service.keys = keys
        yield service


def problem_of(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["error_code"] == code
    return problem


def find_unguarded(service: Guarded) -> set[str]:
    """Returns the paths of all routes that answer to a method of theirs without a credential."""
    found = set()
    for route in iter_route_contexts(service.app.routes):
        path = (route.path or "/mounted").format(version=VERSION)
        for method in route.methods or {"GET"}:
            if service.ask(method, path).status_code != 401:
                found.add(path)
    return found


# --- Which routes -----------------------------------------------------------------------------------------


def test_every_route_but_the_public_ones_asks_for_a_credential(guarded: Guarded) -> None:
    paths = {route.path for route in iter_route_contexts(guarded.app.routes)}
    assert {SCORE, LEGACY, "/metrics", "/docs", "/openapi.json", *PUBLIC} <= paths
    assert find_unguarded(guarded) == PUBLIC


def test_a_route_that_somebody_forgets_to_guard_is_found(crm_url: str, tmp_path: Path) -> None:
    async def forgotten() -> dict[str, str]:
        return {}

    with start(tmp_path, crm_url, lambda app: app.add_api_route("/forgotten", forgotten)) as service:
        assert find_unguarded(service) == {"/forgotten", *PUBLIC}


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [("POST", SCORE, "score"), ("POST", LEGACY, "score"), *(("GET", path, "read") for path in READ)],
)
@pytest.mark.parametrize("kind", ["key", "token"])
def test_each_route_has_its_scope(guarded: Guarded, method: str, path: str, scope: Scope, kind: str) -> None:
    def credential(given: Scope) -> str:
        return guarded.keys[given] if kind == "key" else guarded.issuer.sign(scope=given)

    for allowed in (scope, "admin"):
        assert guarded.ask(method, path, credential(allowed)).status_code == (404 if path == CARD else 200)
    other: Scope = "read" if scope == "score" else "score"
    problem_of(guarded.ask(method, path, credential(other)), 403, "NOT_ALLOWED")


def test_with_authentication_off_nothing_is_asked_and_nothing_is_in_the_way(
    crm_url: str, folder: Path
) -> None:
    apps: list[FastAPI] = []
    with serve(build_settings(folder, crm_url), apps.append) as base, httpx2.Client(base_url=base) as http:
        assert http.post(SCORE, json=["lead_1"]).status_code == 200
        assert {http.get(path).status_code for path in READ if path != CARD} == {200}
        assert "security" not in http.get("/openapi.json").text
        assert "leadscore_auth_enabled 0.0" in http.get("/metrics").text
    for route in iter_route_contexts(apps[0].routes):
        assert not route.dependencies


# --- Credentials ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SCORE, LEGACY, "/metrics"])
def test_a_refusal_has_the_shape_of_every_error_with_cors_and_a_challenge(
    guarded: Guarded, path: str
) -> None:
    method = "GET" if path == "/metrics" else "POST"
    for credential in (None, "nonsense", "id.secret", "a.b.c", guarded.keys["score"] + "x"):
        response = guarded.ask(method, path, credential, Origin=ORIGIN)
        assert problem_of(response, 401, "NOT_AUTHENTICATED")["instance"] == path
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["cache-control"] == "no-store"
    expired = guarded.issuer.sign(exp=int(time.time()) - 60)
    assert "expired" in guarded.ask(method, path, expired).json()["detail"]


def test_a_browser_may_send_the_header(guarded: Guarded) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert guarded.ask("OPTIONS", SCORE, Origin=ORIGIN, **asked).status_code == 200


def test_a_refused_scoring_request_leaves_its_event_and_any_other_is_counted(guarded: Guarded) -> None:
    guarded.ask("GET", "/openapi.json", **{"X-Request-ID": "refused-elsewhere"})
    for number, (credential, code) in enumerate(
        [(None, "NOT_AUTHENTICATED"), (guarded.keys["read"], "NOT_ALLOWED")]
    ):
        request_id = f"refused-{number}"
        guarded.ask("POST", SCORE, credential, **{"X-Request-ID": request_id})
        wait_for_event(guarded, request_id)
        with psycopg.connect(guarded.url) as connection:
            rows = connection.execute("SELECT meta FROM ai_events WHERE request_id = %s", [request_id])
            ((meta,),) = rows.fetchall()
        assert (meta["error_code"], meta["route"], meta["asked"]) == (code, SCORE, None)
    assert "refused-elsewhere" not in count_events(guarded.url)
    counted = guarded.ask("GET", "/metrics", guarded.keys["read"]).text
    assert 'leadscore_requests_total{code="NOT_AUTHENTICATED",route="/openapi.json",status="401"}' in counted


def wait_for_event(service: Guarded, request_id: str) -> None:
    deadline = time.monotonic() + 10
    while request_id not in count_events(service.url):
        assert time.monotonic() < deadline


async def test_the_body_is_not_waited_for_before_the_credential_is_there(guarded: Guarded) -> None:
    answer = await speak(guarded, f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
    assert answer.startswith("HTTP/1.1 401")


async def speak(service: Guarded, request: str) -> str:
    """Sends this and no more; returns the head of the answer."""
    base = httpx2.URL(str(service.http.base_url))
    reader, writer = await asyncio.open_connection("127.0.0.1", base.port)
    try:
        writer.write(request.encode())
        return (await reader.readuntil(b"\r\n\r\n")).decode()
    finally:
        writer.close()


HEALTH = "/ai/advanced-ml/health"
TRICKS = (
    HEALTH, "/%61i/advanced-ml/health", "/ai/advanced-ml/%68ealth", "/ai/advanced-ml/health?/livez",
    "//ai/advanced-ml/health", "/ai//advanced-ml/health", "/ai/advanced-ml/health/", "/AI/advanced-ml/health",
    "/livez/../ai/advanced-ml/health", "/livez/%2e%2e/ai/advanced-ml/health", "/ai/%2e/advanced-ml/health",
    "//livez/..//ai/advanced-ml/health", "/livez%00/../ai/advanced-ml/health", "/ai/advanced-ml%2fhealth",
    "/ai/advanced-ml/health%2f", "/ai/advanced-ml/health;/livez", "/ai/advanced-ml/health#/livez",
    "http://x/ai/advanced-ml/health", "http://x/livez/../ai/advanced-ml/health", "\\ai\\advanced-ml\\health",
    "/ai/advanced-ml/health%0A", "/ai/advanced-ml/health%0D%0A", "/livez%0A",
)  # fmt: skip
HOSTS = ("x", "x/livez?", "x/livez#", "livez", "x:80/livez", "[::1]/livez?", "x\\livez", "@/livez", "")


@pytest.mark.parametrize("path", TRICKS)
async def test_no_way_of_writing_a_path_or_a_host_gets_round_the_guard(guarded: Guarded, path: str) -> None:
    reached = False
    for host, extra in itertools.product(
        HOSTS, ("", "X-Forwarded-Prefix: /livez\r\nX-Original-URL: /livez\r\n")
    ):
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{extra}"
        assert (await speak(guarded, f"{head}\r\n"))[9:12] in ("400", "401", "404")
        with_key = await speak(guarded, f"{head}Authorization: Bearer {guarded.keys['read']}\r\n\r\n")
        reached = reached or with_key[9:12] == "200"
    assert reached or path != HEALTH  # what is written plainly is there to be reached at all


def test_a_line_end_after_a_path_is_no_way_round_what_knows_paths(guarded: Guarded) -> None:
    for route in iter_route_contexts(guarded.app.routes):
        path = (route.path or "").format(version=VERSION) + "%0A"
        for method in route.methods or ():
            request_id = f"line-end-{uuid4()}"
            response = guarded.ask(method, path, guarded.keys["admin"], **{"X-Request-ID": request_id})
            assert response.status_code == 404, (method, path)
            assert response.headers["x-request-id"] == request_id
            if method == "POST":
                assert problem_of(response, 404, "NOT_FOUND")["instance"] == "/"
                wait_for_event(guarded, request_id)


# --- Keys and time ----------------------------------------------------------------------------------------


def test_a_new_key_works_and_a_revoked_one_ends_within_five_seconds(guarded: Guarded) -> None:
    key = create_key(guarded.url, "rotating", ["read"], PEPPER.encode())
    wait_for(guarded, key, 200)
    revoke_key(guarded.url, key.partition(".")[0])
    wait_for(guarded, key, 401)


def wait_for(service: Guarded, key: str, status: int) -> None:
    deadline = time.monotonic() + 5
    while service.ask("GET", "/ai/advanced-ml/models", key).status_code != status:
        assert time.monotonic() < deadline


def test_a_service_that_starts_without_a_database_says_that_it_does_not_know(
    server_url: str, folder: Path, tmp_path: Path
) -> None:
    settings_folder = tmp_path
    (settings_folder / "models").symlink_to(folder / "models")
    with start(settings_folder, server_url.replace("/postgres?", "/nowhere?")) as service:
        response = service.ask("POST", SCORE, "0123.secret")
        problem_of(response, 503, "KEYS_UNAVAILABLE")
        assert int(response.headers["retry-after"]) >= 1
        assert service.ask("GET", "/metrics", service.issuer.sign(scope="read")).status_code == 200
        assert service.ask("GET", "/livez").status_code == 200


def test_a_client_that_asks_too_often_waits(crm_url: str, folder: Path) -> None:
    with start(folder, crm_url, ai_rate_limit="2/hour") as service:
        busy, calm = (service.issuer.sign(sub=name, scope="score read") for name in ("busy", "calm"))
        statuses = [service.ask("POST", path, busy).status_code for path in (SCORE, LEGACY)]
        assert statuses == [200, 200]
        limited = service.ask("POST", SCORE, busy, Origin=ORIGIN)
        problem_of(limited, 429, "RATE_LIMITED")
        assert 1700 < int(limited.headers["retry-after"]) <= 1800
        assert limited.headers["access-control-allow-origin"] == ORIGIN
        assert service.ask("POST", SCORE, calm).status_code == 200
        assert service.ask("GET", "/metrics", busy).status_code == 200
        problem_of(service.ask("POST", SCORE), 401, "NOT_AUTHENTICATED")


def test_without_authentication_the_rate_is_that_of_an_address(crm_url: str, folder: Path) -> None:
    settings = build_settings(folder, crm_url, ai_rate_limit="1/hour")
    with serve(settings) as base, httpx2.Client(base_url=base) as http:
        assert http.post(SCORE, json=["lead_1"]).status_code == 200
        problem_of(http.post(SCORE, json=["lead_1"]), 429, "RATE_LIMITED")


# --- What is told -----------------------------------------------------------------------------------------


def test_openapi_says_what_each_route_asks_for_and_how_it_refuses(guarded: Guarded) -> None:
    first, document = (guarded.ask("GET", "/openapi.json", guarded.keys["read"]).json() for _ in range(2))
    assert first == document
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            scope = None if path in PUBLIC else "score" if path.endswith("predict-batch") else "read"
            assert operation.get("security") == (scope and [{"bearer": [scope]}])
            assert ({"401", "403"} <= operation["responses"].keys()) == (scope is not None)
    unavailable = document["paths"][SCORE]["post"]["responses"]["503"]
    assert {"KEYS_UNAVAILABLE", "OVERLOADED"} <= unavailable["content"]["application/problem+json"][
        "examples"
    ].keys()


def test_no_secret_is_in_any_log_event_metric_or_answer(crm_url: str, folder: Path, tmp_path: Path) -> None:
    issuer = Issuer("EdDSA")
    key = create_key(crm_url, "secretive", ["score", "read"], PEPPER.encode())
    revoked = create_key(crm_url, "secretive", ["score"], PEPPER.encode())
    revoke_key(crm_url, revoked.partition(".")[0])
    tokens = [issuer.sign(scope="score read"), issuer.sign(scope="read"), issuer.sign(aud="another")]
    credentials = [key, revoked, *tokens, f"{key}x"]
    environment = {
        "LOG_LEVEL": "DEBUG",
        "AUTH_MODE": "api_key,jwt",
        "AUTH_KEY_PEPPER": PEPPER,
        "AUTH_JWT_ISSUER": ISSUER,
        "AUTH_JWT_AUDIENCE": AUDIENCE,
        "AUTH_JWT_ALGORITHM": "EdDSA",
    }
    answers = []
    with published(issuer) as base:
        environment["AUTH_JWKS_URL"] = f"{base}/keys"
        with Service(tmp_path, crm_url, folder / "models", **environment) as service:
            with httpx2.Client(base_url=f"http://127.0.0.1:{service.port}") as http:
                for credential in credentials:
                    headers = {"Authorization": f"Bearer {credential}"}
                    answers.append(http.post(SCORE, json=["lead_1"], headers=headers))
                    answers.append(http.get("/metrics", headers=headers))
            assert {answer.status_code for answer in answers} == {200, 401, 403}
            assert service.stop() == 0
    with psycopg.connect(crm_url) as connection:
        events = connection.execute("SELECT ai_events::text FROM ai_events").fetchall()
    log_files = [path.read_bytes() for path in (tmp_path / "var").rglob("*") if path.is_file()]
    sinks = [service.stderr.read_bytes(), json.dumps(events).encode(), *log_files]
    sinks += [answer.content + str(answer.headers).encode() for answer in answers]
    secrets = [
        PEPPER,
        COOKIE,
        *(part for credential in credentials for part in re.split(r"\.", credential)[1:]),
    ]
    assert len(secrets) > 8
    assert not [secret for secret in secrets for sink in sinks if secret.encode() in sink]


# --- Starting ---------------------------------------------------------------------------------------------

LOOPBACK = ("127.0.0.1", "127.9.9.9", "::1", "localhost", "unix:/run/leadscore.sock")
REACHABLE = ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.0.0.1.nip.io", "unix")  # noqa: S104
COMPLETE = {
    "auth_key_pepper": PEPPER,
    "auth_jwks_url": "https://issuer.example/keys",
    "auth_jwt_issuer": ISSUER,
    "auth_jwt_audience": AUDIENCE,
}
PRODUCTION = {
    "database_url": "postgresql://x/y",
    "cors_origins": "https://crm.example",
    "ml_trusted_keys": base64.b64encode(bytes(32)).decode(),
}


@pytest.mark.parametrize("mode", ["none", "api_key", "jwt", "api_key,jwt"])
@pytest.mark.parametrize("app_env", ["development", "production"])
@pytest.mark.parametrize("host", [*LOOPBACK, *REACHABLE])
def test_production_without_authentication_starts_on_this_machine_only(
    mode: str, app_env: str, host: str
) -> None:
    fields = {"auth_mode": mode, "app_env": app_env, "host": host, **COMPLETE, **PRODUCTION}
    if app_env == "production" and mode == "none" and host in REACHABLE:
        with pytest.raises(ValidationError, match="AUTH_MODE"):
            Settings(_env_file=None, **fields)  # type: ignore[call-arg, arg-type]
    else:
        Settings(_env_file=None, **fields)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    ("mode", "missing"),
    [
        ("api_key", ["AUTH_KEY_PEPPER"]),
        ("jwt", ["AUTH_JWKS_URL", "AUTH_JWT_ISSUER", "AUTH_JWT_AUDIENCE"]),
        ("api_key,jwt", [name.upper() for name in COMPLETE]),
    ],
)
def test_half_of_an_authentication_is_none(mode: str, missing: list[str]) -> None:
    for name in missing:
        rest = {field: value for field, value in COMPLETE.items() if field != name.lower()}
        with pytest.raises(ValidationError, match=f"{name} must be set"):
            Settings(_env_file=None, auth_mode=mode, **rest)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"HOST": "0.0.0.0"}, "AUTH_MODE"),  # noqa: S104
        ({"HOST": "0.0.0.0", "AUTH_MODE": "jwt"}, "AUTH_JWKS_URL"),  # noqa: S104
        ({"AUTH_MODE": "basic"}, "AUTH_MODE"),
        ({"AUTH_JWKS_URL": "http://issuer.example/keys"}, "AUTH_JWKS_URL"),
        ({"AUTH_JWKS_URL": "file:///etc/passwd"}, "AUTH_JWKS_URL"),
        ({"AUTH_JWT_ALGORITHM": "HS256"}, "AUTH_JWT_ALGORITHM"),
        ({"AUTH_JWT_ALGORITHM": "none"}, "AUTH_JWT_ALGORITHM"),
        ({"AI_RATE_LIMIT": "0/second"}, "AI_RATE_LIMIT"),
        ({"AI_RATE_LIMIT": "10 per fortnight"}, "AI_RATE_LIMIT"),
    ],
)
def test_the_refusal_to_start_is_one_line_that_names_the_variable(
    changes: dict[str, str], named: str, tmp_path: Path
) -> None:
    environment = {"APP_ENV": "production", "VAR_DIR": str(tmp_path / "var")}
    environment |= {name.upper(): value for name, value in PRODUCTION.items()} | changes
    result = CliRunner().invoke(cli, ["serve"], env=environment)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert named in result.stderr
    assert not (tmp_path / "var").exists()
