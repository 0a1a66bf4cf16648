"""Schemathesis against a running service: it reads the service's own OpenAPI document and asks what it likes.

Every check is on: no 5xx, no status, header or content type that is not documented, bodies that follow their
schema, invalid data refused, valid data accepted, other methods answered with 405 and Allow. A process of its
own, so the same seed asks the same. For `prove_hostile_input` and its test.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# The fuzzer does not count 413 among the ways to refuse, but it is the contract's answer to a long batch.
_CONFIGURATION = """
[checks.negative_data_rejection]
expected-statuses = [400, 405, 413, 415, 422]
"""


class FuzzRun(NamedTuple):
    """Exit status (0: nothing found, 1: something), the number of requests made, and what was reported."""

    status: int
    cases: int
    report: str


def fuzz(base: str, folder: Path, *, seed: int, cases_per_operation: int, key: str | None = None) -> FuzzRun:
    """Fuzzes the service at `base`, with an API key if given; `folder` is for the fuzzer's own files."""
    (folder / "schemathesis.toml").write_text(_CONFIGURATION)
    command = [
        *(sys.executable, "-c", "import schemathesis.cli; schemathesis.cli.schemathesis()", "run"),
        *("--checks", "all", "--phases", "examples,coverage,fuzzing,stateful", "--mode", "all"),
        *(("--header", f"Authorization: Bearer {key}") if key else ()),
        *("--max-examples", str(cases_per_operation), "--seed", str(seed), "--generation-database", "none"),
        *("--continue-on-failure", "--no-color", f"{base}/openapi.json"),
    ]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    report = "\n".join(line[:400] for line in (run.stdout + run.stderr).splitlines())
    generated = re.search(r"(\d+) generated", report)
    return FuzzRun(run.returncode, int(generated[1]) if generated else 0, report)
