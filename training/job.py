"""One fine-tuning job's training, in a process of its own: `python -m training.job SPEC.json`.

The spec has a TrainingConfig's settings. Where a run into the same folder was cut off, it is gone on with. What
happens is told as lines of JSON on stdout, each with its `kind`; the last is `result`, `interrupted` or `error`.
SIGTERM ends it after a step that is saved; when stdin closes, whoever started it is gone, and it ends at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.child import end_with_stdin
from adapters.errors import HotshoeError, TrainingInterrupted
from training.checkpoints import last_complete
from training.config import TrainingConfig
from training.staging import Staging, staging_folder

if TYPE_CHECKING:
    from training.trainer import Run

EXIT_ERROR, EXIT_INTERRUPTED = 3, 4
PATHS = ("data", "validation", "out", "initial_adapter")
TUPLES = ("columns", "target_modules", "report_to", "rules")


def config_of(spec: Mapping[str, Any]) -> TrainingConfig:
    """The settings in a spec; raises ConfigInvalid for a value, TypeError for a name that is none."""
    known = {item.name for item in fields(TrainingConfig)}
    if unknown := sorted(set(spec) - known):
        raise TypeError(f"a training config has no {', '.join(unknown)}")
    values = {key: Path(value) if key in PATHS else value for key, value in spec.items() if value is not None}
    return TrainingConfig(**{key: tuple(value) if key in TUPLES else value for key, value in values.items()})


def main(spec_path: str) -> int:
    """0 with a result, 3 with an error, 4 where a signal ended it."""
    from training.quiet import quieten
    from training.trainer import train

    end_with_stdin(signal.SIGKILL)
    quieten()
    spec = json.loads(Path(spec_path).read_text("utf-8"))
    os.nice(spec.pop("nice", 0))
    try:
        config = config_of(spec)
        went_before = last_complete(Staging(staging_folder(config.output.absolute())).checkpoints) is not None
        tell(kind="resumed" if went_before else "begun")
        train(config, _said, resume=went_before, watch=_watchers)
    except TrainingInterrupted as error:
        tell(kind="interrupted", message=error.message)
        return EXIT_INTERRUPTED
    except HotshoeError as error:
        tell(kind="error", error={**error.as_dict(), "code": error.code})
        return EXIT_ERROR
    tell(kind="result")
    return 0


def tell(**message: Any) -> None:
    """One line of JSON to whoever started the job."""
    sys.stdout.write(json.dumps(message, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _said(lines: str) -> None:
    for line in lines.splitlines():
        tell(kind="said", message=line)


def _watchers(run: Run) -> list[Any]:
    from training.told import Told

    tell(kind="settings", settings=run.settings.as_dict(), gate=run.gate.summary() if run.gate is not None else None)
    return [Told(tell)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
