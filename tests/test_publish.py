"""Publishing: proved before it is written, and a reader sees the old state or the new one."""

import os
import resource
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sklearn.ensemble import ExtraTreesClassifier

from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_manifest import manifest_fingerprint
from app.ai.model_registry import ModelRegistry
from app.errors import ArtifactError
from app.training.publish import check_writable, publish_model, write_durably
from tests.model_files import (
    GOLDEN,
    LABELS,
    ROWS,
    V1,
    V2,
    describe,
    fitted,
    manifest_of,
    publish,
    read,
    signature_of,
)


@pytest.mark.parametrize("fmt", ["skops", "joblib"])
@pytest.mark.parametrize("model_type", ["random_forest", "gradient_boosting", "logistic_regression"])
def test_what_is_published_is_what_was_fitted(tmp_path, model_type, fmt):
    artifact = publish(tmp_path / "models", V1, model_type, fmt=fmt)
    manifest = read(artifact)
    assert sorted(path.name for path in artifact.parent.iterdir()) == sorted(
        [manifest.file_name, manifest_of(artifact).name]
    )
    assert manifest.file_size == artifact.stat().st_size
    assert manifest.format == fmt
    assert len(manifest.golden_outputs) == len(GOLDEN)
    assert [model.state for model in ModelCatalogue(artifact.parent).verify_models()] == ["verified"]


def test_files_are_readable_by_the_service_and_writable_by_nobody_else_whatever_the_umask(tmp_path):
    for version, mask in ((V1, 0o000), (V2, 0o077)):
        before = os.umask(mask)
        try:
            artifact = publish(tmp_path, version)
        finally:
            os.umask(before)
        assert artifact.stat().st_mode & 0o777 == 0o644
        assert manifest_of(artifact).stat().st_mode & 0o777 == 0o644


def test_a_version_is_never_published_over_another(tmp_path):
    artifact = publish(tmp_path, V1)
    before = artifact.read_bytes(), manifest_of(artifact).read_bytes()
    with pytest.raises(ArtifactError) as caught:
        publish(tmp_path, V1, seed=2)
    assert caught.value.reason == "already_published"
    assert (artifact.read_bytes(), manifest_of(artifact).read_bytes()) == before


@pytest.mark.parametrize("fmt", ["skops", "joblib"])
def test_a_model_the_registry_would_refuse_is_not_published(tmp_path, fmt):
    estimator = ExtraTreesClassifier(3).fit(ROWS, LABELS)
    with pytest.raises(ArtifactError) as caught:
        publish_model(tmp_path, estimator, describe(), fmt)
    assert caught.value.reason == "not_allowed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"calibrator": {"method": "none"}},
        {"statistics": [{}, {}, {}]},
        {"feature_set": [{}, {}, {}]},
        {"feature_set": [{**entry, "missing": "reject"} for entry in describe().feature_set]},
    ],
    ids=["calibrator", "statistics", "feature set", "golden rows that are rejected"],
)
def test_a_description_that_does_not_hold_is_not_published(tmp_path, changes):
    with pytest.raises(ArtifactError) as caught:
        publish_model(tmp_path, fitted("logistic_regression"), describe(**changes))
    assert caught.value.reason == "manifest_invalid"
    assert list(tmp_path.iterdir()) == []


def test_the_same_training_has_the_same_fingerprint_under_another_version(tmp_path):
    first, second = publish(tmp_path, V1), publish(tmp_path, V2, created_at="2026-02-01T12:00:00Z")
    other = publish(tmp_path / "other", V1, seed=2)
    assert manifest_fingerprint(read(first)) == manifest_fingerprint(read(second))
    assert manifest_fingerprint(read(first)) != manifest_fingerprint(read(other))


@contextmanager
def room_for(size):
    """No file of this process grows beyond this many bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_version_is_published_with_its_card_or_not_at_all(tmp_path):
    with (
        room_for(1_500_000),
        pytest.raises(ArtifactError, match="written: file too large") as caught,
    ):
        publish(tmp_path, V1, cards={"markdown": "#", "html": "x" * 2_000_000})
    assert caught.value.reason == "not_writable"
    assert list(tmp_path.iterdir()) == []
    publish(tmp_path, V1, cards={"markdown": "#", "html": "<p>"})
    catalogue = ModelCatalogue(tmp_path)
    assert [(model.state, model.has_card) for model in catalogue.list_models()] == [("verified", True)]
    assert (catalogue.read_card(V1, "html"), catalogue.read_card(V1, "markdown")) == (b"<p>", b"#")


def test_a_file_that_cannot_be_written_takes_those_before_it_along(tmp_path):
    artifact = tmp_path / f"advanced_ml_logistic_regression_{V1}.joblib"
    (signature_of(artifact) / "kept").mkdir(parents=True)  # in the way of the signature alone
    with pytest.raises(ArtifactError) as caught:
        publish(tmp_path, V1, signing_key=Ed25519PrivateKey.generate(), cards={"html": "<p>"})
    assert caught.value.reason == "not_writable"
    assert list(tmp_path.iterdir()) == [signature_of(artifact)]


def test_a_directory_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "models", Path("/proc/models")):
        for act in (check_writable, lambda path: write_durably(path / "x", b"x")):
            with pytest.raises(ArtifactError, match=r"cannot be written: [a-z ]+\.$") as caught:
                act(directory)
            assert caught.value.reason == "not_writable"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_who_write_one_file_at_once_leave_it_whole_and_nothing_else(tmp_path, monkeypatch):
    path, synced = tmp_path / "x", []

    def sync(descriptor, fsync=os.fsync):
        synced.append(descriptor)
        if len(synced) == 1:  # the first has written, and is not done
            write_durably(path, b"second")
            assert path.read_bytes() == b"second"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_durably(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_without_room_for_any_model_is_found_out_without_a_trace(tmp_path):
    with room_for(100_000), pytest.raises(ArtifactError, match="cannot be written"):
        check_writable(tmp_path / "models")
    check_writable(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


_STEPS = ("open", "os.chmod", "os.rename", "os.remove")


def _publish_and_die(directory, last_step, key):
    """Publishes V2 in a child process that ends before its n-th file operation; returns its exit status."""
    child = os.fork()
    if child == 0:
        steps = 0

        def count(event, _):
            nonlocal steps
            steps += event in _STEPS
            if steps == last_step:
                os._exit(9)

        sys.addaudithook(count)
        try:
            publish(directory, V2, seed=2, signing_key=key, cards={"markdown": "#", "html": "<p>"})
        except BaseException:  # noqa: BLE001  the child must not go on as a second test run
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("key", [None, Ed25519PrivateKey.generate()], ids=["unsigned", "signed"])
def test_a_publisher_killed_at_any_step_leaves_the_old_state_or_the_new_one(tmp_path, key):
    trusted = [key.public_key().public_bytes_raw()] if key else []
    fitted("logistic_regression", 2)
    served, step = [], 0
    while True:
        step += 1
        models = tmp_path / f"models{step}"
        publish(models, V1, signing_key=key)
        status = _publish_and_die(models, step, key)
        registry = ModelRegistry(ModelCatalogue(models, trusted_keys=trusted))
        served.append(registry.load().ref.version)
        assert served[-1] == V1 or registry.available()[0].has_card
        assert {model.state for model in registry.available()} <= {"active", "verified", "unverified"}
        registry.close()
        if status == 0:
            break
        assert status == 9
    assert step > 8
    assert served == sorted(served)
    assert served[0] == V1
    assert served[-1] == V2


def test_a_reader_never_sees_half_a_model(tmp_path):
    publish(tmp_path, V1)
    catalogue = ModelCatalogue(tmp_path)
    done, seen = threading.Event(), []

    def read_on():
        while not done.is_set():
            seen.extend((model.state, model.reason) for model in catalogue.list_models())

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        for month in range(1, 13):
            publish(tmp_path, f"2027{month:02}01_000000", "random_forest")
    finally:
        done.set()
        reader.join()
    assert {("verified", None)} <= set(seen) <= {("verified", None), ("unverified", "no_manifest")}


def test_golden_outputs_are_calibrated_probabilities_of_the_golden_inputs(tmp_path):
    manifest = read(publish(tmp_path, V1, "random_forest"))
    raw = fitted("random_forest").predict_proba(ROWS[:6])[:, 1]
    expected = np.clip(1 / (1 + np.exp(-(4 * raw - 2))), 0.01, 0.99)
    np.testing.assert_allclose(manifest.golden_outputs[:6], expected, rtol=0, atol=1e-12)
