"""The bases that this state was served with, so that a version of another one can be told by name."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "bases",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("is_served", sa.Boolean(), nullable=False),
        sa.Column("max_rank", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.String(length=40), nullable=True),
        sa.Column("engine_version", sa.String(length=120), nullable=True),
        sa.Column("served_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_bases")),
    )


def downgrade() -> None:
    op.drop_table("bases")
