"""Hostile artifacts: pickles and `.skops` files that would run something, for tests and proofs to offer."""

import io
import json
import os
import pickle
import warnings
import zipfile

import joblib
import numpy as np
from joblib.numpy_pickle import NumpyArrayWrapper
from sklearn._loss import HalfBinomialLoss
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from app.ai.artifact_loading import dump_estimator
from tests.model_files import LABELS, ROWS

_TARGETS = """
        builtins:__import__ builtins:compile builtins:eval builtins:exec builtins:getattr builtins:open
        code:interact codecs:open copyreg:_reconstructor ctypes:CDLL functools:partial functools:reduce
        importlib:import_module io:FileIO joblib:load joblib.numpy_pickle:NDArrayWrapper
        joblib.numpy_pickle:load joblib.numpy_pickle_compat:ZNDArrayWrapper marshal:loads
        multiprocessing.util:spawnv_passfds numpy:load numpy:memmap numpy:ndarray.tofile numpy:save
        numpy._core.multiarray:_reconstruct numpy.testing._private.utils:runstring operator:attrgetter
        operator:methodcaller os:system pathlib:Path pathlib:Path.touch pickle:loads pkgutil:resolve_name
        planted_module:Planted posix:system pty:spawn runpy:run_path shutil:rmtree
        sklearn.datasets:load_files sklearn.linear_model:LogisticRegression
        sklearn.linear_model._logistic:LogisticRegression.__init__
        sklearn.tree._tree:_build_pruned_tree_py sklearn.utils._bunch:Bunch socket:socket
        subprocess:Popen subprocess:check_output tests.planted_module:Planted timeit:timeit
        types:FunctionType webbrowser:open
"""
CALLABLES = [target.split(":") for target in _TARGETS.split()]
"""What a hostile file would like to call, as module and name."""


class Leaves:
    """Pickles as a call of `os.system` that creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


PLACES = ["alone", "parameter", "fitted attribute", "dict key", "object array", "step"]


def plant(place, hostile):
    """Returns an estimator with a hostile part in one of `PLACES`."""
    estimator = LogisticRegression().fit(ROWS, LABELS)
    if place == "parameter":
        estimator.C = hostile
    elif place == "fitted attribute":
        estimator.coef_ = hostile
    elif place == "dict key":
        estimator.class_weight = {hostile: 1.0}
    elif place == "object array":
        estimator.classes_ = np.array([hostile, 1], dtype=object)
    elif place == "step":
        estimator = make_pipeline(StandardScaler(), estimator)
        estimator.steps.append(("last", hostile))
    else:
        estimator = hostile
    return estimator


def pickled(value, **options):
    """Returns a value as joblib writes it."""
    buffer = io.BytesIO()
    joblib.dump(value, buffer, **options)
    return buffer.getvalue()


def hostile_pickles(module, name, argument):
    """Yields every way a pickle has of calling a global, as a joblib file of protocol 2 or later."""
    old = f"c{module}\n{name}\n".encode()
    new = (
        b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93"
    )
    text = b"X" + len(argument).to_bytes(4, "little") + argument.encode()
    estimator = b"csklearn.linear_model._logistic\nLogisticRegression\n)\x81"
    yield "reduce", b"\x80\x02" + old + text + b"\x85R."
    yield "stack global", b"\x80\x04" + new + text + b"\x85R."
    yield "inst", b"\x80\x02(" + text + f"i{module}\n{name}\n.".encode()
    yield "obj", b"\x80\x02(" + old + text + b"o."
    yield "newobj", b"\x80\x02" + old + text + b"\x85\x81."
    yield "newobj_ex", b"\x80\x04" + new + text + b"\x85}\x92."
    yield "in an estimator", b"\x80\x02" + estimator + b"}X\x01\x00\x00\x00C" + old + text + b"\x85Rsb."
    yield "in a list", b"\x80\x02]" + old + text + b"\x85Ra."
    yield "memoised", b"\x80\x02" + old + b"q\x000h\x00" + text + b"\x85R."


class Reduced:
    """Pickles as a call, and the state that is given to what it returns."""

    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


def build_dtype(start, *state):
    """Pickles as a dtype of which the file says all that NumPy remembers: order, fields, size, flags."""
    return Reduced(np.dtype, (start, False, True), (3, *state))


def build_record(fields, size=8, flags=0):
    """Pickles as a record that begins with eight bytes; without flags there is no object in it."""
    return build_dtype("V8", "|", None, tuple(fields), fields, size, 1, flags)


OBJECT = np.dtype("O")
OBJECTS = build_dtype("V8", "|", (OBJECT, (1,)), None, None, 8, 1, 0)

FORGED_DTYPES = {
    "objects that are none": build_dtype("O8", "|", None, None, None, -1, -1, 0),
    "objects in a record": build_record({"a": (OBJECT, 0)}),
    "objects in a record in a record": build_record({"a": (build_record({"a": (OBJECT, 0)}), 0)}),
    "an array of objects": OBJECTS,
    "an array of objects in a record": build_record({"a": (OBJECTS, 0)}),
    "objects in numbers": build_dtype("f8", "|", None, ("a",), {"a": (OBJECT, 0)}, 8, 1, 0),
    "text": build_dtype("U2", "<", None, None, None, 8, 4, 8),
    "a field behind the end": build_record({"a": (np.dtype("f8"), 64)}),
    "a field so far behind that 32 bits overflow": build_record({"a": (np.dtype("f8"), 2**31 - 1)}),
    "a field before the beginning": build_record({"a": (np.dtype("f8"), -8)}),
    "a field of no type": build_record({"a": ("f8", 0)}),
}
"""Dtypes that would have NumPy take bytes of a file for pointers, or read beyond them."""


def forged_arrays(dtype, payload=b"A" * 8):
    """Yields every way a file has of giving eight bytes of its own this dtype."""
    empty = (np.ndarray, ((0,), np.dtype("u1")))
    wrapper = NumpyArrayWrapper(np.ndarray, (1,), "C", dtype)
    yield "array", pickle.dumps(Reduced(np.ndarray, ((1,), dtype, payload)), 2)
    yield "state of an array", pickle.dumps(Reduced(*empty, (1, (1,), dtype, False, payload)), 2)
    yield "scalar", pickle.dumps(Reduced(np._core.multiarray.scalar, (dtype, payload)), 2)
    yield "joblib's array", pickle.dumps(wrapper, 2)[:-1] + b"\0" + payload + pickle.STOP


def give_attributes(target, **attributes):
    """Returns a file that sets attributes of an object or a class one by one, as pickle does for slots."""
    return pickle.dumps(target, 2)[:-1] + b"N" + pickle.dumps(attributes, 2)[2:-1] + b"\x86b."


ATTRIBUTES = {
    "a class that is changed": give_attributes(NumpyArrayWrapper, changed=True),
    "an object in disguise": give_attributes(HalfBinomialLoss(), __class__=NumpyArrayWrapper),
}
"""Files that change a class for everybody, or make an array, unchecked, of an object that is none."""


def rewritten(data, change, compression=zipfile.ZIP_STORED):
    """Returns a `.skops` file with its schema changed."""
    schema = json.loads(zipfile.ZipFile(io.BytesIO(data)).read("schema.json"))
    return with_schema(data, json.dumps(change(schema)), compression)


def with_schema(data, text, compression=zipfile.ZIP_STORED):
    """Returns a `.skops` file with another text for its schema."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression=compression) as archive:
        for member in source.namelist():
            archive.writestr(member, text if member == "schema.json" else source.read(member))
    return target.getvalue()


def node(loader, module, name, **content):
    return {"__loader__": loader, "__module__": module, "__class__": name, "__id__": 424242, **content}


TEXT = node("JsonNode", "builtins", "str", content='"touch x"', is_json=True)
NOTHING = node("TupleNode", "builtins", "tuple", content=[])
EMPTY = node(
    "DictNode", "builtins", "dict", content={}, key_types=node("ListNode", "builtins", "list", content=[])
)

HOSTILE_NODES = {
    "a planted class": node("ObjectNode", "planted_module", "Planted"),
    "a planted type": node("TypeNode", "planted_module", "Planted"),
    "a planted function": node("FunctionNode", "planted_module", "Planted"),
    "a planted dict": node("DictNode", "planted_module", "Planted", content={}, key_types=EMPTY),
    "a planted array scalar": node("NdArrayNode", "planted_module", "Planted", type="numpy", file="x"),
    "os.system": node("FunctionNode", "os", "system"),
    "a NumPy function skops trusts": node("FunctionNode", "numpy", "add"),
    "a call of a class": node("ConstructorFromReduceNode", "planted_module", "Planted", content=NOTHING),
    "a path": node("ConstructorFromReduceNode", "pathlib", "Path", content=NOTHING),
    "a partial": node("PartialNode", "functools", "partial", content={
        "func": node("FunctionNode", "posix", "system"), "args": NOTHING, "kwds": EMPTY, "namespace": EMPTY}),
    "an operator": node("OperatorFuncNode", "operator", "methodcaller", attrs=NOTHING),
    "a method": node("MethodNode", "sklearn.linear_model._logistic", "LogisticRegression", content={
        "func": "fit", "obj": node("ObjectNode", "sklearn.linear_model._logistic", "LogisticRegression")}),
    "another estimator skops trusts": node(
        "ObjectNode", "sklearn.preprocessing._function_transformer", "FunctionTransformer"),
    "a loss of another kind": node(
        "LossNode", "planted_module", "Planted", content=EMPTY, __reduce__={"args": NOTHING}),
    "a trusted class by another loader": node(
        "TypeNode", "sklearn.linear_model._logistic", "LogisticRegression"),
    "bytes": node("BytesNode", "builtins", "bytes", file="x"),
    "a cached node": node("CachedNode", None, None),
    "a random state": node("RandomStateNode", "numpy.random.mtrand", "RandomState", content=EMPTY),
    "a loader without a class": {"__loader__": "FunctionNode", "__id__": 1},
    "an old function node": node("FunctionNode", "builtins", "function", content={
        "module_path": "planted_module", "function": "Planted"}),
}  # fmt: skip


def object_array(hostile):
    """Returns a `.npy` file that holds a pickle."""
    array = io.BytesIO()
    np.save(array, np.array([hostile], dtype=object), allow_pickle=True)
    return array.getvalue()


def with_object_arrays(data, hostile):
    """Returns a `.skops` file with every array replaced by one that holds a pickle."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for member in source.namelist():
            array = member.endswith(".npy")
            archive.writestr(member, object_array(hostile) if array else source.read(member))
    return target.getvalue()


def hostile_schemas(data):
    """Yields `.skops` files with a hostile node as the whole, and in three places of an honest estimator."""
    schema = json.loads(zipfile.ZipFile(io.BytesIO(data)).read("schema.json"))
    for name, hostile in HOSTILE_NODES.items():
        versions = {"protocol": schema["protocol"], "_skops_version": schema["_skops_version"]}
        yield f"{name}, alone", rewritten(data, lambda _, whole={**hostile, **versions}: whole)
        for key in ("C", "coef_", "classes_"):
            changed = json.loads(json.dumps(schema))
            changed["content"]["content"][key] = hostile
            yield f"{name}, as {key}", rewritten(data, lambda _, changed=changed: changed)


def zip_tricks(data, hostile):
    """Yields `.skops` files that play with the archive itself."""
    yield "a pickle in the arrays", with_object_arrays(data, hostile)
    yield "compressed", rewritten(data, lambda schema: schema, zipfile.ZIP_DEFLATED)
    yield "a bomb", with_schema(data, " " * 50_000_000, zipfile.ZIP_DEFLATED)
    yield "a schema nested without end", with_schema(data, "[" * 200_000)
    encrypted = bytearray(data)
    encrypted[data.index(b"PK\x01\x02") + 8] |= 1
    yield "encrypted, it says", bytes(encrypted)
    second = io.BytesIO(data)
    with zipfile.ZipFile(second, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        archive.writestr("schema.json", json.dumps(node("ObjectNode", "planted_module", "Planted")))
    yield "a second schema", second.getvalue()
    yield (
        "a name that leads out",
        rewritten(
            data, lambda schema: json.loads(json.dumps(schema).replace(".npy", "/../../../../etc/passwd"))
        ),
    )


def hostile_files(mark):
    """Yields name, format and bytes of every hostile artifact there is; what would run creates `mark`."""
    hostile, honest = Leaves(mark), dump_estimator(LogisticRegression().fit(ROWS, LABELS), "skops")
    for module, name in CALLABLES:
        for way, data in hostile_pickles(module, name, f"touch {mark}"):
            yield f"{module}.{name}, {way}", "joblib", data
    for place in PLACES:
        for protocol in (2, 3, 4, 5):
            yield (
                f"estimator, {place}, {protocol}",
                "joblib",
                pickled(plant(place, hostile), protocol=protocol),
            )
    for method in ("zlib", "gzip", "bz2", "lzma", "xz"):
        yield f"compressed, {method}", "joblib", pickled(hostile, compress=(method, 3))
    for forged, dtype in FORGED_DTYPES.items():
        for way, data in forged_arrays(dtype):
            yield f"{forged}, {way}", "joblib", data
    for name, data in ATTRIBUTES.items():
        yield name, "joblib", data
    for name, data in (*hostile_schemas(honest), *zip_tricks(honest, hostile)):
        yield name, "skops", data
