"""The table of scores that bulk scoring fills: one row for each lead, the latest word on it.

Never computes a score. Called by `app.bulk_scoring`.
"""

from collections.abc import Iterable

import psycopg

from app.ai.domain import VERDICTS, AnswerArray, ModelRef
from app.db.lead_cells import LeadChunk

_STAGE = "CREATE TEMP TABLE stage (LIKE lead_scores INCLUDING DEFAULTS) ON COMMIT DELETE ROWS"
_VALUES = (
    "external_ref", "probability", "raw_score", "coverage",
    "verdict", "model_version", "model_sha256", "scored_at",
)  # fmt: skip
_COPY = f"COPY stage (lead_id, {', '.join(_VALUES)}) FROM STDIN"
_UPSERT = (
    f"INSERT INTO lead_scores (lead_id, {', '.join(_VALUES)}) SELECT lead_id, {', '.join(_VALUES)} FROM stage"  # noqa: S608  names of our own
    f" ON CONFLICT (lead_id) DO UPDATE SET {', '.join(f'{name} = EXCLUDED.{name}' for name in _VALUES)}"
)


class LeadScoreWriter:
    """Writes pages of scores over one connection, each whole or not at all; writing again changes nothing."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        with connection.transaction():
            connection.execute(_STAGE)

    def write_scores(
        self, chunk: LeadChunk, rows: Iterable[int], answers: AnswerArray, model: ModelRef, scored_at: str
    ) -> None:
        """Writes the answers of these rows of a page (`answers` has one entry for each lead of the page)."""
        refs = chunk.external_refs
        with self._connection.transaction():
            with self._connection.cursor() as cursor, cursor.copy(_COPY) as copy:
                for row in rows:
                    answer = answers[row]
                    copy.write_row((
                        chunk.lead_ids[row],
                        refs.values[row] if refs is not None and refs.present[row] else None,
                        float(answer["probability"]), float(answer["raw_score"]), float(answer["coverage"]),
                        VERDICTS[answer["verdict"]], model.version, model.sha256, scored_at,
                    ))  # fmt: skip
            self._connection.execute(_UPSERT)
