"""The PostgreSQL that comes along: out of a wheel, its data under `VAR_DIR`, on a Unix socket only.

Several commands may use one server at a time: the first starts it, the last one out stops it, and after a
`kill -9` the next one finds it running or recovers it. File locks say who is there, because the kernel
releases them however a process ends; process numbers are never trusted. Nothing here knows what is in the
database. Called by `app.serve`, the making of the shipped model, and the tests.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg

from app.db.conninfo import complete_address
from app.db.postgres_programs import MAJOR_VERSION, find_programs, run_program
from app.db.unprivileged import SystemUser, find_user, grant_search, open_installation
from app.errors import CommandError

_SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET_PATH = 103  # bytes; the smallest `sun_path` in use, macOS's, less its NUL
_START_SECONDS, _STOP_SECONDS = 60.0, 30.0
_LEAST_BUFFER_MB, _MOST_BUFFER_MB = 128, 4096


@contextmanager
def open_embedded(var_dir: Path) -> Iterator[str]:
    """Yields the URL of the running server whose data are in `var_dir/postgres`.

    Raises:
        CommandError: it cannot be started here; the message says what to change.
    """
    server = _Server(var_dir.resolve() / "postgres")
    server.enter()
    try:
        yield server.url()
    finally:
        server.leave()


class _Server:
    """One data directory, and this process's part in the server over it.

    `door` is held for the moment somebody comes or goes, `guests` (shared) by every process that uses the
    server, and `alive` by the server's own processes, which inherit it.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._data = home / "data"
        self._log = home / "server.log"
        self._guest = -1

    def enter(self) -> None:
        """Joins the running server, or starts it."""
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with _opened(self._home / "door.lock") as door:
                fcntl.flock(door, fcntl.LOCK_EX)
                self._join()
        except OSError as exc:
            raise CommandError(
                f"the embedded database cannot be kept in {self._home} ({exc.strerror}); "
                "set VAR_DIR to another directory"
            ) from exc

    def _join(self) -> None:
        self._guest = _open(self._home / "guests.lock")
        fcntl.flock(self._guest, fcntl.LOCK_SH)
        try:
            self._ensure_running()
        except BaseException:
            with _undisturbed():
                self._depart()
            raise

    def leave(self) -> None:
        """Stops the server if nobody else uses it."""
        with _undisturbed(), _opened(self._home / "door.lock") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            self._depart()

    def _depart(self) -> None:
        last = _try_lock(self._guest)
        os.close(self._guest)
        if last:
            self._stop()

    def url(self) -> str:
        """Returns the address the running server announced in its process file.

        Raises:
            OSError, ValueError: it has not announced that it is ready.
        """
        _, _, _, _, socket_dir, _, _, status = self._process_file()
        if status.strip() != "ready":
            raise ValueError(status)
        return f"postgresql://postgres@/postgres?host={quote(socket_dir, safe='')}&port=5432"

    def _ensure_running(self) -> None:
        user = find_user(self._data)
        with _opened(self._home / "alive.lock") as alive:
            if self._answers(alive):
                return
            binaries = find_programs()
            if user is not None:
                open_installation(binaries.parent)
                grant_search(binaries, user)
                grant_search(self._data, user)
            if not self._data.exists():
                self._initialise(binaries, user)
            self._check_version()
            sockets = self._socket_dir(user)
            # No process of this server is left. Files that name one are: the number may be another's by now.
            for stale in (self._data / "postmaster.pid", sockets / _SOCKET, sockets / f"{_SOCKET}.lock"):
                stale.unlink(missing_ok=True)
            self._start(binaries, user, sockets, alive)
        with _opened(self._home / "alive.lock") as alive:
            if not self._answers(alive):
                raise CommandError(f"the embedded database did not start: {self._reason()}")

    def _answers(self, alive: int) -> bool:
        """Waits until the server answers, or none of its processes is left; then the lock `alive` is ours."""

        def settled() -> bool:
            return _try_lock(alive) or self._accepts()

        if not _poll(settled, _START_SECONDS):
            raise CommandError(f"the embedded database does not answer; its log is {self._log}")
        return not _try_lock(alive)

    def _accepts(self) -> bool:
        try:
            psycopg.connect(complete_address(self.url()), connect_timeout=2).close()
        except (psycopg.OperationalError, OSError, ValueError):
            return False
        return True

    def _initialise(self, binaries: Path, user: SystemUser | None) -> None:
        # Renamed when complete: a directory that is called data is one that was finished.
        for unfinished in self._home.glob("new-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="new-", dir=self._home, ignore_cleanup_errors=True) as folder:
            new = Path(folder) / "data"
            new.mkdir(mode=0o700)
            if user is not None:
                Path(folder).chmod(0o711)
                os.chown(new, user.uid, user.gid)
            done = run_program(
                user,
                [
                    str(binaries / "initdb"),
                    "--pgdata",
                    str(new),
                    "--username=postgres",
                    "--auth=trust",
                    "--encoding=UTF8",
                    "--locale=C",
                    "--locale-provider=builtin",
                    "--builtin-locale=C.UTF-8",
                ],
                capture=True,
            )
            if done.returncode != 0:
                raise CommandError(
                    f"the embedded database cannot be made in {self._home}: {_last_line(done.stderr)}"
                )
            new.rename(self._data)

    def _check_version(self) -> None:
        made_by = (self._data / "PG_VERSION").read_text(encoding="ascii").strip()
        if made_by != MAJOR_VERSION:
            raise CommandError(
                f"{self._data} was made by PostgreSQL {made_by} and this is {MAJOR_VERSION}; "
                "move it away, or set DATABASE_URL"
            )

    def _start(self, binaries: Path, user: SystemUser | None, sockets: Path, alive: int) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": '"' + str(sockets).replace('"', '""') + '"',
            "unix_socket_permissions": "0700",
            "port": "5432",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "jit": "off",
            "shared_buffers": f"{_buffer_megabytes()}MB",
            # Values of failing rows and statements are personal data, and the log is not the place for them.
            # The message of an error quotes them too, so what is logged begins above errors: whoever sent
            # the statement is told of it, and the service logs its SQLSTATE.
            "log_min_messages": "log",
            "log_error_verbosity": "terse",
            "log_min_error_statement": "panic",
        }
        arguments = [str(binaries / "postgres"), "-D", str(self._data)]
        for name, value in settings.items():
            arguments += ["-c", f"{name}={value}"]
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # The shell puts it in the background and ends: nobody's child, it may outlive us while others use
            # it.
            run_program(user, ["/bin/sh", "-c", '"$@" &', "sh", *arguments], output=log, keep=alive)
        finally:
            os.close(log)

    def _socket_dir(self, user: SystemUser | None) -> Path:
        """Returns a directory for the socket that only the server's user and root may enter."""
        place = self._home / "socket"
        # To the client's library a comma separates servers.
        if len(os.fsencode(place / _SOCKET)) > _LONGEST_SOCKET_PATH or "," in str(place):
            digest = hashlib.sha256(os.fsencode(self._home)).hexdigest()[:16]
            place = Path("/tmp", f"leadscore-{os.geteuid()}-{digest}")  # noqa: S108 - looked at below
        owners = {os.geteuid(), user.uid if user else os.geteuid()}
        place.mkdir(mode=0o700, exist_ok=True)
        facts = place.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid not in owners or facts.st_mode & 0o077:
            raise CommandError(f"{place} is somebody else's; remove it, or set VAR_DIR to a shorter path")
        if user is not None:
            os.chown(place, user.uid, user.gid, follow_symlinks=False)
        return place

    def _stop(self) -> None:
        with _opened(self._home / "alive.lock") as alive:
            # One that has only just been started is nobody to signal until it has written its process file.
            _poll(lambda: _try_lock(alive) or self._process_number() is not None, _STOP_SECONDS)
            # Fast, then immediate, then by force; recovery at the next start makes each of them safe.
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                if _try_lock(alive):
                    return
                if (process := self._process_number()) is not None:
                    with contextlib.suppress(OSError):  # it has just ended by itself
                        os.kill(process, number)
                if _poll(lambda: _try_lock(alive), _STOP_SECONDS):
                    return

    def _process_number(self) -> int | None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(self._process_file()[0])
        return None

    def _process_file(self) -> list[str]:
        """Returns the lines of `postmaster.pid`: process number, socket directory fifth, status eighth."""
        return (
            (self._data / "postmaster.pid").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        )

    def _reason(self) -> str:
        """Returns what the server said when it gave up."""
        said = self._log.read_text(encoding="utf-8", errors="replace")
        fatal = [line.partition("FATAL:")[2].strip() for line in said.splitlines() if "FATAL:" in line]
        # Before it has read its settings it words what is wrong in another way, and a kill it does not word.
        return fatal[-1] if fatal else f"{_last_line(said)}; its log is {self._log}"


def _buffer_megabytes() -> int:
    """Returns an eighth of the machine's memory, within limits: what a request reads should lie there."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(memory // 8 >> 20, _LEAST_BUFFER_MB), _MOST_BUFFER_MB)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignores SIGINT and SIGTERM: who is told once more to end would leave the server running."""
    if threading.current_thread() is not threading.main_thread():  # it hears none
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _poll(condition: Callable[[], bool], seconds: float) -> bool:
    """Asks again until the condition holds; returns False when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
