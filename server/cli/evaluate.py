"""`hotshoe eval`: the scores of a model on a data file, through a server or without one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from adapters.errors import ConfigInvalid
from server.cli.output import print_json

if TYPE_CHECKING:
    from training.evaluate import Example


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    data: Annotated[Path, typer.Argument(help="Data as for training; the last answer of each row is expected.")],
    model: Annotated[
        str, typer.Option("--model", help="NAME, NAME@N or the base's id on a server; or a folder, or `embedded`.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The base of an adapter folder; default its own, else the embedded.")
    ] = None,
    url: Annotated[str, typer.Option("--url", envvar="HOTSHOE_URL", help="The server.")] = "http://127.0.0.1:8000",
    label: Annotated[
        str | None,
        typer.Option("--label", help="The field of the answer that is its label; default found in the data."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Your own column names, as prompt=Question,completion=Answer.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Only so many rows, evenly spread.")] = None,
    against_base: Annotated[
        bool, typer.Option("--against-base", help="Score the base alone, too (of an adapter folder).")
    ] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 128,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at a time.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", help="Write the answers as JSONL.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Score greedy answers on a data file: exact match; for JSON and tool calls also label accuracy and F1 of fields.

    Without a server the validation loss is computed, too.
    """
    from training.config_file import split_list
    from training.data.columns import Columns
    from training.evaluate import load_examples
    from training.scores import telling_scores

    examples = load_examples(data, Columns(split_list(columns or "")))
    chosen = examples[:: max(1, len(examples) // rows)][:rows] if rows else examples
    progress = _progress(not as_json)
    if Path(model).is_dir() or model == "embedded":
        found = _local(model, base, chosen, max_tokens, against_base, progress)
    elif against_base:
        raise ConfigInvalid("--against-base is for an adapter folder; ask a server for its base's id.", param="model")
    else:
        found = _served(url, model, chosen, max_tokens, concurrency, progress)
    expected = [example.expected for example in chosen]
    result = {"model": model, "data": str(data), **found.said, **telling_scores(expected, found.answers, label)}
    if found.base_answers is not None:
        result |= _prefixed(telling_scores(expected, found.base_answers, label))
    if out is not None:
        _write_answers(out, chosen, found.answers)
    if as_json:
        print_json(result)
        return
    for key, value in result.items():
        typer.echo(f"{key:<20}{value:.4f}" if isinstance(value, float) else f"{key:<20}{value}")


@dataclass(frozen=True)
class _Found:
    """The answers, and what else there is to say of the model."""

    said: dict[str, Any]
    answers: list[str]
    base_answers: list[str] | None = None


def _local(
    model: str, base: str | None, examples: Sequence[Example], max_tokens: int, against_base: bool, progress: Any
) -> _Found:
    from training.quiet import quieten
    from training.reference import open_reference

    quieten()
    reference = open_reference(model, base)
    prompts = [example.prompt for example in examples]
    sequences = reference.sequences([example.row for example in examples])
    said: dict[str, Any] = {"loss": reference.loss(sequences)}
    answers = reference.answers(prompts, max_tokens, progress=progress)
    if not against_base or not reference.has_adapter:
        return _Found(said, answers)
    with reference.without_adapter():
        said["base_loss"] = reference.loss(sequences)
        return _Found(said, answers, reference.answers(prompts, max_tokens, progress=progress))


def _served(
    url: str, model: str, examples: Sequence[Example], max_tokens: int, concurrency: int, progress: Any
) -> _Found:
    from training.evaluate import generate_http, latency

    key = os.environ.get("HOTSHOE_API_KEY", "")
    thinking = _enable_thinking(url, key, model)
    prompts = [
        example.prompt if thinking is None else replace(example.prompt, thinking=thinking) for example in examples
    ]
    streamed = generate_http(
        url, model, prompts, api_key=key, max_tokens=max_tokens, concurrency=concurrency, progress=progress
    )
    said = {"answered_by": sorted({answer.model for answer in streamed}), **latency(streamed).as_dict()}
    return _Found(said, [answer.text for answer in streamed])


def _enable_thinking(url: str, key: str, model: str) -> bool | None:
    """What the card of a served version says of thinking; None where it has none, or says nothing."""
    import httpx

    name, _, wanted = model.partition("@")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=60) as client:
            adapter = client.get(f"/v1/adapters/{quote(name, safe='')}").json()
            aliases = {row["alias"]: row["version"] for row in adapter.get("aliases", ())}
            number = int(wanted) if wanted.isdigit() else aliases.get(wanted or "stable")
            if number is None:
                return None
            card = client.get(f"/v1/adapters/{quote(name, safe='')}/versions/{number}").json().get("card")
    except (httpx.HTTPError, ValueError):  # the questions that follow say what is wrong with the server
        return None
    template = card.get("template") if isinstance(card, dict) else None
    thinking = template.get("enable_thinking") if isinstance(template, dict) else None
    return thinking if isinstance(thinking, bool) else None


def _prefixed(scores: dict[str, Any]) -> dict[str, Any]:
    return {f"base_{key}": value for key, value in scores.items() if key not in ("rows", "label")}


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
