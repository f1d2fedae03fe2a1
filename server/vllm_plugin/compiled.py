"""vLLM's compilation with LoRA on a CPU: the update of a linear layer as an operator that torch.compile leaves whole.

vLLM 0.32 turns compilation off where LoRA is on (`CpuPlatform.check_and_update_config`). Our operator takes the layer's
output and input and a number for the layer, and updates the output in place; which rows belong to whom it finds in the
wrapper when it runs. It must be so: the model is traced once and every guard is dropped, so nothing that changes from
batch to batch may be read while it is traced.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from adapters.bases import PROJECTIONS

SWITCH = "HOTSHOE_LORA_COMPILE"  # 1: compile; unset or 0: run eagerly, as vLLM does

log = logging.getLogger("vllm.hotshoe")


def is_wanted() -> bool:
    """Whether SWITCH asks for compilation; raises ValueError for another word than 0 and 1."""
    asked = os.environ.get(SWITCH, "0")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {asked!r}; it takes 0 or 1.")
    return asked == "1"


class LinearOperator:
    """`hotshoe::add_lora_linear(y, x, layer)`: y (num_rows, out) += the update of x (num_rows, in), in place."""

    def __init__(self) -> None:
        self._layers: list[Any] = []
        make: Any = torch.library.Library
        library = make("hotshoe", "FRAGMENT")
        library.define("add_lora_linear(Tensor(a!) y, Tensor x, int layer) -> ()")
        library.impl("add_lora_linear", self._add, "CPU")
        library.impl("add_lora_linear", lambda y, x, layer: None, "Meta")
        self._library = library  # the operator is there as long as this is
        self.call = torch.ops.hotshoe.add_lora_linear.default

    def number_of(self, layer: Any) -> int:
        """The layer's number, the same at every call."""
        number: int | None = getattr(layer, "hotshoe_number", None)
        if number is None:
            number = layer.hotshoe_number = len(self._layers)
            self._layers.append(layer)
        return number

    def _add(self, y: torch.Tensor, x: torch.Tensor, layer: int) -> None:
        found = self._layers[layer]
        found.punica_wrapper.add_lora_linear(y, x, found.lora_a_stacked, found.lora_b_stacked, 1.0, found.output_slices)


def install(platform: Any, linear_layer: Any) -> None:
    """Have this platform class compile models with LoRA, and this class of layers call the operator. Idempotent."""
    if hasattr(linear_layer, "hotshoe_operator"):
        return
    _keep_compilation(platform)
    operator = linear_layer.hotshoe_operator = LinearOperator()
    create = linear_layer.set_mapping

    def set_mapping(layer: Any, punica_wrapper: Any) -> None:
        create(layer, punica_wrapper)
        operator.number_of(layer)

    def apply_lora_to_output(layer: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        rows = output.flatten(0, 1) if x.ndim == 3 and output.ndim == 3 else output
        operator.call(rows, x.flatten(0, 1) if x.ndim == 3 and output.ndim == 3 else x, layer.hotshoe_number)
        return rows.reshape(output.shape)

    linear_layer.set_mapping = set_mapping
    linear_layer._apply_lora_to_output = apply_lora_to_output


def may_compile(lora_config: Any) -> bool:
    """Whether the operator is all of LoRA that a traced model holds: other layers look at the batch while traced."""
    targets = set(lora_config.target_modules or ("every layer",))
    return not lora_config.fully_sharded_loras and targets <= set(PROJECTIONS)


def _keep_compilation(platform: Any) -> None:
    """The mode that vLLM would choose without LoRA; the settings that go with it are made either way."""
    from vllm.config import CompilationMode

    checked = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        asked = vllm_config.compilation_config.mode
        checked(vllm_config)
        if vllm_config.lora_config is None or asked not in (
            CompilationMode.VLLM_COMPILE,
            CompilationMode.DYNAMO_TRACE_ONCE,
        ):
            return
        if may_compile(vllm_config.lora_config):
            vllm_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
        else:
            log.warning(
                "%s=1, but the engine runs eagerly: that needs --lora-target-modules with some of %s, and LoRAs that "
                "are not fully sharded.",
                SWITCH,
                ", ".join(PROJECTIONS),
            )

    platform.check_and_update_config = classmethod(check_and_update_config)


def mend_loading() -> None:
    """Let vLLM take a compiled model from its cache: 0.32 asks what it has read for a method of another mode's.

    In this mode (DYNAMO_TRACE_ONCE with inductor) `_try_load_aot_compiled_fn` of vllm/compilation/decorators.py finds a
    plain function, without the `finalize_loading` that VLLM_COMPILE's has, and would compile anew at each start, with
    LoRA or without. Idempotent.
    """
    load = torch.compiler.load_compiled_function
    if getattr(load, "is_mended", False):
        return

    def load_compiled_function(*arguments: Any, **named: Any) -> Any:
        loaded: Any = load(*arguments, **named)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda config: None
        return loaded

    load_compiled_function.is_mended = True  # type: ignore[attr-defined]
    torch.compiler.load_compiled_function = load_compiled_function
