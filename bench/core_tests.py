"""The modules that the rest leans on, the tests that are about them, and what of them those tests run.

Tests run in processes of their own, under branch coverage. Used by `prove_core` and `mutation`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData

CORE: Mapping[str, Sequence[str]] = {
    "app/ai/model_registry.py": ["tests/test_model_registry.py"],
    "app/db/lead_cells.py": ["tests/test_db_leads.py"],
    "app/ai/model_manifest.py": ["tests/test_model_manifest.py"],
    "app/ai/telemetry_log.py": ["tests/test_telemetry_log.py"],
    "app/ai/telemetry_segment.py": ["tests/test_telemetry_log.py"],
    "app/ai/feature_safety.py": ["tests/test_feature_safety.py", "tests/test_feature_kernels.py"],
    "app/ai/circuit_breaker.py": ["tests/test_circuit_breaker.py"],
    "app/ai/column_blocks.py": ["tests/test_feature_kernels.py", "tests/test_db_leads.py"],
}
"""Each module with the files of tests that have to reach all of it."""


@dataclass(frozen=True)
class Coverage:
    """What a run of tests reached.

    `branches` are those the modules have, `missed` those never taken, as "file:line->line"; a line
    that never ran is in `missed` as "file:line". `failures` are the runs of tests that did not pass, out of
    one for each processor.
    """

    branches: int
    missed: list[str]
    failures: int
    data: CoverageData

    def tests_of(self, module: str, lines: range) -> list[str]:
        """Returns the tests that ran any of the lines after the module was imported."""
        by_line = self.data.contexts_by_lineno(str(Path(module).resolve()))
        return sorted({test for line in lines for test in by_line.get(line, []) if test})


def run_tests(core: Mapping[str, Sequence[str]], scratch: Path, *, leave_out: str | None = None) -> Coverage:
    """Runs the tests of the modules, as many files at once as there are processors.

    `leave_out` is the name of a test that does not run.
    """
    files = list(dict.fromkeys(file for tests in core.values() for file in tests))
    processors = os.cpu_count() or 1
    groups = [files[start::processors] for start in range(min(processors, len(files)))]
    coverage = [sys.executable, "-m", "coverage"]
    left_out = [f"--deselect={leave_out}"] if leave_out else []
    kept = f"--data-file={scratch / 'coverage'}"

    def run(group: list[str]) -> bool:
        measured = [
            *coverage,
            "run",
            "--branch",
            "--parallel-mode",
            kept,
            f"--include={','.join(core)}",
            "-m",
        ]
        tests = ["pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.coverage_contexts", *group, *left_out]
        done = subprocess.run([*measured, *tests], capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
        return done.returncode == 0

    with ThreadPoolExecutor(len(groups)) as pool:
        passed = list(pool.map(run, groups))
    subprocess.run([*coverage, "combine", "-q", kept], check=True)
    report = scratch / "coverage.json"
    subprocess.run([*coverage, "json", "-q", kept, "-o", report], check=True)
    measured = json.loads(report.read_bytes())["files"]
    data = CoverageData(str(scratch / "coverage"))
    data.read()
    return Coverage(
        branches=sum(measured[module]["summary"]["num_branches"] for module in core),
        missed=[missed for module in core for missed in _list_missed(module, measured[module])],
        failures=passed.count(False),
        data=data,
    )


def _list_missed(module: str, measured: Mapping[str, list[list[int]]]) -> list[str]:
    branches = [f"{module}:{start}->{stop}" for start, stop in measured["missing_branches"]]
    return branches + [f"{module}:{line}" for line in measured["missing_lines"]]
