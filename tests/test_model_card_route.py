"""The model card over HTTP: the file that belongs to a manifest, and nothing else on this machine."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx2
import psycopg
import pytest

from app.schemas.ai_ml import ModelsResponse, Problem
from tests.in_process import build_settings, serve
from tests.lead_models import VERSION, publish_lead_model
from tests.model_files import V2, V3, publish
from tests.service import Connection

MODELS = "/ai/advanced-ml/models"
TEMPLATE = f"{MODELS}/{{version}}/card"
CARD = f"{MODELS}/{VERSION}/card"
STEM = f"advanced_ml_random_forest_{VERSION}"


@pytest.fixture(scope="module")
def crm_url(create_database: Callable[..., str], migrated_template: str) -> str:
    return create_database("cards", migrated_template)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card, one without, and a card without a model."""
    folder = tmp_path_factory.mktemp("cards") / "models"
    publish_lead_model(folder)
    publish(folder, V2)
    (folder / f"{STEM}.card.html").write_text("<!doctype html><title>a card</title>")
    (folder / f"{STEM}.card.md").write_text("# a card")
    (folder / f"advanced_ml_random_forest_{V3}.card.html").write_text("of no model")
    return folder


@pytest.fixture(scope="module")
def client(models: Path, crm_url: str) -> Iterator[httpx2.Client]:
    with serve(build_settings(models.parent, crm_url)) as base, httpx2.Client(base_url=base) as http:
        yield http


def problem_of(response: httpx2.Response, status: int, code: str) -> Problem:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(response.content)
    assert (problem.status, problem.error_code) == (status, code)
    return problem


async def get_as_written(client: httpx2.Client, path: str) -> httpx2.Response:
    """Asks without the help of a client, which takes `..` out of a path before it sends it."""
    connection = await Connection.open(client.base_url.port or 80)
    try:
        status, head, body = await connection.ask("GET", path)
    finally:
        await connection.close()
    headers = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:] if line)
    return httpx2.Response(status, headers=headers, content=body)


def test_a_card_is_a_page_that_may_load_nothing_and_run_nothing(client: httpx2.Client) -> None:
    response = client.get(CARD)
    assert (response.status_code, response.text) == (200, "<!doctype html><title>a card</title>")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"].split("; ")
    assert set(policy) == {
        *("default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"),
        *("base-uri 'none'", "form-action 'none'"),
    }
    head = client.head(CARD)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-security-policy"] == response.headers["content-security-policy"]


def test_the_same_card_is_there_as_markdown(client: httpx2.Client) -> None:
    response = client.get(CARD, params={"format": "markdown"})
    assert (response.status_code, response.text) == (200, "# a card")
    assert response.headers["content-type"] == "text/markdown; charset=utf-8"
    assert client.get(CARD, params={"format": "html"}).text == client.get(CARD).text


@pytest.mark.parametrize("version", ["20990101_000000", V2, V3])
def test_a_version_without_model_or_card_is_not_found(client: httpx2.Client, version: str) -> None:
    problem = problem_of(client.get(f"{MODELS}/{version}/card"), 404, "NOT_FOUND")
    assert "no model card" in problem.detail
    assert problem.instance == TEMPLATE
    assert version not in problem.model_dump_json()


@pytest.mark.parametrize(
    "version", ["..", "%2e%2e", VERSION + "%00", VERSION + "%0A", "20260101-120000", "٢٠٢٦٠١٠١_120000", "*"]
)
async def test_what_is_no_version_is_refused_without_being_repeated(
    client: httpx2.Client, version: str
) -> None:
    response = await get_as_written(client, f"{MODELS}/{quote(version, safe='%*')}/card")
    problem = problem_of(response, 422, "INVALID_PARAMETER")
    assert version not in problem.model_dump_json().replace(TEMPLATE, "") or version in {"..", "*"}


@pytest.mark.parametrize(
    "path",
    [
        f"{MODELS}/..%2F..%2Fetc%2Fpasswd/card",
        f"{MODELS}/%2Fetc%2Fpasswd%00/card",
        f"{MODELS}/{VERSION}/card/",
        f"{MODELS}/{VERSION}/card/../../x",
        f"{MODELS}//card",
    ],
)
async def test_no_path_leads_anywhere_else(client: httpx2.Client, path: str) -> None:
    problem_of(await get_as_written(client, path), 404, "NOT_FOUND")


@pytest.mark.parametrize("query", ["format=pdf", "format=", "format=html&format=html", "path=/etc/passwd"])
def test_another_parameter_is_refused(client: httpx2.Client, query: str) -> None:
    assert "format" in problem_of(client.get(f"{CARD}?{query}"), 422, "INVALID_PARAMETER").detail


def test_another_method_is_told_what_the_path_answers_to(client: httpx2.Client) -> None:
    response = client.post(CARD)
    assert problem_of(response, 405, "METHOD_NOT_ALLOWED").instance == TEMPLATE
    assert response.headers["allow"] == "GET, HEAD"


def test_the_list_of_models_says_where_each_card_is(client: httpx2.Client) -> None:
    response = client.get(MODELS)
    ModelsResponse.model_validate_json(response.content)
    cards = {model["version"]: model["card"] for model in response.json()["available"]}
    assert cards == {VERSION: CARD, V2: None}
    assert client.get(cards[VERSION]).status_code == 200


@pytest.fixture
def card(models: Path) -> Iterator[Path]:
    """The file of the card, which is put back afterwards."""
    path = models / f"{STEM}.card.html"
    before = path.read_bytes()
    yield path
    path.unlink()
    path.write_bytes(before)


def replace_by_link(card: Path) -> None:
    (card.parent.parent / "secret").write_text("secret")
    card.unlink()
    card.symlink_to(card.parent.parent / "secret")


def replace_by_fifo(card: Path) -> None:
    card.unlink()
    os.mkfifo(card)


def give_a_second_name(card: Path) -> None:
    card.unlink()
    (card.parent.parent / "twin").write_text("secret")
    os.link(card.parent.parent / "twin", card)


def let_anybody_write(card: Path) -> None:
    card.chmod(0o666)


def make_huge(card: Path) -> None:
    with card.open("wb") as file:
        file.truncate(3 * 1024 * 1024)


@pytest.mark.parametrize(
    "damage", [replace_by_link, replace_by_fifo, give_a_second_name, let_anybody_write, make_huge]
)
def test_a_file_that_could_be_something_else_is_not_served(
    client: httpx2.Client, card: Path, damage: Callable[[Path], None]
) -> None:
    damage(card)
    assert "secret" not in problem_of(client.get(CARD), 404, "NOT_FOUND").model_dump_json()


def test_of_two_models_of_one_version_the_card_is_that_of_the_one_that_serves(
    tmp_path: Path, crm_url: str
) -> None:
    for model_type in ("logistic_regression", "random_forest"):
        artifact = publish(tmp_path / "models", V2, model_type)
        (tmp_path / "models" / f"advanced_ml_{model_type}_{V2}.card.html").write_text(model_type)
    artifact.write_bytes(b"broken")  # the one that is looked at first
    with psycopg.connect(crm_url) as connection:
        connection.execute("CREATE VIEW abc AS SELECT id AS lead_id, gpa a, gpa b, gpa c FROM people")
    with (
        serve(build_settings(tmp_path, crm_url, lead_source="abc")) as base,
        httpx2.Client(base_url=base) as http,
    ):
        assert http.get(MODELS).json()["model_type"] == "logistic_regression"
        assert http.get(f"{MODELS}/{V2}/card").text == "logistic_regression"


def test_serving_never_imports_what_draws_the_charts() -> None:
    program = (
        "import sys, app.main, app.serve, app.wiring; app.main.create_app;"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'matplotlib', 'PIL'}),"
        "any(name.startswith('app.training') for name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "[] False"
