"""Exports: the result that orders share, how far it is and how often it was tried, how large it is, when it goes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

COUNTS = (
    *(("bytes_done", sa.BigInteger), ("bytes_total", sa.BigInteger), ("size_bytes", sa.BigInteger)),
    *(("attempts", sa.Integer), ("deaths", sa.Integer), ("losses", sa.Integer)),
)


def upgrade() -> None:
    op.add_column("exports", sa.Column("result", sa.String(length=40), nullable=False, server_default=""))
    op.add_column("exports", sa.Column("stage", sa.String(length=40), nullable=True))
    for name, kind in COUNTS:
        op.add_column("exports", sa.Column(name, kind(), nullable=False, server_default="0"))
    op.add_column("exports", sa.Column("started_at", sa.Float(), nullable=True))
    op.add_column("exports", sa.Column("expires_at", sa.Float(), nullable=True))
    op.execute("UPDATE exports SET result = id")  # as their folders were named until now


def downgrade() -> None:
    with op.batch_alter_table("exports") as batch:
        for name in ("expires_at", "started_at", *(name for name, _ in reversed(COUNTS)), "stage", "result"):
            batch.drop_column(name)
