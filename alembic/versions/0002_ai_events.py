"""The table prediction events end up in.

Rows are inserted once and never changed; `id` makes a repeated delivery harmless.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE ai_events (
            id uuid PRIMARY KEY,
            action text NOT NULL,
            meta jsonb NOT NULL,
            request_id text,
            created_at timestamptz NOT NULL
        )
    """)
    op.execute("CREATE INDEX ai_events_by_time ON ai_events (created_at)")
    op.execute("CREATE INDEX ai_events_of_request ON ai_events (request_id)")


def downgrade() -> None:
    op.execute("DROP TABLE ai_events")
