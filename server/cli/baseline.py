"""`hotshoe baseline`: is fine-tuning needed? The base well asked, simple models beside it, an adapter's verdict."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.options import AsJson, ColumnNames, EmbeddedByDefault
from server.cli.output import EXIT_FAILED, EXIT_NO, print_json

if TYPE_CHECKING:
    from training.baseline.ground import Ground

REPORT = Path("baseline.json")
COLOURS = {"good": "green", "bad": "red", "open": "yellow"}


def add_to(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command("baseline")(baseline)


def baseline(
    training: Annotated[Path, typer.Argument(metavar="TRAIN", help="The data that would be trained on.")],
    validation: Annotated[Path, typer.Option(help="Rows that choose the prompt; never those of TRAIN or the test.")],
    test: Annotated[Path | None, typer.Option(help="Rows for the verdict alone; every reading is counted.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="What the verdict is on: its folder, or NAME@N of the server at --url.")
    ] = None,
    served: Annotated[
        str | None, typer.Option(help="NAME@N that the adapter's folder is served as, for the final score.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Ask this server, not the base here.")] = None,
    base: EmbeddedByDefault = None,
    report: Annotated[
        Path, typer.Option(help="The report: written before training, gone on from for a verdict.")
    ] = REPORT,
    again: Annotated[bool, typer.Option("--again", help="Choose the prompt anew, whatever the report says.")] = False,
    metric: Annotated[str | None, typer.Option(help="What decides; default what suits the answers.")] = None,
    margin: Annotated[float, typer.Option(help="How much better the adapter must be: 0.02 is two points.")] = 0.02,
    label: Annotated[
        str | None, typer.Option(help="The field of the answer that is its label; default found in the data.")
    ] = None,
    examples: Annotated[str, typer.Option(help="How many examples are shown, as 8 or 4,8; 0 none.")] = "8",
    prompt: Annotated[
        list[Path] | None, typer.Option(help="A text file with a system prompt of your own; may be given repeatedly.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Only so many validation and test rows, evenly spread.")
    ] = None,
    group: Annotated[
        str, typer.Option(help="Rows that count as one: those of a template, conversation, label or file.")
    ] = "template",
    columns: ColumnNames = None,
    probe: Annotated[bool, typer.Option(help="Fit a linear probe on the frozen base, too.")] = True,
    drift: Annotated[bool, typer.Option(help="Score the adapter on the base in its form of training, too.")] = True,
    ledger: Annotated[
        Path | None, typer.Option(help="Where readings of test data are counted; default in the state folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which training rows are shown as examples.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=16, help="Longest prompt; examples go where it is full.")
    ] = 2048,
    strict: Annotated[bool, typer.Option("--strict", help="Leave with 1 where it cannot be told.")] = False,
    as_json: AsJson = False,
) -> None:
    """Is fine-tuning needed? Measure the base with its best prompt and simple models on validation rows.

    With --test and --adapter: say whether the adapter is worth it, not worth it, or that it cannot be told. Leaves
    with 3 for "not worth it".
    """
    from training.baseline import report as reports
    from training.baseline.after import decide
    from training.baseline.before import measure
    from training.baseline.ground import Asked, open_ground
    from training.baseline.ledger import LEDGER_FILE, Ledger
    from training.config_file import split_list
    from training.quiet import quieten

    folder, name = _adapter(adapter, served, test)
    quieten()
    asked = Asked(
        training,
        validation,
        test,
        base=base,
        adapter=folder,
        columns=split_list(columns or ""),
        label=label,
        metric=metric,
        margin=margin,
        examples=_counts(examples),
        prompts=tuple(_text(path) for path in prompt or ()),
        rows=rows,
        by=group,
        probe=probe,
        seed=seed,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        url=url,
        served=name,
        api_key=os.environ.get("HOTSHOE_API_KEY", ""),
        thinking=_thinking(url, name),
    )
    before = reports.read(report)
    kept = None if again else before
    ground = open_ground(asked)
    say, progress = _say(not as_json), _progress(not as_json)
    made = _gone_on_from(kept, ground, report) if test is not None else None
    if made is None:
        made = measure(ground, say, progress, kept, lambda unfinished: reports.write(report, unfinished))
        reports.write(report, made)
    if test is not None:
        book = Ledger(ledger or _home() / LEDGER_FILE)
        made = decide(ground, made, book, say, progress, drifts=drift)
        reports.write(report, made)
    _show(made, report, as_json)
    word = made["verdict"]["verdict"] if made["verdict"] is not None else ""
    if word == "not_worth_it":
        raise typer.Exit(EXIT_NO)
    if word == "cannot_tell" and strict:
        raise typer.Exit(EXIT_FAILED)


def _adapter(adapter: str | None, served: str | None, test: Path | None) -> tuple[Path | None, str | None]:
    """(its folder, its name on a server), of which one may be None; raises ConfigInvalid."""
    from adapters.errors import ConfigInvalid

    if (test is None) != (adapter is None):
        missing = "--test" if test is None else "--adapter"
        raise ConfigInvalid(f"A verdict needs --test and --adapter; {missing} is not given.", param=missing[2:])
    if adapter is None:
        return None, None
    if Path(adapter).is_dir():
        return Path(adapter), served
    if served is not None or "/" in adapter:
        raise ConfigInvalid(f"There is no adapter folder {adapter}.", param="adapter")
    return None, adapter


def _gone_on_from(kept: dict[str, Any] | None, ground: Ground, path: Path) -> dict[str, Any] | None:
    """The report of before, where it is about the same base, data and task; raises ConfigInvalid where it is not."""
    from adapters.errors import ConfigInvalid
    from training.baseline.report import difference_from

    if kept is None or not kept["is_finished"]:
        return None
    other = difference_from(kept, ground.facts())
    if other is not None:
        raise ConfigInvalid(
            f"{path} was made of other {other} than this: name another file with --report, or choose the prompt anew "
            "with --again.",
            param="report",
        )
    return kept


def _counts(text: str) -> tuple[int, ...]:
    from adapters.errors import ConfigInvalid

    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ConfigInvalid(
            f"--examples is {text[:80]!r}; write numbers with commas between.", param="examples"
        ) from None


def _text(path: Path) -> str:
    from adapters.errors import ConfigInvalid

    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path} cannot be read as a prompt: {error}.", param="prompt") from error
    if not text:
        raise ConfigInvalid(f"{path} is empty, so it is no prompt.", param="prompt")
    return text


def _thinking(url: str | None, name: str | None) -> bool | None:
    from training.evaluation.answering import enable_thinking

    return enable_thinking(url, os.environ.get("HOTSHOE_API_KEY", ""), name) if url and name else None


def _home() -> Path:
    from server.settings import load_settings

    return load_settings().home


def _say(is_shown: bool) -> Any:
    def say(line: str) -> None:
        if is_shown:
            typer.echo(line, err=True)

    return say


def _progress(is_shown: bool) -> Any:
    def print_progress(done: int, total: int) -> None:
        if is_shown and sys.stderr.isatty():
            typer.echo(f"\r{done}/{total} rows", nl=done == total, err=True)

    return print_progress


def _show(made: dict[str, Any], path: Path, as_json: bool) -> None:
    from training.baseline.report import lines

    if as_json:
        print_json({"report": str(path), **made})
        return
    for kind, line in lines(made):
        typer.secho(line, fg=COLOURS.get(kind))
    typer.echo(f"written to {path}")
