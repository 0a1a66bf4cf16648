"""What safety costs: the service with all of it on, without its telemetry, and with none of it, side by side.

On is authentication by API key, a signed model, telemetry, a rate limit nobody reaches, deadlines for
clients, and the limit on requests in flight. All three read the same leads from the same PostgreSQL without a
cache, and must answer the same probabilities before anything is timed. They are started anew for every round:
two services of the same code may differ by a tenth, as long as they run. For `prove_cost` and `make bench`.
"""

import base64
import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.db.api_keys import create_key
from app.training.signing import sign_models
from bench.data import Stage
from bench.figures import Figure, count
from bench.load import Cell, Sample, ask, build_request, cycle, measure_in_turns, run_load
from bench.servers import Server, start_service

CLIENTS = (1, 16, 64)
MOST_MORE_MS = {1: 1.5, 16: 1.5, 64: 12.0}
LEAST_SPEED = 0.9
TOLERANCE = 1e-9
COMPARED = 200
WARM_UP = 500
"""Requests that each service has answered before it is timed."""
LARGER = ((50, 16), (2000, 1))
"""Leads in a request, and connections, of the requests that ask for more than one lead."""

CELLS: Sequence[Cell] = (
    *((name, 1, clients) for name in ("all", "silent", "none") for clients in CLIENTS),
    *((name, *cell) for name in ("all", "none") for cell in LARGER),
)


@dataclass(frozen=True)
class Trio:
    """The three services, and the key that opens them."""

    servers: Mapping[str, Server]
    key: str

    async def count_differences(self, lead_ids: Sequence[str]) -> int:
        """Returns how many answers are missing, or differ from those of the service with all of it on."""
        asked = list(lead_ids[:COMPARED])
        request = build_request(json.dumps(asked).encode(), credential=self.key)
        answers = {
            name: {
                entry["lead_id"]: entry["probability"]
                for entry in json.loads(await ask(server.port, request))["predictions"]
            }
            for name, server in self.servers.items()
        }
        nowhere = float("inf")
        return sum(
            not abs(answer.get(lead_id, nowhere) - answers["all"].get(lead_id, nowhere)) <= TOLERANCE
            for answer in answers.values()
            for lead_id in asked
        )

    async def measure(
        self, samples: dict[Cell, Sample], lead_ids: Sequence[str], *, seconds: float, seed: int
    ) -> None:
        """Times them in turns, a burst of each cell; `seed` draws the order."""

        def draw(_name: str, size: int) -> Iterator[bytes]:
            starts = range(0, min(len(lead_ids), 400 * size) - size + 1, size)
            bodies = [json.dumps(lead_ids[at : at + size]).encode() for at in starts]
            return cycle([build_request(body, credential=self.key) for body in bodies])

        ports = {name: server.port for name, server in self.servers.items()}
        for name, port in ports.items():
            await run_load(port, draw(name, 1), Sample(), connections=16, seconds=0, at_least=WARM_UP)
        await measure_in_turns(CELLS, samples, ports, draw, seconds=seconds, rounds=1, seed=seed)


def measure_cost(
    stage: Stage, lead_ids: Sequence[str], *, seconds: float, rounds: int, plant: str | None = None
) -> tuple[int, dict[Cell, Sample]]:
    """Returns how many answers differ, and every cell."""
    differ, samples = 0, dict[Cell, Sample]()
    for number in range(rounds):
        with psycopg.connect(stage.url, autocommit=True) as connection:
            # What was done before is on the disk first: its pages would come among the events of this.
            connection.execute("CHECKPOINT")
        with tempfile.TemporaryDirectory() as directory, start_trio(stage, Path(directory), plant) as trio:
            differ += uvloop.run(trio.count_differences(lead_ids))
            uvloop.run(trio.measure(samples, lead_ids, seconds=seconds, seed=number))
    return differ, samples


def build_figures(samples: Mapping[Cell, Sample]) -> list[Figure]:
    """Returns what telemetry adds, and the speed all of it leaves. They are of time, so none is binding."""
    more = {
        clients: samples["all", 1, clients].percentile(0.99) - samples["silent", 1, clients].percentile(0.99)
        for clients in CLIENTS
    }
    speed = {
        (size, clients): samples["all", size, clients].rate / samples["none", size, clients].rate
        for size, clients in (*((1, clients) for clients in CLIENTS), *LARGER)
    }
    return [
        *(
            Figure(
                f"telemetry on, {count(clients, 'connection')}: p99 more", added, MOST_MORE_MS[clients],
                unit="ms", binding=False,
            )
            for clients, added in more.items()
        ),
        *(
            Figure(
                f"all of it on / none, {count(size, 'lead')}, {count(clients, 'connection')}: rate",
                share, LEAST_SPEED, at_least=True, binding=False,
            )
            for (size, clients), share in speed.items()
        ),
    ]  # fmt: skip


@contextmanager
def start_trio(stage: Stage, directory: Path, plant: str | None = None) -> Iterator[Trio]:
    """Starts the three; with a `plant`, that is in the one with all of it on."""
    models, pepper, signer = directory / "signed", secrets.token_hex(16), Ed25519PrivateKey.generate()
    shutil.copytree(stage.model_dir, models)
    sign_models(models, "advanced_ml_*", None, signer)
    key = create_key(stage.url, f"bench-{secrets.token_hex(4)}", ["score"], pepper.encode())
    uncached = {"ML_PREDICTION_CACHE_TTL_SECONDS": "0"}
    safe = {
        **uncached,
        "AUTH_MODE": "api_key",
        "AUTH_KEY_PEPPER": pepper,
        "ML_TRUSTED_KEYS": base64.b64encode(signer.public_key().public_bytes_raw()).decode(),
        "AI_RATE_LIMIT": "999999/second",
    }
    signed = Stage(stage.url, models)
    silent = {"AI_TELEMETRY_ENABLED": "false"}
    starting = [
        start_service("all", signed, directory, plant=plant, **safe),
        start_service("silent", signed, directory, **safe, **silent),
        start_service("none", stage, directory, plant="unguarded", **uncached, **silent),
    ]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers = pool.map(stack.enter_context, starting)
        yield Trio({server.name: server for server in servers}, key)
