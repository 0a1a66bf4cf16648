"""What `leadscore serve` does: a database, a listening socket, the workers, and an orderly end.

The parent process owns the embedded PostgreSQL and outlives every worker; a worker only ever sees
`DATABASE_URL`. Nothing here knows what a request is. Called by `app.cli` alone.
"""

import _thread
import asyncio
import errno
import fcntl
import math
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import click
import structlog
import uvicorn
import uvicorn._subprocess
import uvicorn.supervisors.multiprocess
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app import own_memory
from app.ai.artifact_process import TOLD
from app.db.connect_failure import name_failure
from app.db.embedded import open_embedded
from app.db.schema_state import check_lead_source, current_state
from app.drain import ANNOUNCEMENT, end_worker
from app.errors import CommandError, DatabaseUnavailableError, MissingRightError, SettingsError
from app.log_setup import configure_logging, write_out
from app.settings import UNIX_PREFIX, Settings, find_misspelt
from app.shared_counts import open_shared_counts

DEMO_PEOPLE = 10_000
DEMO_SEED = 1

STRAGGLER_SECONDS = 5
"""How long requests that are still in flight after the drain may take."""

WORKER_SECONDS = 60
"""How long a worker may take to start, or to say that it is alive, before it is replaced."""

ENDING_SECONDS = 4
"""How long a worker may take to close what it has open, once nothing is in flight, before it is killed."""

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_log = structlog.get_logger()


class _Stopped(BaseException):
    """A signal asked the service to end; not an error, so nothing that handles errors may catch it."""


def serve(settings: Settings) -> None:
    """Serves until SIGINT, SIGTERM, or SIGHUP where it replaces no workers; stops everything in order.

    Raises:
        SettingsError: the port is taken, or was while the service started, the lead source cannot be read, or
            a worker could not start.
        CommandError: the embedded database cannot be started or filled; the message says what to change.
    """
    configure_logging(settings.log_level)
    own_memory.close_to_others()
    if misspelt := find_misspelt(os.environ):
        # Not refused, as in `.env`: the environment is everybody's.
        _log.warning(
            "settings_not_known", names=misspelt, meaning="no setting has these names: is one misspelt?"
        )
    try:
        with ExitStack() as stack:
            for number in _STOPS:
                if number != signal.SIGHUP or not _outlives_terminal():
                    signal.signal(number, _raise_stopped)
            listener = stack.enter_context(bind(settings.host, settings.port))
            url = stack.enter_context(open_database(settings))
            if settings.database_url is None:
                _seed_once(url)
            _check_database(settings, url)
            _prepare_workers(stack, settings, url)
            stack.callback(_ignore_signals)  # closed first: a second Ctrl-C must not cut the closing short
            _run(settings, listener)
    except _Stopped:
        return
    finally:
        write_out()  # what the command says of an error comes after the log


@contextmanager
def open_database(settings: Settings) -> Iterator[str]:
    """Yields the URL of the configured database, or of the embedded one, started and migrated."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    with open_embedded(settings.var_dir) as url:
        if current_state(url) != "current":
            from app.db.migrations import upgrade  # noqa: PLC0415 - its libraries are not needed on later starts

            upgrade(url)
        yield url


def _seed_once(url: str) -> None:
    from app.db.demo_crm import has_people, load_demo  # noqa: PLC0415 - NumPy is not needed on later starts

    if not has_people(url):
        click.echo(f"Filling the empty database with a demo CRM of {DEMO_PEOPLE:,} people ...", err=True)
        load_demo(url, people=DEMO_PEOPLE, seed=DEMO_SEED, until=datetime.now(UTC))


def _check_database(settings: Settings, url: str) -> None:
    """Warns of a database that is away or not migrated: cached answers and health need none, and it recovers.

    Raises:
        SettingsError: the database answers, and LEAD_SOURCE cannot be read: every request would fail.
    """
    try:
        # Before the migrations have run, the default view is not there yet.
        if _is_migrated(url) or settings.lead_source != Settings.model_fields["lead_source"].default:
            check_lead_source(url, settings.lead_source)
    except DatabaseUnavailableError as exc:
        cause = name_failure(exc, url)
        _log.warning(
            "database_unavailable", cause=cause, meaning="leads cannot be looked up until it answers"
        )
    except CommandError as exc:
        raise SettingsError(f"LEAD_SOURCE: {exc}") from exc


def _is_migrated(url: str) -> bool:
    """Tells whether the migrations have run, as far as is known; warns unless all of them have."""
    try:
        state = current_state(url)
    except MissingRightError as exc:
        _log.warning("migrations_not_seen", meaning=str(exc))
        return True
    if state != "current":
        _log.warning("database_not_migrated", state=state, remedy="run `leadscore db upgrade`")
    return state in ("current", "unknown")


def _prepare_workers(stack: ExitStack, settings: Settings, url: str) -> None:
    """Decides how workers start, and leaves in the environment what they must find before any import."""
    os.environ["DATABASE_URL"] = url
    if settings.workers > 1:
        # prometheus_client decides at import time whether counts are shared between processes.
        shared_counts = stack.enter_context(open_shared_counts(settings.var_dir))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared_counts.resolve())
        os.environ["PYTHONSAFEPATH"] = "1"  # what they fork from imports nothing out of the current directory
        # uvicorn would start each with all libraries in memory once more, and has no setting for it.
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["app.serve", "app.preloaded"])  # `Worker` is of this module
        _start_tracker()
        uvicorn._subprocess.spawn = forks  # type: ignore[assignment]  # noqa: SLF001
        uvicorn.supervisors.multiprocess.Process = Worker  # type: ignore[misc]


def _start_tracker() -> None:
    # multiprocessing would, and tell it all; but it is a program of its own, which others may look into.
    hidden = {name: os.environ.pop(name) for name in os.environ.keys() - set(TOLD)}
    try:
        multiprocessing.resource_tracker.ensure_running()
    finally:
        os.environ.update(hidden)


@contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that does not listen yet: callers are refused, not kept waiting.

    Raises:
        SettingsError: the address cannot be used, or another has it.
    """
    path = Path(host.removeprefix(UNIX_PREFIX)) if host.startswith(UNIX_PREFIX) else None
    address: str | tuple[str, int]
    if path is not None:
        family, address = socket.AF_UNIX, str(path)
    else:
        family, address = socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port)
    with socket.socket(family, socket.SOCK_STREAM) as listener, ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if path is not None:
                stack.enter_context(_claim(path))
                _remove_if_abandoned(path)
            listener.bind(address)
        except (OSError, UnicodeError) as exc:  # a name that DNS cannot carry is a UnicodeError
            raise SettingsError(_explain_refusal(host, port, exc)) from exc
        listener.set_inheritable(True)
        try:
            yield listener
        finally:
            if path is not None:
                path.unlink(missing_ok=True)


@contextmanager
def _claim(path: Path) -> Iterator[None]:
    """Keeps the path of a socket from other services: one that starts or ends does not listen, either."""
    claim = os.open(f"{path}.lock", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise _taken() from exc
        yield
    finally:
        os.close(claim)


def _taken() -> OSError:
    return OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _explain_refusal(host: str, port: int, exc: OSError | UnicodeError) -> str:
    why = "not a host name" if isinstance(exc, UnicodeError) else (exc.strerror or exc.args[0]).lower()
    if host.startswith(UNIX_PREFIX):
        return f"HOST: cannot listen on {host.removeprefix(UNIX_PREFIX)} ({why})"
    of_host = isinstance(exc, UnicodeError | socket.gaierror) or exc.errno == errno.EADDRNOTAVAIL
    if of_host:
        return f"HOST: cannot listen on {host} ({why}); set an address of this machine"
    return f"PORT: cannot listen on {host}:{port} ({why}); set a free one"


def _remove_if_abandoned(path: Path) -> None:
    """Removes the socket a killed service left behind, which nobody listens on any more."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as caller:
            try:
                caller.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


def _run(settings: Settings, listener: socket.socket) -> None:
    config = uvicorn.Config(
        "app.main:create_app",
        factory=True,
        workers=settings.workers,
        http="app.http_protocol:ProblemProtocol",
        ws="none",
        lifespan="on",  # by default it would serve whatever fails to start, and answer nothing
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + STRAGGLER_SECONDS,
        timeout_worker_healthcheck=WORKER_SECONDS,
    )

    def announce() -> None:
        _check_listening(listener, settings)
        demo = settings.lead_source == Settings.model_fields["lead_source"].default
        ids = '["lead_1", "lead_2", "nobody"]' if demo else '["YOUR_LEAD_ID"]'
        _announce(listener, ids, guarded=settings.auth_mode != "none")

    if settings.workers > 1:
        _Supervisor(config, [listener], announce, settings.drain_seconds).run()
        return
    server = _Server(config, announce, settings.drain_seconds)
    if not _outlives_terminal():
        signal.signal(signal.SIGHUP, server.handle_exit)  # several workers restart instead
    server.run([listener])
    if not server.started:
        raise SettingsError("the service could not start; the log above says why")


class _Server(uvicorn.Server):
    """One worker in this process, which says when it is ready, and drains after SIGTERM."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None], drain_seconds: float) -> None:
        super().__init__(config)
        self._announce = announce
        self._drain_seconds = drain_seconds
        self._drains = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            try:
                self._announce()
            except SettingsError:
                await self.shutdown(sockets)
                raise

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drains = self._drains or sig == signal.SIGTERM
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._drains:
            await asyncio.sleep(self._drain_seconds)
        await super().shutdown(sockets)


class Worker(Process):
    """A worker that is asked whether it is alive without waiting for the answer, and whose end has a limit.

    The thread that asks and joins also hears the signals and replaces who died: a worker that is frozen may
    not stop it.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self._asked_at: float | None = None
        self._ends_by = 0.0

    def is_alive(self, timeout: float = 5) -> bool:
        """Tells whether the process is there and has not been silent for as long as `timeout`."""
        if not self.process.is_alive():
            return False
        while self.parent_conn.poll():
            self.parent_conn.recv()
            self._asked_at = None
        if self._asked_at is None:
            self.parent_conn.send(b"ping")
            self._asked_at = time.monotonic()
            return True
        return time.monotonic() < self._asked_at + timeout

    def terminate(self) -> None:
        """Asks it to end, without a drain."""
        self._ends_by = time.monotonic() + (self.config.timeout_graceful_shutdown or 0) + ENDING_SECONDS
        if self.pid is not None:
            with suppress(ProcessLookupError):
                end_worker(self.pid)

    def join(self) -> None:
        """Waits for its end, for as long as that may take, and kills it then."""
        self.process.join(max(0.0, self._ends_by - time.monotonic()))
        if self.process.is_alive():
            _log.warning(
                "worker_killed", pid=self.pid, meaning="it was not ready, silent, or did not end in time"
            )
            self.process.kill()
            self.process.join(ENDING_SECONDS)  # the kernel may hold one back that waits for a disk


class _Supervisor(Multiprocess):
    """Several workers, which says when all of them are ready, and tells them of the end before it comes.

    The listening socket is everybody's: when a worker is replaced (SIGHUP), the others go on accepting.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        sockets: list[socket.socket],
        announce: Callable[[], None],
        drain_seconds: float,
    ) -> None:
        super().__init__(config, sockets)
        self._announce = announce
        self._drain_seconds = drain_seconds
        self._drains = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        # Not left to the queue of signals, which nobody reads while workers start or are replaced.
        self._drains = self._drains or number == signal.SIGTERM
        # What this interrupts may be a wait for the event, which holds its lock.
        _thread.start_new_thread(self.should_exit.set, ())

    def init_processes(self) -> None:
        super().init_processes()
        if all(process.wait_until_ready(WORKER_SECONDS, self.should_exit) for process in self.processes):
            try:
                self._announce()
            except SettingsError:
                self.terminate_all()
                self.join_all()
                raise

    def terminate_all(self) -> None:
        if self._drains:
            for process in self.processes:
                if process.pid is not None:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, ANNOUNCEMENT)
            time.sleep(self._drain_seconds)
        super().terminate_all()


def _check_listening(listener: socket.socket, settings: Settings) -> None:
    # Until it listens another program, of any user, may bind the same address and listen first. The event
    # loop says nothing then, and closes what it was given.
    if listener.fileno() < 0 or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise SettingsError(_explain_refusal(settings.host, settings.port, _taken()))


def _announce(listener: socket.socket, ids: str, *, guarded: bool) -> None:
    curl = "curl -s" + (' -H "Authorization: Bearer $KEY"' if guarded else "")
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        base, where, curl = "http://localhost", f"{UNIX_PREFIX}{address}", f"{curl} --unix-socket {address}"
    else:
        host, port = address[:2]
        base = where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    post = f"{curl} {base}/ai/advanced-ml/predict-batch -H 'Content-Type: application/json'"
    click.echo(
        f"\nLead Scoring listens on {where}   (API: {base}/docs, stop: Ctrl-C)\n\n"
        f"  {curl} {base}/ai/advanced-ml/health\n"
        f"  {curl} {base}/ai/advanced-ml/models\n"
        f"  {post} -d '{ids}'\n"
    )


def _outlives_terminal() -> bool:
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup has it


def _raise_stopped(_signal: int, _frame: FrameType | None) -> None:
    _ignore_signals()  # raised once more, in what the first one has others close, it could leave a lock taken
    raise _Stopped


def _ignore_signals() -> None:
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
