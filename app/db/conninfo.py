"""What every connection to a database asks for, whatever its address, the environment and the database say.

Texts come and go as UTF-8 that nobody looks at: IDs, references, the bytes of COPY. A session in another
encoding, which is that of the database or of `PGCLIENTENCODING`, would take them for other characters. And
the kernel looks every half minute whether the other side is still there, where its own way is to wait two
hours: that keeps networks from forgetting a quiet connection, and tells of one whose server is gone. Called
by whatever opens a connection.
"""

from psycopg.conninfo import conninfo_to_dict, make_conninfo

_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}

WITHOUT_TIMEOUTS = (
    "SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout',"
    " 'idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout')"
)
"""What a session that waits as long as it takes says first: a role or a database may have set others."""


def complete_address(url: str) -> str:
    """Returns the address with UTF-8 as the encoding of the session; the server converts where it must.

    What it says itself of keepalives counts.

    Raises:
        psycopg.ProgrammingError: it is no address; settings that were checked have none such.
    """
    return make_conninfo(url, **{**_KEEPALIVES, **conninfo_to_dict(url), "client_encoding": "utf8"})
