"""How features are built: a plan of flat records, made once for a feature set, and the two ways to follow it.

The compiled loops of `_score_kernels.c` take the whole plan in one call; where they are not installed, the
NumPy code here does the same operation by operation, to the same bits, and is what the loops are tested
against. Pure: no I/O, no clock. Every step works element by element, so a lead's numbers depend on that lead
alone, to the last bit. Only `features` calls this module.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from app.ai.column_blocks import NULL_NUMBER, ColumnBlocks
from app.ai.domain import CodeArray, FloatArray, InputColumn
from app.ai.feature_transforms import (
    INVALID,
    LARGEST,
    MISSING,
    PRESENT,
    RANGES,
    TRANSFORMS,
    Level,
    TextCodes,
    named_texts,
)
from app.ai.score_kernels import (
    CELL_COLUMN,
    FEATURE,
    KNOWN_TEXT,
    LEVEL,
    UNKNOWN_CODE,
    Operation,
    ScoreKernels,
)

_MOST_SEEN = 64
_SECONDS_PER_DAY = 86_400.0

Records = NDArray[np.void]
Recipe = tuple[str, tuple[InputColumn, ...], Mapping[str, Any]]
"""What a feature is made of: a transform, the columns it reads, its parameters."""


class FeaturePlan(NamedTuple):
    """How `k` features are built from blocks of their `a` columns of numbers and `b` of text.

    `inputs` (a + b) are the columns in the order of the blocks. `columns` (a,) are `CELL_COLUMN`: what is
    usable. `features` (k,) are `FEATURE`: the operation, the row it reads first, a second one: of a number,
    of `logs`, or where in `levels` the table of a text begins. `levels` are `LEVEL`: by code, table after
    table. `logs` are the rows of numbers whose log1p is read. `texts` tells the codes of texts.
    """

    inputs: tuple[InputColumn, ...]
    columns: Records
    features: Records
    levels: Records
    logs: NDArray[np.intp]
    texts: "TextCoder"

    @classmethod
    def of(cls, recipes: Sequence[Recipe]) -> Self:
        """Returns the plan of features, in their order."""
        wanted = dict.fromkeys(column for _, inputs, _ in recipes for column in inputs)
        inputs = tuple(sorted(wanted, key=lambda column: column.kind == "text"))
        numbers = [column for column in inputs if column.kind != "text"]
        texts = {column: _named_texts(column, recipes) for column in inputs[len(numbers) :]}
        place = {column: row for row, column in enumerate(numbers)}
        place |= {column: row for row, column in enumerate(texts)}
        features = np.zeros(len(recipes), FEATURE)
        levels: list[Level] = []
        logs: list[int] = []
        for feature, (name, read, params) in zip(features, recipes, strict=True):
            transform = TRANSFORMS[name]
            feature["operation"] = transform.operation
            feature["first"], feature["second"] = place[read[0]], place[read[-1]]
            feature["zero_over_zero"] = params.get("zero_over_zero", np.nan)
            if read[0] in texts and transform.tabulate is not None:
                feature["operation"], feature["second"] = Operation.LOOK_UP, len(levels)
                levels += transform.tabulate(params, texts[read[0]])
            elif transform.operation == Operation.LOG1P:
                feature["second"] = len(logs)
                logs.append(place[read[0]])
        columns = [(*RANGES[column.kind], column.kind == "boolean") for column in numbers]
        return cls(
            inputs,
            np.array(columns, CELL_COLUMN),
            features,
            np.array(levels, LEVEL),
            np.array(logs, np.intp),
            TextCoder(list(texts.values())),
        )

    def build(
        self, blocks: ColumnBlocks, moments: FloatArray, kernels: ScoreKernels | None
    ) -> tuple[FloatArray, CodeArray]:
        """Returns values and states (n, k) of `n` leads, both C-contiguous.

        `blocks` hold the `inputs`, `moments` (1,) or (n,) the as-of times, in seconds since 1970-01-01 UTC.
        """
        n = blocks.numbers.shape[1]
        codes = self.texts.code(blocks.texts, n, kernels)
        with np.errstate(all="ignore"):
            # NumPy's own logarithm in both ways: a compiler's may differ from it in the last bit.
            logs = np.log1p(blocks.numbers[self.logs])
            if kernels is None:
                return self._build(_clean(blocks.numbers, self.columns, codes, logs), moments)
        plan = (self.columns, self.features, self.levels)
        return kernels.build_features(plan, blocks.numbers, logs, codes, moments)

    def _build(self, cells: "_Cells", moments: FloatArray) -> tuple[FloatArray, CodeArray]:
        shape = (len(self.features), cells.values.shape[1])
        values, states = np.empty(shape), np.empty(shape, np.uint8)
        for operation, build in _OPERATIONS.items():
            chosen = self.features["operation"] == operation
            values[chosen], states[chosen] = build(cells, self.features[chosen], moments)
        chosen = self.features["operation"] == Operation.LOOK_UP
        if chosen.any():
            features = self.features[chosen]
            levels = self.levels[features["second"][:, None] + cells.codes[features["first"]]]
            values[chosen], states[chosen] = levels["value"], levels["state"]
        unusable = ~(np.abs(values) <= LARGEST)
        states[unusable & (states == PRESENT)] = INVALID
        values[unusable] = np.nan
        values += 0.0  # -0.0 becomes 0.0: equal numbers that differ in a bit would be told apart by a digest.
        return np.ascontiguousarray(values.T), np.ascontiguousarray(states.T)


class TextCoder:
    """Tells the codes of the texts of `b` columns; `named` (b) are the texts that features of each name.

    What a column has been seen to hold is looked up by a loop in C; the rest is worked out one by one.
    """

    def __init__(self, named: Sequence[Sequence[str]]) -> None:
        self._seen = np.zeros((len(named), _MOST_SEEN), KNOWN_TEXT)
        self._codes = list(map(TextCodes, named, self._seen))

    def code(self, texts: bytes, n: int, kernels: ScoreKernels | None) -> NDArray[np.int32]:
        """Returns the codes (b, n) of texts (b, n) as in `ColumnBlocks`.

        Raises:
            ValueError: there are not as many texts.
        """
        if kernels is None:
            codes, unknown = np.full((len(self._codes), n), UNKNOWN_CODE, np.int32), n * len(self._codes)
        else:
            codes, unknown = kernels.code_texts(self._seen, texts, n)
        if unknown:
            places = (codes.ravel() == UNKNOWN_CODE).nonzero()[0].tolist()
            words = texts.split(b"\0")
            codes.flat[places] = [self._codes[place // n][words[place]] for place in places]
        return codes


class _Cells(NamedTuple):
    """The cells of `n` leads made ready: numbers (a, n) are NaN, and not PRESENT, where they are unusable."""

    values: FloatArray
    states: CodeArray
    codes: NDArray[np.int32]
    logs: FloatArray


def _named_texts(column: InputColumn, recipes: Sequence[Recipe]) -> list[str]:
    """Returns the distinct texts that features of this column name."""
    return list(
        dict.fromkeys(
            text for _, inputs, params in recipes if column in inputs for text in named_texts(params)
        )
    )


def _clean(numbers: FloatArray, columns: Records, codes: NDArray[np.int32], logs: FloatArray) -> _Cells:
    absent = numbers.view(np.uint64) == NULL_NUMBER
    usable = (numbers >= columns["lower"][:, None]) & (numbers <= columns["upper"][:, None])
    usable &= (numbers == np.rint(numbers)) | (columns["is_flag"][:, None] == 0)
    states = np.where(absent, MISSING, np.where(usable, PRESENT, INVALID))
    return _Cells(np.where(usable, numbers, np.nan), states, codes, logs)


Built = tuple[FloatArray, CodeArray]
"""Values and states of `f` features (f, n); a present value that is not a usable number becomes INVALID."""


def _value(cells: _Cells, features: Records, _moments: FloatArray) -> Built:
    return cells.values[features["first"]], cells.states[features["first"]]


def _log1p(cells: _Cells, features: Records, _moments: FloatArray) -> Built:
    usable = cells.values[features["first"]] >= 0
    return np.where(usable, cells.logs[features["second"]], np.nan), cells.states[features["first"]]


def _is_present(cells: _Cells, features: Records, _moments: FloatArray) -> Built:
    states = cells.states[features["first"]]
    return (states == PRESENT).astype(np.float64), np.zeros_like(states)


def _age_days(cells: _Cells, features: Records, moments: FloatArray) -> Built:
    age = (moments - cells.values[features["first"]]) / _SECONDS_PER_DAY
    return np.maximum(age, 0.0), cells.states[features["first"]]


def _days_until(cells: _Cells, features: Records, moments: FloatArray) -> Built:
    days = (cells.values[features["first"]] - moments) / _SECONDS_PER_DAY
    return days, cells.states[features["first"]]


def _days_between(cells: _Cells, features: Records, _moments: FloatArray) -> Built:
    start, end = features["first"], features["second"]
    days = (cells.values[end] - cells.values[start]) / _SECONDS_PER_DAY
    return days, np.maximum(cells.states[start], cells.states[end])


def _ratio(cells: _Cells, features: Records, _moments: FloatArray) -> Built:
    above, below = cells.values[features["first"]], cells.values[features["second"]]
    quotient = np.where((above == 0) & (below == 0), features["zero_over_zero"][:, None], above / below)
    return quotient, np.maximum(cells.states[features["first"]], cells.states[features["second"]])


_OPERATIONS: Mapping[int, Callable[[_Cells, Records, FloatArray], Built]] = {
    Operation.VALUE: _value,
    Operation.LOG1P: _log1p,
    Operation.IS_PRESENT: _is_present,
    Operation.AGE_DAYS: _age_days,
    Operation.DAYS_UNTIL: _days_until,
    Operation.DAYS_BETWEEN: _days_between,
    Operation.RATIO: _ratio,
}
"""What is done with numbers; texts are looked up in their tables."""
