"""transformers' Trainer on packed batches: its loop, our batches and loss."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState

from training.callbacks import Meter
from training.checkpoints import STATE_FILE, is_complete, prune, seal
from training.data.template import Rendered
from training.loss import supervised_loss_sum, supervised_losses
from training.verdict.rows import RowFiles, per_row

TIE_NATS, LARGEST_LOSS = 1e-5, 100.0  # what a nat counts beside a score, and at most so many


class Sequences(torch.utils.data.Dataset[Rendered]):
    """Rendered rows as a torch dataset."""

    def __init__(self, rows: list[Rendered]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Rendered:
        return self.rows[index]


class SupervisedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Trainer whose loss is the mean over the supervised tokens of the whole optimizer step, and whose validation loss
    is the mean over all supervised tokens, not a mean of batch means."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        meter: Meter,
        kept_checkpoints: int = 2,
        score: Callable[[Any], float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.meter = meter
        self.score = score
        self.kept_checkpoints = kept_checkpoints
        self.rows = RowFiles(Path(self.args.output_dir))
        self._validation: list[float] = []  # the loss of each learned token

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The batch's summed cross entropy over the supervised tokens of the whole step."""
        items = inputs["shift_labels"].numel() if num_items_in_batch is None else num_items_in_batch
        self.meter.tokens += inputs["row_tokens"]
        self.meter.computed_tokens += inputs["input_ids"].numel()
        total = supervised_loss_sum(self.accelerator.unwrap_model(model), inputs)
        loss: torch.Tensor = total / items
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        started = time.monotonic()
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.meter.seconds += time.monotonic() - started
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The mean loss of one validation batch, which holds no logits longer than a block of them."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses, _ = supervised_losses(self.accelerator.unwrap_model(model), inputs)
        self._validation += losses.tolist()
        return losses.mean(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Beside the loss, each row's is kept in a file of this step; of equal scores the lower loss is the better."""
        self._validation = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = sum(self._validation) / max(1, len(self._validation))
        if self.score is not None:
            score = self.score(self.accelerator.unwrap_model(self.model))
            output.metrics[f"{prefix}_score"] = score
            output.metrics[f"{prefix}_choice"] = score - TIE_NATS * min(output.metrics[f"{prefix}_loss"], LARGEST_LOSS)
        self.rows.write(self.state.global_step, per_row(self._validation, self.eval_dataset.rows))
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint counts once it is sealed; only then do older ones go."""
        folder = self._checkpoint_folder(self.state.global_step)
        if is_complete(folder):
            return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
            seal(folder, self.meter.as_dict())
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)  # a full disk gets its room back
            raise
        prune(folder.parent, self.kept_checkpoints)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """On a resume the best checkpoint is the one in today's folder, wherever that was when it was written."""
        position: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self._checkpoint_folder(self.state.best_global_step))
        return position

    def restore(self, folder: Path) -> None:
        """Take over the state and the weights (the best ones, where there are) of a run that has no step left."""
        self.state = TrainerState.load_from_json(str(folder / STATE_FILE))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        best = self.state.best_global_step
        self._load_from_checkpoint(str(self._checkpoint_folder(best) if best else folder))

    def _checkpoint_folder(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"
