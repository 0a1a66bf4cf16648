"""What may be watched: a column whose type is a domain over uuid, too, and a warning where it costs writes.

It finds the functions it calls also where they are in a schema that its caller does not look into.

A transaction that notifies cannot be prepared (`PREPARE TRANSACTION`), whatever a trigger does about it, so
whoever watches a table on a server that allows prepared transactions is told.

Revision ID: 0009
Revises: 0008
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_WATCH = """
CREATE OR REPLACE FUNCTION lead_scoring_watch(watched regclass, lead_column name DEFAULT NULL) RETURNS void
LANGUAGE plpgsql{path} AS $$
DECLARE
    argument text := coalesce(quote_literal(lead_column), '');
BEGIN
    IF lead_column IS NOT NULL AND NOT EXISTS (
        {is_uuid}
    ) THEN
        RAISE EXCEPTION '% has no column % of type uuid', watched, lead_column;
    END IF;{warn}
    PERFORM lead_scoring_unwatch(watched);
    EXECUTE format('CREATE TRIGGER lead_scoring_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows
        FOR EACH STATEMENT EXECUTE FUNCTION lead_scoring_notify(%s)', watched, argument);
    EXECUTE format('CREATE TRIGGER lead_scoring_update AFTER UPDATE ON %s
        REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
        FOR EACH STATEMENT EXECUTE FUNCTION lead_scoring_notify(%s)', watched, argument);
    EXECUTE format('CREATE TRIGGER lead_scoring_delete AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows
        FOR EACH STATEMENT EXECUTE FUNCTION lead_scoring_notify(%s)', watched, argument);
    EXECUTE format('CREATE TRIGGER lead_scoring_truncate AFTER TRUNCATE ON %s
        FOR EACH STATEMENT EXECUTE FUNCTION lead_scoring_notify(%s)', watched, argument);
END
$$
"""

_IS_UUID_BEFORE = """SELECT FROM pg_attribute
        WHERE attrelid = watched AND attname = lead_column AND NOT attisdropped
            AND atttypid = 'uuid'::regtype"""

_IS_UUID = """WITH RECURSIVE base (oid) AS (
            SELECT atttypid FROM pg_attribute
            WHERE attrelid = watched AND attname = lead_column AND NOT attisdropped
            UNION ALL
            SELECT typbasetype FROM base JOIN pg_type USING (oid) WHERE typtype = 'd'
        )
        SELECT FROM base WHERE oid = 'uuid'::regtype"""

_WARN = """
    IF current_setting('max_prepared_transactions')::integer > 0 THEN
        RAISE WARNING 'PREPARE TRANSACTION fails from now on for transactions that write to %', watched
            USING HINT = 'If your application prepares them, SELECT lead_scoring_unwatch for this table.';
    END IF;"""


def upgrade() -> None:
    op.execute(_WATCH.format(is_uuid=_IS_UUID, warn=_WARN, path=" SET search_path FROM CURRENT"))


def downgrade() -> None:
    op.execute(_WATCH.format(is_uuid=_IS_UUID_BEFORE, warn="", path=""))
