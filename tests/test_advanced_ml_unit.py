"""The unit contract of the prediction core, for developers: what each piece promises, in sentences.

Runs by itself in seconds: no database, no files, no network, no clock. The corners of each piece are in
`test_features.py`, `test_feature_safety.py`, `test_calibration.py` and `test_circuit_breaker.py`.

    python -m pytest tests/test_advanced_ml_unit.py
"""

import socket

import numpy as np
import pytest

from app.ai.calibration import (
    Calibrator,
    calibrate,
    calibration_statistics,
    confidence,
    fit_isotonic,
    fit_sigmoid,
)
from app.ai.circuit_breaker import CircuitBreaker
from app.ai.domain import VERDICTS, Column, split_uuids
from app.ai.feature_safety import build_statistics, build_verdicts, check_features, drift_statistics
from app.ai.features import FeatureSet, build_features
from app.errors import CircuitOpenError, DatabaseUnavailableError, InvalidLeadIdError
from tests.builders import (
    AS_OF,
    DAY,
    EVERY_TRANSFORM,
    INF,
    INVALID,
    MISSING,
    NAN,
    ODD_FLOATS,
    PRESENT,
    UNSEEN,
    build_one,
    check_one,
    column,
    leads,
    matrix,
    plausible_leads,
    spec,
    take,
)

ONE_TO_TEN = range(1, 11)
RAW = np.random.default_rng(1).random(4000)
OUTCOME = (np.random.default_rng(2).random(4000) < RAW**2).astype(np.int64)
CALIBRATORS = [
    Calibrator("sigmoid", fit_sigmoid(RAW, OUTCOME), 0.01, 0.99),
    Calibrator("spread", {"steepness": 6.0, "centre": 0.5}, 0.01, 0.99),
    Calibrator("isotonic", fit_isotonic(RAW, OUTCOME), 0.01, 0.99),
    Calibrator("none", {}, 0.01, 0.99),
]
each_method = pytest.mark.parametrize("calibrator", CALIBRATORS, ids=lambda calibrator: calibrator.method)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        pytest.fail("the unit contract needs no network and no database")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# The vocabulary of features


@pytest.mark.parametrize(
    ("transform", "stored", "params", "expected"),
    [
        ("value", [column("number", 3.5)], {}, 3.5),
        ("log1p", [column("number", np.e - 1)], {}, 1.0),
        ("flag", [column("boolean", True)], {}, 1.0),
        ("is_present", [column("text", "anything")], {}, 1.0),
        ("is_present", [column("text", None)], {}, 0.0),
        ("age_days", [column("timestamp", AS_OF - 3 * DAY)], {}, 3.0),
        ("age_days", [column("timestamp", AS_OF + 3 * DAY)], {}, 0.0),
        ("days_until", [column("timestamp", AS_OF + 3 * DAY)], {}, 3.0),
        ("days_until", [column("timestamp", AS_OF - 3 * DAY)], {}, -3.0),
        ("days_between", [column("timestamp", AS_OF), column("timestamp", AS_OF + DAY)], {}, 1.0),
        ("ratio", [column("number", 3), column("number", 4)], {}, 0.75),
        ("ratio", [column("number", 0), column("number", 0)], {"zero_over_zero": 0.5}, 0.5),
        ("level", [column("text", " WEB ")], {"levels": {"web": 0.25}}, 0.25),
        ("one_of", [column("text", "Fair")], {"values": ["web", "fair"]}, 1.0),
        ("one_of", [column("text", "owl")], {"values": ["web", "fair"]}, 0.0),
    ],
)
def test_a_transform_gives_the_number_it_promises(
    transform: str, stored: list[Column], params: dict, expected: float
) -> None:
    values, states = build_one(transform, *stored, **params)
    assert values == [pytest.approx(expected)]
    assert states == [PRESENT]


@pytest.mark.parametrize(
    ("transform", "stored", "why"),
    [
        ("value", [column("number", None)], MISSING),
        ("value", [column("number", NAN)], INVALID),
        ("value", [column("number", -INF)], INVALID),
        ("value", [column("number", 1e39)], INVALID),
        ("log1p", [column("number", -0.5)], INVALID),
        ("flag", [column("boolean", None)], MISSING),
        ("age_days", [column("timestamp", INF)], INVALID),
        ("days_until", [column("timestamp", -INF)], INVALID),
        ("days_between", [column("timestamp", AS_OF), column("timestamp", None)], MISSING),
        ("ratio", [column("number", 1), column("number", 0)], INVALID),
        ("ratio", [column("number", 0), column("number", 0)], INVALID),
        ("level", [column("text", "owl")], UNSEEN),
        ("level", [column("text", "  ")], MISSING),
        ("one_of", [column("text", None)], MISSING),
    ],
)
def test_a_value_that_cannot_be_used_is_a_gap_that_says_why(
    transform: str, stored: list[Column], why: int
) -> None:
    params = {"level": {"levels": {"web": 0.25}}, "one_of": {"values": ["web"]}}.get(transform, {})
    values, states = build_one(transform, *stored, **params)
    assert np.isnan(values[0])
    assert states == [why]


def test_a_feature_set_is_data_and_its_fingerprint_names_it() -> None:
    again = FeatureSet.from_json(EVERY_TRANSFORM.to_json())
    assert again == EVERY_TRANSFORM
    assert again.fingerprint == EVERY_TRANSFORM.fingerprint
    assert again.fingerprint != FeatureSet(EVERY_TRANSFORM.specs[::-1]).fingerprint


def test_an_unknown_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        spec("cube_root", ("gpa", "number"))


# Feature safety


@pytest.mark.parametrize(
    ("strategy", "expected"), [("impute", 5.0), ("zero", 0.0), ("keep", NAN)], ids=["impute", "zero", "keep"]
)
@pytest.mark.parametrize(("state", "kind"), [(MISSING, "missing"), (INVALID, "invalid"), (UNSEEN, "unseen")])
def test_a_gap_is_filled_the_way_its_feature_says(state, kind: str, strategy: str, expected: float) -> None:
    checked = check_one(NAN, state, ONE_TO_TEN, **{kind: strategy})
    np.testing.assert_array_equal(checked.values, [[expected]])
    assert checked.coverage[0] == 0
    assert not checked.rejected[0]


@pytest.mark.parametrize(("strategy", "expected"), [("clip", 10.0), ("keep", 12.0), ("impute", 5.0)])
def test_a_value_outside_the_training_range_is_treated_the_way_its_feature_says(
    strategy: str, expected: float
) -> None:
    checked = check_one(12.0, PRESENT, ONE_TO_TEN, out_of_range=strategy)
    assert checked.values[0, 0] == expected
    assert checked.coverage[0] == 1


@pytest.mark.parametrize(
    ("value", "state", "strategies"),
    [
        (NAN, MISSING, {"missing": "reject"}),
        (NAN, INVALID, {"invalid": "reject"}),
        (NAN, UNSEEN, {"unseen": "reject"}),
        (12.0, PRESENT, {"out_of_range": "reject"}),
    ],
)
def test_a_row_that_cannot_be_made_safe_is_rejected(value: float, state, strategies: dict) -> None:
    checked = check_one(value, state, ONE_TO_TEN, **strategies)
    assert checked.rejected.tolist() == [True]


def test_coverage_is_the_share_of_features_that_rest_on_data() -> None:
    features = FeatureSet((
        spec("value", ("gpa", "number"), name="gpa"),
        spec("is_present", ("gpa", "number"), name="gpa_there"),
        spec("value", ("visits", "number"), name="visits"),
        spec("one_of", ("source", "text"), name="web", params={"values": ["web"]}),
    ))  # fmt: skip
    stored = leads(
        gpa=column("number", 3.0, None, None),
        visits=column("number", 1, INF, None),
        source=column("text", "owl", "web", None),
    )
    built = build_features(stored, features, AS_OF)
    assert check_features(built, features, build_statistics(built)).coverage.tolist() == [
        1.0,
        1 / 3,  # what is read from one column counts once
        0.0,
    ]


@pytest.mark.parametrize(
    ("coverage", "far_outside", "verdict"),
    [(1.0, 0, "ok"), (0.5, 0, "caution"), (1.0, 2, "caution"), (0.1, 0, "abstain"), (0.0, 0, "abstain")],
)
def test_a_verdict_says_how_much_a_probability_rests_on(
    coverage: float, far_outside: int, verdict: str
) -> None:
    (code,) = build_verdicts(np.array([coverage]), np.array([far_outside]), min_coverage=0.6)
    assert VERDICTS[code] == verdict


def test_drift_is_told_apart_from_chance() -> None:
    random = np.random.default_rng(3)
    reference = build_statistics(matrix(random.normal(0, 1, (4000, 1))))
    assert drift_statistics(reference, random.normal(0, 1, (1000, 1))).state == "stable"
    assert drift_statistics(reference, random.normal(0.4, 1, (1000, 1))).state == "moderate"
    assert drift_statistics(reference, random.normal(1.0, 1, (1000, 1))).state == "drifting"


def test_a_lead_gets_the_same_numbers_alone_and_in_a_batch_bit_for_bit() -> None:
    many = plausible_leads(300, seed=4)
    built = build_features(many, EVERY_TRANSFORM, AS_OF)
    statistics = build_statistics(built)
    batch = check_features(built, EVERY_TRANSFORM, statistics).values
    for row in range(300):
        alone = build_features(take(many, [row]), EVERY_TRANSFORM, AS_OF)
        assert check_features(alone, EVERY_TRANSFORM, statistics).values[0].tobytes() == batch[row].tobytes()


# Calibration and confidence


@each_method
def test_any_float_becomes_a_probability_within_the_bounds(calibrator: Calibrator) -> None:
    p = calibrate(np.array(ODD_FLOATS), calibrator)
    assert ((p >= 0.01) & (p <= 0.99)).all()


@each_method
def test_a_higher_score_never_gets_a_lower_probability(calibrator: Calibrator) -> None:
    assert (np.diff(calibrate(np.linspace(-1, 2, 100_000), calibrator)) >= 0).all()


@each_method
def test_a_score_is_calibrated_the_same_alone_and_in_a_batch_bit_for_bit(calibrator: Calibrator) -> None:
    batch = calibrate(RAW[:2000], calibrator)
    alone = [calibrate(RAW[row : row + 1], calibrator)[0] for row in range(2000)]
    assert np.array(alone).tobytes() == batch.tobytes()


@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_a_fitted_calibrator_makes_34_percent_mean_34_in_100(method: str) -> None:
    (calibrator,) = (entry for entry in CALIBRATORS if entry.method == method)
    random = np.random.default_rng(5)
    raw = random.random(20_000)
    outcome = (random.random(20_000) < raw**2).astype(np.int64)
    p = calibrate(raw, calibrator)
    near = np.abs(p - 0.34) < 0.05
    assert outcome[near].mean() == pytest.approx(p[near].mean(), abs=0.04)
    assert calibration_statistics(p, outcome)["ece"] < calibration_statistics(raw, outcome)["ece"] / 3


@pytest.mark.parametrize(
    ("method", "expected"),
    [("max_probability", [1.0, 0.5, 0.75]), ("margin", [1.0, 0.0, 0.5]), ("entropy", [1.0, 0.0, 0.18872])],
)
def test_confidence_is_least_at_one_half_and_complete_at_certainty(method, expected: list[float]) -> None:
    assert confidence(np.array([0.0, 0.5, 0.75]), method) == pytest.approx(expected, abs=1e-5)


def test_a_calibrator_that_would_reverse_the_ranking_is_refused() -> None:
    with pytest.raises(ValueError, match="reverse"):
        Calibrator("sigmoid", {"slope": -1.0, "intercept": 0.0})


# The circuit breaker


async def _call(breaker: CircuitBreaker, error: Exception | None = None) -> None:
    async with breaker.guard():
        if error is not None:
            raise error


async def test_the_breaker_opens_after_failures_in_a_row_and_one_good_probe_closes_it() -> None:
    now = [0.0]
    breaker = CircuitBreaker(2, 30.0, lambda: now[0])
    for _ in range(2):
        with pytest.raises(DatabaseUnavailableError):
            await _call(breaker, DatabaseUnavailableError())
    with pytest.raises(CircuitOpenError) as refused:
        await _call(breaker)
    assert refused.value.retry_after == 30
    now[0] = 30.0
    assert breaker.state == "half_open"
    async with breaker.guard():
        with pytest.raises(CircuitOpenError):
            await _call(breaker)
    assert breaker.state == "closed"


async def test_mistakes_of_the_caller_never_open_the_breaker() -> None:
    breaker = CircuitBreaker(1, 30.0, lambda: 0.0)
    for _ in range(100):
        with pytest.raises(InvalidLeadIdError):
            await _call(breaker, InvalidLeadIdError())
    assert breaker.state == "closed"


UUID_A, UUID_B = "6f1c0000-0000-4000-8000-00000000000a", "6F1C0000-0000-4000-8000-00000000000B"


@pytest.mark.parametrize(
    ("lead_ids", "uuids", "others"),
    [
        ([UUID_A, UUID_B], [UUID_A, UUID_B], []),
        ([UUID_A, "lead_1"], [UUID_A], ["lead_1"]),
        (["lead_1", "lead_2"], [], ["lead_1", "lead_2"]),
        ([f"{UUID_A}\n{UUID_B}"], [], [f"{UUID_A}\n{UUID_B}"]),
        ([UUID_A, UUID_A[:-1]], [UUID_A], [UUID_A[:-1]]),
    ],
)
def test_ids_are_parted_into_uuids_and_others(
    lead_ids: list[str], uuids: list[str], others: list[str]
) -> None:
    assert split_uuids(lead_ids) == (uuids, others)
