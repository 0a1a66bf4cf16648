"""Measures what safety costs, durability first: telemetry on against off, and all of it against none.

What binds is that all of them answer the same: how fast they are is told beside what is to be reached, and
never fails a run, because a machine that is busy with something else decides it too (`bench.cost`).

make prove-cost [LONG=1] [SEED=n]
"""

from collections.abc import Sequence
from pathlib import Path

from bench.cost import CLIENTS, build_figures, measure_cost
from bench.data import open_stage, sample_lead_ids
from bench.figures import Figure
from bench.proof import PlantedBug, ProofRun, run_proof

PROMISE = "durability is cheap, and so is the rest of what makes it safe"
LEADS = 10_000


def measure(run: ProofRun) -> Sequence[Figure]:
    """Times bursts of half a second, or of five in the long run."""
    return _measure(run, seconds=5.0 if run.long else 0.5, rounds=4)


def dawdles(run: ProofRun) -> Sequence[Figure]:
    """The same with telemetry that takes its time."""
    return _measure(run, seconds=0.2, rounds=1, plant="slow-telemetry")[1 : 1 + len(CLIENTS)]


def answers_another(run: ProofRun) -> Sequence[Figure]:
    """The same with a model that is a millionth off."""
    return _measure(run, seconds=0.0, rounds=1, plant="other-probabilities")[:1]


def _measure(run: ProofRun, *, seconds: float, rounds: int, plant: str | None = None) -> Sequence[Figure]:
    with open_stage(Path("var/bench"), LEADS) as stage:
        lead_ids = sample_lead_ids(stage.url, LEADS, run.seed % 100 / 100)
        differ, samples = measure_cost(stage, lead_ids, seconds=seconds, rounds=rounds, plant=plant)
    return (Figure("answers that differ", differ, 0, unit=""), *build_figures(samples))


if __name__ == "__main__":
    run_proof(
        PROMISE,
        measure,
        {
            "telemetry that dawdles": PlantedBug(dawdles, "telemetry on, 1 connection: p99 more"),
            "other probabilities": PlantedBug(answers_another, "answers that differ"),
        },
    )
