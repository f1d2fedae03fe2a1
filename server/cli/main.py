"""The `hotshoe` command: one typer app; its verbs are in the modules beside this, each importing what it needs."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import typer

from adapters.errors import HotshoeError
from server.cli.output import fail

# Each module adds its verbs, named beside it, with a function `add_to(app)`.
VERB_MODULES = {
    "server.cli.bases": ("base", "inspect"),
    "server.cli.data": ("data",),
    "server.cli.train": ("train",),
    "server.cli.card": ("card",),
    "server.cli.plan": ("plan",),
    "server.cli.size": ("size",),
    "server.cli.baseline": ("baseline",),
    "server.cli.review": ("review",),
    "server.cli.evaluate": ("eval",),
    "server.cli.serve": ("serve", "doctor"),
    "server.cli.state": ("backup", "restore", "prune"),
    "server.cli.push": ("push",),
    "server.cli.remote": ("ls", "show", "promote", "rollback", "retire"),
    "server.cli.gate": ("gate",),
    "server.cli.chat": ("chat",),
    "server.cli.jobs": ("jobs",),
    "server.cli.tenants": ("keys", "tenants"),
    "server.cli.export": ("export",),
    "server.cli.exports": ("exports",),
}


class Listing:
    """Takes verbs as help lists them, by name and docstring: reading all their options takes longer than all else."""

    def __init__(self, app: typer.Typer) -> None:
        self.app = app

    def command(self, name: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def take(verb: Callable[..., None]) -> Callable[..., None]:
            self.app.command(name, help=inspect.getdoc(verb))(_nothing)
            return verb

        return take

    def add_typer(self, group: typer.Typer, name: str) -> None:
        self.app.add_typer(typer.Typer(help=group.info.help), name=name)


def build_app(verb: str | None = None) -> typer.Typer:
    """The command with all its verbs, or with those of this one's module alone where there is a verb of that name."""
    app = _empty_app()
    chosen = [module for module, verbs in VERB_MODULES.items() if verb in verbs]
    for module in chosen or VERB_MODULES:
        importlib.import_module(module).add_to(app)
    return app


def list_verbs() -> typer.Typer:
    """The command for its own help: it looks as `build_app` does and can do nothing."""
    app = _empty_app()
    for module in VERB_MODULES:
        importlib.import_module(module).add_to(Listing(app))
    return app


def _empty_app() -> typer.Typer:
    app = typer.Typer(
        name="hotshoe", no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
    )
    app.callback()(_nothing)  # without one a single verb would take the place of the whole command
    return app


def _nothing() -> None:
    pass


def run() -> None:
    """The console script. Errors of ours end in one sentence and an exit code, never in a traceback."""
    try:
        words = sys.argv[1:]
        (list_verbs() if words in ([], ["--help"]) else build_app(words[0]))()
    except HotshoeError as error:
        try:
            fail(error, as_json="--json" in sys.argv)
        except typer.Exit as leaving:
            sys.exit(leaving.exit_code)
