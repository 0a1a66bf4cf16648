"""Builders of small inputs for the pure core: columns, leads, specs, matrices. No database, no clock."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.ai.domain import Column, ColumnKind, FloatArray, InputColumn, IntArray, LeadColumns
from app.ai.feature_safety import CheckedFeatures, build_statistics, check_features
from app.ai.features import CellState, FeatureMatrix, FeatureSet, FeatureSpec, build_features

DAY = 86_400.0
AS_OF = 1_780_272_000.0  # 2026-06-01T00:00:00Z
NAN, INF = math.nan, math.inf
PRESENT, MISSING, INVALID, UNSEEN = CellState

ODD_FLOATS = (
    *(0.0, -0.0, 5e-324, -5e-324, 2.2e-308, 1e-300, 0.5, 1.0, 1 - 2**-53, 1 + 2**-52, -1.0, 1e3, -1e3),
    *(3.4e38, -3.4e38, 3.5e38, 1e150, 1e300, -1e300, 1.797e308, -1.797e308, INF, -INF, NAN),
)
"""Floats that break careless numerics."""


def column(kind: ColumnKind, *values: float | str | bool | None) -> Column:
    """A column of these values; None is NULL."""
    present = np.array([value is not None for value in values], dtype=np.bool_)
    if kind == "text":
        return Column(
            kind, np.array(["" if value is None else value for value in values], dtype=object), present
        )
    numbers = [NAN if value is None else float(value) for value in values]
    return Column(kind, np.array(numbers, dtype=np.float64), present)


def leads(**columns: Column) -> LeadColumns:
    """Leads with these columns, all of one length."""
    return LeadColumns(n=len(next(iter(columns.values())).present), columns=columns)


def take(source: LeadColumns, rows: Sequence[int] | IntArray) -> LeadColumns:
    """These rows of the leads, in this order."""
    chosen = np.asarray(rows, dtype=np.int64)
    return LeadColumns(
        len(chosen),
        {name: Column(c.kind, c.values[chosen], c.present[chosen]) for name, c in source.columns.items()},
    )


def spec(transform: str, *inputs: tuple[str, ColumnKind], name: str = "x", **changes: Any) -> FeatureSpec:
    """A feature spec over (column, kind) pairs; keywords are its strategies, and `params`."""
    columns = tuple(InputColumn(*entry) for entry in inputs)
    defaults = {"name": name, "transform": transform, "inputs": columns, "params": {}, "description": ""}
    return FeatureSpec(**{**defaults, **changes})


def build_one(
    transform: str, *columns: Column, as_of: float | FloatArray = AS_OF, **params: Any
) -> tuple[list[float], list[CellState]]:
    """Values and states of one feature over these columns, as lists."""
    names = [f"c{position}" for position in range(len(columns))]
    feature = spec(
        transform, *((name, c.kind) for name, c in zip(names, columns, strict=True)), params=params
    )
    matrix = build_features(leads(**dict(zip(names, columns, strict=True))), FeatureSet((feature,)), as_of)
    return matrix.values[:, 0].tolist(), [CellState(state) for state in matrix.states[:, 0]]


def matrix(rows: Sequence[Sequence[float]], states: Sequence[Sequence[int]] | None = None) -> FeatureMatrix:
    """A feature matrix; without states a NaN is MISSING and a number PRESENT."""
    values = np.array(rows, dtype=np.float64)
    if states is None:
        return FeatureMatrix(values, np.where(np.isnan(values), MISSING, PRESENT).astype(np.uint8))
    return FeatureMatrix(values, np.array(states, dtype=np.uint8))


def number_features(*names: str, **changes: Any) -> FeatureSet:
    """One `value` feature for each name, all with the same strategies."""
    return FeatureSet(tuple(spec("value", (name, "number"), name=name, **changes) for name in names))


def check_one(
    value: float, state: CellState, training: Sequence[float], **strategies: Any
) -> CheckedFeatures:
    """One cell made safe by the statistics of these training values."""
    statistics = build_statistics(matrix([[number] for number in training]))
    return check_features(matrix([[value]], [[state]]), number_features("x", **strategies), statistics)


EVERY_TRANSFORM = FeatureSet(
    (
        spec("value", ("gpa", "number"), name="gpa"),
        spec("log1p", ("minutes", "number"), name="minutes"),
        spec("flag", ("opted_in", "boolean"), name="opted_in"),
        spec("is_present", ("gpa", "number"), name="gpa_there"),
        spec("is_present", ("source", "text"), name="source_there"),
        spec("age_days", ("created", "timestamp"), name="age"),
        spec("days_until", ("intake", "timestamp"), name="until_intake"),
        spec("days_between", ("created", "timestamp"), ("intake", "timestamp"), name="lead_time"),
        spec("ratio", ("gpa", "number"), ("minutes", "number"), name="ratio"),
        spec("ratio", ("gpa", "number"), ("minutes", "number"), name="ratio0",
             params={"zero_over_zero": 0.5}),
        spec("level", ("source", "text"), name="source", params={"levels": {"web": 0.25, "fair": -1.5}}),
        spec("level", ("source", "text"), name="pooled",
             params={"levels": {"web": 1.0}, "missing": 0.125, "unseen": 0.375}),
        spec("one_of", ("source", "text"), name="is_web", params={"values": ["web", "webinar"]}),
    )
)  # fmt: skip
"""Each transform at least once."""


def plausible_leads(n: int, seed: int) -> LeadColumns:
    """Leads for `EVERY_TRANSFORM`: mostly ordinary, a fifth of the cells missing, some of them broken."""
    random = np.random.default_rng(seed)

    def with_gaps(kind: ColumnKind, values: FloatArray, odd: Sequence[float] = ODD_FLOATS) -> Column:
        broken = random.random(n) < 0.1
        values = np.where(broken, random.choice(np.array(odd), n), values)
        present = random.random(n) < 0.8
        return Column(kind, np.where(present, values, NAN), present)

    there = random.random(n) < 0.8
    words = random.choice(
        np.array(["Web", " fair ", "WEBINAR", "pigeon", "", "  ", "ﬁn", "STRASSE"], object), n
    )
    words[~there] = ""
    return leads(
        gpa=with_gaps("number", random.normal(3, 0.5, n)),
        minutes=with_gaps("number", np.floor(random.exponential(3, n))),
        opted_in=with_gaps("boolean", (random.random(n) < 0.5).astype(np.float64)),
        created=with_gaps("timestamp", AS_OF - random.exponential(60, n) * DAY),
        intake=with_gaps("timestamp", AS_OF + random.normal(90, 60, n) * DAY),
        source=Column("text", words, there),
    )
