"""How every command prints and fails: text for people, one JSON document with `--json`, exit codes for scripts.

Exit codes: 0 done; 1 the command failed (the message says why); 2 wrong usage; 3 the answer is "no" (refused upload,
gate not passed, parity failed, damage found); 4 the server or engine is not reachable or not ready; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

import typer

from adapters.errors import (
    AdapterRefused,
    DataInvalid,
    EngineUnavailable,
    HotshoeError,
    ParityFailed,
    StorageDamaged,
    TrainingInterrupted,
)

EXIT_FAILED, EXIT_NO, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 3, 4, 130
NO_OF_THE_SERVER = ("gate_not_passed",)  # codes of its answers that are a "no" and no failure
PROBLEMS_SHOWN = 50  # of one error, as text


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def fail(error: HotshoeError, as_json: bool) -> NoReturn:
    """Print the error with all of its problems and leave with its exit code."""
    if as_json:
        print_json({"error": error.as_dict()})
    else:
        typer.secho(f"{error.wire_code}: {error.message}", err=True, fg="red")
        for problem in error.problems[:PROBLEMS_SHOWN]:
            advice = f"  -> {problem.advice}" if problem.advice else ""
            typer.echo(f"  {problem.path}: {problem.message}{advice}", err=True)
        if len(error.problems) > PROBLEMS_SHOWN:
            more = len(error.problems) - PROBLEMS_SHOWN
            typer.echo(f"  … and {more:,} more; --json lists them", err=True)
    raise typer.Exit(exit_code_of(error))


def exit_code_of(error: HotshoeError) -> int:
    if isinstance(error, AdapterRefused | DataInvalid | ParityFailed | StorageDamaged):
        return EXIT_NO
    if error.wire_code in NO_OF_THE_SERVER:
        return EXIT_NO
    if isinstance(error, TrainingInterrupted):
        return EXIT_INTERRUPTED
    return EXIT_UNREACHABLE if isinstance(error, EngineUnavailable) else EXIT_FAILED
