"""`hotshoe gate`: what a promote of an adapter's `stable` has to show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InvalidRequest
from server.cli.options import AsJson
from server.cli.output import print_json
from server.cli.remote import Name, segment

DEFAULT_ROWS = 200


def add_to(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command("gate")(gate)


def gate(
    name: Name,
    file: Annotated[Path | None, typer.Option(help="Rows with right answers, in any form that training takes.")] = None,
    metric: Annotated[
        str, typer.Option(help="exact_match, json_valid, label_accuracy or field_f1.", show_default=True)
    ] = "exact_match",
    minimum: Annotated[float | None, typer.Option(help="Least score of a version that is promoted, 0 to 1.")] = None,
    margin: Annotated[float | None, typer.Option(help="How far below the present stable it may score, 0 to 1.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    limit: Annotated[int, typer.Option(min=1, help="Take the first rows of the file only.")] = DEFAULT_ROWS,
    off: Annotated[bool, typer.Option("--off", help="A promote has to show nothing any more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Set what a promote of stable has to show, or show what that is.

    The server has the new version and the present stable answer the rows, once each, and refuses the promote with both
    figures when the new one is below. The first version, a candidate's share and a roll-back are free of it.
    """
    from server.cli.client import open_client

    path = f"/v1/adapters/{segment(name)}/gate"
    with open_client() as client:
        if off:
            row = client.call("DELETE", path)
        elif file is None:
            check_nothing_to_set(minimum, margin)
            row = client.get(path)
        else:
            body = {"metric": metric, "minimum": minimum, "margin": margin, "max_tokens": max_tokens}
            row = client.call("PUT", path, json={**body, "rows": rows_of(file, limit)})
    if as_json:
        print_json(row)
    else:
        typer.echo(f"{name} has no gate any more" if off else in_words(row))


def check_nothing_to_set(minimum: float | None, margin: float | None) -> None:
    if minimum is not None or margin is not None:
        raise InvalidRequest("Name the rows with --file: a gate is set as a whole.", param="file")


def rows_of(file: Path, limit: int) -> list[dict[str, Any]]:
    """The file's rows as the server takes them; raises DataInvalid with every bad row."""
    from training.evaluate import load_examples, sent

    return [
        {
            "messages": [sent(message) for message in example.prompt.messages],
            "expected": example.expected,
            **({"tools": [dict(tool) for tool in example.prompt.tools]} if example.prompt.tools else {}),
        }
        for example in load_examples(file)[:limit]
    ]


def in_words(row: dict[str, Any]) -> str:
    """What the gate wants."""
    wants = [f"at least {row['minimum']:g}"] if row["minimum"] is not None else []
    wants += [f"at most {row['margin']:g} below stable"] if row["margin"] is not None else []
    return f"{row['name']}: {row['metric']} over {row['rows']} rows, {' and '.join(wants)}"
