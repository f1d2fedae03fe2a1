"""adapter_config.json from any trainer, read strictly: what changes the meaning is kept, made export-only or refused.

Fields at PEFT's default are dropped and listed. No pattern from a file is ever compiled: which layers are adapted is
decided by the tensors in the file, so every field that merely selected layers in training is dropped too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapters.config_keys import EXPORT_ONLY_TYPES, MAX_PATTERNS, literal_name, look_alike
from adapters.errors import Problem
from adapters.lora_fields import (
    ANNOTATIONS,
    CLAIMED_TASKS,
    CLASSIFIER_TASKS,
    DEFAULTS,
    ESSENTIAL,
    EXPORT_ADVICE,
    EXPORT_ONLY,
    FORBIDDEN,
    PLAIN_INITS,
    SELECTION,
    SUBTRACTED_INITS,
    TASK_TYPES,
    TRAINING_ONLY,
    TRAINING_ONLY_FLAGS,
    UNSUPPORTED,
)
from adapters.mlx_config import MlxReading, is_mlx_config

MAX_RANK = 4096
MAX_ALPHA = 1e6
MAX_CLAIM_CHARACTERS = 1024
MAX_KEYS = 1000  # PEFT 0.21 writes 41

MISSING = object()


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter_config.json means. `base_claim` is what it says of its base, nothing that was looked up."""

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_claim: str | None = None
    target_modules: tuple[str, ...] | None = None  # None: a string or nothing, which is not looked at
    mutated_init: str | None = None  # pissa, olora, ...: the base was changed, so the initial adapter is needed
    extras: Mapping[str, Any] = field(default_factory=dict)  # kept for export-only versions: use_dora, bias, ...
    is_mlx: bool = False  # MLX-LM's names, and both halves transposed

    def scaling(self, rank: int, alpha: float) -> float:
        """lora_alpha / r, or / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass
class _Reading:
    config: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)
    limits: list[Problem] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    mutated_init: str | None = None

    def problem(self, code: str, key: str, message: str, advice: str = "") -> None:
        self.problems.append(Problem(code, f"config.{key[:80]}", message, advice))

    def drop(self, key: str, why: str = "") -> None:
        self.dropped.append(f"{key[:80]}: {why}" if why else key[:80])


@dataclass(frozen=True)
class ConfigReading:
    """The outcome of reading one adapter_config.json; `settings` is None when a problem leaves no meaning."""

    settings: LoraSettings | None
    problems: tuple[Problem, ...]
    limits: tuple[Problem, ...]  # why it can only be exported
    dropped: tuple[str, ...]
    outline: LoraSettings | None = None  # of a refused LoRA config: claim and layout, so that tensors can be read too


def read_config(config: Any) -> ConfigReading:
    """Check every field of a parsed adapter_config.json and report all problems at once."""
    if not isinstance(config, dict):
        problem = Problem("type_error", "config", f"is a {type(config).__name__}, not a JSON object")
        return ConfigReading(None, (problem,), (), ())
    if len(config) > MAX_KEYS:
        problem = Problem("out_of_range", "config", f"has {len(config):,} fields; at most {MAX_KEYS:,} are read")
        return ConfigReading(None, (problem,), (), ())
    if is_mlx_config(config):
        return _read_mlx(config)
    foreign = _foreign_kind(config)
    if foreign:
        return ConfigReading(None, (foreign,), (), ())
    reading = _Reading(config)
    for key, value in config.items():
        if key not in ESSENTIAL and key != "use_rslora":
            _read_field(reading, key, value)
    if "peft_type" not in config:
        reading.drop("peft_type", "is missing; r and lora_alpha say LORA, and the tensors have to agree")
    settings = _settings(reading)
    problems, limits, dropped = tuple(reading.problems), tuple(reading.limits), tuple(sorted(reading.dropped))
    if settings is None:
        return ConfigReading(None, problems, limits, dropped, LoraSettings(1, 1.0, base_claim=_text_claim(config)))
    return ConfigReading(settings, problems, limits, dropped)


def _text_claim(config: Mapping[str, Any]) -> str | None:
    claim = config.get("base_model_name_or_path")
    return claim if isinstance(claim, str) and claim else None


def _read_mlx(config: Mapping[str, Any]) -> ConfigReading:
    mlx = MlxReading(config)
    if mlx.problems:
        return ConfigReading(None, tuple(mlx.problems), (), tuple(sorted(mlx.dropped)))
    found = read_config(mlx.as_peft)
    settings, outline = (part and replace(part, is_mlx=True) for part in (found.settings, found.outline))
    return ConfigReading(settings, found.problems, tuple(mlx.limits), tuple(sorted(mlx.dropped)), outline)


def _foreign_kind(config: Mapping[str, Any]) -> Problem | None:
    """What this file is instead, when it is no LoRA configuration at all."""
    kind = config.get("peft_type", MISSING)
    if kind is MISSING and {"architectures", "hidden_size", "model_type"} & set(config) and "r" not in config:
        message = "is the config.json of a base model, not an adapter's"
        return Problem("not_an_adapter_config", "config", message, "Send the adapter_config.json that PEFT wrote.")
    if kind is MISSING and not {"r", "lora_alpha"} <= set(config):
        named = ", ".join(
            f"{name[:40]!r}, perhaps for {field}"
            for field in ("r", "lora_alpha")
            if field not in config and (name := look_alike(config, field))
        )
        message = "is missing, and so is r or lora_alpha" + (f"; the file has {named}" if named else "")
        advice = 'Save with PEFT, which writes "LORA", r and lora_alpha under these names.'
        return Problem("field_missing", "config.peft_type", message, advice)
    if kind is not MISSING and not (isinstance(kind, str) and _member(kind) == "LORA"):
        message = f"is {str(kind)[:40]!r}; only LORA can be served or merged here"
        return Problem("feature_not_supported", "config.peft_type", message, "Train a plain LoRA adapter.")
    return None


def _read_field(reading: _Reading, key: str, value: Any) -> None:
    if _is_default(key, value):
        reading.drop(key)
    elif key in HANDLERS:
        HANDLERS[key](reading, key, value)
    elif key in UNSUPPORTED:
        reading.problem("feature_not_supported", key, f"is not supported: {UNSUPPORTED[key]}", "Train without it.")
    elif key in FORBIDDEN:
        advice = "Remove the field; weights alone are read."
        reading.problem(
            "field_not_allowed", key, "is not allowed: it names code or files a loader would follow", advice
        )
    elif key in EXPORT_ONLY:
        if not EXPORT_ONLY_TYPES[key](value):
            reading.problem("type_error", key, f"is {str(value)[:40]!r}, which PEFT does not write here")
            return
        reading.extras[key] = value
        reading.limits.append(Problem("not_servable", f"config.{key}", EXPORT_ONLY[key], EXPORT_ADVICE[key]))
    elif key in DEFAULTS or not _is_empty(value):
        message = "is not a field of any LoRA configuration known here, and it has a value"
        reading.problem("field_unknown", key, message, "Remove it if it means nothing, or train without it.")
    else:
        reading.drop(key, "unknown and empty")


def _is_default(key: str, value: Any) -> bool:
    """One of the known values that say nothing; null is what Axolotl writes for a flag that nobody set."""
    if value is None:
        return key in DEFAULTS and key != "bias"
    return any(value == default and type(value) is type(default) for default in DEFAULTS.get(key, ()))


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _selection(reading: _Reading, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, SELECTION[key]):
        reading.problem("type_error", key, f"is a {type(value).__name__}; it should be a string or a list")
    else:
        reading.drop(key, "the tensors in the file decide which layers are adapted")


def _training_only(reading: _Reading, key: str, value: Any) -> None:
    if isinstance(value, dict) and {"cache_file", "covariance_file"} & {k for k, v in value.items() if v}:
        reading.problem("field_not_allowed", key, "names a file", "Remove the field; it mattered in training only.")
    else:
        reading.drop(key, "mattered in training only")


def _training_flag(reading: _Reading, key: str, value: Any) -> None:
    if isinstance(value, bool):
        reading.drop(key, "has no effect on linear layers")
    else:
        reading.problem("type_error", key, f"is {str(value)[:40]!r}, not true or false")


def _dropout(reading: _Reading, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        reading.problem("type_error", key, f"is {str(value)[:40]!r}, not a number")
    elif not 0 <= value <= 1:
        reading.problem("out_of_range", key, f"is {value}; it must be between 0 and 1")
    else:
        reading.drop(key, "mattered in training only")


def _bias(reading: _Reading, key: str, value: Any) -> None:
    if value in ("all", "lora_only"):
        reading.extras[key] = value
        reading.limits.append(
            Problem("not_servable", "config.bias", "trained biases are not served by vLLM", EXPORT_ADVICE[key])
        )
    else:
        reading.problem("type_error", key, f"is {str(value)[:40]!r}; it must be none, all or lora_only")


def _auto_mapping(reading: _Reading, key: str, value: Any) -> None:
    ordinary = {"base_model_class": str, "parent_library": str, "unsloth_fixed": bool}
    is_ordinary = isinstance(value, dict) and all(
        name in ordinary and isinstance(item, ordinary[name] | None) for name, item in value.items()
    )
    if is_ordinary:
        reading.drop(key, "a claim about the base's class")
    else:
        reading.problem("field_not_allowed", key, "is not allowed beyond base_model_class and parent_library")


def _init(reading: _Reading, key: str, value: Any) -> None:
    if not isinstance(value, str):
        reading.problem("type_error", key, f"is a {type(value).__name__}; it should be true, false or a name")
        return
    name = value.lower()
    kind = next((init for init in SUBTRACTED_INITS if name == init or name.startswith(f"{init}_niter")), None)
    if name in PLAIN_INITS:
        reading.drop(key, "mattered at the start of training only")
    elif kind:
        reading.mutated_init = kind
    else:
        reading.problem("feature_not_supported", key, f"is {value[:40]!r}, an initialisation not known here")


def _init_config(reading: _Reading, key: str, value: Any) -> None:
    """corda_config, lora_ga_config and a filled loftq_config go with an initialisation that changed the base."""
    if isinstance(value, dict) and not {"cache_file", "covariance_file"} & {k for k, v in value.items() if v}:
        reading.drop(key, "mattered at the start of training only")
    else:
        reading.problem("field_not_allowed", key, "is not allowed: it names files", "Remove the field.")


def _loftq_config(reading: _Reading, key: str, value: Any) -> None:
    """The bits and rounds of a LoftQ start go with that start, and with nothing else."""
    is_loftq = str(reading.config.get("init_lora_weights")).lower() == "loftq"
    ordinary = {"loftq_bits", "loftq_iter"}
    if is_loftq and isinstance(value, dict) and set(value) <= ordinary and all(type(v) is int for v in value.values()):
        reading.drop(key, "mattered at the start of training only")
    else:
        advice = "Remove the field, unless the adapter started from LoftQ: then init_lora_weights has to say so."
        reading.problem("field_not_allowed", key, "is not allowed without a LoftQ start", advice)


HANDLERS: Mapping[str, Callable[[_Reading, str, Any], None]] = {
    **dict.fromkeys(SELECTION, _selection),
    **dict.fromkeys(TRAINING_ONLY, _training_only),
    **dict.fromkeys(TRAINING_ONLY_FLAGS, _training_flag),
    **dict.fromkeys(
        ANNOTATIONS, lambda reading, key, value: reading.drop(key, "an annotation, which PEFT does not read")
    ),
    "peft_version": _training_only,
    "lorap_lr_ratio": _training_only,
    "lorap_emb_lr": _training_only,
    "lora_dtype": _training_only,
    "lora_dropout": _dropout,
    "bias": _bias,
    "auto_mapping": _auto_mapping,
    "init_lora_weights": _init,
    "loftq_config": _loftq_config,
    "corda_config": _init_config,
    "lora_ga_config": _init_config,
    "rank_pattern": lambda reading, key, value: None,  # read with r and lora_alpha below
    "alpha_pattern": lambda reading, key, value: None,
}


def _settings(reading: _Reading) -> LoraSettings | None:
    config = reading.config
    rank = _rank(reading, "r", config.get("r", MISSING))
    alpha = _alpha(reading, "lora_alpha", config.get("lora_alpha", MISSING))
    use_rslora = config.get("use_rslora", False)
    if use_rslora is None:
        use_rslora = False
    if not isinstance(use_rslora, bool):
        reading.problem("type_error", "use_rslora", f"is {str(use_rslora)[:40]!r}, not true or false")
    rank_pattern = _pattern(reading, "rank_pattern", _rank)
    alpha_pattern = _pattern(reading, "alpha_pattern", _alpha)
    _task_type(reading)
    claim = _claim(reading)
    targets = _targets(reading)
    if rank is None or alpha is None or reading.problems:
        return None
    return LoraSettings(
        rank, alpha, use_rslora, rank_pattern, alpha_pattern, claim, targets, reading.mutated_init, reading.extras
    )


def _rank(reading: _Reading, key: str, value: Any) -> int | None:
    if value is MISSING:
        meant = look_alike(reading.config, key)
        message = "is missing" + (f"; the file has {meant[:40]!r}, which nothing reads" if meant else "")
        reading.problem("field_missing", key, message, "Every PEFT version writes it; save the adapter again.")
    elif type(value) is not int:
        reading.problem("type_error", key, f"is {str(value)[:40]!r}, not an integer")
    elif not 1 <= value <= MAX_RANK:
        reading.problem("out_of_range", key, f"is {value}; a rank is between 1 and {MAX_RANK}")
    else:
        return value
    return None


def _alpha(reading: _Reading, key: str, value: Any) -> float | None:
    if value is MISSING:
        message = "is missing, and a guess would scale the adapter wrongly"
        meant = look_alike(reading.config, key)
        if meant:
            message += f"; the file has {meant[:40]!r}, which nothing reads"
        reading.problem("field_missing", key, message, "Write the value used in training, under the name lora_alpha.")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        reading.problem("type_error", key, f"is {str(value)[:40]!r}, not a number")
    elif not (math.isfinite(value) and 0 < value <= MAX_ALPHA):
        reading.problem("out_of_range", key, f"is {value}; it must be above 0 and at most {MAX_ALPHA:g}")
    else:
        return value
    return None


def _pattern(reading: _Reading, key: str, check: Callable[[_Reading, str, Any], Any]) -> dict[str, Any]:
    value = reading.config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        reading.problem("type_error", key, f"is a {type(value).__name__}, not an object")
        return {}
    if len(value) > MAX_PATTERNS:
        reading.problem("pattern_not_allowed", key, f"has {len(value):,} keys; at most {MAX_PATTERNS:,} are read")
        return {}
    checked: dict[str, Any] = {}
    for name, item in value.items():
        literal = literal_name(name)
        if literal is None or literal in checked:
            what = "is not a literal module name" if literal is None else "names the same module as another key"
            advice = "Name each module in full, or by its last parts (self_attn.q_proj)."
            reading.problem("pattern_not_allowed", key, f"key {name[:80]!r} {what}", advice)
            continue
        checked[literal] = check(reading, f"{key}.{name[:80]}", item)
    return {name: item for name, item in checked.items() if item is not None}


def _task_type(reading: _Reading) -> None:
    value = reading.config.get("task_type")
    if value is not None and not isinstance(value, str):
        reading.problem("type_error", "task_type", f"is a {type(value).__name__}, not a string")
        return
    task = _member(value or "")
    if task in CLAIMED_TASKS:
        reading.drop("task_type", f"{task}, a claim about the class around the base; the tensors decide")
    elif task in CLASSIFIER_TASKS:
        message = f"is {task}: a classifier's head is not a part of a causal language model"
        reading.problem("feature_not_supported", "task_type", message)
    elif task not in TASK_TYPES:
        message = f"is {task[:40]!r}, which is no task of PEFT's"
        reading.problem("feature_not_supported", "task_type", message, 'Write "CAUSAL_LM", or leave it out.')


def _member(value: str) -> str:
    """`CAUSAL_LM` for `causal_lm` and `TaskType.CAUSAL_LM`, as scripts write PEFT's enumerations."""
    return value.rpartition(".")[2].upper()


def _claim(reading: _Reading) -> str | None:
    claim = reading.config.get("base_model_name_or_path")
    if claim is not None and not isinstance(claim, str):
        reading.problem("type_error", "base_model_name_or_path", f"is a {type(claim).__name__}, not a string")
        return None
    if claim and len(claim) > MAX_CLAIM_CHARACTERS:
        message = f"has {len(claim)} characters; at most {MAX_CLAIM_CHARACTERS}"
        reading.problem("out_of_range", "base_model_name_or_path", message)
        return None
    return claim or None


def _targets(reading: _Reading) -> tuple[str, ...] | None:
    """The list of module suffixes for the record; a string could be a pattern and is dropped unread."""
    value = reading.config.get("target_modules")
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value[:MAX_PATTERNS])
    if isinstance(value, str):
        reading.drop("target_modules", "a string is not read; the tensors in the file decide which layers are adapted")
    elif value is not None:
        reading.problem("type_error", "target_modules", "is neither a list of strings, a string nor null")
    return None
