"""What the prediction cache takes for each lead, and what a look into it costs when it is full.

python bench/cache_memory.py [LEADS]
"""

import math
import resource
import statistics
import sys
import time
from uuid import UUID

import numpy as np

from app.ai.domain import ANSWER, ModelRef
from app.ai.prediction_cache import PredictionCache
from app.ai.score_kernels import installed_kernels

MODEL = ModelRef("advanced_ml_20260101_120000", "20260101_120000", "a" * 64, "a" * 64)
CHUNK = 2_000


def name_leads(numbers: range) -> list[str]:
    """Returns lead IDs that look random, the same ones for the same numbers."""
    return [str(UUID(int=(number + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128)) for number in numbers]


def resident_mb() -> float:
    """Returns the most memory this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    """Fills a cache, counts what it holds, and times the look-ups."""
    leads = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    before = resident_mb()
    kernels = installed_kernels()
    if kernels is None:
        raise SystemExit("there are no compiled loops, see the log line above")
    cache = PredictionCache(kernels, leads, 3600, time.monotonic)
    cache.trust_until(math.inf)
    for start in range(0, leads, CHUNK):
        lead_ids = name_leads(range(start, min(start + CHUNK, leads)))
        answers, since = np.zeros(len(lead_ids), ANSWER), cache.moment()
        cache.remember(MODEL, 0.0, lead_ids, answers, uuids=lead_ids, since=since)
    taken = resident_mb() - before
    held = sum(
        int(cache.find(MODEL, 0.0, name_leads(range(at, min(at + CHUNK, leads))))[0].sum())
        for at in range(0, leads, CHUNK)
    )
    print(f"{leads:,} leads: {taken:.0f} MB resident, {taken * 1e6 / leads:.0f} bytes a lead, {held:,} found")
    for batch in (1, 50, 500, 2_000):
        seconds = []
        for repeat in range(200):
            lead_ids = name_leads(range(repeat * 97 % (leads - batch), repeat * 97 % (leads - batch) + batch))
            began = time.perf_counter()
            cache.find(MODEL, 0.0, lead_ids)
            seconds.append(time.perf_counter() - began)
        print(f"look-up of {batch:5,} leads: {statistics.median(seconds) * 1e6:6.0f} us")


if __name__ == "__main__":
    main()
