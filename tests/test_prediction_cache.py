"""The prediction cache: bounded, timed, compact, and never an answer that belongs to something else."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from app.ai.domain import ANSWER, AnswerArray, ModelRef
from app.ai.prediction_cache import Moment, NullCache, PredictionCache
from app.ai.score_kernels import installed_kernels
from tests.fakes import FakeClock

MODEL = ModelRef("advanced_ml_20260101_120000", "20260101_120000", "a" * 64, "a" * 64)
OTHER = ModelRef("advanced_ml_20260101_120000", "20260101_120000", "a" * 64, "b" * 64)
DAY = 86_400.0


def build_cache(
    size: int = 10,
    clock: Callable[[], float] | None = None,
    *,
    ttl_seconds: float = 300,
    trusted_until: float = math.inf,
) -> PredictionCache:
    """A cache whose listener is trusted, usually for ever."""
    kernels = installed_kernels()
    if kernels is None:
        pytest.skip("installed without a C compiler")
    cache = PredictionCache(kernels, size, ttl_seconds, clock or FakeClock())
    cache.trust_until(trusted_until)
    return cache


def remember(
    cache: PredictionCache | NullCache,
    lead_ids: Sequence[str],
    answers: AnswerArray,
    uuids: Sequence[str] | None = None,
    since: Moment | None = None,
) -> None:
    """Remembers what a read that begins and ends now would find."""
    since = cache.moment() if since is None else since
    cache.remember(MODEL, DAY, lead_ids, answers, uuids=uuids or lead_ids, since=since)


def build_answers(*probabilities: float) -> AnswerArray:
    answers = np.zeros(len(probabilities), ANSWER)
    answers["probability"] = probabilities
    answers["raw_score"] = np.array(probabilities) / 3
    answers["verdict"] = 1
    answers["prediction"] = answers["probability"] > 0.5
    return answers


def test_an_answer_comes_back_bit_for_bit() -> None:
    cache = build_cache()
    answers = build_answers(0.1, np.nextafter(0.7, 1))
    remember(cache, ["a", "b"], answers)
    hit, found = cache.find(MODEL, DAY, ["b", "unknown", "a"])
    assert hit.tolist() == [True, False, True]
    assert found[hit].tolist() == answers[[1, 0]].tolist()


def test_another_model_another_day_and_another_lead_never_meet_an_answer() -> None:
    cache = build_cache()
    remember(cache, ["a"], build_answers(0.1))
    assert not cache.find(OTHER, DAY, ["a"])[0].any()
    assert not cache.find(MODEL, 2 * DAY, ["a"])[0].any()
    assert not cache.find(MODEL, DAY, ["A"])[0].any()


def test_an_answer_expires_at_its_age_however_often_it_was_used() -> None:
    clock = FakeClock()
    cache = build_cache(clock=clock)
    remember(cache, ["a"], build_answers(0.1))
    clock.now += 299.9
    assert cache.find(MODEL, DAY, ["a"])[0].all()
    clock.now += 0.1
    assert not cache.find(MODEL, DAY, ["a"])[0].any()


def test_remembering_again_renews_the_answer_and_its_age() -> None:
    clock = FakeClock()
    cache = build_cache(clock=clock)
    remember(cache, ["a"], build_answers(0.1))
    clock.now += 200
    remember(cache, ["a"], build_answers(0.2))
    clock.now += 200
    hit, found = cache.find(MODEL, DAY, ["a"])
    assert hit.all()
    assert found["probability"].tolist() == [0.2]


def test_the_age_of_an_answer_is_that_of_its_read() -> None:
    clock = FakeClock()
    cache = build_cache(clock=clock)
    began = cache.moment()
    clock.now += 100
    remember(cache, ["a"], build_answers(0.1), since=began)
    clock.now += 199.9
    assert cache.find(MODEL, DAY, ["a"])[0].all()
    assert cache.recall(MODEL, DAY, ["a"])[2][0] == pytest.approx(299.9)
    clock.now += 0.1
    assert not cache.find(MODEL, DAY, ["a"])[0].any()


def test_of_two_reads_the_one_that_began_later_stays_whichever_ends_last() -> None:
    clock = FakeClock()
    cache = build_cache(clock=clock)
    slow = cache.moment()
    clock.now += 0.2
    remember(cache, ["a"], build_answers(0.2))
    remember(cache, ["a", "b"], build_answers(0.1, 0.3), since=slow)
    assert cache.find(MODEL, DAY, ["a", "b"])[1]["probability"].tolist() == [0.2, 0.3]
    assert len(cache) == 2


def test_the_oldest_answer_gives_its_place_up_first() -> None:
    cache = build_cache(2)
    remember(cache, ["a", "b"], build_answers(0.1, 0.2))
    remember(cache, ["c"], build_answers(0.3))
    hit, found = cache.find(MODEL, DAY, ["a", "b", "c"])
    assert hit.tolist() == [False, True, True]
    assert found["probability"][hit].tolist() == [0.2, 0.3]


def test_a_batch_larger_than_the_cache_leaves_its_last_leads_with_their_own_answers() -> None:
    cache = build_cache(3)
    ids = [f"lead_{number}" for number in range(10)]
    remember(cache, ids, build_answers(*(number / 10 for number in range(10))))
    hit, found = cache.find(MODEL, DAY, ids)
    assert hit.tolist() == [False] * 7 + [True] * 3
    assert found["probability"][hit].tolist() == [0.7, 0.8, 0.9]


def test_a_cache_that_is_turned_off_knows_nothing() -> None:
    cache = NullCache()
    remember(cache, ["a"], build_answers(0.1))
    hit, answers = cache.find(MODEL, DAY, ["a", "b"])
    assert hit.tolist() == [False, False]
    assert len(answers) == 2


def test_a_changed_lead_is_forgotten_by_whichever_id_it_was_asked_and_the_others_stay() -> None:
    cache = build_cache()
    remember(cache, ["a", "ref_a", "b"], build_answers(0.1, 0.1, 0.2), uuids=["a", "a", "b"])
    cache.forget(["a"])
    assert cache.find(MODEL, DAY, ["a", "ref_a", "b"])[0].tolist() == [False, False, True]
    remember(cache, ["ref_a"], build_answers(0.3), uuids=["a"])
    assert cache.find(MODEL, DAY, ["ref_a", "a"])[0].tolist() == [True, False]


def test_what_was_read_before_a_change_is_not_found_after_it() -> None:
    cache = build_cache()
    began = cache.moment()
    cache.forget(["a"])
    remember(cache, ["a", "b"], build_answers(0.1, 0.2), since=began)
    assert cache.find(MODEL, DAY, ["a", "b"])[0].tolist() == [False, True]


def test_when_any_lead_may_have_changed_nothing_is_found_that_was_read_before() -> None:
    cache = build_cache()
    remember(cache, ["a"], build_answers(0.1))
    began = cache.moment()
    cache.forget_all()
    remember(cache, ["b"], build_answers(0.2), since=began)
    remember(cache, ["c"], build_answers(0.3))
    assert cache.find(MODEL, DAY, ["a", "b", "c"])[0].tolist() == [False, False, True]


def test_nothing_is_found_beyond_the_time_the_listener_is_trusted_but_the_last_known_is_recalled() -> None:
    clock = FakeClock()
    cache = build_cache(clock=clock)
    remember(cache, ["a"], build_answers(0.1))
    cache.trust_until(clock.now + 0.2)
    assert cache.find(MODEL, DAY, ["a"])[0].all()
    clock.now += 0.2
    assert not cache.is_trusted()
    assert not cache.find(MODEL, DAY, ["a"])[0].any()
    hit, found, ages = cache.recall(MODEL, DAY, ["a", "b"])
    assert hit.tolist() == [True, False]
    assert found["probability"][0] == 0.1
    assert ages[0] == pytest.approx(0.2)
    cache.trust_until(clock.now + 0.2)
    assert cache.find(MODEL, DAY, ["a"])[0].all()


def test_a_cache_nobody_listens_for_finds_nothing() -> None:
    cache = build_cache(trusted_until=-math.inf)
    remember(cache, ["a"], build_answers(0.1))
    assert not cache.find(MODEL, DAY, ["a"])[0].any()


def test_a_million_leads_would_take_less_than_150_megabytes_and_nearly_all_are_found() -> None:
    cache = build_cache(20_000)
    ids = [f"lead_{number}" for number in range(20_000)]
    for start in range(0, len(ids), 2_000):
        remember(cache, ids[start : start + 2_000], build_answers(*np.arange(start, start + 2_000.0)))
    hit, found = cache.find(MODEL, DAY, ids)
    assert np.array_equal(found["probability"][hit], np.flatnonzero(hit))
    assert np.count_nonzero(hit) > 19_900
    per_lead = [value.nbytes / 20_000 for value in vars(cache).values() if isinstance(value, np.ndarray)]
    marks = 1_048_576 / 20_000  # shared by all leads, however many
    assert sum(per_lead) - marks < 150


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, "a3817f04ba25a8e66df67214c7550293"),
        (8, "3b62a9ba6258f5610f83e264f31497b4"),
        (63, "5150d1772f50834a503e069a973fbd7c"),
    ],
)
def test_keys_are_hashed_as_the_reference_implementation_hashes(length: int, expected: str) -> None:
    kernels = installed_kernels()
    if kernels is None:
        pytest.skip("installed without a C compiler")
    key = np.arange(16, dtype=np.uint8).view(np.uint64)
    assert kernels.hash_text(bytes(range(length)), key).tobytes().hex() == expected


def test_of_many_answers_at_once_each_is_found_under_its_own_name() -> None:
    cache = build_cache(1000)
    ids = [f"lead_{'x' * (number % 50)}{number}" for number in range(500)]
    remember(cache, ids, build_answers(*np.arange(500.0)))
    hit, found = cache.find(MODEL, DAY, ids[::-1])
    assert hit.all()
    assert found["probability"].tolist() == list(range(499, -1, -1))
    assert not cache.find(MODEL, DAY, [lead_id + "_" for lead_id in ids])[0].any()


def test_an_id_of_the_database_with_any_character_is_its_own_and_nobody_elses() -> None:
    cache = build_cache()
    odd = ["b\nlead_1", "é\t", "", "lead_2\n"]
    remember(cache, [*odd, "c"], build_answers(0.1, 0.2, 0.3, 0.4, 0.5))
    hit, found = cache.find(MODEL, DAY, ["lead_1", "b", "lead_2", "c", *odd])
    assert hit.tolist() == [False, False, False, True, True, True, True, True]
    assert found["probability"][hit].tolist() == [0.5, 0.1, 0.2, 0.3, 0.4]
    with pytest.raises(ValueError, match="NUL"):
        cache.find(MODEL, DAY, ["a\0b"])


def test_answers_that_do_not_fit_their_leads_never_reach_the_loops() -> None:
    cache = build_cache()
    with pytest.raises(ValueError, match="as many"):
        remember(cache, ["a", "b"], build_answers(0.1))
    with pytest.raises(ValueError, match="as many"):
        remember(cache, ["a", "b"], build_answers(0.1, 0.2), uuids=["a"])


LEADS = st.lists(st.sampled_from("abcdefgh"), max_size=6, unique=True)


@given(
    st.integers(1, 8),
    st.lists(st.tuples(LEADS, st.integers(0, 200), st.integers(0, 100)), max_size=20),
)
def test_the_cache_agrees_with_a_plain_model_of_itself(
    size: int, steps: list[tuple[list[str], int, int]]
) -> None:
    clock = FakeClock()
    cache = build_cache(size, clock)
    written: list[tuple[str, float, float]] = []
    for number, (ids, seconds, took) in enumerate(steps):
        since = Moment(0, clock.now - took)
        remember(cache, ids, build_answers(*([number / 100] * len(ids))), since=since)
        for lead_id in ids:
            ends = since.seconds + 300
            if all(other != lead_id or expires <= ends for other, _, expires in written):
                written = [*written, (lead_id, number / 100, ends)][-size:]
        clock.now += seconds
        known = {lead_id: value for lead_id, value, expires in written if expires > clock.now}
        asked = list("abcdefghz")
        hit, found = cache.find(MODEL, DAY, asked)
        assert hit.tolist() == [lead_id in known for lead_id in asked]
        assert found["probability"][hit].tolist() == [known[asked[i]] for i in np.flatnonzero(hit)]
        assert len(cache) <= size


class Freshness(RuleBasedStateMachine):
    """Leads that change, word of it that comes late, reads that take long, and sessions that are lost.

    A lead has two IDs, and its state is a number that grows. Whoever asks may get no state that is older than
    the last word of this lead.
    """

    reads = Bundle("reads")
    lead = st.sampled_from("ab")

    def __init__(self) -> None:
        super().__init__()
        self.cache = build_cache(4)
        self.state = {"a": 0, "b": 0}
        self.heard = dict(self.state)
        self.unheard: list[tuple[str, int]] = []

    @rule(lead=lead)
    def change(self, lead: str) -> None:
        self.state[lead] += 1
        self.unheard.append((lead, self.state[lead]))

    @rule()
    def hear(self) -> None:
        if self.unheard:
            lead, self.heard[lead] = self.unheard.pop(0)
            self.cache.forget([lead])

    @rule()
    def lose_the_session_and_listen_again(self) -> None:
        self.unheard.clear()
        self.cache.forget_all()
        self.heard = dict(self.state)

    @rule(target=reads, lead=lead)
    def begin_to_read(self, lead: str) -> tuple[str, Moment, int]:
        return lead, self.cache.moment(), self.state[lead]

    @rule(read=consumes(reads), prefix=st.sampled_from(["", "ref_"]))
    def finish_reading(self, read: tuple[str, Moment, int], prefix: str) -> None:
        lead, since, state = read
        remember(self.cache, [prefix + lead], build_answers(state), uuids=[lead], since=since)

    @invariant()
    def nothing_older_than_the_last_word_is_found(self) -> None:
        asked = ["a", "b", "ref_a", "ref_b"]
        hit, found = self.cache.find(MODEL, DAY, asked)
        for index in np.flatnonzero(hit):
            assert found["probability"][index] >= self.heard[asked[index][-1]]


TestFreshness = Freshness.TestCase
