"""`hotshoe data`: `show` what the model sees of a row, `check` what is wrong with rows, `split` and `clean` them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.data_out import clean, restore, split
from server.cli.options import AsJson, ColumnNames, Data, EmbeddedByDefault, Rules, Strict
from server.cli.output import print_json


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    data = typer.Typer(no_args_is_help=True, help="Look at training data, split and clean it.")
    data.command("show")(show)
    data.command("check")(check)
    data.command("split")(split)
    data.command("clean")(clean)
    data.command("restore")(restore)
    app.add_typer(data, name="data")


def show(
    data: Data,
    row: Annotated[int, typer.Option("--row", help="Which row, from 1; in a folder, of all its files in order.")] = 1,
    base: EmbeddedByDefault = None,
    supervise: Annotated[str, typer.Option(help="Assistant turns that are learned: all or last.")] = "all",
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking", help="Render with thinking on or off; default as each turn has reasoning."
        ),
    ] = None,
    columns: ColumnNames = None,
    as_json: AsJson = False,
) -> None:
    """A row's rendered tokens, the learned ones coloured: exactly what the model is trained on."""
    from adapters.embedded import EMBEDDED, open_base
    from adapters.errors import ConfigInvalid, DataInvalid
    from training.config import SUPERVISE
    from training.config_file import split_list
    from training.data.columns import Columns
    from training.data.formats import read_data
    from training.data.jsontext import RowInvalid
    from training.data.template import load_template

    if supervise not in SUPERVISE:
        raise ConfigInvalid(f"--supervise is {' or '.join(SUPERVISE)}, not {supervise!r}.", param="supervise")
    file = read_data(data, Columns(split_list(columns or "")))
    if not 1 <= row <= len(file.rows):
        raise DataInvalid(f"{data} has {len(file.rows):,} rows; --row {row} is none of them.", param="row")
    chosen = file.rows[row - 1]
    template = load_template(open_base(base or EMBEDDED).folder, thinking)
    try:
        sequences = template.render(chosen, supervise)
    except RowInvalid as error:
        problems = (error.problem(file.where(chosen)),)
        raise DataInvalid(f"Row {row} of {data} cannot be rendered.", problems=problems) from error
    if as_json:
        print_json(_document(file, chosen, template, sequences))
        return
    written = file.source(chosen).format
    for sequence in sequences:
        learned = f"{sequence.supervised_tokens} of {len(sequence.input_ids)} tokens learned"
        turns = ", ".join(map(str, sequence.turns))
        typer.echo(f"{file.where(chosen)} ({_form(written, chosen)}), messages {turns}: {learned}")
        _print_coloured(template.tokenizer, sequence)


def check(
    data: Data,
    test: Annotated[Path | None, typer.Option(help="Test data: rows of it that stand in DATA are found.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Validation data, looked at in the same way.")] = None,
    base: EmbeddedByDefault = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens; default the base's context.")] = None,
    over_long: Annotated[str, typer.Option(help="What becomes of longer rows: error, cut or drop.")] = "error",
    supervise: Annotated[str, typer.Option(help="Assistant turns that are learned: all or last.")] = "all",
    columns: ColumnNames = None,
    rules: Rules = None,
    strict: Strict = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page to this file, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is wrong with data before a model learns it: form, amount, labels, copies, leaks and private things.

    Leaves with 0 for pass and for warnings, with 3 where a finding blocks.
    """
    from adapters.embedded import EMBEDDED
    from server.cli.output import EXIT_FAILED, EXIT_NO
    from training.config_file import split_list
    from training.gate.check import Asked
    from training.gate.check import check as look
    from training.gate.page import report_html, report_lines

    report = look(
        Asked(
            data,
            base or EMBEDDED,
            test,
            validation,
            columns=split_list(columns or ""),
            rules=split_list(rules or ""),
            supervise=supervise,
            max_length=max_length,
            over_long=over_long,
        )
    )
    if html is not None:
        html.write_text(report_html(report), encoding="utf-8")
    if as_json:
        print_json(report.as_dict())
    else:
        colours = {"block": "red", "warn": "yellow"}
        for level, line in report_lines(report):
            typer.secho(line, fg=colours.get(level))
    if report.verdict == "block":
        raise typer.Exit(EXIT_NO)
    if strict and report.verdict == "warn":
        raise typer.Exit(EXIT_FAILED)


def _form(written: str, row: Any) -> str:
    from training.data.forms import TITLES
    from training.data.jsonfiles import FORMATS

    return f"{FORMATS[written]}, {TITLES[row.form]}"


def _document(file: Any, row: Any, template: Any, sequences: Any) -> dict[str, Any]:
    return {
        "file": row.place.source,
        "line": row.place.line,
        "row": row.place.number,
        "format": file.source(row).format,
        "form": row.form,
        "template": template.digest,
        "sequences": [_tokens(template.tokenizer, sequence) for sequence in sequences],
    }


def _tokens(tokenizer: Any, sequence: Any) -> list[dict[str, Any]]:
    return [
        {"id": token, "text": tokenizer.decode([token]), "is_learned": label != -100}
        for token, label in zip(sequence.input_ids, sequence.labels, strict=True)
    ]


def _print_coloured(tokenizer: Any, sequence: Any) -> None:
    """Runs of tokens are decoded together, so that a letter of several tokens is shown whole."""
    from itertools import groupby

    pairs = zip(sequence.input_ids, (label != -100 for label in sequence.labels), strict=True)
    for is_learned, run in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        # False, other than None, would switch both off again: bold and dim share one code for that.
        style: dict[str, Any] = {"fg": "green", "bold": True} if is_learned else {"dim": True}
        typer.secho(text, nl=False, **style)
    typer.echo("")
