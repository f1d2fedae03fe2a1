"""An alias's share for a candidate, a version's serving defaults and engine deaths, what a promote has to show."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("aliases", sa.Column("candidate", sa.Integer(), nullable=True))
    op.add_column("aliases", sa.Column("candidate_share", sa.Float(), nullable=True))
    op.add_column("versions", sa.Column("serving", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("versions", sa.Column("engine_deaths", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("adapters", sa.Column("gate", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    for table, columns in (
        ("adapters", ("gate",)),
        ("versions", ("serving", "engine_deaths")),
        ("aliases", ("candidate", "candidate_share")),
    ):
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.drop_column(column)
