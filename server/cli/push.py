"""`hotshoe push`: an adapter folder becomes a version on a server, and what was made of it is said."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import AdapterRefused, EngineUnavailable, InvalidRequest, Problem
from server.cli.options import AsJson
from server.cli.output import print_json
from server.cli.remote import is_named, put_alias, read_version

if TYPE_CHECKING:
    from server.cli.client import Client

PARTS = {
    "config": ("adapter_config.json", "application/json"),
    "weights": ("adapter_model.safetensors", "application/octet-stream"),
    "card": ("card.json", "application/json"),
    "initial_adapter": ("initial_adapter.safetensors", "application/octet-stream"),
    "serving": ("serving.json", "application/json"),
    "chat_template": ("chat_template.jinja", "text/plain"),
}
TEMPLATE = "chat_template"
WAIT_ROUND_SECONDS = 30


def add_to(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command("push")(push)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The adapter folder that a trainer saved.")],
    name: Annotated[str, typer.Option(help="The adapter's name on the server.")],
    promote: Annotated[bool, typer.Option("--promote", help="Make it `stable` once it is ready.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Ask what would become of it; nothing is stored.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return while it is still quarantined.")] = False,
    base_is: Annotated[str | None, typer.Option(help="`served`: it was made for the base that is served.")] = None,
    serving: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Defaults of its requests, in place of DIR/serving.json.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Longest wait for its proof, in seconds.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter as a new version, and wait until it is ready.

    Sends adapter_config.json, adapter_model.safetensors (or MLX-LM's adapters.safetensors), card.json,
    initial_adapter.safetensors, serving.json, and a chat_template.jinja that is not the base's own where the server
    takes one; and says what else lies in DIR and was left out. Above 64 MB files go in parts: run it again after a
    cut, and what is there already is not sent again.
    Leaves with 3 when the server refuses or rejects it, with 4 when no server answers.
    """
    from server.cli.client import open_client

    left_out = check_folder(folder)
    with open_client(timeout_seconds=600.0) as client:
        files = files_of(folder, serving)
        if TEMPLATE in files and (reason := why_not_sent(client, files[TEMPLATE][0])):
            left_out = sorted([*left_out, f"{files.pop(TEMPLATE)[0].name} ({reason})"])
        if check:
            show_check(upload(client, files, name, base_is, dry_run=True) | {"left_out": left_out}, as_json)
            return
        version = upload(client, files, name, base_is)
        version["left_out"] = left_out
        if not as_json:
            typer.echo(f"{version['id']}  {version['size_bytes']:,} bytes  {version['digest']}")
            show_without(version)
            show_serving(version)
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
        show_reasons(version)
        show_warnings(version)


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


def files_of(folder: Path, serving: Path | None) -> dict[str, tuple[Path, str]]:
    """Part -> the file that is sent as it, and its type; raises InvalidRequest for a --serving that is not there."""
    found = {part: (folder / file, kind) for part, (file, kind) in parts_of(folder).items()}
    if serving is not None:
        if not serving.is_file():
            raise InvalidRequest(f"--serving {serving} is not a file.", param="serving")
        found["serving"] = (serving, PARTS["serving"][1])
    return {part: (file, kind) for part, (file, kind) in found.items() if file.is_file()}


def why_not_sent(client: Client, template: Path) -> str | None:
    """Why the folder's chat template stays behind; None where it has to be sent."""
    from adapters.chat_template import template_digest
    from server.cli.client import ServerRefused

    try:
        known = client.get("/v1/system")["chat_template"]
    except ServerRefused:
        return "this key may not ask whether the server takes one"
    if template_digest(template.read_text("utf-8", "replace")) == known["digest"]:
        return "the base's own"
    return (
        None if known["is_allowed"] else "not the base's own, and the server takes none (HOTSHOE_ALLOW_CHAT_TEMPLATES)"
    )


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
    show_reasons(found)
    show_without(found)
    show_serving(found)


def show_reasons(row: dict[str, Any]) -> None:
    """What was converted, and why it can only be exported, with the setting to change."""
    for reason in row["reasons"]:
        advice = f"  -> {reason['advice']}" if reason.get("advice") else ""
        typer.echo(f"  {reason['code']}  {reason['path']}: {reason['message']}{advice}")


def show_warnings(row: dict[str, Any]) -> None:
    """What its proof warns of."""
    for warning in (row["proof"] or {}).get("warnings", ()):
        typer.echo(f"  warning: {warning['message']}  -> {warning['advice']}")


def show_without(row: dict[str, Any]) -> None:
    """Files not sent and fields not kept: in one line what needs no words, each other in its own."""
    for title, items in (("left out", row["left_out"]), ("dropped", row["dropped"])):
        plain = [item for item in items if ": " not in item]
        for line in (*([", ".join(plain)] if plain else []), *(item for item in items if ": " in item)):
            typer.echo(f"  {title}: {line}")


def show_serving(row: dict[str, Any]) -> None:
    """How requests are answered that say nothing else."""
    if row["serving"]:
        typer.echo(f"  served with: {json.dumps(row['serving'], ensure_ascii=False)}")
    if row["chat_template"]:
        typer.echo(f"  chat template of its own: {row['chat_template']}")


def upload(
    client: Client, parts: dict[str, tuple[Path, str]], name: str, base_is: str | None, *, dry_run: bool = False
) -> dict[str, Any]:
    from server.cli.sending import is_large, send_adapter

    params = {"dry_run": "true"} if dry_run else {}
    data = {"name": name} | ({"base_is": base_is} if base_is else {})
    if is_large(parts):
        return send_adapter(client, parts, data, params)
    with ExitStack() as stack:
        files = {part: (file.name, stack.enter_context(file.open("rb")), kind) for part, (file, kind) in parts.items()}
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
    """The version is kept and will not be proven until the operator allows its size, and restarts the server."""
    return bool(row["is_held"])


def raise_if_rejected(version: dict[str, Any]) -> None:
    problems = tuple(
        Problem(row["code"], row["path"], row["message"], row.get("advice", "")) for row in version["reasons"]
    )
    if version["status"] == "rejected":
        raise AdapterRefused(f"{version['id']} was rejected.", problems=problems)
    if version["status"] == "quarantined" and is_held(version):
        raise AdapterRefused(f"{version['id']} is kept and not served.", problems=problems)
