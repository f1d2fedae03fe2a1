"""`hotshoe exports ls | show | cancel | rm | fetch`: exports that a server makes, ordered over its HTTP interface."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.options import AsJson
from server.cli.output import print_json

if TYPE_CHECKING:
    from server.cli.client import Client

EXPORTS = "/v1/exports"
Export = Annotated[str, typer.Argument(metavar="EXPORT", help="The export's id.")]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    exports = typer.Typer(no_args_is_help=True, help="Exports on a server: how far they are, and their files.")
    for name, verb in (("ls", list_exports), ("show", show), ("fetch", fetch), ("cancel", cancel), ("rm", remove)):
        exports.command(name)(verb)
    app.add_typer(exports, name="exports")


def list_exports(as_json: AsJson = False) -> None:
    """List the exports, newest first."""
    from server.cli.client import open_client

    with open_client() as client:
        rows = list(_all_exports(client))
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("export", "model", "form", "status", "bytes", "until", box=None)
    for row in rows:
        form = " ".join(filter(None, (row["format"], row["dtype"])))
        size = f"{row['size_bytes']:,}" if row["has_content"] else ""
        table.add_row(row["id"], row["model"], form, _standing(row), size, _until(row))
    Console().print(table)


def show(export_id: Export, as_json: AsJson = False) -> None:
    """Show one export: how far it is, its files, what went wrong."""
    from server.cli.client import open_client

    with open_client() as client:
        row = client.get(_path(export_id))
    if as_json:
        print_json(row)
        return
    typer.echo(f"{row['id']}: {row['model']} as {row['format']}, {_standing(row)}")
    if row["status"] == "running":
        typer.echo(f"  {row['bytes_done']:,} of about {row['bytes_total']:,} bytes")
    if row["has_content"]:
        typer.echo(f"  {len(row['files'])} files, {row['size_bytes']:,} bytes, kept until {_until(row)}")
    for name, entry in (row["files"] or {}).items():
        typer.echo(f"  {entry['sha256'][:12]}  {entry['size_bytes']:>15,}  {name}")
    if row["error"]:
        typer.secho(f"  {row['error']['code']}: {row['error']['message']}", fg="red")


def cancel(export_id: Export, as_json: AsJson = False) -> None:
    """End an export that waits or runs; other orders of the same files go on."""
    from server.cli.client import open_client

    with open_client() as client:
        row = client.post(f"{_path(export_id)}/cancel")
    print_json(row) if as_json else typer.echo(f"{row['id']} is {row['status']}")


def remove(export_id: Export, as_json: AsJson = False) -> None:
    """Forget an export that has ended, and its files with the last order that has them."""
    from server.cli.client import open_client

    with open_client() as client:
        row = client.call("DELETE", _path(export_id))
    print_json(row) if as_json else typer.echo(f"{row['id']} is gone")


def fetch(
    export_id: Export,
    out: Annotated[Path, typer.Option(help="The folder to make; it must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Fetch an export's files, each held to its sha256 in the manifest; what was cut off goes on where it was.

    The folder appears whole or not at all. Leaves with 3 where a file is not what the manifest says.
    """
    from server.cli.client import open_client
    from server.cli.fetching import fetch_folder

    with open_client() as client:
        row = client.get(_path(export_id))
        files = fetch_folder(client, _path(export_id), out.absolute(), shown=not as_json)
    found = {"id": row["id"], "model": row["model"], "path": str(out.absolute()), "files": files}
    if as_json:
        print_json(found)
    else:
        size = sum(entry["size_bytes"] for entry in files.values())
        typer.echo(f"{row['model']} -> {found['path']}  ({len(files)} files, {size:,} bytes, all as the manifest says)")


def _all_exports(client: Client) -> Iterator[dict[str, Any]]:
    """Page after page, newest first."""
    page: dict[str, Any] = {"has_more": True, "data": []}
    while page["has_more"]:
        last = {"after": page["data"][-1]["id"]} if page["data"] else {}
        page = client.get(EXPORTS, params={"limit": 100, **last})
        yield from page["data"]


def _path(export_id: str) -> str:
    from server.cli.remote import segment

    return f"{EXPORTS}/{segment(export_id)}"


def _standing(row: dict[str, Any]) -> str:
    """The status in words, and of one that runs its stage."""
    if row["status"] == "running":
        return f"{row['stage'] or 'starting'}, {row['progress']:.0%}"
    return "succeeded, files gone" if row["status"] == "succeeded" and not row["has_content"] else str(row["status"])


def _until(row: dict[str, Any]) -> str:
    if not row["has_content"]:
        return ""
    return time.strftime("%Y-%m-%d", time.localtime(row["expires_at"])) if row["expires_at"] else "it is deleted"
