"""`hotshoe train` and `hotshoe data show`: from a chat file to an adapter folder, and what the model sees of a row."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.output import print_json

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Data = Annotated[Path, typer.Argument(help="Chat JSONL: one object with `messages` a line.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Base folder or OWNER/NAME@REVISION; default the embedded base.")
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking", help="Render with thinking on or off; default as each turn has reasoning."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    data = typer.Typer(no_args_is_help=True, help="Look at training data.")
    data.command("show")(show)
    app.add_typer(data, name="data")
    app.command("train")(train)


def train(
    data: Data,
    name: Annotated[str, typer.Option("--name", help="Name of the adapter.")],
    validation: Annotated[Path | None, typer.Option(help="Chat JSONL for the validation loss.")] = None,
    validation_share: Annotated[float | None, typer.Option(help="Share of DATA held out instead; default 0.1.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the adapter; default ./NAME.")] = None,
    base: Base = None,
    method: Annotated[str | None, typer.Option(help="qlora or lora; default lora where the base fits.")] = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Go on from NAME@N of the server at HOTSHOE_URL, or from a folder.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; default 3.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default 1e-3 for a small base, else 2e-4.")] = None,
    scheduler: Annotated[str, typer.Option(help="linear, cosine or constant_with_warmup.")] = "cosine",
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps during which the rate rises.")] = 0.05,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step; default 16, fewer for little data.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank; default 16.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha; default twice the rank.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Comma-separated projections; default all seven.")] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank).")] = False,
    dropout: Annotated[float, typer.Option(help="Dropout on the adapter's input.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens; default the base's context.")] = None,
    over_long: Annotated[str, typer.Option(help="Longer rows: error, cut or drop.")] = "error",
    supervise: Annotated[str, typer.Option(help="Assistant turns that are learned: all or last.")] = "all",
    thinking: Thinking = None,
    evaluations: Annotated[int | None, typer.Option(help="Validations during the run; default 4 or more.")] = None,
    patience: Annotated[int, typer.Option(help="Stop after so many without a lower loss; 0 never.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and held-out rows.")] = 17,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Save memory; slower.")
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="TensorBoard folder; default OUT/runs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter on chat data; with no other flag the settings suit the data and the base."""
    chosen = {key: value for key, value in locals().items() if key not in ("from_", "as_json", "target_modules")}
    if target_modules is not None:
        chosen["target_modules"] = tuple(part.strip() for part in target_modules.split(","))
    _check_first(chosen)
    from training.quiet import quieten

    quieten()
    with tempfile.TemporaryDirectory(prefix="hotshoe-from-") as scratch:
        result = _train(chosen, from_, Path(scratch))
    if as_json:
        print_json({"path": str(result.folder), "card": result.card})
    else:
        _report(result)


def show(
    data: Data,
    row: Annotated[int, typer.Option("--row", help="Which row, from 1.")] = 1,
    base: Base = None,
    supervise: Annotated[str, typer.Option(help="Assistant turns that are learned: all or last.")] = "all",
    thinking: Thinking = None,
    as_json: AsJson = False,
) -> None:
    """A row's rendered tokens, the learned ones coloured: exactly what the model is trained on."""
    from adapters.embedded import EMBEDDED, open_base
    from adapters.errors import DataInvalid, Problem
    from training.data.formats import RowInvalid, read_chat
    from training.data.template import load_template

    template = load_template(open_base(base or EMBEDDED).folder, thinking)
    rows = read_chat(data).rows
    if not 1 <= row <= len(rows):
        raise DataInvalid(f"{data} has {len(rows)} rows; --row {row} is none of them.", param="row")
    chosen = rows[row - 1]
    try:
        sequences = template.render(chosen, supervise)
    except RowInvalid as error:
        problem = Problem(error.code, f"{data}:{chosen.line}", error.message, error.advice)
        raise DataInvalid(f"Row {row} of {data} cannot be rendered.", problems=(problem,)) from error
    shown = [_tokens(template.tokenizer, sequence) for sequence in sequences]
    if as_json:
        print_json({"line": chosen.line, "template": template.digest, "sequences": shown})
        return
    for sequence in sequences:
        learned = f"{sequence.supervised_tokens} of {len(sequence.input_ids)} tokens learned"
        typer.echo(f"{data}:{chosen.line}, messages {', '.join(map(str, sequence.turns))}: {learned}")
        _print_coloured(template.tokenizer, sequence)


def _check_first(chosen: dict[str, Any]) -> None:
    """Refuse wrong settings before torch is imported."""
    from training.config import TrainingConfig

    TrainingConfig(**chosen)


def _train(chosen: dict[str, Any], source: str | None, scratch: Path) -> Any:
    from training.config import TrainingConfig
    from training.trainer import train as run

    if source is not None and Path(source).is_dir():
        chosen |= {"initial_adapter": Path(source), "parent": source}
    elif source is not None:
        from training.lineage import fetch_version

        chosen |= {"parent": fetch_version(source, scratch), "initial_adapter": scratch}
    return run(TrainingConfig(**chosen))


def _report(result: Any) -> None:
    outcome, cost = result.card["result"], result.card["cost"]
    losses = [f"training loss {outcome['training_loss']:.3f}"]
    if outcome["validation_loss"] is not None:
        losses.append(f"validation loss {outcome['validation_loss']:.3f} at step {outcome['best_step']}, which is kept")
    typer.echo(f"{result.folder}\n  {', '.join(losses)}")
    typer.echo(
        f"  {outcome['steps']} steps in {cost['seconds']:.0f} s, {cost['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {cost['peak_memory_bytes'] / 1e9:.2f} GB"
    )


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
        typer.secho(text, fg="green" if is_learned else None, bold=is_learned, dim=not is_learned, nl=False)
    typer.echo("")
