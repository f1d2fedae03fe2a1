"""One fine-tuning job's training, in a process of its own: `python -m training.jobs SPEC.json`.

The spec is an `Order`. Where a run into the same folder was cut off, it is gone on with. What happens is told as lines
of JSON on stdout, each with its `kind`; the last is `result` or `error`. SIGTERM ends it after a step that is saved;
when stdin closes, whoever started it is gone, and it ends at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adapters.child import end_with_stdin
from adapters.durable import replace_file
from adapters.errors import DataBlocked, HotshoeError, Problem, TrainingInterrupted
from training.checkpoints import last_complete
from training.config import TrainingConfig
from training.offline import leave_networks
from training.staging import Staging, staging_folder

if TYPE_CHECKING:
    from training.trainer import Run

EXIT_ERROR, EXIT_INTERRUPTED = 3, 4
PATHS = ("data", "validation", "out", "initial_adapter")
FILES = {"data": "training_file", "validation": "validation_file", "report_to": "integrations"}
PARAMETERS = {  # what the command line has as flags
    "--learning-rate": "learning_rate_multiplier",
    "set with --rules CODE=warn": "set with hotshoe.rules, as CODE=warn",
    "--over-long": "hotshoe.over_long",
    "--max-length": "hotshoe.max_length",
}
MOST_PROBLEMS = 100
TUPLES = ("columns", "target_modules", "report_to", "rules")
NO_MEMORY = "out_of_memory"  # the code of a run whose process was refused memory
NO_MEMORY_MARKS = ("DefaultCPUAllocator: can't allocate", "CUDA out of memory", "std::bad_alloc")
GATE_FILE, BASELINE_FILE, KEPT_FOLDER = "data-check.json", "baseline.json", "checkpoints"  # in the job's folder


@dataclass(frozen=True)
class Order:
    """What one job's process is told. `config` has a TrainingConfig's settings, `folder` is the job's own."""

    config: Mapping[str, Any]
    folder: str
    nice: int = 0
    memory_bytes: int | None = None  # that its processes may hold
    gpu_memory_bytes: int | None = None  # on a GPU, which serving needs, too
    baseline: str | None = None  # quick or full, before training
    has_network: bool = False  # it reports to somebody
    needs_score: bool = False  # the answers to validation rows are to be scored

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text("utf-8")))

    def text(self) -> str:
        return json.dumps(asdict(self))


def config_of(settings: Mapping[str, Any]) -> TrainingConfig:
    """The config with these settings; raises ConfigInvalid for a value, TypeError for a name that is none."""
    known = {item.name for item in fields(TrainingConfig)}
    if unknown := sorted(set(settings) - known):
        raise TypeError(f"a training config has no {', '.join(unknown)}")
    kinds: dict[str, Any] = {**dict.fromkeys(PATHS, Path), **dict.fromkeys(TUPLES, tuple)}
    values = {key: kinds[key](value) if key in kinds else value for key, value in settings.items() if value is not None}
    return TrainingConfig(**values)


def check_rules(config: TrainingConfig) -> None:
    """Raises ConfigInvalid for a level of the data check's rules that is none."""
    from training.gate.findings import PAGE, RULES
    from training.levels import levels_of

    levels_of(config.rules, RULES, PAGE)


def main(spec_path: str) -> int:
    """0 with a result, 3 with an error, 4 where a signal ended it."""
    from training.quiet import quieten
    from training.trainer import train

    order = Order.read(Path(spec_path))
    if not order.has_network and not leave_networks():  # before there are threads
        sys.stderr.write("the kernel does not let this process leave the machine's networks\n")
    end_with_stdin(signal.SIGKILL)
    quieten()
    os.nice(order.nice)
    _be_ended_first()
    try:
        _bound_gpu(order.gpu_memory_bytes)
        config = config_of(order.config)
        went_before = last_complete(Staging(staging_folder(config.output.absolute())).checkpoints) is not None
        tell(kind="resumed" if went_before else "begun")
        train(config, _said, resume=went_before, watch=lambda run: _watchers(run, order))
    except TrainingInterrupted:
        return EXIT_INTERRUPTED
    except HotshoeError as error:
        _keep_report(error, Path(order.folder))
        _tell_error(error.code, error.message, error.param, error.problems)
        return EXIT_ERROR
    except Exception as error:  # noqa: BLE001 - what is told of it is its name; the rest goes to stderr
        traceback.print_exc()
        if is_out_of_memory(error):
            _tell_error(NO_MEMORY, "There was not enough memory for the run.")
        else:
            _tell_error("internal_error", f"The run failed: {type(error).__name__}. The server's log says more.")
        return EXIT_ERROR
    tell(kind="result")
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation was refused, on the CPU or a GPU."""
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in NO_MEMORY_MARKS)


def _be_ended_first() -> None:
    """Where memory runs out, the kernel ends this process and not the server that started it (man 5 proc)."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", "ascii")


def _bound_gpu(limit_bytes: int | None) -> None:
    """Allocations beyond it fail in this process instead of in the engine."""
    if limit_bytes is None:
        return
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))


def tell(**message: Any) -> None:
    """One line of JSON to whoever started the job."""
    sys.stdout.write(json.dumps(message, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _tell_error(code: str, message: str, param: str | None = None, problems: Sequence[Problem] = ()) -> None:
    """What is wrong, in OpenAI's form: what is wrong with the data is wrong with its file, and flags are parameters."""
    shown = [problem.as_dict() for problem in problems[:MOST_PROBLEMS]]
    for flag, parameter in PARAMETERS.items():
        message = message.replace(flag, parameter)
    tell(kind="error", code=code, message=message, param=FILES.get(param or "", param), problems=shown)


def _said(lines: str) -> None:
    for line in lines.splitlines():
        tell(kind="said", message=line)


def _watchers(run: Run, order: Order) -> list[Any]:
    """What is asked of a run before it starts, and who watches it."""
    from training.job_gates import check_memory, check_place, check_scorable, measured_baseline
    from training.material import facts
    from training.told import Told

    folder = Path(order.folder)
    tell(kind="validated", gate=run.gate.summary() if run.gate is not None else None)
    tell(kind="planned", settings=run.settings.as_dict(), plan=run.plan)
    limit = check_place(order, facts(run.material).device)
    check_memory(run, limit)
    if order.needs_score:
        check_scorable(run)
        run.answers_all = True
    if order.baseline is not None:
        run.baseline_report = measured_baseline(run, folder / BASELINE_FILE, order.baseline, limit, tell)
    tell(kind="started")
    return [Told(tell, folder / KEPT_FOLDER)]


def _keep_report(error: HotshoeError, folder: Path) -> None:
    """The data check's whole report, where it is why nothing is trained."""
    if isinstance(error, DataBlocked):
        replace_file(folder / GATE_FILE, json.dumps(error.report, ensure_ascii=False, indent=2).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
