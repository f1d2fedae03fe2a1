"""Verbs about adapters on a server, over HTTP: ls, show, promote, rollback, retire."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import InvalidRequest
from server.cli.options import AsJson
from server.cli.output import print_json

if TYPE_CHECKING:
    from server.cli.client import Client

GATE_SECONDS = 1800.0  # a promote may have two versions answer the rows of a gate
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    for verb in (ls, show, promote, rollback, retire):
        app.command(verb.__name__)(verb)


def is_named(version: dict[str, Any]) -> str:
    tried = [f"{shown_share(share)} of {alias}" for alias, share in version.get("candidate_of", {}).items()]
    named = f" and named by {', '.join(version['aliases'])}" if version.get("aliases") else ""
    return named + (f" and given {', '.join(tried)}" if tried else "")


def ls(as_json: AsJson = False) -> None:
    """List the base and every adapter with its versions."""
    from server.cli.client import open_client

    with open_client() as client:
        rows = client.get("/v1/models", params={"view": "all"})["data"]
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "status", "residency", "rank", "bytes", "named by", box=None)
    reasons: list[str] = []
    table.add_row(rows[0]["id"], "base", "", "", "", "")
    for adapter in rows[1:]:
        for one in adapter["versions"]:
            is_out = one["status"] == "ready" and one["not_servable"]
            status = "ready, not served" if is_out else one["status"]
            cells = (one["id"], status, one["residency"], str(one["rank"] or ""), f"{one['size_bytes']:,}")
            reasons += [one["not_servable"]] if is_out else []
            tried = [f"{alias} ({shown_share(share)})" for alias, share in one["candidate_of"].items()]
            table.add_row(*cells, ", ".join([*one["aliases"], *tried]))
    Console().print(table)
    for reason in reasons:
        typer.echo(f"not served: {reason}")


def show(
    name: Annotated[str, typer.Argument(metavar="NAME[@N]", help="An adapter, or one version of it.")],
    as_json: AsJson = False,
) -> None:
    """Show an adapter with its aliases and versions, or one version with its card and proof."""
    from server.cli.client import open_client

    adapter, _, number = name.partition("@")
    with open_client() as client:
        if number.isdigit():
            row = read_version(client, adapter, int(number))
        else:
            row = client.get(f"/v1/adapters/{segment(adapter)}")
    if as_json:
        print_json(row)
        return
    for key, value in row.items():
        if key == "versions":
            for one in value:
                typer.echo(f"  {one['id']}: {one['status']}, {one['residency']}{is_named(one)}")
        elif key == "aliases" and not number.isdigit():
            for one in value:
                typer.echo(f"alias {one['alias']}: {names_of(one)}")
        else:
            typer.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


def promote(
    name: Annotated[str, typer.Argument(metavar="NAME@N", help="The version that the alias shall name.")],
    alias: Annotated[str, typer.Option(help="The alias to move.")] = "stable",
    share: Annotated[
        str | None, typer.Option(metavar="5%", help="Only try it, on this part of the alias's requests.")
    ] = None,
    if_generation: Annotated[
        int | None, typer.Option(help="Only if the alias is at this generation (0: does not exist).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an alias, `stable` unless said otherwise, name a version; running answers end on the one they began on.

    With --share only that part of the alias's requests goes to the version, and the rest goes on as before.
    """
    from server.cli.client import open_client

    adapter, number = numbered(name)
    change = {"version": number} if share is None else {"candidate": number, "share": fraction(share)}
    with open_client(timeout_seconds=GATE_SECONDS) as client:
        row = put_alias(client, adapter, alias, change, if_generation)
    print_moved(row, as_json)


def rollback(
    name: Name,
    alias: Annotated[str, typer.Option(help="The alias to move back.")] = "stable",
    candidate: Annotated[
        bool, typer.Option("--candidate", help="Only end the share of its candidate; the alias stays where it is.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make an alias name again what it named before, and end its candidate's share."""
    from server.cli.client import open_client

    with open_client() as client:
        if candidate:
            row = put_alias(client, name, alias, {"candidate": None})
        else:
            row = client.post(f"/v1/adapters/{segment(name)}/rollback", json={"alias": alias})
    print_moved(row, as_json)


def retire(
    name: Annotated[str, typer.Argument(metavar="NAME@N", help="The version to retire.")],
    as_json: AsJson = False,
) -> None:
    """Retire a version: it answers no more and its place in memory is freed. Refused while an alias names it."""
    from server.cli.client import open_client

    adapter, number = numbered(name)
    with open_client() as client:
        row = client.call("DELETE", f"/v1/adapters/{segment(adapter)}/versions/{number}")
    if as_json:
        print_json(row)
    else:
        typer.echo(f"{row['id']} is {row['status']}")


def numbered(name: str) -> tuple[str, int]:
    adapter, _, number = name.partition("@")
    if not number.isdigit():
        raise InvalidRequest(f"Name a version, as in {adapter}@1; `hotshoe show {adapter}` lists them.", param="name")
    return adapter, int(number)


def segment(name: str) -> str:
    """The name as one part of a path."""
    from urllib.parse import quote

    return quote(name, safe="")


def read_version(client: Client, name: str, number: int) -> dict[str, Any]:
    row: dict[str, Any] = client.get(f"/v1/adapters/{segment(name)}/versions/{number}")
    return row


def put_alias(
    client: Client, name: str, alias: str, change: dict[str, Any], generation: int | None = None
) -> dict[str, Any]:
    headers = {"if-match": f'"{generation}"'} if generation is not None else {}
    path = f"/v1/adapters/{segment(name)}/aliases/{segment(alias)}"
    row: dict[str, Any] = client.call("PUT", path, json=change, headers=headers)
    return row


def fraction(text: str) -> float:
    """`5%` or `0.05` as a number; raises InvalidRequest."""
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if rest or not 0 < value < 1:
        raise InvalidRequest(
            f"--share {text} is not more than 0% and less than 100%, as 5% or 0.05 are. Without --share the version is "
            "promoted for all requests; `hotshoe rollback NAME --candidate` ends a share.",
            param="share",
        )
    return value


def names_of(alias: dict[str, Any]) -> str:
    """What an alias names, and the part of its requests that a candidate gets."""
    tried = f", {shown_share(alias['share'])} to {alias['name']}@{alias['candidate']}" if alias["candidate"] else ""
    return f"{alias['name']}@{alias['version']}{tried} (generation {alias['generation']})"


def shown_share(share: float) -> str:
    return f"{100 * share:.4g}%"


def print_moved(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(row)
    else:
        typer.echo(f"{row['model']} is {names_of(row)}")
        if row.get("gate"):
            typer.echo(f"  gate: {figures_of(row['gate'])}")


def figures_of(gate: dict[str, Any]) -> str:
    """What a promote had to show, and what it showed."""
    stable = f", {gate['stable']} {gate['stable_score']:.4g}" if gate["stable"] else ""
    return f"{gate['metric']} over {gate['rows']} rows: {gate['version']} {gate['score']:.4g}{stable}"
