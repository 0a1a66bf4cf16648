"""The core is tested to the bone: its tests take every branch of it, and notice nearly every mistake in it.

The core is what `core_tests` lists: the telemetry log, the registry and the manifest, the decoder of the
database's answers, the circuit breaker and feature safety. The short run measures branches, the long one also
makes every small mistake `mutants` knows, one at a time, and asks whether a test fails. What is compiled
(`_score_kernels.c`) is not measured here: its tests compare it with NumPy to the last bit.

python -m bench.prove_core [--long] [--seed N]
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.core_tests import CORE, Coverage, run_tests
from bench.figures import Figure
from bench.mutants import Mutant, draw_mutants, leave_unchanged
from bench.mutation import find_survivors
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.scratch import open_scratch

MUTATION_SCORE = 90.0
BREAKER, MANIFEST = "app/ai/circuit_breaker.py", "app/ai/model_manifest.py"
ONLY_TEST_OF_A_BRANCH = "tests/test_model_manifest.py::test_an_oversized_manifest_is_refused_unread"
CARELESS_TEST = "tests/test_circuit_breaker.py::test_the_error_is_one_of_our_own_and_may_be_retried"


def measure(run: ProofRun) -> list[Figure]:
    """Runs the tests of the core, and with `run.long` those of every mutant as well."""
    with open_scratch() as scratch:
        coverage = run_tests(CORE, scratch)
        figures = _judge_branches(coverage)
        if run.long:
            figures += [
                _score(module, lambda mutant: _choose_tests(coverage, mutant), run.seed) for module in CORE
            ]
        return figures


def leave_a_test_out(_: ProofRun) -> list[Figure]:
    """The manifest without the one test that takes one of its branches."""
    with open_scratch() as scratch:
        return _judge_branches(
            run_tests({MANIFEST: CORE[MANIFEST]}, scratch, leave_out=ONLY_TEST_OF_A_BRANCH)
        )


def look_at_nothing(run: ProofRun) -> list[Figure]:
    """The breaker's mistakes, judged by a test that looks at nothing it does."""
    return [_score(BREAKER, lambda _: [CARELESS_TEST], run.seed, at_most=8)]


def _judge_branches(coverage: Coverage) -> list[Figure]:
    for place in coverage.missed:
        print(f"never reached: {place}")
    return [
        Figure("runs of tests that failed", coverage.failures, 0, unit=""),
        Figure("branches and lines never reached", len(coverage.missed), 0, unit=""),
        Figure("branches measured", coverage.branches, 1, at_least=True, unit=""),
    ]


def _score(
    module: str, tests_of: Callable[[Mutant], Sequence[str]], seed: int, *, at_most: int | None = None
) -> Figure:
    source = Path(module).read_text()
    unchanged = leave_unchanged(module, source)
    if not find_survivors([unchanged], lambda _: CORE[module], seed, unchanged):
        raise RuntimeError(f"the tests of {module} fail without any mistake in it")
    mutants = draw_mutants(module, source)[:at_most]
    survivors = find_survivors(mutants, tests_of, seed, unchanged)
    for survivor in survivors:
        print(f"not noticed: {survivor}", flush=True)
    share = 100 * (1 - len(survivors) / len(mutants))
    return Figure(f"{len(mutants)} mistakes in {module}", share, MUTATION_SCORE, at_least=True, unit="%")


def _choose_tests(coverage: Coverage, mutant: Mutant) -> Sequence[str]:
    return coverage.tests_of(mutant.module, mutant.lines) or CORE[mutant.module]


if __name__ == "__main__":
    run_proof(
        "The core is tested to the bone: every branch of it, and on request nearly every mistake in it.",
        measure,
        {
            "a branch whose only test is left out": PlantedBug(
                leave_a_test_out, "branches and lines never reached"
            ),
            "tests that look at nothing": PlantedBug(look_at_nothing, f"* mistakes in {BREAKER}"),
        },
    )
