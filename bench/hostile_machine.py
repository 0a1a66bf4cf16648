"""A state machine over the running service: whatever happens in whatever order, five things stay true.

It asks well and badly, publishes and withdraws models, damages them, lets caches expire, changes leads,
closes and reopens everything, takes the database away and brings it back, and swaps the model under a request
that is under way. Always: one event for each answered request; documented codes only; the counts of an
answer add up; a batch equals its leads asked one by one, bit for bit; an answer names one model, and its
numbers are that model's. For `prove_hostile_input`.
"""

import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from app.ai.domain import start_of_day
from app.ai.model_bundle import ModelBundle
from app.ai.model_manifest import MANIFEST_SUFFIX
from app.ai.predictor import score_leads
from app.errors import ModelNotReadyError
from bench.hostile_cases import JSON, LEGACY, READING_PATHS, SCORE, Case, draw_body, mutate
from bench.hostile_oracle import Oracle
from bench.in_memory_service import (
    CACHE_SECONDS,
    MODEL_SECONDS,
    POLICY,
    HttpAnswer,
    HttpRequest,
    InMemoryService,
    Wrap,
)
from tests.fakes import build_columns
from tests.lead_models import build_lead_bundle, build_lead_rows, publish_lead_model

VERSIONS = ("20260101_120000", "20260201_120000", "20260301_120000")
UUID = "6f1c0c1e-5f0b-4a57-9a1c-0c6a3f0e9b11"
LEADS: dict[str, Any] = {
    **{f"lead_{number}": row for number, row in enumerate(build_lead_rows(10, 4))},
    UUID: build_lead_rows(1, 5)[0],
    "twice": "ambiguous",
}
ASKED = (*LEADS, "nobody", UUID.upper(), "a@b.example")
STEPS = 40


@cache
def list_bundles() -> dict[str, ModelBundle]:
    """Returns every model there may be, by version."""
    return {version: build_lead_bundle(version, seed) for seed, version in enumerate(VERSIONS, 1)}


@cache
def store_of_models() -> Path:
    """Returns a directory with every model there may be."""
    folder = Path(tempfile.mkdtemp(prefix="leadscore-models-"))
    for seed, version in enumerate(VERSIONS, 1):
        publish_lead_model(folder, version, seed)
    return folder


def score_alone(version: str, lead: dict[str, object]) -> tuple[float, float] | None:
    """Returns probability and coverage of one lead by one model, None if it is rejected."""
    bundle = list_bundles()[version]
    scored = score_leads(
        bundle, build_columns([lead], bundle.input_columns), start_of_day(time.time()), POLICY
    )
    answer = scored.answers[0]
    return None if scored.rejected[0] else (float(answer["probability"]), float(answer["coverage"]))


class ServiceMachine(RuleBasedStateMachine):
    """The rules; a broken one raises `AssertionError`."""

    wrap: Wrap = staticmethod(lambda app: app)
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path(tempfile.mkdtemp(prefix="leadscore-machine-"))
        self._loop = asyncio.Runner()
        self._service = InMemoryService(self._folder, LEADS, type(self).wrap)
        self._service.models_dir.mkdir()
        self._oracle = _build_oracle()
        self._answered: dict[str, int] = {}
        self._loop.run(self._service.open())
        self._publish(VERSIONS[0])

    def teardown(self) -> None:
        """Brings the database back, closes, and compares answers with events."""
        try:
            self._service.set_database(up=True)
            self._loop.run(self._service.close())
            recorded = Counter(event.request_id for event in self._service.sink.events.values())
            assert recorded == Counter(self._answered.keys()), "not one event for each answered request"
            for event in self._service.sink.events.values():
                assert json.loads(event.meta)["status"] == self._answered[event.request_id or ""]
        finally:
            self._loop.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    @rule(batches=st.lists(st.lists(st.sampled_from(ASKED), min_size=1, max_size=6), min_size=1, max_size=5))
    def ask(self, batches: list[list[str]]) -> None:
        """Proper requests, to both routes in turn."""
        for number, ids in enumerate(batches):
            legacy = number % 2 == 1
            self._check(ids, self._ask(LEGACY if legacy else SCORE, json.dumps(ids).encode()), legacy=legacy)

    @rule(ids=st.lists(st.sampled_from(ASKED), min_size=2, max_size=6))
    def ask_together_and_alone(self, ids: list[str]) -> None:
        """A batch, and the same leads one by one."""
        together = self._ask(SCORE, json.dumps({"lead_ids": ids}).encode())
        alone = [self._ask(SCORE, json.dumps([lead_id]).encode()) for lead_id in ids]
        good = [answer.json() for answer in alone if answer.status == 200]
        assert (together.status == 200) == bool(good), "a batch is refused for one of its leads"
        if good:
            singly = [entry for answer in good for entry in answer["predictions"]]
            assert together.json()["predictions"] == singly, "a batch differs from its leads asked one by one"

    @rule(seed=st.integers(0, 2**32))
    def ask_badly(self, seed: int) -> None:
        """Hostile bodies."""
        random, mark = Random(seed), f"mark{seed:016x}"  # noqa: S311
        for path in (SCORE, LEGACY) * 3:
            self._ask(path, draw_body(random, mark, ASKED), mark.encode())

    @rule(path=st.sampled_from(READING_PATHS))
    def look(self, path: str) -> None:
        """What ops ask."""
        request = HttpRequest("GET", path)
        self._judge(Case(request, b"\0"), self._loop.run(self._service.ask(request)))

    @rule(version=st.sampled_from(VERSIONS))
    def publish_model(self, version: str) -> None:
        """A model appears, and the registry looks at once."""
        self._publish(version)

    @rule(version=st.sampled_from(VERSIONS))
    def lose_model(self, version: str) -> None:
        """A model's files go."""
        for file in self._service.models_dir.glob(f"*{version}*"):
            file.unlink()
        self._look_at_models()

    @rule(version=st.sampled_from(VERSIONS), seed=st.integers(0, 2**32))
    def damage_model(self, version: str, seed: int) -> None:
        """A few bytes of one of a model's files go bad."""
        random = Random(seed)  # noqa: S311
        files = sorted(self._service.models_dir.glob(f"*{version}*"))
        for file in random.sample(files, min(len(files), 1)):
            file.write_bytes(mutate(random, file.read_bytes()))
        self._look_at_models()

    @rule(seconds=st.sampled_from((1.0, CACHE_SECONDS + 1, MODEL_SECONDS + 1)))
    def let_time_pass(self, seconds: float) -> None:
        """Answers and models expire, the breaker closes again."""
        self._service.clock.now += seconds
        self._service.trust_cache()

    @rule(lead_id=st.sampled_from(("lead_0", "lead_1")), seed=st.integers(1, 50))
    def change_lead(self, lead_id: str, seed: int) -> None:
        """The CRM changes a lead, and the listener says so."""
        self._service.leads.leads[lead_id] = build_lead_rows(1, seed)[0]
        self._service.cache.forget_all()

    @rule()
    def restart(self) -> None:
        """Everything that lives as long as a worker is closed and opened again."""
        self._loop.run(self._service.close())
        self._loop.run(self._service.open())

    @rule(up=st.booleans())
    def move_database(self, up: bool) -> None:
        """The database goes, or comes back."""
        self._service.set_database(up=up)

    @precondition(lambda self: self._service.database_is_up)
    @rule(version=st.sampled_from(VERSIONS), ids=st.lists(st.sampled_from(ASKED), min_size=1, max_size=4))
    def swap_under_a_request(self, version: str, ids: list[str]) -> None:
        """The model changes while a request waits for its leads."""
        self._service.cache.forget_all()
        request = self._build(SCORE, json.dumps(ids).encode())
        answer = self._loop.run(self._ask_across(request, version))
        self._judge(Case(request, b"\0"), answer)
        self._check(ids, answer, legacy=False)

    async def _ask_across(self, request: HttpRequest, version: str) -> HttpAnswer:
        leads = self._service.leads
        leads.gate = asyncio.Event()
        asked = asyncio.create_task(self._service.ask(request))
        reached = asyncio.create_task(leads.reached.wait())
        await asyncio.wait({asked, reached}, return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()
        self._publish(version)
        leads.gate.set()
        answer = await asked
        leads.gate = None
        leads.reached.clear()
        return answer

    def _publish(self, version: str) -> None:
        for file in store_of_models().glob(f"*{version}*"):
            # As a publisher does: the new file takes the old one's place at once.
            new = self._service.models_dir / f".{file.name}"
            shutil.copyfile(file, new)
            new.replace(self._service.models_dir / file.name)
        self._look_at_models()

    def _look_at_models(self) -> None:
        with suppress(ModelNotReadyError):
            self._service.registry.load()

    def _build(self, path: str, body: bytes) -> HttpRequest:
        name = f"request-{len(self._answered)}"
        return HttpRequest("POST", path, b"", (JSON, (b"x-request-id", name.encode())), body)

    def _ask(self, path: str, body: bytes, mark: bytes = b"\0") -> HttpAnswer:
        request = self._build(path, body)
        answer = self._loop.run(self._service.ask(request))
        self._judge(Case(request, mark), answer)
        return answer

    def _judge(self, case: Case, answer: HttpAnswer) -> None:
        type(self).steps += 1
        finding = self._oracle.judge(case, answer)
        assert finding is None, finding
        if case.request.method == "POST":
            self._answered[answer.header(b"x-request-id")] = answer.status
        if answer.status == 503:
            assert int(answer.header(b"retry-after") or "1") >= 1

    def _check(self, ids: list[str], answer: HttpAnswer, *, legacy: bool) -> None:
        if answer.status == 503:
            return
        assert answer.status == 200
        content = answer.json()
        predictions = content["predictions"]
        assert content["total_processed"] == len(ids), "the counts do not add up"
        assert content["successful_predictions"] == len(predictions)
        version = content["model_used" if legacy else "model_version"]
        if not legacy:
            assert content["failed_predictions"] == len(content["errors"])
            assert len(ids) == len(predictions) + len(content["errors"]), "the counts do not add up"
            reference = list_bundles()[version].ref
            assert (content["model_id"], content["model_version"]) == (reference.model_id, version)
            assert content["model_sha256"] == _digests()[version], "an answer names two models"
        for prediction in predictions:
            lead = self._service.leads.leads[prediction["lead_id"].lower()]
            wanted = score_alone(version, lead)
            assert wanted is not None
            assert prediction["probability"] == wanted[0], "an answer has another model's numbers"


@cache
def _digests() -> dict[str, str]:
    manifests = [json.loads(file.read_bytes()) for file in store_of_models().glob(f"*{MANIFEST_SUFFIX}")]
    return {manifest["version"]: manifest["sha256"] for manifest in manifests}


@cache
def _build_oracle() -> Oracle:
    with tempfile.TemporaryDirectory() as folder:
        return Oracle(InMemoryService(Path(folder), {}).fastapi.openapi())


def run_machine(seed: int, examples: int, wrap: Wrap = lambda app: app) -> tuple[int, str | None]:
    """Returns how many requests were judged, and what broke, if anything."""

    class Machine(ServiceMachine):
        pass

    Machine.wrap = staticmethod(wrap)
    given = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=given)
    except AssertionError as exc:
        return Machine.steps, str(exc).partition("\n")[0] or "an assertion"
    return Machine.steps, None
