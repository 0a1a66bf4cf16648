"""Proves that a lead's answer does not depend on whom it is asked with, however many callers share look-ups.

First every lead is asked alone, one request after the other. Then fifty callers ask for random sets of them,
from one lead to 2,000, at the same time and without a cache, again and again; small requests share look-ups
meanwhile. Every entry must be, byte for byte, the one the lead got alone, in the
order that was asked for; an ID nobody has must stay unknown.

make prove-batching [LONG=1] [SEED=n]
"""

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import msgspec

from bench.data import open_stage, sample_lead_ids
from bench.figures import Figure
from bench.load import build_request, read_answer
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.servers import start_service

PROMISE = "a lead's answer is the same bytes alone and among others, under 50 concurrent callers"
STAGE_LEADS = 10_000
LEADS = 3_000
CALLERS = 50
SCORED, SCORED_LONG, SCORED_PLANTED = 250_000, 5_000_000, 50_000
SIZES = ((1, 8), (9, 64), (65, 2_000))
WEIGHTS = (60, 30, 10)
UNKNOWN_SHARE = 0.01
PAUSE_SECONDS = 0.05


class _Error(msgspec.Struct):
    position: int


class _Answer(msgspec.Struct):
    predictions: list[msgspec.Raw]
    errors: list[_Error]


def measure(run: ProofRun) -> Sequence[Figure]:
    """Scores 250,000 leads, or five million in the long run."""
    return asyncio.run(_measure(run, SCORED_LONG if run.long else SCORED))


def mixed_up(run: ProofRun) -> Sequence[Figure]:
    """The same where who shares a look-up is handed his neighbour's answers."""
    return asyncio.run(_measure(run, SCORED_PLANTED, plant="mixed-look-ups"))


def last_bits(run: ProofRun) -> Sequence[Figure]:
    """The same where the last bit of a score depends on the size of the batch."""
    return asyncio.run(_measure(run, SCORED_PLANTED, plant="batch-in-last-bit"))


async def _measure(run: ProofRun, scored: int, plant: str | None = None) -> Sequence[Figure]:
    uncached = {"ML_PREDICTION_CACHE_TTL_SECONDS": "0"}
    with open_stage(Path("var/bench"), STAGE_LEADS) as stage, tempfile.TemporaryDirectory() as directory:
        lead_ids = sample_lead_ids(stage.url, LEADS if plant is None else LEADS // 8, run.seed % 100 / 100)
        with start_service("batching", stage, Path(directory), plant=plant, **uncached) as server:
            callers = _Callers(server.port, run.seed, scored)
            await callers.ask_alone(lead_ids)
            await callers.ask_together()
    return (
        Figure(f"entries unlike the lead's alone, of {callers.scored:,}", callers.different, 0, unit=""),
        Figure(f"answers with too few or too many, of {callers.requests:,}", callers.wrong, 0, unit=""),
        Figure(f"leads scored by {CALLERS} callers at a time", callers.scored, scored, True, unit=""),
    )  # fmt: skip


@dataclass
class _Callers:
    """Fifty callers, and what they have found."""

    port: int
    seed: int
    goal: int
    different: int = 0
    wrong: int = 0
    scored: int = 0
    requests: int = 0
    _alone: dict[str, bytes] = field(default_factory=dict)

    async def ask_alone(self, lead_ids: Sequence[str]) -> None:
        """Notes the entry of each lead when nothing else is asked."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for lead_id in lead_ids:
            (entry,) = (await _exchange(reader, writer, [lead_id])).predictions
            self._alone[lead_id] = bytes(entry)
        writer.close()

    async def ask_together(self) -> None:
        """Has all callers ask until the goal is reached."""
        await asyncio.gather(*(self._ask(random.Random(f"{self.seed} {n}")) for n in range(CALLERS)))  # noqa: S311

    async def _ask(self, draw: random.Random) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        known = list(self._alone)
        while self.scored < self.goal:
            (size,) = draw.choices(SIZES, WEIGHTS)
            asked = draw.sample(known, min(draw.randint(*size), len(known)))
            if draw.random() < UNKNOWN_SHARE:
                asked[draw.randrange(len(asked))] = str(UUID(int=draw.getrandbits(128)))
            self._judge(asked, await _exchange(reader, writer, asked))
        writer.close()

    def _judge(self, asked: Sequence[str], answer: _Answer) -> None:
        self.requests += 1
        expected = [self._alone[lead_id] for lead_id in asked if lead_id in self._alone]
        unknown = [place for place, lead_id in enumerate(asked) if lead_id not in self._alone]
        if len(answer.predictions) != len(expected) or [error.position for error in answer.errors] != unknown:
            self.wrong += 1
            return
        self.scored += len(expected)
        self.different += sum(map(bytes.__ne__, map(bytes, answer.predictions), expected))


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lead_ids: Sequence[str]
) -> _Answer:
    status, body = 503, b""
    while status == 503:  # a busy service refuses, and says so
        writer.write(build_request(msgspec.json.encode(lead_ids)))
        status, _, body = await read_answer(reader)
        await asyncio.sleep(PAUSE_SECONDS if status == 503 else 0)
    if status != 200:
        raise RuntimeError(f"not a 200 but {status}: {body[:500]!r}")
    return msgspec.json.decode(body, type=_Answer)


if __name__ == "__main__":
    differ = "entries unlike the lead's alone, of *"
    run_proof(
        PROMISE,
        measure,
        {
            "look-ups mixed up": PlantedBug(mixed_up, differ),
            "a batch in the last bit": PlantedBug(last_bits, differ),
        },
    )
