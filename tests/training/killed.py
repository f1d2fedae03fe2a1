"""A training run in a process of its own that kills or stops itself at a chosen moment.

The processes are forked from a server that has imported the libraries once. `when` is `never`, `step:N` (SIGKILL after
the N-th optimizer step of this process), `save:N` (SIGKILL when the N-th checkpoint's files are written, but not its
manifest), `card` (SIGKILL when the result is saved, but its card is not), `asked` (SIGTERM at that moment), `SIGINT:N`
or `SIGTERM:N` (that signal after the N-th step) or `twice:N` (SIGINT twice).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PRELOADED = ["training.trainer", "training.run", "peft", "bitsandbytes", "torch.utils.tensorboard"]


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative for a signal, and what it said."""

    code: int
    said: str


def call(asked: dict[str, Any], when: str = "never", resume: bool = False) -> Ended:
    """Run one in a process of its own, to its end."""
    return in_a_process(_run, (asked, when, resume), Path(asked["out"]).with_suffix(".log"))


def in_a_process(work: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> Ended:
    """Call `work` in a forked process; our errors leave with the exit code that the command has for them."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_main, args=(work, arguments, log))
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
        process.join()
    said = log.read_text(encoding="utf-8")
    log.unlink()
    return Ended(int(process.exitcode or 0), said)


def _main(work: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
    import torch

    from adapters.errors import HotshoeError
    from server.cli.output import exit_code_of
    from training.quiet import quieten

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    quieten()
    torch.set_num_threads(1)
    code = 0
    try:
        work(*arguments)
    except HotshoeError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        code = exit_code_of(error)
    sys.stderr.flush()
    os._exit(code)


def run(asked: dict[str, Any], resume: bool = False) -> None:
    """Train as asked; paths may be text."""
    from training.config import TrainingConfig
    from training.trainer import train

    paths = {key: Path(asked[key]) for key in ("data", "validation", "out", "initial_adapter") if key in asked}
    train(TrainingConfig(**{**asked, **paths}), resume=resume)


def _run(asked: dict[str, Any], when: str, resume: bool) -> None:
    kind, _, number = when.partition(":")
    if kind == "save":
        _kill_at_open("complete.json.partial", int(number))
    elif kind in ("card", "asked"):
        _kill_at_open("card.json", 1, signal.SIGKILL if kind == "card" else signal.SIGTERM)
    elif kind == "step":
        _after_step(int(number), signal.SIGKILL)
    elif kind == "twice":
        _after_step(int(number), signal.SIGINT, signal.SIGINT)
    elif kind != "never":
        _after_step(int(number), signal.Signals[kind])
    run(asked, resume)


def _after_step(wanted: int, *signals: int) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = 0

    def count(*ignored: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == wanted:
            for number in signals:
                os.kill(os.getpid(), number)

    register_optimizer_step_post_hook(count)


def _kill_at_open(name: str, wanted: int, number: int = signal.SIGKILL) -> None:
    opened = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal opened
        if event == "open" and str(arguments[0]).endswith(name):
            opened += 1
            if opened == wanted:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)
