"""The running service under a fuzzer that reads its own OpenAPI document: bounded, the same cases every time.

Every check of the fuzzer is on: no 5xx, no status, header or content type that is not documented, bodies that
follow their schema, invalid data refused, valid data accepted, other methods answered with 405 and Allow.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi import FastAPI

from app.db.api_keys import create_key
from app.db.demo_crm import load_demo
from app.settings import Settings
from tests.in_process import build_settings, serve
from tests.lead_models import publish_lead_model

PEPPER = "a pepper of thirty-two characters"

# The fuzzer does not count 413 among the ways to refuse, but it is the contract's answer to a long batch.
CONFIGURATION = """
[checks.negative_data_rejection]
expected-statuses = [400, 405, 413, 415, 422]
"""


@pytest.fixture(scope="module")
def settings(
    create_database: Callable[..., str], migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    folder = tmp_path_factory.mktemp("fuzz")
    url = create_database("fuzz", migrated_template)
    load_demo(url, people=50, seed=5, until=datetime.now(UTC))
    publish_lead_model(folder / "models")
    return build_settings(folder, url)


def fuzz(base: str, folder: Path, cases_per_operation: int, key: str | None = None) -> tuple[int, str]:
    """Returns the fuzzer's exit status and its report; it sends the API key, if there is one."""
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    command = [
        *(sys.executable, "-c", "import schemathesis.cli; schemathesis.cli.schemathesis()", "run"),
        *("--checks", "all", "--phases", "examples,coverage,fuzzing", "--mode", "all"),
        *("--max-examples", str(cases_per_operation), "--generation-deterministic"),
        *(("--header", f"Authorization: Bearer {key}") if key else ()),
        *("--continue-on-failure", "--no-color", f"{base}/openapi.json"),
    ]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return run.returncode, "\n".join(line[:400] for line in (run.stdout + run.stderr).splitlines())


def test_the_fuzzer_finds_nothing(settings: Settings, tmp_path: Path) -> None:
    with serve(settings) as base:
        status, report = fuzz(base, tmp_path, cases_per_operation=100)
    assert status == 0, report
    generated = re.search(r"(\d+) generated", report)
    assert generated is not None, report
    assert int(generated[1]) >= 350


def test_the_fuzzer_finds_nothing_with_authentication_on(settings: Settings, tmp_path: Path) -> None:
    assert settings.database_url is not None
    key = create_key(settings.database_url, "fuzzer", ["admin"], PEPPER.encode())
    guarded = Settings(
        _env_file=None, **settings.model_dump() | {"auth_mode": "api_key", "auth_key_pepper": PEPPER}
    )  # type: ignore[call-arg]
    with serve(guarded) as base:
        status, report = fuzz(base, tmp_path, cases_per_operation=20, key=key)
    assert status == 0, report


def plant_undocumented_status(app: FastAPI) -> None:
    generate = app.openapi

    def forgetful() -> dict[str, object]:
        document = generate()
        del document["paths"]["/ai/advanced-ml/predict-batch"]["post"]["responses"]["422"]
        return document

    app.openapi = forgetful  # type: ignore[method-assign]


def plant_server_error(app: FastAPI) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    app.add_api_route("/planted", fail)


@pytest.mark.parametrize(
    ("plant", "finding"),
    [(plant_undocumented_status, "Undocumented status code"), (plant_server_error, "Server error")],
)
def test_the_fuzzer_notices_a_planted_defect(
    settings: Settings, tmp_path: Path, plant: Callable[[FastAPI], None], finding: str
) -> None:
    with serve(settings, plant) as base:
        status, report = fuzz(base, tmp_path, cases_per_operation=5)
    assert status == 1
    assert finding in report, report
