"""`hotshoe backup`, `restore` and `prune`: the state folder as a copy, a copy as a state folder, and what may go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.options import AsJson

if TYPE_CHECKING:
    from adapters.prune import Item, Scope
    from server.settings import Settings

Home = Annotated[Path | None, typer.Option(help="State folder (HOTSHOE_HOME).")]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    for verb in (backup, restore, prune):
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


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    older_than: Annotated[str, typer.Option(help="Only what is at least this old: 90s, 15m, 12h, 30d.")] = "30d",
    runs: Annotated[
        Path | None, typer.Option(help="Also look through this folder for checkpoints of training runs.")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Remove what takes room and can be made again or is over: exports, unused bases, copies, left-overs, checkpoints.

    Versions, files of clients, keys and whatever this program did not make itself are never touched. Works while a
    server runs; left-overs of uploads are then its own business. Leaves with 1 where something would not go.
    """
    from server.cli.output import EXIT_FAILED, print_json
    from server.settings import load_settings

    settings = load_settings(home=home)
    found: list[Item] = []
    failed: dict[Path, str] = {}
    with _scope(settings, _age(older_than)) as (scope, notes):
        for item in _items(scope, runs):
            found.append(item)
            failed |= {} if dry_run else _removed(item)
    if as_json:
        rows = [{**item.as_dict(), "error": failed.get(item.path)} for item in found]
        total = sum(item.size_bytes for item in found if item.path not in failed)
        print_json({"dry_run": dry_run, "size_bytes": total, "items": rows, "notes": notes})
    else:
        _show(found, failed, notes, dry_run)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _age(text: str) -> int:
    from server.cli.admin import duration_seconds

    return duration_seconds(text, "older_than", "an age")


@contextmanager
def _scope(settings: Settings, older_than_seconds: float) -> Iterator[tuple[Scope, list[str]]]:
    """Where to look; with the state folder's lock held when no server has it."""
    import time
    from contextlib import ExitStack

    from adapters.database import FILE
    from adapters.embedded import cache_folder
    from adapters.errors import AlreadyRunning
    from adapters.prune import Scope
    from server.lifecycle import state_lock

    notes: list[str] = []
    is_alone = (settings.home / FILE).is_file()
    with ExitStack() as stack:
        if is_alone:
            try:
                stack.enter_context(state_lock(settings.home))
            except AlreadyRunning:
                is_alone = False
                notes.append(f"A server runs on {settings.home}: left-overs of uploads are not looked at.")
        bases = tuple(base for base in (settings.base, settings.merge_base) if base is not None)
        yield Scope(settings.home, cache_folder(), time.time(), older_than_seconds, bases, is_alone), notes


def _items(scope: Scope, runs: Path | None) -> Iterator[Item]:
    from adapters.prune import find

    yield from find(scope)
    if runs is not None:
        from training.tidy import find_checkpoints

        yield from find_checkpoints(runs, scope.now, scope.older_than_seconds)


def _removed(item: Item) -> dict[Path, str]:
    from adapters.prune import remove

    trouble = remove(item)
    return {item.path: trouble} if trouble else {}


def _show(found: list[Item], failed: dict[Path, str], notes: list[str], is_dry: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "bytes", "where", "why", box=None)
    for item in found:
        why = f"NOT REMOVED: {failed[item.path]}" if item.path in failed else item.reason
        table.add_row(item.kind, f"{item.size_bytes:,}", str(item.path), why)
    if found:
        Console(soft_wrap=True).print(table)
    total = sum(item.size_bytes for item in found if item.path not in failed)
    typer.echo(f"{total:,} bytes in {len(found) - len(failed)} things {'would go' if is_dry else 'removed'}")
    for note in notes:
        typer.echo(note)
