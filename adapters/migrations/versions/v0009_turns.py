"""When a tenant's last export or job was begun, apart from its rows, which it may delete."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "turns",
        sa.Column("queue", sa.String(length=16), nullable=False),
        sa.Column("tenant", sa.String(length=63), nullable=False),
        sa.Column("begun_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name=op.f("fk_turns_tenant")),
        sa.PrimaryKeyConstraint("queue", "tenant", name=op.f("pk_turns")),
    )
    for queue in ("exports", "jobs"):
        op.execute(
            f"INSERT INTO turns (queue, tenant, begun_at) SELECT '{queue}', tenant, MAX(started_at) FROM {queue} "  # noqa: S608
            "WHERE started_at IS NOT NULL GROUP BY tenant"
        )


def downgrade() -> None:
    op.drop_table("turns")
