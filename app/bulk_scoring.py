"""Scores every lead of a source into `lead_scores`, a page at a time, in constant memory.

A score in the table and a score over HTTP come from the same lines (`score_leads`). Never decides which model
serves. Called by the `leadscore score` command.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from app.ai.model_bundle import ModelBundle
from app.ai.predictor import ScoringPolicy, score_leads
from app.db.bulk_copy import open_connection
from app.db.lead_scores import LeadScoreWriter
from app.db.leads import count_leads, fetch_all_chunks

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ScoringSummary:
    """What became of a source: leads read, scored, and declined because their data cannot be made safe."""

    source: str
    model_version: str
    leads: int
    scored: int
    rejected: int


def score_source(
    url: str, source: str, bundle: ModelBundle, *, as_of: datetime, policy: ScoringPolicy, progress: Progress
) -> ScoringSummary:
    """Scores the relation `source` as of `as_of`; pages already written stay when a later one fails.

    Raises:
        DatabaseUnavailableError: the database cannot be reached, or went away.
        CommandError: the relation lacks a column the model reads, or the schema is not migrated.
    """
    leads = scored = 0
    total = count_leads(url, source)
    scored_at = datetime.now(UTC).isoformat()
    with open_connection(url, autocommit=True) as connection:
        writer = LeadScoreWriter(connection)
        for chunk in fetch_all_chunks(url, source, bundle.input_columns):
            result = score_leads(bundle, chunk.leads, as_of.timestamp(), policy)
            rows = np.flatnonzero(~result.rejected)
            writer.write_scores(chunk, rows.tolist(), result.answers, bundle.ref, scored_at)
            leads += chunk.leads.n
            scored += rows.size
            progress("score", leads, total)
    return ScoringSummary(source, bundle.ref.version, leads, scored, leads - scored)
