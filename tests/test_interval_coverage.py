"""Coverage of intervals: true ones are covered, wrong ones are noticed."""

from collections.abc import Callable

import numpy as np
import pytest

from app.ai.calibration import equal_mass_bins
from app.ai.domain import FloatArray, IntArray
from app.ai.venn_abers import build_table, look_up, merge
from app.training.interval_coverage import measure_coverage


def draw(leads: int, seed: int) -> tuple[FloatArray, IntArray]:
    """Scores, and outcomes whose chance is the square of the score."""
    random = np.random.default_rng(seed)
    scores = random.random(leads)
    return scores, (random.random(leads) < scores**2).astype(np.int64)


def test_intervals_out_of_a_table_cover_leads_it_has_not_seen() -> None:
    # A true rate itself would be covered in 95 of 100 bins, so one draw proves little: 60 make 900 bins.
    covered = 0
    for seed in range(60):
        table = build_table(*draw(3000, seed))
        scores, outcome = draw(1000, seed + 100)
        p0, p1 = look_up(table, scores)
        told = measure_coverage(np.column_stack([p0, p1]), merge(p0, p1), outcome)
        assert told["bins"] == 15
        assert 0 < told["mean_width"] < 0.1
        assert sum(leads for *_, leads in told["rows"]) == 1000
        covered += told["covered"]
    assert covered / 900 >= 0.95


def test_intervals_in_the_wrong_place_are_noticed() -> None:
    scores, outcome = draw(3000, 1)
    wrong = np.column_stack([scores, scores + 0.02])
    assert measure_coverage(wrong, scores, outcome)["covered"] < 10


@pytest.mark.parametrize("leads", [1000, 3000, 10_000])
def test_a_pair_is_no_confidence_interval_for_the_rate_of_a_group(
    leads: int, record_property: Callable[[str, object], None]
) -> None:
    held = []
    for seed in range(60):
        scores, _ = draw(3000, seed + 100)
        p0, p1 = look_up(build_table(*draw(leads, seed)), scores)
        held += [
            p0[part].mean() <= (scores[part] ** 2).mean() <= p1[part].mean()
            for part in equal_mass_bins(merge(p0, p1))
        ]
    record_property(f"{leads:,} outcomes to calibrate on: true rates inside", f"{np.mean(held):.0%}")
    assert 0.2 < np.mean(held) < 0.5, "the documents have these shares"


def test_the_check_says_how_many_bins_need_no_interval() -> None:
    scores, outcome = draw(3000, 2)
    true = scores**2
    held = measure_coverage(np.column_stack([true, true]), true, outcome)
    assert held["covered"] == held["covered_without_width"] >= 13
    # As wide as can be, around a probability that is far off: without the width nothing is left.
    told = measure_coverage(np.tile([0.0, 1.0], (3000, 1)), 0.5 + true / 2, outcome)
    assert (told["covered"], told["covered_without_width"]) == (15, 0)


def test_a_bin_is_widened_by_the_sampling_error_of_its_own_size_only() -> None:
    outcome = np.array([1] * 35 + [0] * 65)
    interval = np.tile([0.2, 0.3], (100, 1))
    same = np.full(100, 0.25)
    told = measure_coverage(interval, same, outcome, bins=1)
    # The standard error of a rate of 0.3 among 100 is 0.046: 0.35 is further off than one, not than 1.96.
    assert (told["covered"], told["covered_within_one_error"]) == (1, 0)
    many = np.tile(interval, (100, 1)), np.tile(same, 100), np.tile(outcome, 100)
    assert measure_coverage(*many, bins=1)["covered"] == 0


def test_fewer_leads_than_bins_make_a_bin_each() -> None:
    told = measure_coverage(np.tile([0.0, 1.0], (3, 1)), np.array([0.1, 0.2, 0.3]), np.array([0, 1, 0]))
    assert told["rows"] == [[0.0, 1.0, 0.0, 1], [0.0, 1.0, 1.0, 1], [0.0, 1.0, 0.0, 1]]
    assert told["covered"] == 3
