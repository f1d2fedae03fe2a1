"""`hotshoe base prepare | show` and `hotshoe inspect`: what a base is, and whether an adapter folder fits it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.options import AsJson
from server.cli.output import EXIT_NO, print_json

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from adapters.canonical import Verdict
    from adapters.inspect import Inspection

BASE_HELP = "The base: `embedded`, a folder, or OWNER/NAME@COMMIT of the Hub."
BASE_IS_HELP = "`served`: the adapter was made for this base, whatever name its config claims."
LARGEST_RANK = 512  # what vLLM can serve at most; a server's own limit is its --max-rank


def add_to(app: typer.Typer) -> None:
    base = typer.Typer(no_args_is_help=True, help="The base model that adapters sit on.")
    base.command("prepare")(prepare)
    base.command("show")(show)
    app.add_typer(base, name="base")
    app.command("inspect")(inspect)


def prepare(
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing when it is already there.")] = False,
) -> None:
    """Make the embedded base in the user's cache, once, and print its folder and digest."""
    from adapters.bases import base_digest
    from adapters.embedded import EMBEDDED_ID, cache_folder
    from adapters.embedded import prepare as make

    worked: list[str] = []

    def report(line: str) -> None:
        worked.append(line)
        if not as_json:
            typer.echo(line)

    folder = make(cache_folder(), report)
    digest = base_digest(folder)
    if as_json:
        print_json({"id": EMBEDDED_ID, "path": str(folder), "digest": digest})
    elif worked or not quiet:
        typer.echo(f"{EMBEDDED_ID}\n  path    {folder}\n  digest  {digest}")


def show(
    base: Annotated[str, typer.Option("--base", help=BASE_HELP)] = "embedded",
    as_json: AsJson = False,
) -> None:
    """What a base is: identity, architecture, context length, the layers an adapter may sit on."""
    from adapters.embedded import open_base

    described = describe(open_base(base))
    if as_json:
        print_json(described)
        return
    for key, value in described.items():
        typer.echo(f"{key:<24}{value}")


def inspect(
    folder: Annotated[Path, typer.Argument(help="An adapter folder in PEFT's layout.")],
    base: Annotated[str, typer.Option("--base", help=BASE_HELP)] = "embedded",
    base_is: Annotated[str, typer.Option("--base-is", help=BASE_IS_HELP)] = "",
    as_json: AsJson = False,
) -> None:
    """Whether an adapter fits a base: every problem at once; exit code 3 when it is refused. Nothing is stored."""
    from adapters.canonical import check
    from adapters.embedded import open_base
    from adapters.inspect import inspect_folder

    if base_is not in ("", "served"):
        raise typer.BadParameter(f"{base_is!r}: the only value is `served`.", param_hint="--base-is")
    inspection = inspect_folder(folder)
    verdict = check(inspection, open_base(base), max_rank=LARGEST_RANK, base_is_served=base_is == "served")
    if as_json:
        print_json(verdict_as_dict(inspection, verdict))
    else:
        _print_verdict(inspection, verdict)
    if verdict.verdict == "refuse":
        raise typer.Exit(EXIT_NO)


def describe(base: BaseModel) -> dict[str, Any]:
    """What `base show` prints."""
    from adapters.bases import stored_dtype

    config = base.config
    return {
        "id": base.id,
        "path": str(base.folder),
        "digest": base.digest,
        "architecture": config["architectures"][0],
        "dtype": stored_dtype(config),
        "context_length_tokens": base.context_length_tokens,
        "vocabulary": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "adaptable_modules": len(base.shapes),
        "is_tied": base.is_tied,
    }


def verdict_as_dict(inspection: Inspection, verdict: Verdict) -> dict[str, Any]:
    """What `inspect --json` prints: the verdict first, then what the files hold."""
    ranks = sorted({module.rank for module in verdict.modules.values()})
    return {**verdict.as_dict(), "ranks": ranks, "base_digest": verdict.base_digest, "files": inspection.as_dict()}


def _print_verdict(inspection: Inspection, verdict: Verdict) -> None:
    found = verdict_as_dict(inspection, verdict)
    ranks = ", ".join(map(str, found["ranks"])) or "none"
    colour = "red" if verdict.verdict == "refuse" else "green"
    typer.secho(f"{found['verdict']}: {found['modules']} modules, rank {ranks}", fg=colour)
    for problem in verdict.reasons:
        advice = f"  -> {problem.advice}" if problem.advice else ""
        typer.echo(f"  {problem.code}  {problem.path}: {problem.message}{advice}")
    left_out = [*verdict.dropped, *inspection.left_out]
    if left_out:
        typer.echo(f"  left out: {', '.join(left_out)}")
