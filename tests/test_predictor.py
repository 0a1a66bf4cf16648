"""The predictor: every position answered once, whatever is known, unknown, doubtful or broken."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import psycopg
import pytest
import structlog
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.ai.domain import VERDICTS, Explanation, FloatArray, Predictions, RequestContext
from app.ai.drift_window import DriftWindow
from app.ai.micro_batching import MOST_LEADS, SLOTS
from app.ai.model_bundle import ModelBundle
from app.ai.prediction_cache import AnswerCache, NullCache, PredictionCache
from app.ai.predictor import INLINE_LEADS, Predictor, ScoringPolicy, find_intervals, score_leads
from app.ai.score_shapley import ScoreExplainer
from app.ai.venn_abers import HALFWAY_SECONDS, look_up
from app.db.engine import Database
from app.db.leads import PostgresLeadSource
from app.errors import (
    DatabaseUnavailableError,
    InvalidParameterError,
    ModelNotReadyError,
    OverloadedError,
    PredictionFailedError,
)
from tests.fakes import FakeClock, FakeLeadSource, FakeModels, build_columns
from tests.lead_models import AS_OF, FEATURES, build_lead_bundle, build_lead_rows
from tests.test_prediction_cache import build_cache

UUID = "6f1c0c1e-5f0b-4a57-9a1c-0c6a3f0e9b11"
CONTEXT = RequestContext(AS_OF)
WITH_INTERVALS = RequestContext(AS_OF, frozenset({"interval"}))
WITH_REASONS = RequestContext(AS_OF, frozenset({"reasons"}))
WITH_FEATURES = RequestContext(AS_OF, frozenset({"features"}))
POLICY = ScoringPolicy(0.6, "max_probability")
BUNDLE = build_lead_bundle()
ROWS = build_lead_rows(INLINE_LEADS + 1, seed=5)


class World:
    """A predictor with everything it stands on."""

    def __init__(
        self, executor: ThreadPoolExecutor, cache: AnswerCache, *, degraded_answers: bool = True
    ) -> None:
        leads: dict[str, dict[str, object] | str] = {f"lead_{number}": row for number, row in enumerate(ROWS)}
        self.source = FakeLeadSource({**leads, UUID: ROWS[0], "twice": "ambiguous", "empty": {}})
        self.cache = cache
        self.models = FakeModels(BUNDLE)
        self.drift = DriftWindow(1000)
        self.predictor = Predictor(
            self.models, self.source, cache, self.drift, executor=executor, policy=POLICY,
            degraded_answers=degraded_answers, clock=FakeClock(),
        )  # fmt: skip

    async def ask(self, *lead_ids: str, context: RequestContext = CONTEXT) -> Predictions:
        return await self.predictor.predict(lead_ids, context)

    async def ask_reasons(self, *lead_ids: str) -> list[Explanation]:
        predictions = await self.ask(*lead_ids, context=WITH_REASONS)
        assert predictions.explanations is not None
        return list(predictions.explanations)

    async def ask_intervals(self, *lead_ids: str) -> list[list[float]]:
        predictions = await self.ask(*lead_ids, context=WITH_INTERVALS)
        assert predictions.intervals is not None
        intervals: list[list[float]] = predictions.intervals.tolist()
        return intervals


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture
def world(executor: ThreadPoolExecutor) -> World:
    return World(executor, NullCache())


@pytest.fixture
def caching_world(executor: ThreadPoolExecutor) -> World:
    return World(executor, build_cache(1000))


def rows_of(predictions: Predictions) -> list[tuple[object, ...]]:
    names = ("probability", "confidence", "coverage", "prediction", "verdict")
    columns = [getattr(predictions, name).tolist() for name in names]
    return list(zip(predictions.lead_ids, *columns, strict=True))


@pytest.mark.parametrize("context", [CONTEXT, WITH_REASONS], ids=["plain", "with reasons"])
async def test_a_batch_that_comes_in_parts_is_answered_as_one_that_comes_at_once(
    executor: ThreadPoolExecutor, context: RequestContext
) -> None:
    asked = ["lead_4", "nobody", "twice", "no one", "lead_1", UUID, "lead_2", "empty", "lead_4"]
    whole, parts = World(executor, build_cache(1000)), World(executor, build_cache(1000))
    parts.source.part_leads = 2  # of which the second has no lead
    at_once, in_parts = [await world.ask(*asked, context=context) for world in (whole, parts)]
    assert rows_of(in_parts) == rows_of(at_once)
    assert in_parts.rejections == at_once.rejections
    assert in_parts.explanations == at_once.explanations
    seen = [world.drift.statistics(BUNDLE.statistics, FEATURES.fingerprint) for world in (whole, parts)]
    assert seen[0].rows == seen[1].rows == 5
    assert (await parts.ask(*asked)).cache_hits == (await whole.ask(*asked)).cache_hits > 0


async def test_order_duplicates_and_spelling_are_kept_and_each_lead_is_fetched_once(world: World) -> None:
    asked = ["lead_3", UUID.upper(), "lead_1", "lead_3", UUID, "lead_0"]
    predictions = await world.ask(*asked)
    assert predictions.lead_ids == asked
    assert world.source.asked == [["lead_3", UUID, "lead_1", "lead_0"]]
    rows = rows_of(predictions)
    assert rows[0] == rows[3]
    assert rows[1][1:] == rows[4][1:] == rows[5][1:]


async def test_a_batch_equals_its_leads_asked_one_by_one_bit_for_bit(world: World) -> None:
    ids = [f"lead_{number}" for number in range(60)]
    together = rows_of(await world.ask(*ids))
    alone = [rows_of(await world.ask(lead_id))[0] for lead_id in ids]
    assert together == alone


async def test_unknown_and_ambiguous_leads_are_declined_by_position_and_spoil_nothing(world: World) -> None:
    predictions = await world.ask("nobody", "lead_1", "twice", "nobody")
    assert predictions.asked == 4
    assert predictions.lead_ids == ["lead_1"]
    assert [(r.lead_id, r.position, r.code) for r in predictions.rejections] == [
        ("nobody", 0, "LEAD_NOT_FOUND"),
        ("twice", 2, "LEAD_AMBIGUOUS"),
        ("nobody", 3, "LEAD_NOT_FOUND"),
    ]
    assert rows_of(predictions) == rows_of(await world.ask("lead_1"))


async def test_a_lead_that_cannot_be_made_safe_is_declined_and_spoils_nothing(world: World) -> None:
    world.source.leads["broken"] = {"tuition_fee": float("nan")}
    predictions = await world.ask("lead_1", "broken")
    assert [rejection.code for rejection in predictions.rejections] == ["FEATURES_REJECTED"]
    assert rows_of(predictions) == rows_of(await world.ask("lead_1"))


async def test_only_unknown_leads_make_an_answer_without_predictions(world: World) -> None:
    predictions = await world.ask("nobody")
    assert predictions.lead_ids == []
    assert predictions.probability.shape == (0,)


async def test_a_lead_without_any_data_is_answered_with_the_base_rate_and_says_so(world: World) -> None:
    predictions = await world.ask("empty")
    assert VERDICTS[predictions.verdict[0]] == "abstain"
    assert predictions.coverage[0] == 0
    assert predictions.probability[0] == BUNDLE.manifest.base_rate
    assert predictions.prediction[0] == (BUNDLE.manifest.base_rate >= BUNDLE.manifest.threshold)


async def test_verdicts_follow_coverage_and_values_outside_the_training_range(world: World) -> None:
    whole = {name: value for name, value in build_lead_rows(1, 8)[0].items() if value is not None}
    whole |= {"gpa": 3.0, "minutes_on_site": 10.0, "newsletter_opt_in": True, "source": "website"}
    world.source.leads |= {
        "whole": whole,
        "thin": {"touchpoint_count": 3, "gpa": 3.0},
        "strange": {**whole, "touchpoint_count": 1e9},
    }
    predictions = await world.ask("whole", "thin", "strange")
    assert [VERDICTS[code] for code in predictions.verdict] == ["ok", "caution", "caution"]
    assert predictions.coverage.tolist() == [1.0, 2 / 7, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 5e-324])
async def test_any_stored_number_gives_a_finite_probability_within_the_bounds(
    world: World, value: float
) -> None:
    names = ("gpa", "minutes_on_site", "touchpoint_count", "newsletter_opt_in", "created_at")
    world.source.leads["odd"] = dict.fromkeys(names, value)
    predictions = await world.ask("odd")
    lower, upper = predictions.bounds
    assert lower <= predictions.probability[0] <= upper


async def test_prediction_is_the_probability_against_the_threshold(world: World) -> None:
    predictions = await world.ask(*(f"lead_{number}" for number in range(60)))
    assert predictions.prediction.tolist() == (predictions.probability >= 0.5).tolist()
    assert 0 < np.count_nonzero(predictions.prediction) < 60


async def test_a_cached_answer_is_the_same_and_never_touches_the_database(caching_world: World) -> None:
    first = await caching_world.ask("lead_1", "lead_2")
    caching_world.source.error = DatabaseUnavailableError()
    again = await caching_world.ask("lead_2", "lead_1", "lead_2")
    assert (first.cache_hits, again.cache_hits) == (0, 3)
    assert rows_of(again) == [rows_of(first)[1], rows_of(first)[0], rows_of(first)[1]]
    assert len(caching_world.source.asked) == 1


async def test_only_what_the_cache_lacks_is_fetched_and_unknown_leads_are_looked_up_again(
    caching_world: World,
) -> None:
    await caching_world.ask("lead_1", "nobody")
    mixed = await caching_world.ask("lead_1", "nobody", "lead_2")
    assert caching_world.source.asked == [["lead_1", "nobody"], ["nobody", "lead_2"]]
    assert mixed.cache_hits == 1


@pytest.mark.parametrize("count", [1, MOST_LEADS + 1])
async def test_what_is_not_found_by_the_deadline_is_refused_and_nothing_is_left_behind(
    caching_world: World, count: int
) -> None:
    asked = [f"lead_{number}" for number in range(count)]
    caching_world.source.gate = asyncio.Event()
    for _ in range(3):  # more than may look up at once
        with pytest.raises(OverloadedError):
            await caching_world.ask(
                *asked, context=msgspec.structs.replace(CONTEXT, answer_by=time.monotonic() + 0.02)
            )
    caching_world.source.gate.set()
    assert len((await caching_world.ask(*asked)).lead_ids) == count
    late = msgspec.structs.replace(CONTEXT, answer_by=time.monotonic() - 1)
    assert (await caching_world.ask(*asked, context=late)).cache_hits == count


async def test_who_waits_for_a_look_up_of_others_waits_no_longer_than_his_own_deadline(world: World) -> None:
    world.source.gate = asyncio.Event()
    patient = [asyncio.create_task(world.ask(f"lead_{number}")) for number in range(SLOTS + 1)]
    await world.source.reached.wait()
    with pytest.raises(OverloadedError):
        await world.ask("lead_9", context=msgspec.structs.replace(CONTEXT, answer_by=time.monotonic() + 0.02))
    world.source.gate.set()
    answers = await asyncio.gather(*patient)
    assert [answer.lead_ids for answer in answers] == [["lead_0"], ["lead_1"], ["lead_2"]]


@pytest.mark.parametrize("listening", [True, False])
async def test_with_the_database_away_what_is_remembered_is_answered_and_the_rest_is_to_be_asked_again(
    executor: ThreadPoolExecutor, listening: bool
) -> None:
    clock = FakeClock()
    cache = build_cache(1000, clock, ttl_seconds=300, trusted_until=2000 if listening else 0)
    world = World(executor, cache)
    await world.ask("lead_2")
    clock.now += 100
    await world.ask("lead_1")
    clock.now += 100
    world.source.error = DatabaseUnavailableError()
    mixed = await world.ask("nobody", "lead_1", "lead_3", "lead_1", context=WITH_INTERVALS)
    alone = await world.ask("lead_1", context=WITH_INTERVALS)
    assert rows_of(mixed) == 2 * rows_of(alone)
    assert mixed.intervals == pytest.approx(np.repeat(alone.intervals, 2, axis=0), abs=0)
    assert [(*msgspec.structs.astuple(told)[:3],) for told in mixed.rejections] == [
        ("nobody", 0, "DATABASE_UNAVAILABLE"),
        ("lead_3", 2, "DATABASE_UNAVAILABLE"),
    ]
    assert (mixed.asked, mixed.cache_hits, mixed.degraded) == (4, 2, True)
    assert mixed.degraded_age_seconds == (0 if listening else 100)
    assert VERDICTS[mixed.verdict[0]] == ("ok" if listening else "caution")
    with pytest.raises(DatabaseUnavailableError):
        await world.ask("nobody", "lead_3")


async def test_a_lead_that_changes_while_it_is_read_is_read_again_next_time(caching_world: World) -> None:
    assert isinstance(caching_world.cache, PredictionCache)
    caching_world.source.gate = asyncio.Event()
    reading = asyncio.create_task(caching_world.ask("lead_1", "lead_2"))
    await caching_world.source.reached.wait()
    caching_world.source.leads["lead_1"] = {}
    caching_world.cache.forget(["lead_1"])
    caching_world.source.gate.set()
    before = await reading
    after = await caching_world.ask("lead_1", "lead_2")
    assert caching_world.source.asked[1:] == [["lead_1"]]
    assert VERDICTS[after.verdict[0]] == "abstain" != VERDICTS[before.verdict[0]]
    assert rows_of(after)[1] == rows_of(before)[1]


async def test_with_the_database_away_and_nobody_listening_the_last_known_answers_say_that_they_are(
    caching_world: World,
) -> None:
    assert isinstance(caching_world.cache, PredictionCache)
    before = await caching_world.ask("lead_1", "lead_2")
    caching_world.cache.trust_until(0)
    caching_world.source.error = DatabaseUnavailableError()
    after = await caching_world.ask("lead_2", "lead_1")
    assert after.probability.tolist() == before.probability.tolist()[::-1]
    assert (before.degraded, after.degraded) == (False, True)
    assert VERDICTS[min(after.verdict)] == "caution"


async def test_degraded_answers_tell_their_age_and_their_intervals_widen_with_it(
    executor: ThreadPoolExecutor,
) -> None:
    clock = FakeClock()
    cache = build_cache(100, clock, ttl_seconds=10 * HALFWAY_SECONDS, trusted_until=clock.now + 1)
    world = World(executor, cache)
    fresh = np.array(await world.ask_intervals("lead_1", "lead_2"))
    world.source.error = DatabaseUnavailableError()
    clock.now += HALFWAY_SECONDS
    degraded = await world.ask("lead_1", "lead_2", context=WITH_INTERVALS)
    assert degraded.degraded_age_seconds == pytest.approx(HALFWAY_SECONDS)
    assert degraded.intervals == pytest.approx((fresh + np.array(degraded.bounds)) / 2)


async def test_degraded_answers_can_be_turned_off(executor: ThreadPoolExecutor) -> None:
    cache = build_cache(1000)
    world = World(executor, cache, degraded_answers=False)
    await world.ask("lead_1")
    cache.trust_until(0)
    world.source.error = DatabaseUnavailableError()
    with pytest.raises(DatabaseUnavailableError):
        await world.ask("lead_1")


async def test_nobody_listening_means_that_every_lead_is_read(caching_world: World) -> None:
    assert isinstance(caching_world.cache, PredictionCache)
    await caching_world.ask("lead_1")
    caching_world.cache.trust_until(0)
    again = await caching_world.ask("lead_1")
    assert (again.cache_hits, again.degraded) == (0, False)
    assert caching_world.source.asked == [["lead_1"], ["lead_1"]]


async def test_another_model_does_not_answer_from_the_old_ones_cache(caching_world: World) -> None:
    await caching_world.ask("lead_1")
    caching_world.models.bundle = build_lead_bundle("20260202_120000", seed=2)
    swapped = await caching_world.ask("lead_1")
    assert swapped.cache_hits == 0
    assert swapped.model.version == "20260202_120000"


async def test_nobody_gets_an_interval_who_did_not_ask_for_it(world: World) -> None:
    assert (await world.ask("lead_1")).intervals is None


async def test_an_interval_is_the_pair_of_the_raw_score_bounded_and_holds_the_probability(
    world: World,
) -> None:
    asked = [f"lead_{number}" for number in range(60)]
    predictions = await world.ask(*asked, context=WITH_INTERVALS)
    scored = score_leads(BUNDLE, build_columns(ROWS[:60], FEATURES.input_columns), AS_OF, POLICY).answers
    assert BUNDLE.venn_abers is not None
    assert predictions.intervals is not None
    p0, p1 = look_up(BUNDLE.venn_abers, scored["raw_score"])
    low, high = predictions.intervals.T
    probability = predictions.probability
    told = predictions.verdict != VERDICTS.index("abstain")
    assert np.array_equal(low[told], np.minimum(np.clip(p0, 0.01, 0.99), probability)[told])
    assert np.array_equal(high[told], np.maximum(np.clip(p1, 0.01, 0.99), probability)[told])
    assert np.all((low <= probability) & (probability <= high) & (low >= 0.01) & (high <= 0.99))
    assert np.count_nonzero((p0 < probability) & (probability < p1))
    assert np.count_nonzero((p0 > probability) | (probability > p1))


async def test_intervals_of_a_batch_equal_those_of_its_leads_alone_bit_for_bit(world: World) -> None:
    asked = [*(f"lead_{number}" for number in range(INLINE_LEADS + 1)), "empty", UUID]
    together = await world.ask_intervals(*asked)
    assert together == [(await world.ask_intervals(lead_id))[0] for lead_id in asked]


async def test_intervals_keep_to_the_answered_positions(world: World) -> None:
    mixed = await world.ask_intervals("nobody", "lead_1", "twice", "lead_2", "lead_1")
    one, two = await world.ask_intervals("lead_1", "lead_2")
    assert mixed == [one, two, one]
    assert await world.ask_intervals("nobody") == []


async def test_a_lead_without_any_data_has_the_widest_interval(world: World) -> None:
    assert await world.ask_intervals("empty") == [[0.01, 0.99]]


async def test_an_answer_remembered_for_somebody_else_still_has_its_interval(caching_world: World) -> None:
    await caching_world.ask("lead_1", "empty")
    caching_world.source.error = DatabaseUnavailableError()
    remembered = await caching_world.ask_intervals("lead_1", "empty")
    caching_world.source.error = None
    caching_world.models.bundle = dataclasses.replace(
        BUNDLE, ref=msgspec.structs.replace(BUNDLE.ref, sha256="f" * 64)
    )
    assert remembered == await caching_world.ask_intervals("lead_1", "empty")


async def test_a_model_without_a_table_refuses_intervals_and_answers_everything_else(world: World) -> None:
    before = rows_of(await world.ask("lead_1"))
    world.models.bundle = dataclasses.replace(BUNDLE, venn_abers=None)
    with pytest.raises(InvalidParameterError, match="published without intervals"):
        await world.ask("lead_1", context=WITH_INTERVALS)
    assert rows_of(await world.ask("lead_1")) == before
    assert len(world.source.asked) == 2


async def test_nobody_gets_reasons_who_did_not_ask_and_nothing_is_made_for_them(world: World) -> None:
    def refuse() -> ScoreExplainer:
        raise AssertionError("the explainer was asked for")

    world.models.bundle = dataclasses.replace(BUNDLE, explainer=refuse)
    predictions = await world.ask("lead_1", context=WITH_INTERVALS)
    assert predictions.explanations is None
    assert "reasons" not in predictions.stages_ms


async def test_reasons_change_no_number_and_keep_to_the_answered_positions(world: World) -> None:
    world.source.leads["broken"] = {"tuition_fee": float("nan")}
    asked = ["nobody", "lead_1", "broken", UUID.upper(), "lead_2", "lead_1", "empty"]
    predictions = await world.ask(*asked, context=WITH_REASONS)
    assert rows_of(predictions) == rows_of(await world.ask(*asked))
    assert "reasons" in predictions.stages_ms
    alone = [(await world.ask_reasons(lead_id))[0] for lead_id in predictions.lead_ids]
    assert predictions.explanations == alone
    for explanation, probability in zip(alone, predictions.probability.tolist(), strict=True):
        receipt = explanation.receipt
        steps = sum(line.contribution for line in receipt.contributions)
        assert abs(receipt.base_rate + steps + receipt.calibration + receipt.bounds - probability) < 1e-9
    assert await world.ask_reasons("nobody", "broken") == []
    assert await world.ask_reasons("twice", "lead_1") == alone[:1]


async def test_reasons_are_of_the_data_as_it_is_and_what_was_remembered_gives_way_to_it(
    caching_world: World,
) -> None:
    before = await caching_world.ask("lead_1")
    caching_world.source.leads["lead_1"] = build_lead_rows(1, seed=77)[0]
    explained = await caching_world.ask("lead_1", context=WITH_REASONS)
    after = await caching_world.ask("lead_1")
    assert (before.cache_hits, explained.cache_hits, after.cache_hits) == (0, 0, 1)
    assert rows_of(before) != rows_of(explained) == rows_of(after)


async def test_features_are_told_as_they_are_read_whatever_is_remembered(caching_world: World) -> None:
    await caching_world.ask("lead_1")
    lead = {"gpa": 2.25, "minutes_on_site": float("inf"), "newsletter_opt_in": True, "source": "fair"}
    caching_world.source.leads["lead_1"] = lead
    predictions = await caching_world.ask("nobody", "lead_1", context=WITH_FEATURES)
    assert predictions.features == [
        {
            "gpa": 2.25,
            "minutes": None,
            "contacts": None,
            "newsletter": 1,
            "age": None,
            "source": 0.3,
            "fee": None,
        }
    ]
    assert predictions.explanations is None


async def test_only_looks_into_a_cache_are_counted(world: World, caching_world: World) -> None:
    def count() -> list[float]:
        name = "leadscore_prediction_cache_lookups_total"
        results = ("hit", "miss", "recalled")
        return [REGISTRY.get_sample_value(name, {"result": result}) or 0 for result in results]

    hits, misses, recalled = count()
    await caching_world.ask("lead_1", "lead_2")
    await caching_world.ask("lead_1", "nobody")
    assert count() == [hits + 1, misses + 3, recalled]
    await caching_world.ask("lead_1", context=WITH_REASONS)  # a receipt is made afresh
    await world.ask("lead_1")  # where nothing is remembered
    assert count() == [hits + 1, misses + 3, recalled]
    assert isinstance(caching_world.cache, PredictionCache)
    caching_world.cache.trust_until(0)
    await caching_world.ask("lead_1")  # read, since nobody listens
    caching_world.source.error = DatabaseUnavailableError()
    await caching_world.ask("lead_1", "nobody", "lead_2")  # an outage is no fault of the cache
    assert count() == [hits + 1, misses + 4, recalled + 2]


async def test_reasons_of_a_remembered_lead_need_the_database(caching_world: World) -> None:
    await caching_world.ask("lead_1")
    caching_world.source.error = DatabaseUnavailableError()
    with pytest.raises(DatabaseUnavailableError):
        await caching_world.ask_reasons("lead_1")


@pytest.mark.parametrize("leads", [1, INLINE_LEADS + 1])
async def test_reasons_are_worked_out_on_the_scoring_thread_whatever_the_batch(
    executor: ThreadPoolExecutor, world: World, leads: int
) -> None:
    threads: list[int] = []

    def explainer() -> ScoreExplainer:
        threads.append(threading.get_ident())
        return BUNDLE.explainer()

    world.models.bundle = dataclasses.replace(BUNDLE, explainer=explainer)
    await world.ask_reasons(*(f"lead_{number}" for number in range(leads)))
    assert threads == [executor.submit(threading.get_ident).result()]


async def test_a_model_that_cannot_be_explained_is_a_failed_prediction(world: World) -> None:
    def refuse() -> ScoreExplainer:
        raise ValueError("a tree has a node without training rows")

    world.models.bundle = dataclasses.replace(BUNDLE, explainer=refuse)
    with pytest.raises(PredictionFailedError):
        await world.ask("lead_1", context=WITH_REASONS)
    assert (await world.ask("lead_1")).lead_ids == ["lead_1"]


@pytest.mark.parametrize("bundle", [BUNDLE, dataclasses.replace(BUNDLE, venn_abers=None)])
def test_the_confidence_method_interval_is_one_less_the_width(bundle: ModelBundle) -> None:
    rows = [*build_lead_rows(50, seed=9), {}]
    policy = ScoringPolicy(0.6, "interval")
    answers = score_leads(bundle, build_columns(rows, FEATURES.input_columns), AS_OF, policy).answers
    low, high = find_intervals(bundle, answers).T
    assert np.array_equal(answers["confidence"], 1 - (high - low))
    assert np.all((answers["confidence"] >= 0) & (answers["confidence"] <= 1))
    assert answers["confidence"][-1] == 1 - (0.99 - 0.01)
    if bundle.venn_abers is None:
        assert np.all(answers["confidence"] == answers["confidence"][-1])


async def test_no_model_is_told_before_the_database_is_asked(world: World) -> None:
    world.models.error = ModelNotReadyError()
    with pytest.raises(ModelNotReadyError):
        await world.ask("lead_1")
    assert not world.source.asked


async def test_anything_unexpected_is_a_failed_prediction_with_its_cause(world: World) -> None:
    world.source.error = ZeroDivisionError("a value of a lead")
    with pytest.raises(PredictionFailedError) as caught:
        await world.ask("lead_1")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "a value of a lead" not in str(caught.value)


class Stored:
    """A predictor over leads `good_0` to `good_29`, `bad_0` and `bad_1` in a database."""

    def __init__(self, database: Database, executor: ThreadPoolExecutor) -> None:
        self.models = FakeModels(BUNDLE)
        self._predictor = Predictor(
            self.models, PostgresLeadSource(database, "leads"), NullCache(), DriftWindow(1),
            executor=executor, policy=POLICY,
        )  # fmt: skip

    async def ask(self, lead_id: str) -> Exception | None:
        """Returns what became of a request, whose ID in the log is that of its lead."""
        with structlog.contextvars.bound_contextvars(request_id=lead_id):
            try:
                await self._predictor.predict([lead_id], CONTEXT)
            except PredictionFailedError as exc:
                return exc
        return None

    async def ask_together(self) -> dict[str, Exception | None]:
        """Returns what became of a request for each lead, read in the same turn of the event loop."""
        lead_ids = [*(f"good_{number}" for number in range(30)), "bad_0", "bad_1"]
        return dict(zip(lead_ids, await asyncio.gather(*map(self.ask, lead_ids)), strict=True))


@pytest.fixture
async def stored(empty_database_url: str, executor: ThreadPoolExecutor) -> AsyncIterator[Stored]:
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(
            "CREATE TABLE crm AS SELECT gen_random_uuid() AS lead_id, name || n AS external_ref,"
            " now() AS created_at, 'website' AS source, 2 AS touchpoint_count,"
            " CASE name WHEN 'bad_' THEN 2.5 ELSE 3 END AS gpa, 5.0 AS minutes_on_site,"
            " true AS newsletter_opt_in, 5000 AS tuition_fee"
            " FROM generate_series(0, 29) n, (VALUES ('good_'), ('bad_')) names(name)"
        )
        connection.execute("CREATE VIEW leads AS SELECT * FROM crm")
    database = Database(empty_database_url, pool_size=4, deadline_seconds=10)
    yield Stored(database, executor)
    await database.close()


def refuse_bad_leads(values: FloatArray) -> FloatArray:
    if (values[:, 0] == 2.5).any():
        raise ValueError("a value of a lead")
    return BUNDLE.scorer(values)


async def test_a_lead_that_cannot_be_scored_fails_no_request_that_shares_its_look_up(stored: Stored) -> None:
    stored.models.bundle = dataclasses.replace(BUNDLE, scorer=refuse_bad_leads)
    outcomes = await stored.ask_together()
    failed = {lead_id: error for lead_id, error in outcomes.items() if error is not None}
    assert list(failed) == ["bad_0", "bad_1"]
    assert {type(error.__cause__) for error in failed.values()} == {ValueError}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("at_fault", ["statement", "scoring"])
async def test_the_cause_of_a_failed_prediction_is_logged_with_the_id_of_its_request(
    stored: Stored, empty_database_url: str, at_fault: str, together: bool
) -> None:
    if at_fault == "scoring":
        stored.models.bundle = dataclasses.replace(BUNDLE, scorer=refuse_bad_leads)
    else:
        with psycopg.connect(empty_database_url) as connection:
            connection.execute("ALTER TABLE crm RENAME gpa TO grade; DROP VIEW leads")
            connection.execute("CREATE VIEW leads AS SELECT *, 3 + 1 / (2.5 - grade) AS gpa FROM crm")
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        if together:
            outcomes = await stored.ask_together()
        else:
            outcomes = {lead_id: await stored.ask(lead_id) for lead_id in ("good_0", "bad_0", "bad_1")}
    assert {lead_id for lead_id, error in outcomes.items() if error} == {"bad_0", "bad_1"}
    causes = [line for line in lines if line.get("exc_info") or line.get("sqlstate") == "22012"]
    assert sorted(line["request_id"] for line in causes if "request_id" in line) == ["bad_0", "bad_1"]
    # Those that are nobody's are of statements they shared, before each was tried alone.
    assert (len(causes) > 2) == (together and at_fault == "statement")


async def test_every_stage_is_timed_and_drift_sees_what_was_built(world: World) -> None:
    predictions = await world.ask("lead_1", "lead_2", "nobody")
    assert list(predictions.stages_ms) == [
        "model", "cache", "database", "features", "safety", "scoring", "calibration",
    ]  # fmt: skip
    assert world.drift.statistics(BUNDLE.statistics, FEATURES.fingerprint).rows == 2


async def test_drift_counts_a_lead_once_however_often_it_is_explained(caching_world: World) -> None:
    world, leads = caching_world, [f"lead_{number}" for number in range(25)]
    for context in (WITH_REASONS, WITH_FEATURES, CONTEXT) * 4:
        await world.ask(*leads, context=context)
    assert world.drift.statistics(BUNDLE.statistics, FEATURES.fingerprint).rows == 25
    world.source.part_leads = 2
    await world.ask("lead_3", "nobody", "lead_26", "lead_4", "lead_27", context=WITH_REASONS)
    assert world.drift.statistics(BUNDLE.statistics, FEATURES.fingerprint).rows == 27


@pytest.mark.parametrize(("leads", "inline"), [(INLINE_LEADS, True), (INLINE_LEADS + 1, False)])
async def test_large_batches_leave_the_event_loop_for_the_scoring_thread(
    executor: ThreadPoolExecutor, world: World, leads: int, inline: bool
) -> None:
    threads: list[int] = []

    def scorer(values: FloatArray) -> FloatArray:
        threads.append(threading.get_ident())
        return BUNDLE.scorer(values)

    world.models.bundle = dataclasses.replace(BUNDLE, scorer=scorer)
    await world.ask(*(f"lead_{number}" for number in range(leads)))
    assert threads == [threading.get_ident() if inline else executor.submit(threading.get_ident).result()]


def test_scoring_many_leads_equals_scoring_each_alone_bit_for_bit() -> None:
    rows = build_lead_rows(300, seed=9)
    together = score_leads(BUNDLE, build_columns(rows, FEATURES.input_columns), AS_OF, POLICY)
    for number, row in enumerate(rows):
        alone = score_leads(BUNDLE, build_columns([row], FEATURES.input_columns), AS_OF, POLICY)
        assert alone.answers.tolist() == [together.answers[number].item()]
