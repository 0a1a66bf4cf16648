"""What the project promises about itself: documents that cannot rot, and habits that hold everywhere."""

import ast
import re
import tomllib
from pathlib import Path

import click
import grimp
import pytest

from app import errors
from app.cli import cli
from app.errors import CommandError, LeadScoringError
from app.settings import Settings

ROOT = Path(__file__).parent.parent
PYTHON = sorted(path for folder in ("app", "tests", "alembic") for path in (ROOT / folder).rglob("*.py"))


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _error_classes(parent: type[LeadScoringError] = LeadScoringError) -> list[type[LeadScoringError]]:
    children = [child for child in parent.__subclasses__() if child.__module__ == errors.__name__]
    return children + [grandchild for child in children for grandchild in _error_classes(child)]


def _command_names(group: click.Group, prefix: str = "leadscore") -> list[str]:
    names = []
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        names += _command_names(command, full) if isinstance(command, click.Group) else [full]
    return names


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_has_one_default_and_one_description_in_code_example_file_and_readme(name: str) -> None:
    field, variable = Settings.model_fields[name], name.upper()
    found = re.search(rf"((?:^# .*\n)+)#{variable}=(.*)$", _read(".env.example"), re.MULTILINE)
    assert found is not None, f".env.example lacks {variable}"
    example = found[2]
    loaded = Settings(_env_file=None, **({name: example} if example else {}))  # type: ignore[call-arg]
    assert getattr(loaded, name) == field.default
    row = re.search(rf"^\| `{variable}` \| (.*?) \| (.*) \|$", _read("README.md"), re.MULTILINE)
    assert row is not None, f"README.md lacks {variable}"
    told = {"unset": "", "localhost development ports": example}.get(row[1], row[1].strip("`"))
    assert told == example
    assert " ".join((field.description or "").split()) == row[2]
    assert re.sub(r"\n?# ", " ", found[1]).strip() == row[2].replace("`", "")


def test_the_example_file_names_no_setting_that_does_not_exist() -> None:
    named = set(re.findall(r"^#([A-Z_]+)=", _read(".env.example"), re.MULTILINE))
    assert named == {name.upper() for name in Settings.model_fields}


def test_every_error_code_is_documented() -> None:
    codes = {error.code for error in _error_classes() if not issubclass(error, CommandError)}
    assert len(codes) > 15
    assert not [code for code in codes if f"`{code}`" not in _read("docs/api.md")]


def test_the_error_tree_in_words_is_the_error_tree() -> None:
    rows = re.findall(r"^([ │]*[├└]── )(\w+) +(.*)$", errors.__doc__ or "", re.MULTILINE)
    parents, drawn = ["LeadScoringError"], []
    for branch, name, meaning in rows:
        depth = len(branch) // 4 - 1
        drawn.append((name, parents[depth - 1], re.findall(r"\w+", meaning)))
        parents[depth:] = [name]
    classes = {error.__name__: error for error in _error_classes()}
    assert sorted((name, parent) for name, parent, _ in drawn) == sorted(
        (name, error.__base__.__name__) for name, error in classes.items()
    )
    for name, parent, words in drawn:
        if parent not in {"LeadScoringError", "CommandError"}:
            assert classes[name].code in words
            assert str(classes[name].status) in words or parent == "UnavailableError"


def test_every_command_is_documented_and_has_help() -> None:
    documents = _read("README.md") + _read("README_ML_DEV.md") + _read("docs/runbook.md")
    names = _command_names(cli)
    assert len(names) >= 8
    assert not [name for name in names if name not in documents]


def test_every_metric_is_documented() -> None:
    metrics = set(re.findall(r'"(leadscore_[a-z_]+)"', _read("app/metrics.py")))
    assert metrics
    assert not [name for name in metrics if not re.search(f"`{name}(_total)?`", _read("docs/runbook.md"))]


def test_every_alert_has_a_test_metrics_that_exist_and_a_place_in_the_runbook() -> None:
    rules, tests, runbook = map(_read, ("docs/alerts/rules.yml", "docs/alerts/tests.yml", "docs/runbook.md"))
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert len(set(alerts)) == len(alerts) > 15
    assert set(re.findall(r"- name: (\w+)", tests)) == set(alerts)
    metrics = set(re.findall(r'"(leadscore_[a-z_]+)"', _read("app/metrics.py")))
    used = {re.sub("_(total|sum|count)$", "", name) for name in re.findall(r"leadscore_[a-z_]+", rules)}
    assert used
    assert used <= metrics
    places = [place.strip("'") for place in re.findall(r"^ +see: (.*)$", rules, re.MULTILINE)]
    assert len(places) == len(alerts)
    assert not [place for place in places if f"| {place} |" not in runbook and f"## {place}" not in runbook]


def test_alerts_on_failures_look_at_predictions_only() -> None:
    failures = re.findall(
        r'leadscore_requests_total\{([^}]*status=~?"5[^}]*)\}', _read("docs/alerts/rules.yml")
    )
    assert len(failures) >= 2
    assert all('route=~"/ai/advanced-ml(-legacy)?/predict-batch"' in failure for failure in failures)


def test_every_reason_to_refuse_an_artifact_is_documented() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "app").rglob("*.py"))
    reasons = set(re.findall(r'ArtifactError\(\s*"([a-z_]+)"', source)) - {"refused"}
    assert len(reasons) > 10
    assert not [reason for reason in reasons if f"`{reason}`" not in _read("docs/runbook.md")]


def test_local_links_in_the_documents_lead_somewhere() -> None:
    broken = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "app/ai/REPORT_ML_AUDIT.md"]:
        targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
        gone = [target for target in targets if not (document.parent / target).exists()]
        broken += [f"{document.relative_to(ROOT)} -> {target}" for target in gone]
    assert not broken


def test_every_file_of_ours_that_a_document_names_is_there() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "app/ai/REPORT_ML_AUDIT.md"]
    named = {
        (document.name, path)
        for document in documents
        for path in re.findall(
            r"`((?:app|tests|bench|alembic|docs)/[\w./*]+|test_\w+\.py)`", document.read_text()
        )
    }
    assert len(named) > 40
    assert not [
        f"{document}: {path}"
        for document, path in named
        if not list(ROOT.glob(path)) and not (ROOT / "tests" / path).exists()
    ]


@pytest.mark.parametrize("name", ["docs/reliability.md", "docs/threat-model.md", "app/ai/REPORT_ML_AUDIT.md"])
def test_every_proof_and_test_that_a_document_cites_is_there(name: str) -> None:
    document = _read(name)
    proofs = set(re.findall(r"\bprove-([a-z-]+[a-z])", document))
    tests = set(re.findall(r"`(?:tests/)?(test_[a-z0-9_]+)(?:\.py)?`", document))
    assert len(proofs) > 5
    assert len(tests) > 20
    assert not [
        proof for proof in proofs if not (ROOT / f"bench/prove_{proof.replace('-', '_')}.py").exists()
    ]
    assert not [test for test in tests if not (ROOT / f"tests/{test}.py").exists()]


def test_every_fault_case_is_in_the_list_once_and_in_order() -> None:
    rows = re.findall(r"^\| F(\d+) \|", _read("docs/reliability.md"), re.MULTILINE)
    assert rows == [str(number) for number in range(1, 56)]


def test_every_threat_has_a_defence_and_something_that_shows_it() -> None:
    rows = re.findall(r"^\| (T\d+) \|(.*)\|$", _read("docs/threat-model.md"), re.MULTILINE)
    assert [name for name, _ in rows] == [f"T{number}" for number in range(1, len(rows) + 1)]
    assert len(rows) > 20
    for name, row in rows:
        *_, defence, shown_by = row.split("|")
        assert defence.strip(), name
        assert re.search("`(test_|make prove-)", shown_by), name


def test_the_list_of_rooms_is_in_the_order_in_which_they_may_import_each_other() -> None:
    contract = tomllib.loads(_read("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    assert contract["exhaustive"]
    groups = re.findall(r"(?:^app/\w.*\n)+", _read("README_ML_DEV.md"), re.MULTILINE)
    told = [" | ".join(re.findall(r"^app/(\w+)", group, re.MULTILINE)) for group in groups]
    assert told == contract["layers"]


def test_only_what_says_when_something_was_reads_the_wall_clock() -> None:
    """Everything that waits, expires or is late goes by a clock that nobody sets."""
    wall_clock = re.compile(r"time\.time\b|datetime\.now|datetime\.utcnow|date\.today")
    readers = {
        str(path.relative_to(ROOT / "app"))
        for path in (ROOT / "app").rglob("*.py")
        if wall_clock.search(path.read_text(encoding="utf-8"))
    }
    serving = {path for path in readers if not path.startswith("training/")} - {"cli.py", "serve.py"}
    assert serving == {
        "ai/ml_telemetry.py",  # an event's time
        "ai/model_registry.py",  # since when a model is loaded
        "ai/refresh_ahead.py",  # the day whose start is the as-of time
        "db/lead_scores.py",  # when a lead was scored
        "error_handlers.py",  # an error's time
        "http_protocol.py",  # the same, for bytes that are no request
        "middleware/request_id.py",  # the as-of time
        "security/tokens.py",  # whether a token has expired
    }


def test_callers_that_a_docstring_names_are_the_modules_that_import_it() -> None:
    """A sentence of nothing but modules, "Called by `x` and `y`.", names all there are; others name some."""
    graph = grimp.build_graph("app", cache_dir=None)
    modules = {module for module in graph.modules if not graph.find_children(module)}
    wrong, complete = [], 0
    for path in (ROOT / "app").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for sentence in re.split(r"(?<=[.:;]) ", " ".join(docstring.split())):
            if not re.search(r"^(Called|Used|Imported) by|^Only `.* (calls|import)|only caller", sentence):
                continue
            prose, quoted = re.sub(r"`.*?`", "", sentence), re.findall(r"`(.*?)`", sentence)
            packages = ("", "app.", module.rpartition(".")[0] + ".")
            named = {package + name for name in quoted for package in packages} & modules
            importers = graph.find_modules_that_directly_import(module)
            says_all = not set(re.findall(r"\w+", prose)) - {"Called", "Used", "Imported", "by", "and"}
            says_all = says_all or bool(re.search(r"` alone|^Only|only caller", sentence))
            complete += says_all and bool(named)
            if named - importers or (named and says_all and importers - named):
                wrong.append(f"{module}: {sentence} It is imported by {', '.join(sorted(importers))}.")
    assert complete > 30
    assert not wrong, "\n".join(wrong)


def test_nothing_is_patched_in_tests_and_no_http_exception_is_raised_below_the_edge() -> None:
    offenders = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            module = getattr(node, "module", None) or ""
            if "unittest.mock" in (module, *names) or (module == "unittest" and "mock" in names):
                offenders.append(f"{path.name} imports unittest.mock")
            if "HTTPException" in names and path.name != "error_handlers.py":
                offenders.append(f"{path.name} imports HTTPException")
    assert not offenders


def test_no_logger_has_a_name_which_its_lines_would_not_show() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "app").rglob("*.py"))
    given = re.findall(r"get_logger\((.*?)\)", source)
    assert len(given) > 15
    assert not [name for name in given if name]


def test_every_connection_to_a_database_speaks_utf8_and_is_kept_alive() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "app").rglob("*.py"))
    addresses = re.findall(r"\b(?:psycopg|Connection)\.connect\(\s*(\w*)", source)
    assert len(addresses) > 5
    assert set(addresses) == {"complete_address"}


def test_alembic_folder_does_not_hide_the_library_and_models_holds_no_python() -> None:
    assert not (ROOT / "alembic" / "__init__.py").exists()
    assert not list((ROOT / "models").rglob("*.py"))


def test_the_locks_are_hash_pinned_and_name_no_index() -> None:
    for name in ("requirements.lock", "requirements-training.lock", "requirements-dev.lock"):
        text = _read(name)
        assert "index-url" not in text
        assert "find-links" not in text
        for requirement in re.findall(r"^[a-z0-9].*?(?=^[a-z0-9]|\Z)", text, re.MULTILINE | re.DOTALL):
            assert "==" in requirement.splitlines()[0]
            assert "--hash=sha256:" in requirement
