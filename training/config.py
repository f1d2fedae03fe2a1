"""Every setting of a training run once: its name, default and effect; and what is chosen where one is left open.

`TrainingConfig` is what a person asks for, `Settings` what the run uses: the same names with nothing left open, as it
stands in the card. `choose` goes from one to the other by rules that depend on nothing but the data's and model's size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from adapters.bases import PROJECTIONS
from adapters.errors import ConfigInvalid
from adapters.types import check_name

Method = Literal["qlora", "lora", "full"]
METHODS = ("qlora", "lora", "full")
OVER_LONG = ("error", "cut", "drop")
SUPERVISE = ("all", "last")
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULERS = ("linear", "cosine", "constant_with_warmup")
REPORTERS = ("tensorboard", "wandb", "none")
BEST_BY = ("loss", "score")
GOALS = ("classification", "generation", "role play", "agent routing", "rag")
MOST_CANARIES = 100
LORA_SETTINGS = ("rank", "alpha", "target_modules", "use_rslora", "dropout")  # without a meaning for `full`
WANTED_STEPS = 100  # below this many steps in all, a smaller batch teaches more
SMALL_MODEL_PARAMETERS = 300_000_000
CHECKPOINTS_A_RUN, MOST_STEPS_BETWEEN = 10, 500
SHARE_HELD_OUT, MOST_HELD_OUT, FEWEST_TO_HOLD_OUT_OF = 0.1, 256, 100  # rows of the data, for validation
SERVED_RANK = 64  # the largest that a server takes unless it is set otherwise


@dataclass(frozen=True)
class TrainingConfig:
    """One training run as it was asked for. None means: choose for this data and model size."""

    data: Path = field(metadata={"doc": "JSONL, JSON, CSV or Parquet to train on, or a folder of them."})
    name: str = field(metadata={"doc": "Name of the adapter."})
    out: Path | None = field(
        default=None, metadata={"doc": "Folder that the adapter is written to; default ./NAME. It must not exist."}
    )
    columns: tuple[str, ...] = field(
        default=(),
        metadata={"doc": "Your own column names, as prompt=Question,completion=Answer: KNOWN=YOURS for each."},
    )
    validation: Path | None = field(
        default=None,
        metadata={
            "doc": "Data for the validation loss, in any of these forms; without it a share of DATA is held out."
        },
    )
    validation_share: float | None = field(
        default=None,
        metadata={"doc": "Share of DATA held out where no validation file is given; default 0.1, 256 rows at most."},
    )
    base: str | None = field(
        default=None, metadata={"doc": "Base folder or Hub id as OWNER/NAME@REVISION; default the embedded base."}
    )
    method: Method | None = field(
        default=None,
        metadata={
            "doc": "qlora (base in NF4), lora (base in 16 or 32 bits) or full (every weight; the result is a base of "
            "its own); default lora where the base fits in memory so, else qlora."
        },
    )
    initial_adapter: Path | None = field(
        default=None, metadata={"doc": "Adapter folder to go on from; `--from` sets it, and `from` in a config file."}
    )
    parent: str | None = field(
        default=None,
        metadata={"doc": "NAME@N that the initial adapter is, for the card's lineage; `--from` sets it, too."},
    )
    epochs: float | None = field(
        default=None, metadata={"doc": "Passes over the data; default 3, or 2 above 10,000 rows."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"doc": "Peak learning rate; default 1e-3 below 0.3 billion parameters, else 2e-4; for full a tenth."},
    )
    learning_rate_multiplier: float = field(
        default=1.0, metadata={"doc": "Times the default rate, where learning_rate is left out."}
    )
    scheduler: str = field(
        default="cosine", metadata={"doc": "How the rate falls after warm-up: linear, cosine or constant_with_warmup."}
    )
    warmup_ratio: float = field(
        default=0.05, metadata={"doc": "Share of the steps during which the rate rises from 0."}
    )
    batch_size: int | None = field(
        default=None,
        metadata={"doc": "Rows per optimizer step; default 16, or 8 or 4 where 16 would give fewer than 100 steps."},
    )
    tokens_per_pass: int = field(
        default=8192,
        metadata={
            "doc": "Most tokens that go through the model at once; a larger batch is accumulated. Lower saves memory."
        },
    )
    pass_size: int | None = field(
        default=None, metadata={"doc": "Rows that go through the model at once; default as many as tokens_per_pass."}
    )
    rank: int | None = field(default=None, metadata={"doc": "Rank of the update; default 16, or 32 above 20,000 rows."})
    alpha: float | None = field(
        default=None, metadata={"doc": "lora_alpha, the update is scaled by alpha / rank; default twice the rank."}
    )
    target_modules: tuple[str, ...] = field(
        default=PROJECTIONS, metadata={"doc": "Projections that get an adapter; default all seven."}
    )
    use_rslora: bool = field(default=False, metadata={"doc": "Scale by alpha / sqrt(rank) instead."})
    dropout: float = field(default=0.0, metadata={"doc": "Dropout on the adapter's input."})
    weight_decay: float = field(default=0.0, metadata={"doc": "AdamW's weight decay."})
    max_gradient_norm: float = field(default=1.0, metadata={"doc": "Gradients are scaled down to this norm."})
    max_length: int | None = field(
        default=None, metadata={"doc": "Longest row in tokens; default the base's context, and at most that."}
    )
    over_long: str = field(
        default="error",
        metadata={"doc": "Rows above max_length: error, cut (their end) or drop; cut and dropped are named."},
    )
    supervise: str = field(
        default="all", metadata={"doc": "Which assistant turns are learned: all, or only the last of each row."}
    )
    thinking: bool | None = field(
        default=None,
        metadata={
            "doc": "Render for serving with thinking on or off; default on for turns with reasoning, off for others."
        },
    )
    evaluations: int | None = field(
        default=None, metadata={"doc": "Validations during the run; default one per epoch and at least 4."}
    )
    patience: int = field(
        default=2, metadata={"doc": "Stop after this many validations without a lower loss; 0 never stops early."}
    )
    compare: bool = field(
        default=True,
        metadata={"doc": "Measure the base on the validation rows, too, and compare it with the adapter in the card."},
    )
    best_by: str = field(
        default="loss",
        metadata={
            "doc": "Which weights are kept: of the lowest validation loss, or of the best score (label accuracy, else "
            "exact match of greedy answers to 32 validation rows)."
        },
    )
    goal: str | None = field(
        default=None,
        metadata={
            "doc": "What it is trained for: classification, generation, role play, agent routing or rag; default as "
            "the rows look."
        },
    )
    canaries: int = field(
        default=0,
        metadata={"doc": "Random rows planted among those trained on, to see whether single rows are memorised."},
    )
    baseline: Path | None = field(
        default=None, metadata={"doc": "Report of `hotshoe baseline` on this data, whose verdict the card keeps."}
    )
    samples: int = field(
        default=3, metadata={"doc": "Right and wrong answers to validation rows in the card, so many of each; 0 none."}
    )
    data_check: bool = field(
        default=True, metadata={"doc": "Check the data first, as `hotshoe data check` does; what blocks ends the run."}
    )
    rules: tuple[str, ...] = field(
        default=(), metadata={"doc": "Levels of the check's rules: CODE=block, warn, note or off (docs/data.md)."}
    )
    replay: Path | None = field(
        default=None,
        metadata={"doc": "General rows to learn beside the task's, in any of these forms, against forgetting."},
    )
    replay_share: float = field(
        default=0.1, metadata={"doc": "Share of all learned rows that are drawn of the replay file."}
    )
    seed: int = field(default=17, metadata={"doc": "Seed of initial weights, order of rows and the held-out share."})
    dtype: str | None = field(
        default=None,
        metadata={
            "doc": "float32, bfloat16 or float16 to compute in; default the base's own where the machine has units."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"doc": "Recompute activations to save memory; default only on a GPU."}
    )
    checkpoint_steps: int | None = field(
        default=None,
        metadata={
            "doc": "Steps between checkpoints that --resume goes on from; default a tenth of the run, 500 at most. "
            "Each validation makes one, too."
        },
    )
    report_to: tuple[str, ...] = field(
        default=("tensorboard",), metadata={"doc": "Where curves go: tensorboard, wandb, both (with a comma) or none."}
    )
    logs: Path | None = field(default=None, metadata={"doc": "TensorBoard folder; default OUT/runs."})

    def __post_init__(self) -> None:
        check_name(self.name)
        checks = (
            ("method", self.method is None or self.method in METHODS, f"one of {', '.join(METHODS)}"),
            ("over_long", self.over_long in OVER_LONG, f"one of {', '.join(OVER_LONG)}"),
            ("supervise", self.supervise in SUPERVISE, f"one of {', '.join(SUPERVISE)}"),
            ("scheduler", self.scheduler in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}"),
            ("dtype", self.dtype is None or self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            ("epochs", _within(self.epochs, 0, 1000), "above 0 and at most 1000"),
            ("learning_rate", _within(self.learning_rate, 0, 0.1), "above 0 and at most 0.1"),
            ("learning_rate_multiplier", _within(self.learning_rate_multiplier, 0, 50), "above 0 and at most 50"),
            ("batch_size", _within(self.batch_size, 0, 4096), "between 1 and 4096"),
            ("tokens_per_pass", _within(self.tokens_per_pass, 0, 10_000_000), "between 1 and 10000000"),
            ("pass_size", _within(self.pass_size, 0, 4096), "between 1 and 4096"),
            ("rank", _within(self.rank, 0, 512), "between 1 and 512, the largest rank an engine serves"),
            ("alpha", _within(self.alpha, 0, 1e6), "above 0"),
            ("max_length", _within(self.max_length, 1, 10_000_000), "at least 2 tokens"),
            ("evaluations", _within(self.evaluations, 0, 10_000), "between 1 and 10000"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "at least 0 and below 1"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay <= 1, "between 0 and 1"),
            ("max_gradient_norm", 0 < self.max_gradient_norm < math.inf, "above 0"),
            ("patience", self.patience >= 0, "0 or more"),
            ("replay_share", 0 < self.replay_share < 1, "above 0 and below 1"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2^32 - 1"),
            ("validation_share", self.validation_share is None or 0 <= self.validation_share < 1, "from 0 to below 1"),
            ("target_modules", _are_projections(self.target_modules), f"among {', '.join(PROJECTIONS)}"),
            ("checkpoint_steps", _within(self.checkpoint_steps, 0, 1_000_000), "between 1 and 1000000"),
            ("best_by", self.best_by in BEST_BY, f"one of {', '.join(BEST_BY)}"),
            ("goal", self.goal is None or self.goal in GOALS, f"one of {', '.join(GOALS)}"),
            ("canaries", 0 <= self.canaries <= MOST_CANARIES, f"between 0 and {MOST_CANARIES}"),
            ("samples", 0 <= self.samples <= 20, "between 0 and 20"),
            ("report_to", _are_reporters(self.report_to), f"among {', '.join(REPORTERS)}, none alone"),
        )
        for key, is_fine, wanted in checks:
            if not is_fine:
                raise ConfigInvalid(f"{key} is {getattr(self, key)!r}; it must be {wanted}.", param=key)
        if self.method == "full":
            self._check_full()

    def _check_full(self) -> None:
        """Full fine-tuning has no adapter, so nothing of one may be set."""
        defaults = {item.name: item.default for item in fields(self)}
        for key in LORA_SETTINGS:
            if getattr(self, key) != defaults[key]:
                raise ConfigInvalid(
                    f"{key} is {getattr(self, key)!r}, but method full trains every weight and has no adapter: "
                    "leave it out.",
                    param=key,
                )
        if self.initial_adapter is not None:
            raise ConfigInvalid(
                "method full cannot go on from an adapter: export it merged, and name that folder as the base.",
                param="from",
            )

    @property
    def output(self) -> Path:
        return self.out if self.out is not None else Path(self.name)

    @classmethod
    def documentation(cls) -> dict[str, str]:
        """Each setting's name and what it does."""
        return {item.name: item.metadata["doc"] for item in fields(cls)}


@dataclass(frozen=True)
class Settings:
    """What one run uses, nothing left open. `pass_size` rows go through the model at once, `accumulation` times."""

    method: Method
    epochs: float
    learning_rate: float
    scheduler: str
    warmup_ratio: float
    batch_size: int
    pass_size: int
    accumulation: int
    evaluation_pass_size: int
    steps: int
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool
    dropout: float
    weight_decay: float
    max_gradient_norm: float
    max_length: int
    over_long: str
    supervise: str
    evaluation_steps: int | None
    patience: int
    seed: int
    dtype: str
    gradient_checkpointing: bool
    optimizer: str
    checkpoint_steps: int
    best_by: str = "loss"
    canaries: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As in the card. A run without an adapter has no settings of one."""
        values = {**asdict(self), "target_modules": list(self.target_modules)}
        return {key: value for key, value in values.items() if self.method != "full" or key not in LORA_SETTINGS}


@dataclass(frozen=True)
class Facts:
    """What the choice depends on: the data's and the base's size, and what the machine can do."""

    rows: int
    longest_row_tokens: int
    has_validation: bool
    parameters: int
    context_length_tokens: int
    base_dtype: str
    device: str  # cpu or cuda
    device_memory_bytes: int
    has_bfloat16: bool


def choose(config: TrainingConfig, facts: Facts) -> Settings:
    """Fill in what the config leaves open. Pure: the same config and facts give the same settings."""
    epochs = config.epochs or (2.0 if facts.rows > 10_000 else 3.0)
    batch = config.batch_size or default_batch_size(facts.rows, epochs)
    rows_that_fit = config.tokens_per_pass // max(1, facts.longest_row_tokens)
    pass_size = min(batch, config.pass_size or max(1, rows_that_fit))
    accumulation = math.ceil(batch / pass_size)
    pass_size = math.ceil(batch / accumulation)
    steps = max(1, math.ceil(math.ceil(facts.rows / (pass_size * accumulation)) * epochs))
    rank = config.rank or (32 if facts.rows > 20_000 else 16)
    dtype = config.dtype or default_dtype(facts)
    evaluations = config.evaluations or max(4, math.ceil(epochs))
    method = config.method or default_method(facts, dtype)
    return Settings(
        method=method,
        epochs=epochs,
        learning_rate=config.learning_rate or config.learning_rate_multiplier * default_learning_rate(facts, method),
        scheduler=config.scheduler,
        warmup_ratio=config.warmup_ratio,
        batch_size=pass_size * accumulation,
        pass_size=pass_size,
        accumulation=accumulation,
        evaluation_pass_size=config.pass_size or max(pass_size, min(32, rows_that_fit)),
        steps=steps,
        rank=rank,
        alpha=config.alpha or 2.0 * rank,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
        dropout=config.dropout,
        weight_decay=config.weight_decay,
        max_gradient_norm=config.max_gradient_norm,
        max_length=min(config.max_length or facts.context_length_tokens, facts.context_length_tokens),
        over_long=config.over_long,
        supervise=config.supervise,
        evaluation_steps=max(1, math.ceil(steps / evaluations)) if facts.has_validation else None,
        patience=config.patience,
        seed=config.seed,
        dtype=dtype,
        gradient_checkpointing=_default_checkpointing(config, facts),
        optimizer="paged_adamw_8bit" if facts.device == "cuda" else "adamw_torch",
        checkpoint_steps=config.checkpoint_steps or min(MOST_STEPS_BETWEEN, math.ceil(steps / CHECKPOINTS_A_RUN)),
        best_by=config.best_by,
        canaries=config.canaries,
    )


def held_out(rows: int, share: float | None = None) -> int:
    """How many of so many rows validate where no file does; where the share is open, few rows are all trained on."""
    if share is None:
        share = SHARE_HELD_OUT if rows >= FEWEST_TO_HOLD_OUT_OF else 0.0
    return min(MOST_HELD_OUT, round(share * rows))


def default_batch_size(rows: int, epochs: float) -> int:
    """16, or 8 or 4 where 16 rows a step would give fewer than 100 steps in all."""
    return next((size for size in (16, 8) if rows * epochs / size >= WANTED_STEPS), 4)


def default_learning_rate(facts: Facts, method: Method) -> float:
    """1e-3 for a small base, else 2e-4; a tenth of it where every weight is trained ("LoRA Without Regret")."""
    rate = 1e-3 if facts.parameters < SMALL_MODEL_PARAMETERS else 2e-4
    return rate / 10 if method == "full" else rate


def default_method(facts: Facts, dtype: str) -> Method:
    """LoRA where the base in its dtype leaves 40% of the memory for the rest, else QLoRA."""
    weight_bytes = facts.parameters * (4 if dtype == "float32" else 2)
    return "lora" if weight_bytes <= 0.6 * facts.device_memory_bytes else "qlora"


def default_dtype(facts: Facts) -> str:
    """The base's own dtype where the machine computes in it, else float32 (float16 without bf16 units turns to NaN)."""
    if facts.base_dtype in ("bfloat16", "float16") and facts.has_bfloat16:
        return "bfloat16"
    return "float32"


def _default_checkpointing(config: TrainingConfig, facts: Facts) -> bool:
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing
    return facts.device == "cuda" and facts.parameters > SMALL_MODEL_PARAMETERS


def _within(value: float | None, above: float, most: float) -> bool:
    return value is None or (above < value <= most)


def _are_reporters(names: tuple[str, ...]) -> bool:
    return bool(names) and set(names) <= set(REPORTERS) and ("none" not in names or len(names) == 1)


def _are_projections(names: tuple[str, ...]) -> bool:
    return bool(names) and len(set(names)) == len(names) and set(names) <= set(PROJECTIONS)
