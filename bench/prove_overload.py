"""Proves that a worker which is asked ten times what it can do goes on doing what it can.

In turns, a few seconds each: its peak, with as many requests under way as give the most answers; then a rush
at ten times that rate, whether the requests before are answered or not; then what one caller finds when the
rush is over. What cannot be answered must be refused at once, with a Retry-After, and as much as at the peak
must be answered, in time. The request is a dear one, receipts for fifty leads, so that one client can ask ten
times as much as a worker answers. Latencies are the median of the turns, so that something else on the
machine has to last to be mistaken for the service. In the end a thousand callers pay no heed to Retry-After
and ask again the moment they are refused: when they have gone, so must be what they did.

make prove-overload [LONG=1] [SEED=n]
"""

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvloop

from bench.data import open_stage, sample_lead_ids
from bench.figures import Figure
from bench.load import PATH, Sample, build_request, cycle, run_load
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.rush import Rush
from bench.servers import start_service

PROMISE = "ten times too many requests are refused at once, and cost no answer that could be given"
LEADS = 10_000
BATCH = 50
REQUESTS = 100
PEAK_CONNECTIONS = 4
TIMES_PEAK = 10
TURN_SECONDS, PLANTED_TURN_SECONDS = 5.0, 2.0
LEAD_IN_SECONDS = 0.5  # of a rush, until as much is under way as will be
TURNS, TURNS_LONG = 3, 30
IN_TIME_PEAKS = 3  # an answer is in time within three times what it takes at the peak
NORMAL_IN_A_ROW = 3
GIVE_UP_SECONDS = 6.0
STORM_CALLERS, STORM_SECONDS = 1000, 3.0


@dataclass
class _Turns:
    """What was found, turn by turn."""

    peak_rates: list[float] = field(default_factory=list)
    rush_rates: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    refused: int = 0
    without_retry_after: int = 0
    other: int = 0
    back: list[float] = field(default_factory=list)


def measure(run: ProofRun) -> Sequence[Figure]:
    """Measures three turns, or thirty in the long run."""
    return uvloop.run(_measure(run, TURNS_LONG if run.long else TURNS, TURN_SECONDS))


def planted(name: str, run: ProofRun) -> Sequence[Figure]:
    """Measures one short turn of the service that has this part of it replaced."""
    return uvloop.run(_measure(run, 1, PLANTED_TURN_SECONDS, name))


async def _measure(
    run: ProofRun, count: int, turn_seconds: float, plant: str | None = None
) -> Sequence[Figure]:
    uncached = {"ML_PREDICTION_CACHE_TTL_SECONDS": "0"}
    turns = _Turns()
    with (
        open_stage(Path("var/bench"), LEADS) as stage,
        tempfile.TemporaryDirectory() as directory,
        _many_sockets(),
        start_service("overload", stage, Path(directory), plant=plant, **uncached) as server,
    ):
        ids = sample_lead_ids(stage.url, BATCH * REQUESTS, run.seed % 100 / 100)
        bodies = [json.dumps(ids[start : start + BATCH]).encode() for start in range(0, len(ids), BATCH)]
        requests = cycle([build_request(body, f"{PATH}?include=reasons") for body in bodies])
        alone = Sample()
        await run_load(server.port, requests, alone, connections=1, seconds=1, at_least=10)
        normal_seconds = 2 * max(alone.milliseconds) / 1000
        for _ in range(count):
            await _take_turn(server.port, requests, turns, turn_seconds, normal_seconds)
        storm = Rush(server.port, requests)
        stormed = await storm.storm(STORM_CALLERS, 0 if plant else STORM_SECONDS)
        storm.close()
        calm = await _wait_until_normal(server.port, requests, normal_seconds)
    peak_rate, rush_rate = statistics.mean(turns.peak_rates), statistics.mean(turns.rush_rates)
    return (
        Figure(
            f"answers in time, of the peak ({peak_rate:.1f}/s)", rush_rate / peak_rate, 0.9, at_least=True
        ),
        Figure(f"p99 of {turns.refused:,} refusals", statistics.median(turns.refusals) * 1000, 50, unit="ms"),
        Figure("refusals without a Retry-After of 1 to 3 s", turns.without_retry_after, 0, unit=""),
        Figure("neither answered nor refused", turns.other, 0, unit=""),
        Figure("normal again after", statistics.median(turns.back), 2, unit="s"),
        Figure(
            f"normal again after {len(stormed.refused):,} refusals of callers who come back at once",
            calm,
            5,
            unit="s",
        ),
    )


@contextmanager
def _many_sockets() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def _take_turn(
    port: int, requests: Iterator[bytes], turns: _Turns, seconds: float, normal_seconds: float
) -> None:
    peak = Sample()
    await run_load(port, requests, peak, connections=PEAK_CONNECTIONS, seconds=seconds, at_least=10)
    rush = Rush(port, requests)
    await rush.send(peak.rate * TIMES_PEAK, LEAD_IN_SECONDS)
    outcomes = await rush.send(peak.rate * TIMES_PEAK, seconds)
    rush.close()
    limit = IN_TIME_PEAKS * peak.percentile(0.5) / 1000
    in_time = sum(took <= limit for took in outcomes.answered)
    refused = sorted(outcomes.refused) or [GIVE_UP_SECONDS]
    turns.peak_rates.append(peak.rate)
    turns.rush_rates.append(in_time / seconds)
    turns.refusals.append(refused[int(0.99 * len(refused))])
    turns.refused += len(outcomes.refused)
    turns.without_retry_after += outcomes.without_retry_after
    turns.other += outcomes.other
    turns.back.append(await _wait_until_normal(port, requests, normal_seconds))


async def _wait_until_normal(port: int, requests: Iterator[bytes], normal_seconds: float) -> float:
    """Returns how long after now the first of a few answers was asked that took a normal time each."""
    over = time.perf_counter()
    streak, first = 0, GIVE_UP_SECONDS
    while streak < NORMAL_IN_A_ROW and time.perf_counter() - over < GIVE_UP_SECONDS:
        began = time.perf_counter()
        outcomes = await Rush(port, requests).ask_once(GIVE_UP_SECONDS)
        normal = bool(outcomes.answered) and outcomes.answered[0] <= normal_seconds
        streak = streak + 1 if normal else 0
        first = began - over if streak == 1 else first
    return first if streak == NORMAL_IN_A_ROW else GIVE_UP_SECONDS


if __name__ == "__main__":
    run_proof(
        PROMISE,
        measure,
        {
            "no limit": PlantedBug(partial(planted, "no-limit"), "normal again after"),
            "places that leak": PlantedBug(partial(planted, "leaking-places"), "normal again after"),
            "no Retry-After": PlantedBug(
                partial(planted, "no-retry-after"), "refusals without a Retry-After of 1 to 3 s"
            ),
        },
    )
