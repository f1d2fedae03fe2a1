"""Where a run's curves go: TensorBoard by default, Weights & Biases when it is installed and asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters.errors import ConfigInvalid
from training.config import Settings, TrainingConfig

WANDB_ID_FILE = "wandb.json"


def check_reporters(config: TrainingConfig) -> None:
    """Refuse what is asked for and not installed, before anything is loaded; raises ConfigInvalid."""
    if "wandb" in config.report_to and importlib.util.find_spec("wandb") is None:
        raise ConfigInvalid(
            "report_to names wandb, and Weights & Biases is not installed: run `pip install wandb`, or leave it out.",
            param="report_to",
        )


@contextmanager
def reporters(config: TrainingConfig, settings: Settings, result: Path, step: int) -> Iterator[list[Any]]:
    """Trainer's callbacks for `report_to`, closed when the block ends. A resumed run goes on at `step`."""
    made: list[Any] = []
    if "tensorboard" in config.report_to:
        made.append(_tensorboard(config.logs or result / "runs", step))
    if "wandb" not in config.report_to:
        yield made
        return
    with _wandb_run(config, settings, result.parent):
        from transformers.integrations import WandbCallback

        yield [*made, WandbCallback()]


def _tensorboard(folder: Path, step: int) -> Any:
    """What a cut-off run logged after its last checkpoint is taken back."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder), purge_step=step + 1 if step else None))


@contextmanager
def _wandb_run(config: TrainingConfig, settings: Settings, root: Path) -> Iterator[None]:
    """A run of Weights & Biases; `WANDB_MODE`, `WANDB_PROJECT`, `WANDB_NAME` and `WANDB_DIR` are respected."""
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "hotshoe"),
            name=os.environ.get("WANDB_NAME", config.name),
            id=_wandb_id(root / WANDB_ID_FILE),
            resume="allow",
            config=settings.as_dict(),
        )
    except (wandb.Error, OSError) as error:
        raise ConfigInvalid(
            f"Weights & Biases cannot begin a run: {str(error).rstrip('.')}. Log in with `wandb login`, "
            "set WANDB_MODE=offline, or leave wandb out of report_to.",
            param="report_to",
        ) from error
    try:
        yield
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _wandb_id(file: Path) -> str:
    """The same for a resumed run."""
    if not file.is_file():
        file.write_text(json.dumps({"id": secrets.token_hex(4)}), encoding="utf-8")
    return str(json.loads(file.read_bytes())["id"])
