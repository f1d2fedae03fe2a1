"""`hotshoe serve` and `hotshoe doctor`: the server of this machine, and the health of its state while none runs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.options import AsJson

if TYPE_CHECKING:
    from server.settings import Settings


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    app.command("serve", context_settings={"allow_extra_args": False})(serve)
    app.command("doctor")(doctor)


def serve(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings and vLLM's flags (HOTSHOE_CONFIG).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="`embedded` (default), a folder, or OWNER/NAME@COMMIT.")] = None,
    merge_base: Annotated[str | None, typer.Option(help="The 16-bit base that exports merge into.")] = None,
    merged: Annotated[
        str | None, typer.Option(help="Serve this version alone, NAME@N, merged into the base: at the base's speed.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (8000).")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send; HOTSHOE_API_KEY hides it from `ps`.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Distinct adapters answering at the same time.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Largest LoRA rank served (64).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Number format of the engine's weights (auto).")] = None,
    home: Annotated[Path | None, typer.Option(help="State folder (HOTSHOE_HOME).")] = None,
    engine: Annotated[str | None, typer.Option(help="`vllm` (default) or `scripted`, which loads no model.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate file for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key file for HTTPS.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error (info).")] = None,
    engine_args: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM FLAGS]", help="Further flags for vLLM, after `--`.")
    ] = None,
) -> None:
    """Serve one base and any number of adapters behind the OpenAI HTTP API.

    Every other setting is an environment variable or a line of the file; docs/operations.md has the table.
    """
    from server.running import run_server
    from server.settings import load_settings

    flags = {name: value for name, value in locals().items() if name not in ("run_server", "load_settings")}
    flags["engine_args"] = tuple(engine_args) if engine_args else None
    raise typer.Exit(run_server(load_settings(**flags)))


def doctor(
    home: Annotated[Path | None, typer.Option(help="State folder (HOTSHOE_HOME).")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what can be put right.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the state folder: every version's files against their digest, every alias against its version.

    Works while no server runs on it. Leaves with 3 when it finds damage.
    """
    from adapters.doctor import run_doctor
    from server.cli.output import EXIT_NO, print_json
    from server.lifecycle import state_lock
    from server.settings import load_settings

    settings: Settings = load_settings(home=home)
    with state_lock(settings.home) if settings.home.is_dir() else nullcontext():
        report = run_doctor(settings.home, repair)
    if as_json:
        print_json(report.as_dict())
    else:
        for line in report.lines():
            typer.echo(line)
    if not report.is_sound:
        raise typer.Exit(EXIT_NO)
