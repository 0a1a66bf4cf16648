"""The benchmark in its short form: it fails when contenders answer differently, never because of time."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest

from app.ai.score_kernels import load_kernels
from bench.all_proofs import Outcome, prove
from bench.figures import Figure
from bench.load import Sample
from bench.request_path import build_loops
from bench.servers import Server
from bench.suite import Bench, Options
from tests.service import ROOT


@pytest.mark.timeout(300)
def test_every_contender_answers_the_same_probabilities(
    make_server_dir: Callable[[], Path], tmp_path: Path
) -> None:
    result, var = tmp_path / "bench.json", make_server_dir()
    command = [sys.executable, "-m", "bench.suite", "--short", "--var", str(var), "--json", str(result)]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    measured = json.loads(result.read_text())
    cells = {(cell["contender"], cell["leads"]) for cell in measured["cells"]}
    names = ("cold", "warm", "echo", "floor", "textbook")
    durable = {("durable_echo", 1), ("durable_floor", 1)}
    assert {(name, size) for name in names for size in (1, 50)} | durable == cells
    assert all(cell["requests"] > 0 and cell["p50_ms"] > 0 for cell in measured["cells"])
    assert all(
        least <= cell["p50_ms"] <= most
        for cell in measured["cells"]
        for least, most in [cell["p50_ms_of_bursts"]]
    )


LEADS = ["one", "two"]


@asynccontextmanager
async def answering(name: str, answers: Mapping[str, float]) -> AsyncIterator[Server]:
    """A contender that gives everybody these probabilities."""
    entries = [{"lead_id": lead_id, "probability": answer} for lead_id, answer in answers.items()]
    body = json.dumps({"predictions": entries}).encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield Server(name, server.sockets[0].getsockname()[1], pid=0, seconds_to_ready=0)


@pytest.mark.parametrize(
    ("second", "said"),
    [(0.5 + 1e-8, "floor answers differently"), (0.5 + 1e-10, "")],
    ids=["told", "rounded"],
)
async def test_a_contender_that_answers_otherwise_ends_the_benchmark(second: float, said: str) -> None:
    options = Options(leads=len(LEADS), seconds=0, rounds=1, short=True)
    async with (
        answering("cold", {"one": 0.25, "two": 0.5}) as cold,
        answering("floor", {"one": 0.25, "two": second}) as floor,
    ):
        bench = Bench({"cold": cold, "floor": floor}, LEADS, options)
        with pytest.raises(SystemExit, match=said) if said else nullcontext():
            await bench.check_answers()


def test_the_spread_of_a_sample_is_that_of_its_bursts() -> None:
    sample = Sample([5.0, 1.0, 2.0, 9.0, 9.0, 8.0], ends=[3, 6])
    assert (sample.percentile(0.5), sample.spread(0.5)) == (8.0, (2.0, 9.0))


def test_a_figure_holds_on_its_own_side_of_the_limit() -> None:
    assert Figure("ratio", 1.2, 1.25).holds
    assert not Figure("ratio", 1.3, 1.25).holds
    assert Figure("rate", 0.9, 0.85, at_least=True).holds
    assert not Figure("rate", 0.8, 0.85, at_least=True).holds


def test_a_figure_that_does_not_bind_is_still_told_when_it_misses_its_limit() -> None:
    figure = Figure("p99 more", 2.0, 1.5, unit="ms", binding=False)
    assert not figure.holds
    assert figure.cells() == ("p99 more", "2 ms", "≤ 1.5 ms", "NO")


def test_a_proof_that_breaks_off_does_not_hold(tmp_path: Path) -> None:
    outcome = prove("of-nothing", [], tmp_path / "figures.json")
    assert not outcome.held
    assert outcome.figures == []


LATE, LOST = Figure("answered after", 90, 50, unit="ms"), Figure("events lost", 1, 0, unit="")
KEPT, SHOWN = Figure("answers", 5, 5, unit=""), Figure("rate", 0.5, 0.9, at_least=True, binding=False)


@pytest.mark.parametrize(
    ("figures", "late"),
    [
        ([KEPT, LATE, SHOWN], True),
        ([LATE, LOST], False),
        ([KEPT, LOST], False),
        ([KEPT, SHOWN], False),
        ([], False),
    ],
    ids=["only time", "time and an event", "an event", "a bug that got by", "it broke off"],
)
def test_only_a_proof_that_missed_nothing_but_time_is_late(figures: list[Figure], late: bool) -> None:
    assert Outcome("any", 1.0, held=False, figures=figures).was_late == late
    assert not Outcome("any", 1.0, held=True, figures=figures).was_late


def test_all_proofs_go_on_after_one_that_fails() -> None:
    command = [sys.executable, "-m", "bench.all_proofs", "of-nothing", "--alone", "of-little"]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "of-nothing" in run.stdout
    assert "of-little" in run.stdout
    assert run.stdout.count("No module named") == 2


def test_an_older_commit_is_timed_with_its_loops_compiled(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "app/ai/_score_kernels.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build_loops(tmp_path)
    (library,) = (tmp_path / "app" / "ai").glob("_score_kernels*.so")
    assert load_kernels(str(library)) is not None


def test_a_commit_whose_loops_cannot_be_compiled_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("from setuptools import setup\n\nsetup(packages=[])\n")
    with pytest.raises(SystemExit, match="could not be compiled"):
        build_loops(tmp_path)
