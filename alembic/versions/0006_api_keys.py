"""API keys: a keyed hash of each, whose it is and what it allows.

Rows are never deleted: who once had a key stays known.

Revision ID: 0006
Revises: 0005
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE api_keys (
            id text PRIMARY KEY,
            client text NOT NULL,
            scopes text[] NOT NULL,
            digest bytea NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            revoked_at timestamptz
        )
    """)
    op.execute("CREATE INDEX api_keys_of_client ON api_keys (client) WHERE revoked_at IS NULL")


def downgrade() -> None:
    op.execute("DROP TABLE api_keys")
