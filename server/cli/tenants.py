"""Verbs of the operator: `keys create | ls | revoke` and `tenants ls | set | share | unshare | grants | usage`.

They speak to the server at `HOTSHOE_URL` with a key that has the scope admin. With `--home`, or when no server answers
at the default address, they work on the state folder, which no server may hold then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.options import AsJson
from server.cli.output import print_json

Home = Annotated[Path | None, typer.Option(help="Work on this state folder, while no server runs on it.")]
TenantOption = Annotated[str | None, typer.Option(help="Only this tenant.")]
Requests = Annotated[int | None, typer.Option(help="Requests a minute.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens a minute, prompts and answers together.")]
Concurrent = Annotated[int | None, typer.Option(help="Requests at the same time.")]
With = Annotated[str, typer.Option("--with", help="The tenant that may ask the adapter.")]
Model = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The adapter and the tenant it belongs to.")]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    keys = typer.Typer(no_args_is_help=True, help="Keys that let clients in.")
    keys.command("create")(create_key)
    keys.command("ls")(list_keys)
    keys.command("revoke")(revoke_key)
    tenants = typer.Typer(no_args_is_help=True, help="Who shares this server: limits, shared adapters, usage.")
    tenants.command("ls")(list_tenants)
    tenants.command("set")(set_tenant)
    tenants.command("share")(share)
    tenants.command("unshare")(unshare)
    tenants.command("grants")(list_grants)
    tenants.command("usage")(show_usage)
    app.add_typer(keys, name="keys")
    app.add_typer(tenants, name="tenants")


def create_key(
    scope: Annotated[
        str, typer.Option(help="Comma-separated: infer, read, upload, promote, export, train, metrics, admin.")
    ],
    tenant: Annotated[str, typer.Option(help="Whose key it is; made when it is new.")] = "default",
    name: Annotated[str | None, typer.Option(help="A word to know it by.")] = None,
    adapters: Annotated[str | None, typer.Option(help="Comma-separated: the only adapters it may touch.")] = None,
    expires: Annotated[str | None, typer.Option(help="Life: 90s, 15m, 12h or 30d.")] = None,
    priority: Annotated[str, typer.Option(help="Its share of busy places: high, normal or low.")] = "normal",
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrent_requests: Concurrent = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it: it cannot be read again.

    The first key that is made ends the time when this machine's programs need none.
    """
    from server.cli.admin import open_admin, seconds_of

    body = {
        "tenant": tenant,
        "scopes": words(scope),
        "name": name,
        "adapters": None if adapters is None else words(adapters),
        "limits": given(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_requests=concurrent_requests,
        ),
        "priority": priority,
        "expires_in_seconds": None if expires is None else seconds_of(expires),
    }
    with open_admin(home) as admin:
        row = admin.create_key(body)
    if as_json:
        print_json(row)
        return
    typer.echo(row["key"])
    typer.echo(f"{row['id']} of {row['tenant']}: {', '.join(row['scopes'])}. It is shown this once only.", err=True)


def list_keys(tenant: TenantOption = None, home: Home = None, as_json: AsJson = False) -> None:
    """Every key with its first characters, never the key itself."""
    from server.cli.admin import day_of, open_admin

    with open_admin(home) as admin:
        rows = admin.keys(tenant)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        state = "revoked" if row["revoked_at"] else "valid" if row["is_valid"] else "expired"
        only = f"  only {','.join(row['adapters'])}" if row["adapters"] else ""
        typer.echo(
            f"{row['id']}  {row['prefix']}...  {row['tenant']}  {','.join(row['scopes'])}  {state}  "
            f"until {day_of(row['expires_at'])}  {row['name'] or ''}{only}".rstrip()
        )


def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `keys ls` shows it.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """End a key, at once."""
    from server.cli.admin import open_admin

    with open_admin(home) as admin:
        row = admin.revoke_key(key_id)
    print_json(row) if as_json else typer.echo(f"{row['id']} is revoked")


def list_tenants(home: Home = None, as_json: AsJson = False) -> None:
    """Every tenant with its limits and what it stores."""
    from server.cli.admin import open_admin

    with open_admin(home) as admin:
        rows = admin.tenants()
    if as_json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(
            f"{row['id']}  {row['adapters']} adapters  {row['versions']} versions  {row['stored_bytes']:,} bytes  "
            f"{row['files']} files of {row['file_bytes']:,} bytes  {row['export_bytes']:,} bytes of exports  "
            f"{shown_limits(row['limits'])}"
        )


def set_tenant(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Made when it is new.")],
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrent_requests: Concurrent = None,
    stored_bytes: Annotated[int | None, typer.Option(help="Bytes of all its versions together.")] = None,
    versions: Annotated[int | None, typer.Option(help="Versions that are not retired.")] = None,
    file_bytes: Annotated[
        int | None, typer.Option(help="Bytes of its files and open uploads; where unset, as many as --stored-bytes.")
    ] = None,
    files: Annotated[int | None, typer.Option(help="Files and open uploads.")] = None,
    upload_parts: Annotated[int | None, typer.Option(help="Parts of open uploads.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Fine-tuning jobs that have not ended.")] = None,
    running_jobs: Annotated[int | None, typer.Option(help="Fine-tuning jobs that run at once.")] = None,
    job_seconds: Annotated[int | None, typer.Option(help="Seconds that one fine-tuning job may train.")] = None,
    job_bytes: Annotated[int | None, typer.Option(help="Bytes on the disk of all its fine-tuning jobs.")] = None,
    exports: Annotated[int | None, typer.Option(help="Exports that have not ended.")] = None,
    export_bytes: Annotated[int | None, typer.Option(help="Bytes of its exports' results, kept and under way.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Set a tenant's limits, all of them: one that is not named is no limit any more."""
    from server.cli.admin import open_admin

    limits = given(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
        stored_bytes=stored_bytes,
        versions=versions,
        file_bytes=file_bytes,
        files=files,
        upload_parts=upload_parts,
        jobs=jobs,
        running_jobs=running_jobs,
        job_seconds=job_seconds,
        job_bytes=job_bytes,
        exports=exports,
        export_bytes=export_bytes,
    )
    with open_admin(home) as admin:
        row = admin.set_tenant(tenant, limits)
    print_json(row) if as_json else typer.echo(f"{row['id']}  {shown_limits(row['limits'])}")


def share(model: Model, grantee: With, home: Home = None, as_json: AsJson = False) -> None:
    """Let another tenant ask an adapter for answers, as OWNER/NAME. It sees nothing else of it."""
    from server.cli.admin import open_admin

    with open_admin(home) as admin:
        row = admin.share(*parts_of(model), grantee)
    print_json(row) if as_json else typer.echo(f"{row['grantee']} may ask {row['model']}")


def unshare(model: Model, grantee: With, home: Home = None, as_json: AsJson = False) -> None:
    """Share an adapter no more, from the next request on."""
    from server.cli.admin import open_admin

    with open_admin(home) as admin:
        row = admin.unshare(*parts_of(model), grantee)
    print_json(row) if as_json else typer.echo(f"{row['grantee']} may no longer ask {row['model']}")


def list_grants(
    tenant: Annotated[str, typer.Argument(metavar="TENANT")], home: Home = None, as_json: AsJson = False
) -> None:
    """What a tenant shares, and what is shared with it."""
    from server.cli.admin import open_admin

    with open_admin(home) as admin:
        rows = admin.grants(tenant)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['model']}  shared with {row['grantee']}")


def show_usage(
    tenant: Annotated[str | None, typer.Option(help="A tenant, or `*` for all; the key's own without it.")] = None,
    start: Annotated[str | None, typer.Option(help="First day, YYYY-MM-DD (UTC).")] = None,
    end: Annotated[str | None, typer.Option(help="Last day, YYYY-MM-DD (UTC).")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Requests and tokens by tenant, day and model."""
    from server.cli.admin import open_admin

    with open_admin(home) as admin:
        rows = admin.usage(tenant=tenant, start=start, end=end)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        partial = f"  and {row['partial_requests']} ended early" if row["partial_requests"] else ""
        typer.echo(
            f"{row['day']}  {row['tenant']}  {row['model']}  {row['requests']} requests  "
            f"{row['prompt_tokens']} + {row['completion_tokens']} tokens{partial}"
        )


def given(**limits: int | None) -> dict[str, int]:
    """The limits that were named."""
    return {name: value for name, value in limits.items() if value is not None}


def words(text: str) -> list[str]:
    """The words of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parts_of(model: str) -> tuple[str, str]:
    """OWNER and NAME; raises InvalidRequest."""
    from adapters.errors import InvalidRequest

    owner, slash, name = model.partition("/")
    if not (owner and slash and name):
        raise InvalidRequest(f"{model[:80]!r} is not OWNER/NAME.", param="model")
    return owner, name


def shown_limits(limits: dict[str, Any]) -> str:
    found = [f"{name}={value}" for name, value in limits.items() if value is not None]
    return " ".join(found) or "no limits"
