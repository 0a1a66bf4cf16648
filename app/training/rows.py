"""The rows a training learns from: which columns may feed it, which leads are decided, who is set aside.

Reads through the chunks of `app.db.leads`, which use the same expressions as serving, so a training row
equals the serving row of the same lead bit for bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from operator import ne
from typing import NamedTuple

import numpy as np

from app.ai.domain import (
    BoolArray,
    Column,
    ColumnKind,
    FloatArray,
    InputColumn,
    IntArray,
    LeadColumns,
    Progress,
    start_of_day,
)
from app.db.leads import fetch_all_chunks, fetch_columns
from app.errors import TrainingError
from app.training.declared import DECLARED_COLUMNS
from app.training.leakage import is_denied
from app.training.options import TrainingOptions

_AS_OF, _CREATED_AT, _EXTERNAL_REF = "as_of", "created_at", "external_ref"
_SECONDS_PER_HOUR, _SECONDS_PER_DAY = 3_600.0, 86_400.0
_FIRST_MOMENT, _LAST_MOMENT = (datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in (1, 9999))


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRows:
    """`n` decided leads: their columns, outcomes (n,) as 0 or 1, and as-of times (n,) in seconds UTC.

    `order` (n,) rises in the order in which the leads came to be: seconds UTC, or any number; None if the
    source does not say. A source of past moments has several rows of a lead; `lead` (n,) numbers the leads,
    None if each row is one of its own.
    """

    leads: LeadColumns
    outcome: IntArray
    as_of: FloatArray
    order: FloatArray | None = None
    lead: IntArray | None = None

    def take(self, rows: BoolArray | IntArray) -> "TrainingRows":
        """Returns these rows, by mask or by index."""
        columns = {
            name: Column(column.kind, column.values[rows], column.present[rows])
            for name, column in self.leads.columns.items()
        }
        outcome = self.outcome[rows]
        order = None if self.order is None else self.order[rows]
        lead = None if self.lead is None else self.lead[rows]
        return TrainingRows(LeadColumns(len(outcome), columns), outcome, self.as_of[rows], order, lead)

    def take_one_a_lead(self) -> "TrainingRows":
        """Returns one row of each lead: what several rows of a lead share is no evidence of any pattern."""
        drawn = self.draw_one_a_lead(np.arange(self.leads.n))
        return self if len(drawn) == self.leads.n else self.take(drawn)

    def draw_one_a_lead(self, rows: IntArray) -> IntArray:
        """Returns, of these rows by index, one of each lead.

        Drawn, always the same: what leads gather over time would be missing from the first rows of all.
        """
        if self.lead is None:
            return rows
        drawn = np.random.default_rng(0).permutation(rows)
        return np.sort(drawn[np.unique(self.lead[drawn], return_index=True)[1]])


class LeftOut(NamedTuple):
    """How many leads are not learnt from: with no outcome yet, or with one before their as-of time.

    The `later` ones, with a label, came after the moment up to which anything is known, where one was named.
    The `repeated` could have been tested on, but repeat a lead that was learnt from, or one that is tested.
    """

    undecided: int
    beforehand: int
    repeated: int = 0
    later: int = 0


def choose_columns(options: TrainingOptions) -> tuple[tuple[InputColumn, ...], dict[str, str]]:
    """Returns the columns that may feed features, and a reason for each that is kept out.

    Identity, as-of time, outcome and the column to order by, by default `created_at` where there is no
    `as_of`, never feed a feature: the next leads are all later than any it learnt from. Nor does a time where
    the source has no `as_of` and leads begin with `created_at`: its age would be another one in serving.

    Raises:
        TrainingError: a column the options name is not there, or the declared set needs one that is excluded.
    """
    kinds = fetch_columns(options.url, options.source)
    known = {*kinds, "lead_id"}
    ordering = [options.order_by] if options.order_by else []
    _require_columns(options.source, known, [*options.exclude, *options.allow_leaky, *ordering])
    if options.declared:
        needed = [column.name for column in DECLARED_COLUMNS]
        _require_columns(options.source, known, [_AS_OF, *needed])
        excluded = sorted({*options.exclude, *ordering} & set(needed))
        if excluded:
            raise TrainingError(
                f"the declared features read {', '.join(excluded)}; exclude it with derived features."
            )
        return DECLARED_COLUMNS, {}
    reserved = {_EXTERNAL_REF, _AS_OF, options.label or options.outcome, *options.exclude, *ordering}
    start = _start_column(kinds)
    if not options.label or (not ordering and kinds.get(start) == "timestamp"):
        reserved.add(start)
    free = [name for name in kinds if name not in reserved]
    denied = {name: "on the deny-list: it knows the outcome" for name in free if is_denied(name)}
    if begins_at_creation(options, kinds):
        reason = (
            "a time, which would count from created_at in training and from today in serving; give "
            f"{options.source} an as_of to learn from it"
        )
        denied |= {name: reason for name in free if kinds[name] == "timestamp" and name not in denied}
    columns = tuple(InputColumn(name, kinds[name]) for name in free if name not in denied)
    if not columns:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in denied.items())
        because = f" ({reasons})" if denied else ""
        raise TrainingError(f"{options.source} has no column left to learn from{because}.")
    return columns, denied


def begins_at_creation(options: TrainingOptions, kinds: Mapping[str, ColumnKind]) -> bool:
    """Tells whether leads are taken as of their creation, which serving never does."""
    return options.label is None and _start_column(kinds) == _CREATED_AT


def fetch_rows(
    options: TrainingOptions, columns: Sequence[InputColumn], progress: Progress
) -> tuple[TrainingRows, TrainingRows, LeftOut]:
    """Reads the decided leads in the order of their IDs, and everyone, decided or not; counts the rest.

    The outcomes of `everyone`, the second of the three, mean nothing where a lead is not decided.

    With a label, a lead without one is undecided. Otherwise it is decided once its whole horizon has passed,
    also when its outcome came early: taking young leads that applied, and not those that may yet, would make
    applications look more frequent than they are. A lead whose outcome came before its as-of time is left
    out too: there was nothing left to predict. Where all outcomes are dates (midnights of whatever place),
    one of the same day came after it. Leads of a time before `options.since` do not count at all; with a
    label those of a time after `options.as_of` are left out.

    Raises:
        TrainingError: there are no leads, or a label is not 0 or 1, or the options ask for an order or a time
            that not every lead has.
        DatabaseUnavailableError: the database does not answer.
    """
    extra = _extra_columns(options, fetch_columns(options.url, options.source))
    wanted = [*columns, *(column for column in extra if column not in columns)]
    leads, lead = _read_all(options, wanted, progress)
    as_of = _as_of(options, leads)
    outcome, decided, beforehand = (
        _labels(options, leads) if options.label else _outcomes(options, leads, as_of)
    )
    features = LeadColumns(leads.n, {column.name: leads.columns[column.name] for column in columns})
    recent = _recent(options, leads)
    if not recent.any():
        raise TrainingError(f"{options.source} has no leads since {options.since:%Y-%m-%d}.")
    later = recent & _later(options, leads)
    here = recent & ~later
    if not here.any():
        raise TrainingError(f"{options.source} has no leads up to {options.as_of:%Y-%m-%d}.")
    everyone = TrainingRows(features, outcome, as_of, _order(options, leads), lead)
    left_out = LeftOut(
        undecided=int((here & ~decided & ~beforehand).sum()),
        beforehand=int((here & beforehand).sum()),
        later=int(later.sum()),
    )
    return everyone.take(decided & here), everyone.take(here), left_out


def _extra_columns(options: TrainingOptions, kinds: Mapping[str, ColumnKind]) -> list[InputColumn]:
    """Returns the columns that are read beside the features: label or outcome, as-of time, and the order."""
    start = _start_column(kinds)
    wanted: dict[str, tuple[ColumnKind, ...]]
    if options.label:
        wanted = {options.label: ("number", "boolean")}
        _require_columns(options.source, kinds, wanted)
    else:
        wanted = {options.outcome: ("timestamp",), start: ("timestamp",)}
        _require_outcome_with_time(options, kinds)
    if kinds.get(start) == "timestamp":
        wanted[start] = ("timestamp",)
    if options.order_by:
        _require_columns(options.source, kinds, [options.order_by])
        wanted[options.order_by] = ("number", "timestamp")
    for name, allowed in wanted.items():
        if kinds[name] not in allowed:
            raise TrainingError(f"{name} is a {kinds[name]}; expected a {' or '.join(allowed)}.")
    return [InputColumn(name, kinds[name]) for name in wanted]


def _start_column(kinds: Mapping[str, ColumnKind]) -> str:
    """Returns the column with the moment a lead's horizon begins: its as-of time, or else its creation."""
    return _CREATED_AT if _AS_OF not in kinds and _CREATED_AT in kinds else _AS_OF


def _read_all(
    options: TrainingOptions, columns: Sequence[InputColumn], progress: Progress
) -> tuple[LeadColumns, IntArray]:
    """Returns all rows, and the number of each one's lead (n,)."""
    pages: list[LeadColumns] = []
    another: list[bool] = []
    before = ""
    for chunk in fetch_all_chunks(options.url, options.source, columns):
        # They come in the order of their IDs.
        another += map(ne, chunk.lead_ids, [before, *chunk.lead_ids])
        before = chunk.lead_ids[-1]
        pages.append(chunk.leads)
        progress("read", sum(page.n for page in pages), 0)
    if not pages:
        raise TrainingError(f"{options.source} has no leads.")
    return LeadColumns(sum(page.n for page in pages), {
        column.name: Column(
            column.kind,
            np.concatenate([page.columns[column.name].values for page in pages]),
            np.concatenate([page.columns[column.name].present for page in pages]),
        ) for column in columns
    }), np.cumsum(another)  # fmt: skip


def _as_of(options: TrainingOptions, leads: LeadColumns) -> FloatArray:
    start = (
        _AS_OF if options.label else _start_column({name: one.kind for name, one in leads.columns.items()})
    )
    if start not in leads.columns:
        return np.full(leads.n, start_of_day(options.known_until))  # as the service would answer that day
    moments = leads.columns[start]
    if not moments.present.all():
        raise TrainingError(f"{start} is empty for some leads; every row needs the moment it is true for.")
    as_of = np.asarray(moments.values, dtype=np.float64)
    if not ((as_of >= _FIRST_MOMENT) & (as_of < _LAST_MOMENT)).all():
        raise TrainingError(f"{start} is infinite for some leads, or in no year from 1 to 9998.")
    return as_of


def _order_column(options: TrainingOptions, leads: LeadColumns) -> str | None:
    """Returns the column that says in which order leads came to be: the one asked for, or a time."""
    times = [name for name, cells in leads.columns.items() if cells.kind == "timestamp"]
    return options.order_by or next((name for name in (_AS_OF, _CREATED_AT) if name in times), None)


def _order(options: TrainingOptions, leads: LeadColumns) -> FloatArray | None:
    name = _order_column(options, leads)
    if name is None:
        return None
    cells = leads.columns[name]
    order = np.asarray(cells.values, dtype=np.float64)
    if not (cells.present & np.isfinite(order)).all():
        if name == options.order_by:
            raise TrainingError(
                f"{name} is empty or not finite for some leads; to order by it every lead needs one."
            )
        return None
    return order if order.min() < order.max() else None


def _recent(options: TrainingOptions, leads: LeadColumns) -> BoolArray:
    """Tells which leads (n,) are not of an earlier time than asked for."""
    if options.since is None:
        return np.ones(leads.n, dtype=np.bool_)
    name = _order_column(options, leads)
    if name is None or leads.columns[name].kind != "timestamp":
        raise TrainingError(
            f"since {options.since:%Y-%m-%d} needs the time of each lead, and {options.source} has no as_of "
            "or created_at; name another timestamp column with --order-by."
        )
    if not leads.columns[name].present.all():
        raise TrainingError(f"{name} is empty for some leads; nobody can tell whether they came since then.")
    moments = np.asarray(leads.columns[name].values, dtype=np.float64)
    recent: BoolArray = moments >= options.since.timestamp()
    return recent


def _later(options: TrainingOptions, leads: LeadColumns) -> BoolArray:
    """Tells which leads (n,) came after the as-of time asked for: nobody knew of them then.

    Without a label they are undecided, as their horizon has not passed.
    """
    name = _order_column(options, leads)
    if not options.label or options.as_of is None or name is None or leads.columns[name].kind != "timestamp":
        return np.zeros(leads.n, dtype=np.bool_)
    cells = leads.columns[name]
    later: BoolArray = cells.present & (np.asarray(cells.values, dtype=np.float64) > options.known_until)
    return later


def _labels(options: TrainingOptions, leads: LeadColumns) -> tuple[IntArray, BoolArray, BoolArray]:
    label = leads.columns[str(options.label)]
    values = np.asarray(label.values, dtype=np.float64)
    if not np.isin(values[label.present], (0.0, 1.0)).all():
        raise TrainingError(f"the label {options.label} has values other than 0 and 1.")
    return (label.present & (values == 1)).astype(np.int64), label.present, np.zeros(leads.n, dtype=np.bool_)


def _outcomes(
    options: TrainingOptions, leads: LeadColumns, as_of: FloatArray
) -> tuple[IntArray, BoolArray, BoolArray]:
    """Returns outcomes, which of them are decided, and which came before the as-of time; each (n,)."""
    column = leads.columns[options.outcome]
    end = as_of + options.horizon_days * _SECONDS_PER_DAY
    happened = np.where(column.present, np.asarray(column.values, dtype=np.float64), np.inf)
    if _are_dates(happened[np.isfinite(happened)]):
        beforehand = happened + _SECONDS_PER_DAY <= as_of
    else:
        beforehand = happened < as_of
    return (happened <= end).astype(np.int64), (end <= options.known_until) & ~beforehand, beforehand


def _are_dates(moments: FloatArray) -> bool:
    """Tells whether moments are all midnights of one place: one time of day, or two where clocks change."""
    times = np.unique(moments % _SECONDS_PER_DAY)
    apart = np.isin(np.diff(times), (_SECONDS_PER_HOUR, _SECONDS_PER_DAY - _SECONDS_PER_HOUR))
    return bool(len(times) <= 2 and apart.all() and (times % (_SECONDS_PER_HOUR / 4) == 0).all())


def _require_outcome_with_time(options: TrainingOptions, kinds: Mapping[str, ColumnKind]) -> None:
    """The outcome of a lead is a time, unless a label is named: who forgot to is told so."""
    remedy = "name a yes-or-no column with --label"
    _require_columns(options.source, kinds, [options.outcome], f"; {remedy}, or a time with --outcome.")
    if kinds[options.outcome] != "timestamp":
        raise TrainingError(f"{options.outcome} is a {kinds[options.outcome]}, not a time; {remedy}.")
    if _start_column(kinds) not in kinds:
        raise TrainingError(
            f"{options.source} has no column as_of or created_at, from which the time to an outcome counts; "
            f"{remedy} where there is no such time."
        )


def _require_columns(source: str, known: Iterable[str], wanted: Iterable[str], otherwise: str = ".") -> None:
    for name in wanted:
        if name not in known:
            close = get_close_matches(name, list(known), 1)
            hint = f"; did you mean {close[0]}?" if close else otherwise
            raise TrainingError(f"{source} has no column {name} that can be read{hint}")
