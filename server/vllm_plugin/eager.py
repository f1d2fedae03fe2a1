"""What a step of an eager model costs on a CPU beside its products: fewer operators and fewer calls for the same sums.

vLLM 0.32 turns compilation off where LoRA is on, once it has chosen operators for a compiled model: plain torch for
norms, rotary embedding and activation, which a compiler would have fused. Eagerly they are forty operators a layer.
Here an eager model takes the compiled kernels that vLLM has for the same; calls attention as a function and not through
torch's dispatcher; and a linear layer with LoRA goes from its input to vLLM's product and our update, without the
branches for tensor parallelism and quantization between them. A model that is compiled is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

SWITCH = "HOTSHOE_EAGER_STEPS"  # 0: eager models run as vLLM runs them
OPERATORS = ("rms_norm", "silu_and_mul", "rotary_embedding")  # as vLLM's `custom_ops` names them
WIDTH = 16  # vLLM's kernels take rows of a multiple of their vectors, which hold at most so many numbers


def is_wanted() -> bool:
    """Whether SWITCH leaves it on; raises ValueError for another word than 0 and 1."""
    asked = os.environ.get(SWITCH, "1")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {asked!r}; it takes 0 or 1.")
    return asked != "0"


def install(platform: Any) -> None:
    """Have eager models of this platform class run so, before any is made. Idempotent."""
    from vllm.lora.layers.column_parallel_linear import (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
    )
    from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    if not is_wanted() or hasattr(platform, "hotshoe_chose_operators"):
        return
    _choose_operators(platform)
    RMSNorm.forward_cpu = rms_norm
    SiluAndMul.forward_cpu = silu_and_mul
    classes = (
        *(ColumnParallelLinearWithLoRA, MergedColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA),
        *(QKVParallelLinearWithLoRA, MergedQKVParallelLinearWithLoRA),
    )
    forwards = {found: found.forward for found in classes}  # as they are before any is replaced: some inherit
    for found, forward in forwards.items():
        found.forward = _short(found, forward)


def _choose_operators(platform: Any) -> None:
    from vllm.config import CompilationMode, get_current_vllm_config

    checked = platform.hotshoe_chose_operators = platform.check_and_update_config
    is_opaque = platform.opaque_attention_op

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        checked(vllm_config)
        config = vllm_config.compilation_config
        if config.mode == CompilationMode.NONE:
            named = {name.lstrip("+-") for name in config.custom_ops}
            config.custom_ops.extend(f"+{name}" for name in OPERATORS if name not in named)

    def opaque_attention_op(cls: Any) -> bool:
        return bool(is_opaque()) and get_current_vllm_config().compilation_config.mode != CompilationMode.NONE

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.opaque_attention_op = classmethod(opaque_attention_op)


def rms_norm(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    """RMSNorm of vLLM: x (..., hidden) normalized; with a residual, of their sum, which is returned beside it.

    Both may be overwritten then, as vLLM's own form may.
    """
    weight = layer.weight.data
    if not _is_for_kernel(layer, x, weight):
        return layer.forward_native(x, residual)
    if residual is None:
        out = torch.empty(x.shape, dtype=x.dtype)
        torch.ops._C.rms_norm(out, x.contiguous(), weight, layer.variance_epsilon)
        return out
    if not (x.is_contiguous() and residual.is_contiguous()):
        return layer.forward_native(x, residual)
    torch.ops._C.fused_add_rms_norm(x, residual, weight, layer.variance_epsilon)
    return x, residual


def _is_for_kernel(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> bool:
    has_weight = layer.pass_weight and layer.pass_weight_add and weight.dtype == x.dtype
    return (
        has_weight and layer.variance_size_override is None and x.shape[-1] == len(weight) and not len(weight) % WIDTH
    )


def silu_and_mul(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """SiluAndMul of vLLM: (..., 2 d) to (..., d)."""
    width = x.shape[-1] // 2
    if width % WIDTH or not x.is_contiguous():
        plain: torch.Tensor = layer.forward_native(x)
        return plain
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
    torch.ops._C.silu_and_mul(out, x)
    return out


def _short(layer_class: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of this class of layers, and where nothing else can be meant the product and the update at once."""

    def short_forward(layer: Any, input_: torch.Tensor) -> Any:
        own = layer.__dict__
        base = own.get("hotshoe_plain_base")
        if base is None:
            base = own["hotshoe_plain_base"] = _plain_base(layer, layer_class)
        if base is False or input_.ndim != 2 or torch.compiler.is_compiling():
            return forward(layer, input_)
        output = base.cpu_linear(input_, base.weight, base.bias)
        own["punica_wrapper"].add_lora_linear(
            output, input_, own["lora_a_stacked"], own["lora_b_stacked"], 1.0, own["output_slices"]
        )
        return (output, None) if base.return_bias else output

    return short_forward


def _plain_base(layer: Any, layer_class: type) -> Any:
    """The layer below, or False where more is to be done than a product in one process and without quantization."""
    from vllm.model_executor.layers import linear

    plain = (
        *(linear.ColumnParallelLinear, linear.MergedColumnParallelLinear),
        *(linear.QKVParallelLinear, linear.RowParallelLinear),
    )
    base: Any = layer.base_layer
    is_plain = (
        layer.tp_size == 1
        and type(base) in plain
        and type(base.quant_method) is linear.UnquantizedLinearMethod
        and not base.skip_bias_add
        and hasattr(base, "cpu_linear")
        and type(layer) is layer_class  # and no class below it, which may compute otherwise
    )
    return base if is_plain else False
