"""A CRM full of canaries, and the requests that carry more of them wherever a caller can write.

For `prove_personal_data` and `tests/test_personal_data.py`.
"""

import json
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import psycopg

from app.ai.domain import InputColumn
from app.ai.features import FeatureSet, FeatureSpec
from bench.hostile_cases import LEGACY
from tests.service import PREDICT

FEATURES = FeatureSet(
    (
        FeatureSpec("gpa", "value", (InputColumn("gpa", "number"),), {}, "Grade."),
        FeatureSpec(
            "country",
            "level",
            (InputColumn("country", "text"),),
            {"levels": {"germany": 0.5, "india": 0.25}, "unseen": 0.0},
            "Country.",
        ),
        FeatureSpec(
            "web", "one_of", (InputColumn("source", "text"),), {"values": ["web"]}, "Came by the web."
        ),
    )
)
"""A model that reads personal text, so that the text goes all the way through."""

CHOKING_VIEW = (
    "SELECT id AS lead_id, external_ref, created_at, source, notes::numeric AS gpa, country,"
    " email::integer AS touchpoint_count FROM people"
)
"""A lead source whose columns cannot be cast: the database quotes what it chokes on."""

Request = tuple[str, str, bytes, list[tuple[str, str]]]


def draw_people(seed: int, count: int) -> list[dict[str, str]]:
    """Returns people whose every personal column is a canary, most of them not in ASCII."""
    random = Random(seed)  # noqa: S311

    def word() -> str:
        return "".join(random.choices("bcdfghjklmnpqrstvwxz", k=9))

    return [
        {
            "full_name": f"Zoë {word().title()} Ångström-{word().title()}",
            "email": f"{word()}.{word()}@canary.example",
            "phone": f"+44-7700-{random.randrange(10**9):09}",
            "notes": f"Prefers évenings, mother is {word()} {word()}",
            "source": f"canary-source-{word()}",
            "country": f"canary-country-{word()}",
            "education_level": f"canary-level-Ünder-{word()}",
            "note": f"Called at nïght about a {word()} scholarship",
            "external_ref": f"ref.{word()}@canary.example",
        }
        for _ in range(count)
    ]


def add_people(url: str, people: Sequence[Mapping[str, str]], **others: Any) -> None:
    """Writes them into the CRM; `others` are further columns of everybody."""
    with psycopg.connect(url) as connection:
        for person in people:
            columns = {name: value for name, value in person.items() if name != "note"} | others
            identity = uuid.uuid4()
            connection.execute(
                f"INSERT INTO people (id, gpa, created_at, {', '.join(columns)})"
                f" VALUES (%s, 2.5, now(), {', '.join(['%s'] * len(columns))})",
                [identity, *columns.values()],
            )
            connection.execute(
                "INSERT INTO touchpoints (person_id, kind, direction, occurred_at, note)"
                " VALUES (%s, 'call', 'inbound', now(), %s)",
                [identity, person["note"]],
            )


def hostile_requests(typed: str, reference: str) -> Iterator[Request]:
    """Yields method, path, body and headers of requests that carry `typed` wherever a caller can write.

    `reference` is a lead ID of the CRM's own, which may look like an e-mail address.
    """
    quoted = urllib.parse.quote(typed)
    good = json.dumps([reference]).encode()
    latin = typed.encode().decode(
        "latin-1"
    )  # the client encodes heads as UTF-8; this gives the bytes of `typed`
    yield "POST", f"{PREDICT}?include=reasons", good, []
    yield "POST", f"{PREDICT}?include=reasons", json.dumps([reference] * 101).encode(), []
    for path in (PREDICT, LEGACY):
        yield "POST", path, good, []
        for body in _hostile_bodies(typed, reference):
            yield "POST", path, body, []
        yield "POST", f"{path}?include={quoted}", good, []
        yield "POST", f"{path}?{quoted}=1", good, []
        yield "PUT", path, good, []
        yield "POST", f"{path}/{quoted}", good, []
        for header in (
            "X-Request-ID",
            "traceparent",
            "Origin",
            "Content-Encoding",
            "Accept",
            "Authorization",
        ):
            yield "POST", path, good, [(header, latin)]
        yield "OPTIONS", path, b"", [("Origin", latin), ("Access-Control-Request-Method", latin)]
    reading = ("/ai/advanced-ml/health", "/ai/advanced-ml/models", "/readyz", "/docs", "/openapi.json")
    for path in (*reading, f"/{quoted}", f"/ai/advanced-ml/models/{quoted}/card"):
        yield "GET", path, b"", []


def _hostile_bodies(typed: str, reference: str) -> list[bytes]:
    raw = typed.encode()
    return [
        json.dumps([typed]).encode(),
        json.dumps([typed], ensure_ascii=False).encode(),
        raw,
        b'["' + raw,
        json.dumps({typed: [1]}).encode(),
        json.dumps({"lead_ids": typed}).encode(),
        json.dumps([1, {typed: 2}]).encode(),
        json.dumps([typed * 20_000]).encode(),
        b'[NaN, "' + raw + b'"]',
        json.dumps([reference]).encode()[:-1],
    ]
