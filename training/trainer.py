"""From a chat file to an adapter folder: read, render, choose settings, train with transformers' Trainer, save, card.

`train(config)` is the whole of it. Nothing is left behind but the finished folder: PEFT's two files, `card.json` and
the TensorBoard log. A run that fails leaves none.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid, StorageFull, TrainingStopped
from training import card as cards
from training.callbacks import Curve, Guard, Meter, Progress, Recorder
from training.config import Facts, Settings, TrainingConfig, choose
from training.data.dataset import Prepared, duplicate_count, hold_out, prepare
from training.data.formats import DataFile, Row, read_chat
from training.data.template import ChatTemplate, load_template
from training.staging import staged

CHECKPOINTS = "checkpoints"  # inside the staging folder, gone when the run ends
SHARE_HELD_OUT = 0.1
ROWS_FOR_HOLDING_OUT = 100


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: the adapter's folder and its card."""

    folder: Path
    card: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """Losses, steps and curve, as in the card."""
        result: dict[str, Any] = self.card["result"]
        return result


@dataclass(frozen=True)
class Material:
    """What goes into a run: the base with its template, and the prepared rows."""

    base: BaseModel
    template: ChatTemplate
    file: DataFile
    training: Prepared
    validation_file: DataFile | None  # None when the validation rows were held out of the training file
    validation: Prepared | None
    turns: tuple[int, int]  # supervised turns with and without reasoning


def train(config: TrainingConfig, say: Callable[[str], None] | None = None) -> TrainingResult:
    """Train an adapter into `config.output`, which then holds it whole. Lines about it go to `say`, or to stderr.

    Raises OutputExists, AlreadyRunning, ConfigInvalid, DataInvalid (with every bad row), BaseInvalid, AdapterRefused
    for an initial adapter that does not fit, TrainingStopped when the run diverged.
    """
    started = time.monotonic()
    _one_process()
    with _full_disk_named(), staged(config.output) as folder:
        material = gather(config)
        settings = choose(_with_initial_shape(config), facts(config, material))
        curve, meter = Curve(), Meter()
        progress = Progress(meter, say)
        progress.say(announcement(config, material, settings))
        model, state = _run(config, settings, material, folder, (curve, meter, progress))
        _name_base(model, config.base)
        save_adapter(model, folder)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        card = make_card(config, settings, material, curve, meter, state, model, started)
        cards.write_card(folder, card)
    return TrainingResult(config.output, card)


@contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise StorageFull(
                f"The disk is full: {error}. Nothing was saved; make room or choose another --out."
            ) from error
        raise


def _one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigInvalid("WORLD_SIZE is above 1: training runs on one GPU; start it without torchrun or accelerate.")


def gather(config: TrainingConfig) -> Material:
    """Read and render everything a run needs, without loading the model."""
    from adapters.embedded import EMBEDDED, open_base

    base = open_base(config.base or EMBEDDED)
    template = load_template(base.folder, config.thinking)
    file = read_chat(config.data)
    validation_file = read_chat(config.validation) if config.validation else None
    rows, held_out = file.rows, validation_file.rows if validation_file else []
    share = SHARE_HELD_OUT if config.validation_share is None else config.validation_share
    if validation_file is None and share and (config.validation_share or len(rows) >= ROWS_FOR_HOLDING_OUT):
        rows, held_out = hold_out(rows, share, config.seed)
    length = min(config.max_length or base.context_length_tokens, base.context_length_tokens)

    def ready(source: DataFile, chosen: list[Row]) -> Prepared:
        return prepare(
            source, chosen, template, max_length=length, over_long=config.over_long, supervise=config.supervise
        )

    training = ready(file, rows)
    validation = ready(validation_file or file, held_out) if held_out else None
    turns = [template.thinks(row.messages[i]) for row in rows for i in row.learned_turns(config.supervise)]
    return Material(base, template, file, training, validation_file, validation, (sum(turns), len(turns) - sum(turns)))


def facts(config: TrainingConfig, material: Material) -> Facts:
    """What the settings depend on, measured on this data, base and machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base_dtype = material.base.config.get("dtype") or material.base.config.get("torch_dtype") or "float32"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        has_bfloat16 = any(torch.cpu.get_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16"))
    return Facts(
        rows=len(material.training.sequences),
        longest_row_tokens=material.training.longest,
        has_validation=material.validation is not None,
        parameters=parameter_count(material.base),
        context_length_tokens=material.base.context_length_tokens,
        base_dtype=str(base_dtype).removeprefix("torch."),
        device=device,
        device_memory_bytes=memory,
        has_bfloat16=has_bfloat16,
    )


def parameter_count(base: BaseModel) -> int:
    """Parameters of the projections and embeddings, from shapes alone; norms and biases do not matter to a choice."""
    embedding = int(base.config["vocab_size"]) * int(base.config["hidden_size"])
    projections = sum(shape.out_features * shape.in_features for shape in base.shapes.values())
    return projections + embedding * (1 if base.is_tied else 2)


def announcement(config: TrainingConfig, material: Material, settings: Settings) -> str:
    """What is about to happen, in a few lines."""
    data = material.training
    lines = [
        f"{config.name}: {settings.method} on {material.base.id}, {settings.dtype}, rank {settings.rank}, "
        f"learning rate {settings.learning_rate:g}, {settings.batch_size} rows a step, {settings.steps} steps",
        f"{config.data}: {data.rows:,} rows, {data.tokens:,} tokens, {data.supervised_tokens:,} of them learned",
    ]
    if material.validation is None:
        lines.append("no validation rows: neither early stopping nor a best adapter to keep")
    else:
        source = material.validation_file.path if material.validation_file else f"held out of {config.data}"
        lines.append(f"validation: {material.validation.rows:,} rows, {source}")
    for name, places in (("cut", data.cut), ("dropped", data.dropped)):
        if places:
            lines.append(f"{len(places)} rows above {settings.max_length:,} tokens {name}: {', '.join(places[:5])} …")
    ignored = ", ".join(f"{key} ({count})" for key, count in material.file.ignored_keys.items())
    return "\n".join([*lines, *([f"keys without a meaning here: {ignored}"] if ignored else [])])


def save_adapter(model: Any, folder: Path) -> None:
    """Write PEFT's two files; raises TrainingStopped for an adapter that is not finite or that changes nothing."""
    import torch

    updates = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    broken = [name for name, value in updates if not bool(torch.isfinite(value).all())]
    if broken:
        raise TrainingStopped(f"{broken[0]} is not finite after training: nothing was saved. Lower --learning-rate.")
    if not any(bool(value.any()) for name, value in updates if "lora_B" in name):
        raise TrainingStopped("The adapter changes nothing after training: every lora_B is zero. Train for more steps.")
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card that PEFT puts there


def _name_base(model: Any, source: str | None) -> None:
    """A base from the Hub is named in the adapter's config by its id, not by where this machine keeps it."""
    if source is None or Path(source).exists() or "/" not in source:
        return
    name, _, revision = source.partition("@")
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = name, revision or None


def make_card(
    config: TrainingConfig,
    settings: Settings,
    material: Material,
    curve: Curve,
    meter: Meter,
    state: Any,
    model: Any,
    started: float,
) -> dict[str, Any]:
    """The card of a finished run."""
    trained = [value for value in model.parameters() if value.requires_grad]
    validated = dict(curve.validation)
    best = state.best_global_step if validated and state.best_global_step else state.global_step
    return {
        "name": config.name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": config.parent,
        "base": {"id": material.base.id, "digest": material.base.digest, "dtype": settings.dtype},
        "template": {"digest": material.template.digest, "enable_thinking": _thinking(material)},
        "data": _data_card(material),
        "settings": settings.as_dict(),
        "adapter": {"parameters": sum(value.numel() for value in trained)},
        "result": {
            "steps": state.global_step,
            "is_stopped_early": state.global_step < settings.steps,
            "best_step": best,
            "training_loss": curve.training[-1][1] if curve.training else None,
            "validation_loss": validated.get(best),
            "curve": curve.as_dict(),
        },
        "cost": {
            "seconds": round(time.monotonic() - started, 1),
            "training_seconds": round(meter.seconds, 1),
            "tokens": meter.tokens,
            "tokens_per_second": round(meter.tokens_per_second, 1),
            "peak_memory_bytes": cards.peak_memory_bytes(_device(model)),
            "device": _device(model),
            "threads": cards.threads(),
        },
        "versions": cards.versions(),
    }


def _run(
    config: TrainingConfig,
    settings: Settings,
    material: Material,
    folder: Path,
    watchers: tuple[Curve, Meter, Progress],
) -> tuple[Any, Any]:
    """Train; returns the model with its best adapter, and Trainer's state."""
    from training.run import build_trainer

    curve, meter, progress = watchers
    callbacks = [Recorder(curve), Guard(), progress]
    trainer = build_trainer(config, settings, material, folder, meter, callbacks)
    try:
        trainer.train()
    finally:
        progress.close()
    return trainer.model, trainer.state


def _with_initial_shape(config: TrainingConfig) -> TrainingConfig:
    """The config with the rank and alpha of the adapter that it goes on from."""
    if config.initial_adapter is None:
        return config
    from training.model import with_initial_shape

    return with_initial_shape(config)


def _thinking(material: Material) -> bool | None:
    """How serving must set `enable_thinking`; None where the template has no switch, or for a mixture."""
    thinking, plain = material.turns
    if not material.template.has_thinking_switch or (thinking and plain):
        return None
    return bool(thinking)


def _data_card(material: Material) -> dict[str, Any]:
    training = {
        "file": material.file.path.name,
        "digest": material.file.digest,
        **material.training.as_dict(),
        "duplicate_sequences": duplicate_count(material.training),
        "ignored_keys": dict(material.file.ignored_keys),
    }
    if material.validation is None:
        return {"training": training, "validation": None}
    source = material.validation_file or material.file
    validation = {
        "file": source.path.name,
        "digest": source.digest,
        "is_held_out": material.validation_file is None,
        **material.validation.as_dict(),
    }
    return {"training": training, "validation": validation}


def _device(model: Any) -> str:
    return str(next(model.parameters()).device.type)
