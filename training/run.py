"""transformers' Trainer put together for one run: its arguments, the model, the callbacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from training.callbacks import Meter
from training.config import Settings, TrainingConfig
from training.model import load_model
from training.packed import collate
from training.supervised import Sequences, SupervisedTrainer

if TYPE_CHECKING:
    from training.material import Material

FEWEST_STEPS_TO_WARM_UP = 20
BEST_METRICS = {"loss": "eval_loss", "score": "eval_choice"}
KEPT_CHECKPOINTS = {"qlora": 2, "lora": 2, "full": 1}  # beside the best; one of every weight is large


class Saves(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Saves a checkpoint every so many steps, beside those of validations, and after the last."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            control.should_save = True
        return control


class FinalValidation(TrainerCallback):  # type: ignore[misc]
    """Validates after the last step, too, wherever the interval falls."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        return control


def build_trainer(
    config: TrainingConfig,
    settings: Settings,
    material: Material,
    checkpoints: Path,
    meter: Meter,
    callbacks: list[TrainerCallback],
    score: Callable[[Any], float] | None = None,
) -> SupervisedTrainer:
    """A trainer ready to run, with the model loaded. Its checkpoints go to `checkpoints`; `score` chooses the best."""
    device = _device()
    arguments = training_arguments(settings, checkpoints, device)
    set_seed(settings.seed)
    model = load_model(material.base, settings, device, config.initial_adapter)
    validation = material.validation
    callbacks = [*callbacks, Saves(settings.checkpoint_steps)]
    if validation is not None:
        callbacks.append(FinalValidation())
        if settings.patience:
            callbacks.append(EarlyStoppingCallback(settings.patience))
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=Sequences(material.training.sequences),
        eval_dataset=Sequences(validation.sequences) if validation is not None else None,
        data_collator=partial(collate, shares_prefix=not settings.dropout),
        callbacks=callbacks,
        meter=meter,
        score=score,
        kept_checkpoints=KEPT_CHECKPOINTS[settings.method],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(settings: Settings, checkpoints: Path, device: str) -> TrainingArguments:
    """The settings in transformers' words."""
    validates = settings.evaluation_steps is not None
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.pass_size,
        per_device_eval_batch_size=settings.evaluation_pass_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=_warmup_steps(settings),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        optim=settings.optimizer,
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        eval_strategy="steps" if validates else "no",
        eval_steps=settings.evaluation_steps,
        save_strategy="steps" if validates else "no",
        save_steps=settings.evaluation_steps or 1,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=validates,
        metric_for_best_model=BEST_METRICS[settings.best_by] if validates else None,
        greater_is_better=settings.best_by == "score" if validates else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        dataloader_pin_memory=device == "cuda",
        use_cpu=device == "cpu",
        seed=settings.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU: DataParallel would split a packed batch
    return arguments


def _warmup_steps(settings: Settings) -> int:
    """None below 20 steps: the first of few steps must not be one at rate 0."""
    return int(settings.warmup_ratio * settings.steps) if settings.steps >= FEWEST_STEPS_TO_WARM_UP else 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
