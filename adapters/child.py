"""One piece of work in a process of its own: it may need transformers, or a model in memory that has to go again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from adapters.errors import HotshoeError

SECRETS = (  # variables that no process of ours inherits; one that needs one of them is given it
    *("HOTSHOE_API_KEY", "HOTSHOE_KEY_PEPPER", "HOTSHOE_WANDB_API_KEY", "WANDB_API_KEY"),
    *("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"),
)


def child_environment() -> dict[str, str]:
    """Variables for a process that computes: this one's without secrets, offline."""
    inherited = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return {**inherited, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run_child(module: str, spec: Mapping[str, Any], failed: Callable[[str], HotshoeError]) -> dict[str, Any]:
    """`python -m module` with the spec on its stdin, offline; the JSON object in the last line of its stdout.

    Raises what `failed` makes of the last line of its stderr where it ends with an error.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, "/dev/stdin"],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        env=child_environment(),
        check=False,
    )
    if done.returncode != 0:
        raise failed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def end_with_stdin(number: signal.Signals = signal.SIGTERM) -> None:
    """From now on this process and its group get the signal once stdin closes: whoever started it is gone."""

    def watch() -> None:
        while os.read(0, 4096):  # not through sys.stdin, whose lock would be held while the interpreter shuts down
            pass
        os.killpg(os.getpgrp(), number)

    threading.Thread(target=watch, daemon=True).start()
