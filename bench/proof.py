"""What every proof shares: its options, its figures, its self-test, its exit status.

A proof is a module `bench.prove_NAME` whose `main` hands `run_proof` two things: a function that measures the
promise, and the bugs it guards against. The proof holds when every binding figure keeps its limit, and when
each planted bug makes the figure that is about it miss its own: a check that cannot fail proves nothing, and
one that fails because of something else no more.

python -m bench.prove_NAME [--long] [--seed N] [--json FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from bench.figures import Figure, print_figures


@dataclass(frozen=True)
class ProofRun:
    """How much is done, and the seed of whatever is drawn at random."""

    long: bool
    seed: int


Measure = Callable[[ProofRun], Sequence[Figure]]


@dataclass(frozen=True)
class PlantedBug:
    """A bug in its place: `measure` measures the promise with it, briefly, and `shows` is what must miss.

    `shows` is the name of a figure, binding or not; `*` stands for what varies in it.
    """

    measure: Measure
    shows: str

    def is_caught(self, run: ProofRun) -> bool:
        """Measures; tells whether the figure is among those that miss their limits."""
        missed = [figure.name for figure in self.measure(run) if not figure.holds]
        return any(fnmatchcase(name, self.shows) for name in missed)


def run_proof(promise: str, measure: Measure, planted_bugs: Mapping[str, PlantedBug]) -> None:
    """Measures, prints, ends the process: status 1 if a binding figure misses its limit or a bug gets by."""
    module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    proof = module.rpartition("prove_")[2].replace("_", "-")
    parser = argparse.ArgumentParser(prog=f"prove-{proof}", description=promise)
    parser.add_argument("--long", action="store_true", help="the long run")
    parser.add_argument("--seed", type=int, default=1, help="draw the same again")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    given = parser.parse_args()
    console, began = Console(width=110), time.monotonic()
    console.print(f"[bold]prove-{proof}[/bold]: {promise}", highlight=False)
    run = ProofRun(given.long, given.seed)
    figures = measure(run)
    print_figures(console, f"seed {run.seed}", figures)
    if given.json:
        given.json.write_text(json.dumps([asdict(figure) for figure in figures]))
    brief = ProofRun(long=False, seed=run.seed)
    caught = {name: bug.is_caught(brief) for name, bug in planted_bugs.items()}
    for name, found in caught.items():
        said = "caught" if found else f"NOT CAUGHT by the figure “{planted_bugs[name].shows}”"
        console.print(f"planted bug, {name}: {said}", highlight=False)
    console.print(f"{time.monotonic() - began:.0f} s", highlight=False)
    if not all(figure.holds for figure in figures if figure.binding) or not all(caught.values()):
        again = f"make prove-{proof} SEED={run.seed}" + (" LONG=1" if run.long else "")
        console.print(f"[bold]The promise does not hold.[/bold] The same again: {again}", highlight=False)
        sys.exit(1)
