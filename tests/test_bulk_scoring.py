"""Scoring a whole source: the same numbers as over HTTP, written page by page, as often as one likes."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import psycopg
import pytest

from app.ai.domain import VERDICTS
from app.ai.predictor import ScoringPolicy, score_leads
from app.bulk_scoring import score_source
from app.db.engine import Database
from app.db.leads import PostgresLeadSource
from app.errors import CommandError
from tests.lead_models import build_lead_bundle

AS_OF = datetime(2026, 6, 1, tzinfo=UTC)
POLICY = ScoringPolicy(min_coverage=0.6, confidence_method="max_probability")
BUNDLE = build_lead_bundle()


@pytest.fixture
def leads_url(database_url: str) -> str:
    """A database with 45,000 leads in a table of their own: more than two pages."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "CREATE TABLE leads AS SELECT gen_random_uuid() AS lead_id, 'L-' || n AS external_ref,"
            " timestamptz '2026-05-01Z' - n * interval '1 minute' AS created_at,"
            " (ARRAY['referral', 'website', 'fair', NULL])[1 + n % 4] AS source, n % 7 AS touchpoint_count,"
            " CASE WHEN n % 5 > 0 THEN 1 + n % 300 / 100.0 END AS gpa, n % 90 / 7.0 AS minutes_on_site,"
            " n % 2 = 0 AS newsletter_opt_in,"
            # A fee that is not a number makes a lead impossible to score with this model.
            " CASE WHEN n % 1000 = 0 THEN 'NaN'::numeric ELSE 5000 END AS tuition_fee"
            " FROM generate_series(1, 45000) n"
        )
    return database_url


def _score(
    url: str, source: str = "leads", progress: Callable[[str, int, int], None] = lambda *_: None
) -> Any:
    return score_source(url, source, BUNDLE, as_of=AS_OF, policy=POLICY, progress=progress)


def _all(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(statement).fetchall()


async def test_the_table_holds_what_a_request_would_answer_bit_for_bit(leads_url: str) -> None:
    summary = _score(leads_url)
    assert (summary.leads, summary.scored, summary.rejected) == (45_000, 44_955, 45)
    rows = _all(
        leads_url,
        "SELECT lead_id::text, external_ref, raw_score, probability, coverage, verdict FROM lead_scores"
        " ORDER BY md5(external_ref) LIMIT 500",
    )
    database = Database(leads_url, pool_size=1, deadline_seconds=5)
    try:
        fetched = await PostgresLeadSource(database, "leads").fetch(
            [row[1] for row in rows], BUNDLE.input_columns
        )
    finally:
        await database.close()
    answers = score_leads(BUNDLE, fetched.leads, AS_OF.timestamp(), POLICY).answers[fetched.row_of]
    for column, name in ((2, "raw_score"), (3, "probability"), (4, "coverage")):
        assert np.array_equal(np.array([row[column] for row in rows]), answers[name])
    assert [row[5] for row in rows] == [VERDICTS[code] for code in answers["verdict"]]
    assert len(np.unique(answers["probability"])) > 100


def test_every_row_says_which_model_and_when(leads_url: str) -> None:
    _score(leads_url)
    assert _all(
        leads_url, "SELECT DISTINCT model_version, model_sha256, count(*) FROM lead_scores GROUP BY 1, 2"
    ) == [(BUNDLE.ref.version, BUNDLE.ref.sha256, 44_955)]
    assert _all(leads_url, "SELECT count(DISTINCT scored_at) FROM lead_scores") == [(1,)]


def test_scoring_again_changes_nothing_but_the_time(leads_url: str) -> None:
    statement = (
        "SELECT lead_id, external_ref, probability, raw_score, coverage, verdict FROM lead_scores ORDER BY 1"
    )
    _score(leads_url)
    first, at = _all(leads_url, statement), _all(leads_url, "SELECT max(scored_at) FROM lead_scores")
    _score(leads_url)
    assert _all(leads_url, statement) == first
    assert _all(leads_url, "SELECT min(scored_at) FROM lead_scores") > at


def test_pages_are_whole_and_stay_when_a_later_one_fails(leads_url: str) -> None:
    with psycopg.connect(leads_url) as connection:
        # The last lead in the order of reading cannot be written.
        connection.execute(
            "UPDATE leads SET lead_id = 'ffffffff-ffff-ffff-ffff-ffffffffffff' WHERE external_ref = 'L-1'"
        )
        connection.execute("ALTER TABLE lead_scores ADD CHECK (external_ref <> 'L-1')")
    told: list[tuple[str, int, int]] = []
    with pytest.raises(psycopg.errors.CheckViolation):
        _score(leads_url, progress=lambda *step: told.append(step))
    written = {lead_id for (lead_id,) in _all(leads_url, "SELECT lead_id FROM lead_scores")}
    pages = _all(leads_url, "SELECT lead_id FROM leads WHERE tuition_fee <> 'NaN' ORDER BY lead_id")
    assert told[-1][1] == 40_000
    assert written == {lead_id for (lead_id,) in pages[: len(written)]}
    assert 39_900 < len(written) < 40_000


def test_a_source_without_references_is_scored_too(leads_url: str) -> None:
    with psycopg.connect(leads_url) as connection:
        connection.execute("ALTER TABLE leads DROP COLUMN external_ref")
        connection.execute("DELETE FROM leads WHERE lead_id NOT IN (SELECT lead_id FROM leads LIMIT 10)")
    _score(leads_url)
    rows = _all(leads_url, "SELECT external_ref FROM lead_scores")
    assert set(rows) == {(None,)}


def test_an_empty_source_is_no_error(database_url: str) -> None:
    summary = _score(database_url, "lead_source")
    assert (summary.leads, summary.scored) == (0, 0)


def test_a_source_that_lacks_a_column_is_one_clear_line(leads_url: str) -> None:
    with psycopg.connect(leads_url) as connection:
        connection.execute("ALTER TABLE leads DROP COLUMN gpa")
    with pytest.raises(CommandError, match="gpa"):
        _score(leads_url)


def test_a_database_without_the_schema_says_what_to_do(empty_database_url: str) -> None:
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("CREATE TABLE leads (lead_id uuid)")
    with pytest.raises(CommandError, match="leadscore db upgrade"):
        _score(empty_database_url)
