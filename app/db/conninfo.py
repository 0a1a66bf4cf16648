"""What every connection to a database asks for, whatever its address, the environment and the database say.

Texts come and go as UTF-8 that nobody looks at: IDs, references, the bytes of COPY. A session in another
encoding, which is that of the database or of `PGCLIENTENCODING`, would take them for other characters. Called
by whatever opens a connection.
"""

from psycopg.conninfo import make_conninfo

WITHOUT_TIMEOUTS = (
    "SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout',"
    " 'idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout')"
)
"""What a session that waits as long as it takes says first: a role or a database may have set others."""


def in_utf8(url: str) -> str:
    """Returns the address with UTF-8 as the encoding of the session; the server converts where it must.

    Raises:
        psycopg.ProgrammingError: it is no address; settings that were checked have none such.
    """
    return make_conninfo(url, client_encoding="utf8")
