"""`hotshoe train`: from a data file to an adapter folder."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from server.cli.options import AsJson
from server.cli.output import EXIT_NO, print_json


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    app.command("train")(_with_options(train))


def train(config: Path | None, from_: str | None, resume: bool, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Train an adapter on chat data; with no other flag the settings suit the data and the base.

    A run that was stopped or killed goes on with --resume, and ends in the weights it would have had.
    """
    chosen, source = _settings(config, flags, from_)
    _check_first(chosen)
    from training.quiet import quieten

    quieten()
    with tempfile.TemporaryDirectory(prefix="hotshoe-from-") as scratch:
        if dry_run:
            _measure(chosen, source, Path(scratch), as_json)
            return
        result = _train(chosen, source, Path(scratch), resume)
    if as_json:
        print_json({"path": str(result.folder), "card": result.card})
    else:
        _report(result)
    if not result.card["check"]["passed"]:
        raise typer.Exit(EXIT_NO)


def _with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with an option for each setting of a run, named and described where the setting is defined."""
    from training.config import TrainingConfig
    from training.config_file import settable

    docs = TrainingConfig.documentation()
    ours = {
        "data": Annotated[Path | None, typer.Argument(help=docs["data"])],
        "config": Annotated[Path | None, typer.Option("--config", help="YAML of these settings; flags win over it.")],
        "from_": Annotated[
            str | None, typer.Option("--from", help="Go on from NAME@N of the server at HOTSHOE_URL, or from a folder.")
        ],
        "resume": Annotated[bool, typer.Option("--resume", help="Go on with the run that was cut off in this output.")],
        "dry_run": Annotated[
            bool, typer.Option("--dry-run", help="Measure three steps, say when the run would end, and leave nothing.")
        ],
        "as_json": AsJson,
    }
    given = {name: _option(name, hint, docs[name]) for name, hint in settable().items() if name != "data"}
    annotations = {**ours, **given}
    switches = ("resume", "dry_run", "as_json")
    defaults: dict[str, Any] = {name: False if name in switches else None for name in annotations}

    @functools.wraps(verb)
    def command(**values: Any) -> None:
        verb(**values)

    command.__annotations__ = {**annotations, "return": None}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
            for name, hint in annotations.items()
        ]
    )
    return command


def _option(name: str, hint: Any, doc: str) -> Any:
    """How typer reads one setting: lists and choices are text here, and checked with everything else."""
    flag = f"--{name.replace('_', '-')}"
    kinds = {Path, int, float, bool} & {hint, *get_args(hint)}
    if bool in kinds:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=doc)]
    return Annotated[(kinds.pop() if kinds else str) | None, typer.Option(flag, help=doc)]


def _settings(file: Path | None, flags: dict[str, Any], source: str | None) -> tuple[dict[str, Any], str | None]:
    """The file's settings with the flags over them, and what to go on from; raises ConfigInvalid."""
    from adapters.errors import ConfigInvalid
    from training.config_file import FROM, read_config, settable, split_list

    chosen = read_config(file) if file is not None else {}
    given = {key: value for key, value in flags.items() if value is not None}
    lists = {key for key, hint in settable().items() if get_origin(hint) is tuple}
    chosen |= {key: split_list(value) if key in lists else value for key, value in given.items()}
    source = source or chosen.get(FROM)
    for key, where in (("data", "DATA"), ("name", "--name NAME")):
        if key not in chosen:
            raise ConfigInvalid(f"There is no {key}: give {where}, or {key} in the --config file.", param=key)
    return {key: value for key, value in chosen.items() if key != FROM}, source


def _check_first(chosen: dict[str, Any]) -> None:
    """Refuse wrong settings, and what is not installed, before torch is imported."""
    from training.config import TrainingConfig
    from training.reporting import check_reporters

    check_reporters(TrainingConfig(**chosen))


def _train(chosen: dict[str, Any], source: str | None, scratch: Path, resume: bool) -> Any:
    from training.trainer import train as run

    return run(_config(chosen, source, scratch), resume=resume)


def _measure(chosen: dict[str, Any], source: str | None, scratch: Path, as_json: bool) -> None:
    from training.planner.dry_run import dry_run, lines

    found = dry_run(_config(chosen, source, scratch))
    if as_json:
        print_json(found)
    else:
        for line in lines(found):
            typer.echo(line)


def _config(chosen: dict[str, Any], source: str | None, scratch: Path) -> Any:
    from training.config import TrainingConfig

    if source is not None and Path(source).is_dir():
        chosen |= {"initial_adapter": Path(source), "parent": source}
    elif source is not None:
        from training.lineage import fetch_version

        chosen |= {"parent": fetch_version(source, scratch), "initial_adapter": scratch}
    return TrainingConfig(**chosen)


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
    evaluation = result.card["evaluation"]
    if evaluation is not None:
        is_worse = evaluation["loss"]["adapter"] > evaluation["loss"]["base"]
        typer.secho(f"  {evaluation['verdict']}", fg="red" if is_worse else None)
    verdict, check = result.card["verdict"], result.card["check"]
    flags = f" [{', '.join(verdict['flags'])}]" if verdict["flags"] else ""
    is_good = verdict["primary"] == "learned" and not flags
    typer.secho(f"  {verdict['sentence']}{flags}", fg="green" if is_good else "yellow", bold=True)
    for line in verdict["advice"]:
        typer.echo(f"  -> {line}")
    if not check["passed"]:
        typer.secho(f"  {check['sentence']}", fg="red")
