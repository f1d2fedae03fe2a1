"""Steps of an eager model on a CPU: vLLM's kernels where they may be used, and the sums of vLLM's own forms."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from adapters.bases import BaseModel

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]  # importing vLLM takes seconds

LAYERS = """
    import torch
    from types import SimpleNamespace
    from server.vllm_plugin import cpu_lora
    cpu_lora.register(); cpu_lora.register()
    from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
    from vllm.config.compilation import CompilationConfig
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.platforms import current_platform

    kernels = {name: 0 for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul", "rotary_embedding")}
    for name in kernels:
        def counted(*arguments, name=name, kernel=getattr(torch.ops._C, name)):
            kernels[name] += 1
            return kernel(*arguments)
        setattr(torch.ops._C, name, counted)

    def close(found, expected, dtype):
        for one, other in zip(found, expected, strict=True):
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(one, other, atol=bound, rtol=bound)

    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    with set_current_vllm_config(config):
        assert current_platform.opaque_attention_op() is False
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            for width, is_for_kernel in ((96, True), (100, False)):
                norm = RMSNorm(width, dtype=dtype)
                norm.weight.data.uniform_(0.5, 2)
                kernels["rms_norm"] = kernels["fused_add_rms_norm"] = kernels["silu_and_mul"] = 0
                x, residual = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype)
                close((norm(x),), (norm.forward_native(x),), dtype)
                strided = torch.randn(5, 3 * width).to(dtype)[:, width : 2 * width].view(5, 1, width)
                close((norm(strided),), (norm.forward_native(strided),), dtype)  # as Qwen3 norms a part of q, k and v
                expected = norm.forward_native(x.clone(), residual.clone())
                close(norm(x.clone(), residual.clone()), expected, dtype)
                apart = torch.randn(5, 2 * width).to(dtype)[:, :width]
                close(norm(apart, residual.clone()), norm.forward_native(apart.clone(), residual.clone()), dtype)
                both = torch.randn(5, 2 * width).to(dtype)
                close((SiluAndMul()(both),), (SiluAndMul.forward_native(both),), dtype)
                used = [kernels[name] for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul")]
                assert used == ([2, 1, 1] if is_for_kernel else [0, 0, 0]), (width, used)
            rope = get_rope(64, 128, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, dtype=dtype)
            positions = torch.tensor([0, 3, 100])
            query, key = torch.randn(3, 4 * 64).to(dtype), torch.randn(3, 2 * 64).to(dtype)
            expected = rope.forward_native(positions, query.clone(), key.clone())
            close(rope(positions, query.clone(), key.clone()), expected, dtype)
        assert kernels["rotary_embedding"] == 2
    print("kernels used")
"""

LINEAR = """
    import tempfile
    from vllm.config import LoRAConfig
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA, MergedQKVParallelLinearWithLoRA
    from vllm.lora.layers import RowParallelLinearWithLoRA
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    def made(layer_class, base):
        for parameter in base.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        base.quant_method.process_weights_after_loading(base)
        layer = layer_class(base)
        layer.create_lora_weights(2, LoRAConfig(max_loras=2, max_lora_rank=8, lora_dtype=torch.float32), None)
        layer.set_mapping(wrapper)
        return layer

    def adapted(layer):
        side = [torch.randn(4, 64) / 8 for _ in range(layer.n_slices)], [
            torch.randn(size, 4) for size in layer.output_slices
        ]
        layer.set_lora(0, *(side if layer.n_slices > 1 else (side[0][0], side[1][0])))
        return layer

    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.manual_seed(0)
        wrapper = cpu_lora.GroupedLoraWrapper(64, max_batches=64, device="cpu")
        mapping = SimpleNamespace(index_mapping=(0, 5, 0), prompt_mapping=(0, 5, 0), is_prefill=True)
        wrapper.update_metadata(mapping, [5, None], 3, 100)
        x = torch.randn(3, 64)
        for layer, is_short in (
            (made(MergedQKVParallelLinearWithLoRA, QKVParallelLinear(64, 16, 4, 2, bias=True)), True),
            (made(MergedColumnParallelLinearWithLoRA, MergedColumnParallelLinear(64, [48, 48], bias=False)), True),
            (made(RowParallelLinearWithLoRA, RowParallelLinear(64, 32, bias=True)), True),
            (made(RowParallelLinearWithLoRA, RowParallelLinear(64, 32, bias=True, return_bias=False)), True),
            (made(RowParallelLinearWithLoRA, RowParallelLinear(64, 32, bias=True, skip_bias_add=True)), False),
        ):
            adapted(layer)
            found = layer(x)
            assert (layer.__dict__["hotshoe_plain_base"] is layer.base_layer) is is_short
            layer.__dict__["hotshoe_plain_base"] = False
            expected = layer(x)
            alone = layer.base_layer(x)
            assert type(found) is type(expected)
            found, expected, alone = (one if type(one) is tuple else (one, None) for one in (found, expected, alone))
            assert torch.equal(found[0], expected[0]) and (found[1] is None) is (expected[1] is None)
            assert torch.equal(found[0][[0, 2]], alone[0][[0, 2]]) and not torch.allclose(found[0][1], alone[0][1])
    print("short ways taken")
"""

CONFIGURED = """
    import sys
    from adapters.bases import PROJECTIONS
    from vllm.engine.arg_utils import EngineArgs

    def chosen(**flags):
        made = EngineArgs(model=sys.argv[1], dtype="float32", **flags).create_engine_config()
        with set_current_vllm_config(made):
            is_opaque = current_platform.opaque_attention_op()
        return sorted(name for name in made.compilation_config.custom_ops if name[0] in "+-"), is_opaque
    ours = ["+rms_norm", "+rotary_embedding", "+silu_and_mul"]
    assert chosen(enable_lora=True, lora_target_modules=list(PROJECTIONS)) == (ours, False)
    named = chosen(enable_lora=True, compilation_config={"custom_ops": ["none", "-rms_norm"]})
    assert named == ([*ours[1:], "-rms_norm"], False), named
    assert chosen() == ([], True), "a compiled model is left alone"
    print("operators chosen")
"""


def test_eager_models_run_on_vllms_kernels_and_short_ways_with_the_sums_of_its_plain_forms(
    embedded_base: BaseModel,
) -> None:
    """In one process of its own: installing changes vLLM's classes, and importing it takes seconds."""
    program = "".join(map(textwrap.dedent, (LAYERS, LINEAR, CONFIGURED)))
    done = subprocess.run(
        [sys.executable, "-c", program, str(embedded_base.folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "VLLM_PLUGINS": "hotshoe_cpu_lora"},
    )
    said = [
        line for line in done.stdout.splitlines() if line in ("kernels used", "short ways taken", "operators chosen")
    ]
    assert said == ["kernels used", "short ways taken", "operators chosen"], done.stderr[-3000:]


def test_the_switch_takes_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.vllm_plugin import eager

    for word, expected in (("", True), ("1", True), ("0", False)):
        monkeypatch.setenv("HOTSHOE_EAGER_STEPS", word)
        assert eager.is_wanted() is expected
    monkeypatch.setenv("HOTSHOE_EAGER_STEPS", "no")
    with pytest.raises(ValueError, match="takes 0 or 1"):
        eager.is_wanted()
