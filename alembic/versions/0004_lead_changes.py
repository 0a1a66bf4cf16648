"""Says which leads changed, on the channel `lead_scoring_changes`, with the transaction that changes them.

A notification is up to 200 lead IDs separated by spaces, or `*` for any lead there is. `lead_scoring_watch`
attaches the triggers to a table and names the column that holds the IDs; without a column every lead counts
as changed. It is called here for the tables under the default view; whoever has tables of their own calls it
for those.

Revision ID: 0004
Revises: 0003
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# Nothing that goes wrong in here may cost the CRM its write: then every lead counts as changed.
_NOTIFY = """
CREATE FUNCTION lead_scoring_notify() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    changed_rows text := CASE TG_OP
        WHEN 'INSERT' THEN 'SELECT %1$s AS lead_id FROM new_rows'
        WHEN 'DELETE' THEN 'SELECT %1$s AS lead_id FROM old_rows'
        ELSE 'SELECT %1$s AS lead_id FROM old_rows UNION ALL SELECT %1$s FROM new_rows'
    END;
    lead_ids uuid[];
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify('lead_scoring_changes', '*');
    ELSIF TG_NARGS = 0 THEN
        EXECUTE format('SELECT pg_notify(''lead_scoring_changes'', ''*'') FROM (%s LIMIT 1) changed',
            format(changed_rows, 'NULL'));
    ELSE
        EXECUTE format('SELECT array_agg(lead_id) FROM (
                SELECT DISTINCT lead_id FROM (%s) changed WHERE lead_id IS NOT NULL LIMIT 2001
            ) few', format(changed_rows, quote_ident(TG_ARGV[0]))) INTO lead_ids;
        IF cardinality(lead_ids) > 2000 THEN
            PERFORM pg_notify('lead_scoring_changes', '*');
        ELSE
            PERFORM pg_notify('lead_scoring_changes', array_to_string(lead_ids[first:first + 199], ' '))
            FROM generate_series(1, cardinality(lead_ids), 200) first;
        END IF;
    END IF;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    PERFORM pg_notify('lead_scoring_changes', '*');
    RETURN NULL;
END
$$;
"""

_WATCH = """
CREATE FUNCTION lead_scoring_watch(watched regclass, lead_column name DEFAULT NULL) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    argument text := coalesce(quote_literal(lead_column), '');
BEGIN
    IF lead_column IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = watched AND attname = lead_column AND atttypid = 'uuid'::regtype AND NOT attisdropped
    ) THEN
        RAISE EXCEPTION '% has no column % of type uuid', watched, lead_column;
    END IF;
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
$$;
CREATE FUNCTION lead_scoring_unwatch(watched regclass) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('DROP TRIGGER IF EXISTS lead_scoring_insert ON %s', watched);
    EXECUTE format('DROP TRIGGER IF EXISTS lead_scoring_update ON %s', watched);
    EXECUTE format('DROP TRIGGER IF EXISTS lead_scoring_delete ON %s', watched);
    EXECUTE format('DROP TRIGGER IF EXISTS lead_scoring_truncate ON %s', watched);
    -- Whoever listens looks again at what is watched.
    PERFORM pg_notify('lead_scoring_changes', '*');
END
$$;
"""

_DEFAULT_SOURCE = {
    "people": "id",
    "touchpoints": "person_id",
    "applications": "person_id",
    "programmes": None,
    "campuses": None,
}


def upgrade() -> None:
    op.execute(_NOTIFY)
    op.execute(_WATCH)
    for table, lead_column in _DEFAULT_SOURCE.items():
        argument = f", '{lead_column}'" if lead_column else ""
        op.execute(f"SELECT lead_scoring_watch('{table}'{argument})")
    # The leads that are scored ahead of being asked are the newest ones.
    op.execute("CREATE INDEX people_by_creation ON people (created_at)")


def downgrade() -> None:
    op.execute("DROP INDEX people_by_creation")
    for table in _DEFAULT_SOURCE:
        op.execute(f"SELECT lead_scoring_unwatch('{table}')")
    op.execute("DROP FUNCTION lead_scoring_watch, lead_scoring_unwatch, lead_scoring_notify")
