"""One fine-tuning job's training, in a process of its own: `python -m training.jobs SPEC.json`.

The spec has a TrainingConfig's settings. Where a run into the same folder was cut off, it is gone on with. What
happens is told as lines of JSON on stdout, each with its `kind`; the last is `result` or `error`.
SIGTERM ends it after a step that is saved; when stdin closes, whoever started it is gone, and it ends at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.child import end_with_stdin
from adapters.errors import HotshoeError, Problem, TrainingInterrupted
from training.checkpoints import last_complete
from training.config import TrainingConfig
from training.staging import Staging, staging_folder

if TYPE_CHECKING:
    from training.trainer import Run

EXIT_ERROR, EXIT_INTERRUPTED = 3, 4
PATHS = ("data", "validation", "out", "initial_adapter")
FILES = {"data": "training_file", "validation": "validation_file"}
MOST_PROBLEMS = 100
TUPLES = ("columns", "target_modules", "report_to", "rules")


def config_of(spec: Mapping[str, Any]) -> TrainingConfig:
    """The settings in a spec; raises ConfigInvalid for a value, TypeError for a name that is none."""
    known = {item.name for item in fields(TrainingConfig)}
    if unknown := sorted(set(spec) - known):
        raise TypeError(f"a training config has no {', '.join(unknown)}")
    kinds: dict[str, Any] = {**dict.fromkeys(PATHS, Path), **dict.fromkeys(TUPLES, tuple)}
    values = {key: kinds[key](value) if key in kinds else value for key, value in spec.items() if value is not None}
    return TrainingConfig(**values)


def main(spec_path: str) -> int:
    """0 with a result, 3 with an error, 4 where a signal ended it."""
    from training.quiet import quieten
    from training.trainer import train

    end_with_stdin(signal.SIGKILL)
    quieten()
    spec = json.loads(Path(spec_path).read_text("utf-8"))
    os.nice(spec.pop("nice", 0))
    _be_ended_first()
    try:
        config = config_of(spec)
        went_before = last_complete(Staging(staging_folder(config.output.absolute())).checkpoints) is not None
        tell(kind="resumed" if went_before else "begun")
        train(config, _said, resume=went_before, watch=_watchers)
    except TrainingInterrupted:
        return EXIT_INTERRUPTED
    except HotshoeError as error:
        _tell_error(error.code, error.message, error.param, error.problems)
        return EXIT_ERROR
    except Exception as error:  # noqa: BLE001 - what is told of it is its name; the rest goes to stderr
        traceback.print_exc()
        _tell_error("internal_error", f"The run failed: {type(error).__name__}. The server's log says more.")
        return EXIT_ERROR
    tell(kind="result")
    return 0


def _be_ended_first() -> None:
    """Where memory runs out, the kernel ends this process and not the server that started it (man 5 proc)."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", "ascii")


def tell(**message: Any) -> None:
    """One line of JSON to whoever started the job."""
    sys.stdout.write(json.dumps(message, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _tell_error(code: str, message: str, param: str | None = None, problems: Sequence[Problem] = ()) -> None:
    """What is wrong, in OpenAI's form: what is wrong with the data is wrong with its file."""
    shown = [problem.as_dict() for problem in problems[:MOST_PROBLEMS]]
    tell(kind="error", code=code, message=message, param=FILES.get(param or "", param), problems=shown)


def _said(lines: str) -> None:
    for line in lines.splitlines():
        tell(kind="said", message=line)


def _watchers(run: Run) -> list[Any]:
    from training.told import Told

    tell(kind="settings", settings=run.settings.as_dict(), gate=run.gate.summary() if run.gate is not None else None)
    return [Told(tell)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
