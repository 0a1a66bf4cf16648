"""The demo CRM: reproducible, plausible, learnable, and silent about the outcome."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from app.db.demo_crm import has_people, load_demo
from app.db.demo_words import MAIL_DOMAINS, PHONE_PREFIXES
from app.errors import CommandError

UNTIL = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
PEOPLE = 10_040  # more than one block
TABLES = ("campuses", "programmes", "people", "touchpoints", "applications")
ATTRIBUTES = """
    lead_id, external_ref, created_at, source, programme, programme_level, study_mode, campus, tuition_fee,
    intake_at, country, education_level, gpa, has_phone, newsletter_opt_in, first_response_minutes,
    touchpoint_count, inbound_count, emails_opened, calls_answered, events_attended, minutes_on_site,
    last_touch_at, prior_applications
"""


@pytest.fixture(scope="module")
def crm_url(create_database: Callable[..., str], migrated_template: str) -> str:
    url = create_database("large_crm", migrated_template)
    load_demo(url, people=PEOPLE, seed=1, until=UNTIL)
    return url


def _all(url: str, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        connection.execute("SET TIME ZONE 'UTC'")
        return connection.execute(statement, parameters).fetchall()


def _one(url: str, statement: str, *parameters: object) -> Any:
    return _all(url, statement, *parameters)[0][0]


def _digest(url: str) -> str:
    rows = [_all(url, f"SELECT * FROM {table} ORDER BY id") for table in TABLES]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def test_the_same_seed_gives_the_same_rows_and_another_seed_does_not(
    create_database: Callable[..., str], migrated_template: str
) -> None:
    digests = []
    for name, seed in (("demo_a", 5), ("demo_b", 5), ("demo_c", 6)):
        url = create_database(name, migrated_template)
        load_demo(url, people=200, seed=seed, until=UNTIL)
        digests.append(_digest(url))
    assert digests[0] == digests[1] != digests[2]


def test_the_summary_counts_what_is_there(database_url: str) -> None:
    told: list[tuple[str, int, int]] = []
    summary = load_demo(
        database_url, people=30, seed=2, until=UNTIL, progress=lambda *step: told.append(step)
    )
    counts = {table: _one(database_url, f"SELECT count(*) FROM {table}") for table in TABLES}
    assert counts == {table: getattr(summary, table) for table in TABLES}
    assert summary.first_enquiry == _one(database_url, "SELECT min(created_at) FROM people")
    assert told == [("people", 30, 30)]


def test_one_person_is_enough(database_url: str) -> None:
    load_demo(database_url, people=1, seed=0, until=UNTIL)
    assert _all(database_url, "SELECT external_ref FROM lead_source") == [("lead_1",)]


def test_a_database_with_people_is_refused_and_left_as_it_is(database_url: str) -> None:
    assert not has_people(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("INSERT INTO people (id, created_at) VALUES (gen_random_uuid(), now())")
    assert has_people(database_url)
    with pytest.raises(CommandError, match="already has people"):
        load_demo(database_url, people=10, seed=1, until=UNTIL)
    assert _one(database_url, "SELECT count(*) FROM people") == 1
    assert _one(database_url, "SELECT count(*) FROM programmes") == 0


def test_a_database_without_the_schema_says_what_to_do(empty_database_url: str) -> None:
    with pytest.raises(CommandError, match="leadscore db upgrade"):
        load_demo(empty_database_url, people=10, seed=1, until=UNTIL)


def test_the_crm_can_go_on_writing_after_the_load(database_url: str) -> None:
    load_demo(database_url, people=20, seed=1, until=UNTIL)
    with psycopg.connect(database_url) as connection:
        touched = connection.execute(
            "INSERT INTO touchpoints (person_id, kind, direction, occurred_at)"
            " SELECT id, 'message', 'inbound', now() FROM people LIMIT 1"
        )
        applied = connection.execute(
            "INSERT INTO applications (person_id, submitted_at) SELECT id, now() FROM people LIMIT 1"
        )
        assert (touched.rowcount, applied.rowcount) == (1, 1)


def test_leads_are_numbered_from_one_and_the_first_differ_in_age(crm_url: str) -> None:
    refs = _all(crm_url, "SELECT external_ref FROM people")
    assert {ref for (ref,) in refs} == {f"lead_{number}" for number in range(1, PEOPLE + 1)}
    first = [f"lead_{number}" for number in range(1, 9)]
    ages = [
        age
        for (age,) in _all(
            crm_url, "SELECT %s - created_at FROM people WHERE external_ref = ANY(%s)", UNTIL, first
        )
    ]
    assert min(ages) < timedelta(days=30)
    assert max(ages) > timedelta(days=300)
    gaps = np.diff(sorted(age.days for age in ages))
    assert gaps.min() >= 5


def test_nothing_happens_after_the_end(crm_url: str) -> None:
    for table, moment in (
        ("people", "created_at"),
        ("touchpoints", "occurred_at"),
        ("applications", "submitted_at"),
    ):
        assert _one(crm_url, f"SELECT max({moment}) FROM {table}") <= UNTIL


def test_personal_data_can_reach_nobody(crm_url: str) -> None:
    people = _all(crm_url, "SELECT email, phone FROM people")
    assert {email.rsplit("@")[1] for email, _ in people} == set(MAIL_DOMAINS)
    assert all(phone is None or phone[:-3] in PHONE_PREFIXES for _, phone in people)
    assert len({email for email, _ in people}) == PEOPLE


@pytest.mark.parametrize(
    "column",
    [
        "phone",
        "birth_date",
        "notes",
        "country",
        "education_level",
        "gpa",
        "programme_id",
        "intake_at",
        "newsletter_opt_in",
    ],
)
def test_a_fifth_to_a_half_of_every_optional_field_is_missing(crm_url: str, column: str) -> None:
    assert 0.18 < _one(crm_url, f"SELECT avg(({column} IS NULL)::int) FROM people") < 0.52


def test_sources_seasons_and_programmes_show(crm_url: str) -> None:
    applied = "EXISTS (SELECT FROM applications a WHERE a.person_id = p.id AND a.submitted_at > p.created_at)"
    rates = dict(_all(crm_url, f"SELECT source, avg(({applied})::int)::float8 FROM people p GROUP BY source"))
    assert rates["Referral"] > 1.5 * rates["Social media"]
    by_programme = _all(
        crm_url,
        f"SELECT avg(({applied})::int)::float8 FROM people p WHERE programme_id IS NOT NULL"
        " GROUP BY programme_id",
    )
    assert max(by_programme)[0] - min(by_programme)[0] > 0.1
    months = dict(
        _all(crm_url, "SELECT extract(month FROM created_at)::int, count(*) FROM people GROUP BY 1")
    )
    assert months[9] > 1.3 * months[6]


def test_applications_come_weeks_later_so_that_young_leads_are_undecided(crm_url: str) -> None:
    delays = [
        days
        for (days,) in _all(
            crm_url,
            "SELECT extract(epoch FROM min(a.submitted_at) - p.created_at)::float8 / 86400 FROM people p"
            " JOIN applications a ON a.person_id = p.id AND a.submitted_at > p.created_at GROUP BY p.id",
        )
    ]
    assert 10 < np.median(delays) < 60
    rate = (
        "SELECT avg((EXISTS (SELECT FROM applications a WHERE a.person_id = p.id"
        " AND a.submitted_at > p.created_at))::int) FROM people p WHERE %s - created_at {} interval '{} days'"
    )
    young, grown = _one(crm_url, rate.format("<", 7), UNTIL), _one(crm_url, rate.format(">", 180), UNTIL)
    assert young < 0.1
    assert 0.3 < grown < 0.6


def test_some_leads_have_applied_before_they_enquire_again(crm_url: str) -> None:
    assert 0.03 < _one(crm_url, "SELECT avg((prior_applications > 0)::int) FROM lead_source") < 0.1


def test_both_views_have_the_same_columns(crm_url: str) -> None:
    statement = (
        "SELECT attname, atttypid FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
        " ORDER BY attnum"
    )
    now, past = _all(crm_url, statement, "lead_source"), _all(crm_url, statement, "lead_training")
    assert [name for name, _ in now] == [name.strip() for name in ATTRIBUTES.split(",")]
    assert past[: len(now)] == now
    assert [name for name, _ in past[len(now) :]] == ["as_of", "outcome_at"]


def test_the_past_moment_is_a_midnight_within_180_days_whatever_the_session(crm_url: str) -> None:
    rows = _all(crm_url, "SELECT created_at, as_of FROM lead_training")
    ages = [as_of - created for created, as_of in rows]
    assert timedelta(0) < min(ages) < timedelta(days=1)
    assert timedelta(days=175) < max(ages) < timedelta(days=181)
    assert all(as_of.timestamp() % 86400 == 0 for _, as_of in rows)
    with psycopg.connect(crm_url) as connection:
        connection.execute("SET TIME ZONE 'America/New_York'")
        assert connection.execute("SELECT created_at, as_of FROM lead_training").fetchall() == rows


def test_who_applied_by_the_moment_is_left_out_and_the_first_later_application_is_the_outcome(
    crm_url: str,
) -> None:
    applications: dict[Any, list[datetime]] = {}
    for person, moment in _all(crm_url, "SELECT person_id, submitted_at FROM applications"):
        applications.setdefault(person, []).append(moment)
    shown = {
        row[0]: row[1:]
        for row in _all(crm_url, "SELECT lead_id, created_at, as_of, outcome_at FROM lead_training")
    }
    for person, (created, as_of, outcome_at) in shown.items():
        moments = applications.get(person, [])
        assert not any(created <= moment <= as_of for moment in moments)
        assert outcome_at == min((moment for moment in moments if moment > as_of), default=None)
    assert 0.7 * PEOPLE < len(shown) < PEOPLE


def test_attributes_of_a_past_moment_are_what_the_crm_knew_then(crm_url: str) -> None:
    touches: dict[Any, list[tuple[Any, ...]]] = {}
    for person, *touch in _all(
        crm_url,
        "SELECT person_id, kind, direction, occurred_at, duration_seconds FROM touchpoints"
        " ORDER BY id LIMIT 40000",
    ):
        touches.setdefault(person, []).append(tuple(touch))
    people = list(touches)[:-1]  # the last one's touchpoints may be cut off
    rows = _all(
        crm_url,
        "SELECT lead_id, as_of, created_at, touchpoint_count, inbound_count, emails_opened, calls_answered,"
        " events_attended, minutes_on_site, first_response_minutes, last_touch_at FROM lead_training"
        " WHERE lead_id = ANY(%s)",
        people,
    )
    assert len(rows) > 1500
    for person, as_of, created, *shown in rows:
        seen = [touch for touch in touches[person] if touch[2] <= as_of]
        visits = [seconds for kind, _, _, seconds in seen if kind == "site_visit"]
        answers = [at for _, direction, at, _ in seen if direction == "outbound" and at >= created]
        assert shown[:5] == [
            len(seen),
            sum(direction == "inbound" for _, direction, _, _ in seen),
            sum(kind == "email_open" for kind, *_ in seen),
            sum(kind == "call" and seconds > 0 for kind, _, _, seconds in seen),
            sum(kind == "event" for kind, *_ in seen),
        ]
        minutes, response, last = shown[5:]
        assert (minutes is None) == (not visits)
        assert minutes is None or abs(float(minutes) - sum(visits) / 60) <= 0.0501
        assert (response is None) == (not answers)
        assert (
            response is None or abs(float(response) - (min(answers) - created).total_seconds() / 60) <= 0.0501
        )
        assert last == max((at for _, _, at, _ in seen), default=None)


def test_what_happens_after_the_moment_shows_in_no_attribute(database_url: str) -> None:
    load_demo(database_url, people=400, seed=3, until=UNTIL)
    statement = f"SELECT {ATTRIBUTES}, as_of FROM lead_training ORDER BY lead_id"
    before = _all(database_url, statement)
    with psycopg.connect(database_url) as connection:
        for table, moment in (("touchpoints", "occurred_at"), ("applications", "submitted_at")):
            connection.execute(
                f"DELETE FROM {table} x USING lead_training t"
                f" WHERE x.person_id = t.lead_id AND x.{moment} > t.as_of"
            )
        connection.execute(
            "UPDATE people SET lead_score = 0, engagement_score = 0, touchpoint_count = 0,"
            " lifecycle_state = 'new', status = 'open'"
        )
    assert _all(database_url, statement) == before
    assert _all(database_url, "SELECT count(outcome_at) FROM lead_training") == [(0,)]


def test_touchpoints_do_not_know_of_the_application(crm_url: str) -> None:
    """Touchpoints around applications that come at the same pace before and after: no burst, no silence."""
    before, after = _all(
        crm_url,
        "SELECT count(*) FILTER (WHERE t.occurred_at < a.submitted_at),"
        " count(*) FILTER (WHERE t.occurred_at >= a.submitted_at)"
        " FROM applications a JOIN touchpoints t ON t.person_id = a.person_id"
        " AND abs(extract(epoch FROM t.occurred_at - a.submitted_at)) < 5 * 86400"
        " JOIN people p ON p.id = a.person_id AND a.submitted_at > p.created_at + interval '20 days'"
        " WHERE a.submitted_at < %s",
        UNTIL - timedelta(days=6),
    )[0]
    assert 0.75 < after / before < 1.1


def test_the_outcome_can_be_learnt_but_no_column_gives_it_away(crm_url: str) -> None:
    text = ("source", "programme", "programme_level", "study_mode", "campus", "country", "education_level")
    with psycopg.connect(crm_url) as connection:
        cursor = connection.execute(
            "SELECT * FROM lead_training WHERE as_of + interval '90 days' <= %s ORDER BY lead_id", [UNTIL]
        )
        names = [column.name for column in cursor.description or ()]
        rows = cursor.fetchall()
    table = {name: [row[at] for row in rows] for at, name in enumerate(names)}
    as_of = table.pop("as_of")
    outcome = np.array(
        [
            at is not None and at - then <= timedelta(days=90)
            for at, then in zip(table.pop("outcome_at"), as_of, strict=True)
        ]
    )
    assert 0.2 <= outcome.mean() <= 0.35
    columns = {
        name: _codes(values) if name in text else _numbers(values, as_of)
        for name, values in table.items()
        if name not in {"lead_id", "external_ref"}
    }
    for name, column in columns.items():
        present = ~np.isnan(column)
        alone = roc_auc_score(outcome[present], column[present])
        assert 0.22 < alone < 0.78, name
        assert 0.42 < roc_auc_score(outcome, present) < 0.58, f"{name} missing"
    matrix = np.nan_to_num(np.column_stack(list(columns.values())), nan=-1)
    fit, test = np.arange(len(matrix)) % 3 != 0, np.arange(len(matrix)) % 3 == 0
    model = RandomForestClassifier(100, max_depth=10, min_samples_leaf=5, random_state=0)
    scores = model.fit(matrix[fit], outcome[fit]).predict_proba(matrix[test])[:, 1]
    assert 0.78 <= roc_auc_score(outcome[test], scores) <= 0.86


def _codes(values: list[str | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    known = sorted({value for value in values if value is not None})
    return np.array([np.nan if value is None else known.index(value) for value in values])


def _numbers(values: list[Any], as_of: list[datetime]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(
        [
            np.nan
            if value is None
            else (then - value).total_seconds()
            if isinstance(value, datetime)
            else float(value)
            for value, then in zip(values, as_of, strict=True)
        ]
    )


@pytest.mark.parametrize(("column", "of"), [("lead_id", "id"), ("external_ref", "external_ref")])
def test_one_lead_is_found_through_indexes_alone(crm_url: str, column: str, of: str) -> None:
    wanted = _one(crm_url, f"SELECT {of} FROM people WHERE external_ref = 'lead_77'")
    plan = "\n".join(
        line
        for (line,) in _all(crm_url, f"EXPLAIN SELECT * FROM lead_source WHERE {column} = ANY(%s)", [wanted])
    )
    for table in ("people", "touchpoints", "applications"):
        assert f"Seq Scan on {table}" not in plan
    assert "touchpoints_of_person" in plan
