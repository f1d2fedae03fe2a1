"""Verbs about adapters on a server, over HTTP: push, ls, show, promote, rollback, retire."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import AdapterRefused, EngineUnavailable, InvalidRequest, Problem
from server.cli.output import print_json

if TYPE_CHECKING:
    from server.cli.client import Client

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
PARTS = {
    "config": ("adapter_config.json", "application/json"),
    "weights": ("adapter_model.safetensors", "application/octet-stream"),
    "card": ("card.json", "application/json"),
    "initial_adapter": ("initial_adapter.safetensors", "application/octet-stream"),
}
WAIT_ROUND_SECONDS = 30


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    for verb in (push, ls, show, promote, rollback, retire):
        app.command(verb.__name__)(verb)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The adapter folder that a trainer saved.")],
    name: Annotated[str, typer.Option(help="The adapter's name on the server.")],
    promote: Annotated[bool, typer.Option("--promote", help="Make it `stable` once it is ready.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Ask what would become of it; nothing is stored.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return while it is still quarantined.")] = False,
    base_is: Annotated[str | None, typer.Option(help="`served`: it was made for the base that is served.")] = None,
    timeout: Annotated[float, typer.Option(help="Longest wait for its proof, in seconds.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter as a new version, and wait until it is ready.

    Sends adapter_config.json, adapter_model.safetensors (or MLX-LM's adapters.safetensors), card.json and
    initial_adapter.safetensors, and says what else lies in DIR and was left out.
    Leaves with 3 when the server refuses or rejects it, with 4 when no server answers.
    """
    from server.cli.client import open_client

    left_out = check_folder(folder)
    with open_client(timeout_seconds=600.0) as client:
        if check:
            show_check(upload(client, folder, name, base_is, dry_run=True) | {"left_out": left_out}, as_json)
            return
        version = upload(client, folder, name, base_is)
        version["left_out"] = left_out
        if not as_json:
            typer.echo(f"{version['id']}  {version['size_bytes']:,} bytes  {version['digest']}")
            for item in left_out:
                typer.echo(f"  left out: {item}")
            for item in version["dropped"]:
                typer.echo(f"  dropped: {item}")
        if not no_wait or promote:
            version |= wait_for(client, version, timeout)
            raise_if_rejected(version)
        if promote and version["status"] == "ready":
            put_alias(client, version["name"], "stable", {"version": version["version"]})
            version |= read_version(client, version["name"], version["version"])
    if as_json:
        print_json(version)
    else:
        typer.echo(f"{version['id']} is {version['status']}" + is_named(version))


def check_folder(folder: Path) -> list[str]:
    """What would not be sent; raises when what must be sent is not there."""
    for part in ("config", "weights"):
        file = parts_of(folder)[part][0]
        if not (folder / file).is_file():
            raise AdapterRefused(
                f"{folder} is not an adapter folder: it has no {file}.",
                problems=(Problem("file_missing", file, "is not there", advice_for(folder)),),
            )
    sent = {file for file, _ in parts_of(folder).values()}
    return sorted(item.name for item in folder.iterdir() if item.name not in sent)


def parts_of(folder: Path) -> dict[str, tuple[str, str]]:
    """Part -> file and its type; the weights may have MLX-LM's name."""
    from adapters.inspect import weights_of

    return {**PARTS, "weights": (weights_of(folder).name, PARTS["weights"][1])}


def advice_for(folder: Path) -> str:
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        return f"This is a whole model: serve it as a base of its own with `hotshoe serve --base {folder}`."
    if any(folder.glob("adapter_model.bin")):
        return "Save it again with safe_serialization=True: pickled weights are not taken."
    return "Name the folder that save_pretrained() wrote."


def show_check(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    typer.echo(f"{found['verdict']}: it would be {found['status']}, {found['modules']} modules, rank {found['rank']}")
    for reason in found["reasons"]:
        advice = f"  -> {reason['advice']}" if reason["advice"] else ""
        typer.echo(f"  {reason['code']}  {reason['path']}: {reason['message']}{advice}")
    for kind in ("left_out", "dropped"):
        for item in found[kind]:
            typer.echo(f"  {kind.replace('_', ' ')}: {item}")


def upload(client: Client, folder: Path, name: str, base_is: str | None, *, dry_run: bool = False) -> dict[str, Any]:
    with ExitStack() as stack:
        files = {
            part: (file, stack.enter_context((folder / file).open("rb")), kind)
            for part, (file, kind) in parts_of(folder).items()
            if (folder / file).is_file()
        }
        params = {"dry_run": "true"} if dry_run else {}
        data = {"name": name} | ({"base_is": base_is} if base_is else {})
        row: dict[str, Any] = client.post("/v1/adapters", data=data, files=files, params=params)
        return row


def wait_for(client: Client, version: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
    """The version's row once it is no longer quarantined; raises EngineUnavailable when that takes too long."""
    deadline = time.monotonic() + timeout_seconds
    row = version
    while row["status"] == "quarantined" and not is_held(row):
        left = deadline - time.monotonic()
        if left <= 0:
            raise EngineUnavailable(f"{version['id']} is still quarantined after {timeout_seconds:g} seconds.")
        query = {"wait": min(WAIT_ROUND_SECONDS, left)}
        row = client.get(f"/v1/adapters/{version['name']}/versions/{version['version']}", params=query)
    return {key: value for key, value in row.items() if key != "card"}


def is_held(row: dict[str, Any]) -> bool:
    """The version is kept and will not be proven until the operator allows its size."""
    return any(reason["code"] == "update_too_large" for reason in row["reasons"]) and not row.get("proof")


def raise_if_rejected(version: dict[str, Any]) -> None:
    problems = tuple(
        Problem(row["code"], row["path"], row["message"], row.get("advice", "")) for row in version["reasons"]
    )
    if version["status"] == "rejected":
        raise AdapterRefused(f"{version['id']} was rejected.", problems=problems)
    if version["status"] == "quarantined" and is_held(version):
        raise AdapterRefused(f"{version['id']} is kept and not served.", problems=problems)


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
    table.add_row(rows[0]["id"], "base", "", "", "", "")
    for adapter in rows[1:]:
        for one in adapter["versions"]:
            cells = (one["id"], one["status"], one["residency"], str(one["rank"] or ""), f"{one['size_bytes']:,}")
            tried = [f"{alias} ({shown_share(share)})" for alias, share in one["candidate_of"].items()]
            table.add_row(*cells, ", ".join([*one["aliases"], *tried]))
    Console().print(table)


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
    with open_client() as client:
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
