"""The running service under a fuzzer that reads its own OpenAPI document: bounded, the same cases every time.

Every check of the fuzzer is on: no 5xx, no status, header or content type that is not documented, bodies that
follow their schema, invalid data refused, valid data accepted, other methods answered with 405 and Allow.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi import FastAPI

from app.db.api_keys import create_key
from app.db.demo_crm import load_demo
from app.settings import Settings
from bench.openapi_fuzz import fuzz
from tests.in_process import build_settings, serve
from tests.lead_models import publish_lead_model

PEPPER = "a pepper of thirty-two characters"


@pytest.fixture(scope="module")
def settings(
    create_database: Callable[..., str], migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    folder = tmp_path_factory.mktemp("fuzz")
    url = create_database("fuzz", migrated_template)
    load_demo(url, people=50, seed=5, until=datetime.now(UTC))
    publish_lead_model(folder / "models")
    return build_settings(folder, url)


def test_the_fuzzer_finds_nothing(settings: Settings, tmp_path: Path) -> None:
    with serve(settings) as base:
        run = fuzz(base, tmp_path, seed=1, cases_per_operation=100)
    assert run.status == 0, run.report
    assert run.cases >= 350


def test_the_fuzzer_finds_nothing_with_authentication_on(settings: Settings, tmp_path: Path) -> None:
    assert settings.database_url is not None
    key = create_key(settings.database_url, "fuzzer", ["admin"], PEPPER.encode())
    guarded = Settings(
        _env_file=None, **settings.model_dump() | {"auth_mode": "api_key", "auth_key_pepper": PEPPER}
    )  # type: ignore[call-arg]
    with serve(guarded) as base:
        run = fuzz(base, tmp_path, seed=1, cases_per_operation=20, key=key)
    assert run.status == 0, run.report


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
        run = fuzz(base, tmp_path, seed=1, cases_per_operation=5)
    assert run.status == 1
    assert finding in run.report, run.report
