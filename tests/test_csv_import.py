"""CSV files become lead sources: typed, all or nothing, and every defect is named by its line."""

import csv
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.db.csv_columns import TypeGuess, build_names, read_number, read_timestamp
from app.db.csv_import import ImportSummary, import_csv
from app.db.leads import fetch_columns
from app.errors import CommandError, ImportFileError

Import = Callable[..., ImportSummary]

LEADS = """\
Lead No,Visits,Score (%),Opted In,Signed up,City,Postcode,City,Won
L-1,3,12.5,Yes,2026-01-02,Zürich,01234,x,1
L-2,0,-1e3,no,2026-01-02T03:04:05+02:00,Select,99999,,0
L-3,,nan,,,"a ""quoted"", city",,y,Select
"""


@pytest.fixture(scope="module")
def shared_url(create_database: Callable[..., str], migrated_template: str) -> str:
    return create_database("imports", migrated_template)


@pytest.fixture
def csv_url(shared_url: str) -> Iterator[str]:
    """A migrated database without imported tables."""
    yield shared_url
    with psycopg.connect(shared_url) as connection:
        connection.execute(
            "DROP TABLE IF EXISTS leads, leads__import, others CASCADE; DROP SCHEMA IF EXISTS crm CASCADE"
        )


@pytest.fixture
def load(csv_url: str, tmp_path: Path) -> Import:
    """`load(content, **options)` imports a file with this content into the table `leads`."""

    def run(content: str | bytes, **options: Any) -> ImportSummary:
        path = tmp_path / "leads.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return import_csv(csv_url, path, **{"table": "leads", "id_column": "Lead No", **options})

    return run


def _all(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        connection.execute("SET TIME ZONE 'UTC'")
        return connection.execute(statement).fetchall()


def _tables(url: str) -> set[str]:
    return {name for (name,) in _all(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


def test_names_and_types_are_inferred_and_stated(load: Import, csv_url: str) -> None:
    summary = load(LEADS, label_column="Won", missing=["Select"])
    assert summary.rows == 3
    assert summary.label == "won"
    assert [(column.name, column.kind, column.missing) for column in summary.columns] == [
        ("visits", "number", 1),
        ("score", "number", 0),
        ("opted_in", "boolean", 1),
        ("signed_up", "timestamp", 1),
        ("city", "text", 1),
        ("postcode", "text", 1),
        ("city_2", "text", 1),
        ("won", "boolean", 1),
    ]
    kinds = {column.name: column.kind for column in summary.columns}
    assert fetch_columns(csv_url, "leads") == {"external_ref": "text", **kinds}


def test_values_arrive_as_they_stand_in_the_file(load: Import, csv_url: str) -> None:
    load(LEADS, label_column="Won", missing=["Select"])
    rows = _all(
        csv_url,
        "SELECT external_ref, visits, score::text, opted_in, signed_up::text, city, postcode, city_2, won"
        " FROM leads ORDER BY external_ref",
    )
    assert rows == [
        ("L-1", 3.0, "12.5", True, "2026-01-02 00:00:00+00", "Zürich", "01234", "x", True),
        ("L-2", 0.0, "-1000", False, "2026-01-02 01:04:05+00", None, "99999", None, False),
        ("L-3", None, "NaN", None, None, 'a "quoted", city', None, "y", None),
    ]


_NUMBERS = "write them 1234.50: no decimal comma, thousands mark, currency or percent sign, and below 1e308"
_DATES = "write them YYYY-MM-DD, or 2026-01-31T23:59:00"


@pytest.mark.parametrize(
    ("values", "hints"),
    [
        (["12,5", "0,25", "-3"], [f"2 of 3 values look like numbers: {_NUMBERS}"]),
        (["1.234,50", "12,5"], [f"2 of 2 values look like numbers: {_NUMBERS}"]),
        (["£15,610.38", "$5", "1 100,50 €", "EUR 20", "5%", "-5 %", "+1"],
         [f"6 of 7 values look like numbers: {_NUMBERS}"]),
        (["1,100", "1,00,000", "1'234.50", "1\u00a0234", "\u22125,1"],
         [f"5 of 5 values look like numbers: {_NUMBERS}"]),
        (["1", "1e309", "9" * 310], [f"2 of 3 values look like numbers: {_NUMBERS}"]),
        (["09.02.2025", "9.2.2025 10:30", "09.02.25", "2025-02-30"],
         [f"4 of 4 values look like dates: {_DATES}"]),
        (["05/09/2025", "5/9/25", "01/13/2025 5:30 PM", "2025-01-31"],
         [f"3 of 4 values look like dates: {_DATES}"]),
        (["2025/02/09", "9 Feb 2025", "09-Feb-25", "Feb 9, 2025", "2025-01-31 10:00:00.1234567"],
         [f"5 of 5 values look like dates: {_DATES}"]),
        (["1.5", "NULL", "2", "NULL", "N/A"],
         ["2 of 5 values are NULL: if that means missing, give --missing NULL",
          "1 of 5 values are N/A: if that means missing, give --missing N/A"]),
        (["(blank)", "2026-01-31"],
         ["1 of 2 values are (blank): if that means missing, give --missing '(blank)'"]),
        (["12,5", "-"], [f"1 of 2 values look like numbers: {_NUMBERS}",
                         "1 of 2 values are -: if that means missing, give --missing -"]),
        ([*map(str, range(10)), "nobody knows"], ["1 of 11 values are no numbers, the first in line 12"]),
        (["2026-01-31"] * 10 + ["soon"], ["1 of 11 values are no dates, the first in line 12"]),
        (["1,5"] * 18 + ["about 2", "1,5"],
         [f"19 of 20 values look like numbers: {_NUMBERS}",
          "1 of 20 values are no numbers, the first in line 20"]),
    ],
)  # fmt: skip
def test_text_that_looks_like_numbers_or_dates_is_hinted_at(
    load: Import, csv_url: str, values: list[str], hints: list[str]
) -> None:
    content = "".join(f'{at},"{value}"\n' for at, value in enumerate(values))
    (column,) = load(f"Lead No,A\n{content}").columns
    assert column.kind == "text"
    assert list(column.hints) == hints
    stored = _all(csv_url, "SELECT a FROM leads ORDER BY external_ref::int")
    assert [value for (value,) in stored] == values  # nothing is guessed


@pytest.mark.parametrize(
    "values",
    [
        ["Jane Doe", "None", "O'Neil"],
        ["Called 3 times, wants 12,5 % off", "on 09.02.2025 she called", "-"],
        ["01234", "10115", "99999"],
        ["12345-6789", "SW1A 1AA", "10115", "8001"],
        ["0170 1234567", "+49 170 1234567", "030/1234567", "555-0123", "(020) 7946 0958"],
        ["612 345 678", "612.345.678", "01.23.45.67.89", "01 23 45 67 89"],
        [*map(str, range(1, 20)), "12a"],
        [*map(str, range(10000, 10020)), "01234", "NULL"],
        ["MAT 101", "ABC 200"],
        ["10:30", "9:15"],
        ["20-30-40", "12-34-56"],
        ["1.2.3", "10.0.0.1"],
        ["yes", "no", "perhaps"],
        ["NULL", "N/A"],
        ["1.5", "2"],
        ["2026-01-31", "2026-01-31 10:00:00+00"],
    ],
)
def test_columns_that_are_what_they_should_be_have_no_hint(load: Import, values: list[str]) -> None:
    content = "".join(f'{at},"{value}"\n' for at, value in enumerate(values))
    assert load(f"Lead No,A\n{content}").columns[0].hints == ()


def test_an_id_that_is_a_uuid_is_the_lead_id_and_any_other_gets_one_that_stays(
    load: Import, csv_url: str
) -> None:
    known = "7927B2DF-8bba-4d29-b9a2-b6e0beafe620"
    content = f"Lead No,A\n{known},1\n17,2\n"
    load(content)
    ids = dict(_all(csv_url, "SELECT external_ref, lead_id FROM leads"))
    assert ids[known] == UUID(known)
    load(content, replace=True)
    assert dict(_all(csv_url, "SELECT external_ref, lead_id FROM leads")) == ids
    load(content, table="others")
    others = dict(_all(csv_url, "SELECT external_ref, lead_id FROM others"))
    assert others["17"] != ids["17"]


@pytest.mark.parametrize(
    "value",
    [
        "jane.doe@example.com", "17", "-1.5", "0170 1234567", "+49 170 1234567", "2026-01-02", "L-10017",
        "a1b2c3d4-0a0b-4c0d-8e0f-a0b0c0d0e0f0",
        "She asked for the brochure twice, and whether her degree would count.",
    ],
)  # fmt: skip
def test_a_file_without_a_header_has_nothing_of_its_first_lead_in_the_error(load: Import, value: str) -> None:
    with pytest.raises(ImportFileError) as refused:
        load(f'"{value}",Jane Doe,Berlin\n"x",John Roe,Bonn\n', id_column="email")
    assert str(refused.value) == (
        "line 1: no column is called 'email'; there are 3 columns,"
        " and the first line does not look like their names"
    )


def test_a_header_is_shown_to_whoever_names_no_column_of_it(load: Import) -> None:
    header = "Lead No,Score (%),_id,Größe,utm_source,Address 2,,How did you hear about us"
    with pytest.raises(ImportFileError) as refused:
        load(f"{header}\n1,2,3,4,5,6,7,8\n", id_column="email")
    assert str(refused.value).endswith(f"the header names {header.replace(',', ', ')}")


def test_ids_no_request_can_carry_are_counted(load: Import) -> None:
    assert load("Lead No,A\na b,1\n~x,2\nfine@example.com,3\n").unaskable_ids == 2


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_separators_byte_order_marks_and_line_ends_are_understood(
    load: Import, csv_url: str, mark: str
) -> None:
    content = f'Lead No{mark}Note\r\n1{mark}"two\r\nlines, here"\r\n\r\n2{mark}x\r\n'
    load(b"\xef\xbb\xbf" + content.encode())
    assert _all(csv_url, "SELECT note FROM leads ORDER BY external_ref") == [
        ("two\r\nlines, here",),
        ("x",),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: the file is empty"),
        (b"Lead No,A\n", "line 1: .* no leads"),
        (b"Lead No,A\n1,x\n2,x,y\n", "line 3: 3 fields, but the header names 2"),
        (b"Lead No,A\n1,x\n2\n", "line 3: 1 fields"),
        (b'Lead No,A\n1,"x\ny"\n2\n', "line 4: 1 fields"),
        (b'Lead No,A\n1,"x"y\n', "line 2: a closing quote"),
        (b'Lead No,A\n1,x\n2,"x\n3,x\n', "line 3: a quote is opened here and never closed"),
        (b'Lead No,A\n1,x\n2,"' + b"x" * 200_000, "line 3: a field is longer"),
        (b"Lead No,A\r1,x\r", "line 1: a carriage return .*; save the file with the line ends of"),
        (b"PK\x03\x04\x14\0\0\0Lead No", "line 1: this is an Excel workbook; save it as CSV UTF-8"),
        (b"sep=;\r\nLead No;A\r\n1;x\r\n", "line 1: this is Excel's sep= line, not the header; delete it"),
        (b'\xef\xbb\xbf"sep=,"\nLead No,A\n1,x\n', "line 1: this is Excel's sep= line"),
        (b"Lead No,A\n1,x\n2,\xe9\n", "line 3: not valid UTF-8"),
        (b'Lead No,A\n1,"x\n\xe9"\n', "line 3: not valid UTF-8"),
        (b"Lead No,A\n1,x\x00\n", "line 2: a NUL"),
        ("Lead No,A\n1,x\n".encode("utf-16"), "line 1: "),
        (b"Lead No,A\n1,x\n2,x\n1,y\n", "line 4: the id is the same as in line 2"),
        (b"Lead No,A\nab,x\n ab ,y\n", "line 3: the id is the same as in line 2"),
        (b"Lead No,A\n1,x\n ,y\n", "line 3: the id is missing"),
        (b"Lead No,A\n1,x\nSelect,y\n", "line 3: the id is missing"),
        (b"Lead No,A\n" + b"9" * 501 + b",y\n", "line 2: the id is longer"),
        (b"No,A\n1,x\n", "line 1: no column is called 'Lead No'; the header names No, A"),
        (b"x" * 200_000, "line 1: a field is longer"),
        (b'"No\n",A\n1,x\n', "line 1: no column is called 'Lead No'; the header names No, A"),
        (b"Lead No,Lead No\n1,x\n", "line 1: more than one column is called"),
    ],
)
def test_a_bad_file_names_the_line_and_leaves_nothing(
    load: Import, csv_url: str, content: bytes, message: str
) -> None:
    before = _tables(csv_url)
    with pytest.raises(ImportFileError) as error:
        load(content, missing=["Select"])
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)
    assert _tables(csv_url) == before


def test_uuids_that_differ_in_case_are_the_same_id(load: Import) -> None:
    one = "7927b2df-8bba-4d29-b9a2-b6e0beafe620"
    with pytest.raises(ImportFileError, match="line 3: the id is the same as in line 2"):
        load(f"Lead No,A\n{one},1\n{one.upper()},2\n")


@pytest.mark.parametrize("label", ["maybe", "2", "-1", "nan"])
def test_a_label_that_is_neither_yes_nor_no_is_refused(load: Import, label: str) -> None:
    with pytest.raises(ImportFileError, match="line 3: the label") as error:
        load(f"Lead No,Won\n1,1.0\n2,{label}\n", label_column="Won")
    assert label not in str(error.value).split("none of")[0]


def test_a_label_of_two_other_words_is_read_when_told_which_means_yes(load: Import, csv_url: str) -> None:
    content = "Lead No,Outcome\n1,Won\n2,lost\n3,open\n4,won\n5,Lost\n6,\n"
    summary = load(content, label_column="Outcome", positive="WON ", missing=["open"])
    assert [(column.kind, column.missing) for column in summary.columns] == [("boolean", 2)]
    stored = [outcome for (outcome,) in _all(csv_url, "SELECT outcome FROM leads ORDER BY external_ref")]
    assert stored == [True, False, None, True, False, None]


@pytest.mark.parametrize(
    ("positive", "message"),
    [
        (None, "line 2: the label in outcome .* with --positive, .* with --missing"),
        ("won", "line 4: the label in outcome .* beside 'won'; .* --missing"),
        ("sold", "line 3: the label in outcome .* beside 'sold'"),
    ],
)
def test_a_label_of_other_words_is_refused_with_what_to_do(
    load: Import, positive: str | None, message: str
) -> None:
    with pytest.raises(ImportFileError, match=message) as error:
        load("Lead No,Outcome\n1,won\n2,lost\n3,open\n", label_column="Outcome", positive=positive)
    assert "lost" not in str(error.value)
    assert "open" not in str(error.value)


def test_a_word_for_yes_that_no_lead_has_is_refused(load: Import) -> None:
    with pytest.raises(ImportFileError, match="no lead has the label 'sold'"):
        load("Lead No,Outcome\n1,lost\n2,lost\n", label_column="Outcome", positive="sold")


def test_the_id_cannot_be_the_label(load: Import) -> None:
    with pytest.raises(ImportFileError, match="label"):
        load(LEADS, label_column="Lead No")


def test_a_failure_half_way_leaves_the_old_table_as_it_was(
    load: Import, csv_url: str, tmp_path: Path
) -> None:
    load("Lead No,A\n1,old\n")

    def cut_short(stage: str, done: int, total: int) -> None:
        # The file loses its tail between the two readings.
        if stage == "check" and done == total:
            with (tmp_path / "leads.csv").open("r+b") as file:
                file.truncate(len("Lead No,A\n1,new\n"))

    with pytest.raises(ImportFileError, match="changed"):
        load("Lead No,A\n1,new\n2,new\n", replace=True, progress=cut_short)
    assert _all(csv_url, "SELECT external_ref, a FROM leads") == [("1", "old")]
    assert "leads__import" not in _tables(csv_url)


def test_an_existing_table_is_replaced_only_when_asked(load: Import, csv_url: str) -> None:
    load("Lead No,A\n1,x\n")
    with pytest.raises(CommandError, match="--replace"):
        load("Lead No,B\n1,2\n2,3\n")
    assert _all(csv_url, "SELECT a FROM leads") == [("x",)]
    for _ in range(2):
        load("Lead No,B\n1,2\n2,3\n", replace=True)
    assert _all(csv_url, "SELECT b FROM leads ORDER BY b") == [(2.0,), (3.0,)]


def _during_the_load(act: Callable[[], Any]) -> Callable[[str, int, int], None]:
    """Returns a `progress` that acts once rows are in the database and nobody else can see them yet."""
    acts = iter([act])

    def progress(stage: str, _done: int, _total: int) -> None:
        if stage == "load":
            next(acts, lambda: None)()

    return progress


def _make_by_hand(url: str, *statements: str) -> Callable[[], None]:
    def make() -> None:
        with psycopg.connect(url) as connection:
            for statement in (*statements, "CREATE TABLE leads AS SELECT 'precious' AS mine"):
                connection.execute(statement)

    return make


@pytest.mark.parametrize("replace", [False, True])
def test_a_table_that_appears_during_the_load_is_not_lost(load: Import, csv_url: str, replace: bool) -> None:
    with pytest.raises(CommandError, match=r"made by an import|made by somebody else"):
        load(LEADS, replace=replace, progress=_during_the_load(_make_by_hand(csv_url)))
    assert _all(csv_url, "SELECT mine FROM leads") == [("precious",)]
    assert "leads__import" not in _tables(csv_url)


def test_a_table_that_takes_the_place_of_an_imported_one_during_the_load_is_not_lost(
    load: Import, csv_url: str
) -> None:
    load(LEADS)
    with pytest.raises(CommandError, match="not made by an import"):
        load(LEADS, replace=True, progress=_during_the_load(_make_by_hand(csv_url, "DROP TABLE leads")))
    assert _all(csv_url, "SELECT mine FROM leads") == [("precious",)]


def test_of_two_imports_at_once_the_second_is_refused(load: Import, csv_url: str, tmp_path: Path) -> None:
    second = tmp_path / "second.csv"
    second.write_text("Lead No,A\n1,second\n")
    told: list[str] = []

    def import_second() -> None:
        try:
            import_csv(csv_url, second, table="leads", id_column="Lead No")
            told.append("imported")
        except CommandError as exc:
            told.append(str(exc))

    other = threading.Thread(target=import_second)

    def start_second() -> None:
        other.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        deadline = time.monotonic() + 20
        while _all(csv_url, waiting) == [(0,)] and time.monotonic() < deadline:
            time.sleep(0.01)

    load("Lead No,A\n1,first\n", progress=_during_the_load(start_second))
    other.join()
    assert told == ["leads exists already; --replace puts the new leads in its place"]
    assert _all(csv_url, "SELECT a FROM leads") == [("first",)]


def test_a_table_in_the_way_of_the_draft_is_named_and_kept(load: Import, csv_url: str) -> None:
    with psycopg.connect(csv_url) as connection:
        connection.execute("CREATE TABLE leads__import AS SELECT 'precious' AS mine")
    with pytest.raises(CommandError, match="leads__import is in the way"):
        load(LEADS)
    assert _all(csv_url, "SELECT mine FROM leads__import") == [("precious",)]


@pytest.mark.parametrize("table", ["people", "lead_source", "ai_events", "lead_scores"])
def test_a_table_no_import_made_is_never_replaced(load: Import, csv_url: str, table: str) -> None:
    with pytest.raises(CommandError, match="not made by an import"):
        load(LEADS, table=table, replace=True)
    assert _all(csv_url, f"SELECT count(*) FROM {table}") == [(0,)]


@pytest.mark.parametrize(
    ("statement", "reason", "relation"),
    [
        ("CREATE VIEW mine AS SELECT * FROM leads", "depends on it", "mine"),
        ("ALTER TABLE leads ENABLE ROW LEVEL SECURITY", "row-level security", "leads"),
    ],
)
def test_a_table_that_another_could_not_stand_in_for_is_not_replaced(
    load: Import, csv_url: str, statement: str, reason: str, relation: str
) -> None:
    load("Lead No,A\n1,x\n")
    with psycopg.connect(csv_url) as connection:
        connection.execute(statement)
    with pytest.raises(CommandError, match=reason):
        load("Lead No,A\n1,y\n", replace=True)
    assert _all(csv_url, f"SELECT a FROM {relation}") == [("x",)]


def test_readers_do_not_queue_behind_an_import_that_waits_for_one_of_them(load: Import, csv_url: str) -> None:
    load("Lead No,A\n1,x\n")
    done, waits = threading.Event(), []

    def read_on() -> None:
        with psycopg.connect(csv_url, autocommit=True) as reader:
            while not done.is_set():
                began = time.monotonic()
                reader.execute("SELECT a FROM leads")
                waits.append(time.monotonic() - began)
                time.sleep(0.01)

    reader = threading.Thread(target=read_on)
    with psycopg.connect(csv_url) as holder:
        holder.execute("SELECT a FROM leads")  # and its transaction stays open, as that of a dump does
        reader.start()
        try:
            with pytest.raises(CommandError, match="another session still uses it; try again") as error:
                load("Lead No,A\n1,y\n", replace=True, patience=4.0)
        finally:
            done.set()
            reader.join()
        assert "\n" not in str(error.value)
        assert holder.execute("SELECT a FROM leads").fetchall() == [("x",)]
    assert 1.0 < max(waits) < 3.0
    assert "leads__import" not in _tables(csv_url)


def test_a_reader_that_is_soon_done_does_not_stop_an_import(load: Import, csv_url: str) -> None:
    load("Lead No,A\n1,old\n")
    with psycopg.connect(csv_url) as holder:
        holder.execute("SELECT a FROM leads")
        # Longer than one try for the lock, shorter than all of them.
        timer = threading.Timer(2.0, holder.rollback)
        timer.start()
        load("Lead No,A\n1,new\n", replace=True)
        timer.join()
    assert _all(csv_url, "SELECT a FROM leads") == [("new",)]


@pytest.fixture
def roles(csv_url: str) -> Iterator[None]:
    """The roles `clerk`, `service` and "Head of Sales", of which the first makes tables as it likes."""
    names = 'clerk, service, "Head of Sales"'
    with psycopg.connect(csv_url) as connection:
        for name in names.split(", "):
            connection.execute(f"CREATE ROLE {name} LOGIN")
        connection.execute("GRANT CREATE ON SCHEMA public TO clerk, service")
    yield
    with psycopg.connect(csv_url) as connection:
        connection.execute(f"DROP OWNED BY {names}")
        connection.execute(f"DROP ROLE {names}")


_ACCESS = """
SELECT relowner::regrole::text, acl.grantee::regrole::text, acl.privilege_type, acl.is_grantable, attname
FROM (
    SELECT oid, relowner, NULL AS attname, relacl AS acl FROM pg_class
    UNION ALL
    SELECT oid, relowner, attname, attacl FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid
) granted, aclexplode(granted.acl) acl
WHERE oid = 'leads'::regclass ORDER BY 1, 2, 3, 4, 5
"""


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("importer", ["postgres", "clerk"])
def test_a_replaced_table_keeps_its_owner_and_its_grants(
    load: Import, csv_url: str, tmp_path: Path, importer: str
) -> None:
    load("Lead No,Visits,City\n1,1,x\n")
    with psycopg.connect(csv_url) as connection:
        connection.execute("ALTER TABLE leads OWNER TO clerk")
        connection.execute(
            'GRANT SELECT ON leads TO service, "Head of Sales"; GRANT INSERT ON leads TO PUBLIC'
        )
        connection.execute('GRANT UPDATE (visits, city) ON leads TO "Head of Sales" WITH GRANT OPTION')
        connection.execute("REVOKE DELETE ON leads FROM clerk")
        # Which would make of every new table one that the service may write.
        for maker in ("postgres", "clerk"):
            connection.execute(f"ALTER DEFAULT PRIVILEGES FOR ROLE {maker} GRANT ALL ON TABLES TO service")
    before = [grant for grant in _all(csv_url, _ACCESS) if grant[-1] != "city"]
    path = tmp_path / "again.csv"
    path.write_text("Lead No,Visits\n1,2\n")
    url = csv_url.replace("postgres@", f"{importer}@")
    try:
        import_csv(url, path, table="leads", id_column="Lead No", replace=True)
    finally:
        with psycopg.connect(csv_url) as connection:
            for maker in ("postgres", "clerk"):
                connection.execute(
                    f"ALTER DEFAULT PRIVILEGES FOR ROLE {maker} REVOKE ALL ON TABLES FROM service"
                )
    assert _all(csv_url, _ACCESS) == before
    assert ("clerk", '"Head of Sales"', "UPDATE", True, "visits") in before
    assert _all(csv_url.replace("postgres@", "service@"), "SELECT visits FROM leads") == [(2.0,)]


@pytest.mark.usefixtures("roles")
def test_a_table_of_another_role_is_not_replaced(load: Import, csv_url: str, tmp_path: Path) -> None:
    load("Lead No,A\n1,x\n")
    path = tmp_path / "again.csv"
    path.write_text("Lead No,A\n1,y\n")
    url = csv_url.replace("postgres@", "clerk@")
    with pytest.raises(CommandError, match="to own a table that is replaced"):
        import_csv(url, path, table="leads", id_column="Lead No", replace=True)
    assert _all(csv_url, "SELECT a FROM leads") == [("x",)]


@pytest.mark.parametrize("table", ["Leads", "a.b.c", "x;drop", "", "lead-list", "a" * 54])
def test_a_table_name_that_would_need_quoting_is_refused(load: Import, table: str) -> None:
    with pytest.raises(CommandError, match="name in lower case"):
        load(LEADS, table=table)


def test_a_schema_can_be_named_and_must_exist(load: Import, csv_url: str) -> None:
    with pytest.raises(CommandError, match="no such schema"):
        load(LEADS, table="crm.leads")
    with psycopg.connect(csv_url) as connection:
        connection.execute("CREATE SCHEMA crm")
    load(LEADS, table="crm.leads")
    load(LEADS, table="crm.leads", replace=True)
    assert _all(csv_url, "SELECT count(*) FROM crm.leads") == [(3,)]


@pytest.mark.parametrize("first", ["newer", '"A b"'])
def test_a_table_is_replaced_in_its_schema_wherever_the_search_path_makes_new_ones(
    load: Import, csv_url: str, tmp_path: Path, first: str
) -> None:
    path = tmp_path / "again.csv"
    path.write_text("Lead No,A\n1,new\n")
    with psycopg.connect(csv_url) as connection:
        connection.execute(f"CREATE SCHEMA {first}; CREATE SCHEMA crm")
    load("Lead No,A\n1,old\n", table="crm.leads")
    url = f"{csv_url}&options={quote(f'-csearch_path={first},crm'.replace(' ', chr(92) + ' '))}"
    tables = "SELECT schemaname, tablename FROM pg_tables WHERE tablename ~ '^(leads|others)' ORDER BY 2"
    try:
        import_csv(url, path, table="leads", id_column="Lead No", replace=True)
        assert _all(csv_url, tables) == [("crm", "leads")]
        assert _all(csv_url, "SELECT a FROM crm.leads") == [("new",)]
        for _ in range(2):
            import_csv(url, path, table="others", id_column="Lead No", replace=True)
        assert _all(csv_url, tables) == [("crm", "leads"), (first.strip('"'), "others")]
    finally:
        with psycopg.connect(csv_url) as connection:
            connection.execute(f"DROP SCHEMA {first} CASCADE")


def test_a_table_further_down_the_search_path_is_not_hidden_by_a_new_one(
    load: Import, csv_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "again.csv"
    path.write_text("Lead No,A\n1,new\n")
    with psycopg.connect(csv_url) as connection:
        connection.execute("CREATE SCHEMA crm; CREATE TABLE leads AS SELECT 'precious' AS mine")
    with pytest.raises(CommandError, match="not made by an import"):
        import_csv(
            f"{csv_url}&options=-csearch_path%3Dcrm,public",
            path, table="leads", id_column="Lead No", replace=True,
        )  # fmt: skip
    with pytest.raises(CommandError, match="no such schema"):
        import_csv(f"{csv_url}&options=-csearch_path%3Dnowhere", path, table="leads", id_column="Lead No")


def test_a_missing_file_is_one_clear_line(csv_url: str, tmp_path: Path) -> None:
    with pytest.raises(ImportFileError, match="cannot be read: No such file"):
        import_csv(csv_url, tmp_path / "none.csv", table="leads", id_column="Lead No")


def test_progress_ends_where_it_should(load: Import) -> None:
    told: list[tuple[str, int, int]] = []
    load(LEADS, progress=lambda *step: told.append(step))
    size = len(LEADS.encode())
    assert ("check", size, size) in told
    assert told[-1] == ("load", 3, 3)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
        min_size=1,
        max_size=8,
    )
)
def test_any_text_survives_the_way_into_the_database(load: Import, csv_url: str, texts: list[str]) -> None:
    file = io.StringIO()
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)
    writer.writerows([["Lead No", "Note"], *enumerate(texts), ["last", "some text"]])
    load(file.getvalue(), replace=True)
    stored = dict(_all(csv_url, "SELECT external_ref, note FROM leads"))
    assert stored == {**{str(at): text.strip() or None for at, text in enumerate(texts)}, "last": "some text"}


@given(st.lists(st.text(max_size=90), max_size=12))
def test_column_names_are_distinct_plain_identifiers(headers: list[str]) -> None:
    names = build_names(headers, taken={"lead_id"})
    assert len({*names, "lead_id", "ctid"}) == len(headers) + 2
    assert all(re.fullmatch(r"[a-z][a-z0-9_]{0,62}", name) for name in names)


def test_names_read_like_their_headers() -> None:
    headers = ["TotalVisits", "Page Views/Visit", "URLPath", "2nd choice", "%", "Größe", "lead_id", "xmin"]
    assert build_names(headers, taken={"lead_id"}) == [
        "total_visits", "page_views_visit", "url_path", "c_2nd_choice", "column_5", "groe", "lead_id_2",
        "xmin_2",
    ]  # fmt: skip


@given(st.floats())
def test_every_number_python_writes_is_read_back(number: float) -> None:
    assert repr(read_number(repr(number))) == repr(number)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "0"], "number"),
        (["1", "-2.5e3", ".5", "7."], "number"),
        (["1", "NaN", "-inf"], "number"),
        (["NaN"], "text"),
        (["007", "123"], "text"),
        (["1,5"], "text"),
        (["\u0661"], "text"),
        (["1e999"], "text"),
        (["."], "text"),
        (["yes", "NO"], "boolean"),
        (["yes"], "boolean"),
        (["yes", "true"], "text"),
        (["t", "f", "t"], "boolean"),
        (["yes", "no", "maybe"], "text"),
        (["2026-01-31", "2026-01-31 23:59", "2026-01-31T23:59:59.5Z"], "timestamp"),
        (["2026-01-31 23:59:59+00"], "timestamp"),
        (["2026-02-30"], "text"),
        (["0001-01-01T00:00+05:00"], "text"),
        (["31/01/2026"], "text"),
        (["20260131"], "number"),
        ([], "text"),
    ],
)
def test_the_narrowest_type_that_fits_every_value_is_chosen(values: list[str], kind: str) -> None:
    guess = TypeGuess()
    for value in values:
        guess.see(value)
    assert guess.kind == kind


def test_a_timestamp_without_an_offset_is_utc() -> None:
    moments = {read_timestamp(text) for text in ("2026-01-31", "2026-01-31T00:00Z", "2026-01-31 01:00+01:00")}
    assert len(moments) == 1


def test_whoever_remembers_predictions_hears_of_an_import_and_of_later_changes(
    load: Import, csv_url: str
) -> None:
    with psycopg.connect(csv_url, autocommit=True) as listener:
        listener.execute("LISTEN lead_scoring_changes")

        def heard() -> list[str]:
            listener.execute("SELECT 1")
            return [notification.payload for notification in listener.notifies(timeout=0)]

        load(LEADS)
        load(LEADS, replace=True)
        assert heard() == ["*", "*"]
        with psycopg.connect(csv_url) as connection:
            connection.execute("UPDATE leads SET visits = 4 WHERE external_ref = 'L-1'")
        ((lead_id,),) = _all(csv_url, "SELECT lead_id::text FROM leads WHERE external_ref = 'L-1'")
        assert heard() == [lead_id]


def test_an_import_needs_no_migrated_database(empty_database_url: str, tmp_path: Path) -> None:
    path = tmp_path / "leads.csv"
    path.write_text(LEADS)
    assert import_csv(empty_database_url, path, table="leads", id_column="Lead No").rows == 3
