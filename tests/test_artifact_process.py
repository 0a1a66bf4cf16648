"""An artifact is deserialised in a process of its own: the same model comes back, or the same refusal."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from app.ai import artifact_process
from app.ai.artifact_loading import answer, dump_estimator
from app.ai.artifact_process import dismiss, prepare
from app.ai.estimators import read_estimator
from app.ai.fitted_model import FittedModel, Scaling, decode_model, encode_model
from app.ai.fitted_trees import Tree
from app.ai.inference import build_compiled_scorer
from app.ai.loaded_model import read_apart, read_here
from app.ai.model_bundle import load_bundle
from app.ai.score_kernels import installed_kernels
from app.errors import ArtifactError, ModelNotReadyError
from app.training.publish import build_manifest
from app.wiring import open_services
from tests.in_process import build_settings
from tests.lead_models import describe_model, publish_lead_model
from tests.test_db_engine import eventually

ROWS = np.random.default_rng(7).normal(size=(300, 4)) * [1, 10, 0.1, 3]
LABELS = (ROWS[:, 0] + ROWS[:, 1] / 10 > 0).astype(int)
WITH_NAN = np.where(np.random.default_rng(9).random(ROWS.shape) < 0.2, np.nan, ROWS)
MODELS = {
    "forest": RandomForestClassifier(5, max_depth=4, random_state=1),
    "boosting": HistGradientBoostingClassifier(max_iter=5, random_state=1),
    "logistic": LogisticRegression(),
    "scaled logistic": make_pipeline(StandardScaler(), LogisticRegression()),
    "twice scaled forest": make_pipeline(
        StandardScaler(with_std=False), StandardScaler(), RandomForestClassifier(3, random_state=1)
    ),
}

pytestmark = pytest.mark.skipif(installed_kernels() is None, reason="installed without a C compiler")


def artifact_of(name):
    return dump_estimator(MODELS[name].fit(ROWS, LABELS), "skops")


def stand_in(monkeypatch, program):
    """Lets a program of ours stand where scikit-learn is asked."""
    monkeypatch.setattr(artifact_process, "_COMMAND", (sys.executable, "-c", program))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_read_apart_scores_with_the_same_bits(name):
    here, apart = (read(artifact_of(name), "skops") for read in (read_here, read_apart))
    rows = WITH_NAN if name in {"forest", "boosting"} else ROWS
    np.testing.assert_array_equal(apart.scorer(rows), here.scorer(rows), strict=True)
    assert encode_model(apart.fitted) == encode_model(here.fitted)


def test_a_joblib_artifact_is_read_apart_too():
    model = MODELS["logistic"].fit(ROWS, LABELS)
    scored = read_apart(dump_estimator(model, "joblib"), "joblib").scorer(ROWS)
    assert np.abs(scored - model.predict_proba(ROWS)[:, 1]).max() <= 5e-16


@pytest.mark.parametrize(
    ("data", "fmt", "reason"),
    [
        (b"", "skops", "not_loadable"),
        (b"no archive", "skops", "not_loadable"),
        (b"no pickle", "joblib", "compressed"),
        (dump_estimator(GaussianNB().fit(ROWS, LABELS), "skops"), "skops", "not_allowed"),
        (dump_estimator(StandardScaler().fit(ROWS), "skops"), "skops", "not_a_classifier"),
    ],
)
def test_what_is_refused_here_is_refused_apart_for_the_same_reason_in_the_same_words(data, fmt, reason):
    refusals = []
    for read in (read_here, read_apart):
        with pytest.raises(ArtifactError) as refusal:
            read(data, fmt)
        refusals.append((refusal.value.reason, str(refusal.value)))
    assert refusals[0] == refusals[1]
    assert refusals[0][0] == reason


def test_a_classifier_whose_arrays_are_not_known_is_scored_by_scikit_learn_and_has_no_receipt():
    description = msgspec.structs.replace(describe_model()[1], model_type="decision_tree")
    rows = np.nan_to_num(np.array(description.golden_inputs * 20, float))
    tree = DecisionTreeClassifier(max_depth=2).fit(rows, np.arange(len(rows)) % 2)
    data = dump_estimator(tree, "skops")
    bundle = load_bundle(build_manifest(tree, description, data, "skops"), data, read_apart)
    np.testing.assert_array_equal(bundle.scorer(rows), tree.predict_proba(rows)[:, 1])
    with pytest.raises(ValueError, match="no exact contributions for decision_tree"):
        bundle.explainer()


def test_a_service_that_reads_its_model_apart_has_no_scikit_learn_in_memory():
    program = """
import pathlib, sys
import app.main
from app.ai.loaded_model import read_apart
read_apart(pathlib.Path(sys.argv[1]).read_bytes(), "skops")
assert "app.ai.predictor" in sys.modules
print(*sorted({"sklearn", "scipy", "skops", "joblib", "pandas"} & sys.modules.keys()))
"""
    (artifact,) = (Path(__file__).parent.parent / "models").glob("*.skops")
    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_the_process_that_reads_is_told_nothing_the_service_knows(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:secret@host/db")
    monkeypatch.setenv("AUTH_KEY_PEPPER", "secret")
    told = "import json, os; print('E' + json.dumps(['not_loadable', str(dict(os.environ))]))"
    stand_in(monkeypatch, told)
    with pytest.raises(ArtifactError) as refusal:
        read_apart(b"", "skops")
    assert "PATH" in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "program",
    [
        "",
        "import os; os.kill(os.getpid(), 11)",
        "raise SystemExit(3)",
        "print('M', end='')",
        "print('Mrubbish')",
        "print('E[]')",
        'print(\'E["a reason of its own", ""]\')',
        "print('-')",
    ],
)
def test_a_process_that_breaks_off_or_talks_nonsense_cannot_load_an_artifact(monkeypatch, program):
    stand_in(monkeypatch, program)
    with pytest.raises(ArtifactError) as refusal:
        read_apart(artifact_of("logistic"), "skops")
    assert refusal.value.reason == "not_loadable"


def test_an_artifact_is_not_blamed_for_a_process_that_was_killed_or_took_too_long(monkeypatch):
    monkeypatch.setattr(artifact_process, "DEADLINE_SECONDS", 5.0)
    causes = []
    for program in ("import os; os.kill(os.getpid(), 9)", "import time; time.sleep(60)"):
        stand_in(monkeypatch, program)
        with pytest.raises(ArtifactError) as refusal:
            read_apart(b"", "skops")
        causes.append(type(refusal.value.__cause__))
    assert causes == [ChildProcessError, TimeoutError]


def test_a_process_that_was_prepared_reads_the_next_artifact_and_only_that():
    prepare()
    (waiting,) = artifact_process._waiting
    first = read_apart(artifact_of("logistic"), "skops")
    assert waiting.returncode == 0
    assert not artifact_process._waiting
    second = read_apart(artifact_of("logistic"), "skops")
    np.testing.assert_array_equal(second.scorer(ROWS), first.scorer(ROWS))


def test_a_process_that_was_prepared_for_nothing_is_ended():
    prepare()
    (waiting,) = artifact_process._waiting
    dismiss()
    assert waiting.returncode == -9
    with pytest.raises(ProcessLookupError):
        os.kill(waiting.pid, 0)


def test_a_process_that_was_prepared_ends_with_the_one_that_prepared_it():
    program = """
import os
from app.ai import artifact_process
artifact_process.prepare()
print(artifact_process._waiting[0].pid, flush=True)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    deadline = time.monotonic() + 30
    while is_running(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


LEAF = Tree(
    np.array([-1]), np.array([-1]), np.array([0]), np.zeros(1), np.zeros(1, bool), np.ones(1), np.array([0.3])
)
NO_SCALING = Scaling(np.empty((0, 4)), np.empty((0, 4)))
BAD_MODELS = {
    "a child outside the tree": FittedModel("forest", NO_SCALING, [LEAF._replace(left=np.array([7]))]),
    "a part that is too short": FittedModel("forest", NO_SCALING, [LEAF._replace(value=np.empty(0))]),
    "no tree": FittedModel("boosting", NO_SCALING),
    "too few coefficients": FittedModel("logistic", NO_SCALING, weights=np.ones(3)),
    "too many coefficients": FittedModel("logistic", NO_SCALING, weights=np.ones(5)),
    "scalers that differ": FittedModel(
        "logistic", Scaling(np.zeros((1, 4)), np.ones((2, 4))), weights=np.ones(4)
    ),
}


@pytest.mark.parametrize("model", BAD_MODELS.values(), ids=BAD_MODELS)
def test_arrays_that_contradict_each_other_are_no_model_whoever_sends_them(model):
    with pytest.raises(ValueError, match=r"tree|coefficients|scaler"):
        decode_model(encode_model(model))


def test_no_change_of_a_byte_makes_a_model_that_would_crash_the_process():
    content = bytearray(encode_model(read_estimator(MODELS["forest"].fit(ROWS, LABELS))))
    random = np.random.default_rng(3)
    kernels, refused = installed_kernels(), 0
    for _ in range(2000):
        place, value = int(random.integers(len(content))), int(random.integers(256))
        before, content[place] = content[place], value
        try:
            model = decode_model(bytes(content))
            build_compiled_scorer(model, kernels)(WITH_NAN)
        except ValueError:
            refused += 1
        content[place] = before
    assert refused > 100


async def test_a_worker_that_ends_does_not_wait_for_an_artifact_that_is_being_read(tmp_path, monkeypatch):
    done = tmp_path / "done"
    settings = build_settings(tmp_path, f"postgresql://nobody@/x?host={tmp_path}")
    async with open_services(settings) as services:
        publish_lead_model(settings.ml_model_dir)
        stand_in(monkeypatch, f"import time; time.sleep(5); open({str(done)!r}, 'w')")
        look = asyncio.create_task(asyncio.to_thread(services.registry.load))
        assert await eventually(lambda: bool(artifact_process._reading))
    with pytest.raises(ModelNotReadyError):
        await look
    assert not artifact_process._reading
    assert not done.exists()


def test_a_refusal_keeps_its_reason_on_the_way():
    said = answer(b"joblib\nno pickle")
    assert said[:1] == b"E"
    assert msgspec.json.decode(said[1:])[0] == "compressed"
