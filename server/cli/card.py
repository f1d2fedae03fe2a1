"""`hotshoe card`: a run's report card, shown, compared with another, checked, and as the Hub's README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.options import AsJson
from server.cli.output import EXIT_NO, print_json

Of = Annotated[str, typer.Argument(metavar="CARD", help="A result's folder, a card.json, or NAME@N of a server.")]
COLOURS = {"learned": "green", "diverged": "red", "no effect": "red"}


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    card = typer.Typer(no_args_is_help=True, help="Report cards: show, compare, check, README.md for the Hub.")
    for verb in (show, diff, check, readme, page):
        card.command(verb.__name__)(verb)
    app.add_typer(card, name="card")


def show(of: Of, as_json: AsJson = False) -> None:
    """The verdict of a run, what to do, and the figures beside it."""
    from training.card_page import part, text

    card = read(of)
    if as_json:
        print_json(card)
        return
    verdict = part(card, "verdict")
    typer.echo(f"{text(card.get('name'))}: {text(part(card, 'settings').get('method'))} of {_base(card)}")
    for line, colour in _said(verdict):
        typer.secho(f"  {line}", fg=colour)
    for section in ("check", "evaluation", "forgetting"):
        found = part(card, section)
        said = found.get("sentence") or found.get("verdict")
        if said:
            typer.echo(f"  {text(said)}")


def diff(one: Of, other: Of, as_json: AsJson = False) -> None:
    """What differs between two cards: the verdict, the result, then settings, data and lineage."""
    from training.card_diff import diff as compare
    from training.card_diff import lines

    found = compare(read(one), read(other))
    if as_json:
        print_json({"one": one, "other": other, "differences": found})
        return
    for line in lines(found):
        typer.echo(line)
    if not found:
        typer.echo("The two cards say the same.")


def check(of: Of, as_json: AsJson = False) -> None:
    """Whether a card has the published form and the verdict that its own evidence gives; leaves with 3 where not."""
    from training.card_schema import problems

    card = read(of)
    found = problems(card) or _misjudged(card)
    if as_json:
        print_json({"card": of, "is_valid": not found, "problems": found})
    else:
        for line in found or ["The card is valid, and its verdict is what its evidence gives."]:
            typer.echo(line)
    if found:
        raise typer.Exit(EXIT_NO)


def readme(
    of: Of,
    base: Annotated[
        str | None, typer.Option(help="What the Hub calls the base, as Qwen/Qwen2.5-0.5B-Instruct.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default README.md in the folder.")] = None,
) -> None:
    """Write the Hugging Face model card, README.md, beside the adapter."""
    from adapters.errors import ConfigInvalid
    from training.card_readme import readme as made

    folder = Path(of) if Path(of).is_dir() else None
    target = out or (folder / "README.md" if folder is not None else None)
    if target is None:
        raise ConfigInvalid(f"{of} is no folder: name the file with --out.", param="out")
    target.write_text(made(read(of), base), encoding="utf-8")
    typer.echo(str(target))


def page(of: Of, out: Annotated[Path, typer.Option(help="File to write.")] = Path("card.html")) -> None:
    """Write the page of a card: one file, without script or network."""
    from training.card_page import card_html

    out.write_text(card_html(read(of)), encoding="utf-8")
    typer.echo(str(out))


def read(of: str) -> dict[str, Any]:
    """A card from a folder, a file or a server; raises ConfigInvalid."""
    from adapters.errors import ConfigInvalid
    from adapters.inspect import CARD_FILE, MAX_CARD_BYTES, parse_card, read_bounded
    from adapters.strict_json import JsonInvalid

    path = Path(of)
    file = path / CARD_FILE if path.is_dir() else path
    if not file.is_file() and "@" in of and not path.exists():
        return _served(of)
    try:
        return parse_card(read_bounded(file, MAX_CARD_BYTES))
    except FileNotFoundError as error:
        raise ConfigInvalid(f"There is no card {file}: name a result's folder, a card.json or NAME@N.") from error
    except OSError as error:
        raise ConfigInvalid(f"{file} cannot be read: {error.strerror}.") from error
    except JsonInvalid as error:
        raise ConfigInvalid(f"{file} {error}.") from error


def _misjudged(card: dict[str, Any]) -> list[str]:
    """How the card's verdict differs from the one that its evidence gives."""
    from training.verdict.evidence import evidence_of_card
    from training.verdict.judge import judge

    claimed = card.get("verdict")
    if claimed is None:
        return []
    try:
        again = judge(evidence_of_card(card))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return [f"verdict: its evidence cannot be judged: {error!r}"]
    if (again.primary, list(again.flags)) == (claimed["primary"], claimed["flags"]):
        return []
    said = " and ".join([again.primary, *again.flags])
    return [f"verdict: the evidence gives {said}, and the card says {claimed['primary']}"]


def _served(of: str) -> dict[str, Any]:
    from urllib.parse import quote

    from adapters.errors import ConfigInvalid
    from adapters.types import AdapterRef
    from server.cli.client import open_client

    ref = AdapterRef.parse(of)
    if ref.number is None:
        raise ConfigInvalid(f"{of} names no version: write {ref.name}@N.", param="card")
    with open_client() as client:
        found: dict[str, Any] = client.get(f"/v1/adapters/{quote(ref.name, safe='')}/versions/{ref.number}/card")
    return found


def _base(card: dict[str, Any]) -> str:
    from training.card_page import part, text

    return text(part(card, "base").get("id"))


def _said(verdict: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The lines of a verdict, each with its colour."""
    from training.card_page import text

    if not verdict:
        return [("The card has no verdict.", None)]
    flags = verdict.get("flags")
    named = f" [{', '.join(map(text, flags))}]" if isinstance(flags, list) and flags else ""
    colour = COLOURS.get(str(verdict.get("primary")), "yellow")
    if named:
        colour = "red" if colour == "red" else "yellow"
    advice = verdict.get("advice")
    steps = [(f"-> {text(line)}", None) for line in (advice if isinstance(advice, list) else [])]
    return [(f"{text(verdict.get('sentence'))}{named}", colour), *steps]
