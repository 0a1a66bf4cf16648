"""The proof of the core: what it takes for a mistake, and that the gap it plants is the only one."""

from pathlib import Path

from bench.core_tests import CORE, run_tests
from bench.mutants import draw_mutants
from bench.proof import ProofRun
from bench.prove_core import MANIFEST, leave_a_test_out

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


def test_the_gap_that_is_planted_is_the_only_one(tmp_path: Path) -> None:
    manifest = {MANIFEST: CORE[MANIFEST]}
    whole = run_tests(manifest, tmp_path)
    assert (whole.missed, whole.failures) == ([], 0)
    assert whole.branches > 0
    missed = [figure for figure in leave_a_test_out(ProofRun(long=False, seed=1)) if not figure.holds]
    assert [(figure.name, figure.reached) for figure in missed] == [("branches and lines never reached", 2)]
