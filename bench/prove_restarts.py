"""Proves that a new model and a new worker cost nobody an answer, and that no answer mixes two models.

Two workers answer a steady load from clients that behave as a proxy does: they keep connections alive, open a
new one after `Connection: close`, and never send a request again. Meanwhile two models are published in turn,
each time as a new version, and every answer must have exactly the numbers of the model it names. SIGHUP
replaces the workers one by one, again and again. In the end SIGTERM stops the service, and the load stays
away once readiness fails, as a load balancer's would.

make prove-restarts [LONG=1] [SEED=n]
"""

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.data import Stage, open_stage, sample_lead_ids
from bench.figures import Figure
from bench.load import build_request, read_answer
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.servers import Server, start_service, worker_pids
from bench.small_models import publish_small_model, remove_small_model

PROMISE = "hot swaps and restarts drop no request, and no answer mixes two models"
LEADS = 10_000
CLIENTS = 4
PAUSE_SECONDS = 0.05
SWAP_SECONDS = 0.1
KEPT_MODELS = 4
LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 90.0


def measure(run: ProofRun) -> Sequence[Figure]:
    """Measures 50 swaps and 20 restarts of workers, or five times as many in the long run."""
    swaps, restarts = (250, 100) if run.long else (50, 20)
    return asyncio.run(_measure(run, swaps, restarts))


def without_drain(run: ProofRun) -> Sequence[Figure]:
    """The same with workers that are killed, not asked."""
    return asyncio.run(_measure(run, 2, 2, killed=True))


def swap_in_place(run: ProofRun) -> Sequence[Figure]:
    """The same with a registry that turns one model into the other while it answers."""
    return asyncio.run(_measure(run, 6, 0, plant="swap-in-place"))


async def _measure(
    run: ProofRun, swaps: int, restarts: int, *, killed: bool = False, plant: str | None = None
) -> Sequence[Figure]:
    with open_stage(Path("var/bench"), LEADS) as stage, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        models = directory / "models"
        publish_small_model(models, 0)
        settings = {
            "WORKERS": "1" if plant else "2", "ML_CACHE_TTL_SECONDS": str(LOOK_SECONDS),
            "ML_PREDICTION_CACHE_TTL_SECONDS": "0", "DRAIN_SECONDS": "1",
        }  # fmt: skip
        with start_service(
            "restarts", Stage(stage.url, models), directory, plant=plant, **settings
        ) as server:
            load = _Load(server.port, sample_lead_ids(stage.url, 20, run.seed % 100 / 100))
            await load.learn(0)
            publish_small_model(models, 1)
            await load.learn(1)
            clients = [asyncio.create_task(load.run()) for _ in range(CLIENTS)]
            replaced, _ = await asyncio.gather(
                _restart(server, restarts, killed=killed), _swap(models, load, swaps)
            )
            status, seconds = await _stop(server, load)
            await asyncio.gather(*clients)
    return (
        Figure(f"requests that failed, of {load.answered + load.failed:,}", load.failed, 0, unit=""),
        Figure("answers with numbers of another model than they name", load.mixed, 0, unit=""),
        Figure("models swapped under load", len(load.versions) - 1, swaps, True, unit=""),
        Figure("workers replaced under load", replaced, restarts, True, unit=""),
        Figure("exit status after SIGTERM under load", status, 0, unit=""),
        Figure("SIGTERM to the end", seconds, 10, unit="s"),
    )


async def _swap(models: Path, load: "_Load", swaps: int) -> None:
    for number in range(2, swaps + 2):
        publish_small_model(models, number)
        remove_small_model(models, number - KEPT_MODELS)
        await asyncio.sleep(SWAP_SECONDS)
        await load.wait_for(number)


async def _restart(server: Server, restarts: int, *, killed: bool) -> int:
    """Returns how many workers were replaced."""
    replaced = 0
    while replaced < restarts:
        before = worker_pids(server.pid)
        gone = before[:1] if killed else before
        os.kill(gone[0] if killed else server.pid, signal.SIGKILL if killed else signal.SIGHUP)
        asked = time.monotonic()
        while len(now := worker_pids(server.pid)) != len(before) or set(now) & set(gone):
            if time.monotonic() - asked > PATIENCE_SECONDS:
                break  # a new worker was not ready in time, and the old one was kept: ask again
            await asyncio.sleep(0.05)
        replaced += len(set(before) - set(now))
    return replaced


async def _stop(server: Server, load: "_Load") -> tuple[int, float]:
    """Returns the service's exit status, and the seconds it took to end."""
    began = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    while await _is_ready(server.port):  # noqa: ASYNC110  another process decides
        await asyncio.sleep(0.02)
    load.stopped = True
    ended = await asyncio.to_thread(os.waitid, os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    return (ended.si_status if ended else -1), time.monotonic() - began


async def _is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:  # by a service that does not drain: nobody listens any more
        return False
    writer.write(b"GET /readyz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
    try:
        answer = await reader.read()
    except ConnectionResetError:  # by a worker that was killed: there is another one
        return True
    finally:
        writer.close()
    return answer.startswith(b"HTTP/1.1 200")


@dataclass
class _Load:
    """Clients that ask for the same leads, and compare each answer with what the model it names must say."""

    port: int
    lead_ids: list[str]
    answered: int = 0
    failed: int = 0
    mixed: int = 0
    stopped: bool = False
    versions: set[str] = field(default_factory=set)
    _expected: list[list[float]] = field(default_factory=list)
    _newest: int = 0

    async def learn(self, number: int) -> None:
        """Waits until all workers serve the model `number`, and notes what it answers."""
        request, streak, body = self._request(), 0, b""
        while streak < 20:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request)
            _, _, body = await read_answer(reader)
            writer.close()
            streak = streak + 1 if _number(json.loads(body)) == number else 0
            await asyncio.sleep(LOOK_SECONDS / 10)
        self._expected.append([entry["probability"] for entry in json.loads(body)["predictions"]])

    async def wait_for(self, number: int) -> None:
        """Waits until a worker answers with the model `number`."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE_SECONDS:
            if self._newest >= number:
                return
            await asyncio.sleep(0.02)

    async def run(self) -> None:
        """Asks until it is stopped."""
        request, connection = self._request(), None
        while not self.stopped:
            try:
                reader, writer = connection or await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(request)
                status, closes, body = await read_answer(reader)
            except (OSError, asyncio.IncompleteReadError):
                self.failed += 1
                connection = None
                continue
            self._judge(status, body)
            connection = (reader, writer)
            if closes:
                writer.close()
                connection = None
            await asyncio.sleep(PAUSE_SECONDS)
        if connection:
            connection[1].close()

    def _judge(self, status: int, body: bytes) -> None:
        if status != 200:
            self.failed += 1
            return
        self.answered += 1
        answer = json.loads(body)
        number = _number(answer)
        self.versions.add(answer["model_version"])
        self._newest = max(self._newest, number)
        numbers = [entry["probability"] for entry in answer["predictions"]]
        names = answer["model_id"].endswith(answer["model_version"])
        self.mixed += numbers != self._expected[number % 2] or not names

    def _request(self) -> bytes:
        return build_request(json.dumps(self.lead_ids).encode())


def _number(answer: dict[str, str]) -> int:
    return int(answer["model_version"].rpartition("_")[2])


if __name__ == "__main__":
    run_proof(
        PROMISE,
        measure,
        {
            "no drain": PlantedBug(without_drain, "requests that failed, of *"),
            "a swap in place": PlantedBug(
                swap_in_place, "answers with numbers of another model than they name"
            ),
        },
    )
