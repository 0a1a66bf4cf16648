"""The manifest: strict, sealed by its own digest, and honest about what determines predictions."""

import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ai.model_manifest import (
    MAX_MANIFEST_BYTES,
    ModelManifest,
    TrainingFacts,
    build_card_name,
    build_manifest_name,
    build_signature_name,
    encode_manifest,
    manifest_fingerprint,
    parse_stem,
    read_manifest,
    seal_manifest,
)
from app.errors import ArtifactError

VERSION = "20260101_120000"
ARABIC = "\u0662" + VERSION[1:]
"""No version, although Unicode has its first character for a digit, and one that sorts behind any other."""


def build_facts(**changes):
    facts = {
        "as_of_from": "2025-01-01T00:00:00Z", "as_of_to": "2025-12-01T00:00:00Z", "train_rows": 600,
        "calibrate_rows": 200, "test_rows": 200, "positives": 250, "seed": 1,
    }  # fmt: skip
    return TrainingFacts(**{**facts, **changes})


def build_manifest(**changes):
    fields = {
        "model_type": "random_forest",
        "version": VERSION,
        "feature_set": [{"name": "a", "inputs": ["a"]}, {"name": "b", "params": {"levels": {"x": 1}}}],
        "statistics": [{"impute": 0.5, "counts": [1, 2]}, {"impute": 0.1, "counts": [3, 4]}],
        "calibrator": {"method": "sigmoid", "params": {"a": -1.25, "b": 0.1}, "lower": 0.0, "upper": 1.0},
        "threshold": 0.5,
        "base_rate": 0.25,
        "horizon_days": 90,
        "source": "lead_training",
        "label": "outcome_at",
        "training": build_facts(),
        "metrics": {"roc_auc": 0.91, "brier": 0.1},
        "golden_inputs": [[1.0, None], [0.25, -3.5]],
        "created_at": "2026-01-01T12:00:00Z",
        "report": {"notes": ["of no consequence"]},
        "venn_abers": {"scores": [0.5], "p0": [0.0, 0.25], "p1": [0.5, 1.0]},
        "feature_weights": [0.75, 0.25],
        "abstain_below": 0.3,
        "manifest_version": 1,
        "model_id": f"advanced_ml_{VERSION}",
        "file_name": f"advanced_ml_random_forest_{VERSION}.skops",
        "file_size": 1234,
        "sha256": "ab" * 32,
        "format": "skops",
        "library_versions": {"scikit-learn": "1.9.1"},
        "feature_fingerprint": "cd" * 32,
        "golden_outputs": [0.1, 0.9],
    }  # fmt: skip
    return seal_manifest(ModelManifest(**{**fields, **changes}))


def reason_of(data):
    with pytest.raises(ArtifactError) as caught:
        read_manifest(data)
    return caught.value.reason


def test_a_manifest_is_read_back_as_it_was_written():
    manifest = build_manifest()
    assert read_manifest(encode_manifest(manifest)) == manifest


def test_a_number_written_without_a_fraction_is_still_the_same_number():
    manifest = build_manifest(threshold=1, golden_inputs=[[1, 2], [3, None]], golden_outputs=[0, 1])
    assert read_manifest(encode_manifest(manifest)) == manifest


@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(ModelManifest)])
def test_no_field_can_be_changed_without_being_noticed(field):
    content = json.loads(encode_manifest(build_manifest()))
    for changed in (_changed(content[field]), None, {}, [content[field]]):
        if changed != content[field]:
            data = json.dumps({**content, field: changed}).encode()
            assert reason_of(data) in {"manifest_changed", "manifest_invalid"}
    del content[field]
    assert reason_of(json.dumps(content).encode()) in {"manifest_changed", "manifest_invalid"}


def _changed(value):
    """Returns a value of the same type, so that only the digest can tell."""
    if isinstance(value, list):
        return [_changed(value[0]), *value[1:]]
    if isinstance(value, dict):
        first = next(iter(value))
        return {**value, first: _changed(value[first])}
    if isinstance(value, str):
        return value[:-1] + ("a" if value[-1] != "a" else "b")
    return math.nextafter(value, 0.0) if isinstance(value, float) else (value or 0) + 1


def test_no_byte_can_be_changed_without_being_noticed():
    manifest = build_manifest()
    data = encode_manifest(manifest)
    for position in range(len(data)):
        for bit in (0x01, 0x10, 0x20):
            changed = bytearray(data)
            changed[position] ^= bit
            try:
                read = read_manifest(bytes(changed))
            except ArtifactError:
                continue
            # Only white space may differ: then it is the same manifest.
            assert read == manifest


def test_a_truncated_manifest_is_refused_wherever_it_ends():
    data = encode_manifest(build_manifest())
    assert {reason_of(data[:length]) for length in range(len(data.rstrip()))} == {"manifest_invalid"}


def test_an_unknown_field_is_refused():
    content = json.loads(encode_manifest(build_manifest()))
    assert reason_of(json.dumps({**content, "pickle": "gASV"}).encode()) == "manifest_invalid"
    content["training"]["pickle"] = "gASV"
    assert reason_of(json.dumps(content).encode()) == "manifest_invalid"


def test_an_oversized_manifest_is_refused_unread():
    assert MAX_MANIFEST_BYTES == 8 * 2**20
    assert reason_of(b" " * (MAX_MANIFEST_BYTES + 1)) == "manifest_too_large"
    assert reason_of(b" " * MAX_MANIFEST_BYTES) == "manifest_invalid"


def test_a_key_twice_is_refused_whichever_of_the_two_the_digest_is_of():
    data = encode_manifest(build_manifest())
    assert b'"threshold": 0.5' in data
    for twice in (b'"threshold": 0.9,\n"threshold": 0.5', b'"threshold": 0.5,\n"threshold": 0.9'):
        with pytest.raises(ArtifactError) as caught:
            read_manifest(data.replace(b'"threshold": 0.5', twice))
        assert caught.value.reason == "manifest_changed"


@pytest.mark.parametrize(
    ("sound", "hostile"),
    [
        (b'"source": "lead_training"', b'"source": "\xff"'),
        (b'"manifest_sha256": "', b'"manifest_sha256": "\xc3\xa9'),
    ],
)
def test_text_that_no_manifest_has_makes_it_invalid(sound, hostile):
    data = encode_manifest(build_manifest())
    assert sound in data
    with pytest.raises(ArtifactError) as caught:
        read_manifest(data.replace(sound, hostile))
    assert caught.value.reason == "manifest_invalid"


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"NaN", b"\xff\xfe{}", b"[" * 100_000, b'{"a":1e999}'])
def test_what_is_not_a_manifest_at_all_is_refused(data):
    assert reason_of(data) == "manifest_invalid"


def test_a_version_has_digits_of_ascii_alone():
    data = encode_manifest(build_manifest()).replace(VERSION.encode(), ARABIC.encode())
    assert reason_of(data) == "manifest_invalid"


@pytest.mark.parametrize("field", ["version", "source", "manifest_sha256"])
def test_bytes_that_are_no_text_and_text_that_is_no_digest_are_refused_by_name(field):
    data = encode_manifest(build_manifest())
    assert reason_of(data.replace(f'"{field}"'.encode(), b'"\xff"')) == "manifest_invalid"
    content = {**json.loads(data), field: "é"}
    reasons = {"source": "manifest_changed"}
    assert reason_of(json.dumps(content).encode()) == reasons.get(field, "manifest_invalid")


@settings(deadline=None)
@given(
    st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(data):
    assert reason_of(data) == "manifest_invalid"


@pytest.mark.parametrize(
    "changes",
    [
        {"file_name": "../../etc/passwd"},
        {"file_name": f"../advanced_ml_random_forest_{VERSION}.skops"},
        {"file_name": f"/models/advanced_ml_random_forest_{VERSION}.skops"},
        {"file_name": f"advanced_ml_random_forest_{VERSION}.joblib"},
        {"file_name": "advanced_ml_random_forest_20260101_120001.skops"},
        {"model_id": "advanced_ml_20260101_120001"},
        {"version": "20260101"},
        {"version": "20260101_120000\n"},
        {"model_type": "../forest"},
        {"sha256": "AB" * 32},
        {"sha256": "ab" * 31},
        {"file_size": 0},
        {"file_size": 1 << 40},
        {"format": "pickle"},
        {"manifest_version": 2},
        {"threshold": 1.5},
        {"base_rate": -0.1},
        {"threshold": math.nan},
        {"metrics": {"roc_auc": math.inf}},
        {"golden_outputs": [0.1]},
        {"golden_outputs": [0.1, 1.1]},
        {"golden_inputs": [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]},
        {"golden_inputs": [], "golden_outputs": []},
        {"statistics": [{}]},
        {"feature_set": [], "statistics": []},
        {"feature_set": [], "statistics": [], "golden_inputs": [[], []], "feature_weights": []},
        {"golden_inputs": [[1.0, math.inf], [0.25, -3.5]]},
        {"golden_inputs": [[1.0, None], [0.25, -3.5], [0.0, 0.0]]},
        {"feature_weights": [1.0]},
        {"feature_weights": [0.75, 0.25, 0.0]},
        {"feature_weights": [0.75, 0.2]},
        {"feature_weights": [0.75, 0.250002]},
        {"file_size": 512 * 2**20 + 1},
        {"training": build_facts(train_rows=-1)},
    ],
)
def test_a_manifest_that_contradicts_itself_cannot_even_be_made(changes):
    with pytest.raises((ValueError, msgspec.ValidationError)):
        build_manifest(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"file_size": 1},
        {"file_size": 512 * 2**20},
        {"threshold": 0.0, "base_rate": 1.0},
        {"feature_weights": [0.0, 0.0]},
        {
            "feature_set": [{}],
            "statistics": [{}],
            "golden_inputs": [[1.0]],
            "golden_outputs": [0.5],
            "feature_weights": [1.0],
        },
        {"feature_weights": [0.75, 0.2500005]},
        {"training": build_facts(train_rows=0, positives=0)},
    ],
)
def test_whatever_is_just_within_its_bounds_is_read_back(changes):
    manifest = build_manifest(**changes)
    assert read_manifest(encode_manifest(manifest)) == manifest


def test_what_was_verified_cannot_be_changed_afterwards():
    manifest = build_manifest()
    with pytest.raises(AttributeError):
        manifest.threshold = 0.9
    with pytest.raises(AttributeError):
        manifest.training.seed = 2


def test_a_manifest_need_not_tell_what_a_model_does_without():
    unset = ("venn_abers", "feature_weights", "abstain_below")
    manifest = build_manifest(**dict.fromkeys(unset, msgspec.UNSET))
    assert not set(unset) & json.loads(encode_manifest(manifest)).keys()
    assert read_manifest(encode_manifest(manifest)) == manifest


def test_the_fingerprint_ignores_the_file_the_time_and_the_figures():
    version = "20270101_000000"
    again = build_manifest(
        version=version,
        model_id=f"advanced_ml_{version}",
        file_name=f"advanced_ml_random_forest_{version}.skops",
        created_at="2027-01-01T00:00:00Z",
        sha256="ef" * 32,
        file_size=99,
        metrics={"roc_auc": 0.5},
        report={},
    )
    assert manifest_fingerprint(again) == manifest_fingerprint(build_manifest())


@pytest.mark.parametrize(
    "changes",
    [
        {"calibrator": {"method": "none"}},
        {"threshold": 0.50001},
        {"base_rate": 0.26},
        {"golden_outputs": [0.1, 0.9000000001]},
        {"golden_inputs": [[1.0, None], [0.25, -3.25]]},
        {"statistics": [{"impute": 0.5}, {"impute": 0.2}]},
        {"feature_set": [{"name": "a"}, {"name": "c"}]},
        {"library_versions": {"scikit-learn": "1.9.2"}},
        {"venn_abers": {"scores": [], "p0": [0.0], "p1": [1.0]}},
        {"abstain_below": 0.4},
        {"feature_weights": [0.5, 0.5]},
    ],
)
def test_the_fingerprint_changes_with_whatever_determines_predictions(changes):
    assert manifest_fingerprint(build_manifest(**changes)) != manifest_fingerprint(build_manifest())


def test_what_belongs_to_a_manifest_has_its_name():
    manifest = build_manifest_name("random_forest", VERSION)
    assert manifest == f"advanced_ml_random_forest_{VERSION}.manifest.json"
    assert build_signature_name(manifest) == f"advanced_ml_random_forest_{VERSION}.manifest.sig"
    assert build_card_name(manifest, "html") == f"advanced_ml_random_forest_{VERSION}.card.html"
    assert build_card_name(manifest, "markdown") == f"advanced_ml_random_forest_{VERSION}.card.md"


def test_names_lead_to_type_and_version_and_back():
    assert parse_stem(build_manifest_name("random_forest", VERSION).split(".")[0]) == (
        "random_forest",
        VERSION,
    )
    for name in (
        "advanced_ml_20260101_120000",
        "advanced_ml_x_2026_12",
        "x_y_20260101_120000",
        "",
        "advanced_ml_x_20260101_120000 ",
        f"advanced_ml_x_{ARABIC}",
    ):
        assert parse_stem(name) is None


@pytest.mark.parametrize(
    ("weights", "nothing"), [([0.0, 0.0], True), ([0.0, 1.0], False), (msgspec.UNSET, False)]
)
def test_a_model_has_learnt_nothing_if_none_of_its_features_is_worth_anything(weights, nothing):
    assert build_manifest(feature_weights=weights).learnt_nothing is nothing
