"""Starts the service and its contenders on free ports of the loopback, and ends each by its process ID."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.data import RELATION, Stage

ROOT = Path(__file__).parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""One core a server: what is compared is the work, not the number of threads it is spread over."""

_PATHS = (str(ROOT / "bench" / "readable"), os.environ.get("PYTHONPATH", ""))
READABLE = {"PYTHONPATH": os.pathsep.join(filter(None, _PATHS))}
"""What leaves a service open to whoever runs a bench, root or not (`bench/readable`)."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    port: int
    pid: int
    seconds_to_ready: float

    def resident_megabytes(self) -> float:
        """Returns the resident set of the whole process tree, in MB."""
        return sum(_read_kilobytes(pid, "smaps_rollup", "Rss") for pid in descend(self.pid)) / 1000

    def peak_megabytes(self) -> float:
        """Returns the most its processes have held resident since `forget_peak`, in MB."""
        return sum(_read_kilobytes(pid, "status", "VmHWM") for pid in descend(self.pid)) / 1000

    def forget_peak(self) -> None:
        """Has the kernel count each process's peak anew, from what it holds now."""
        for pid in descend(self.pid):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


@contextmanager
def start_service(
    name: str, stage: Stage, directory: Path, *, plant: str | None = None, **environment: str
) -> Iterator[Server]:
    """Starts `leadscore serve` on `bench_leads`; `environment` adds to its settings.

    With a `plant` it is the service of `bench.planted` that has this part replaced.
    """
    settings = {
        "DATABASE_URL": stage.url, "LEAD_SOURCE": RELATION, "ML_MODEL_DIR": str(stage.model_dir),
        "VAR_DIR": str(directory / name), "PORT": "0", "LOG_LEVEL": "ERROR",
        # A busy machine makes answers late here, not 503.
        "DATABASE_DEADLINE_SECONDS": "30", "AI_REQUEST_DEADLINE_SECONDS": "60", "DRAIN_SECONDS": "0",
        **READABLE, **environment,
    }  # fmt: skip
    command = ["app.cli", "serve"] if plant is None else ["bench.planted", plant]
    with _start(name, command, settings, quiet=plant is not None) as server:
        yield server


@contextmanager
def start_contender(name: str, stage: Stage) -> Iterator[Server]:
    """Starts an application of `bench.contenders`."""
    with _start(name, ["bench.contenders", name, stage.url, str(stage.model_dir)], {}) as server:
        yield server


@contextmanager
def _start(
    name: str, command: list[str], environment: dict[str, str], *, quiet: bool = False
) -> Iterator[Server]:
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            found = next(
                (
                    match
                    for line in process.stdout
                    if (match := re.search(r"listens on http://.*:(\d+)", line))
                ),
                None,
            )
            if found is None:
                raise SystemExit(f"{name} did not start; what it said is above")
            yield Server(name, int(found[1]), process.pid, time.perf_counter() - began)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def worker_pids(pid: int) -> list[int]:
    """Returns the process IDs of a service's workers; with one worker there is no process but the service."""
    forking = [child for child in _children(pid) if b"forkserver" in _command(child)]
    return [worker for process in forking for worker in _children(process)]


def proportional_megabytes(pid: int) -> float:
    """Returns what a process and its descendants hold, a page that several share counted once, in MB."""
    return sum(_read_kilobytes(member, "smaps_rollup", "Pss") for member in descend(pid)) / 1000


def descend(pid: int) -> list[int]:
    """Returns a process and all that it started, and those did."""
    found = [pid]
    for member in found:
        found += _children(member)
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
            except OSError:
                continue
            if int(status.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def _read_kilobytes(pid: int, file: str, name: str) -> float:
    """Returns a figure the kernel has of a process, in kB as everywhere here (1,000 bytes)."""
    text = Path(f"/proc/{pid}/{file}").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1.024 if found else 0.0
