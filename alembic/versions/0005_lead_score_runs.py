"""How far bulk scoring of each source is, and which source a score came from.

Revision ID: 0005
Revises: 0004
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE lead_score_runs (
            source text PRIMARY KEY,
            model_sha256 text NOT NULL,
            as_of timestamptz NOT NULL,
            min_coverage double precision NOT NULL,
            last_lead_id uuid,
            leads bigint NOT NULL,
            scored bigint NOT NULL,
            started_at timestamptz NOT NULL,
            finished_at timestamptz
        )
    """)
    # Empty for scores written before this revision, until their lead is scored again.
    op.execute("ALTER TABLE lead_scores ADD COLUMN source text")


def downgrade() -> None:
    op.execute("ALTER TABLE lead_scores DROP COLUMN source")
    op.execute("DROP TABLE lead_score_runs")
