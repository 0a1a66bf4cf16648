"""One honest fake for each protocol: they keep the protocol's promises, and nothing else."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from app.ai.domain import (
    AMBIGUOUS_LEAD,
    UNKNOWN_LEAD,
    Column,
    FetchedLeads,
    InputColumn,
    LeadColumns,
    LeadSource,
    StoredEvent,
    UsePart,
)
from app.ai.events import Event
from app.ai.model_bundle import ModelBundle
from app.errors import LeadScoringError
from app.security.api_keys import ApiKey


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeLeadSource:
    """Leads in memory: canonical ID -> column -> value (None for NULL), or "ambiguous".

    `error` is raised instead of answering while it is set; `asked` holds the IDs of every call. With a `gate`
    an answer, as of the call, waits until the gate is open; `reached` tells that one does. With `part_leads`
    more IDs are answered in parts, the first of them twice, as after a connection that broke.
    """

    def __init__(self, leads: Mapping[str, Mapping[str, object] | str]) -> None:
        self.leads = dict(leads)
        self.error: Exception | None = None
        self.asked: list[list[str]] = []
        self.gate: asyncio.Event | None = None
        self.reached = asyncio.Event()
        self.part_leads: int | None = None

    async def fetch(self, lead_ids: Sequence[str], columns: Sequence[InputColumn], use_part: UsePart) -> None:
        self.asked.append(list(lead_ids))
        if self.error is not None:
            raise self.error
        size = self.part_leads or len(lead_ids)
        starts = range(0, len(lead_ids), size)
        parts = [(first, self._find(lead_ids[first : first + size], columns)) for first in starts]
        if self.gate is not None:
            self.reached.set()
            await self.gate.wait()
        for first, found in [*parts[: len(parts) > 1], *parts]:
            use_part(first, found)

    def _find(self, lead_ids: Sequence[str], columns: Sequence[InputColumn]) -> FetchedLeads:
        rows: list[Mapping[str, object]] = []
        row_of = np.full(len(lead_ids), UNKNOWN_LEAD)
        for index, lead_id in enumerate(lead_ids):
            lead = self.leads.get(lead_id)
            if isinstance(lead, str):
                row_of[index] = AMBIGUOUS_LEAD
            elif lead is not None:
                row_of[index] = len(rows)
                rows.append(lead)
        return FetchedLeads(row_of, lead_ids, build_columns(rows, columns))


def build_columns(rows: Sequence[Mapping[str, object]], columns: Sequence[InputColumn]) -> LeadColumns:
    """Returns rows of values as columns."""
    return LeadColumns(len(rows), {column.name: _build_column(rows, column) for column in columns})


def _build_column(rows: Sequence[Mapping[str, object]], column: InputColumn) -> Column:
    given = [row.get(column.name) for row in rows]
    present = np.array([value is not None for value in given], np.bool_)
    if column.kind == "text":
        texts = np.array(["" if value is None else value for value in given], object)
        return Column(column.kind, texts, present)
    numbers = np.array([np.nan if value is None else float(value) for value in given], np.float64)  # type: ignore[arg-type]
    return Column(column.kind, numbers, present)


class FakeModels:
    """A model that simply serves, or an error instead."""

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle
        self.error: LeadScoringError | None = None

    async def active(self) -> ModelBundle:
        if self.error is not None:
            raise self.error
        return self.bundle


class FakeEventSink:
    """Keeps what is written, by event ID; `error` is raised instead while it is set."""

    def __init__(self) -> None:
        self.events: dict[str, StoredEvent] = {}
        self.error: LeadScoringError | None = None

    async def write_events(self, events: Sequence[StoredEvent]) -> None:
        if self.error is not None:
            raise self.error
        for event in events:
            self.events.setdefault(event.id, event)


class FakeTelemetry:
    """Keeps every event; `error` is raised instead while it is set."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.error: LeadScoringError | None = None

    async def record(
        self,
        build: Callable[[], Event],
        request_id: str | None = None,
        *,
        deadline_seconds: float | None = None,
        under_way: int = 0,
    ) -> None:
        if self.error is not None:
            raise self.error
        self.events.append(build())

    def submit(self, build: Callable[[], Event], request_id: str | None = None) -> None:
        self.events.append(build())

    def backlog(self) -> int:
        return 0

    def state(self) -> str:
        return "ok" if self.error is None else "unavailable"


class FakeKeySource:
    """API keys in memory; `error` is raised instead while it is set.

    `failed` tells that it was, `answered` that it was not.
    """

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self.keys = list(keys)
        self.error: Exception | None = None
        self.failed, self.answered = asyncio.Event(), asyncio.Event()

    async def fetch_keys(self) -> list[ApiKey]:
        (self.answered if self.error is None else self.failed).set()
        if self.error is not None:
            raise self.error
        return list(self.keys)


async def fetch_at_once(
    source: LeadSource, lead_ids: Sequence[str], columns: Sequence[InputColumn]
) -> FetchedLeads:
    """Returns what a lead source hands over, its parts put together."""
    handed: dict[int, FetchedLeads] = {}
    await source.fetch(lead_ids, columns, handed.__setitem__)
    parts = [part for _, part in sorted(handed.items())]
    rows, row_of = 0, []
    for part in parts:
        row_of.append(np.where(part.row_of < 0, part.row_of, part.row_of + rows))
        rows += part.leads.n
    joined = {
        name: Column(
            parts[0].leads.columns[name].kind,
            np.concatenate([part.leads.columns[name].values for part in parts]),
            np.concatenate([part.leads.columns[name].present for part in parts]),
        )
        for name in parts[0].leads.columns
    }
    uuid_of = [uuid for part in parts for uuid in part.uuid_of]
    return FetchedLeads(np.concatenate(row_of), uuid_of, LeadColumns(rows, joined))
