"""The proof of the core: what it takes for a mistake, and that the gap it plants is the only one."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.core_tests import CORE, run_tests
from bench.mutants import draw_mutants
from bench.proof import ProofRun
from bench.prove_core import BREAKER, CARELESS_TEST, MANIFEST, leave_a_test_out

SOURCE = """
def grow(sizes: list[int], limit: int | None = None) -> int:
    total = 0
    for size in sizes:
        if limit is not None and total + size > limit:
            break
        total += size
    return total
"""
CHANGES = [
    "total = 1",
    "if not (limit is not None and total + size > limit):",
    "if limit is not None or total + size > limit:",
    "if limit is None and total + size > limit:",
    "if limit is not None and total - size > limit:",
    "if limit is not None and total + size >= limit:",
    "continue",
    "pass",
    "total -= size",
    "return None",
]


def test_every_mistake_is_made_once_and_annotations_are_left_alone() -> None:
    mutants = draw_mutants("grow.py", SOURCE)
    assert [mutant.change.partition("  =>  ")[2] for mutant in mutants] == CHANGES
    assert [mutant.lines.start for mutant in mutants] == [3, 5, 5, 5, 5, 5, 6, 7, 7, 8]


def test_a_mutant_does_what_it_says() -> None:
    results = []
    for mutant in draw_mutants("grow.py", SOURCE):
        names: dict = {}
        exec(mutant.code, names)  # noqa: S102
        results.append(names["grow"]([3, 4, 5], 7))
    assert results == [4, 0, 0, 12, 12, 3, 7, 0, -12, None]


JUDGE_A_MODULE_THAT_CANNOT_BE_IMPORTED = """
import sys
from pathlib import Path
from bench.mutants import Mutant, leave_unchanged
from bench.mutation import find_survivors

module, test = sys.argv[1:]
broken = Mutant(module, range(0), "broken", compile("raise ValueError", module, "exec"))
print(find_survivors([broken], lambda _: [test], 1, leave_unchanged(module, Path(module).read_text())))
"""


@pytest.mark.parametrize(
    ("test", "said"), [(CARELESS_TEST, "[]"), (f"{CARELESS_TEST}_and_there_is_none", "")]
)
def test_a_mistake_that_no_test_can_import_is_noticed_and_a_test_that_is_none_is_an_error(
    test: str, said: str
) -> None:
    # In a process of its own: whoever judges a module must not have imported it.
    judged = subprocess.run(
        [sys.executable, "-c", JUDGE_A_MODULE_THAT_CANNOT_BE_IMPORTED, BREAKER, test],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert judged.stdout.strip() == said, judged.stderr
    assert ("there are no tests for" in judged.stderr) == (not said)


def test_the_gap_that_is_planted_is_the_only_one(tmp_path: Path) -> None:
    manifest = {MANIFEST: CORE[MANIFEST]}
    whole = run_tests(manifest, tmp_path)
    assert (whole.missed, whole.failures) == ([], 0)
    assert whole.branches > 0
    missed = [figure for figure in leave_a_test_out(ProofRun(long=False, seed=1)) if not figure.holds]
    assert [(figure.name, figure.reached) for figure in missed] == [("branches and lines never reached", 2)]
