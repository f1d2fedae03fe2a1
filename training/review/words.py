"""The one vocabulary that every dialect is translated into, and a setting's value with the place that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from training.review.values import present

if TYPE_CHECKING:
    from training.config import TrainingConfig

# Neutral name -> what it is. Values are plain: a number, text, true or false, or a tuple of names.
WORDS: Mapping[str, str] = {
    "base": "the base model's id or folder",
    "method": "lora, full, or another way's own name",
    "bits": "4 or 8 where the base is quantised while it is loaded",
    "quant_type": "nf4, fp4 or another method's name",
    "double_quant": "the scales are quantised, too",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "names of the adapted modules, or `all` for every linear one",
    "modules_to_save": "modules that are trained and saved whole",
    "use_dora": "DoRA",
    "use_rslora": "scaled by alpha / sqrt(rank)",
    "bias": "none, all or lora_only",
    "init": "how the adapter starts; PiSSA and its like change the base",
    "init_converts": "the changed base is undone when the adapter is saved",
    "learning_rate": "the peak",
    "scheduler": "how the rate falls",
    "warmup_ratio": "share of the steps with a rising rate",
    "warmup_steps": "steps with a rising rate",
    "weight_decay": "AdamW's",
    "max_gradient_norm": "gradients are scaled down to it",
    "optimizer": "its name",
    "epochs": "passes over the data",
    "max_steps": "optimizer steps in all, whatever the epochs",
    "batch": "rows a device a pass",
    "accumulation": "passes a step",
    "max_length": "longest row in tokens",
    "over_long": "what becomes of longer rows: error, cut or drop",
    "packing": "several rows in one sequence",
    "packing_isolates": "attention keeps packed rows apart",
    "packing_wraps": "packing cuts rows in the middle",
    "pads_to_length": "every batch is padded to max_length",
    "attention": "the attention implementation",
    "trains_prompt": "the loss is over the prompt, too",
    "trains_end": "the token that ends a turn is learned",
    "checks_data": "the data is checked before the run",
    "template": "the chat template's name, or `base` for the base's own",
    "thinking": "rows without reasoning are rendered for thinking",
    "bf16": "computes in bfloat16",
    "fp16": "computes in float16",
    "pure_bf16": "trained weights and optimizer are bfloat16, too",
    "gradient_checkpointing": "activations are computed again",
    "validation": "a validation file, or the share held out; 0 for none",
    "evaluates": "there are validations during the run",
    "keeps_best": "the best checkpoint is kept, or the run stops early",
    "best_by": "the figure that chooses the best checkpoint",
    "seed": "the seed",
    "saves": "checkpoints during the run",
    "save_steps": "steps between checkpoints",
    "neftune": "NEFTune's noise",
    "pad_token": "the padding token",
    "eos_token": "the token that ends a turn",
    "feature": "another of PEFT's ways that no engine here serves",
    "added_tokens": "tokens that are added to the vocabulary, or that it is resized",
    "trust_remote_code": "code from the base's repository is run",
    "unsloth": "Unsloth's kernels",
    "stage": "sft, or another kind of training",
    "reports": "where curves go",
    "on_cpu": "the run is on a CPU",
    "row_limit": "only so many rows are used",
    "devices": "sharded over several devices by this",
}


@dataclass(frozen=True)
class Given:
    """One value and where it stands: the user's own key, with its section, and its line, 0 for a default."""

    value: Any
    key: str
    line: int = 0

    @property
    def is_default(self) -> bool:
        return self.line == 0


def is_set(raw: Mapping[str, Given], key: str) -> bool:
    """Whether the file has the key with anything but a word for nothing."""
    return key in raw and present(raw[key].value)


@dataclass(frozen=True)
class Unknown:
    """A key that the dialect does not have, and the nearest that it has."""

    key: str
    line: int
    nearest: str | None
    value: Any = None


@dataclass
class Reading:
    """A config in the neutral vocabulary. `aside` are known keys without a rule, `unread` values of the wrong kind."""

    dialect: str
    title: str
    values: dict[str, Given] = field(default_factory=dict)
    unknown: list[Unknown] = field(default_factory=list)
    renamed: list[Unknown] = field(default_factory=list)  # `nearest` is today's name
    unread: list[tuple[Given, str]] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    config: TrainingConfig | None = None  # ours, as `hotshoe train` takes it
    refused: str | None = None  # why it does not

    def value(self, name: str, default: Any = None) -> Any:
        """A setting's value, or `default` where nothing says it."""
        given = self.values.get(name)
        return default if given is None or given.value is None else given.value

    def take_bits(self) -> None:
        """Two switches, `four` and `eight`, say what `bits` says here."""
        for bits, name in ((4, "four"), (8, "eight")):
            switch = self.values.pop(name, None)
            if switch is not None and switch.value:
                self.put("bits", bits, switch)

    def put(self, name: str, value: Any, of: Given) -> None:
        """Set what follows from another setting, which stays its place."""
        self.values[name] = Given(value, of.key, of.line)
