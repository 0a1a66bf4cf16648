"""The table of API keys and its commands, against a real database."""

import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from click.testing import CliRunner, Result

from app.cli import cli
from app.db.api_keys import PostgresApiKeys, create_key, list_keys, revoke_key
from app.db.engine import Database
from app.errors import CommandError, DatabaseUnavailableError
from app.security.access import Client
from app.security.api_keys import digest_key

PEPPER = "a pepper of thirty-two characters"


@pytest.fixture
async def source(database_url: str) -> AsyncIterator[PostgresApiKeys]:
    database = Database(database_url, pool_size=1, deadline_seconds=5)
    yield PostgresApiKeys(database)
    await database.close()


async def test_a_worker_reads_the_live_keys_by_their_hashes(
    database_url: str, source: PostgresApiKeys
) -> None:
    assert await source.fetch_keys() == []
    first = create_key(database_url, "crm", ["score", "read", "score"], PEPPER.encode())
    second = create_key(database_url, "ops", ["admin"], PEPPER.encode())
    revoke_key(database_url, second.partition(".")[0])
    (key,) = await source.fetch_keys()
    assert key.id == first.partition(".")[0]
    assert key.client == Client("crm", frozenset({"read", "score"}))
    assert key.digest == digest_key(PEPPER.encode(), first)


def test_a_client_has_two_live_keys_at_most_and_rotates_through_them(database_url: str) -> None:
    oldest, newer = (create_key(database_url, "crm", ["score"], PEPPER.encode()) for _ in range(2))
    create_key(database_url, "another", ["score"], PEPPER.encode())
    with pytest.raises(CommandError, match=f"keys revoke {oldest.partition('.')[0]}"):
        create_key(database_url, "crm", ["score"], PEPPER.encode())
    revoke_key(database_url, oldest.partition(".")[0])
    newest = create_key(database_url, "crm", ["score"], PEPPER.encode())
    rows = {row.id: row for row in list_keys(database_url) if row.client == "crm"}
    live = [key.partition(".")[0] for key in (newer, newest)]
    assert [key_id for key_id, row in rows.items() if row.revoked_at is None] == live


def test_a_third_key_is_refused_also_when_all_are_made_at_once(database_url: str) -> None:
    def make(_number: int) -> bool:
        try:
            return bool(create_key(database_url, "crm", ["score"], PEPPER.encode()))
        except CommandError:
            return False

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(make, range(6))) == 2


def test_revoking_again_keeps_the_first_time_and_an_unknown_key_is_an_error(database_url: str) -> None:
    key_id = create_key(database_url, "crm", ["score"], PEPPER.encode()).partition(".")[0]
    revoke_key(database_url, key_id)
    first = list_keys(database_url)
    revoke_key(database_url, key_id)
    assert list_keys(database_url) == first
    with pytest.raises(CommandError, match="no key"):
        revoke_key(database_url, "nothing")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 65, "jwt:clerk", "ä", "a\n"])
def test_a_client_has_a_plain_name(database_url: str, name: str) -> None:
    with pytest.raises(CommandError, match="name"):
        create_key(database_url, name, ["score"], PEPPER.encode())


async def test_a_database_without_the_table_or_none_at_all_is_unavailable(empty_database_url: str) -> None:
    nowhere = empty_database_url.replace("/test_", "/nowhere_")
    for url in (empty_database_url, nowhere):
        database = Database(url, pool_size=1, deadline_seconds=5)
        with pytest.raises(DatabaseUnavailableError):
            await PostgresApiKeys(database).fetch_keys()
        await database.close()
    with pytest.raises(CommandError, match="db upgrade"):
        list_keys(empty_database_url)


def run(url: str, *arguments: str, pepper: str = PEPPER) -> Result:
    return CliRunner().invoke(cli, ["keys", *arguments], env={"DATABASE_URL": url, "AUTH_KEY_PEPPER": pepper})


def test_the_commands_show_a_key_once_and_keep_only_its_hash(database_url: str) -> None:
    created = run(database_url, "create", "--client", "crm", "--scope", "score", "--scope", "read", "--json")
    assert created.exit_code == 0, created.output
    facts = json.loads(created.stdout)
    key_id, _, secret = facts["key"].partition(".")
    assert (facts["id"], facts["client"]) == (key_id, "crm")

    listed = json.loads(run(database_url, "list", "--json").stdout)
    assert [(row["id"], row["scopes"], row["revoked_at"]) for row in listed] == [
        (key_id, ["read", "score"], None)
    ]
    assert "live" in run(database_url, "list").stdout
    assert run(database_url, "revoke", key_id).exit_code == 0
    shown = run(database_url, "list")
    assert "revoked" in shown.stdout
    with psycopg.connect(database_url) as connection:
        kept = connection.execute("SELECT api_keys::text FROM api_keys").fetchall()
    assert secret not in str(kept) + shown.output + str(listed)


def test_a_third_key_or_a_missing_pepper_is_one_line(database_url: str) -> None:
    create = ("create", "--client", "crm", "--scope", "score")
    assert run(database_url, *create).exit_code == run(database_url, *create).exit_code == 0
    for result, word in (
        (run(database_url, *create), "revoke"),
        (run(database_url, *create, pepper=""), "AUTH_KEY_PEPPER"),
    ):
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert word in result.stderr
    short = run(database_url, *create, pepper="short")
    assert short.exit_code == 1
    assert "AUTH_KEY_PEPPER" in short.stderr
    assert "short" not in short.stderr.replace("shorter", "")
