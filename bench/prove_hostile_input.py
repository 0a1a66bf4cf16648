"""Proof: hostile input is boring. Whatever is sent, the answer is one of those that are documented.

Six ways in, all drawn from the seed: requests in process (bodies, queries, headers, paths), the body decoder
and the manifest reader byte by byte, damaged telemetry logs, bytes on a socket, Schemathesis over the
service's own OpenAPI document, and a state machine over everything that happens to a service. The leads and
the event table are in memory; what the real database makes of odd leads is in
`tests/test_ai_leads_contract.py`.
"""

import asyncio
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

from app.ai.scoring_requests import decode_lead_ids
from app.errors import CallerError
from app.http_protocol import ProblemProtocol
from bench import hostile_plants
from bench.figures import Figure
from bench.hostile_cases import draw_body, draw_cases
from bench.hostile_files import fuzz_manifests, fuzz_telemetry_logs
from bench.hostile_http import fuzz_socket, probe_socket
from bench.hostile_machine import ASKED, LEADS, VERSIONS, run_machine
from bench.hostile_oracle import (
    ACCEPTED_NEGATIVE,
    ECHO,
    FINDINGS,
    MOST_LEADS,
    REFUSED_POSITIVE,
    SERVER_ERROR,
    UNDOCUMENTED,
    Findings,
    Oracle,
    is_scoring_request,
)
from bench.in_memory_service import InMemoryService, Wrap
from bench.openapi_fuzz import fuzz
from bench.proof import PlantedBug, ProofRun, run_proof
from tests.in_process import serve_app
from tests.lead_models import publish_lead_model

PROMISE = "hostile input is answered with a documented refusal, and never repeated"
BROKEN_INVARIANT, FUZZER = "broken invariants", "findings of the fuzzer"
GROUP = 100

SHORT = {
    "requests": 8000,
    "bodies": 6000,
    "manifests": 8000,
    "logs": 80,
    "sockets": 800,
    "fuzzer": 12,
    "machine": 10,
}
LONG = {
    "requests": 300_000, "bodies": 400_000, "manifests": 250_000, "logs": 4000, "sockets": 40_000,
    "fuzzer": 1000, "machine": 1000,
}  # fmt: skip


def measure(run: ProofRun) -> Sequence[Figure]:
    """Runs all of it."""
    amount = LONG if run.long else SHORT
    found = ask_in_process(run.seed, amount["requests"])
    found.add(fuzz_decoder(run.seed, amount["bodies"]))
    found.add(fuzz_manifests(run.seed, amount["manifests"]))
    found.add(fuzz_telemetry_logs(run.seed, amount["logs"]))
    found.add(_ask_over_a_socket(run.seed, amount))
    found.add(_drive_machine(run.seed, amount["machine"]))
    for kind, example in found.examples.items():
        print(f"{kind}: {example}", file=sys.stderr)
    cases = Figure("hostile cases", found.cases, 1_000_000 if run.long else 20_000, at_least=True, unit="")
    return [cases, *_build_figures(found)]


def ask_in_process(seed: int, count: int, wrap: Wrap = lambda app: app) -> Findings:
    """Asks the service, many at once, as its telemetry likes it."""

    async def ask(service: InMemoryService) -> Findings:
        await service.open()
        oracle, findings = Oracle(service.fastapi.openapi()), Findings()
        cases = draw_cases(seed, count, ASKED)
        while group := list(islice(cases, GROUP)):
            answers = await asyncio.gather(*(service.ask(case.request) for case in group))
            for case, answer in zip(group, answers, strict=True):
                findings.note(oracle.judge(case, answer), (case, answer))
        await service.close()
        return findings

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(ask(_build_service(Path(folder), wrap)))


def fuzz_decoder(seed: int, count: int) -> Findings:
    """Decodes bodies beside a reader that shares no line with the decoder."""
    findings, random = Findings(), Random(seed)  # noqa: S311
    for _ in range(count):
        body = draw_body(random, f"mark{random.getrandbits(64):016x}", ASKED)
        findings.note(_judge_decoding(body), body)
    return findings


def _judge_decoding(body: bytes) -> str | None:
    try:
        decode_lead_ids(body, MOST_LEADS)
    except CallerError:
        return REFUSED_POSITIVE if is_scoring_request(body) else None
    except Exception:  # noqa: BLE001 - exactly what is looked for
        return SERVER_ERROR
    return None if is_scoring_request(body) else ACCEPTED_NEGATIVE


def _ask_over_a_socket(seed: int, amount: dict[str, int]) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        with serve_app(_build_service(Path(folder))) as base:
            findings = probe_socket(_address(base))
            findings.add(fuzz_socket(_address(base), seed, amount["sockets"]))
            fuzzed = fuzz(base, Path(folder), seed=seed, cases_per_operation=amount["fuzzer"])
        findings.note(FUZZER if fuzzed.status else None, fuzzed.report[-3000:])
        findings.cases += fuzzed.cases
        return findings


def _probe(protocol: type[ProblemProtocol]) -> Findings:
    with tempfile.TemporaryDirectory() as folder, serve_app(_build_service(Path(folder)), protocol) as base:
        return probe_socket(_address(base))


def _address(base: str) -> tuple[str, int]:
    url = urlsplit(base)
    return url.hostname or "", url.port or 0


def _drive_machine(seed: int, examples: int, wrap: Wrap = lambda app: app) -> Findings:
    findings = Findings()
    asked, broken = run_machine(seed, examples, wrap)
    findings.cases += asked
    findings.note(BROKEN_INVARIANT if broken else None, broken)
    return findings


def _build_service(folder: Path, wrap: Wrap = lambda app: app) -> InMemoryService:
    publish_lead_model(folder / "models", VERSIONS[0])
    return InMemoryService(folder, LEADS, wrap)


def _build_figures(found: Findings) -> list[Figure]:
    return [Figure(kind, found.counts[kind], 0, unit="") for kind in (*FINDINGS, BROKEN_INVARIANT, FUZZER)]


def _plant(shows: str, look: Callable[[int], Findings]) -> PlantedBug:
    return PlantedBug(lambda run: _build_figures(look(run.seed)), shows)


def _plant_in_requests(shows: str, wrap: Wrap) -> PlantedBug:
    return _plant(shows, lambda seed: ask_in_process(seed, 600, wrap))


def _plant_in_machine(wrap: Wrap) -> PlantedBug:
    return _plant(BROKEN_INVARIANT, lambda seed: _drive_machine(seed, 10, wrap))


PLANTED_BUGS: dict[str, PlantedBug] = {
    "bodies decoded and refused by the framework": _plant_in_requests(
        UNDOCUMENTED, hostile_plants.decode_as_the_framework_does
    ),
    "a refusal that quotes": _plant_in_requests(ECHO, hostile_plants.echo_what_is_refused),
    "a status nobody documented": _plant_in_requests(
        UNDOCUMENTED, hostile_plants.answer_an_undocumented_status
    ),
    "the last of two keys counts": _plant_in_requests(
        ACCEPTED_NEGATIVE, hostile_plants.keep_the_last_of_two_keys
    ),
    "an answer that names another model": _plant_in_machine(hostile_plants.name_another_model),
    "an answer without its event": _plant_in_machine(hostile_plants.forget_events),
    "heads without an end": _plant(ACCEPTED_NEGATIVE, lambda _seed: _probe(hostile_plants.EndlessHeads)),
    "a manifest that is only decoded": _plant(
        ACCEPTED_NEGATIVE, lambda seed: fuzz_manifests(seed, 500, hostile_plants.read_manifest_carelessly)
    ),
}

if __name__ == "__main__":
    run_proof(PROMISE, measure, PLANTED_BUGS)
