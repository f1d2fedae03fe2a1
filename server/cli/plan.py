"""`hotshoe plan`: what fits on a machine, what it takes and costs, and with which settings to begin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.options import AsJson, ColumnNames
from server.cli.output import EXIT_NO, print_json


def add_to(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command("plan")(plan)


def plan(
    data: Annotated[
        Path | None, typer.Argument(help="JSONL, JSON, CSV or Parquet to train on, or a folder of them.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="One base: a Qwen2.5 or Qwen3 size, a folder or a config.json.")
    ] = None,
    gpu: Annotated[
        str, typer.Option("--gpu", help="t4, a10, l4, 4090, a100, h100, cpu, or auto: this machine's.")
    ] = "auto",
    price: Annotated[
        float | None, typer.Option("--price", help="Dollars an hour; else the dated ones we know.")
    ] = None,
    budget: Annotated[float | None, typer.Option("--budget", help="Most dollars that the run may cost.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option("--latency-ms", help="Milliseconds a token that an answer may take.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", help="Largest rank that is served; default 64, as the server's.")
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Longer rows count as cut.")] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Passes over the data; default the trainer's.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Base folder whose tokenizer counts; default the base's own.")
    ] = None,
    columns: ColumnNames = None,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", help="A calibration report: measured here and written, or read where it exists."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What fits, with its memory by part, time and money, and the settings to begin with, each with its reason."""
    from adapters.errors import InvalidRequest
    from training.quiet import quieten

    if data is None and calibrate is None:
        raise InvalidRequest(
            "Name the data: hotshoe plan DATA. Without it only --calibrate REPORT works.", param="data"
        )
    quieten()
    report = _report(calibrate, base, as_json or data is not None) if calibrate is not None else None
    if data is None:
        if as_json:
            print_json(report)
        return
    from training.config import SERVED_RANK
    from training.config_file import split_list
    from training.planner.plan import Asked
    from training.planner.plan import plan as make

    limit, names = SERVED_RANK if max_rank is None else max_rank, split_list(columns or "")
    asked = Asked(data, base, gpu, price, budget, latency_ms, limit, max_length, epochs, tokenizer, names)
    _show(make(asked, report), as_json)


def _report(path: Path, base: str | None, is_quiet: bool) -> dict[str, Any]:
    """The report that is there, or a new one of this machine."""
    from training.planner.calibration import calibrate, described, read_report, write_report

    if path.exists():
        return read_report(path)
    report = calibrate(lambda line: typer.echo(line, err=True), base)
    write_report(path, report)
    if not is_quiet:
        typer.echo(f"{path}\n{described(report)}")
    return report


def _show(found: dict[str, Any], as_json: bool) -> None:
    from training.planner.table import lines

    if as_json:
        print_json(found)
    else:
        for line in lines(found):
            typer.echo(line)
    if not found["fits"]:
        raise typer.Exit(EXIT_NO)
