"""Runs the tests of a mutant: do they notice the mistake?

Each mutant is tried in a process of its own, forked from one that has the libraries in memory and nothing of
`app`: importing it there runs the mutant's code in the place of the module's. Only the tests that ran the
changed lines are run, until one fails. Used by `prove_core`.
"""

import faulthandler
import importlib
import importlib.machinery
import importlib.util
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import CodeType, ModuleType

import pytest
from hypothesis import Phase, settings

from bench.mutants import Mutant

TEST_SECONDS, MUTANT_SECONDS, MUTANT_BYTES = 60, 300, 8 * 2**30
_RAN_NONE = {pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED}
_LIBRARIES = ("hypothesis.stateful", "fastapi", "psycopg", "sklearn.ensemble", "skops.io", "structlog",
              "cryptography.hazmat.primitives.asymmetric.ed25519")  # fmt: skip


class _Planted(MetaPathFinder):
    """Finds the one module, with other code in it."""

    def __init__(self, module: str, code: CodeType) -> None:
        self._name = module.removesuffix(".py").replace("/", ".")
        self._path, self._code = os.path.abspath(module), code  # noqa: PTH100

    def find_spec(
        self,
        name: str,
        path: object = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Answers for that module only."""
        if name != self._name:
            return None
        loader = importlib.machinery.SourceFileLoader(name, self._path)
        loader.get_code = lambda _: self._code  # type: ignore[method-assign]
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


def find_survivors(
    mutants: Sequence[Mutant],
    tests_of: Callable[[Mutant], Sequence[str]],
    seed: int,
    unchanged: Mutant,
) -> list[Mutant]:
    """Returns the mutants whose tests pass; as many at a time as there are processors.

    A mutant that never ends, takes all memory, or cannot even be imported by its tests is noticed.
    `unchanged` is the module without a mistake.

    Raises:
        RuntimeError: a mutant has no tests that can be run, or this process has `app` imported already.
    """
    if any(name.startswith("app.") for name in sys.modules):
        raise RuntimeError("this process has imported app")
    for library in _LIBRARIES:
        importlib.import_module(library)
    context, waiting = multiprocessing.get_context("fork"), list(reversed(mutants))
    running: dict[BaseProcess, Mutant] = {}
    survivors: list[Mutant] = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            mutant = waiting.pop()
            process = context.Process(target=_try, args=(mutant, tests_of(mutant), seed))
            process.start()
            running[process] = mutant
        wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            mutant = running.pop(process)
            process.join()
            if process.exitcode == pytest.ExitCode.OK:
                survivors.append(mutant)
            elif process.exitcode in _RAN_NONE:
                alone = context.Process(target=_try, args=(unchanged, tests_of(mutant), seed))
                alone.start()
                alone.join()
                if alone.exitcode in _RAN_NONE:
                    raise RuntimeError(f"there are no tests for {mutant}")
    return survivors


def _try(mutant: Mutant, tests: Sequence[str], seed: int) -> None:
    faulthandler.dump_traceback_later(MUTANT_SECONDS, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (MUTANT_BYTES, MUTANT_BYTES))
    sys.meta_path.insert(0, _Planted(mutant.module, mutant.code))
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    # Nobody reads what fails, so nothing is kept, made smaller or rewritten to tell it well.
    settings.register_profile("mutant", database=None, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("mutant")
    status = pytest.main([
        "-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--assert=plain",
        f"--timeout={TEST_SECONDS}", f"--hypothesis-seed={seed}", *tests,
    ])  # fmt: skip
    os._exit(status)  # a thread the mutant left hanging must not keep the process
