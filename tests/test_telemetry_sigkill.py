"""A recorder is killed with SIGKILL over and over; whatever it acknowledged is in its log."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.ai.telemetry_log import TelemetryLog

ROOT = Path(__file__).parent.parent

RECORDER = """
import asyncio, os, sys
from pathlib import Path
from app.ai.events import PredictionError
from app.ai.ml_telemetry import MlTelemetry
from app.ai.telemetry_log import TelemetryLog
from app.errors import DatabaseUnavailableError
from app.log_setup import configure_logging

class Away:
    async def write_events(self, events):
        raise DatabaseUnavailableError

async def main():
    configure_logging("ERROR")
    telemetry = MlTelemetry(TelemetryLog(Path(sys.argv[1])), Away(), ship_interval_seconds=0.01)
    await telemetry.open()
    event = PredictionError(
        route="/ai/x", status=422, trace_id=None, latency_ms=1.0, error_code="EMPTY_BATCH", asked=None
    )
    async def client(client_number):
        number = 0
        while True:
            name = f"{sys.argv[2]}-{client_number}-{number}"
            await telemetry.record(lambda: event, name)
            os.write(1, name.encode() + b"\\n")
            number += 1
    await asyncio.gather(*(client(number) for number in range(8)))

asyncio.run(main())
"""


class Recorder:
    """A process that records and says on its standard output what was acknowledged."""

    def __init__(self, directory: Path, name: str, kill_after: int) -> None:
        self.acknowledged: list[str] = []
        self._kill_after = kill_after
        self._process = subprocess.Popen(
            [sys.executable, "-c", RECORDER, str(directory), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):
                self.acknowledged.append(line.decode().strip())
            if len(self.acknowledged) == self._kill_after:
                os.kill(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()

    def wait(self) -> list[str]:
        self._reader.join(60)
        assert self._process.wait(10) == -signal.SIGKILL
        return self.acknowledged


@pytest.mark.parametrize("workers", [1, 2])
def test_no_acknowledged_event_is_lost_to_sigkill(tmp_path: Path, workers: int) -> None:
    acknowledged: list[str] = []
    for round_number in range(3):
        recorders = [
            Recorder(tmp_path, f"{round_number}-{worker}", kill_after=150 + 37 * round_number)
            for worker in range(workers)
        ]
        for recorder in recorders:
            acknowledged += recorder.wait()
    log = TelemetryLog(tmp_path)
    kept = [event.request_id for event in log.read_batch(1_000_000).events]
    assert log.count() == len(kept)
    log.close()
    assert len(acknowledged) >= 3 * 150 * workers
    assert set(acknowledged) <= set(kept)
    assert len(kept) == len(set(kept))
    # A kill may leave events nobody was told of, but no more than were under way.
    assert len(kept) - len(acknowledged) <= 3 * 8 * workers
