"""The real application on a real socket, inside the test process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from app.http_protocol import ProblemProtocol
from app.main import create_app
from app.settings import Settings


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.settled = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.settled.set()


@contextmanager
def serve(settings: Settings, extend: Callable[[FastAPI], None] = lambda _: None) -> Iterator[str]:
    """Yields the base URL of the application, served by uvicorn as in production.

    `extend` may add to the application before it starts.
    """
    app = create_app(settings)
    extend(app)
    with serve_app(app) as base:
        yield base


@contextmanager
def serve_app(app: ASGIApp, protocol: type[ProblemProtocol] = ProblemProtocol) -> Iterator[str]:
    """Yields the base URL of any ASGI application with a lifespan, served by uvicorn as in production."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        assert server.settled.wait(60)
        assert server.started, "the service did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def build_settings(folder: Path, database_url: str, **changes: Any) -> Settings:
    """Returns settings that keep everything in `folder` and read no environment file."""
    fields = {
        "database_url": database_url,
        "var_dir": folder / "var",
        "ml_model_dir": folder / "models",
        "log_level": "ERROR",
    }
    return Settings(_env_file=None, **{**fields, **changes})  # type: ignore[call-arg]


def add_odd_leads(url: str) -> None:
    """Makes the relation `contract_leads`: the default view, and leads a CRM should not have but does."""
    with psycopg.connect(url) as connection:
        connection.execute(_ODD_LEADS)


_ODD_LEADS = """
    CREATE TABLE odd_leads AS SELECT * FROM lead_source WITH NO DATA;
    ALTER TABLE odd_leads ALTER gpa TYPE numeric, ALTER tuition_fee TYPE numeric;
    INSERT INTO odd_leads (lead_id, external_ref, created_at, gpa, tuition_fee, minutes_on_site, source)
    VALUES
        (gen_random_uuid(), 'odd_twice', now(), 2, 100, 1, 'website'),
        (gen_random_uuid(), 'odd_twice', now(), 2, 100, 1, 'website'),
        (gen_random_uuid(), 'odd_empty', NULL, NULL, NULL, NULL, NULL),
        (gen_random_uuid(), 'odd_thin', now(), 2, NULL, NULL, NULL),
        (gen_random_uuid(), 'odd_rejected', now(), 2, 'NaN', 1, 'website'),
        (gen_random_uuid(), 'odd_nan', now(), 'NaN', 100, 'NaN', 'website'),
        (NULL, 'odd_nameless', now(), 2, 100, 1, 'website'),
        (gen_random_uuid(), 'odd_infinite', 'infinity', 'Infinity', 100, '-Infinity', repeat('x', 1000000)),
        ('6f1c0c1e-5f0b-4a57-9a1c-0c6a3f0e9b11', 'odd:UUID@x.y_z-1', now(), 2, 100, 1, 'website');
    CREATE VIEW contract_leads AS SELECT * FROM lead_source UNION ALL SELECT * FROM odd_leads;
"""
