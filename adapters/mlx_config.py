"""The adapter_config.json of MLX-LM: its trainer's arguments, of which rank, scale and the kind of fine-tuning count.

An MLX-LM layer computes W x + scale * (x A) B with A (in_features, rank) and B (rank, out_features): PEFT's
lora_alpha is scale * rank, and both halves are transposed. https://github.com/ml-explore/mlx-lm (`mlx_lm/tuner`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapters.errors import Problem
from adapters.lora_fields import EXPORT_ONLY

KINDS = ("lora", "dora")
PARAMETERS = ("rank", "scale", "alpha", "dropout", "keys")
NEEDED = ("rank", "scale")


def is_mlx_config(config: Mapping[str, Any]) -> bool:
    """True for what `mlx_lm.lora` writes; PEFT's own field, peft_type, decides for PEFT."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


class MlxReading:
    """An MLX-LM config as the PEFT config of the same meaning, with what was refused, limited and left out."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.problems: list[Problem] = []
        self.limits: list[Problem] = []
        self.as_peft: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": config.get("model")}
        used = {"fine_tune_type", "lora_parameters", "model", "use_dora"}
        self.dropped = [f"{key[:80]}: an argument of MLX-LM's trainer" for key in config if key not in used]
        self._kind(config)
        if not self.problems:
            self._parameters(config.get("lora_parameters"), is_dated="fine_tune_type" in config)

    def _problem(self, code: str, path: str, message: str, advice: str = "") -> None:
        self.problems.append(Problem(code, f"config.{path[:80]}", message, advice))

    def _kind(self, config: Mapping[str, Any]) -> None:
        kind = config.get("fine_tune_type", "dora" if config.get("use_dora") is True else "lora")
        if kind not in KINDS:
            message = f"is {str(kind)[:40]!r}; only lora and dora are low-rank updates that fit beside a base"
            self._problem("feature_not_supported", "fine_tune_type", message, "Train with --fine-tune-type lora.")
        elif kind == "dora":
            self.as_peft["use_dora"] = True
            advice = "Train with --fine-tune-type lora to serve it."
            self.limits.append(Problem("not_servable", "config.fine_tune_type", EXPORT_ONLY["use_dora"], advice))

    def _parameters(self, value: Any, *, is_dated: bool) -> None:
        if not isinstance(value, dict):
            self._problem("type_error", "lora_parameters", f"is a {type(value).__name__}, not an object")
            return
        for key in value:
            if key not in PARAMETERS:
                self._problem("field_unknown", f"lora_parameters.{key}", "is not a parameter of MLX-LM's LoRA layers")
        for key in NEEDED:
            if key not in value:
                advice = "Write the value used in training."
                self._problem("field_missing", f"lora_parameters.{key}", "is missing", advice)
        if self.problems:
            return
        rank, scale = value["rank"], value["scale"]
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            self._problem("type_error", "lora_parameters.scale", f"is {str(scale)[:40]!r}, not a number")
        elif type(rank) is not int:
            self._problem("type_error", "lora_parameters.rank", f"is {str(rank)[:40]!r}, not an integer")
        elif not is_dated and value.get("alpha", rank) != rank:
            message = (
                f"is {str(value['alpha'])[:40]}: MLX-LM before June 2024 multiplied by alpha / rank, later ones did not"
            )
            advice = (
                "Write the scale that was effective and remove alpha, or fuse the adapter with the MLX-LM that made it."
            )
            self._problem("ambiguous", "lora_parameters.alpha", message, advice)
        else:
            self.as_peft |= {"r": rank, "lora_alpha": scale * rank, "target_modules": value.get("keys")}
            self.dropped += [f"lora_parameters.{key}" for key in ("dropout", "keys", "alpha") if key in value]
