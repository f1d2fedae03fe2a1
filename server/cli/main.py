"""The `hotshoe` command: one typer app; its verbs are in the modules beside this, each importing what it needs."""

from __future__ import annotations

import importlib
import sys

import typer

from adapters.errors import HotshoeError
from server.cli.output import fail

# Each module adds its verbs with a function `add_to(app)`.
VERB_MODULES = (
    "server.cli.bases",  # base prepare | show, inspect
    "server.cli.data",  # data show
    "server.cli.train",  # train
    "server.cli.card",  # card show | diff | check | readme | page
    "server.cli.plan",  # plan
    "server.cli.baseline",  # baseline
    "server.cli.review",  # review
    "server.cli.evaluate",  # eval
    "server.cli.serve",  # serve, doctor
    "server.cli.state",  # backup, restore, prune
    "server.cli.push",
    "server.cli.remote",  # ls, show, promote, rollback, retire
    "server.cli.gate",
    "server.cli.chat",  # chat
    "server.cli.tenants",  # keys, tenants
    "server.cli.export",  # export
)


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="hotshoe", no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
    )
    for name in VERB_MODULES:
        importlib.import_module(name).add_to(app)
    return app


def run() -> None:
    """The console script. Errors of ours end in one sentence and an exit code, never in a traceback."""
    try:
        build_app()()
    except HotshoeError as error:
        try:
            fail(error, as_json="--json" in sys.argv)
        except typer.Exit as leaving:
            sys.exit(leaving.exit_code)
