"""Receipts: whatever the model, the calibrator and the lead, every step is there and they add up."""

import dataclasses
from collections.abc import Callable
from functools import cache

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from app.ai.artifact_loading import dump_estimator
from app.ai.calibration import Calibrator, fit_isotonic
from app.ai.domain import VERDICTS, AnswerArray, Explanation, InputColumn
from app.ai.explanation import explain_leads
from app.ai.feature_safety import build_statistics, check_features
from app.ai.features import FeatureSet, FeatureSpec, build_features
from app.ai.model_bundle import ModelBundle, load_bundle
from app.ai.predictor import ScoringPolicy, score_leads
from app.ai.reasons import ABSTAINED
from app.ai.venn_abers import build_table
from app.training.publish import build_manifest
from tests.builders import AS_OF, DAY, ODD_FLOATS
from tests.fakes import build_columns
from tests.lead_models import FEATURES, build_lead_rows, describe_model

SOURCE = InputColumn("source", "text")
OTHER = {"levels": {"referral": 0.0, "open_day": 0.0}, "unseen": 1.0, "missing": 0.0}
ONE_HOT = FeatureSet((
    *(spec for spec in FEATURES.specs if spec.name not in {"source", "fee"}),
    FeatureSpec("source", "level", (SOURCE,), OTHER, "source is none of the usual ones"),
    FeatureSpec("source=referral", "one_of", (SOURCE,), {"values": ["referral"]}, "", missing="zero"),
    FeatureSpec("source=open_day", "one_of", (SOURCE,), {"values": ["open_day"]}, "", missing="zero"),
    FeatureSpec("gpa__present", "is_present", (InputColumn("gpa", "number"),), {}, "whether gpa is known"),
))  # fmt: skip
KEEPING = FeatureSet(tuple(
    spec if spec.transform in {"level", "one_of", "is_present"}
    else dataclasses.replace(spec, missing="keep", invalid="keep")
    for spec in ONE_HOT.specs
))  # fmt: skip
POLICY = ScoringPolicy(0.6, "max_probability")
CALIBRATORS = ("sigmoid", "isotonic", "venn_abers", "none", "narrow")
MODELS = ("random_forest", "hist_gradient_boosting", "logistic_regression")


@cache
def bundle_of(model: str) -> ModelBundle:
    """A model over one-hot columns; boosting sees the gaps as they are."""
    features = KEEPING if model == "hist_gradient_boosting" else ONE_HOT
    stored = build_columns(build_lead_rows(500, seed=3), features.input_columns)
    matrix = build_features(stored, features, AS_OF)
    statistics = build_statistics(matrix)
    values = check_features(matrix, features, statistics).values
    chance = 1 / (1 + np.exp(-np.nan_to_num(values[:, 0], nan=1.0) + 2.5 - values[:, 5]))
    outcome = (np.random.default_rng(4).random(len(chance)) < chance).astype(int)
    estimator = {
        "random_forest": RandomForestClassifier(15, max_depth=5, class_weight="balanced", random_state=1),
        "hist_gradient_boosting": HistGradientBoostingClassifier(max_iter=15, random_state=1),
        "logistic_regression": make_pipeline(StandardScaler(), LogisticRegression()),
    }[model].fit(values, outcome)
    description = msgspec.structs.replace(
        describe_model()[1],
        model_type=model,
        feature_set=features.to_json(),
        statistics=[entry.to_json() for entry in statistics],
        golden_inputs=[[None if np.isnan(v) else v for v in row] for row in matrix.values[:3].tolist()],
        base_rate=float(outcome.mean()),
    )
    data = dump_estimator(estimator, "skops")
    return load_bundle(build_manifest(estimator, description, data, "skops"), data)


@cache
def calibrated(model: str, method: str) -> ModelBundle:
    bundle = bundle_of(model)
    raw = np.linspace(0.1, 0.9, 60)
    outcome = (np.random.default_rng(6).random(60) < raw**2).astype(int)
    table = build_table(raw, outcome).to_json()
    calibrator = {
        "sigmoid": Calibrator("sigmoid", {"slope": 5.0, "intercept": -3.0}, 0.01, 0.99),
        "isotonic": Calibrator("isotonic", fit_isotonic(raw, outcome), 0.02, 0.95, tie_break=1e-3),
        "venn_abers": Calibrator("venn_abers", table, 0.02, 0.98, tie_break=1e-4),
        "none": Calibrator("none", {}),
        "narrow": Calibrator("sigmoid", {"slope": 9.0, "intercept": -4.0}, 0.3, 0.6),
    }[method]
    return dataclasses.replace(bundle, calibrator=calibrator)


def explain(bundle: ModelBundle, *rows: dict[str, object]) -> tuple[list[Explanation], AnswerArray]:
    stored = build_columns(rows, bundle.input_columns)
    answers = score_leads(bundle, stored, AS_OF, POLICY).answers
    return explain_leads(bundle, stored, AS_OF, answers), answers


def add_up(explanation: Explanation) -> float:
    receipt = explanation.receipt
    steps = sum(line.contribution for line in receipt.contributions)
    return receipt.base_rate + steps + receipt.calibration + receipt.bounds


ANY_NUMBER = st.one_of(st.none(), st.floats(-10, 50), st.sampled_from(ODD_FLOATS))
ANY_LEAD = st.fixed_dictionaries({
    "gpa": ANY_NUMBER,
    "minutes_on_site": ANY_NUMBER,
    "touchpoint_count": ANY_NUMBER,
    "newsletter_opt_in": st.sampled_from([None, True, False]),
    "created_at": st.one_of(st.none(), st.floats(0, 300).map(lambda days: AS_OF - days * DAY)),
    "source": st.sampled_from([None, "", "referral", "Open_Day", "carrier pigeon"]),
})  # fmt: skip


@settings(deadline=None)  # the first example fits its model
@given(st.sampled_from(MODELS), st.sampled_from(CALIBRATORS), ANY_LEAD)
def test_a_receipt_adds_up_to_the_probability(model: str, method: str, lead: dict[str, object]) -> None:
    bundle = calibrated(model, method)
    (explanation,), answers = explain(bundle, lead)
    receipt = explanation.receipt
    assert abs(add_up(explanation) - answers["probability"][0]) < 1e-9
    assert receipt.base_rate == bundle.manifest.base_rate
    assert [line.feature for line in receipt.contributions] == [
        "gpa", "minutes", "contacts", "newsletter", "age", "source"
    ]  # fmt: skip
    if VERDICTS[answers["verdict"][0]] == "abstain":
        assert explanation.reasons == (ABSTAINED,)
        assert {line.contribution for line in receipt.contributions} == {0.0}
        assert receipt.calibration == 0.0
    else:
        # Calibration takes the rest, so it alone would hide a contribution that is wrong.
        raw = bundle.explainer().baseline + sum(line.contribution for line in receipt.contributions)
        assert raw == pytest.approx(answers["raw_score"][0], abs=1e-12)
        assert ABSTAINED not in explanation.reasons


def test_receipts_of_leads_with_gaps_add_up_for_every_model_and_calibrator(
    record_property: Callable[[str, object], None],
) -> None:
    errors = []
    for model in MODELS:
        for method in CALIBRATORS:
            explanations, answers = explain(calibrated(model, method), *build_lead_rows(60, seed=4), {})
            errors.append(np.abs(np.array(list(map(add_up, explanations))) - answers["probability"]).max())
    record_property("largest difference", f"{max(errors):.0e} in {len(errors)} models of 61 leads")
    assert max(errors) < 1e-9


@pytest.mark.parametrize("model", MODELS)
def test_the_bounds_step_is_there_where_the_bounds_hold_a_probability_back_and_only_there(model: str) -> None:
    rows = build_lead_rows(200, seed=12)
    explanations, answers = explain(calibrated(model, "narrow"), *rows)
    free, unbounded = explain(dataclasses.replace(calibrated(model, "narrow"), calibrator=Calibrator(
        "sigmoid", {"slope": 9.0, "intercept": -4.0}
    )), *rows)  # fmt: skip
    steps = np.array([explanation.receipt.bounds for explanation in explanations])
    assert np.allclose(steps, answers["probability"] - unbounded["probability"], rtol=0, atol=1e-12)
    held = (answers["probability"] == 0.3) | (answers["probability"] == 0.6)
    assert 0 < np.count_nonzero(held) < len(rows)
    assert not steps[~held].any()
    assert all(explanation.receipt.bounds == 0.0 for explanation in free)


def test_a_tie_break_is_part_of_calibration_not_of_the_bounds() -> None:
    explanations, answers = explain(calibrated("random_forest", "venn_abers"), *build_lead_rows(50, seed=1))
    inside = (answers["probability"] > 0.03) & (answers["probability"] < 0.97)
    assert inside.any()
    assert not np.array([explanation.receipt.bounds for explanation in explanations])[inside].any()


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_is_explained_like_its_leads_alone_to_the_last_bit(model: str) -> None:
    rows = [*build_lead_rows(40, seed=9), {}]
    together, _ = explain(bundle_of(model), *rows)
    assert together == [explain(bundle_of(model), row)[0][0] for row in rows]


@pytest.mark.parametrize("model", MODELS)
def test_the_features_of_one_column_are_one_line_with_what_the_lead_has_there(model: str) -> None:
    whole = {"gpa": 3.5, "minutes_on_site": 10, "touchpoint_count": 3, "newsletter_opt_in": True,
             "created_at": AS_OF - 41 * DAY}  # fmt: skip
    explanations, _ = explain(
        bundle_of(model),
        {**whole, "source": "Referral"}, {**whole, "source": "my aunt Zoë"}, {**whole, "gpa": None},
    )  # fmt: skip
    lines = [{line.feature: line for line in e.receipt.contributions} for e in explanations]
    assert [line["source"].value for line in lines] == ["referral", "another one", "unknown"]
    assert lines[0]["source"].contribution < 0 < lines[1]["source"].contribution
    assert lines[0]["age"].value == "41 days ago"
    assert [line["gpa"].value.split(",")[0] for line in lines] == ["3.5", "3.5", "unknown"]
    assert lines[0]["gpa"].contribution > lines[2]["gpa"].contribution


def test_the_sentences_are_the_largest_lines_in_points_and_what_is_left() -> None:
    bundle = calibrated("random_forest", "isotonic")
    (explanation,), answers = explain(bundle, build_lead_rows(1, seed=2)[0])
    lines = sorted(explanation.receipt.contributions, key=lambda line: -abs(line.contribution))
    shown = [line for line in lines[:5] if round(100 * line.contribution)]
    *largest, rest = explanation.reasons
    assert len(largest) == len(shown) > 1
    left = round(100 * (answers["probability"][0] - bundle.manifest.base_rate))
    left -= sum(round(100 * line.contribution) for line in shown)
    assert rest == f"everything else: {left:+d} points"
    for sentence, line in zip(largest, shown, strict=True):
        assert line.value in sentence
        assert f": {round(100 * line.contribution):+d} point" in sentence
