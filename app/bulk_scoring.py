"""Scores every lead of a source into `lead_scores`, a page at a time, in constant memory.

While one page is scored, the next is read and the one before is written, each on a thread of its own; the
database works in two processes and the compiled model without the interpreter's lock, so that both cores are
busy. A score in the table and a score over HTTP come from the same lines (`score_leads`). Never decides which
model serves. Called by the `leadscore score` command.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from app.ai.domain import Progress
from app.ai.model_bundle import ModelBundle
from app.ai.predictor import ScoringPolicy, score_leads
from app.db.command_connection import open_connection
from app.db.lead_pages import PAGE_LEADS, LeadPage, read_pages
from app.db.lead_scores import WRITER_NEEDS, LeadScoreWriter, RunKey
from app.db.leads import count_leads


@dataclass(frozen=True, slots=True)
class ScoringSummary:
    """What became of a source.

    Leads read, scored, and declined: their data cannot be made safe, or more than one row has their ID.
    `resumed` of the leads were done by an earlier process. `written` scores are new or another than before,
    and `removed` ones are of leads that are gone or declined now.
    """

    source: str
    model_version: str
    leads: int
    scored: int
    rejected: int
    resumed: int
    written: int
    removed: int


def score_source(
    url: str,
    source: str,
    bundle: ModelBundle,
    *,
    as_of: datetime,
    policy: ScoringPolicy,
    progress: Progress,
    page_leads: int = PAGE_LEADS,
) -> ScoringSummary:
    """Scores the relation `source` as of `as_of`; pages already written stay when a later one fails.

    An unfinished run of the same source, model, moment and policy is continued after its last page, if it
    began within the last hour. A run over leads that did not change changes nothing.

    Raises:
        DatabaseUnavailableError: the database cannot be reached, or went away.
        CommandError: the relation lacks a column the model reads or cannot be read, the schema is not
            migrated, a right is missing, scores cannot be written, or another process is writing them.
    """
    total = count_leads(url, source)
    key = RunKey(source, bundle.ref, as_of, policy.min_coverage)
    failure = "lead_scores cannot be written"
    with open_connection(url, needs=WRITER_NEEDS, failure=failure, autocommit=True) as connection:
        writer = LeadScoreWriter(connection, key)
        resumed = writer.state.leads
        progress("score", resumed, total)
        pages = read_pages(
            url, source, bundle.input_columns, after=writer.state.last_id, page_leads=page_leads
        )
        writing: Future[None] | None = None
        # The threads end before the pages are closed: a page under way cannot be.
        with closing(pages), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as copier:
            for page in _read_ahead(pages, reader):
                result = score_leads(bundle, page.leads, as_of.timestamp(), policy)
                rows = np.flatnonzero(~(result.rejected | page.repeated))
                if writing is not None:
                    writing.result()
                    progress("score", writer.state.leads, total)
                writing = copier.submit(writer.write_page, page, rows, result.answers)
            if writing is not None:
                writing.result()
        writer.finish()
        state = writer.state
        progress("score", state.leads, max(state.leads, total))
    return ScoringSummary(
        source, bundle.ref.version, state.leads, state.scored, state.leads - state.scored,
        resumed, writer.written, writer.removed,
    )  # fmt: skip


def _read_ahead(pages: Iterator[LeadPage], reader: Executor) -> Iterator[LeadPage]:
    """Yields the pages, while the next one, and only that, is being read."""
    coming = reader.submit(next, pages, None)
    while (page := coming.result()) is not None:
        coming = reader.submit(next, pages, None)
        yield page
