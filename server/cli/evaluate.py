"""`hotshoe eval`: the scores of a model on a chat file, through a server or without one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.output import print_json

if TYPE_CHECKING:
    from training.evaluate import Example


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    data: Annotated[Path, typer.Argument(help="Chat JSONL; its last turns are expected.")],
    model: Annotated[str, typer.Option("--model", help="A model id on a server, or an adapter's or model's folder.")],
    base: Annotated[str, typer.Option("--base", help="The base of an adapter folder.")] = "embedded",
    url: Annotated[str, typer.Option("--url", envvar="HOTSHOE_URL", help="The server.")] = "http://127.0.0.1:8000",
    label: Annotated[str, typer.Option("--label", help="The field of the answer that is its label.")] = "intent",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 128,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at a time.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", help="Write the answers as JSONL.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Score greedy answers on a chat file: exact match, valid JSON, label accuracy, F1 of the other fields."""
    from training.evaluate import generate_http, latency, load_examples, score

    examples = load_examples(data)
    prompts = [example.messages for example in examples]
    result: dict[str, Any] = {"model": model, "data": str(data)}
    if Path(model).is_dir():
        answers = _local(Path(model), base, prompts, max_tokens, show=not as_json)
    else:
        key = os.environ.get("HOTSHOE_API_KEY", "")
        streamed = generate_http(
            url,
            model,
            prompts,
            api_key=key,
            max_tokens=max_tokens,
            concurrency=concurrency,
            progress=_progress(not as_json),
        )
        answers = [answer.text for answer in streamed]
        result |= {"answered_by": sorted({answer.model for answer in streamed}), **latency(streamed).as_dict()}
    result |= score([example.expected for example in examples], answers, label).as_dict()
    if out is not None:
        _write_answers(out, examples, answers)
    if as_json:
        print_json(result)
        return
    for key, value in result.items():
        typer.echo(f"{key:<20}{value:.4f}" if isinstance(value, float) else f"{key:<20}{value}")


def _local(model: Path, base: str, prompts: list[Any], max_tokens: int, show: bool) -> list[str]:
    from adapters.embedded import open_base
    from training.evaluate import generate_local, local_folders

    is_adapter = (model / "adapter_config.json").is_file()
    folder, adapter = local_folders(model, open_base(base).folder if is_adapter else None)
    return generate_local(folder, adapter, prompts, max_new_tokens=max_tokens, progress=_progress(show))


def _progress(show: bool) -> Any:
    def print_progress(done: int, total: int) -> None:
        if show and sys.stderr.isatty():
            typer.echo(f"\r{done}/{total} rows", nl=done == total, err=True)

    return print_progress


def _write_answers(out: Path, examples: Sequence[Example], answers: Sequence[str]) -> None:
    rows = (
        {"messages": example.messages, "expected": example.expected, "answer": answer}
        for example, answer in zip(examples, answers, strict=True)
    )
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
