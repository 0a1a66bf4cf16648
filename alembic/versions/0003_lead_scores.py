"""What bulk scoring last said of each lead.

Revision ID: 0003
Revises: 0002
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # No foreign key: leads live in whatever relation LEAD_SOURCE names.
    op.execute("""
        CREATE TABLE lead_scores (
            lead_id uuid PRIMARY KEY,
            external_ref text,
            probability double precision NOT NULL CHECK (probability BETWEEN 0 AND 1),
            raw_score double precision NOT NULL,
            coverage double precision NOT NULL CHECK (coverage BETWEEN 0 AND 1),
            verdict text NOT NULL CHECK (verdict IN ('ok', 'caution', 'abstain')),
            model_version text NOT NULL,
            model_sha256 text NOT NULL,
            scored_at timestamptz NOT NULL
        )
    """)
    op.execute("CREATE INDEX lead_scores_by_reference ON lead_scores (external_ref)")


def downgrade() -> None:
    op.execute("DROP TABLE lead_scores")
