"""The registry: one load however many wait, the last good model kept, nothing unverified deserialised."""

import asyncio
import dataclasses
import inspect
import os
import resource
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.ai import artifact_loading, model_registry
from app.ai.artifact_files import open_model_dir
from app.ai.artifact_loading import dump_estimator
from app.ai.calibration import Calibrator
from app.ai.feature_safety import FeatureStatistics
from app.ai.model_bundle import load_bundle, self_test
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_manifest import MANIFEST_SUFFIX, ModelManifest, encode_manifest, seal_manifest
from app.ai.model_registry import ModelRegistry
from app.ai.served_versions import ServedVersions
from app.errors import ArtifactError, ModelNotReadyError
from tests.model_files import (
    FEATURES,
    GOLDEN,
    V1,
    V2,
    V3,
    FakeClock,
    fitted,
    forge,
    manifest_of,
    publish,
    read,
    republish_as,
)

CATALOGUE_OPTIONS = {"pattern", "incompatible", "trusted_keys", "load"}


@pytest.fixture
def models(tmp_path):
    directory = tmp_path / "models"
    directory.mkdir()
    return directory


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def reports():
    return []


@pytest.fixture
def open_registry(models, clock, reports):
    opened = []

    def build(**options):
        catalogue = ModelCatalogue(
            models, **{name: options.pop(name) for name in CATALOGUE_OPTIONS & options.keys()}
        )
        registry = ModelRegistry(catalogue, monotonic=clock, **{"on_load": reports.append, **options})
        opened.append(registry)
        return registry

    yield build
    for registry in opened:
        registry.close()


@contextmanager
def deserialisations():
    """Counts calls of the function that deserialises, on this thread."""
    calls = []
    target = artifact_loading.load_estimator.__code__

    def watch(frame, event, _):
        if event == "call" and frame.f_code is target:
            calls.append(frame)

    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@contextmanager
def files_opened():
    """Collects the names of the files this process opens."""
    names = []
    _openings.append(names)
    try:
        yield names
    finally:
        _openings.remove(names)


_openings = []


def _listen(event, args):
    if event == "open" and _openings and isinstance(args[0], str):
        for names in _openings:
            names.append(args[0])


sys.addaudithook(_listen)  # an audit hook cannot be removed: without a listener it does nothing


async def background_look(registry):
    """Waits until the look that is under way has ended."""
    await asyncio.wrap_future(registry._look)


# Which model serves


def test_the_newest_version_serves(models, open_registry):
    publish(models, V1)
    publish(models, V3, "random_forest", fmt="skops")
    publish(models, V2)
    bundle = open_registry().load()
    assert bundle.ref.version == V3
    assert bundle.ref.model_id == f"advanced_ml_{V3}"
    assert bundle.manifest.model_type == "random_forest"


@pytest.mark.parametrize("fmt", ["skops", "joblib"])
@pytest.mark.parametrize("model_type", ["random_forest", "gradient_boosting", "logistic_regression"])
def test_a_loaded_model_scores_what_the_fitted_one_scored(models, open_registry, model_type, fmt):
    publish(models, V1, model_type, fmt=fmt)
    bundle = open_registry().load()
    rows = np.random.default_rng(2).normal(size=(50, 3))
    expected = fitted(model_type).predict_proba(rows)[:, 1]
    np.testing.assert_allclose(bundle.scorer(rows), expected, rtol=0, atol=5e-16)
    assert bundle.input_columns == FEATURES.input_columns
    assert bundle.feature_set.fingerprint == FEATURES.fingerprint


def test_a_pinned_version_serves_instead_of_the_newest(models, open_registry):
    publish(models, V1)
    publish(models, V2)
    assert open_registry(pinned_version=V1).load().ref.version == V1


def test_nothing_stands_in_for_a_pinned_version(models, open_registry):
    publish(models, V1)
    artifact = publish(models, V2)
    artifact.write_bytes(b"broken")
    for version in (V2, V3):
        with pytest.raises(ModelNotReadyError):
            open_registry(pinned_version=version).load()


def test_only_files_that_match_the_pattern_are_candidates(models, open_registry):
    publish(models, V1, "logistic_regression")
    publish(models, V2, "random_forest")
    assert open_registry(pattern="advanced_ml_logistic_*").load().ref.version == V1


async def test_a_manifest_that_is_not_text_is_refused_and_listed_as_such(models, open_registry):
    publish(models, V1)
    damaged = manifest_of(publish(models, V2))
    damaged.write_bytes(damaged.read_bytes().replace(b'"made_up"', b'"\xff"'))
    registry = open_registry()
    assert registry.load().ref.version == V1
    assert registry.status().reason == "manifest_invalid"
    assert [(model.version, model.state, model.reason) for model in registry.available()] == [
        (V2, "refused", "manifest_invalid"),
        (V1, "active", None),
    ]


def test_other_files_in_the_directory_are_no_concern_of_ours(models, open_registry):
    publish(models, V1)
    for name in (
        "README.md",
        "advanced_ml_x.pkl",
        ".advanced_ml_logistic_regression_20270101_000000.joblib.1.tmp",
    ):
        (models / name).write_text("text")
    (models / "advanced_ml_random_forest_20270101_000000.card.md").write_text("text")
    registry = open_registry()
    assert registry.load().ref.version == V1
    assert [model.version for model in registry.available()] == [V1]


# What is refused, and that nothing of it is deserialised


def flip(position):
    def damage(artifact):
        data = bytearray(artifact.read_bytes())
        data[position if position >= 0 else len(data) + position] ^= 1
        artifact.write_bytes(bytes(data))

    return damage


def edit(**changes):
    """Changes the manifest without sealing it again."""

    def damage(artifact):
        changed = msgspec.structs.replace(read(artifact), **changes)
        manifest_of(artifact).write_bytes(encode_manifest(changed))

    return damage


def forged(**changes):
    return lambda artifact: forge(artifact, **changes)


def raw_edit(old, new):
    def damage(artifact):
        path = manifest_of(artifact)
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))

    return damage


def as_symlink(artifact):
    real = artifact.with_name("real")
    artifact.rename(real)
    artifact.symlink_to(real.name)


def as_hard_link(artifact):
    os.link(artifact, artifact.with_name("second_name"))


def as_fifo(artifact):
    artifact.unlink()
    os.mkfifo(artifact)


def as_directory(artifact):
    artifact.unlink()
    artifact.mkdir()


def as_device(artifact):
    artifact.unlink()
    artifact.symlink_to("/dev/zero")


def for_the_manifest(damage):
    return lambda artifact: damage(manifest_of(artifact))


def of_another_model(artifact):
    artifact.write_bytes(dump_estimator(fitted("logistic_regression", 5), "joblib"))


def of_the_same_length(artifact):
    artifact.write_bytes(bytes(artifact.stat().st_size))


def moved_to_another_name(artifact):
    republish_as(artifact, V3)
    for path in (artifact, manifest_of(artifact)):
        path.unlink()
        path.with_name(path.name.replace(V2, V3)).rename(path)


DAMAGE = {
    "first bit": (flip(0), "digest_mismatch"),
    "a bit in the middle": (flip(400), "digest_mismatch"),
    "last bit": (flip(-1), "digest_mismatch"),
    "truncated": (lambda artifact: os.truncate(artifact, 500), "size_mismatch"),
    "one byte short": (lambda artifact: os.truncate(artifact, artifact.stat().st_size - 1), "size_mismatch"),
    "zero length": (lambda artifact: os.truncate(artifact, 0), "size_mismatch"),
    "one byte more": (lambda artifact: artifact.write_bytes(artifact.read_bytes() + b"."), "size_mismatch"),
    "another model": (of_another_model, "digest_mismatch"),
    "zeros": (of_the_same_length, "digest_mismatch"),
    "missing": (Path.unlink, "missing"),
    "symbolic link": (as_symlink, "not_regular"),
    "hard link": (as_hard_link, "hard_linked"),
    "FIFO": (as_fifo, "not_regular"),
    "directory": (as_directory, "not_regular"),
    "device": (as_device, "not_regular"),
    "writable by everybody": (lambda artifact: artifact.chmod(0o666), "writable_by_others"),
    "manifest: size": (edit(file_size=1), "manifest_changed"),
    "manifest: digest": (edit(sha256="0" * 64), "manifest_changed"),
    "manifest: versions": (edit(library_versions={"numpy": "1.0"}), "manifest_changed"),
    "manifest: golden outputs": (edit(golden_outputs=[0.5] * len(GOLDEN)), "manifest_changed"),
    "manifest: golden inputs": (edit(golden_inputs=[[0.0] * 3] * len(GOLDEN)), "manifest_changed"),
    "manifest: calibrator": (raw_edit(b'"slope":4.0', b'"slope":4.1'), "manifest_changed"),
    "manifest: threshold": (edit(threshold=0.1), "manifest_changed"),
    "manifest: metrics": (edit(metrics={"roc_auc": 0.99}), "manifest_changed"),
    "manifest: feature set": (raw_edit(b'"transform":"value"', b'"transform":"log1p"'), "manifest_changed"),
    "manifest: truncated": (for_the_manifest(lambda path: os.truncate(path, 900)), "manifest_invalid"),
    "manifest: empty": (for_the_manifest(lambda path: os.truncate(path, 0)), "manifest_invalid"),
    "manifest: symbolic link": (for_the_manifest(as_symlink), "not_regular"),
    "manifest: hard link": (for_the_manifest(as_hard_link), "hard_linked"),
    "manifest: FIFO": (for_the_manifest(as_fifo), "not_regular"),
    "manifest: directory": (for_the_manifest(as_directory), "not_regular"),
    "manifest: writable by everybody": (
        for_the_manifest(lambda path: path.chmod(0o646)), "writable_by_others"),
    "manifest: .. in the file name": (
        raw_edit(b'"advanced_ml_log', b'"../advanced_ml_log'), "manifest_invalid"),
    "manifest: of another version": (moved_to_another_name, "manifest_misnamed"),
    "sealed: wrong scikit-learn": (
        lambda artifact: forge(artifact, library_versions={
            **read(artifact).library_versions, "scikit-learn": "1.9.0"}), "library_mismatch"),
    "sealed: no versions": (forged(library_versions={}), "library_mismatch"),
    "sealed: feature fingerprint": (forged(feature_fingerprint="0" * 64), "manifest_invalid"),
    "sealed: calibrator of no kind": (forged(calibrator={"method": "magic"}), "manifest_invalid"),
    "sealed: intervals upside down": (
        forged(venn_abers={"scores": [], "p0": [1.0], "p1": [0.0]}),
        "manifest_invalid",
    ),
    "sealed: digest": (forged(sha256="0" * 64), "digest_mismatch"),
    "sealed: size": (forged(file_size=100), "size_mismatch"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_artifact_is_refused_before_anything_is_deserialised(models, name):
    damage, reason = DAMAGE[name]
    damage(publish(models, V2))
    catalogue = ModelCatalogue(models)
    (artifact,) = (found for found in catalogue.find() if found.version == V2)
    with deserialisations() as calls, pytest.raises(ArtifactError) as caught:
        catalogue.load(artifact)
    assert caught.value.reason == reason
    assert calls == []


def test_the_counter_of_deserialisations_counts(models):
    publish(models, V2)
    catalogue = ModelCatalogue(models)
    with deserialisations() as calls:
        catalogue.load(catalogue.find()[0])
    assert len(calls) == 1


@pytest.mark.parametrize("name", DAMAGE)
def test_the_last_good_model_serves_on_whatever_happens_to_a_newer_one(
    models, name, open_registry, clock, reports
):
    damage, reason = DAMAGE[name]
    publish(models, V1)
    registry = open_registry()
    good = registry.load()
    damage(publish(models, V2, seed=2))
    assert registry.load() is good
    assert [(report.version, report.reason) for report in reports[1:]] == [(V2, reason)]
    assert registry.status().reason == reason
    assert registry.status().cache_status == "hit"


@pytest.mark.parametrize("name", DAMAGE)
def test_the_model_in_memory_serves_on_when_its_own_file_goes_bad(models, name, open_registry):
    publish(models, V1)
    artifact = publish(models, V2)
    registry = open_registry()
    good = registry.load()
    DAMAGE[name][0](artifact)
    assert registry.load() is good
    # A process that starts now, and remembers of no version that it served, falls back and says why.
    fresh = open_registry()
    assert fresh.load().ref.version == V1
    assert fresh.status().reason == DAMAGE[name][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"golden_outputs": [0.5] * len(GOLDEN)},
        {"calibrator": Calibrator("sigmoid", {"slope": 4.0, "intercept": -2.0001}, 0.01, 0.99).to_json()},
        {"calibrator": Calibrator("none", {}).to_json()},
        {"golden_inputs": [[0.0, 0.0, 0.0], *GOLDEN[1:]]},
        {"statistics": [FeatureStatistics(0.1, -1.0, 1.0, 0.0, 1.0, 1.0, (), (0, 400)).to_json()] * 3},
    ],
)  # fmt: skip
def test_a_sealed_manifest_that_changes_predictions_fails_the_golden_test(
    models, changes, open_registry, reports
):
    publish(models, V1)
    registry = open_registry()
    good = registry.load()
    forge(publish(models, V2), **changes)
    assert registry.load() is good
    assert reports[-1].reason == "golden_mismatch"


@pytest.mark.parametrize("fmt", ["skops", "joblib"])
def test_another_model_behind_a_correct_digest_fails_the_golden_test(models, fmt, open_registry, reports):
    publish(models, V1)
    registry = open_registry()
    good = registry.load()
    forge(publish(models, V2, fmt=fmt), data=dump_estimator(fitted("logistic_regression", 3), fmt))
    assert registry.load() is good
    assert reports[-1].reason == "golden_mismatch"


def test_a_hostile_pickle_behind_a_correct_digest_runs_nothing_and_the_last_good_model_serves_on(
    models, open_registry, reports, tmp_path
):
    publish(models, V1)
    registry = open_registry()
    good = registry.load()
    mark = tmp_path / "mark"
    forge(publish(models, V2), data=b"\x80\x02cposix\nsystem\nX" + len(f"touch {mark}").to_bytes(4, "little")
          + f"touch {mark}".encode() + b"\x85R.")  # fmt: skip
    assert registry.load() is good
    assert reports[-1].reason == "not_allowed"
    assert not mark.exists()


def test_a_model_that_is_no_classifier_is_refused(models, open_registry, reports):
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit([[1.0], [2.0]])
    forge(publish(models, V1), data=dump_estimator(scaler, "joblib"))
    with pytest.raises(ModelNotReadyError):
        open_registry().load()
    assert reports[-1].reason == "not_a_classifier"


def test_two_thousand_mutated_artifacts_never_reach_the_deserialiser(models):
    artifact = publish(models, V1)
    honest = artifact.read_bytes()
    catalogue = ModelCatalogue(models)
    (found,) = catalogue.find()
    rng = np.random.default_rng(6)
    positions, masks = rng.integers(0, len(honest), 2_000), rng.integers(1, 256, 2_000)
    refused = 0
    with deserialisations() as calls:
        for position, mask in zip(positions.tolist(), masks.tolist(), strict=True):
            data = bytearray(honest)
            data[position] ^= mask
            artifact.write_bytes(bytes(data))
            with pytest.raises(ArtifactError, match="SHA-256"):
                catalogue._load(found)
            refused += 1
    assert refused == 2_000
    assert calls == []


def test_a_file_that_changes_while_it_is_read_is_loaded_as_verified_or_not_at_all(models):
    artifact = publish(models, V1)
    good = artifact.read_bytes()
    other = dump_estimator(fitted("logistic_regression", 3), "joblib")
    other += bytes(len(good) - len(other)) if len(other) < len(good) else b""
    stop = threading.Event()

    def race():
        turn = 0
        while not stop.is_set():
            spare = models / f"spare{turn % 2}"
            spare.write_bytes((good, other)[turn % 2][: len(good)])
            spare.rename(artifact)
            turn += 1

    racer = threading.Thread(target=race)
    catalogue = ModelCatalogue(models)
    outcomes = []
    deadline = time.monotonic() + 20
    racer.start()
    try:
        while (
            min(outcomes.count("loaded"), outcomes.count("digest_mismatch")) < 50
            and time.monotonic() < deadline
        ):
            try:
                catalogue._load(catalogue.find()[0])
                outcomes.append("loaded")
            except ArtifactError as exc:
                outcomes.append(exc.reason)
    finally:
        stop.set()
        racer.join()
    # Never the golden test: whatever was deserialised had the verified digest.
    assert set(outcomes) <= {"loaded", "digest_mismatch", "missing"}
    assert min(outcomes.count("loaded"), outcomes.count("digest_mismatch")) >= 50


# Waiting, looking again, backing off


async def test_five_hundred_requests_that_find_no_model_share_one_load(models, open_registry, reports):
    publish(models, V1)
    registry = open_registry()
    bundles = await asyncio.gather(*(registry.active() for _ in range(500)))
    assert len({id(bundle) for bundle in bundles}) == 1
    assert len(reports) == 1


async def test_five_hundred_requests_past_the_ttl_start_one_look_and_wait_for_none(
    models, open_registry, clock, reports
):
    publish(models, V1)
    gate, looks = threading.Event(), []

    def slow_to_say(manifest: ModelManifest) -> None:
        looks.append(manifest.version)
        if manifest.version == V2:
            assert gate.wait(30)

    registry = open_registry(incompatible=slow_to_say, ttl_seconds=60)
    old = registry.load()
    publish(models, V2, seed=2)
    clock.now += 60
    try:
        bundles = await asyncio.gather(*(registry.active() for _ in range(500)))
        assert all(bundle is old for bundle in bundles)
        assert registry.status().cache_status == "expired"
    finally:
        gate.set()
    await background_look(registry)
    assert looks == [V1, V2]
    assert (await registry.active()).ref.version == V2
    assert registry.status().cache_status == "hit"
    assert [report.version for report in reports] == [V1, V2]


async def test_within_the_ttl_the_disk_is_left_alone(models, open_registry, clock):
    publish(models, V1)
    registry = open_registry(ttl_seconds=60)
    old = registry.load()
    publish(models, V2)
    clock.now += 59.9
    with files_opened() as names:
        assert await registry.active() is old
    assert registry._look.done()
    assert [name for name in names if "advanced_ml" in name] == []


def test_a_model_expires_when_its_time_is_up_an_hour_unless_told_otherwise(models, open_registry, clock):
    publish(models, V1)
    for options, seconds in (({"ttl_seconds": 60}, 60), ({}, 3600)):
        registry = open_registry(**options)
        registry.load()
        clock.now += seconds - 0.5
        assert registry.status().cache_status == "hit"
        clock.now += 0.5
        assert registry.status().cache_status == "expired"


async def test_with_nothing_to_load_the_next_attempt_is_due_in_five_seconds_unless_told_otherwise(
    open_registry, clock
):
    registry = open_registry()
    with pytest.raises(ModelNotReadyError) as caught:
        await registry.active()
    assert caught.value.retry_after == 5
    clock.now += 4.75
    with pytest.raises(ModelNotReadyError) as caught:
        await registry.active()
    assert caught.value.retry_after == 1


def test_a_closed_registry_leaves_no_thread_behind(models, open_registry):
    publish(models, V1)
    before = set(threading.enumerate())
    registry = open_registry()
    registry.load()
    assert set(threading.enumerate()) - before
    registry.close()
    assert not set(threading.enumerate()) - before


async def test_a_closed_registry_without_a_model_says_to_come_back_late(open_registry):
    registry = open_registry(retry_seconds=5)
    registry.close()
    with pytest.raises(ModelNotReadyError) as caught:
        await registry.active()
    assert caught.value.retry_after == 31


async def test_a_new_version_is_picked_up_after_the_ttl(models, open_registry, clock):
    publish(models, V1)
    registry = open_registry(ttl_seconds=60)
    registry.load()
    publish(models, V2)
    clock.now += 60
    await registry.active()
    await background_look(registry)
    assert (await registry.active()).ref.version == V2


async def test_a_request_keeps_the_bundle_it_began_with_while_another_is_swapped_in(models, open_registry):
    publish(models, V1, "random_forest")
    registry = open_registry()
    held = await registry.active()
    before = held.scorer(np.zeros((1, 3)))
    publish(models, V2, "random_forest", seed=9)
    assert registry.load() is not held
    assert held.ref.version == V1
    np.testing.assert_array_equal(held.scorer(np.zeros((1, 3))), before)


async def test_with_nothing_to_load_attempts_back_off_and_say_when_the_next_one_is(
    models, open_registry, clock
):
    registry = open_registry(retry_seconds=5)
    attempts = []
    for _ in range(300):
        before = registry._look
        with pytest.raises(ModelNotReadyError) as caught:
            await registry.active()
        assert 1 <= caught.value.retry_after <= 30
        if registry._look is not before:
            attempts.append(clock.now - 1000)
        clock.now += 1
    assert attempts == [0, 5, 15, 35, 65, 95, 125, 155, 185, 215, 245, 275]


async def test_five_hundred_requests_share_one_failing_attempt(models, open_registry, reports):
    publish(models, V1).write_bytes(b"broken")
    registry = open_registry()
    answers = await asyncio.gather(*(registry.active() for _ in range(500)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {ModelNotReadyError}
    assert len(reports) == 1


async def test_a_good_artifact_that_appears_later_is_picked_up(models, open_registry, clock):
    registry = open_registry(retry_seconds=5)
    assert registry.status().cache_status == "miss"
    with pytest.raises(ModelNotReadyError):
        await registry.active()
    assert registry.status().cache_status == "error"
    assert registry.status().reason == "no_artifact"
    publish(models, V1)
    with pytest.raises(ModelNotReadyError):
        await registry.active()
    clock.now += 5
    assert (await registry.active()).ref.version == V1
    assert registry.status().reason is None


async def test_a_directory_that_appears_later_is_picked_up(models, open_registry, clock):
    models.rmdir()
    registry = open_registry()
    with pytest.raises(ModelNotReadyError):
        await registry.active()
    assert registry.status().reason == "no_directory"
    assert registry.available() == []
    publish(models, V1)
    clock.now += 5
    assert (await registry.active()).ref.version == V1


async def test_an_artifact_that_is_repaired_is_picked_up(models, open_registry, clock):
    artifact = publish(models, V1)
    honest = artifact.read_bytes()
    artifact.write_bytes(b"broken")
    registry = open_registry()
    with pytest.raises(ModelNotReadyError):
        await registry.active()
    artifact.write_bytes(honest)
    clock.now += 5
    assert (await registry.active()).ref.version == V1


async def test_a_caller_that_gives_up_does_not_take_the_others_with_it(models, open_registry, reports):
    publish(models, V1)
    gate = threading.Event()
    registry = open_registry(incompatible=lambda _: None if gate.wait(30) else "too late")
    callers = [asyncio.create_task(registry.active()) for _ in range(10)]
    await asyncio.sleep(0)
    for caller in callers[:5]:
        caller.cancel()
    await asyncio.gather(*callers[:5], return_exceptions=True)
    gate.set()
    bundles = await asyncio.gather(*callers[5:])
    assert {bundle.ref.version for bundle in bundles} == {V1}
    assert len(reports) == 1


async def test_nobody_waits_for_a_disk_that_hangs_and_what_it_loads_in_the_end_serves(models, open_registry):
    assert inspect.signature(ModelRegistry).parameters["longest_wait_seconds"].default == 1.0
    publish(models, V1)
    gate = threading.Event()
    registry = open_registry(
        longest_wait_seconds=0.05, incompatible=lambda _: None if gate.wait(30) else "too late"
    )
    try:
        with pytest.raises(ModelNotReadyError) as refused:
            async with asyncio.timeout(10):  # long before the gate opens by itself
                await registry.active()
        assert refused.value.retry_after >= 1
    finally:
        gate.set()
    await background_look(registry)
    assert (await registry.active()).ref.version == V1


def test_a_load_at_start_and_requests_from_another_loop_share_one_load(models, open_registry, reports):
    publish(models, V1)
    registry = open_registry()
    threads = [threading.Thread(target=registry.load) for _ in range(8)]
    threads += [threading.Thread(target=lambda: asyncio.run(registry.active())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 1


async def test_a_bad_file_is_read_once_and_not_on_every_look(models, open_registry, clock, reports):
    publish(models, V1)
    bad = publish(models, V2)
    flip(100)(bad)
    registry = open_registry(ttl_seconds=60)
    with files_opened() as names:
        registry.load()
        for _ in range(20):
            clock.now += 60
            await registry.active()
            await background_look(registry)
            registry.available()
    assert names.count(bad.name) == 1
    assert [report.version for report in reports] == [V2, V1]


def test_what_may_pass_by_itself_is_not_held_against_an_artifact(models, open_registry):
    """A process out of descriptors cannot read the file; once it has some, the very same file loads."""
    publish(models, V1)
    catalogue = ModelCatalogue(models)
    (artifact,) = catalogue.find()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_model_dir(models) as descriptor:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor + 1, hard))
        try:
            with pytest.raises(ArtifactError):
                catalogue.load(artifact)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert catalogue.load(artifact).ref.version == V1


async def test_a_closed_registry_serves_on_and_never_looks_again(models, open_registry, clock):
    publish(models, V1)
    registry = open_registry(ttl_seconds=60)
    bundle = registry.load()
    registry.close()
    clock.now += 1000
    assert await registry.active() is bundle


async def test_closing_does_not_wait_for_a_disk_that_hangs(monkeypatch):
    back = threading.Event()

    class Hanging:
        def find(self):
            back.wait(5)
            return []

    monkeypatch.setattr(model_registry, "CLOSE_SECONDS", 0.01)
    registry = ModelRegistry(Hanging(), longest_wait_seconds=0)
    with pytest.raises(ModelNotReadyError):
        await registry.active()
    registry.close()
    assert not registry._look.done()
    back.set()
    await background_look(registry)


async def test_closing_breaks_off_a_load_without_a_word_against_the_artifact(models, open_registry, reports):
    began, broken_off, tried = threading.Event(), threading.Event(), []

    def load(manifest, _):
        tried.append(manifest.version)
        began.set()
        broken_off.wait(5)
        raise ArtifactError("not_loadable", "The process that read the artifact ended.")

    publish(models, V1)
    publish(models, V2)
    registry = open_registry(load=load, interrupt=broken_off.set, longest_wait_seconds=0)
    with pytest.raises(ModelNotReadyError):
        await registry.active()
    assert await asyncio.to_thread(began.wait, 5)
    registry.close()
    assert broken_off.is_set()
    await background_look(registry)
    assert (tried, reports) == ([V2], [])


# Going back


def remove(artifact):
    manifest_of(artifact).unlink()
    artifact.unlink()


def test_removing_the_newest_artifact_does_not_go_back_to_the_one_before(models, open_registry, reports):
    for version in ("20250101_120000", V1):
        publish(models, version)
    artifact = publish(models, V2)
    registry = open_registry()
    good = registry.load()
    remove(artifact)
    for _ in range(3):
        assert registry.load() is good
    assert registry.status().reason == "rollback_refused"
    assert [(report.version, report.reason) for report in reports] == [(V2, None), (V1, "rollback_refused")]


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (remove, "rollback_refused"),
        (lambda artifact: manifest_of(artifact).unlink(), "rollback_refused"),
        (lambda artifact: os.truncate(artifact, 10), "size_mismatch"),
    ],
    ids=["gone", "manifest gone", "truncated"],
)
def test_after_a_restart_a_model_that_is_gone_or_broken_does_not_let_an_older_one_serve(
    models, tmp_path, open_registry, break_it, reason
):
    publish(models, V1)
    artifact = publish(models, V2)
    served = ServedVersions(tmp_path / "var")
    open_registry(served=served).load()
    break_it(artifact)
    restarted = open_registry(served=ServedVersions(tmp_path / "var"))
    with pytest.raises(ModelNotReadyError):
        restarted.load()
    assert restarted.status().reason == reason


def test_a_pin_goes_back_and_without_it_only_the_newest_or_a_newer_one_serves(
    models, tmp_path, open_registry
):
    served = ServedVersions(tmp_path)
    publish(models, V1)
    artifact = publish(models, V2)
    assert open_registry(served=served).load().ref.version == V2
    assert open_registry(served=served, pinned_version=V1).load().ref.version == V1
    assert open_registry(served=served).load().ref.version == V2
    remove(artifact)
    with pytest.raises(ModelNotReadyError):
        open_registry(served=served).load()
    publish(models, V3)
    assert open_registry(served=served).load().ref.version == V3
    assert served.highest() == V3


def test_between_a_broken_newest_model_and_the_one_that_serves_another_one_is_found(models, open_registry):
    publish(models, V1)
    registry = open_registry()
    registry.load()
    publish(models, V2)
    publish(models, V3).write_bytes(b"broken")
    assert registry.load().ref.version == V2


def test_an_older_model_still_stands_in_for_a_newer_one_that_never_served(models, tmp_path, open_registry):
    publish(models, V1)
    flip(100)(publish(models, V2))
    served = ServedVersions(tmp_path)
    registry = open_registry(served=served)
    assert registry.load().ref.version == V1
    assert registry.status().reason == "digest_mismatch"
    assert served.highest() == V1


def test_a_model_of_another_type_may_replace_one_of_the_same_version(models, tmp_path, open_registry):
    artifact = publish(models, V1, "random_forest")
    served = ServedVersions(tmp_path)
    open_registry(served=served).load()
    publish(models, V1, "logistic_regression")
    remove(artifact)
    assert open_registry(served=served).load().manifest.model_type == "logistic_regression"


def test_a_version_that_cannot_be_recorded_does_not_replace_what_serves(models, tmp_path, open_registry):
    publish(models, V1)
    served = ServedVersions(tmp_path)
    registry = open_registry(served=served)
    good = registry.load()
    publish(models, V2)
    # A file in the directory's place: what a full or read-only disk is to root as well.
    records = tmp_path / "served_models"
    records.rename(tmp_path / "aside")
    records.touch()
    assert registry.load() is good
    assert registry.status().reason == "served_unknown"
    with pytest.raises(ModelNotReadyError):
        open_registry(served=served).load()
    records.unlink()
    (tmp_path / "aside").rename(records)
    assert registry.load().ref.version == V2


def test_recording_fails_where_there_is_no_room_for_the_record(tmp_path):
    (tmp_path / "var").touch()
    with pytest.raises(ArtifactError) as caught:
        ServedVersions(tmp_path / "var").record(V1)
    assert caught.value.reason == "served_unknown"


def test_only_names_of_versions_count_as_served(tmp_path):
    served = ServedVersions(tmp_path)
    assert served.highest() == ""
    served.record(V1)
    served.record(V1)
    (tmp_path / "served_models" / "zzz").touch()
    for name in (f"{V3}x", f"\u0662{V3[1:]}"):
        (tmp_path / "served_models" / name).touch()
    assert served.highest() == V1


def test_a_manifest_whose_version_has_other_digits_is_no_model(models, open_registry, reports):
    artifact = publish(models, V1)
    manifest = artifact.with_suffix(MANIFEST_SUFFIX)
    (models / manifest.name.replace(V1, f"\u0662{V1[1:]}")).write_bytes(manifest.read_bytes())
    registry = open_registry()
    assert registry.load().ref.version == V1
    assert [report.version for report in reports] == [V1]


def test_removing_every_artifact_leaves_the_model_in_memory_serving(models, open_registry):
    artifact = publish(models, V1)
    registry = open_registry()
    good = registry.load()
    manifest_of(artifact).unlink()
    artifact.unlink()
    assert registry.load() is good
    assert registry.status().reason == "no_artifact"


def test_whether_the_newest_model_is_refused_is_told_after_every_look(models, open_registry):
    def told():
        names = ("leadscore_model_ready", "leadscore_newest_model_refused")
        return tuple(REGISTRY.get_sample_value(name) for name in names)

    registry = open_registry()
    with pytest.raises(ModelNotReadyError):
        registry.load()
    assert told() == (0, 1)
    publish(models, V1)
    registry.load()
    assert told() == (1, 0)
    refused = publish(models, V2)
    refused.write_bytes(b"damaged")
    for _ in range(2):  # not only when it is news
        registry.load()
        assert told() == (1, 1)
    manifest_of(refused).unlink()
    refused.unlink()
    registry.load()
    assert told() == (1, 0)


# What cannot serve here, and what listeners do


def test_a_model_the_lead_source_cannot_feed_is_passed_over_until_it_can(models, open_registry, reports):
    publish(models, V1)
    publish(models, V2)
    missing = {"c"}

    def incompatible(manifest):
        return "the column c is not there" if manifest.version == V2 and missing else None

    registry = open_registry(incompatible=incompatible)
    assert registry.load().ref.version == V1
    assert registry.status().reason == "incompatible"
    assert [(model.version, model.state, model.reason) for model in registry.available()] == [
        (V2, "incompatible", "the column c is not there"),
        (V1, "active", None),
    ]
    registry.load()
    assert len(reports) == 2
    missing.clear()
    assert registry.load().ref.version == V2


@pytest.mark.parametrize("suits", [True, False], ids=["suits", "does not suit"])
async def test_a_model_taken_while_the_source_is_unknown_serves_only_if_it_suits_once_it_is_known(
    models, tmp_path, open_registry, clock, suits
):
    known = set()
    options = {
        "incompatible": lambda manifest: (
            "the column c is not there" if known and not suits and manifest.version == V2 else None
        ),
        "source_is_known": lambda: bool(known),
        "served": ServedVersions(tmp_path),
    }
    publish(models, V1)
    known.add("a")
    open_registry(**options).load()
    known.clear()  # the database is away when the service starts again, with a newer model
    publish(models, V2)
    registry = open_registry(**options)
    assert registry.load().ref.version == V2
    assert options["served"].highest() == V1
    with deserialisations() as calls:
        assert registry.load().ref.version == V2
    assert not calls
    known.add("a")
    clock.now += 5
    await registry.active()
    assert registry.load().ref.version == (V2 if suits else V1)
    assert options["served"].highest() == (V2 if suits else V1)
    assert registry.status().reason == (None if suits else "incompatible")
    assert open_registry(**options).load().ref.version == (V2 if suits else V1)


def test_a_model_taken_unseen_does_not_serve_on_where_nothing_suits(models, open_registry):
    known = set()
    registry = open_registry(
        incompatible=lambda _: "the column c is not there" if known else None,
        source_is_known=lambda: bool(known),
    )
    publish(models, V1)
    registry.load()
    known.add("a")
    with pytest.raises(ModelNotReadyError):
        registry.load()
    assert REGISTRY.get_sample_value("leadscore_model_ready") == 0


def test_a_failing_listener_costs_the_service_nothing(models, open_registry):
    publish(models, V1)
    publish(models, V2).write_bytes(b"broken")

    def fail(report):
        raise RuntimeError("telemetry is down")

    with capture_logs() as lines:
        assert open_registry(on_load=fail).load().ref.version == V1
    told = ["model_refused", "model_report_failed", "model_loaded", "model_report_failed"]
    assert [line["event"] for line in lines] == told


async def test_a_failing_compatibility_test_is_survived_and_tried_again(models, open_registry, clock):
    publish(models, V1)
    answers = iter([RuntimeError("database is down"), None])

    def incompatible(_):
        answer = next(answers)
        if answer:
            raise answer

    registry = open_registry(incompatible=incompatible)
    with pytest.raises(ModelNotReadyError):
        registry.load()
    assert registry.status().reason == "internal_error"
    clock.now += 5
    assert (await registry.active()).ref.version == V1


def test_a_defect_met_in_the_newest_artifact_does_not_keep_the_next_one_from_serving(
    models, open_registry, reports
):
    publish(models, V1)
    publish(models, V2)

    def incompatible(manifest):
        if manifest.version == V2:
            raise ZeroDivisionError

    with capture_logs() as lines:
        assert open_registry(incompatible=incompatible).load().ref.version == V1
    assert [report.reason for report in reports] == ["internal_error", None]
    assert [line["event"] for line in lines] == ["model_load_failed", "model_refused", "model_loaded"]


def test_a_report_says_what_was_loaded_and_how_long_it_took(models, open_registry, reports, clock):
    def take_a_quarter_of_a_second(_):
        clock.now += 0.25

    publish(models, V1)
    with capture_logs() as lines:
        bundle = open_registry(incompatible=take_a_quarter_of_a_second).load()
    assert [(line["event"], line["version"]) for line in lines] == [("model_loaded", V1)]
    (report,) = reports
    assert (report.version, report.model_type, report.reason) == (V1, "logistic_regression", None)
    assert report.bundle is bundle
    assert report.duration_ms == 250


def test_a_look_that_fails_in_a_way_nobody_foresaw_leaves_the_model_serving(models, reports):
    class Failing(ModelCatalogue):
        failing = False

        def find(self):
            if self.failing:
                raise OSError("the disk is gone")
            return super().find()

    publish(models, V1)
    catalogue = Failing(models)
    registry = ModelRegistry(catalogue)
    good = registry.load()
    catalogue.failing = True
    with capture_logs() as lines:
        assert registry.load() is good
    assert [line["event"] for line in lines] == ["model_look_failed"]
    assert registry.status().reason == "internal_error"
    registry.close()


# What is said about it


def test_the_card_of_a_version_is_that_of_the_model_that_serves(models, open_registry):
    for model_type in ("random_forest", "logistic_regression"):
        artifact = publish(models, V1, model_type)
        manifest_of(artifact).with_name(artifact.stem + ".card.html").write_text(model_type)
    registry = open_registry(pattern="advanced_ml_*")
    serving = registry.load().manifest.model_type
    assert registry.read_card(V1, "html").decode() == serving
    for _ in range(2):
        assert [(model.state, model.has_card) for model in registry.available()] == [
            ("active", True),
            ("verified", True),
        ]
    next(models.glob(f"*{serving}*.card.html")).unlink()
    assert registry.read_card(V1, "html").decode() != serving
    for version, form in ((V1, "markdown"), (V2, "html")):
        with pytest.raises(ArtifactError) as caught:
            registry.read_card(version, form)
        assert caught.value.reason == "missing"


def test_the_gate_of_the_registry_itself_asks_for_a_manifest(models):
    manifest_of(publish(models, V1)).unlink()
    catalogue = ModelCatalogue(models)
    with pytest.raises(ArtifactError) as caught:
        catalogue.load(catalogue.find()[0])
    assert caught.value.reason == "no_manifest"


def test_every_artifact_is_listed_with_its_state_and_nothing_is_deserialised_for_it(models, open_registry):
    publish(models, V1)
    serving = publish(models, V2, "random_forest", fmt="skops")
    bad = publish(models, V3)
    registry = open_registry()
    flip(50)(bad)
    registry.load()
    unknown = models / "advanced_ml_random_forest_20250101_000000.joblib"
    unknown.write_bytes(b"anything")
    with deserialisations() as calls:
        listed = registry.available()
    assert calls == []
    assert [(model.file, model.state, model.reason) for model in listed] == [
        (bad.name, "refused", "digest_mismatch"),
        (serving.name, "active", None),
        (f"advanced_ml_logistic_regression_{V1}.joblib", "verified", None),
        (unknown.name, "unverified", "no_manifest"),
    ]


def test_full_verification_also_finds_what_only_the_golden_test_can(models):
    publish(models, V1)
    forge(publish(models, V2), golden_outputs=[0.5] * len(GOLDEN))
    catalogue = ModelCatalogue(models)
    assert [model.state for model in catalogue.list_models()] == ["verified", "verified"]
    told = []
    found = catalogue.verify_models(lambda *step: told.append(step))
    assert [(model.version, model.state, model.reason) for model in found] == [
        (V2, "refused", "golden_mismatch"),
        (V1, "verified", None),
    ]
    assert told == [("verify", 0, 2), ("verify", 1, 2), ("verify", 2, 2)]


def test_status_tells_since_when_a_model_is_loaded(models, open_registry, clock):
    publish(models, V1)
    registry = open_registry()
    bundle = registry.load()
    clock.now += 12.5
    status = registry.status()
    assert status.bundle is bundle
    assert status.loaded_since_seconds == 12.5
    assert status.loaded_at.tzinfo is not None
    assert abs(datetime.now(UTC) - status.loaded_at) < timedelta(minutes=10)


def test_a_directory_that_everybody_may_write_is_not_trusted(models, open_registry):
    publish(models, V1)
    models.chmod(0o777)
    registry = open_registry()
    with pytest.raises(ModelNotReadyError):
        registry.load()
    assert registry.status().reason == "writable_by_others"


def test_a_checkout_under_a_generous_umask_is_trusted(models, open_registry):
    artifact = publish(models, V1)
    for path in (models, artifact, manifest_of(artifact)):
        path.chmod(path.stat().st_mode | 0o020)
    assert open_registry().load().ref.version == V1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_that_a_foreign_group_may_write_is_not_trusted(models, open_registry, reports):
    artifact = publish(models, V1)
    os.chown(artifact, 0, 54321)
    artifact.chmod(0o664)
    with pytest.raises(ModelNotReadyError):
        open_registry().load()
    assert reports[-1].reason == "writable_by_others"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_a_stranger_is_not_trusted_unless_the_directory_is_theirs_too(models, reports):
    artifact = publish(models, V1)
    catalogue = ModelCatalogue(models)
    for path, again in ((artifact, manifest_of(artifact)), (manifest_of(artifact), artifact)):
        os.chown(path, 54321, 0)
        os.chown(again, 0, 0)
        with pytest.raises(ArtifactError) as caught:
            catalogue.load(catalogue.find()[0])
        assert caught.value.reason == "wrong_owner"
    os.chown(artifact, 54321, 54321)
    with pytest.raises(ArtifactError):
        catalogue.load(catalogue.find()[0])
    os.chown(models, 54321, 54321)  # which mends it, though no file changes
    assert catalogue.load(catalogue.find()[0]).ref.version == V1


def test_a_bundle_that_changes_in_memory_fails_its_self_test(models, open_registry):
    publish(models, V1, "gradient_boosting")
    bundle = open_registry().load()
    self_test(bundle)
    broken = dataclasses.replace(bundle, scorer=lambda rows: np.full(len(rows), np.nan))
    with pytest.raises(ArtifactError, match="golden"):
        self_test(broken)


def test_a_bundle_is_made_from_a_manifest_and_bytes_alone(models):
    artifact = publish(models, V1)
    bundle = load_bundle(read(artifact), artifact.read_bytes())
    assert bundle.ref.sha256 == read(artifact).sha256
    assert seal_manifest(bundle.manifest) == bundle.manifest
