"""`hotshoe review`: what the settings of a training config do, ours or another trainer's, before a run is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.options import AsJson, ColumnNames, Rules, Strict
from server.cli.output import EXIT_FAILED, EXIT_NO, print_json

COLOURS = {"block": "red", "warn": "yellow"}


def add_to(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command("review")(review)


def review(
    config: Annotated[Path, typer.Argument(help="YAML or JSON: ours, LLaMA-Factory's, Axolotl's, TRL's or PEFT's.")],
    dialect: Annotated[
        str | None, typer.Option(help="hotshoe, llama-factory, axolotl, trl or peft; default: told by its keys.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The data, for lengths, steps, warm-up and epochs.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base folder or OWNER/NAME@REVISION; default the config's own.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="What it will run on, as t4, v100, a10, 4090, h100 or cpu.")] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank that is served; default 64, as the server's.")
    ] = None,
    columns: ColumnNames = None,
    rules: Rules = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """What each setting of a training config does to you, with the evidence and a better value.

    Leaves with 0 for pass and for warnings, with 3 where a finding blocks: the run would fail, or its adapter could
    not be served.
    """
    from training.config import SERVED_RANK
    from training.config_file import split_list
    from training.review.check import Asked
    from training.review.check import review as look

    if data is not None:
        from training.quiet import quieten

        quieten()
    limit = SERVED_RANK if max_rank is None else max_rank
    found = look(Asked(config, dialect, data, base, gpu, limit, split_list(columns or ""), split_list(rules or "")))
    if as_json:
        print_json(found.as_dict())
    else:
        _show(found)
    if found.verdict == "block":
        raise typer.Exit(EXIT_NO)
    if strict and found.verdict == "warn":
        raise typer.Exit(EXIT_FAILED)


def _show(found: Any) -> None:
    reading = found.reading
    typer.echo(f"{found.config}: read as {reading.title} ({reading.dialect}); {_counts(found.facts)}")
    for row in found.findings:
        place = f"line {row['line']}" if row["line"] else "not in the file, so the trainer's default"
        value = ", ".join(map(str, row["value"])) if isinstance(row["value"], list) else row["value"]
        typer.secho(
            f"{row['severity']:<5} {row['setting']} = {value} ({place})  [{row['rule']}]",
            fg=COLOURS.get(row["severity"]),
        )
        detail = f" ({row['detail']})" if row["detail"] else ""
        typer.echo(f"      {row['effect']}{detail}")
        typer.echo(f"      {row['evidence']['kind']}: {row['evidence']['source']}")
        typer.echo(f"      → {row['suggestion']}")
    if reading.aside:
        typer.echo(f"keys that no rule is about: {', '.join(sorted(reading.aside))}")
    typer.secho(f"{found.verdict}: {_sentence(found)}", fg=COLOURS.get(found.verdict))


def _counts(facts: dict[str, Any]) -> str:
    parts = [f"{facts['rows_a_step']} rows a step"] if facts["rows_a_step"] else []
    if "rows" in facts:
        parts.append(f"{facts['rows']:,} rows of at most {facts['tokens']['max']:,} tokens")
    if facts["steps"]:
        parts.append(f"{facts['steps']:,} steps")
    return ", ".join(parts) or "no training settings"


def _sentence(found: Any) -> str:
    counts = {level: sum(row["severity"] == level for row in found.findings) for level in ("block", "warn", "note")}
    listed = ", ".join(f"{count} to {level}" for level, count in counts.items() if count)
    return listed or "nothing speaks against this config"
