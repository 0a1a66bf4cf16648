"""How features are built: a plan of flat records, made once for a feature set, and the two ways to follow it.

The compiled loops of `_score_kernels.c` take the whole plan in one call; where they are not installed, the
NumPy code here does the same operation by operation, to the same bits, and is what the loops are tested
against. Pure: no I/O, no clock. Every step works element by element, so a lead's numbers depend on that lead
alone, to the last bit. Only `features` calls this module.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
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
from app.ai.score_kernels import CELL_COLUMN, FEATURE, LEVEL, Operation, ScoreKernels

_SECONDS_PER_DAY = 86_400.0

Records = NDArray[np.void]
Recipe = tuple[str, tuple[InputColumn, ...], Mapping[str, Any]]
"""What a feature is made of: a transform, the columns it reads, its parameters."""


class FeaturePlan(NamedTuple):
    """How `k` features are built from blocks of their `a` columns of numbers and `b` of text.

    `inputs` (a + b) are the columns in the order of the blocks. `columns` (a,) are `CELL_COLUMN`: what is
    usable. `features` (k,) are `FEATURE`: the operation, the row it reads first, a second one: of a number,
    of `logs`, or where in `levels` the table of a text begins. `levels` are `LEVEL`: by code, table after
    table. `logs` are the rows of numbers whose log1p is read. `known` (b) are the codes of texts.
    """

    inputs: tuple[InputColumn, ...]
    columns: Records
    features: Records
    levels: Records
    logs: NDArray[np.intp]
    known: list[TextCodes]

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
            [TextCodes(named) for named in texts.values()],
        )

    def build(
        self, blocks: ColumnBlocks, moments: FloatArray, kernels: ScoreKernels | None
    ) -> tuple[FloatArray, CodeArray]:
        """Returns values and states (n, k) of `n` leads, both C-contiguous.

        `blocks` hold the `inputs`, `moments` (1,) or (n,) the as-of times, in seconds since 1970-01-01 UTC.
        """
        shape = len(self.known), blocks.numbers.shape[1]
        coded = chain.from_iterable(map(TextCodes.code, self.known, blocks.texts))
        codes = np.fromiter(coded, np.int32, shape[0] * shape[1])
        with np.errstate(all="ignore"):
            # NumPy's own logarithm in both ways: a compiler's may differ from it in the last bit.
            logs = np.log1p(blocks.numbers[self.logs])
            if kernels is None:
                return self._build(_clean(blocks.numbers, self.columns, codes.reshape(shape), logs), moments)
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
