"""Scoring a whole source: the same numbers as over HTTP, written page by page, as often as one likes."""

import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psycopg
import pytest

from app.ai.domain import VERDICTS
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.predictor import ScoringPolicy, score_leads
from app.bulk_scoring import score_source
from app.db.engine import Database
from app.db.leads import PostgresLeadSource
from app.errors import CommandError
from tests.fakes import fetch_at_once
from tests.lead_models import build_lead_bundle, publish_lead_model
from tests.service import ROOT

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


def _score(url: str, source: str = "leads", **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "bundle": BUNDLE, "as_of": AS_OF, "policy": POLICY, "progress": lambda *_: None, **options,
    }  # fmt: skip
    return score_source(url, source, **arguments)


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
        fetched = await fetch_at_once(
            PostgresLeadSource(database, "leads"), [row[1] for row in rows], BUNDLE.input_columns
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


def test_scoring_again_writes_nothing(leads_url: str) -> None:
    # The place of a row, and the transaction that wrote it, tell of any write, even of the same values.
    statement = "SELECT ctid::text, xmin::text, xmax::text, * FROM lead_scores ORDER BY lead_id"
    assert _score(leads_url).written == 44_955
    first = _all(leads_url, statement)
    again = _score(leads_url)
    assert (again.leads, again.scored, again.written, again.removed) == (45_000, 44_955, 0, 0)
    assert _all(leads_url, statement) == first


def test_only_leads_that_changed_are_written_again(leads_url: str) -> None:
    _score(leads_url)
    before = dict(_all(leads_url, "SELECT external_ref, scored_at FROM lead_scores"))
    with psycopg.connect(leads_url) as connection:
        connection.execute("UPDATE leads SET gpa = 1.5 WHERE external_ref = 'L-7'")
    assert _score(leads_url).written == 1
    after = dict(_all(leads_url, "SELECT external_ref, scored_at FROM lead_scores"))
    assert [ref for ref in after if after[ref] != before[ref]] == ["L-7"]


def test_leads_that_are_gone_or_declined_now_lose_their_scores(leads_url: str) -> None:
    _score(leads_url)
    with psycopg.connect(leads_url) as connection:
        connection.execute("UPDATE leads SET tuition_fee = 'NaN' WHERE external_ref = 'L-7'")
        connection.execute("DELETE FROM leads WHERE external_ref = 'L-8'")
        # The first and the last that have a score: a lead that never could be scored has none to lose.
        for order in ("ASC", "DESC"):
            connection.execute(
                "DELETE FROM leads WHERE lead_id IN (SELECT lead_id FROM leads WHERE tuition_fee <> 'NaN'"
                f" ORDER BY lead_id {order} LIMIT 3)"
            )
        # Scores of another source are none of this run's business.
        connection.execute(
            "INSERT INTO lead_scores SELECT gen_random_uuid(), 'other-' || n, 0.5, 0.5, 1, 'ok', 'v', 'sha',"
            " now(), 'elsewhere' FROM generate_series(1, 100) n"
        )
    summary = _score(leads_url)
    assert (summary.written, summary.removed) == (0, 8)
    assert _all(
        leads_url,
        "SELECT count(*), count(*) FILTER (WHERE source = 'elsewhere'),"
        " count(*) FILTER (WHERE external_ref IN ('L-7', 'L-8')) FROM lead_scores",
    ) == [(44_955 - 8 + 100, 100, 0)]


def test_a_source_is_one_however_its_name_is_spelled(leads_url: str) -> None:
    with psycopg.connect(leads_url) as connection:
        connection.execute("DELETE FROM leads WHERE lead_id NOT IN (SELECT lead_id FROM leads LIMIT 50)")
        connection.execute("UPDATE leads SET tuition_fee = 1")
    _score(leads_url, "leads")
    with psycopg.connect(leads_url) as connection:
        connection.execute("DELETE FROM leads WHERE lead_id IN (SELECT lead_id FROM leads LIMIT 1)")
    summary = _score(leads_url, "public.leads")
    assert (summary.leads, summary.written, summary.removed) == (49, 0, 1)
    assert _all(leads_url, "SELECT source, leads FROM lead_score_runs") == [("leads", 49)]


def test_a_source_that_became_empty_leaves_no_scores(leads_url: str) -> None:
    _score(leads_url)
    with psycopg.connect(leads_url) as connection:
        connection.execute("TRUNCATE leads")
    assert _score(leads_url).removed == 44_955
    assert _all(leads_url, "SELECT count(*) FROM lead_scores") == [(0,)]


_KILLED = """
import os, pathlib, signal, sys
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from tests.test_bulk_scoring import _score

def progress(_stage, done, _total):
    if done >= 6000:
        os.kill(os.getpid(), signal.SIGKILL)

bundle = ModelRegistry(ModelCatalogue(pathlib.Path(sys.argv[2]))).load()
_score(sys.argv[1], bundle=bundle, progress=progress, page_leads=2000)
"""


def test_a_killed_run_goes_on_where_it_stopped_and_ends_as_if_it_had_not_been(
    leads_url: str, tmp_path: Path
) -> None:
    publish_lead_model(tmp_path)
    command = [sys.executable, "-c", _KILLED, leads_url, str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    told: list[int] = []
    bundle = ModelRegistry(ModelCatalogue(tmp_path)).load()
    summary = _score(
        leads_url, bundle=bundle, page_leads=2000, progress=lambda _stage, done, _total: told.append(done)
    )
    assert summary.resumed in (6000, 8000), "the page that was being written may have been committed"
    assert told[0] == summary.resumed
    assert (summary.leads, summary.scored, summary.rejected) == (45_000, 44_955, 45)
    assert summary.written <= 45_000 - summary.resumed
    assert _all(leads_url, "SELECT count(*), count(DISTINCT scored_at) FROM lead_scores") == [(44_955, 2)]
    # A run from the start finds every score as it would write it.
    assert _score(leads_url, bundle=bundle).written == 0


class _StoppedError(Exception):
    """What a test raises to stop a run after some pages."""


def _score_partly(url: str, **options: Any) -> None:
    def stop(_stage: str, done: int, _total: int) -> None:
        if done >= 6000:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        _score(url, progress=stop, page_leads=2000, **options)


@pytest.mark.parametrize(
    "changed",
    [
        {"bundle": build_lead_bundle("20260202_120000", seed=2)},
        {"bundle": replace(BUNDLE, ref=msgspec.structs.replace(BUNDLE.ref, manifest_sha256="f" * 64))},
        {"as_of": datetime(2026, 6, 2, tzinfo=UTC)},
        {"policy": ScoringPolicy(min_coverage=0.9, confidence_method="max_probability")},
    ],
    ids=["model", "manifest", "day", "policy"],
)
def test_an_unfinished_run_of_another_model_day_or_policy_is_not_continued(
    leads_url: str, changed: dict[str, Any]
) -> None:
    _score_partly(leads_url)
    summary = _score(leads_url, **changed)
    assert (summary.resumed, summary.leads) == (0, 45_000)
    sha256 = changed.get("bundle", BUNDLE).ref.sha256
    assert _all(leads_url, "SELECT DISTINCT model_sha256 FROM lead_scores") == [(sha256,)]
    assert _score(leads_url, **changed).written == 0


@pytest.mark.parametrize(("minutes", "continued"), [(50, True), (60, False)])
def test_a_run_that_began_an_hour_ago_is_not_continued(leads_url: str, minutes: int, continued: bool) -> None:
    _score_partly(leads_url)
    with psycopg.connect(leads_url) as connection:
        connection.execute(
            "UPDATE lead_score_runs SET started_at = started_at - %s * interval '1 minute'", [minutes]
        )
        connection.execute(
            "DELETE FROM leads WHERE lead_id = (SELECT lead_id FROM lead_scores ORDER BY lead_id LIMIT 1)"
        )
    summary = _score(leads_url)
    assert (summary.resumed > 0, summary.removed) == ((True, 0) if continued else (False, 1))


def test_a_finished_run_begins_anew(leads_url: str) -> None:
    _score_partly(leads_url)
    assert _score(leads_url).resumed >= 6000
    assert _score(leads_url).resumed == 0


def test_two_runs_at_once_are_refused(leads_url: str) -> None:
    def start_another(_stage: str, _done: int, _total: int) -> None:
        _score(leads_url)

    with pytest.raises(CommandError, match="another `leadscore score`"):
        _score(leads_url, progress=start_another)


def test_rows_that_share_an_id_are_declined_wherever_a_page_ends(leads_url: str) -> None:
    with psycopg.connect(leads_url) as connection:
        connection.execute("DELETE FROM leads WHERE lead_id NOT IN (SELECT lead_id FROM leads LIMIT 50)")
        connection.execute("UPDATE leads SET tuition_fee = 1")
        connection.execute("INSERT INTO leads SELECT * FROM leads ORDER BY lead_id LIMIT 9 OFFSET 20")
    for page_leads in (1, 7, 25):
        summary = _score(leads_url, page_leads=page_leads)
        assert (summary.leads, summary.scored, summary.rejected) == (59, 41, 18)
    assert _all(leads_url, "SELECT count(*) FROM lead_scores") == [(41,)]


def test_memory_does_not_grow_with_the_source(leads_url: str) -> None:
    with psycopg.connect(leads_url) as connection:
        connection.execute("CREATE TABLE few AS SELECT * FROM leads LIMIT 5000")

    def peak(source: str) -> int:
        tracemalloc.start()
        try:
            _score(leads_url, source, page_leads=500)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak("few")
    assert peak("leads") < 1.5 * peak("few")


def test_pages_are_whole_and_stay_when_a_later_one_fails(leads_url: str) -> None:
    with psycopg.connect(leads_url) as connection:
        # The last lead in the order of reading cannot be written.
        connection.execute(
            "UPDATE leads SET lead_id = 'ffffffff-ffff-ffff-ffff-ffffffffffff' WHERE external_ref = 'L-1'"
        )
        connection.execute("ALTER TABLE lead_scores ADD CHECK (external_ref <> 'L-1')")
    told: list[tuple[str, int, int]] = []
    with pytest.raises(CommandError, match=r"lead_scores cannot be written \(SQLSTATE 23514\)"):
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
