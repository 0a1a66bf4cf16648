"""What tests share: a real PostgreSQL, started once for the session, and databases cut from templates.

A test gets a database of its own by copying a template that the real migrations made.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
import structlog

from app.db.embedded import open_embedded
from app.db.migrations import upgrade

MEMORY = Path("/dev/shm")  # noqa: S108 - only directories of random names are made in it
ROOM_BYTES = 2 << 30  # what the servers of three sessions leave far from used up
LONGEST = (
    *("test_serve", "test_prove_artifacts", "test_bench", "test_openapi_fuzz", "test_training", "test_kill"),
    *("test_process_faults", "test_serve_workers", "test_serve_secrets", "test_serve_sockets"),
    *("test_db_embedded", "test_bulk_scoring", "test_training_shipped_model", "test_training_real_leads"),
    *("test_honest_verdict", "test_prove_core", "test_database_outage"),
)
DEMO_PEOPLE, DEMO_SEED = 600, 1
DEMO_UNTIL = datetime(2026, 6, 1, tzinfo=UTC)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first: one that began last would go on alone when all others are done."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _log_everything() -> None:
    # An application that another test built in this process may have raised the level.
    structlog.reset_defaults()
    # The default draws every variable of every frame: of an application that takes longer than clients wait.
    *processors, _ = structlog.get_config()["processors"]
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*processors, plain])


def place_of_servers() -> Path | None:
    """Where PostgreSQL keeps its data: in memory where that has room, or where temporary files go.

    In memory a server is made three times as fast, and a database copied five times.
    """
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES else None


@pytest.fixture(scope="session")
def make_server_dir() -> Iterator[Callable[[], Path]]:
    """`make_server_dir()` makes a directory for a server, outside of pytest's.

    Whenever another session of pytest begins, it closes the directory that all of them share to all but its
    owner, and so to the user that PostgreSQL runs as: a server that starts at that moment finds no data.
    """
    with ExitStack() as stack:
        yield lambda: Path(
            stack.enter_context(
                TemporaryDirectory(
                    prefix="leadscore-tests-", dir=place_of_servers(), ignore_cleanup_errors=True
                )
            )
        )


@pytest.fixture(scope="session")
def server_url(make_server_dir: Callable[[], Path]) -> Iterator[str]:
    """The maintenance database of this session's server."""
    with open_embedded(make_server_dir()) as url:
        with psycopg.connect(url, autocommit=True) as connection:
            # Nothing here outlives the session, so nothing has to survive a power cut.
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("ALTER SYSTEM SET full_page_writes = off")
            connection.execute("ALTER SYSTEM SET synchronous_commit = off")
            connection.execute("SELECT pg_reload_conf()")
        yield url


@pytest.fixture(scope="session")
def create_database(server_url: str) -> Iterator[Callable[[str, str], str]]:
    """`create_database(name, template)` makes a database and returns its URL."""
    with psycopg.connect(server_url, autocommit=True) as connection:

        def create(name: str, template: str = "template0") -> str:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
            return server_url.replace("/postgres?", f"/{name}?")

        yield create


@pytest.fixture(scope="session")
def migrated_template(create_database: Callable[..., str]) -> str:
    """Name of a database that is migrated and empty; never connect to it."""
    upgrade(create_database("migrated"))
    return "migrated"


@pytest.fixture
def database_url(
    create_database: Callable[..., str], migrated_template: str, server_url: str
) -> Iterator[str]:
    """A fresh, migrated, empty database of this test's own."""
    name = f"test_{next(_numbers)}"
    yield create_database(name, migrated_template)
    _drop(server_url, name)


@pytest.fixture(scope="session")
def demo_url(create_database: Callable[..., str], migrated_template: str) -> str:
    """A database with the demo CRM in it, shared by the session: tests read it and leave it as it is."""
    from app.db.demo_crm import load_demo

    url = create_database("demo", migrated_template)
    load_demo(url, people=DEMO_PEOPLE, seed=DEMO_SEED, until=DEMO_UNTIL)
    return url


@pytest.fixture
def empty_database_url(create_database: Callable[..., str], server_url: str) -> Iterator[str]:
    """A fresh database without any schema."""
    name = f"test_{next(_numbers)}"
    yield create_database(name)
    _drop(server_url, name)


_numbers = iter(range(1_000_000))


def _drop(server_url: str, name: str) -> None:
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
