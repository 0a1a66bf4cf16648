"""Proof: personal data stays in the CRM. Canaries in every personal column and from callers, seen by nobody.

The service is driven on good days and bad ones (a refused model, a lead source that cannot be cast, a row
that breaks a CHECK, no database, a telemetry log that cannot be written, an unhandled exception), and
everything that comes out is searched for every canary in every form.

Not counted as leaks: a lead ID that a caller sent, in the body of the answer to that caller (it says which
lead is meant), and the CRM's own tables. `lead_scores` holds UUIDs and numbers and is the CRM's too. Left
out: a core dump, because a process that scores a lead holds it in memory while it does; the service lets none
be written (`app.own_memory`).
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import psycopg

from app.ai.prediction_cache import PredictionCache
from bench.canaries import Hit, Scanner
from bench.careless_service import (
    BODIES,
    CACHE,
    LEAKS,
    SINKS,
    CarelessCache,
)
from bench.figures import Figure
from bench.hostile_cases import JSON
from bench.in_memory_service import HttpRequest, InMemoryService
from bench.personal_crm import CHOKING_VIEW, FEATURES
from bench.personal_ward import People, Ward, open_ward
from bench.proof import PlantedBug, ProofRun, run_proof
from tests.model_files import V2, manifest_of, publish
from tests.service import PREDICT, Service

PROMISE = "personal data stays in the CRM, in every sink, form and fault"
PEOPLE, LONG_PEOPLE = len(LEAKS), 400
LONGEST_WAIT_SECONDS = 20.0


def drive_faults(ward: Ward) -> None:
    """Drives the service through its good days and its bad ones."""
    asyncio.run(_drive_working(ward))
    service = ward.service("unwritable")
    service.var_dir.mkdir()
    (service.var_dir / "telemetry").write_text("a file where a directory should be")
    asyncio.run(_drive_once(ward, service, "telemetry log unwritable"))
    asyncio.run(_drive_once(ward, ward.service("failing"), "unhandled exception"))


async def _drive_once(ward: Ward, service: Service, case: str) -> None:
    with service:
        await ward.drive(service, case, thorough=False)
        await ward.collect(service)
        service.stop()
    ward.collect_at_last(service)


async def _drive_working(ward: Ward) -> None:
    with ward.service("working", LEAD_SOURCE="canary_source") as service:
        await ward.drive(service, "working", thorough=True)
        await ward.collect(service)
        artifact = publish(service.var_dir.parent / "models", V2, feature_set=FEATURES.to_json())
        artifact.write_bytes(artifact.read_bytes()[::-1])
        assert manifest_of(artifact).exists()
        await _drive_until(ward, service, "model refused", b"model_refused")
        with psycopg.connect(ward.url, autocommit=True) as connection:
            # What the server says of a row that breaks a rule quotes the row.
            connection.execute("ALTER TABLE ai_events ADD CONSTRAINT no_more CHECK (action = '') NOT VALID")
            await _drive_until(ward, service, "CHECK violated", b"telemetry_shipping_delayed")
            connection.execute("ALTER TABLE ai_events DROP CONSTRAINT no_more")
            connection.execute("DROP VIEW canary_source")
            connection.execute(f"CREATE VIEW canary_source AS {CHOKING_VIEW}")
            await _drive_until(ward, service, "column of a wrong type", b'"sqlstate":"22P02"')
        with psycopg.connect(ward.url.replace("/crm?", "/postgres?"), autocommit=True) as connection:
            connection.execute("ALTER DATABASE crm WITH ALLOW_CONNECTIONS false")
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'crm'")
            await ward.drive(service, "database down", thorough=True)
            connection.execute("ALTER DATABASE crm WITH ALLOW_CONNECTIONS true")
        await ward.collect(service)
        service.stop()
    ward.collect_at_last(service)


async def _drive_until(ward: Ward, service: Service, case: str, logged: bytes) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    before = service.stderr.read_bytes().count(logged)
    while service.stderr.read_bytes().count(logged) == before:
        assert time.monotonic() < deadline, f"{case}: not seen"
        await ward.drive(service, case, thorough=False)


def dump_cache(people: People, kind: type[PredictionCache] = PredictionCache) -> bytes:
    """Returns everything a prediction cache holds after these people were asked for."""
    leads = {person["external_ref"].lower(): {**person, "gpa": 2.5} for person in people}

    async def fill(service: InMemoryService) -> bytes:
        await service.open(kind)
        body = json.dumps([person["external_ref"] for person in people]).encode()
        answer = await service.ask(HttpRequest("POST", PREDICT, b"", (JSON,), body))
        assert answer.json()["successful_predictions"] == len(people)
        held = vars(service.cache)
        await service.close()
        return b"\n".join(map(_dump, held.values()))

    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder, "models"), feature_set=FEATURES.to_json())
        return asyncio.run(fill(InMemoryService(Path(folder), leads)))


def _dump(value: object) -> bytes:
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


def search(
    sinks: Mapping[str, Sequence[bytes]], people: People, typed: Sequence[str]
) -> tuple[dict[str, set[Hit]], int]:
    """Returns what was found in each sink, and how many forms were looked for."""
    canaries = {
        f"{number} {name}": value for number, person in enumerate(people) for name, value in person.items()
    }
    references = {name for name in canaries if name.endswith("external_ref")}
    canaries |= {f"typed {number}": text for number, text in enumerate(typed)} | {
        "asked": "who.else@canary.example"
    }
    scanner = Scanner(canaries)
    found = {sink: set().union(*map(scanner.scan, contents)) for sink, contents in sinks.items()}
    # An answer says which lead it is about in the caller's words.
    found[BODIES] = {hit for hit in found[BODIES] if hit.canary not in references | {"asked"}}
    return found, scanner.forms


def measure(run: ProofRun) -> Sequence[Figure]:
    """Drives everything and searches everything."""
    count = LONG_PEOPLE if run.long else PEOPLE
    with open_ward(run.seed, count) as ward:
        drive_faults(ward)
        sinks = {**ward.sinks, CACHE: [dump_cache(ward.people)]}
        found, forms = search(sinks, ward.people, ward.typed)
        statuses = ward.statuses
    for sink, hits in found.items():
        if hits:
            print(f"{sink}: {sorted(hits)[:5]}")
    expected = {
        "working": 200,
        "database down": 503,
        "column of a wrong type": 500,
        "unhandled exception": 500,
    }
    seen = sum(status in statuses[case] for case, status in expected.items()) + len(statuses) - len(expected)
    planted = leaks_found(run.seed)
    return [
        Figure(
            "canaries", count * len(ward.people[0]) + len(ward.typed) + 1, count * 9, at_least=True, unit=""
        ),
        Figure("good and bad days", seen, 7, at_least=True, unit=""),
        Figure("sinks x forms", len(found) * forms, len(SINKS) * 12, at_least=True, unit=""),
        Figure("hits", sum(map(len, found.values())), 0, unit=""),
        Figure("planted leaks found", sum(planted.values()), len(LEAKS), at_least=True, unit=""),
    ]


@cache
def leaks_found(seed: int) -> dict[str, bool]:
    """Returns which of the careless service's leaks are found where they were planted."""
    with open_ward(seed, PEOPLE) as ward:
        file = ward.folder / "people.json"
        file.write_text(json.dumps(ward.people))
        asyncio.run(_drive_once(ward, ward.service("careless", CARELESS=str(file)), "careless"))
        sinks = {**ward.sinks, CACHE: [dump_cache(ward.people, CarelessCache)]}
        found, _ = search(sinks, ward.people, ward.typed)
    return {
        name: any(hit.canary == f"{number} {leak.column}" for hit in found[leak.sink])
        for number, (name, leak) in enumerate(LEAKS.items())
    }


def _plant(name: str) -> PlantedBug:
    return PlantedBug(lambda run: [Figure("hits", leaks_found(run.seed)[name], 0, unit="")], "hits")


if __name__ == "__main__":
    run_proof(PROMISE, measure, {name: _plant(name) for name in LEAKS})
