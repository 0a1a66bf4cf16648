"""The proof of the artifacts, briefly: it holds as things are, and each planted bug shows where it should."""

import pytest

from bench.proof import ProofRun
from bench.prove_artifacts import BRIEF, PLANTED_BUGS, measure


def test_the_registry_as_it_is_keeps_the_promise() -> None:
    figures = measure(BRIEF, seed=7)
    assert [figure.name for figure in figures if not figure.holds] == []


@pytest.mark.parametrize("bug", PLANTED_BUGS)
def test_a_planted_bug_shows_in_the_figure_that_is_about_it(bug: str) -> None:
    planted = PLANTED_BUGS[bug]
    figures = {figure.name: figure for figure in planted.measure(ProofRun(long=False, seed=7))}
    assert not figures[planted.shows].holds
    assert figures["loads that met a swapped file"].holds
