"""What others of its user find of the service: no secret, and no way to have it run what is theirs."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import httpx2
import pytest

from bench.servers import READABLE, descend
from tests.service import Service, publish_crm_model

POWERLESS = """
import ctypes, os, sys
for power in range(64):
    ctypes.CDLL(None).prctl(24, power, 0, 0, 0)  # PR_CAPBSET_DROP; an ordinary user has none to drop
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Runs Python without the powers of root, so that the kernel treats it as it treats an ordinary user."""

SERVE_POWERLESS = ("-c", POWERLESS, "-m", "app.cli", "serve")

LOOK = """
import sys
for pid in sys.argv[1:]:
    for name in ("environ", "mem"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                print(name, file.read() if name == "environ" else "", flush=True)
        except PermissionError:
            print(name, "refused", flush=True)
"""


def look_into(pids: Iterable[int]) -> list[str]:
    """Returns what another process of the same user sees of each process: its environment, its memory."""
    command = [sys.executable, "-c", POWERLESS, "-c", LOOK, *map(str, pids)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_other_process_of_its_user_finds_a_secret_of_the_service(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    models = publish_crm_model(tmp_path / "models")
    settings = {"WORKERS": workers, "CANARY": "sings"}
    with Service(tmp_path, database_url, models, command=SERVE_POWERLESS, **settings) as service:
        assert httpx2.get(f"http://127.0.0.1:{service.port}/readyz").status_code == 200
        serving = {service.pid, *service.worker_pids()}
        assert len(serving) == {"1": 1, "2": 3}[workers]
        assert set(look_into(serving)) == {"environ refused", "mem refused"}
        assert "sings" not in "".join(look_into(descend(service.pid)))  # with what helps them
        assert service.stop() == 0


def test_a_service_that_a_bench_starts_is_open_to_whoever_started_it(
    database_url: str, tmp_path: Path
) -> None:
    settings = {"WORKERS": "2", "CANARY": "sings", **READABLE}
    with Service(tmp_path, database_url, tmp_path, command=SERVE_POWERLESS, **settings) as service:
        for pid in (service.pid, *service.worker_pids()):
            assert "sings" in "".join(look_into([pid]))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_nothing_out_of_the_current_directory_is_imported(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    models, folder, told = publish_crm_model(tmp_path / "models"), tmp_path / "here", tmp_path / "imported"
    (folder / "app").mkdir(parents=True)
    for name in ("app/__init__.py", "skops.py", "threading.py"):
        (folder / name).write_text(f"open({str(told)!r}, 'a').write(__name__)")
    installed = (str(Path(sys.executable).with_name("leadscore")), "serve")  # -m would look there itself
    with Service(tmp_path, database_url, models, command=installed, cwd=folder, WORKERS=workers) as service:
        assert httpx2.get(f"http://127.0.0.1:{service.port}/readyz").status_code == 200
        assert service.stop() == 0
    assert not told.exists()
