"""Deserialising an artifact: bytes in memory to a fitted model, under an exact allow-list.

The lists name what a random forest, histogram gradient boosting, a logistic regression and a pipeline with
a standard scaler consist of, and nothing else; a file that names anything more is refused before the object
it names is built. Never reads a file: the caller hands over the very bytes it has verified. Run as a process
of its own by `artifact_process`; called by training, and by whoever has no other process to spare.
"""

import io
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import joblib
import msgspec
import numpy as np
import skops.io
from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler
from sklearn.exceptions import InconsistentVersionWarning

from app.ai.estimators import read_estimator
from app.ai.fitted_model import encode_model
from app.ai.model_manifest import ArtifactFormat
from app.errors import ArtifactError

_BOOSTING = "sklearn.ensemble._hist_gradient_boosting"

SKOPS_TRUSTED: Final = (
    f"{_BOOSTING}.predictor.TreePredictor",
    "sklearn.tree._tree.Tree",
)
"""What skops does not trust by itself and these models need; `fitted_trees` checks their tree arrays."""

SKOPS_NODES: Final = frozenset({
    ("DictNode", "builtins", "dict"),
    ("JsonNode", "builtins", "str"),
    ("ListNode", "builtins", "list"),
    ("LossNode", "sklearn._loss._loss", "CyHalfBinomialLoss"),
    ("NdArrayNode", "numpy", "float64"),
    ("NdArrayNode", "numpy", "int64"),
    ("NdArrayNode", "numpy", "ndarray"),
    ("NdArrayNode", "numpy", "uint64"),
    ("ObjectNode", "sklearn._loss.link", "Interval"),
    ("ObjectNode", "sklearn._loss.link", "LogitLink"),
    ("ObjectNode", "sklearn._loss.loss", "HalfBinomialLoss"),
    ("ObjectNode", "sklearn.ensemble._forest", "RandomForestClassifier"),
    ("ObjectNode", f"{_BOOSTING}.binning", "_BinMapper"),
    ("ObjectNode", f"{_BOOSTING}.gradient_boosting", "HistGradientBoostingClassifier"),
    ("ObjectNode", f"{_BOOSTING}.predictor", "TreePredictor"),
    ("ObjectNode", "sklearn.linear_model._logistic", "LogisticRegression"),
    ("ObjectNode", "sklearn.pipeline", "Pipeline"),
    ("ObjectNode", "sklearn.preprocessing._data", "StandardScaler"),
    ("ObjectNode", "sklearn.preprocessing._label", "LabelEncoder"),
    ("ObjectNode", "sklearn.tree._classes", "DecisionTreeClassifier"),
    ("RandomGeneratorNode", "numpy.random._generator", "Generator"),
    ("TreeNode", "sklearn.tree._tree", "Tree"),
    ("TupleNode", "builtins", "tuple"),
    ("TypeNode", "builtins", "int"),
    ("TypeNode", "builtins", "str"),
})  # fmt: skip
"""Every (loader, module, class) that may stand in the schema of a `.skops` file.

skops by itself trusts every scikit-learn estimator, every NumPy and SciPy function and several ways to call
them; none of that is needed here.
"""

JOBLIB_GLOBALS: Final = frozenset({
    ("joblib.numpy_pickle", "NumpyArrayWrapper"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.random._pcg64", "PCG64"),
    ("numpy.random._pickle", "__bit_generator_ctor"),
    ("numpy.random._pickle", "__generator_ctor"),
    ("numpy.random.bit_generator", "SeedSequence"),
    ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"),
    ("sklearn._loss._loss", "CyHalfBinomialLoss"),
    ("sklearn._loss.link", "Interval"),
    ("sklearn._loss.link", "LogitLink"),
    ("sklearn._loss.loss", "HalfBinomialLoss"),
    ("sklearn.ensemble._forest", "RandomForestClassifier"),
    (f"{_BOOSTING}.binning", "_BinMapper"),
    (f"{_BOOSTING}.gradient_boosting", "HistGradientBoostingClassifier"),
    (f"{_BOOSTING}.predictor", "TreePredictor"),
    ("sklearn.linear_model._logistic", "LogisticRegression"),
    ("sklearn.pipeline", "Pipeline"),
    ("sklearn.preprocessing._data", "StandardScaler"),
    ("sklearn.preprocessing._label", "LabelEncoder"),
    ("sklearn.tree._classes", "DecisionTreeClassifier"),
    ("sklearn.tree._tree", "Tree"),
})  # fmt: skip
"""Every global a `.joblib` file may name."""

_NUMBERS = "biuf"
"""Of what kinds the elements of an array may be, in NumPy's letters."""

_DTYPE = re.compile(f"[{_NUMBERS}V][0-9]+")

_ARRAY = "numpy.ndarray"
"""Stands in for the class, which honest files name and never call: it lays arrays over bytes of theirs."""

_WRAPPER_STATE = {"subclass", "shape", "order", "dtype", "allow_mmap", "numpy_array_alignment_bytes"}


def dump_estimator(estimator: object, fmt: ArtifactFormat) -> bytes:
    """Returns the estimator as the bytes of an artifact; nothing is compressed."""
    if fmt == "skops":
        data: bytes = skops.io.dumps(estimator)
        return data
    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    return buffer.getvalue()


def answer(question: bytes) -> bytes:
    """Says what is in an artifact; the question is a line with its format, and the artifact.

    The answer is `M` and the model, `-` for a classifier whose arrays are not known, or `E` and a JSON array
    of the reason and the text of a refusal.
    """
    fmt, _, data = question.partition(b"\n")
    try:
        estimator = load_estimator(data, "skops" if fmt == b"skops" else "joblib")
        with refusing_other_objects():
            model = read_estimator(estimator)
    except ArtifactError as exc:
        return b"E" + msgspec.json.encode([exc.reason, str(exc)])
    return b"-" if model is None else b"M" + encode_model(model)


@contextmanager
def refusing_other_objects() -> Iterator[None]:
    """Says of whatever goes wrong with a deserialised object that it is no classifier.

    Raises:
        ArtifactError: `not_a_classifier`.
    """
    try:
        yield
    except Exception as exc:
        raise ArtifactError("not_a_classifier", "The artifact is not a sound binary classifier.") from exc


def load_estimator(data: bytes, fmt: ArtifactFormat) -> object:
    """Deserialises an artifact whose bytes have been verified.

    Raises:
        ArtifactError: `not_allowed` (it names something outside the allow-list), `compressed`, or
            `not_loadable` (damaged, or written by another version of a library).
    """
    # Not `catch_warnings`: that swaps the filters of the whole process, and this runs beside other threads.
    warnings.simplefilter("error", InconsistentVersionWarning)
    try:
        return _load_skops(data) if fmt == "skops" else _load_joblib(data)
    except ArtifactError:
        raise
    except Exception as exc:
        raise ArtifactError("not_loadable", f"The artifact cannot be loaded ({type(exc).__name__}).") from exc


def _load_skops(data: bytes) -> object:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ArtifactError("compressed", "The artifact is compressed.")
        schema = json.loads(archive.read("schema.json"))
    if not _find_nodes(schema) <= SKOPS_NODES:
        raise ArtifactError("not_allowed", "The artifact holds types outside the allow-list.")
    return skops.io.loads(data, trusted=list(SKOPS_TRUSTED))


def _find_nodes(schema: object) -> set[tuple[str, str, str]]:
    """Collects (loader, module, class) of everything in the schema that looks like a node in any way."""
    found: set[tuple[str, str, str]] = set()
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
            if not value.keys().isdisjoint({"__loader__", "__module__", "__class__"}):
                found.add(
                    (str(value.get("__loader__")), str(value.get("__module__")), str(value.get("__class__")))
                )
    return found


def _load_joblib(data: bytes) -> object:
    # joblib.load would look at the first bytes and decompress; here anything but a plain pickle is refused.
    if data[:1] != pickle.PROTO:
        raise ArtifactError("compressed", "The artifact is not an uncompressed joblib file.")
    buffer = io.BytesIO(data)
    estimator: object = _AllowListUnpickler("", buffer, ensure_native_byte_order=False).load()
    if buffer.read(1):
        raise ArtifactError("not_loadable", "The artifact has bytes after its end.")
    return estimator


class _AllowListUnpickler(NumpyUnpickler):  # type: ignore[misc]
    """joblib's unpickler, able to find exactly the globals of `JOBLIB_GLOBALS`.

    What they may be made into is limited too. NumPy believes what a pickle says of a dtype, whether its
    elements are pointers to objects included, and pickle lets state replace the class of an object.
    """

    dispatch = NumpyUnpickler.dispatch.copy()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in JOBLIB_GLOBALS:
            raise ArtifactError("not_allowed", "The artifact names a global outside the allow-list.")
        found = super().find_class(module, name)
        return {np.dtype: _begin_dtype, np.ndarray: _ARRAY}.get(found, found)

    def load_build(self) -> None:
        """Checks the state of an object before the object gets it, and joblib reads an array by it."""
        if len(self.stack) > 1:
            target, state = self.stack[-2:]
            if isinstance(target, NumpyArrayWrapper):
                self.stack[-1] = _check_wrapper(state)
            elif isinstance(target, np.dtype):
                self.stack[-1] = _describe_dtype(target, state)
            elif isinstance(target, np.ndarray) or not (
                isinstance(state, dict) or hasattr(target, "__setstate__")
            ):
                raise ArtifactError("not_allowed", "The artifact holds state that is more than attributes.")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _begin_dtype(text: str, *_: object) -> "np.dtype[Any]":
    """Stands in for `numpy.dtype`: begins a type of numbers, or a record whose fields are told next."""
    if not _DTYPE.fullmatch(text):
        raise _no_numbers()
    return np.dtype(text, copy=True)  # NumPy gives state to copies only


def _describe_dtype(begun: "np.dtype[Any]", state: Any) -> object:
    """Returns the state that NumPy itself gives a type of this byte order, or a record of these fields.

    A record keeps the size it began with: an array may have been made with it.
    """
    _, order, _, names, fields, *_ = state
    if begun.kind in _NUMBERS:
        return begun.newbyteorder(order).__reduce__()[2]
    formats, offsets = zip(*(fields[name] for name in names), strict=True)
    for of, offset in zip(formats, offsets, strict=True):
        # NumPy compares the end of a field with the size, but in 32 bits, where it may be negative.
        if not isinstance(of, np.dtype) or of.kind not in _NUMBERS or offset + of.itemsize > begun.itemsize:
            raise _no_numbers()
    record: np.dtype[Any] = np.dtype(
        {"names": names, "formats": formats, "offsets": offsets, "itemsize": begun.itemsize}
    )
    return record.__reduce__()[2]


def _check_wrapper(state: Any) -> dict[str, object]:
    # State beyond the wrapper's own would let a file replace the methods joblib is about to call, and an
    # object array holds a pickle of its own.
    plain = (
        isinstance(state, dict)
        and state.keys() == _WRAPPER_STATE
        and state["subclass"] is _ARRAY
        and isinstance(state["dtype"], np.dtype)
        and (state["dtype"].kind in _NUMBERS or state["dtype"].names)
    )
    if not plain:
        raise _no_numbers()
    return {**state, "subclass": np.ndarray}


def _no_numbers() -> ArtifactError:
    return ArtifactError("not_allowed", "The artifact holds an array that is not plain numbers.")


def main() -> None:
    """Answers the question on standard input, if there is one: whoever asks may be gone."""
    if question := sys.stdin.buffer.read():
        with suppress(BrokenPipeError), os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as output:
            output.write(answer(question))
