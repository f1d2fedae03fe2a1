"""One measured process of `bench.training`: `python -m bench.training_side JSON`, the line with its folder and steps.

Prints one JSON line: tokens, seconds and loss of each step, the validation loss after the last, and peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.callbacks import Meter
from training.config import Settings, TrainingConfig, choose
from training.data.template import IGNORED, Rendered
from training.material import Material, facts, gather
from training.model import keep_canonical_nf4
from training.quiet import quieten

SEED, RATE = 17, 1e-3


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Of each step the seconds from its forward pass to the optimizer's update, the rows' tokens, and the loss."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter  # which ours counts in; TRL's trainer counts in its state
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.begun = 0.0
        self.counted = 0
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = self.now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.begun)
        counted = self.meter.tokens or state.num_input_tokens_seen
        self.tokens.append(counted - self.counted)
        self.counted = counted

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    quieten()
    print(json.dumps(measured(json.loads(sys.argv[1]))))


def measured(given: dict[str, Any]) -> dict[str, Any]:
    """Train so many steps and tell what they took; `given` is a line with its folder, batch, steps and threads."""
    folder = Path(given["folder"])
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    config = TrainingConfig(
        data=folder / "rows.jsonl",
        name="bench",
        validation=folder / "held.jsonl",
        base=given.get("base"),  # the embedded one, unless a test gives a smaller
        method=given["method"],
        epochs=1000.0,
        batch_size=given["batch"],
        learning_rate=RATE,
        scheduler="constant_with_warmup",
        warmup_ratio=0.0,
        rank=16,
        dtype=given["dtype"],
        gradient_checkpointing=given["checkpoints"],
        checkpoint_steps=1000,
        seed=SEED,
        out=folder / "out",
    )
    material = gather(config)
    settings = replace(choose(config, facts(material)), steps=given["steps"])
    meter = Meter()
    clock = Clock(meter)
    config = first_weights(config, settings, material, folder)
    if given["trainer"] == "hotshoe":
        trainer = ours(config, settings, material, folder, clock)
    else:
        trainer = trls(config, settings, material, folder, clock, given["groups"])
    trainer.train()
    peak = peak_bytes()
    validation = material.validation
    sequences = material.training.sequences
    return {
        "threads": torch.get_num_threads(),
        "step_tokens": clock.tokens,
        "step_seconds": clock.seconds,
        "losses": clock.losses,
        "row_tokens": sum(len(row.input_ids) for row in sequences) / len(sequences),
        "learned_tokens": sum(row.supervised_tokens for row in sequences) / len(sequences),
        "peak_bytes": peak,
        "validation_loss": validation_loss(trainer, validation.sequences) if validation else None,
    }


def validation_loss(trainer: Any, sequences: Sequence[Rendered], batch: int = 16) -> float:
    """The mean loss over the learned tokens, computed in one plain way for every trainer: padded, all logits."""
    model = trainer.model.eval()
    keep_canonical_nf4(model)  # TRL's, too: a repacked base would be another one than was trained on
    total, tokens = 0.0, 0
    for start in range(0, len(sequences), batch):
        part = sequences[start : start + batch]
        longest = max(len(row.input_ids) for row in part)
        ids = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in part])
        labels = torch.tensor([[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in part])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in part])
        with torch.no_grad(), trainer.autocast_smart_context_manager():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        wanted = labels[:, 1:].flatten()
        total += float(
            functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum")
        )
        tokens += int((wanted != IGNORED).sum())
    return total / tokens


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

    alone = replace(material, validation=None)  # which is measured after the run, not in it
    return build_trainer(config, replace(settings, evaluation_steps=None), alone, folder, clock.meter, [clock])


def trls(
    config: TrainingConfig, settings: Settings, material: Material, folder: Path, clock: Clock, groups: bool
) -> Any:
    """SFTTrainer on the same token ids and labels. It makes a quantised base's adapter bfloat16, which is undone."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from training.model import nf4_config

    base = AutoModelForCausalLM.from_pretrained(
        material.base.folder,
        dtype=getattr(torch, settings.dtype),
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
        bf16=settings.dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        train_sampling_strategy="group_by_length" if groups else "random",
        include_num_input_tokens_seen="non_padding",
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
