"""The prediction cache: bounded, timed, and never an answer that belongs to something else."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from app.ai.domain import ANSWER, AnswerArray, ModelRef
from app.ai.prediction_cache import NullCache, PredictionCache
from tests.fakes import FakeClock

MODEL = ModelRef("advanced_ml_20260101_120000", "20260101_120000", "a" * 64)
OTHER = ModelRef("advanced_ml_20260101_120000", "20260101_120000", "b" * 64)
DAY = 86_400.0


def build_answers(*probabilities: float) -> AnswerArray:
    answers = np.zeros(len(probabilities), ANSWER)
    answers["probability"] = probabilities
    answers["raw_score"] = np.array(probabilities) / 3
    answers["verdict"] = 1
    answers["prediction"] = answers["probability"] > 0.5
    return answers


def test_an_answer_comes_back_bit_for_bit() -> None:
    cache = PredictionCache(10, 300, FakeClock())
    answers = build_answers(0.1, np.nextafter(0.7, 1))
    cache.remember(MODEL, DAY, ["a", "b"], answers)
    hit, found = cache.find(MODEL, DAY, ["b", "unknown", "a"])
    assert hit.tolist() == [True, False, True]
    assert found[hit].tolist() == answers[[1, 0]].tolist()


def test_another_model_another_day_and_another_lead_never_meet_an_answer() -> None:
    cache = PredictionCache(10, 300, FakeClock())
    cache.remember(MODEL, DAY, ["a"], build_answers(0.1))
    assert not cache.find(OTHER, DAY, ["a"])[0].any()
    assert not cache.find(MODEL, 2 * DAY, ["a"])[0].any()
    assert not cache.find(MODEL, DAY, ["A"])[0].any()


def test_an_answer_expires_at_its_age_however_often_it_was_used() -> None:
    clock = FakeClock()
    cache = PredictionCache(10, 300, clock)
    cache.remember(MODEL, DAY, ["a"], build_answers(0.1))
    clock.now += 299.9
    assert cache.find(MODEL, DAY, ["a"])[0].all()
    clock.now += 0.1
    assert not cache.find(MODEL, DAY, ["a"])[0].any()


def test_remembering_again_renews_the_answer_and_its_age() -> None:
    clock = FakeClock()
    cache = PredictionCache(10, 300, clock)
    cache.remember(MODEL, DAY, ["a"], build_answers(0.1))
    clock.now += 200
    cache.remember(MODEL, DAY, ["a"], build_answers(0.2))
    clock.now += 200
    hit, found = cache.find(MODEL, DAY, ["a"])
    assert hit.all()
    assert found["probability"].tolist() == [0.2]


def test_the_longest_unused_answer_gives_its_place_up_first() -> None:
    cache = PredictionCache(2, 300, FakeClock())
    cache.remember(MODEL, DAY, ["a", "b"], build_answers(0.1, 0.2))
    cache.find(MODEL, DAY, ["a"])
    cache.remember(MODEL, DAY, ["c"], build_answers(0.3))
    hit, found = cache.find(MODEL, DAY, ["a", "b", "c"])
    assert hit.tolist() == [True, False, True]
    assert found["probability"][hit].tolist() == [0.1, 0.3]


def test_a_batch_larger_than_the_cache_leaves_its_last_leads_with_their_own_answers() -> None:
    cache = PredictionCache(3, 300, FakeClock())
    ids = [f"lead_{number}" for number in range(10)]
    cache.remember(MODEL, DAY, ids, build_answers(*(number / 10 for number in range(10))))
    hit, found = cache.find(MODEL, DAY, ids)
    assert hit.tolist() == [False] * 7 + [True] * 3
    assert found["probability"][hit].tolist() == [0.7, 0.8, 0.9]


def test_a_cache_that_is_turned_off_knows_nothing() -> None:
    cache = NullCache()
    cache.remember(MODEL, DAY, ["a"], build_answers(0.1))
    hit, answers = cache.find(MODEL, DAY, ["a", "b"])
    assert hit.tolist() == [False, False]
    assert len(answers) == 2


LEADS = st.lists(st.sampled_from("abcdefgh"), max_size=6, unique=True)


@given(st.integers(1, 4), st.lists(st.tuples(LEADS, st.integers(0, 200)), max_size=20))
def test_the_cache_agrees_with_a_plain_model_of_itself(size: int, steps: list[tuple[list[str], int]]) -> None:
    clock = FakeClock()
    cache = PredictionCache(size, 300, clock)
    known: dict[str, tuple[float, float]] = {}
    for number, (ids, seconds) in enumerate(steps):
        cache.remember(MODEL, DAY, ids, build_answers(*([number / 100] * len(ids))))
        for lead_id in ids:
            known.pop(lead_id, None)
            known[lead_id] = (number / 100, clock.now + 300)
            if len(known) > size:
                known.pop(next(iter(known)))
        clock.now += seconds
        asked = [*sorted(known), "z"]
        hit, found = cache.find(MODEL, DAY, asked)
        known = {lead_id: known[lead_id] for lead_id in asked if lead_id in known}
        assert hit.tolist() == [lead_id in known and known[lead_id][1] > clock.now for lead_id in asked]
        assert found["probability"][hit].tolist() == [known[asked[i]][0] for i in np.flatnonzero(hit)]
        assert len(cache) <= size
