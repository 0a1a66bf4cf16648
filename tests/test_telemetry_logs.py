"""Log lines are JSON with the request's ID, and an exception's text never gets into one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.drain import OUT_OF_MEMORY
from app.errors import DatabaseUnavailableError, EmptyBatchError
from app.log_setup import describe_exception

ROOT = Path(__file__).parent.parent
CANARY = "Zoë Quicksilver <zoe@example.org>"


def run(code: str) -> list[dict[str, Any]]:
    """Runs code in a process of its own with logging configured; returns its log lines."""
    prelude = (
        "import asyncio, logging, sys, threading, warnings, structlog\n"
        "from app.log_setup import configure_logging\n"
        f"CANARY = {CANARY!r}\n"
        "configure_logging('INFO')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, cwd=ROOT, check=False, timeout=60
    )
    assert done.stdout == b""
    assert CANARY not in done.stderr.decode()
    assert b"zoe@" not in done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_carries_level_time_and_the_bound_request_id() -> None:
    (line,) = run(
        "structlog.contextvars.bind_contextvars(request_id='abc')\n"
        "structlog.get_logger().info('hello', n=1)\n"
        "structlog.get_logger().debug('too quiet')"
    )
    assert (line["event"], line["n"], line["request_id"], line["level"]) == ("hello", 1, "abc", "info")
    assert line["timestamp"].endswith("Z")


def test_a_logged_exception_is_told_by_type_and_place_without_its_text() -> None:
    (line,) = run(
        "try:\n"
        "    try:\n"
        "        raise ValueError(CANARY)\n"
        "    except ValueError as exc:\n"
        "        raise RuntimeError(CANARY) from exc\n"
        "except RuntimeError:\n"
        "    structlog.get_logger().exception('failed')"
    )
    assert [part["type"] for part in line["exception"]] == ["builtins.RuntimeError", "builtins.ValueError"]
    assert "<module>" in line["exception"][0]["at"][0]


@pytest.mark.parametrize(
    "call",
    [
        "logging.getLogger('psycopg').warning('error in %s', CANARY)",
        "logging.getLogger('psycopg').error('broken', exc_info=ValueError(CANARY))",
        "logging.getLogger('sqlalchemy.engine').info('%r', [CANARY])",
        "logging.getLogger('asyncio').error('Task exception\\nfuture: ' + CANARY)",
        "logging.getLogger('uvicorn.error').error('Exception', exc_info=ValueError(CANARY))",
        "structlog.get_logger().error('x', exc_info=ValueError(CANARY))",
        "structlog.get_logger().error('x', error=ValueError(CANARY))",
        "raise ValueError(CANARY)",
        "def work(): raise ValueError(CANARY)\nt = threading.Thread(target=work); t.start(); t.join()",
    ],
)
def test_no_way_of_logging_lets_a_value_through(call: str) -> None:
    assert len(run(call)) == 1


def test_what_is_tried_again_is_logged_without_the_text_of_what_failed() -> None:
    lines = run(
        "import stamina\n"
        "for attempt in stamina.retry_context(on=OSError, attempts=2, wait_initial=0, wait_jitter=0):\n"
        "    with attempt:\n"
        "        if attempt.num == 1:\n"
        "            raise OSError(CANARY)"
    )
    assert [line["event"] for line in lines] == ["stamina.retry_scheduled"]


def test_a_task_that_nobody_waited_for_is_reported_without_its_text() -> None:
    lines = run(
        "async def main():\n"
        "    async def work(): raise ValueError(CANARY)\n"
        "    task = asyncio.create_task(work()); await asyncio.sleep(0)\n"
        "    del task\n"
        "asyncio.run(main())"
    )
    assert [line["event"] for line in lines] == ["Task exception was never retrieved"]


def test_what_the_server_says_of_itself_is_kept_and_its_access_lines_are_not() -> None:
    lines = run(
        "logging.getLogger('uvicorn.error').info('Uvicorn running on %s', 'http://127.0.0.1:8000')\n"
        "logging.getLogger('uvicorn.access').info('%s', CANARY)"
    )
    assert [line["event"] for line in lines] == ["Uvicorn running on http://127.0.0.1:8000"]


def test_configuring_twice_writes_each_line_once() -> None:
    lines = run("configure_logging('INFO')\nlogging.getLogger('uvicorn').info('once')")
    assert [line["event"] for line in lines] == ["once"]


NOBODY = "pipe without a reader"


@pytest.mark.parametrize("where", ["/dev/full", NOBODY])
def test_a_line_that_cannot_be_written_is_lost_and_nothing_else(where: str) -> None:
    if where == NOBODY:
        reader, stderr = os.pipe()
        os.close(reader)
    else:
        stderr = os.open(where, os.O_WRONLY)
    code = (
        "import logging, structlog, sys, warnings\n"
        "from app.log_setup import configure_logging\n"
        "configure_logging('INFO')\n"
        "for _ in range(200):\n"
        "    structlog.get_logger().error('x' * 100)\n"
        "    logging.getLogger('psycopg').error('x' * 100)\n"
        "warnings.warn('x')\n"
        "sys.stderr.close()\n"
        "structlog.get_logger().error('the stream is closed')\n"
        "print('went on')"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=ROOT,
            check=False,
            timeout=60,
        )
    finally:
        os.close(stderr)
    assert done.stdout == b"went on\n"


def start(code: str) -> "subprocess.Popen[bytes]":
    """Starts code whose standard error is a pipe that is read when the test wants to."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )


def test_a_reader_who_stalls_keeps_nobody_waiting_and_no_process_from_its_end() -> None:
    with start(
        "import structlog\n"
        "from app.log_setup import configure_logging\n"
        "configure_logging('INFO')\n"
        "for _ in range(1000):\n"
        "    structlog.get_logger().info('x' * 1000)\n"
        "print('went on')"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"went on\n"  # to its end: nothing is read before the process ends
        assert process.wait() == 0


def test_lines_that_no_longer_fit_are_counted_and_told_when_they_are_read_again() -> None:
    with start(
        "import structlog, sys\n"
        "from app import log_setup\n"
        "from app.main import create_app\n"
        "from app.metrics import LOG_LINES_DROPPED, render_metrics\n"
        "from app.settings import Settings\n"
        "log_setup.MOST_WAITING = 200_000\n"
        "create_app(Settings(_env_file=None))\n"
        "for number in range(1000):\n"
        "    structlog.get_logger().info('x' * 1000, number=number)\n"
        "told = render_metrics()[0].decode().split('\\nleadscore_log_lines_dropped_total ')[1]\n"
        "print(int(float(told.split()[0])), flush=True)\n"
        "sys.stdin.read()"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        dropped = int(process.stdout.readline())
        lines: list[dict[str, Any]] = []
        while sum(line.get("lines", 0) for line in lines) < dropped:
            lines.append(json.loads(process.stderr.readline()))
        process.stdin.close()
        assert process.wait() == 0
        assert process.stderr.read() == b""
    assert dropped > 500
    kept = [line["number"] for line in lines if "number" in line]
    assert kept == sorted(set(kept))
    assert len(kept) + dropped == 1000
    assert lines[-1]["event"] == "log_lines_dropped"


def test_what_was_logged_before_the_end_is_written_with_what_ended_it() -> None:
    *lines, last = run(
        "for number in range(2000):\n"
        "    structlog.get_logger().info('x' * 100, number=number)\n"
        "raise ValueError(CANARY)"
    )
    assert [line["number"] for line in lines] == list(range(2000))
    assert last["event"] == "uncaught_exception"


def test_a_worker_without_memory_says_so_before_it_ends() -> None:
    with start(
        "import asyncio, structlog\n"
        "from app.drain import end_without_memory\n"
        "from app.log_setup import configure_logging, write_out\n"
        "configure_logging('INFO')\n"
        "async def main():\n"
        "    end_without_memory(write_out)\n"
        "    context = {'message': 'cannot take a connection', 'exception': MemoryError()}\n"
        "    asyncio.get_running_loop().call_exception_handler(context)\n"
        "asyncio.run(main())"
    ) as process:
        _, written = process.communicate(timeout=60)
    lines = [json.loads(line)["event"] for line in written.splitlines()]
    assert (process.returncode, lines) == (OUT_OF_MEMORY, ["cannot take a connection", "out_of_memory"])


def fail_with(error: Exception) -> None:
    raise error


def raise_from(error: Exception, cause: Exception | None) -> None:
    try:
        fail_with(cause or ValueError(CANARY))
    except (ValueError, psycopg.Error):
        raise error from cause


def test_our_own_errors_are_described_in_full_and_drivers_by_their_sqlstate() -> None:
    with pytest.raises(DatabaseUnavailableError) as caught:
        raise_from(DatabaseUnavailableError(), psycopg.errors.CheckViolation(CANARY))
    ours, driver = describe_exception(caught.value)
    assert ours["detail"] == DatabaseUnavailableError.default_detail
    assert (driver["type"], driver["sqlstate"]) == ("psycopg.errors.CheckViolation", "23514")
    assert CANARY not in json.dumps([ours, driver], ensure_ascii=False)


def test_a_context_that_was_suppressed_is_not_described() -> None:
    with pytest.raises(EmptyBatchError) as caught:
        raise_from(EmptyBatchError(), None)
    assert len(describe_exception(caught.value)) == 1
