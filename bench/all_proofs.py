"""`make prove`: every proof, and what came of each; one that fails stops none after it.

Those named first run three at a time; those named with `--alone` come after them, one by one.
A proof that misses figures of time and no other is run once more, and the table says so: what else the
machine does can make an answer late, but cannot lose an event or let a hostile file through.

python -m bench.all_proofs [--long] [--seed N] NAME... [--alone NAME]...
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.figures import Figure

AT_A_TIME = 3


@dataclass(frozen=True)
class Outcome:
    """What came of a proof; without figures it broke off before it had any."""

    name: str
    seconds: float
    held: bool
    figures: Sequence[Figure]
    printed: str = ""

    @property
    def was_late(self) -> bool:
        """Whether it failed by figures of time alone."""
        missed = [figure for figure in self.figures if figure.binding and not figure.holds]
        return not self.held and bool(missed) and all(figure.of_time for figure in missed)


def main() -> None:
    """Runs them and prints the table; exit status 1 if one of them does not hold."""
    parser = argparse.ArgumentParser(prog="prove", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="kill is the module bench.prove_kill")
    parser.add_argument(
        "--alone", action="append", default=[], metavar="NAME", help="nothing else runs meanwhile"
    )
    parser.add_argument("--long", action="store_true", help="the long runs")
    parser.add_argument("--seed", type=int, default=1, help="draw the same again")
    given = parser.parse_args()
    options = ["--seed", str(given.seed), *(["--long"] if given.long else [])]
    console, began = Console(width=130), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:

        def run(name: str) -> Outcome:
            outcome = prove_twice_if_late(name, options, Path(directory, name))
            print(outcome.printed, end="", flush=True)
            return outcome

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            outcomes = list(pool.map(run, given.names))
        outcomes += map(run, given.alone)
    print_outcomes(console, outcomes, time.monotonic() - began)
    sys.exit(not all(outcome.held for outcome in outcomes))


def prove_twice_if_late(name: str, options: Sequence[str], result: Path) -> Outcome:
    """Runs a proof, and once more if only figures of time were missed."""
    first = prove(name, options, result)
    if not first.was_late:
        return first
    second = prove(name, options, result)
    return replace(
        second,
        name=f"{name}, 2nd run",
        seconds=first.seconds + second.seconds,
        printed=first.printed + second.printed,
    )


def prove(name: str, options: Sequence[str], result: Path) -> Outcome:
    """Runs a proof in a process of its own, which writes its figures to `result`."""
    began = time.monotonic()
    result.unlink(missing_ok=True)  # of a run before
    module = f"bench.prove_{name.replace('-', '_')}"
    done = subprocess.run(
        [sys.executable, "-m", module, *options, "--json", str(result)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    figures = [Figure(**line) for line in json.loads(result.read_text())] if result.exists() else []
    return Outcome(name, time.monotonic() - began, done.returncode == 0, figures, done.stdout)


def print_outcomes(console: Console, outcomes: Sequence[Outcome], seconds: float) -> None:
    """Prints a line for each figure, and for each proof how long it took and whether it held."""
    table = Table(title=f"{len(outcomes)} proofs, {seconds:.0f} s", title_justify="left")
    for heading in ("proof", "seconds", "figure", "reached", "to reach", "figure holds", "proof holds"):
        table.add_column(heading, justify="left" if heading in ("proof", "figure") else "right")
    for outcome in outcomes:
        rows = [figure.cells() for figure in outcome.figures] or [("none: it broke off", "", "", "NO")]
        for number, row in enumerate(rows):
            first = (outcome.name, f"{outcome.seconds:.0f}") if number == 0 else ("", "")
            table.add_row(*first, *row, ("yes" if outcome.held else "NO") if number == 0 else "")
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
