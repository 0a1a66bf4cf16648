"""Reading leads out of a real PostgreSQL: values, IDs, kinds, and pages equal to batches."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import psycopg
import pytest

from app.ai.domain import AMBIGUOUS_LEAD, UNKNOWN_LEAD, FetchedLeads, InputColumn
from app.db.engine import Connection, Database
from app.db.lead_cells import Rows, batch_statement
from app.db.lead_pages import read_pages
from app.db.leads import (
    SCHEMA_LOOK_SECONDS,
    PostgresLeadSource,
    count_leads,
    fetch_all_chunks,
    fetch_columns,
    fetch_types,
)
from app.errors import CommandError, DatabaseUnavailableError, PredictionFailedError
from tests.fakes import FakeClock, fetch_at_once

T = TypeVar("T")

A, B, C, D = (str(UUID(int=number)) for number in (0xA, 0xB, 0xC, 0xD))

_LEADS = f"""
    CREATE TYPE colour AS ENUM ('red', 'green');
    CREATE DOMAIN score AS integer CHECK (value >= 0);
    CREATE TABLE leads (
        lead_id uuid, external_ref text, amount numeric, price float8, visits integer, points score,
        opted boolean, seen timestamptz, born date, city text, tint colour, "Odd ""name" text, document jsonb,
        fee numeric(10, 2), wide numeric(600, 350), noted timestamp
    );
    INSERT INTO leads VALUES
        ('{A}', 'lead_1', 12.5, 1e-320, 3, 4, true, '2026-01-01 00:00:00.123456+00', '1970-01-02', 'Zürich',
            'red', 'x', NULL, 99999999.99, 1e-340, '2026-01-01 00:00:00.999999'),
        ('{B}', 'lead_2', 'NaN', 'NaN', NULL, NULL, false, 'infinity', NULL, '', NULL, E'\\x01',
            NULL, 'NaN', NULL, '-infinity'),
        ('{C}', 'twice', 1e400, '-Infinity', -2147483648, 0, NULL, NULL, 'infinity', NULL, 'green', NULL,
            NULL, NULL, 'NaN', '4000-01-01'),
        ('{D}', 'twice', 1e-400, NULL, 0, 1, true, '1969-12-31 23:59:59+00', '1899-12-30', 'a b', 'red', '🙂',
            NULL, -0.01, 2.5, NULL)
"""

COLUMNS = [
    InputColumn("amount", "number"),
    InputColumn("price", "number"),
    InputColumn("visits", "number"),
    InputColumn("points", "number"),
    InputColumn("opted", "boolean"),
    InputColumn("seen", "timestamp"),
    InputColumn("born", "timestamp"),
    InputColumn("city", "text"),
    InputColumn("tint", "text"),
    InputColumn('Odd "name', "text"),
    InputColumn("fee", "number"),
    InputColumn("wide", "number"),
    InputColumn("noted", "timestamp"),
]


@pytest.fixture
def url(empty_database_url: str) -> str:
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(_LEADS)
    return empty_database_url


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., PostgresLeadSource]]:
    databases: list[Database] = []

    def source(url: str, relation: str = "leads", **options: Any) -> PostgresLeadSource:
        databases.append(Database(url, pool_size=4, deadline_seconds=10))
        return PostgresLeadSource(databases[-1], relation, **options)

    yield source
    for database in databases:
        await database.close()


Connect = Callable[..., PostgresLeadSource]


async def test_every_kind_of_value_arrives_as_it_is_stored(url: str, connect: Connect) -> None:
    found = await fetch_at_once(connect(url), [A, B, C, D], COLUMNS)
    columns = {name: found.leads.columns[name] for name in found.leads.columns}

    def cells(name: str) -> list[object]:
        column = columns[name]
        pairs = zip(column.values[found.row_of].tolist(), column.present[found.row_of].tolist(), strict=True)
        return [value if present else None for value, present in pairs]

    assert found.leads.n == 4
    assert str(cells("amount")) == "[12.5, nan, inf, 0.0]"
    assert str(cells("price")) == "[1e-320, nan, -inf, None]"
    assert cells("visits") == [3.0, None, -2147483648.0, 0.0]
    assert cells("points") == [4.0, None, 0.0, 1.0]
    assert cells("opted") == [1.0, 0.0, None, 1.0]
    assert cells("seen") == [1767225600.123456, math.inf, None, -1.0]
    assert cells("born") == [86400.0, None, math.inf, -2209161600.0]
    assert cells("city") == ["Zürich", "", None, "a b"]
    assert cells("tint") == ["red", None, "green", "red"]
    assert cells('Odd "name') == ["x", "\x01", None, "🙂"]
    assert str(cells("fee")) == "[99999999.99, nan, None, -0.01]"
    assert str(cells("wide")) == "[0.0, None, nan, 2.5]"
    assert cells("noted") == [1767225600.999999, -math.inf, 64060588800.0, None]


async def test_missing_numbers_are_nan_and_missing_texts_empty(url: str, connect: Connect) -> None:
    found = await fetch_at_once(connect(url), [C, D], COLUMNS)
    price, city = found.leads.columns["price"], found.leads.columns["city"]
    assert np.isnan(price.values[~price.present]).all()
    assert city.values[~city.present].tolist() == [""]
    assert price.values.dtype == np.float64
    assert price.present.dtype == np.bool_


async def test_leads_are_found_by_either_id_and_the_others_are_told_apart(url: str, connect: Connect) -> None:
    asked = ["nobody", A, "lead_2", str(UUID(int=99)), "twice", "lead_1", C, "LEAD_1"]
    found = await fetch_at_once(connect(url), asked, COLUMNS)
    rows = found.row_of.tolist()
    assert [rows[0], rows[3], rows[4], rows[7]] == [UNKNOWN_LEAD, UNKNOWN_LEAD, AMBIGUOUS_LEAD, UNKNOWN_LEAD]
    assert rows[1] == rows[5]
    assert found.leads.columns["city"].values[[rows[1], rows[2]]].tolist() == ["Zürich", ""]
    assert found.leads.columns["tint"].values[rows[6]] == "green"


@pytest.mark.parametrize("twice", [[], [7]], ids=["distinct", "one-twice"])
@pytest.mark.parametrize("shift", [0, 64, 100], ids=["last half", "first half", "ends"])
async def test_many_leads_are_matched_wherever_their_ids_differ(
    url: str, connect: Connect, shift: int, twice: list[int]
) -> None:
    ids = [str(UUID(int=number << shift | 1 << 127)) for number in range(1, 61)]
    known = [*range(40), *twice]
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO leads (lead_id, visits) VALUES (%s, %s)", [(ids[at], at) for at in known]
        )
    asked = [*reversed(ids), A]
    found = await fetch_at_once(connect(url), asked, [InputColumn("visits", "number")])
    visits = found.leads.columns["visits"].values.tolist()
    answers = [row if row < 0 else visits[row] for row in found.row_of.tolist()]
    expected = [*[UNKNOWN_LEAD] * 20, *reversed(range(40)), 3]
    assert answers == [AMBIGUOUS_LEAD if answer in twice else answer for answer in expected]


async def test_each_id_is_told_the_lead_it_stands_for(url: str, connect: Connect) -> None:
    asked = ["nobody", A, "lead_2", str(UUID(int=99)), "twice", "lead_1"]
    found = await fetch_at_once(connect(url), asked, COLUMNS)
    assert found.uuid_of == ["nobody", A, B, str(UUID(int=99)), "twice", A]
    assert (await fetch_at_once(connect(url), [B, A], COLUMNS)).uuid_of == [B, A]


@pytest.mark.parametrize(
    "asked", [[A, B], ["lead_1", "lead_2"], [A, "lead_2"], [str(UUID(int=99))], ["nobody"]]
)
async def test_any_mixture_of_ids_is_answered(url: str, connect: Connect, asked: list[str]) -> None:
    found = await fetch_at_once(connect(url), asked, COLUMNS[:1])
    known = [row for row in found.row_of.tolist() if row != UNKNOWN_LEAD]
    assert len(known) == found.leads.n == len([a for a in asked if a in (A, B, "lead_1", "lead_2")])


async def test_two_rows_with_one_lead_id_are_ambiguous(url: str, connect: Connect) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO leads (lead_id) VALUES (%s)", [A])
    found = await fetch_at_once(connect(url), [A, B], COLUMNS)
    assert found.row_of[0] == AMBIGUOUS_LEAD
    assert found.row_of[1] >= 0


@pytest.mark.parametrize("others", [0, 20, 300], ids=["a row each", "one row", "parts"])
@pytest.mark.parametrize("more", [[], [A]], ids=["by reference", "by both"])
async def test_a_row_without_an_id_is_no_lead_and_fails_no_other(
    url: str, connect: Connect, others: int, more: list[str]
) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO leads (external_ref, visits) VALUES ('nameless', 1), ('lead_1', 1)")
        connection.execute(
            "INSERT INTO leads (lead_id, external_ref, visits)"
            " SELECT gen_random_uuid(), 'r' || n, 7 FROM generate_series(1, 300) n"
        )
    asked = ["nameless", "lead_1", *more, *(f"r{number}" for number in range(1, others + 1))]
    found = await fetch_at_once(connect(url), asked, [InputColumn("visits", "number")])
    visits = found.leads.columns["visits"].values.tolist()
    answers = [row if row < 0 else visits[row] for row in found.row_of.tolist()]
    assert answers == [UNKNOWN_LEAD, 3, *[3 for _ in more], *[7] * others]


def test_whoever_reads_every_lead_leaves_out_the_rows_without_an_id(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO leads (external_ref, city) VALUES ('nameless', 'Bern')")
    [chunk] = fetch_all_chunks(url, "leads", COLUMNS)
    assert chunk.lead_ids == [A, B, C, D]
    # A page of its own, its end the last lead, must not be followed by the rest either.
    for page_leads in (4, 5):
        [page] = read_pages(url, "leads", COLUMNS, after=None, page_leads=page_leads)
        assert page.external_refs == [b"lead_1", b"lead_2", b"twice", b"twice"]
    assert count_leads(url, "leads") == 4


@pytest.mark.parametrize(("by_id", "by_ref"), [(True, False), (False, True), (True, True)])
def test_leads_are_found_by_the_indexes_of_the_tables_under_the_default_view(
    demo_url: str, by_id: bool, by_ref: bool
) -> None:
    with psycopg.connect(demo_url) as connection:
        statement = batch_statement(
            "lead_source", fetch_types(connection, "lead_source"), COLUMNS[:0],
            by_id=by_id, by_ref=by_ref, rows="leads",
        )  # fmt: skip
        # The plan for any IDs, as it is for more leads than the few here.
        connection.execute("SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off")
        connection.execute(f"PREPARE read AS {statement}")
        given = ["ARRAY[gen_random_uuid()]"] * by_id + ["ARRAY['lead_1']"] * by_ref
        lines = connection.execute(f"EXPLAIN EXECUTE read ({', '.join(given)})").fetchall()
    plan = "\n".join(line for (line,) in lines)
    assert ("people_pkey" in plan, "people_external_ref_key" in plan) == (by_id, by_ref)
    assert "Seq Scan on people" not in plan


_REFERENCES = [
    ("text", "'ab-1'", "ab-1"),
    ("varchar(9)", "'ab-1'", "ab-1"),
    ("name", "'ab-1'", "ab-1"),
    ("char(9)", "'ab-1'", "ab-1"),
    ("smallint", "32767", "32767"),
    ("integer", "0", "0"),
    ("bigint", "9223372036854775807", "9223372036854775807"),
    ("numeric(12)", "123456789012", "123456789012"),
    ("numeric", "1.50", "1.50"),
    ("score", "7", "7"),
    ("colour", "'red'", "red"),
]
_NO_REFERENCES = [
    "nobody", "07", "1.5", "00", "ab", "9" * 30, "9223372036854775808", "1e3", "²", "1.", "b:1",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "ref"), _REFERENCES, ids=[kind for kind, *_ in _REFERENCES])
async def test_references_of_any_type_are_asked_by_as_text(
    url: str, connect: Connect, kind: str, value: str, ref: str
) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(f"CREATE TABLE refs (lead_id uuid, external_ref {kind}, visits integer)")
        connection.execute(f"INSERT INTO refs VALUES ('{A}', {value}, 1), ('{B}', NULL, 2)")
    source = connect(url, "refs")
    # Few come as a row each, more as one row, many of one kind in parts.
    for asked in ([ref], *([*[f"r{n}" for n in range(others)], *_NO_REFERENCES, ref] for others in (0, 300))):
        for more in ([], [B]):
            found = await fetch_at_once(source, [*more, *asked], [InputColumn("visits", "number")])
            visits = found.leads.columns["visits"].values.tolist()
            answers = [visits[row] for row in found.row_of.tolist() if row != UNKNOWN_LEAD]
            assert answers == [*[2 for _ in more], 1]
            assert found.row_of[-1] != UNKNOWN_LEAD
            assert found.uuid_of[-1] == A
    [page] = read_pages(url, "refs", [], after=None)
    assert page.external_refs == [ref.encode(), None]


async def test_texts_are_read_the_same_where_a_backslash_begins_an_escape(url: str, connect: Connect) -> None:
    before = await fetch_at_once(connect(url), [A, "lead_2", C], COLUMNS)
    with psycopg.connect(url) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET standard_conforming_strings = off")
    [chunk] = fetch_all_chunks(url, "leads", COLUMNS)
    [page] = read_pages(url, "leads", COLUMNS, after=None)
    after = await fetch_at_once(connect(url), [A, "lead_2", C], COLUMNS)
    many = await fetch_at_once(
        connect(url), [A, B, C, D, *(str(UUID(int=n)) for n in range(16, 30))], COLUMNS
    )
    assert after.row_of.tolist() == before.row_of.tolist()
    assert page.external_refs == chunk.external_refs == [b"lead_1", b"lead_2", b"twice", b"twice"]
    for name in before.leads.columns:
        expected = repr(before.leads.columns[name].values[before.row_of].tolist())
        assert repr(after.leads.columns[name].values[after.row_of].tolist()) == expected
        for leads in (chunk.leads, page.leads):
            assert repr(leads.columns[name].values[:3].tolist()) == expected
        assert repr(many.leads.columns[name].values[many.row_of[:3]].tolist()) == expected


async def test_domains_are_what_they_are_at_last_made_of(url: str, connect: Connect) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(f"""
            CREATE DOMAIN lead AS uuid; CREATE DOMAIN own_lead AS lead;
            CREATE DOMAIN euros AS numeric(10, 2); CREATE DOMAIN fee AS euros CHECK (value > 0);
            CREATE DOMAIN huge AS numeric(600, 2); CREATE DOMAIN any_number AS numeric;
            CREATE DOMAIN tint AS colour; CREATE DOMAIN own_tint AS tint; CREATE DOMAIN ref AS varchar(9);
            CREATE DOMAIN own_ref AS ref;
            CREATE TABLE domains (
                lead_id own_lead, external_ref own_ref, fee fee, huge huge, any_number any_number,
                tint own_tint
            );
            INSERT INTO domains VALUES ('{A}', 'ref', 2.5, 1e500, 3, 'red')
        """)
        types = fetch_types(connection, "domains")
    assert types == {
        "lead_id": "uuid", "external_ref": "varchar", "fee": "decimal", "huge": "numeric",
        "any_number": "numeric", "tint": "enum",
    }  # fmt: skip
    columns = [InputColumn(name, "number") for name in ("fee", "huge", "any_number")]
    for asked in (A, "ref"):
        found = await fetch_at_once(connect(url, "domains"), [asked], [*columns, InputColumn("tint", "text")])
        values = [found.leads.columns[name].values[found.row_of[0]] for name in found.leads.columns]
        assert sorted(map(str, values)) == ["2.5", "3.0", "inf", "red"]
    [page] = read_pages(url, "domains", columns, after=None)
    assert page.external_refs == [b"ref"]


async def test_a_uuid_is_no_reference_whatever_type_it_has(url: str, connect: Connect) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE refs (lead_id uuid, external_ref uuid, created_at date)")
        connection.execute(f"INSERT INTO refs VALUES ('{A}', '{C}', '2026-01-01')")
    source = connect(url, "refs")
    assert (await fetch_at_once(source, ["nobody", C, A], [])).row_of.tolist() == [UNKNOWN_LEAD] * 2 + [0]
    assert (await fetch_at_once(source, ["nobody"], [])).row_of.tolist() == [UNKNOWN_LEAD]
    assert await source.fetch_recent(1) == [A]


@pytest.mark.parametrize("kind", [kind for kind, *_ in _REFERENCES if kind != "colour"])
@pytest.mark.parametrize(("by_id", "rows"), [(True, "leads"), (False, "parts")])
def test_references_of_any_type_are_found_by_their_index(
    url: str, kind: str, by_id: bool, rows: Rows
) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(f"CREATE TABLE refs (lead_id uuid PRIMARY KEY, external_ref {kind} UNIQUE)")
        statement = batch_statement(
            "refs", fetch_types(connection, "refs"), [], by_id=by_id, by_ref=True, rows=rows
        )
        connection.execute("SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off")
        connection.execute(f"PREPARE read AS {statement}")
        given = ["ARRAY[gen_random_uuid()]"] * by_id + ["ARRAY['1', NULL]"]
        lines = connection.execute(f"EXPLAIN EXECUTE read ({', '.join(given)})").fetchall()
    plan = "\n".join(line for (line,) in lines)
    assert re.search(r"Index Cond: \(\(?external_ref\)?(::\w+)? = ANY", plan)
    assert "Seq Scan" not in plan


async def test_a_relation_without_references_knows_leads_by_uuid_only(url: str, connect: Connect) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE leads DROP COLUMN external_ref")
    found = await fetch_at_once(connect(url), ["lead_1", A], COLUMNS)
    assert found.row_of.tolist() == [UNKNOWN_LEAD, 0]


def test_a_page_without_references_has_none(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE leads DROP COLUMN external_ref")
    [page] = fetch_all_chunks(url, "leads", [InputColumn("city", "text"), InputColumn("visits", "number")])
    assert page.lead_ids == [A, B, C, D]
    assert page.external_refs == []
    assert page.leads.columns["city"].values.tolist() == ["Zürich", "", "", "a b"]
    assert page.leads.columns["visits"].present.tolist() == [True, False, True, True]


def test_a_page_tells_the_reference_of_each_lead_apart_from_its_texts(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE leads SET external_ref = NULL WHERE lead_id = %s", [C])
    [page] = fetch_all_chunks(url, "leads", [InputColumn("city", "text"), InputColumn("tint", "text")])
    assert page.external_refs == [b"lead_1", b"lead_2", None, b"twice"]
    assert page.leads.columns["city"].values.tolist() == ["Zürich", "", "", "a b"]


async def test_a_hostile_id_is_only_an_unknown_lead(url: str, connect: Connect) -> None:
    asked = ["x' OR '1'='1", "{a,b}", '"', "\\", "%(ids)s", "NULL"]
    found = await fetch_at_once(connect(url), asked, COLUMNS)
    assert found.row_of.tolist() == [UNKNOWN_LEAD] * len(asked)


async def test_a_page_equals_a_batch_bit_for_bit(demo_url: str, connect: Connect) -> None:
    source = connect(demo_url, "lead_source")
    columns = [InputColumn(name, kind) for name, kind in (await source.fetch_schema()).items()]
    chunks = list(fetch_all_chunks(demo_url, "lead_source", columns, chunk_rows=250))
    assert [chunk.leads.n for chunk in chunks] == [250, 250, 100]
    for chunk in chunks:
        found = await fetch_at_once(source, chunk.lead_ids, columns)
        for name, paged in chunk.leads.columns.items():
            batched = found.leads.columns[name]
            assert batched.kind == paged.kind
            assert (batched.present[found.row_of] == paged.present).all()
            assert batched.values[found.row_of].tolist() == paged.values.tolist() or (
                batched.values[found.row_of].tobytes() == paged.values.tobytes()
            )
        refs = found.leads.columns["external_ref"].values[found.row_of].tolist()
        assert [ref.decode() for ref in chunk.external_refs if ref is not None] == refs


async def test_a_page_by_key_equals_a_batch_bit_for_bit(url: str, connect: Connect) -> None:
    source = connect(url)
    columns = [InputColumn(name, kind) for name, kind in (await source.fetch_schema()).items()]
    pages = list(read_pages(url, "leads", columns, after=None, page_leads=3))
    assert [page.leads.n for page in pages] == [3, 1]
    for page in pages:
        ids = [str(UUID(bytes=lead_id.tobytes())) for lead_id in page.ids]
        found = await fetch_at_once(source, ids, columns)
        for name, paged in page.leads.columns.items():
            batched = found.leads.columns[name]
            assert (batched.kind, batched.values.dtype) == (paged.kind, paged.values.dtype)
            assert (batched.present[found.row_of] == paged.present).all()
            values = batched.values[found.row_of]
            same = values.tolist() == paged.values.tolist()
            assert same or values.tobytes() == paged.values.tobytes()
    [rest] = read_pages(url, "leads", columns, after=UUID(B))
    assert (rest.last_id, rest.external_refs) == (UUID(D), [b"twice", b"twice"])


async def test_a_percent_sign_in_a_name_is_a_letter_like_any_other(url: str, connect: Connect) -> None:
    names = ["share %", "50%score", "%s", "%(visits)s", "%%"]
    with psycopg.connect(url) as connection:
        multiples = ", ".join(f'visits * {at}.0 AS "{name}"' for at, name in enumerate(names, 1))
        connection.execute(f'CREATE VIEW "all %" AS SELECT lead_id, external_ref, {multiples} FROM leads')
    columns = [InputColumn(name, "number") for name in names]
    found = await fetch_at_once(connect(url, "all %"), [A], columns)
    [chunk] = fetch_all_chunks(url, "all %", columns)
    pages = list(read_pages(url, "all %", columns, after=None, page_leads=2))
    assert [page.leads.n for page in pages] == [2, 2]
    for leads in (found.leads, chunk.leads, pages[0].leads):
        assert [leads.columns[name].values[0] for name in names] == [3.0, 6.0, 9.0, 12.0, 15.0]


async def test_two_thousand_leads_equal_the_same_leads_one_by_one(demo_url: str, connect: Connect) -> None:
    source = connect(demo_url, "lead_source")
    columns = [InputColumn(name, kind) for name, kind in (await source.fetch_schema()).items()]
    ids = next(fetch_all_chunks(demo_url, "lead_source", columns)).lead_ids
    together = await fetch_at_once(source, ids, columns)
    for position in range(0, len(ids), 60):
        alone = await fetch_at_once(source, [ids[position]], columns)
        for name, column in together.leads.columns.items():
            row = int(together.row_of[position])
            assert repr(column.values[row]) == repr(alone.leads.columns[name].values[0])
            assert column.present[row] == alone.leads.columns[name].present[0]


@pytest.mark.parametrize("by", ["uuid", "reference"])
async def test_a_batch_that_is_alone_comes_in_parts_and_one_among_others_as_a_whole(
    url: str, connect: Connect, by: str
) -> None:
    ids, refs = [str(UUID(int=number << 70)) for number in range(1, 561)], [f"r{n}" for n in range(560)]
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO leads (lead_id, external_ref, visits) VALUES (%s, %s, %s)",
            list(zip(ids[:550], refs, range(550), strict=False)),
        )
    asked = [*reversed(ids), A, C] if by == "uuid" else [*reversed(refs), "lead_1", "twice"]
    source, columns = connect(url), [InputColumn("visits", "number")]
    await source.fetch_schema()
    alone: dict[int, FetchedLeads] = {}
    among: dict[int, FetchedLeads] = {}
    await asyncio.gather(
        source.fetch(asked, columns, alone.__setitem__), source.fetch(asked, columns, among.__setitem__)
    )
    assert list(alone) == [0, 250, 500]
    assert list(among) == [0]

    def tell(parts: dict[int, FetchedLeads]) -> list[object]:
        told: list[object] = []
        for part in parts.values():
            visits = part.leads.columns["visits"].values.tolist()
            rows = zip(part.uuid_of, part.row_of.tolist(), strict=True)
            told += [(uuid, row if row < 0 else visits[row]) for uuid, row in rows]
        return told

    unknown = [(asked_id, UNKNOWN_LEAD) for asked_id in asked[:10]]
    last = (C, -2147483648) if by == "uuid" else ("twice", AMBIGUOUS_LEAD)
    known = [(ids[number], number) for number in reversed(range(550))]
    assert tell(alone) == tell(among) == [*unknown, *known, (A, 3), last]


async def test_the_schema_tells_names_and_kinds_and_leaves_out_what_no_feature_can_read(
    url: str, connect: Connect
) -> None:
    source = connect(url)
    assert source.source_columns() == {}
    schema = await source.fetch_schema()
    assert schema == source.source_columns() == fetch_columns(url, "leads")
    assert schema == {"external_ref": "text"} | {column.name: column.kind for column in COLUMNS}


@pytest.mark.parametrize("column", [InputColumn("gone", "number"), InputColumn("city", "number")])
async def test_a_column_that_is_missing_or_of_another_kind_fails_the_prediction(
    url: str, connect: Connect, column: InputColumn
) -> None:
    source = connect(url)
    with pytest.raises(PredictionFailedError):
        await fetch_at_once(source, [A], [column])
    with pytest.raises(CommandError, match=column.name):
        list(fetch_all_chunks(url, "leads", [column]))


async def test_a_column_that_disappears_fails_and_is_found_again_when_it_returns(
    url: str, connect: Connect
) -> None:
    source = connect(url)
    await fetch_at_once(source, [A], COLUMNS)
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE leads RENAME COLUMN visits TO v")
    for _ in range(2):
        with pytest.raises(PredictionFailedError):
            await fetch_at_once(source, [A], COLUMNS)
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE leads RENAME COLUMN v TO visits")
    assert (await fetch_at_once(source, [A], COLUMNS)).leads.n == 1


async def test_a_column_that_becomes_numeric_is_still_read(url: str, connect: Connect) -> None:
    source = connect(url)
    await fetch_at_once(source, [A], COLUMNS)
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE leads ALTER COLUMN visits TYPE numeric")
    assert (await fetch_at_once(source, [A], COLUMNS)).leads.columns["visits"].values.tolist() == [3.0]


@pytest.mark.parametrize("relation", ["nothing", "nowhere.leads", "pg_class"])
async def test_a_relation_that_is_missing_or_holds_no_leads_is_named_in_commands(
    url: str, connect: Connect, relation: str
) -> None:
    with pytest.raises(PredictionFailedError):
        await fetch_at_once(connect(url, relation), [A], [])
    with pytest.raises(CommandError, match=relation):
        fetch_columns(url, relation)
    with pytest.raises(CommandError, match=relation):
        list(fetch_all_chunks(url, relation, []))


async def test_a_relation_in_another_schema_is_read(url: str, connect: Connect) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE SCHEMA crm; ALTER TABLE leads SET SCHEMA crm")
    assert (await fetch_at_once(connect(url, "crm.leads"), ["lead_1"], COLUMNS)).row_of.tolist() == [0]


async def test_what_a_view_gains_while_it_is_read_is_seen_within_a_minute(url: str, connect: Connect) -> None:
    columns, clock = [InputColumn("visits", "number")], FakeClock()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE VIEW growing AS SELECT lead_id, visits FROM leads")
    source = connect(url, "growing", monotonic=clock)

    async def find() -> list[int]:
        return (await fetch_at_once(source, [A, "lead_1"], columns)).row_of.tolist()

    assert await find() == [0, UNKNOWN_LEAD]
    with psycopg.connect(url) as connection:
        connection.execute(
            "CREATE OR REPLACE VIEW growing AS SELECT lead_id, visits, external_ref FROM leads"
        )
    assert await find() == [0, UNKNOWN_LEAD]
    clock.now += SCHEMA_LOOK_SECONDS
    assert (await find())[1] != UNKNOWN_LEAD
    assert "external_ref" in source.source_columns()


async def test_requests_that_come_together_look_at_the_relation_once_and_for_a_bad_value_not_again(
    url: str,
) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE few (lead_id uuid, n float8)")
        connection.execute("INSERT INTO few SELECT gen_random_uuid(), n FROM generate_series(0, 20) n")
        connection.execute("CREATE VIEW inverses AS SELECT lead_id, 1 / n AS x FROM few")
        bad, *good = (str(row[0]) for row in connection.execute("SELECT lead_id FROM few ORDER BY n"))
    database = CountedDatabase(url, pool_size=4, deadline_seconds=10)
    source = PostgresLeadSource(database, "inverses")

    async def read(lead_id: str) -> int:
        return (await fetch_at_once(source, [lead_id], [InputColumn("x", "number")])).leads.n

    assert await asyncio.gather(*map(read, good)) == [1] * 20
    assert database.calls == 1
    with pytest.raises(PredictionFailedError):
        await read(bad)
    assert await asyncio.gather(*map(read, good)) == [1] * 20
    assert database.calls == 1
    with psycopg.connect(url) as connection:
        connection.execute("ALTER VIEW inverses RENAME x TO y")
    failed = await asyncio.gather(*map(read, good), return_exceptions=True)
    assert {type(outcome) for outcome in failed} == {PredictionFailedError}
    with psycopg.connect(url) as connection:
        connection.execute("ALTER VIEW inverses RENAME y TO x")
    before = database.calls
    assert await asyncio.gather(*map(read, good)) == [1] * 20
    assert database.calls == before + 1
    await database.close()


class CountedDatabase(Database):
    """Counts calls with the driver's connection: of a source, its looks at the relation."""

    def __init__(self, url: str, *, pool_size: int, deadline_seconds: float) -> None:
        super().__init__(url, pool_size=pool_size, deadline_seconds=deadline_seconds)
        self.calls = 0

    async def run(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        self.calls += 1
        return await super().run(call)


async def test_nothing_the_driver_says_reaches_the_error(url: str, connect: Connect) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "CREATE VIEW bad AS SELECT lead_id, (1 / (visits - visits))::int AS ratio, city FROM leads"
        )
    with pytest.raises(PredictionFailedError) as caught:
        await fetch_at_once(connect(url, "bad"), [A], [InputColumn("ratio", "number")])
    assert "division" not in str(caught.value)


async def test_pages_of_an_empty_relation_are_none(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("TRUNCATE leads")
    assert list(fetch_all_chunks(url, "leads", COLUMNS)) == []


async def test_a_database_that_is_not_there_is_unavailable(server_url: str) -> None:
    nowhere = server_url.replace("/postgres?", "/nowhere?")
    with pytest.raises(DatabaseUnavailableError):
        fetch_columns(nowhere, "leads")
    with pytest.raises(DatabaseUnavailableError):
        list(fetch_all_chunks(nowhere, "leads", COLUMNS))


async def test_the_newest_leads_come_first_with_every_id_they_may_be_asked_by(
    database_url: str, connect: Connect
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO people (id, external_ref, created_at) VALUES"
            " (%s, 'old', '2026-01-01'), (%s, 'newest', '2026-03-01'), (%s, NULL, '2026-02-01')",
            [A, B, C],
        )
    source = connect(database_url, "lead_source")
    assert await source.fetch_recent(2) == [B, "newest", C]
    assert await source.fetch_recent(9) == [B, "newest", C, A, "old"]


async def test_a_row_without_an_id_is_never_newest(url: str, connect: Connect) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE leads ADD created_at timestamptz DEFAULT '2026-01-01'")
        connection.execute("INSERT INTO leads (external_ref, created_at) VALUES ('nameless', '2026-02-01')")
    assert "nameless" not in await connect(url).fetch_recent(9)


async def test_without_a_time_of_creation_no_lead_is_newest(url: str, connect: Connect) -> None:
    assert await connect(url).fetch_recent(3) == []
