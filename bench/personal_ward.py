"""The ward of `prove_personal_data`: a CRM of canaries, services over it, and whatever comes out of them."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from app.db.embedded import open_embedded
from app.db.migrations import upgrade
from bench.careless_service import (
    ACTIVITY,
    BODIES,
    DESCRIPTORS,
    EVENTS,
    HEADERS,
    METRICS,
    MODELS,
    PROCESS,
    SERVER_LOG,
    SINKS,
    STDERR,
    STDOUT,
    TELEMETRY_LOG,
    TEMPORARY,
    VAR_FILES,
)
from bench.personal_crm import FEATURES, Request, add_people, draw_people, hostile_requests
from bench.servers import READABLE
from tests.model_files import V1, publish
from tests.service import PREDICT, Connection, Service

CARELESS = ("-m", "bench.careless_service")

People = Sequence[Mapping[str, str]]
Sinks = dict[str, list[bytes]]


class Ward:
    """One proof's CRM, its people, and whatever came out, by sink."""

    def __init__(
        self, folder: Path, url: str, server_log: Path, people: People, typed: Sequence[str]
    ) -> None:
        self.folder, self.url, self.people, self.typed = folder, url, people, typed
        self.sinks: Sinks = {sink: [] for sink in SINKS}
        self.statuses: defaultdict[str, set[int]] = defaultdict(set)
        self._server_log = server_log

    def place(self, name: str) -> tuple[Path, Path]:
        """Returns a directory for a service, and one with a model for it."""
        models = self.folder / name / "models"
        publish(models, V1, feature_set=FEATURES.to_json())
        (self.folder / name / "tmp").mkdir()
        return self.folder / name, models

    def service(self, name: str, **environment: str) -> Service:
        """Returns a service that is not started yet; the failing route is the careless module's."""
        directory, models = self.place(name)
        settings = {"TMPDIR": str(directory / "tmp"), "LOG_LEVEL": "DEBUG", "ML_CACHE_TTL_SECONDS": "0.2"}
        settings |= READABLE
        command = CARELESS if "CARELESS" in environment or name == "failing" else ("-m", "app.cli", "serve")
        return Service(directory, self.url, models, command=command, **settings, **environment)

    async def drive(self, service: Service, case: str, *, thorough: bool) -> None:
        """Asks for everybody, and with `thorough` sends a caller's canaries wherever one can write."""
        # With reasons a lead is read afresh, without them it may be remembered.
        paths = (PREDICT, f"{PREDICT}?include=reasons,features")
        bodies = [json.dumps([person["external_ref"]]).encode() for person in self.people]
        asked: list[Request] = [("POST", path, body, []) for path in paths for body in bodies]
        typed = [*zip(self.typed, self.people, strict=False)] if thorough else []
        for text, person in typed:
            asked += hostile_requests(text, person["external_ref"])
        asked += [
            ("GET", "/ai/advanced-ml/fails", b"", []),
            ("POST", PREDICT, b'["who.else@canary.example"]', []),
        ]
        for method, path, body, headers in asked:
            connection = await Connection.open(service.port)
            status, head, content = await connection.ask(method, path, body, headers)
            await connection.close()
            self.statuses[case].add(status)
            self.sinks[HEADERS].append(head)
            self.sinks[BODIES].append(content)

    async def collect(self, service: Service) -> None:
        """Takes what can only be taken while the service runs."""
        connection = await Connection.open(service.port)
        _, head, metrics = await connection.ask("GET", "/metrics")
        await connection.close()
        self.sinks[METRICS].append(head + metrics)
        process = Path("/proc", str(service.pid))
        self.sinks[PROCESS] += [(process / name).read_bytes() for name in ("cmdline", "environ")]
        self.sinks[DESCRIPTORS] += list(_read_deleted(process / "fd"))
        self._collect_files(service)
        with psycopg.connect(self.url) as database:
            activity = database.execute("SELECT string_agg(a::text, ' ') FROM pg_stat_activity a").fetchone()
            self.sinks[ACTIVITY].append(str(activity).encode())

    def collect_at_last(self, service: Service) -> None:
        """Takes what is left when the service has ended."""
        self._collect_files(service)
        self.sinks[STDERR].append(service.stderr.read_bytes())
        self.sinks[STDOUT].append(service.printed)
        self.sinks[SERVER_LOG].append(self._server_log.read_bytes())
        with (
            psycopg.connect(self.url) as database,
            database.cursor().copy("COPY ai_events TO STDOUT") as copy,
        ):
            self.sinks[EVENTS].append(b"".join(bytes(block) for block in copy))

    def _collect_files(self, service: Service) -> None:
        directory = service.var_dir.parent
        telemetry = service.var_dir / "telemetry"
        for sink, root in (
            (VAR_FILES, service.var_dir),
            (TEMPORARY, directory / "tmp"),
            (MODELS, directory / "models"),
        ):
            for file in root.rglob("*"):
                inside = file == telemetry or telemetry in file.parents
                # A service that runs removes what it no longer needs; a directory is no file.
                with suppress(FileNotFoundError, IsADirectoryError):
                    self.sinks[TELEMETRY_LOG if inside else sink].append(file.read_bytes())


def _read_deleted(descriptors: Path) -> Iterator[bytes]:
    for link in descriptors.iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if str(link.readlink()).endswith("(deleted)"):
                yield link.read_bytes()


@contextmanager
def open_ward(seed: int, count: int) -> Iterator[Ward]:
    """Yields a ward over the embedded database; everything in it is gone afterwards."""
    people = draw_people(seed, count)
    typed = [f"Ärger typed by {person['full_name'][::-1]}" for person in draw_people(seed + 1_000_003, 2)]
    with tempfile.TemporaryDirectory(prefix="leadscore-proof-") as name, open_embedded(Path(name)) as server:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute("CREATE DATABASE crm")
        url = server.replace("/postgres?", "/crm?")
        upgrade(url)
        add_people(url, people, birth_date="1907-03-11")
        with psycopg.connect(url) as connection:
            connection.execute("CREATE VIEW canary_source AS SELECT * FROM lead_source")
        yield Ward(Path(name), url, Path(name, "postgres", "server.log"), people, typed)
