"""The counts that workers share are in memory, and gone when the service is."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.shared_counts import MEMORY, open_shared_counts
from bench.servers import READABLE
from tests.service import Service, publish_crm_model


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


def test_it_is_made_in_memory_for_its_owner_alone_and_removed_in_the_end(
    tmp_path: Path, memory: Path
) -> None:
    with open_shared_counts(tmp_path / "var", memory=memory) as path:
        assert path.parent == memory
        assert path.stat().st_mode & 0o777 == 0o700
        assert list(path.iterdir()) == []
        (path / "counter_1.db").touch()
    assert list(memory.iterdir()) == []
    assert not (tmp_path / "var").exists()


@pytest.mark.parametrize(("name", "room_bytes"), [("nowhere", 0), ("memory", 1 << 62)])
def test_without_room_in_memory_it_is_made_under_var_dir(
    tmp_path: Path, memory: Path, name: str, room_bytes: int
) -> None:
    var_dir = tmp_path / "not" / "yet"
    with open_shared_counts(var_dir, memory=tmp_path / name, room_bytes=room_bytes) as path:
        assert path.parent == var_dir
    assert [*memory.iterdir(), *var_dir.iterdir()] == []


def test_what_a_killed_service_left_goes_and_what_others_have_stays(tmp_path: Path, memory: Path) -> None:
    abandoned, elsewhere = memory / "leadscore-counts-abandoned", tmp_path / "elsewhere"
    for directory in (abandoned, elsewhere):
        directory.mkdir()
        (directory / "counter_1.db").touch()
    (memory / "leadscore-counts-link").symlink_to(elsewhere)
    (memory / "leadscore-counts-file").touch()
    with open_shared_counts(tmp_path, memory=memory) as living:
        with open_shared_counts(tmp_path, memory=memory) as other:
            assert not abandoned.exists()
            assert living.is_dir()
            assert other.is_dir()
        assert living.is_dir()
    assert [path.name for path in elsewhere.iterdir()] == ["counter_1.db"]
    assert {path.name for path in memory.iterdir()} == {"leadscore-counts-link", "leadscore-counts-file"}


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Iterator[Service]:
    settings = {"WORKERS": "2", **READABLE}  # what a service has mapped only root may see
    with Service(tmp_path, database_url, publish_crm_model(tmp_path / "models"), **settings) as service:
        yield service


def find_counts(service: Service) -> set[Path]:
    """The directories of the counts that the workers have mapped."""
    maps = [(Path("/proc") / str(pid) / "maps").read_text() for pid in service.worker_pids()]
    assert maps
    files = {Path(line.split()[-1]) for text in maps for line in text.splitlines() if line.endswith(".db")}
    return {file.parent for file in files}


@pytest.mark.skipif(not MEMORY.is_dir(), reason="the machine has no memory file system there")
def test_workers_have_nothing_mapped_that_a_full_disk_could_take_from_them(service: Service) -> None:
    (first,) = find_counts(service)
    assert first.parent == MEMORY
    service.send(signal.SIGKILL)
    service.wait()
    assert first.is_dir()
    service.start()
    (second,) = find_counts(service)
    assert not first.exists()
    assert service.stop() == 0
    assert not second.exists()
