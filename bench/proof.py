"""What every proof shares: its options, its figures, its self-test, its exit status.

A proof is a module `bench.prove_NAME` whose `main` hands `run_proof` two things: a function that measures the
promise, and the bugs it guards against. The proof holds when every binding figure keeps its limit, and when
each planted bug makes at least one figure miss it: a check that cannot fail proves nothing.

python -m bench.prove_NAME [--long] [--seed N] [--json FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from bench.figures import Figure, print_figures


@dataclass(frozen=True)
class ProofRun:
    """How much is done, and the seed of whatever is drawn at random."""

    long: bool
    seed: int


Measure = Callable[[ProofRun], Sequence[Figure]]


def run_proof(promise: str, measure: Measure, planted_bugs: Mapping[str, Measure]) -> None:
    """Measures, prints, and ends the process: status 1 if a binding figure misses its limit or a bug gets by.

    `planted_bugs` measure the same promise, briefly, with the named bug in place.
    """
    name = sys.modules["__main__"].__spec__.name.rpartition("prove_")[2].replace("_", "-")  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(prog=f"prove-{name}", description=promise)
    parser.add_argument("--long", action="store_true", help="the long run")
    parser.add_argument("--seed", type=int, default=1, help="draw the same again")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    given = parser.parse_args()
    console, began = Console(width=110), time.monotonic()
    console.print(f"[bold]prove-{name}[/bold]: {promise}", highlight=False)
    run = ProofRun(given.long, given.seed)
    figures = measure(run)
    print_figures(console, f"seed {run.seed}", figures)
    if given.json:
        given.json.write_text(json.dumps([asdict(figure) for figure in figures]))
    caught = {
        bug: _is_caught(plant, ProofRun(long=False, seed=run.seed)) for bug, plant in planted_bugs.items()
    }
    for bug, found in caught.items():
        console.print(f"planted bug, {bug}: {'caught' if found else 'NOT CAUGHT'}", highlight=False)
    console.print(f"{time.monotonic() - began:.0f} s", highlight=False)
    if not all(figure.holds for figure in figures if figure.binding) or not all(caught.values()):
        again = f"make prove-{name} SEED={run.seed}" + (" LONG=1" if run.long else "")
        console.print(f"[bold]The promise does not hold.[/bold] The same again: {again}", highlight=False)
        sys.exit(1)


def _is_caught(plant: Measure, run: ProofRun) -> bool:
    return not all(figure.holds for figure in plant(run))
