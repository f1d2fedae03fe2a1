"""What a fine-tuning job uses: seconds and bytes; how often its worker was lost; checkpoints that have files."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("run_seconds", sa.Float(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("job_checkpoints", sa.Column("is_kept", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("job_checkpoints", sa.Column("number", sa.Integer(), nullable=True))


def downgrade() -> None:
    for table, columns in (
        ("job_checkpoints", ("number", "is_kept")),
        ("jobs", ("stored_bytes", "run_seconds", "losses")),
    ):
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.drop_column(column)
