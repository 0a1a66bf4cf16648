"""The circuit breaker against a small model of itself: random sequences of calls, endings and time."""

import asyncio
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.ai.circuit_breaker import CircuitBreaker
from app.errors import (
    BatchSizeExceededError,
    CircuitOpenError,
    DatabaseUnavailableError,
    LeadScoringError,
    OverloadedError,
    PredictionFailedError,
)

LIMIT, OPEN_SECONDS = 3, 30.0


class Clock:
    """Monotonic seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Call:
    """One call under way: entered, to be ended later."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._context = breaker.guard()
        _run(self._context.__aenter__())

    def end(self, error: BaseException | None) -> None:
        if error is None:
            _run(self._context.__aexit__(None, None, None))
            return
        assert not _run(self._context.__aexit__(type(error), error, None))


def _run(coroutine):
    """Runs what never waits; the breaker must not."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    pytest.fail("the breaker waited")


def build_breaker(failures: int = LIMIT) -> tuple[CircuitBreaker, Clock]:
    clock = Clock()
    return CircuitBreaker(failures, OPEN_SECONDS, clock), clock


def fail(breaker: CircuitBreaker, times: int, error: BaseException | None = None) -> None:
    for _ in range(times):
        Call(breaker).end(error or DatabaseUnavailableError())


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    breaker, _ = build_breaker()
    fail(breaker, LIMIT - 1)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert breaker.state == "open"
    with pytest.raises(CircuitOpenError):
        Call(breaker)


def test_a_success_in_between_starts_the_count_again() -> None:
    breaker, _ = build_breaker()
    fail(breaker, LIMIT - 1)
    Call(breaker).end(None)
    fail(breaker, LIMIT - 1)
    assert breaker.state == "closed"


@pytest.mark.parametrize("error", [PredictionFailedError(), DatabaseUnavailableError(), RuntimeError("boom")])
def test_failures_of_the_service_count_whatever_they_are(error: Exception) -> None:
    breaker, _ = build_breaker()
    fail(breaker, LIMIT, error)
    assert breaker.state == "open"


@pytest.mark.parametrize("error", [BatchSizeExceededError(), OverloadedError(), asyncio.CancelledError()])
def test_errors_of_the_caller_and_cancelled_calls_count_neither_way(error: BaseException) -> None:
    breaker, _ = build_breaker()
    fail(breaker, LIMIT - 1)
    fail(breaker, 100, error)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert breaker.state == "open"


def test_of_fifty_calls_that_wait_for_the_half_open_state_exactly_one_passes() -> None:
    breaker, clock = build_breaker()
    fail(breaker, LIMIT)
    clock.now += OPEN_SECONDS
    assert breaker.state == "half_open"
    probe = Call(breaker)
    for _ in range(49):
        with pytest.raises(CircuitOpenError) as caught:
            Call(breaker)
        assert caught.value.retry_after == 1
    probe.end(None)
    assert breaker.state == "closed"


def test_a_failing_probe_opens_it_for_the_whole_time_again() -> None:
    breaker, clock = build_breaker()
    fail(breaker, LIMIT)
    clock.now += OPEN_SECONDS + 100
    fail(breaker, 1)
    assert breaker.state == "open"
    clock.now += OPEN_SECONDS - 0.001
    assert breaker.state == "open"
    clock.now += 0.001
    assert breaker.state == "half_open"


@pytest.mark.parametrize("error", [asyncio.CancelledError(), BatchSizeExceededError(), OverloadedError()])
def test_a_probe_that_says_nothing_gives_its_place_back(error: BaseException) -> None:
    breaker, clock = build_breaker()
    fail(breaker, LIMIT)
    clock.now += OPEN_SECONDS
    Call(breaker).end(error)
    assert breaker.state == "half_open"
    Call(breaker).end(None)
    assert breaker.state == "closed"


def test_retry_after_is_the_rest_of_the_open_time_in_whole_seconds() -> None:
    breaker, clock = build_breaker()
    fail(breaker, LIMIT)
    clock.now += 10.5
    with pytest.raises(CircuitOpenError) as caught:
        Call(breaker)
    assert caught.value.retry_after == 20
    clock.now += 19
    with pytest.raises(CircuitOpenError) as caught:
        Call(breaker)
    assert caught.value.retry_after == 1


def test_a_call_that_ends_after_the_circuit_turned_is_old_news() -> None:
    breaker, clock = build_breaker()
    late_success, late_failure = Call(breaker), Call(breaker)
    fail(breaker, LIMIT)
    late_success.end(None)
    assert breaker.state == "open"
    clock.now += OPEN_SECONDS
    Call(breaker).end(None)
    fail(breaker, LIMIT - 1)
    late_failure.end(PredictionFailedError())
    assert breaker.state == "closed"


async def test_concurrent_calls_on_an_event_loop_share_one_probe() -> None:
    breaker, clock = build_breaker()
    fail(breaker, LIMIT)
    clock.now += OPEN_SECONDS
    all_tried, inside, refused = asyncio.Event(), [], []

    async def call(number: int) -> None:
        try:
            async with breaker.guard():
                inside.append(number)
                await all_tried.wait()
        except CircuitOpenError:
            refused.append(number)
            if len(refused) == 49:
                all_tried.set()

    await asyncio.wait_for(asyncio.gather(*(call(number) for number in range(50))), 10)
    assert len(inside) == 1
    assert breaker.state == "closed"


async def test_a_probe_whose_task_is_cancelled_gives_its_place_back() -> None:
    breaker, clock = build_breaker()
    fail(breaker, LIMIT)
    clock.now += OPEN_SECONDS
    started = asyncio.Event()

    async def hang() -> None:
        async with breaker.guard():
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with breaker.guard():
        pass
    assert breaker.state == "closed"


def test_a_call_from_before_the_circuit_opened_does_not_free_the_probes_place_when_it_is_cancelled() -> None:
    breaker, clock = build_breaker()
    early = Call(breaker)
    fail(breaker, LIMIT)
    clock.now += OPEN_SECONDS
    probe = Call(breaker)
    early.end(asyncio.CancelledError())
    with pytest.raises(CircuitOpenError):
        Call(breaker)
    probe.end(None)
    assert breaker.state == "closed"


class BreakerModel(RuleBasedStateMachine):
    """The rules, told once more in the plainest way, beside the real thing."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker, self.clock = build_breaker()
        self.calls: list[tuple[Call, int]] = []
        self.period, self.in_a_row = 0, 0
        self.open_until: float | None = None
        self.probe_period: int | None = None

    def expected(self) -> str:
        if self.open_until is None:
            return "closed"
        return "open" if self.clock.now < self.open_until else "half_open"

    def turn(self, *, to_open: bool) -> None:
        self.period += 1
        self.in_a_row, self.probe_period = 0, None
        self.open_until = self.clock.now + OPEN_SECONDS if to_open else None

    @rule(seconds=st.sampled_from([0.5, 1.0, 29.5, 30.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def a_call_begins(self) -> None:
        state = self.expected()
        if state == "open" or (state == "half_open" and self.probe_period is not None):
            with pytest.raises(CircuitOpenError) as caught:
                Call(self.breaker)
            left = self.open_until - self.clock.now
            assert caught.value.retry_after == max(1, math.ceil(left))
            return
        self.calls.append((Call(self.breaker), self.period))
        if state == "half_open":
            self.probe_period = self.period

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), ending=st.sampled_from(["success", "failure", "caller", "cancelled"]))
    def a_call_ends(self, data: st.DataObject, ending: str) -> None:
        call, period = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        errors: dict[str, BaseException | None] = {
            "success": None, "failure": PredictionFailedError(), "caller": BatchSizeExceededError(),
            "cancelled": asyncio.CancelledError(),
        }  # fmt: skip
        call.end(errors[ending])
        if period != self.period:
            return
        is_probe = self.probe_period == period
        if ending == "success":
            self.in_a_row = 0
            if is_probe:
                self.turn(to_open=False)
        elif ending == "failure":
            self.in_a_row += 1
            if is_probe or self.in_a_row >= LIMIT:
                self.turn(to_open=True)
        else:
            self.probe_period = None

    @invariant()
    def the_state_is_as_expected(self) -> None:
        assert self.breaker.state == self.expected()


TestBreakerModel = BreakerModel.TestCase
TestBreakerModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_error_is_one_of_our_own_and_may_be_retried() -> None:
    assert issubclass(CircuitOpenError, LeadScoringError)
    assert CircuitOpenError.status == 503
