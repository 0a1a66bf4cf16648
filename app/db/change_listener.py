"""Hears from the database which leads changed, and says for how long its silence may be trusted.

One session listens on the channel that the triggers of migration 0004 notify. Twenty times a second it sends
the server an empty statement: the answer comes after the notifications of whatever was committed before, so
once it is there, nothing older is unheard of. This trust ends by the clock, a fifth of a second after the
statement was sent, whatever has become of the session, of the server, or of this process meanwhile.

It runs on a thread of its own, so that a busy event loop does not make it late. The driver's statements are
not used, because they have no deadline; see `engine`. Started and closed by `app.wiring`.
"""

import math
import select
import threading
import time
from collections.abc import Callable
from contextlib import closing

import psycopg
import structlog
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

from app.ai.domain import LeadObserver, is_uuid
from app.db.connect_failure import name_failure
from app.db.conninfo import complete_address
from app.db.lead_cells import quoted_relation
from app.metrics import CHANGE_LISTENER, LEAD_CHANGES, LISTENER_LOSSES

CHANNEL = "lead_scoring_changes"
APPLICATION_NAME = "lead-scoring changes"

BEAT_SECONDS = 0.05
TRUST_SECONDS = 0.2
"""What is missing to a quarter of a second is left to an answer, once found, to leave in."""

LOOK_SECONDS = 30.0
"""So often the triggers are looked at again: nothing tells of one that is disabled or dropped."""

_CONNECT_SECONDS = 2
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 2.0

# The tables under a view, and under the views under it; and which of them lack a trigger for some event.
_UNWATCHED = b"""
    WITH RECURSIVE under (oid) AS (
        SELECT to_regclass($1)::oid
        UNION
        SELECT d.refobjid FROM under u
        JOIN pg_rewrite r ON r.ev_class = u.oid
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            AND d.refclassid = 'pg_class'::regclass
    )
    SELECT CASE WHEN to_regclass($1) IS NULL THEN $1 ELSE
        coalesce(string_agg(oid::regclass::text, ', ' ORDER BY oid::regclass::text), '')
    END
    FROM under JOIN pg_class c USING (oid)
    WHERE c.relkind <> 'v' AND (
        SELECT coalesce(bit_or(t.tgtype), 0) & 60 <> 60
        FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
        WHERE t.tgrelid = c.oid AND p.proname = 'lead_scoring_notify' AND t.tgenabled IN ('O', 'A')
    )
"""

_log = structlog.get_logger()


class ChangeListener:
    """Tells `observer`, on its own thread, which leads of `relation` changed.

    `deadline_seconds` bounds the wait for one answer of the server; then the session counts as lost. After a
    loss whatever was known is forgotten, and a new session is opened, at once first, then after pauses of up
    to two seconds. The triggers are looked at every `look_seconds`. `monotonic` gives seconds.
    """

    def __init__(
        self,
        url: str,
        relation: str,
        observer: LeadObserver,
        *,
        deadline_seconds: float,
        look_seconds: float = LOOK_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._relation = relation
        self._observer = observer
        self._deadline_seconds = deadline_seconds
        self._monotonic = monotonic
        self._closing = threading.Event()
        self._settled = threading.Event()
        self._unwatched: str | None = None
        self._look_seconds = look_seconds
        self._next_look = -math.inf
        self._noted = ""
        self._thread = threading.Thread(target=self._run, name="change-listener", daemon=True)

    def start(self) -> None:
        """Begins to listen; returns when the first attempt has succeeded or failed, within the deadline."""
        self._thread.start()
        self._settled.wait(self._deadline_seconds)

    def close(self) -> None:
        """Stops listening; waits no longer than connecting may take."""
        self._closing.set()
        self._thread.join(_CONNECT_SECONDS + self._deadline_seconds)

    def hears_everything(self) -> bool:
        """Tells whether every table under the relation has its triggers, as of the last look."""
        return self._unwatched == ""

    def _run(self) -> None:
        pause = 0.0
        while not self._closing.wait(pause):
            pause = min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            failure: Exception | None = None
            try:
                with closing(self._connect()) as connection:
                    session = _Session(connection.pgconn, self._deadline_seconds, self._hear)
                    self._begin(session)
                    pause = 0.0
                    self._listen(session)
            except (psycopg.Error, OSError) as exc:
                failure = exc
            except Exception as exc:  # noqa: BLE001  nobody would start this thread again
                _log.exception("change_listener_failed")
                failure = exc
            finally:
                self._observer.trust_until(-math.inf)
                self._settled.set()
            if failure is not None:
                self._note("lost", failure)  # last: to name it may take a moment

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            complete_address(self._url),
            autocommit=True,
            connect_timeout=_CONNECT_SECONDS,
            application_name=APPLICATION_NAME,
        )

    def _begin(self, session: "_Session") -> None:
        session.ask(f"LISTEN {CHANNEL}".encode())
        # From here on every change is heard of; of those before nobody knows.
        self._observer.forget_all()
        self._look_at_triggers(session)
        self._note("listening")

    def _look_at_triggers(self, session: "_Session") -> None:
        self._next_look = self._monotonic() + self._look_seconds
        found = session.ask(_UNWATCHED, quoted_relation(self._relation).encode()).get_value(0, 0) or b""
        unwatched = found.decode("utf-8", "replace")
        if unwatched and unwatched != self._unwatched:
            _log.warning(
                "lead_source_not_watched",
                tables=unwatched,
                meaning="their changes show when a remembered answer expires",
                remedy="call lead_scoring_watch for them, see docs/runbook.md",
            )
        if self._unwatched not in {unwatched, None}:
            self._observer.forget_all()  # what changed while a trigger was away was not heard of
        self._unwatched = unwatched

    def _listen(self, session: "_Session") -> None:
        while not self._closing.is_set():
            asked = self._monotonic()
            session.ask(b"")
            self._observer.trust_until(asked + TRUST_SECONDS)
            self._settled.set()
            session.wait(BEAT_SECONDS)
            if asked >= self._next_look:
                self._look_at_triggers(session)

    def _hear(self, payload: str) -> None:
        uuids = payload.lower().split()
        if all(map(is_uuid, uuids)):
            self._observer.forget(uuids)
            LEAD_CHANGES.labels("lead").inc(len(uuids))
        else:
            self._observer.forget_all()
            self._next_look = -math.inf
            LEAD_CHANGES.labels("all").inc()

    def _note(self, state: str, failure: Exception | None = None) -> None:
        CHANGE_LISTENER.set(1 if state == "listening" else 0)
        if failure is not None:
            LISTENER_LOSSES.inc()
        if state != self._noted:
            # What the driver says may quote the connection string.
            cause = failure and name_failure(failure, self._url)
            _log.info("change_listener", state=state, error=failure and type(failure).__name__, cause=cause)
        self._noted = state


class _Session:
    """One connection, used without the driver's statements: every wait for the server has a deadline."""

    def __init__(self, pgconn: PGconn, deadline_seconds: float, hear: Callable[[str], None]) -> None:
        self._pgconn = pgconn
        self._deadline_seconds = deadline_seconds
        self._hear = hear
        self._poll = select.poll()
        self._poll.register(pgconn.socket, select.POLLIN)

    def ask(self, statement: bytes, *parameters: bytes) -> PGresult:
        """Returns the result; every notification sent before it has been heard by then.

        Raises:
            psycopg.OperationalError: the statement failed, the session ended, or there is no answer in time.
        """
        if parameters:
            self._pgconn.send_query_params(statement, parameters)
        else:
            self._pgconn.send_query(statement)
        self._pgconn.flush()
        until = time.monotonic() + self._deadline_seconds
        result = None
        while (latest := self._next_result(until)) is not None:
            result = latest
        self._hear_all()
        if result is None or result.status not in (
            ExecStatus.COMMAND_OK,
            ExecStatus.TUPLES_OK,
            ExecStatus.EMPTY_QUERY,
        ):
            raise psycopg.OperationalError("the statement failed")
        return result

    def wait(self, seconds: float) -> None:
        """Hears notifications as they come, for this long."""
        until = time.monotonic() + seconds
        while self._receive(until):
            self._hear_all()

    def _next_result(self, until: float) -> PGresult | None:
        while self._pgconn.is_busy():
            if not self._receive(until):
                raise psycopg.OperationalError("no answer within the deadline")
        return self._pgconn.get_result()

    def _receive(self, until: float) -> bool:
        left = until - time.monotonic()
        if left <= 0 or not self._poll.poll(left * 1000):
            return False
        self._pgconn.consume_input()
        return True

    def _hear_all(self) -> None:
        while (notification := self._pgconn.notifies()) is not None:
            self._hear(notification.extra.decode("ascii", "replace"))
