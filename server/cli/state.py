"""`hotshoe backup` and `restore`: the state folder as a copy, and a copy as a state folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Home = Annotated[Path | None, typer.Option(help="State folder (HOTSHOE_HOME).")]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    for verb in (backup, restore):
        app.command(verb.__name__)(verb)


def backup(
    out: Annotated[Path, typer.Option(help="A folder, which may hold the last backup, or a file called *.tar.")],
    home: Home = None,
    without_pepper: Annotated[
        bool, typer.Option("--without-pepper", help="Leave out the secret under which keys are hashed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the state to a place outside of it, whether or not a server runs on it.

    Holds what is as it was at one moment: names, versions with their files, aliases, keys, usage, events, files of
    clients. Not exports, which can be made again, nor parts of open uploads. Leaves with 3 where something was damaged.
    """
    from adapters.backup import back_up
    from server.cli.output import EXIT_NO, print_json
    from server.settings import load_settings

    made = back_up(load_settings(home=home).home, out, with_pepper=not without_pepper)
    found = made.backup
    if as_json:
        print_json(made.as_dict())
    else:
        typer.echo(
            f"{made.path}: schema {found.schema}, {len(found.blobs)} blobs, {len(found.files)} files; "
            f"{made.copied} files copied now ({made.copied_bytes:,} bytes)"
        )
        typer.echo(f"  pepper  {pepper_line(found.has_pepper)}")
        for line in found.damaged:
            typer.secho(f"  DAMAGED and left out: {line}", err=True, fg="red")
    if found.damaged:
        raise typer.Exit(EXIT_NO)


def pepper_line(is_there: bool) -> str:
    """What it means that a backup has the pepper, or has it not."""
    if is_there:
        return "included: keep the backup as secret as the keys themselves"
    return (
        "NOT included: no key that was made opens anything in a restored state, unless the pepper is put back as "
        "HOTSHOE_HOME/pepper or given as HOTSHOE_KEY_PEPPER"
    )


def restore(
    source: Annotated[
        Path, typer.Argument(metavar="FROM", help="What `hotshoe backup` made: a folder or a .tar file.")
    ],
    home: Annotated[Path, typer.Option(help="The new state folder: empty, or not there yet.")],
    as_json: AsJson = False,
) -> None:
    """Make a new state folder from a backup, every byte checked, and look through it as `hotshoe doctor` does.

    Leaves with 3 where the backup is damaged; nothing is restored then.
    """
    from adapters.restore import restore as put_back
    from server.cli.output import EXIT_NO, print_json
    from server.lifecycle import state_lock

    with state_lock(home.absolute()):
        restored = put_back(source.absolute(), home.absolute())
    if as_json:
        print_json({**restored.report.as_dict(), "has_pepper": restored.backup.has_pepper})
    else:
        for line in restored.report.lines():
            typer.echo(line)
        if not restored.backup.has_pepper:
            typer.echo(f"  pepper  {pepper_line(False)}")
    if not restored.report.is_sound:
        raise typer.Exit(EXIT_NO)
