"""A run of bulk scoring goes by the manifest of its model, not by the artifact alone.

Two models may share an artifact and differ in calibrator or threshold: what one of them left unfinished, the
other must not go on with.

Revision ID: 0008
Revises: 0007
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE lead_score_runs RENAME COLUMN model_sha256 TO manifest_sha256")


def downgrade() -> None:
    op.execute("ALTER TABLE lead_score_runs RENAME COLUMN manifest_sha256 TO model_sha256")
