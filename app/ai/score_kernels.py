"""The compiled loops of scoring: `_score_kernels.c`, built when the package is installed, opened by ctypes.

Trees are laid out once, when a model is loaded, as one array of small nodes; a call then walks 16 rows at a
time down each tree, without a branch and without the interpreter's lock. Features are built and made safe,
scores calibrated, and answers remembered and found, by one call each, whatever their number. Equal to
scikit-learn and to NumPy to the last bit, see `_score_kernels.c`. Pure but for opening the library.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pkgutil import get_data
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.ai.column_blocks import join_texts
from app.ai.domain import ANSWER, AnswerArray, BoolArray, CodeArray, FloatArray, IntArray
from app.ai.fitted_trees import Tree

RowSum = Callable[[FloatArray], FloatArray]
"""Feature values (n, k) to one sum a row (n,)."""

NODE = np.dtype(
    [("threshold", np.float64), ("child", np.int32, 2), ("feature", np.int32), ("nan_child", np.int32)]
)
"""`struct node` of the C source: leaves hold their value in `threshold` and are their own children."""

CELL_COLUMN = np.dtype([("lower", np.float64), ("upper", np.float64), ("is_flag", np.int64)])
FEATURE = np.dtype(
    [("zero_over_zero", np.float64), *((name, np.int32) for name in ("operation", "first", "second"))],
    align=True,
)
LEVEL = np.dtype([("value", np.float64), ("state", np.int64)])
"""`struct cell_column`, `struct feature` and `struct level`, see `feature_plan.FeaturePlan`."""

TEXT_BYTES = 56
KNOWN_TEXT = np.dtype([("text", np.bytes_, TEXT_BYTES), ("size", np.int32), ("code", np.int32)])
"""`struct known_text`, see `feature_transforms.TextCodes`."""
UNKNOWN_CODE = -1

RULE = np.dtype(
    [
        *((name, np.float64) for name in ("lower", "upper", "far_below", "far_above")),
        *((name, np.float64) for name in ("clip_below", "clip_above", "impute")),
        ("fill", np.float64, 4),
        ("units", np.int64),
        ("reject_gap", np.bool_, 4),
        *((name, np.bool_) for name in ("impute_outside", "reject_outside", "indicator", "speaks")),
    ]
)
"""`struct rule`, see `feature_safety.SafetyRules`."""

CHECKED = np.dtype(
    [
        ("coverage", np.float64),
        ("weighted_coverage", np.float64),
        ("out_of_range", np.int64),
        ("rejected", np.bool_),
    ],
    align=True,
)
"""`struct checked`, see `feature_safety.CheckedFeatures`."""

_WAYS = 16

ENTRY = np.dtype(
    [
        ("check", np.uint64),
        ("expires", np.float64),
        ("since", np.int64),
        ("mark", np.int64),
        ("answer", ANSWER),
    ]
)
SET = np.dtype([("hashes", np.uint64, _WAYS), ("numbers", np.int64, _WAYS)])
"""`struct entry` and `struct set`, see `prediction_cache.PredictionCache`."""


class AnswerTable(ctypes.Structure):
    """`struct table`: where answers are remembered, and where the moments of changes are."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sets", "ring", "changed")),
        *((name, ctypes.c_int64) for name in ("n_sets", "size")),
    )

    def __init__(self, sets: NDArray[np.void], ring: NDArray[np.void], changed: IntArray) -> None:
        """`sets` are `SET`, `ring` is `ENTRY`, all zeros at first; whoever owns them keeps them in place."""
        super().__init__(sets.ctypes.data, ring.ctypes.data, changed.ctypes.data, len(sets), len(ring))


HashKey = NDArray[np.uint64]
"""The 128 bits that texts are hashed under, and those of a hash (2,)."""


class Operation(IntEnum):
    """`enum operation`: how a feature is built from numbers, or that it is looked up for a text."""

    VALUE = 0
    LOG1P = 1
    IS_PRESENT = 2
    AGE_DAYS = 3
    DAYS_UNTIL = 4
    DAYS_BETWEEN = 5
    RATIO = 6
    LOOK_UP = 7


_LOG = logging.getLogger(__name__)
_RECORDS = (NODE, CELL_COLUMN, FEATURE, LEVEL, RULE, CHECKED, ENTRY, SET, KNOWN_TEXT)
_RECORD_BYTES = [*(record.itemsize for record in _RECORDS), ctypes.sizeof(AnswerTable)]
_I32, _I64, _F64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_STALE = "built from another version of its source"

# Where an array begins, in a third of the time NumPy's own `ctypes` takes; the array must be writable.
_start_of: Callable[[Any], Any] = (ctypes.c_char * 0).from_buffer


class ScoreKernels:
    """The loops of one shared library, built from `source` where that is at hand.

    Raises:
        OSError: there is no such library, or it is not of this version of the source.
    """

    def __init__(self, path: str, source: bytes | None = None) -> None:
        library = ctypes.CDLL(path)
        try:
            if list((_I32 * len(_RECORD_BYTES)).in_dll(library, "record_bytes")) != _RECORD_BYTES:
                raise OSError(_STALE)
            built_from = (ctypes.c_char * 64).in_dll(library, "source_sha256").value.decode()
            if source is not None and sha256(source).hexdigest() != built_from:
                raise OSError(_STALE)
            self._sum_trees, self._sum_terms = library.sum_trees, library.sum_terms
            self._logistic = library.logistic
            self._build_features, self._check_features = library.build_features, library.check_features
            self._calibrate, self._hash_text = library.calibrate_by_curve, library.hash_text
            # These keep the interpreter's lock: what they read, no other thread writes during a call.
            locked = ctypes.PyDLL(path)
            self._find_answers, self._remember_answers = locked.find_answers, locked.remember_answers
            self._code_texts = locked.code_texts
        except (ValueError, AttributeError) as exc:
            raise OSError("not the library of the scoring loops") from exc
        self._sum_trees.argtypes = [_POINTER] * 3 + [_I64, _POINTER, _I64, _I64, _I32, _POINTER]
        self._sum_trees.restype = _I32
        self._sum_terms.argtypes = [_POINTER] * 2 + [_I64, _POINTER, _POINTER, _I64, _I64, _POINTER]
        self._sum_terms.restype = None
        self._logistic.argtypes, self._logistic.restype = [_POINTER, _I64], None
        self._build_features.argtypes = [_POINTER] * 7 + [_I64] * 3 + [_POINTER] * 2
        self._build_features.restype = None
        self._check_features.argtypes = [_POINTER, *[_I64] * 3, *[_POINTER] * 2, _I64, *[_POINTER] * 2]
        self._check_features.restype = None
        self._code_texts.argtypes = [_POINTER, _I64, ctypes.c_char_p, _I64, _I64, _POINTER]
        self._code_texts.restype = _I64
        self._calibrate.argtypes = [*[_POINTER] * 3, _I64, _POINTER, _I64, *[_F64] * 4, _POINTER]
        self._calibrate.restype = None
        self._hash_text.argtypes = [ctypes.c_char_p, _I64, _POINTER, _POINTER]
        self._hash_text.restype = None
        look: list[Any] = [ctypes.POINTER(AnswerTable), ctypes.c_char_p, _I64, _POINTER]
        self._find_answers.argtypes = [*look, _F64, _I64, *[_POINTER] * 3]
        self._find_answers.restype = None
        self._remember_answers.argtypes = [*look, _I64, _F64, _I64, _POINTER, _POINTER]
        self._remember_answers.restype = _I64

    def build_tree_sum(
        self, trees: Sequence[Tree], n_features: int, *, start: float = 0.0, single_precision: bool = False
    ) -> RowSum:
        """Returns the sum of `start` and what the trees say of a row, added in their order.

        `trees` are checked, see `fitted_trees`. With `single_precision` values are rounded to float32 before
        they are compared, and held within its range.

        Raises:
            ValueError: more nodes than an index can name.
        """
        nodes, roots = _lay_out(trees)
        depths = _measure_depths(nodes, roots)
        # These pointers keep the arrays they point to alive.
        fixed = [array.ctypes.data_as(_POINTER) for array in (nodes, roots, depths)]
        sum_trees, single = self._sum_trees, int(single_precision)

        def sum_rows(values: FloatArray) -> FloatArray:
            rows = _check_rows(values, n_features)
            sums = np.empty(len(rows))
            sums.fill(start)
            if sum_trees(*fixed, len(roots), _start_of(rows), len(rows), n_features, single, _start_of(sums)):
                raise MemoryError
            return sums

        return sum_rows

    def build_linear_sum(
        self, weights: FloatArray, intercept: float, means: FloatArray, scales: FloatArray
    ) -> RowSum:
        """Returns the sum of `intercept` and a row's features times `weights` (k,), added in their order.

        Before that each feature is scaled `s` times: a mean is taken away and it is divided by a scale, both
        (s, k).
        """
        n_scalings, n_features = means.shape
        arrays = (means, scales, weights)
        if weights.shape != (n_features,) or scales.shape != means.shape:
            raise ValueError("weights and scalings are for different numbers of features")
        fixed = [np.ascontiguousarray(array, dtype=np.float64).ctypes.data_as(_POINTER) for array in arrays]
        sum_terms = self._sum_terms

        def sum_rows(values: FloatArray) -> FloatArray:
            rows = _check_rows(values, n_features)
            sums = np.empty(len(rows))
            sums.fill(intercept)
            sum_terms(
                *fixed[:2], n_scalings, fixed[2], _start_of(rows), len(rows), n_features, _start_of(sums)
            )
            return sums

        return sum_rows

    def logistic(self, log_odds: FloatArray) -> FloatArray:
        """Returns the probabilities of log-odds (n,), written over them: 1 / (1 + exp(-x))."""
        self._logistic(_start_of(log_odds), len(log_odds))
        return log_odds

    def code_texts(self, known: NDArray[np.void], texts: bytes, n: int) -> tuple[NDArray[np.int32], int]:
        """Returns the codes (b, n) of the `n` texts of each column, and how many are `UNKNOWN_CODE`.

        `known` (b, s) are `KNOWN_TEXT`; each of the texts ends with a NUL, column after column.

        Raises:
            ValueError: there are not as many texts.
        """
        columns, slots = known.shape
        if texts.count(0) != columns * n or texts[-1:] not in (b"", b"\0"):
            raise ValueError("there are not as many texts as columns times leads")
        codes = np.empty((columns, n), np.int32)
        return codes, self._code_texts(_start_of(known), slots, texts, columns, n, _start_of(codes))

    def build_features(
        self,
        plan: Sequence[NDArray[np.void]],
        numbers: FloatArray,
        logs: FloatArray,
        codes: NDArray[np.int32],
        moments: FloatArray,
    ) -> tuple[FloatArray, CodeArray]:
        """Returns values and states (n, k) of `n` leads, see `feature_plan.FeaturePlan.build`.

        `plan` are the columns (a,), features (k,) and levels of a plan, `numbers` (a, n), `logs` (l, n) and
        `codes` (b, n) what it reads, `moments` (1,) or (n,). All are C-contiguous, and the plan and the codes
        name no row and no level beyond them.
        """
        (columns, features, levels), n = plan, numbers.shape[1]
        values, states = np.empty((n, len(features))), np.empty((n, len(features)), np.uint8)
        read = map(_start_of, (columns, features, levels, numbers, logs, codes, moments))
        moment_step = int(len(moments) > 1)
        self._build_features(*read, len(features), moment_step, n, _start_of(values), _start_of(states))
        return values, states

    def check_features(
        self, rules: NDArray[np.void], groups: int, units_in_all: int, values: FloatArray, states: CodeArray
    ) -> tuple[FloatArray, NDArray[np.void]]:
        """Returns safe values (n, k) and what is to be said of each lead (n,), as `CHECKED`.

        `rules` (k,) are `RULE`, see `feature_safety.SafetyRules`; values and states (n, k) are as built.
        """
        rows, states = _check_rows(values, len(rules)), np.ascontiguousarray(states, dtype=np.uint8)
        if states.shape != rows.shape:
            raise ValueError("there are not as many states as values")
        safe, checked = np.empty(rows.shape), np.empty(len(rows), CHECKED)
        self._check_features(
            *(_start_of(rules), len(rules), groups, units_in_all),
            *(_start_of(rows), _start_of(states), len(rows), _start_of(safe), _start_of(checked)),
        )
        return safe, checked

    def calibrate_by_curve(
        self,
        curve: Sequence[FloatArray],
        raw: FloatArray,
        *,
        lower: float,
        upper: float,
        shift: float,
        tie_break: float,
    ) -> FloatArray:
        """Returns the probabilities (n,) of raw scores (n,) by a curve, see `calibration.Calibrator`.

        `curve` are the scores (p,) of its points, their probabilities (p,) and widths (p,). `shift` is what
        the odds against are multiplied by, 0 for nothing.
        """
        scores = raw if raw.flags.writeable else raw.copy()
        probability = np.empty(len(raw))
        points = map(_start_of, curve)
        self._calibrate(
            *(*points, len(curve[0]), _start_of(scores), len(raw)),
            *(lower, upper, shift, tie_break, _start_of(probability)),
        )
        return probability

    def hash_text(self, text: bytes, key: HashKey) -> HashKey:
        """Returns the 128-bit hash (2,) of a text under a key (2,): SipHash-2-4."""
        hashed = np.empty(2, np.uint64)
        self._hash_text(text, len(text), _start_of(key), _start_of(hashed))
        return hashed

    def find_answers(
        self, table: AnswerTable, texts: Sequence[str], key: HashKey, now: float, all_changed: int
    ) -> tuple[BoolArray, AnswerArray, FloatArray]:
        """Returns, for each text (n,) under a key, if its answer is found, it, and when it expires.

        Found is what expires after `now`, and was read no earlier than the last change that concerns it and
        than `all_changed`. The rest is undefined.

        Raises:
            ValueError: a text has a NUL in it.
        """
        n = len(texts)
        found, answers, expires = np.empty(n, np.bool_), np.empty(n, ANSWER), np.empty(n)
        filled = map(_start_of, (found, answers, expires))
        self._find_answers(table, join_texts(texts), n, _start_of(key), now, all_changed, *filled)
        return found, answers, expires

    def remember_answers(
        self,
        table: AnswerTable,
        texts: Sequence[str],
        key: HashKey,
        answers: AnswerArray,
        *,
        number: int,
        expires: float,
        since: int,
        marks: IntArray,
    ) -> int:
        """Enters answers (n,) under texts (n,): the first is the one of this `number`, from 1 on.

        Returns how many were entered: an answer that expires later than these is kept instead.
        `since` is the moment they were read, `marks` (n,) the places in `changed` that concern them.

        Raises:
            ValueError: there are not as many answers or marks as texts, or a text has a NUL in it.
        """
        if not len(texts) == len(answers) == len(marks):
            raise ValueError("there are not as many answers or marks as texts")
        entered: int = self._remember_answers(
            *(table, join_texts(texts), len(texts), _start_of(key)),
            *(number, expires, since, _start_of(marks), _start_of(np.ascontiguousarray(answers))),
        )
        return entered


@cache
def installed_kernels() -> ScoreKernels | None:
    """Returns the loops that were built when this package was installed, see `load_kernels`."""
    found = find_spec("app.ai._score_kernels")
    source = None
    with suppress(FileNotFoundError):  # a checkout has it, an installed package the library alone
        source = get_data("app.ai", "_score_kernels.c")
    return load_kernels(found.origin if found else None, source)


def load_kernels(path: str | None, source: bytes | None = None) -> ScoreKernels | None:
    """Returns the loops of the library at `path`, or None, with a line in the log, if they cannot be used."""
    reason = "they were not built when the package was installed"
    if path is not None:
        try:
            return ScoreKernels(path, source)
        except OSError as exc:
            reason = str(exc)
    _LOG.warning(
        "models are scored by scikit-learn and features built by NumPy, with the same results but several "
        "times slower, and no prediction is remembered, without the compiled loops (%s); have a C compiler "
        "on the path and install the package again",
        reason,
    )
    return None


def _lay_out(trees: Sequence[Tree]) -> tuple[NDArray[np.void], NDArray[np.int32]]:
    """Returns the nodes of all trees as one array of `NODE`, and the places of the roots in it."""
    sizes = np.array([len(tree.left) for tree in trees])
    if sizes.sum() > np.iinfo(np.int32).max:
        raise ValueError("the trees have too many nodes")
    roots = (np.cumsum(sizes) - sizes).astype(np.int32)
    left, right, feature, threshold, missing_left, _, value = map(np.concatenate, zip(*trees, strict=True))
    itself, root = np.arange(len(left)), np.repeat(roots, sizes)
    leaf = left == -1
    nodes = np.empty(len(left), NODE)
    nodes["threshold"] = np.where(leaf, value, threshold)
    nodes["child"][:, 0] = np.where(leaf, itself, root + left)
    nodes["child"][:, 1] = np.where(leaf, itself, root + right)
    nodes["feature"] = np.where(leaf, 0, feature)
    nodes["nan_child"] = ~missing_left
    return nodes, roots


def _measure_depths(nodes: NDArray[np.void], roots: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns how many steps lead from each root (t,) to its deepest leaf."""
    depths = np.zeros(len(roots), np.int32)
    tree, at = np.arange(len(roots)), roots
    while True:
        inner = nodes["child"][at, 0] != at
        tree, at = np.repeat(tree[inner], 2), nodes["child"][at[inner]].ravel()
        if not at.size:
            return depths
        depths[tree] += 1


def _check_rows(values: FloatArray, n_features: int) -> FloatArray:
    rows: FloatArray = np.ascontiguousarray(values, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != n_features:
        raise ValueError(f"the model scores rows of {n_features} features")
    return rows if rows.flags.writeable else rows.copy()
