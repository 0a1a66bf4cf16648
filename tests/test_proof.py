"""What makes a proof hold: what binds keeps its limits, and planted bugs show where they should."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.figures import Figure
from bench.proof import PlantedBug, ProofRun
from tests.service import ROOT

RUN = ProofRun(long=False, seed=1)
LOST, LATE = (
    Figure("events lost, of 1,000", 3, 0, unit=""),
    Figure("p99 more", 9, 1.5, unit="ms", binding=False),
)
KEPT = Figure("events lost, of 1,000", 0, 0, unit="")


@pytest.mark.parametrize(
    ("figures", "shows", "caught"),
    [
        ([LOST], "events lost, of *", True),
        ([KEPT, LATE], "p99 more", True),  # it binds nobody, but it is what the bug is about
        ([KEPT, LATE], "events lost, of *", False),  # what is late says nothing of what is lost
        ([LOST, LATE], "events", False),
        ([LOST], "requests lost", False),
        ([], "events lost, of *", False),
    ],
)
def test_a_bug_is_caught_by_the_figure_that_is_about_it_and_no_other(
    figures: list[Figure], shows: str, caught: bool
) -> None:
    assert PlantedBug(lambda _: figures, shows).is_caught(RUN) == caught


PROOF = """
from bench.figures import Figure
from bench.proof import PlantedBug, run_proof

def draw(lost, late):
    return lambda run: [Figure("lost", lost, 0), Figure("late", late, 1, binding=False)]

run_proof("nothing is lost", draw({lost}, 5), {{"a bug": PlantedBug(draw({lost_with_bug}, 5), "lost")}})
"""


@pytest.mark.parametrize(
    ("lost", "lost_with_bug", "status", "said"),
    [
        (0, 1, 0, "planted bug, a bug: caught\n"),
        (0, 0, 1, "planted bug, a bug: NOT CAUGHT by the figure “lost”\n"),
        (1, 1, 1, "The promise does not hold."),
    ],
)
def test_a_proof_holds_when_what_binds_holds_and_every_bug_shows(
    tmp_path: Path, lost: int, lost_with_bug: int, status: int, said: str
) -> None:
    (tmp_path / "prove_of_a_test.py").write_text(PROOF.format(lost=lost, lost_with_bug=lost_with_bug))
    done = subprocess.run(
        [sys.executable, "-m", "prove_of_a_test"],
        check=False, capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout + done.stderr
