"""`hotshoe eval`: what a model's answers are worth, through a server or without one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import ConfigInvalid
from server.cli.options import AsJson, ColumnNames
from server.cli.output import print_json

if TYPE_CHECKING:
    from training.evaluation.judge import Endpoint
    from training.evaluation.run import Outcome


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    data: Annotated[Path, typer.Argument(help="Data as for training; the last answer of each row is expected.")],
    model: Annotated[
        str, typer.Option("--model", help="NAME, NAME@N or the base's id on a server; or a folder, or `embedded`.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The base of a folder; default an adapter's own, else the embedded.")
    ] = None,
    url: Annotated[str, typer.Option("--url", envvar="HOTSHOE_URL", help="The server.")] = "http://127.0.0.1:8000",
    label: Annotated[
        str | None,
        typer.Option(
            "--label", help='The field of the answer that is its label, "" for the whole answer; default found.'
        ),
    ] = None,
    columns: ColumnNames = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Only so many rows, evenly spread.")] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="Only these, with commas, the deciding one first; default by data.")
    ] = None,
    against_base: Annotated[bool, typer.Option("--against-base", help="Ask the base alone, too, and compare.")] = False,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="NAME@N or a folder to compare with; can be repeated.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="The training data: figures of rows near to it and far from it.")
    ] = None,
    by: Annotated[
        str, typer.Option("--by", help="What makes rows one cluster: template, conversation, label or file.")
    ] = "template",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 128,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at a time.")] = 8,
    noise_rows: Annotated[
        int, typer.Option("--noise-rows", min=0, help="Rows that are asked in another batch order, too; 0 for none.")
    ] = 64,
    judge_url: Annotated[
        str | None,
        typer.Option("--judge-url", help="An OpenAI-compatible server that compares answers; key: HOTSHOE_JUDGE_KEY."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="The judge's name there.")] = None,
    judge_base: Annotated[
        str | None, typer.Option("--judge-base", help="Model folder, or `embedded`, that gives GPTScore.")
    ] = None,
    aspect: Annotated[
        str, typer.Option("--aspect", help="What GPTScore asks for: correct, relevant, fluent or informative.")
    ] = "correct",
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with figures and answers.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the answers as JSONL.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score greedy answers on a data file with the metrics that fit it, each with its interval; see docs/evaluation.md.

    Of a folder the loss, and what its adapter made the base forget, are measured, too.
    """
    from training.config_file import split_list
    from training.data.columns import Columns
    from training.evaluation.answering import Place
    from training.evaluation.run import Request
    from training.evaluation.run import evaluate as evaluated

    request = Request(
        data=data,
        model=model,
        place=Place(url, os.environ.get("HOTSHOE_API_KEY", ""), base, concurrency),
        columns=Columns(split_list(columns or "")),
        rows=rows,
        label=label,
        metrics=split_list(metrics) if metrics else None,
        against_base=against_base,
        against=tuple(against or ()),
        train=train,
        by=by,
        max_tokens=max_tokens,
        noise_rows=noise_rows,
        judge=_endpoint(judge_url, judge_model),
        judge_base=judge_base,
        aspect=aspect,
    )
    outcome = evaluated(request, _steps(not as_json))
    if out is not None:
        _write_answers(out, outcome)
    if html is not None:
        from training.evaluation.page import report_html

        html.write_text(report_html(outcome.report.content), "utf-8", errors="replace")
    if as_json:
        print_json(_document(request.label, outcome))
        return
    _print(outcome)


def _endpoint(url: str | None, model: str | None) -> Endpoint | None:
    from training.evaluation.judge import Endpoint

    if (url is None) != (model is None):
        raise ConfigInvalid("A judge needs both --judge-url and --judge-model.", param="judge_url")
    return Endpoint(url, model, os.environ.get("HOTSHOE_JUDGE_KEY", "")) if url and model else None


def _document(label: str | None, outcome: Outcome) -> dict[str, Any]:
    """The scores that a promote gate uses, flat, and the whole report."""
    return {**_flat(label, outcome), "report": outcome.report.as_dict()}


def _flat(label: str | None, outcome: Outcome) -> dict[str, Any]:
    from training.scores import telling_scores

    report, expected = outcome.report.content, [example.expected for example in outcome.examples]
    made = {
        "model": report["model"],
        "data": report["data"],
        **outcome.answered.said,
        **telling_scores(expected, outcome.answered.answers, label),
    }
    for rival in outcome.rivals:
        if rival.name == outcome.base:
            said = {"loss": rival.said["loss"]} if "loss" in rival.said else {}
            made |= _prefixed({**said, **telling_scores(expected, rival.answers, label)})
    return made


def _print(outcome: Outcome) -> None:
    from training.evaluation.lines import report_lines

    for line in report_lines(outcome.report.content):
        typer.echo(line)
    for key, value in outcome.answered.said.items():
        typer.echo(f"{key:<20}{value:.4f}" if isinstance(value, float) else f"{key:<20}{value}")


def _prefixed(scores: dict[str, Any]) -> dict[str, Any]:
    return {f"base_{key}": value for key, value in scores.items() if key not in ("rows", "label")}


def _steps(show: bool) -> Callable[[str], Callable[[int, int], None]]:
    def step(name: str) -> Callable[[int, int], None]:
        def print_progress(done: int, total: int) -> None:
            if show and sys.stderr.isatty():
                typer.echo(f"\r{done}/{total} {name}", nl=done == total, err=True)

        return print_progress

    return step


def _write_answers(out: Path, outcome: Outcome) -> None:
    rows = (
        {
            "messages": example.messages,
            "expected": example.expected,
            "answer": answer,
            **({"rivals": {rival.name: rival.answers[at] for rival in outcome.rivals}} if outcome.rivals else {}),
        }
        for at, (example, answer) in enumerate(zip(outcome.examples, outcome.answered.answers, strict=True))
    )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out.write_text(text, "utf-8", errors="replace")
