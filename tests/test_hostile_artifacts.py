"""Hostile artifacts with a correct digest: the allow-list alone must refuse them, and nothing may run.

Every payload would create a file when it runs; each harness proves with the ordinary loader that it does.
"""

import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import joblib
import numpy as np
import pytest
import skops.io
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from app.ai.artifact_loading import (
    JOBLIB_GLOBALS,
    SKOPS_NODES,
    SKOPS_TRUSTED,
    _find_nodes,
    dump_estimator,
    load_estimator,
)
from app.errors import ArtifactError
from tests.hostile_files import (
    ATTRIBUTES,
    CALLABLES,
    FORGED_DTYPES,
    HOSTILE_NODES,
    PLACES,
    Leaves,
    build_record,
    forged_arrays,
    hostile_files,
    hostile_pickles,
    object_array,
    pickled,
    plant,
    rewritten,
    with_object_arrays,
)

ROWS = np.random.default_rng(3).normal(size=(300, 4))
LABELS = (ROWS[:, 0] > 0).astype(int)
WITH_NAN = np.where(np.random.default_rng(4).random(ROWS.shape) < 0.2, np.nan, ROWS)

ESTIMATORS = {
    "forest": RandomForestClassifier(5, class_weight="balanced", random_state=1).fit(ROWS, LABELS),
    "forest with weights": RandomForestClassifier(5, class_weight={0: 1.0, 1: 3.0}, n_jobs=1).fit(
        WITH_NAN, LABELS
    ),
    "boosting": HistGradientBoostingClassifier(max_iter=5, random_state=1).fit(ROWS, LABELS),
    "boosting with stop": HistGradientBoostingClassifier(
        max_iter=9, early_stopping=True, class_weight="balanced"
    ).fit(WITH_NAN, LABELS),
    "logistic": LogisticRegression(class_weight="balanced").fit(ROWS, LABELS),
    "scaled logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.5)).fit(ROWS, LABELS),
    "scaled forest": make_pipeline(StandardScaler(), RandomForestClassifier(3)).fit(ROWS, LABELS),
}


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


@pytest.fixture
def planted(tmp_path, monkeypatch, mark):
    """A module whose import leaves a mark; nothing may import it."""
    (tmp_path / "planted_module.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Planted: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)
    yield "planted_module"
    sys.modules.pop("planted_module", None)


def refusal(data, fmt):
    with pytest.raises(ArtifactError) as caught:
        load_estimator(data, fmt)
    return caught.value.reason


@pytest.mark.parametrize("fmt", ["skops", "joblib"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_honest_artifact_loads_and_scores_the_same(name, fmt):
    estimator = ESTIMATORS[name]
    loaded = load_estimator(dump_estimator(estimator, fmt), fmt)
    np.testing.assert_array_equal(loaded.predict_proba(ROWS), estimator.predict_proba(ROWS))


def test_the_skops_list_holds_what_honest_artifacts_need_and_nothing_else():
    needed, untrusted = set(), set()
    for estimator in ESTIMATORS.values():
        data = dump_estimator(estimator, "skops")
        needed |= _find_nodes(json.loads(zipfile.ZipFile(io.BytesIO(data)).read("schema.json")))
        untrusted |= set(skops.io.get_untrusted_types(data=data))
    assert needed == SKOPS_NODES
    assert untrusted == set(SKOPS_TRUSTED)


def test_the_joblib_list_holds_what_honest_artifacts_need_and_nothing_else(audited):
    for estimator in ESTIMATORS.values():
        load_estimator(dump_estimator(estimator, "joblib"), "joblib")
    assert {event[1] for event in audited if event[0] == "pickle.find_class"} == JOBLIB_GLOBALS


@pytest.fixture
def audited():
    """What Python reports of itself during a test: globals that unpicklers find, and programs started."""
    events = []
    _listeners.append(events)
    yield events
    _listeners.remove(events)


_listeners = []
_WATCHED = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "ctypes.dlopen",
)


def _listen(event, args):
    if _listeners and event in _WATCHED:
        for events in _listeners:
            events.append((event, tuple(args) if event == "pickle.find_class" else None))


sys.addaudithook(_listen)  # an audit hook cannot be removed: without a listener it does nothing


@pytest.mark.parametrize(("module", "name"), CALLABLES)
def test_a_pickle_that_names_anything_outside_the_list_runs_nothing(module, name, mark, planted, audited):
    for way, data in hostile_pickles(module, name, f"touch {mark}"):
        assert refusal(data, "joblib") == "not_allowed", way
    found = {event[1] for event in audited if event[0] == "pickle.find_class"}
    assert found <= JOBLIB_GLOBALS
    assert {event[0] for event in audited} <= {"pickle.find_class"}
    assert not mark.exists()
    assert planted not in sys.modules


def test_the_hostile_corpus_is_large():
    assert sum(len(list(hostile_pickles(*target, ""))) for target in CALLABLES) >= 400


@pytest.mark.parametrize("way", ["reduce", "stack global", "inst", "obj", "in a list", "memoised"])
def test_the_hostile_pickles_do_run_under_an_ordinary_loader(way, mark):
    data = dict(hostile_pickles("posix", "system", f"touch {mark}"))[way]
    joblib.load(io.BytesIO(data))
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", PLACES)
def test_an_estimator_with_a_hostile_part_is_refused(place, protocol, mark, audited):
    data = pickled(plant(place, Leaves(mark)), protocol=protocol)
    assert refusal(data, "joblib") == "not_allowed"
    assert not mark.exists()
    assert "os.system" not in {event[0] for event in audited}
    joblib.load(io.BytesIO(data))
    assert mark.exists()


def test_an_object_array_is_refused_even_when_its_content_is_harmless():
    estimator = LogisticRegression().fit(ROWS, LABELS)
    estimator.classes_ = np.array(["no", "yes"], dtype=object)
    assert refusal(pickled(estimator), "joblib") == "not_allowed"


@pytest.mark.parametrize(
    "state",
    [
        {"read": LogisticRegression},
        {"subclass": np.matrix},
        {"dtype": np.dtype(object)},
        {"dtype": "O"},
        {"dtype": np.dtype([("a", object)])},
        {"extra": 1},
    ],
)
def test_an_array_wrapper_cannot_be_turned_into_something_else(state, audited):
    wrapper = joblib.numpy_pickle.NumpyArrayWrapper(np.ndarray, (1,), "C", np.dtype("f8"))
    wrapper.__dict__.update(state)
    data = pickle.dumps(wrapper, protocol=4)
    assert refusal(data, "joblib") == "not_allowed"
    assert {event[1] for event in audited if event[0] == "pickle.find_class"} <= JOBLIB_GLOBALS


@pytest.mark.parametrize("forged", FORGED_DTYPES)
def test_what_a_file_says_of_a_dtype_is_not_believed(forged):
    for way, data in forged_arrays(FORGED_DTYPES[forged]):
        assert refusal(data, "joblib") in {"not_allowed", "not_loadable"}, way


def test_a_plain_record_is_read_whatever_its_size_and_flags_are_said_to_be():
    dtype = build_record({"a": (np.dtype("<f4"), 4)}, size=4000, flags=127)
    data = dict(forged_arrays(dtype, b"\0" * 4 + np.float32(1.5).tobytes()))["joblib's array"]
    (row,) = load_estimator(data, "joblib")
    honest = np.dtype({"names": ["a"], "formats": ["<f4"], "offsets": [4], "itemsize": 8})
    assert row.dtype.__reduce__() == honest.__reduce__()
    assert row["a"] == 1.5


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_file_changes_neither_a_class_nor_what_an_object_is(name):
    assert refusal(ATTRIBUTES[name], "joblib") == "not_allowed"
    assert not hasattr(joblib.numpy_pickle.NumpyArrayWrapper, "changed")


@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_either_byte_order_are_read(order):
    numbers = np.arange(3, dtype=f"{order}f8")
    read = load_estimator(pickled(numbers), "joblib")
    np.testing.assert_array_equal(read, numbers)
    assert read.dtype.str == numbers.dtype.str


def test_a_record_cannot_be_changed_through_what_it_was_made_of():
    fields = {"a": (np.dtype("f8"), 0)}
    pair = pickle.dumps((build_record(fields), fields), 2)
    name, later = (pickle.dumps(value, 2)[2:-1] for value in ("a", (np.dtype("f8"), 64)))
    record = load_estimator(pair[: pair.rindex(b"\x86")] + name + later + b"s0.", "joblib")
    assert record.fields["a"] == (np.dtype("f8"), 0)


@pytest.mark.parametrize("method", ["zlib", "gzip", "bz2", "lzma", "xz"])
def test_a_compressed_file_is_refused_unread(method, mark, audited):
    assert refusal(pickled(Leaves(mark), compress=(method, 3)), "joblib") == "compressed"
    assert audited == []


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\x80\x04", b"\x80\x04.", b"\x80\xff.", b"(dp0\n.", b"PK\x03\x04", b"\x80\x02\x82\x01."],
)
def test_what_is_no_artifact_is_refused(data):
    assert refusal(data, "joblib") in {"not_loadable", "compressed"}
    assert refusal(data, "skops") == "not_loadable"


def test_bytes_after_the_end_are_refused():
    data = dump_estimator(ESTIMATORS["logistic"], "joblib")
    assert refusal(data + b"\x80\x04N.", "joblib") == "not_loadable"


def test_no_mutated_joblib_file_reaches_beyond_the_list(audited, mark):
    honest = dump_estimator(ESTIMATORS["scaled logistic"], "joblib")
    rng = np.random.default_rng(5)
    for _ in range(1500):
        data = bytearray(honest)
        for position in rng.integers(0, len(data), size=rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        try:
            load_estimator(bytes(data), "joblib")
        except ArtifactError:
            continue
    assert {event[1] for event in audited if event[0] == "pickle.find_class"} <= JOBLIB_GLOBALS
    assert {event[0] for event in audited} == {"pickle.find_class"}


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize("hostile", HOSTILE_NODES)
def test_a_skops_file_that_names_anything_outside_the_list_builds_nothing(
    hostile, protocol, planted, mark, audited
):
    def plant_everywhere(schema):
        yield {**HOSTILE_NODES[hostile], "protocol": protocol, "_skops_version": schema["_skops_version"]}
        for key in ("C", "coef_", "classes_"):
            changed = json.loads(json.dumps(schema))
            changed["content"]["content"][key] = HOSTILE_NODES[hostile]
            yield {**changed, "protocol": protocol}

    honest = dump_estimator(ESTIMATORS["logistic"], "skops")
    schema = json.loads(zipfile.ZipFile(io.BytesIO(honest)).read("schema.json"))
    for changed in plant_everywhere(schema):
        assert refusal(rewritten(honest, lambda _, changed=changed: changed), "skops") == "not_allowed"
    assert planted not in sys.modules
    assert not mark.exists()
    assert audited == []


def test_the_hostile_skops_file_does_import_under_a_loader_that_trusts_it(planted, mark):
    data = rewritten(dump_estimator(ESTIMATORS["logistic"], "skops"), lambda schema: {
        **HOSTILE_NODES["a planted class"], "protocol": schema["protocol"]})  # fmt: skip
    skops.io.loads(data, trusted=["planted_module.Planted"])
    assert mark.exists()


def test_a_bit_generator_that_is_none_is_refused():
    def change(schema):
        text = json.dumps(schema)
        assert '"\\"PCG64\\""' in text
        return json.loads(text.replace('"\\"PCG64\\""', '"\\"seed\\""'))

    data = rewritten(dump_estimator(ESTIMATORS["boosting"], "skops"), change)
    assert refusal(data, "skops") in {"not_allowed", "not_loadable"}


def test_a_compressed_skops_file_is_refused_unread():
    data = rewritten(dump_estimator(ESTIMATORS["logistic"], "skops"), lambda s: s, zipfile.ZIP_DEFLATED)
    assert refusal(data, "skops") == "compressed"


def test_an_object_array_pickled_inside_a_skops_file_runs_nothing(mark):
    honest = dump_estimator(ESTIMATORS["logistic"], "skops")
    assert refusal(with_object_arrays(honest, Leaves(mark)), "skops") == "not_loadable"
    assert not mark.exists()
    np.load(io.BytesIO(object_array(Leaves(mark))), allow_pickle=True)
    assert mark.exists()


def test_the_corpus_of_hostile_files_is_refused_whole(mark, planted, audited):
    names = []
    for name, fmt, data in hostile_files(mark):
        assert refusal(data, fmt) in {"not_allowed", "not_loadable", "compressed"}, name
        names.append(name)
    assert len(set(names)) == len(names) >= 500
    assert {event[1] for event in audited if event[0] == "pickle.find_class"} <= JOBLIB_GLOBALS
    assert {event[0] for event in audited} <= {"pickle.find_class"}
    assert planted not in sys.modules
    assert not mark.exists()


@pytest.mark.parametrize("fmt", ["skops", "joblib"])
@pytest.mark.parametrize(
    "estimator",
    [ExtraTreesClassifier(2), make_pipeline(FunctionTransformer(np.log1p), LogisticRegression())],
    ids=["another forest", "a function in the pipeline"],
)
def test_a_sound_model_of_a_kind_that_is_not_listed_is_refused(estimator, fmt):
    data = dump_estimator(estimator.fit(np.abs(ROWS), LABELS), fmt)
    assert refusal(data, fmt) == "not_allowed"


@pytest.mark.parametrize("fmt", ["skops", "joblib"])
def test_an_artifact_of_another_scikit_learn_is_refused(fmt):
    import sklearn

    data = dump_estimator(ESTIMATORS["logistic"], fmt)
    if fmt == "skops":
        changed = rewritten(data, lambda s: json.loads(json.dumps(s).replace(sklearn.__version__, "1.0.1")))
    else:
        changed = data.replace(sklearn.__version__.encode(), b"1.0.1")
    assert changed != data
    assert refusal(changed, fmt) == "not_loadable"


def test_no_source_file_loads_an_artifact_by_its_path():
    for source in Path(__file__).parent.parent.joinpath("app").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert "joblib.load(" not in text, source
        assert "pickle.load" not in text, source
        assert "skops.io.load(" not in text, source
