"""The registry's tables. Every row has its tenant. A change needs a migration beside it; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    false,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("limits", JSON(none_as_null=True)),
)

# What a key lets its bearer do. The key itself is nowhere: `digest` is HMAC-SHA256 of it under the server's pepper.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("prefix", String(16), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("name", String(63)),
    Column("scopes", JSON, nullable=False),
    Column("adapters", JSON(none_as_null=True)),
    Column("limits", JSON(none_as_null=True)),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Index(None, "tenant"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("name", String(63), nullable=False),
    Column("name_key", String(63), nullable=False),  # lower case: names are unique regardless of case
    Column("created_at", Float, nullable=False),
    Column("gate", JSON(none_as_null=True)),  # what a promote of `stable` has to show
    UniqueConstraint("tenant", "name_key"),
)

# One number per version row and per burnt load: an engine's integer id is never used for two things.
engine_ids = Table(
    "engine_ids",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("adapter_id", ForeignKey(adapters.c.id), nullable=False),
    Column("number", Integer, nullable=False),
    sqlite_autoincrement=True,
)

versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("adapter_id", ForeignKey(adapters.c.id), nullable=False),
    Column("number", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("digest", String(71)),
    Column("base_digest", String(71)),
    Column("rank", Integer),
    Column("size_bytes", BigInteger, nullable=False),
    Column("parent", String(255)),
    Column("created_at", Float, nullable=False),
    Column("reasons", JSON, nullable=False),
    Column("dropped", JSON, nullable=False),
    Column("card", JSON(none_as_null=True)),
    Column("proof", JSON(none_as_null=True)),
    Column("is_warm", Boolean, nullable=False, server_default=false()),
    Column("engine_id", ForeignKey(engine_ids.c.id)),
    Column("serving", JSON(none_as_null=True)),  # defaults that a request overrides
    Column("engine_deaths", Integer, nullable=False, server_default="0"),  # while this version was loaded and probed
    UniqueConstraint("adapter_id", "number"),
    Index(None, "digest"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("adapter_id", Integer, primary_key=True),
    Column("alias_key", String(63), primary_key=True),
    Column("alias", String(63), nullable=False),
    Column("number", Integer, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("previous", JSON, nullable=False),
    Column("candidate", Integer),  # a version of the adapter that gets `candidate_share` of the alias's requests
    Column("candidate_share", Float),
    ForeignKeyConstraint(["adapter_id", "number"], ["versions.adapter_id", "versions.number"]),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("at", Float, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("name", String(63)),
    Column("number", Integer),
    Column("alias", String(63)),
    Column("actor", String(120), nullable=False),
    Column("detail", JSON, nullable=False),
    Index(None, "tenant", "name"),
    sqlite_autoincrement=True,
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", ForeignKey(tenants.c.id), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_hash", String(128), nullable=False),
    Column("response", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
)

exports = Table(
    "exports",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("ref", String(140), nullable=False),
    Column("format", String(20), nullable=False),
    Column("options", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", Float, nullable=False),
    Column("path", String(4096)),  # of the result, for as long as it is kept
    Column("report", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("result", String(40), nullable=False, server_default=""),  # its folder; orders of one are one piece of work
    Column("stage", String(40)),
    Column("bytes_done", BigInteger, nullable=False, server_default="0"),
    Column("bytes_total", BigInteger, nullable=False, server_default="0"),
    Column("size_bytes", BigInteger, nullable=False, server_default="0"),  # of the result; estimated until it is there
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("deaths", Integer, nullable=False, server_default="0"),  # of its process, without a word
    Column("losses", Integer, nullable=False, server_default="0"),  # of its server
    Column("started_at", Float),
    Column("expires_at", Float),
    Index(None, "tenant", "created_at"),
)

# When a tenant's last export or fine-tuning job was begun. It outlives the rows of these.
turns = Table(
    "turns",
    metadata,
    Column("queue", String(16), primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), primary_key=True),
    Column("begun_at", Float, nullable=False),
)

# An adapter that another tenant may ask for answers.
grants = Table(
    "grants",
    metadata,
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("adapter_id", ForeignKey(adapters.c.id), primary_key=True),
    Column("grantee", ForeignKey(tenants.c.id), primary_key=True),
    Column("created_at", Float, nullable=False),
    Index(None, "grantee"),
)

# Files that were sent to be used later: weights of adapters, rows to train on or to measure with.
files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("actor", String(120), nullable=False),  # who sent it
    Column("purpose", String(20), nullable=False),
    Column("filename", String(255), nullable=False),  # the sender's; the file on the disk has the id as its name
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", String(71), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Index(None, "tenant", "created_at"),
)

# Files that come in parts. `size_bytes` and `digest` are what the sender declares of the whole.
uploads = Table(
    "uploads",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("actor", String(120), nullable=False),
    Column("purpose", String(20), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("mime_type", String(255), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", String(71)),
    Column("status", String(16), nullable=False),
    Column("file_id", String(40)),  # what became of it; the file itself may be gone again
    Column("file_seconds", Integer),  # how long the file shall be kept
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Index(None, "tenant", "created_at"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("upload_id", ForeignKey(uploads.c.id), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", String(71), nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("upload_id", "digest"),  # the same bytes again are the same part
    Index(None, "tenant"),
)

# Fine-tuning jobs; `fence` is of the worker that holds the job, or of nobody.
jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("actor", String(120), nullable=False),
    Column("adapter", String(63), nullable=False),  # the name that its version gets
    Column("model", String(255), nullable=False),  # as the client named it
    Column("training_file", String(40), nullable=False),
    Column("validation_file", String(40)),
    Column("seed", BigInteger, nullable=False),
    Column("request", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("phase", String(16), nullable=False),
    Column("settings", JSON(none_as_null=True)),
    Column("progress", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("number", Integer),  # of the version that was made of it
    Column("trained_tokens", BigInteger),
    Column("result_file", String(40)),
    Column("attempts", Integer, nullable=False),
    Column("deaths", Integer, nullable=False),  # of its process, without a word
    Column("losses", Integer, nullable=False, server_default="0"),  # of its worker, whose lease ran out
    Column("run_seconds", Float, nullable=False, server_default="0"),  # of its processes, all tries together
    Column("stored_bytes", BigInteger, nullable=False, server_default="0"),  # of its folder
    Column("fence", Integer, nullable=False),
    Column("leased_until", Float),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Index(None, "tenant", "created_at"),
    Index(None, "status"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("job_id", ForeignKey(jobs.c.id), nullable=False),
    Column("at", Float, nullable=False),
    Column("level", String(8), nullable=False),
    Column("message", String, nullable=False),
    Column("data", JSON(none_as_null=True)),
    Index(None, "job_id"),
    sqlite_autoincrement=True,
)

job_checkpoints = Table(
    "job_checkpoints",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", ForeignKey(tenants.c.id), nullable=False),
    Column("job_id", ForeignKey(jobs.c.id), nullable=False),
    Column("step", Integer, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("is_kept", Boolean, nullable=False, server_default=false()),  # its files are there
    Column("number", Integer),  # of the version that was made of it
    Column("created_at", Float, nullable=False),
    UniqueConstraint("job_id", "step"),
)

# Sums of one tenant's requests to one model on one day (UTC). What ended early is counted apart.
usage_days = Table(
    "usage_days",
    metadata,
    Column("tenant", ForeignKey(tenants.c.id), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("model", String(200), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("partial_requests", BigInteger, nullable=False),
    Column("partial_completion_tokens", BigInteger, nullable=False),
)

# The bases that the state was served with, each as it was last; of no tenant.
bases = Table(
    "bases",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("name", String(255), nullable=False),  # as it is named on the wire
    Column("is_served", Boolean, nullable=False),  # of one: the base of the last start
    Column("max_rank", Integer, nullable=False),
    Column("dtype", String(40)),  # None until its engine has answered
    Column("engine_version", String(120)),
    Column("served_at", Float, nullable=False),
)
