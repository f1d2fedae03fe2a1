"""One measured process of `bench.training`: `python -m bench.training_side SIDE METHOD DATA FOLDER STEPS`.

Prints one JSON line: the seconds of each step after the first, each step's loss, tokens of the rows, peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.callbacks import Meter
from training.config import Settings, TrainingConfig, choose
from training.material import Material, facts, gather
from training.quiet import quieten

SEED, RATE, BATCH = 17, 1e-3, 8


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """How long each step took, from its forward pass to the optimizer's update, and its loss."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    side, method, data, folder, steps = sys.argv[1:]
    quieten()
    config = TrainingConfig(
        data=Path(data),
        name="bench",
        method="qlora" if method == "qlora" else "lora",
        epochs=float(steps),
        batch_size=BATCH,
        learning_rate=RATE,
        scheduler="constant_with_warmup",
        warmup_ratio=0.0,
        rank=16,
        dtype="float32",
        gradient_checkpointing=False,
        validation_share=0.0,
        checkpoint_steps=1000,
        seed=SEED,
        out=Path(folder) / "out",
    )
    material = gather(config)
    settings = choose(config, facts(material))
    clock = Clock()
    build = ours if side == "hotshoe" else trls
    trainer = build(first_weights(config, settings, material, Path(folder)), settings, material, Path(folder), clock)
    trainer.train()
    print(
        json.dumps(
            {
                "step_seconds": clock.seconds[1:],
                "losses": clock.losses,
                "tokens": material.training.tokens,
                "peak_bytes": peak_bytes(),
            }
        )
    )


def first_weights(config: TrainingConfig, settings: Settings, material: Material, folder: Path) -> TrainingConfig:
    """The config with an adapter to go on from: seeded A, and B not zero, made without loading the base's weights."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.model import lora_config

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(material.base.folder))
    model = get_peft_model(empty, lora_config(settings))
    generator = torch.Generator().manual_seed(SEED)
    for name, value in list(model.named_parameters()):
        if "lora_" in name:
            made = torch.randn(value.shape, generator=generator) * 0.01
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = torch.nn.Parameter(made)
    model.save_pretrained(str(folder / "first"), save_embedding_layers=False)
    return replace(config, initial_adapter=folder / "first")


def ours(config: TrainingConfig, settings: Settings, material: Material, folder: Path, clock: Clock) -> Any:
    from training.run import build_trainer

    return build_trainer(config, settings, material, folder, Meter(), [clock])


def trls(config: TrainingConfig, settings: Settings, material: Material, folder: Path, clock: Clock) -> Any:
    """SFTTrainer on the same token ids and labels. It makes a quantised base's adapter bfloat16, which is undone."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from training.model import nf4_config

    base = AutoModelForCausalLM.from_pretrained(
        material.base.folder,
        dtype=torch.float32,
        device_map={"": "cpu"} if settings.method == "qlora" else None,
        quantization_config=nf4_config(settings) if settings.method == "qlora" else None,
    )
    model = PeftModel.from_pretrained(base, str(config.initial_adapter), is_trainable=True)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        optim=settings.optimizer,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=SEED,
    )
    sequences = material.training.sequences
    dataset = Dataset.from_list([{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in sequences])
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=material.template.tokenizer,
        callbacks=[clock],
    )
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    return trainer


def peak_bytes() -> int:
    """The largest resident set of this process since its start."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
