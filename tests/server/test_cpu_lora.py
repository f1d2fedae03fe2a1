"""The wrapper that vLLM's CPU platform gets from us, through vLLM's own classes: right where stock is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.bases import BaseModel
from server.vllm_plugin.kernel_build import find_compiler
from server.vllm_plugin.linear import KernelUpdate, TorchUpdate

pytestmark = [
    pytest.mark.model,  # importing vLLM takes seconds
    pytest.mark.filterwarnings("ignore"),
]
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")
SLOTS, MAX_RANK, IN_FEATURES, SIZES = 4, 8, 16, (12, 4, 4)
IDS: list[int | None] = [11, 12, 13, 14]


@pytest.fixture(params=["torch", pytest.param("c", marks=needs_compiler)])
def wrappers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The grouped class, on torch's products and on the kernel, and stock's, by name."""
    import warnings

    monkeypatch.setenv("HOTSHOE_LORA_KERNEL", request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from server.vllm_plugin.cpu_lora import GroupedLoraWrapper, PunicaWrapperCPU

    return {"grouped": GroupedLoraWrapper, "stock": PunicaWrapperCPU}


def full_slots() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    random = torch.Generator().manual_seed(0)
    lora_a = tuple(torch.randn(SLOTS, 1, MAX_RANK, IN_FEATURES, generator=random) for _ in SIZES)
    lora_b = tuple(torch.randn(SLOTS, 1, size, MAX_RANK, generator=random) for size in SIZES)
    return lora_a, lora_b


def applied(wrapper_class: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y and y after the layer's update for a batch whose rows belong to adapters `ids`, 0 for the base."""
    wrapper = wrapper_class(64, max_batches=64, device="cpu")
    mapping = SimpleNamespace(index_mapping=tuple(ids), prompt_mapping=tuple(ids), is_prefill=True)
    wrapper.update_metadata(mapping, IDS, SLOTS + 1, 100)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(len(ids), IN_FEATURES, generator=random)
    y = torch.randn(len(ids), sum(SIZES), generator=random)
    result = y.clone()
    wrapper.add_lora_linear(result, x, *full_slots(), 1.0, SIZES)
    return x, y, result


def test_base_rows_beside_adapters_stay_as_they_are_with_every_slot_full(wrappers: Any) -> None:
    _, y, result = applied(wrappers["grouped"], [0, 11, 0, 14, 12])
    assert torch.equal(result[[0, 2]], y[[0, 2]])
    assert not torch.allclose(result[[1, 3, 4]], y[[1, 3, 4]])


def test_stock_gives_base_rows_the_last_slots_update(wrappers: Any) -> None:
    """The upstream bug that the grouped path is for (vllm-project/vllm#48421): when this fails, vLLM has mended it."""
    _, y, result = applied(wrappers["stock"], [0, 11, 0, 14, 12])
    assert not torch.allclose(result[[0, 2]], y[[0, 2]])


@pytest.mark.parametrize("ids", [[11] * 5, [11, 12, 13, 14, 11, 12], [14, 13, 13]])
def test_where_stock_is_right_the_grouped_path_gives_the_same(wrappers: Any, ids: list[int]) -> None:
    expected, result = applied(wrappers["stock"], ids)[2], applied(wrappers["grouped"], ids)[2]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("ids", [[11] * 3, [0, 12, 0, 14, 12, 12, 0, 12]])
def test_shrink_and_expand_apart_give_what_the_whole_layer_gives(wrappers: Any, ids: list[int]) -> None:
    x, y, expected = applied(wrappers["grouped"], ids)
    wrapper = wrappers["grouped"](64, max_batches=64, device="cpu")
    mapping = SimpleNamespace(index_mapping=tuple(ids), prompt_mapping=tuple(ids), is_prefill=True)
    wrapper.update_metadata(mapping, IDS, SLOTS + 1, 100)
    lora_a, lora_b = full_slots()
    buffers = tuple(torch.zeros(len(ids), MAX_RANK) for _ in SIZES)
    wrapper.add_shrink(buffers, x, lora_a, 1.0)
    wrapper.add_expand(y, buffers, lora_b, SIZES)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)


def test_logits_and_embeddings_leave_base_rows_alone(wrappers: Any) -> None:
    ids = [0, 12, 0, 14]
    wrapper = wrappers["grouped"](64, max_batches=64, device="cpu")
    mapping = SimpleNamespace(index_mapping=tuple(ids), prompt_mapping=tuple(ids), is_prefill=True)
    wrapper.update_metadata(mapping, IDS, SLOTS + 1, 100)
    (a, *_), (b, *_) = full_slots()
    x, y = torch.randn(4, IN_FEATURES), torch.randn(4, 14)  # two columns of padding
    logits = y.clone()
    wrapper.add_lora_logits(logits, x, a, b, 0.5)
    expected = y[1, :12] + 0.5 * x[1] @ a[1, 0].T @ b[1, 0].T
    torch.testing.assert_close(logits[1, :12], expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(logits[[0, 2]], y[[0, 2]])
    assert torch.equal(logits[:, 12:], y[:, 12:])
    embedded, rows = torch.zeros(4, 12), torch.randn(4, MAX_RANK)
    wrapper.add_lora_embedding(embedded, rows, b)
    torch.testing.assert_close(embedded[3], rows[3] @ b[3, 0].T, atol=1e-5, rtol=1e-5)
    assert not embedded[[0, 2]].any()


def test_a_slot_that_is_set_again_gives_the_new_adapters_update(wrappers: Any) -> None:
    wrapper = wrappers["grouped"](64, max_batches=64, device="cpu")
    mapping = SimpleNamespace(index_mapping=(12,), prompt_mapping=(12,), is_prefill=True)
    wrapper.update_metadata(mapping, IDS, SLOTS + 1, 100)
    lora_a, lora_b = full_slots()
    x = torch.randn(1, IN_FEATURES)
    first, second = torch.zeros(1, sum(SIZES)), torch.zeros(1, sum(SIZES))
    wrapper.add_lora_linear(first, x, lora_a, lora_b, 1.0, SIZES)
    for stacked in lora_a:
        stacked[1] *= 2
    wrapper.forget_slot(lora_a, 1)
    wrapper.add_lora_linear(second, x, lora_a, lora_b, 1.0, SIZES)
    torch.testing.assert_close(second, 2 * first, atol=1e-4, rtol=1e-5)
    widths = [-(-size // 8) * 8 if isinstance(wrapper.linear, KernelUpdate) else size for size in SIZES]
    used = 1 if isinstance(wrapper.linear, TorchUpdate) else SLOTS  # torch's form packs what a batch needs
    assert wrapper.packed_bytes == used * sum(4 * MAX_RANK * (IN_FEATURES + width) for width in widths)


def test_installing_twice_routes_vllms_own_layers_through_the_grouped_path_once(wrappers: Any) -> None:
    """In a process of its own: installing changes vLLM's classes."""
    program = """
        import torch
        from types import SimpleNamespace
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
        from server.vllm_plugin import cpu_lora
        cpu_lora.register(); cpu_lora.register()
        from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
        from vllm.platforms import current_platform
        wrapper = get_punica_wrapper(64, max_batches=64, device="cpu")
        assert type(wrapper).__name__ == "GroupedLoraWrapper", wrapper
        layer = SimpleNamespace(n_slices=1, punica_wrapper=wrapper, tp_size=1, output_slices=(12,),
            lora_a_stacked=(torch.zeros(2, 1, 8, 16),), lora_b_stacked=(torch.zeros(2, 1, 12, 8),))
        layer.hotshoe_reset_lora = lambda index: BaseLinearLayerWithLoRA.hotshoe_reset_lora(layer, index)
        layer.reset_lora = lambda index: BaseLinearLayerWithLoRA.reset_lora(layer, index)
        mapping = SimpleNamespace(index_mapping=(5,), prompt_mapping=(5,), is_prefill=True)
        wrapper.update_metadata(mapping, [5, None], 3, 100)
        for rank in (2, 8, 1):
            a, b, x = torch.randn(rank, 16), torch.randn(12, rank), torch.randn(1, 16)
            BaseLinearLayerWithLoRA.set_lora(layer, 0, a, b)
            y = torch.zeros(1, 12)
            wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, (12,))
            torch.testing.assert_close(y, x @ a.T @ b.T, atol=1e-4, rtol=1e-5)
        print("as it must be")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.stdout.strip().endswith("as it must be"), done.stderr[-2000:]


def test_the_operator_of_a_compiled_model_follows_the_batch_without_being_traced_again() -> None:
    """In a process of its own: an operator's name is the process's. aot_eager traces as inductor does, without C++."""
    program = """
        import torch
        from types import SimpleNamespace
        from server.vllm_plugin.compiled import LinearOperator
        from server.vllm_plugin.cpu_lora import GroupedLoraWrapper
        wrapper = GroupedLoraWrapper(64, max_batches=64, device="cpu")
        layers = [
            SimpleNamespace(punica_wrapper=wrapper, output_slices=(12, 4), lora_a_stacked=tuple(
                torch.randn(3, 1, 8, 16) for _ in range(2)), lora_b_stacked=(
                torch.randn(3, 1, 12, 8), torch.randn(3, 1, 4, 8)))
            for _ in range(2)
        ]
        operator = LinearOperator()
        numbers = [operator.number_of(layer) for layer in layers]
        assert numbers == [0, 1] and operator.number_of(layers[1]) == 1
        weight, traces = torch.randn(16, 16), []

        def model(x):
            for number in numbers:
                y = x @ weight
                operator.call(y, x, number)
                x = torch.relu(y)
            return x

        def backend(graph, inputs):
            traces.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        for ids in ([11] * 3, [0, 12, 0, 13, 12, 12, 0, 12], [0] * 5, [13, 12]):
            mapping = SimpleNamespace(index_mapping=tuple(ids), prompt_mapping=tuple(ids), is_prefill=True)
            wrapper.update_metadata(mapping, [11, 12, 13], 4, 100)
            x = torch.randn(len(ids), 16)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-5)
            plain = torch.relu(torch.relu(x @ weight) @ weight)
            base = [row for row, number in enumerate(ids) if number == 0]
            others = [row for row, number in enumerate(ids) if number]
            torch.testing.assert_close(compiled(x)[base], plain[base], atol=1e-4, rtol=1e-5)
            assert not others or not torch.allclose(compiled(x)[others], plain[others])
        assert len(traces) == 1, len(traces)
        print("as it must be")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.stdout.strip().endswith("as it must be"), done.stderr[-2000:]


def test_compilation_is_kept_with_lora_only_where_the_switch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.vllm_plugin import compiled

    for word, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("HOTSHOE_LORA_COMPILE", word)
        assert compiled.is_wanted() is expected
    monkeypatch.setenv("HOTSHOE_LORA_COMPILE", "yes")
    with pytest.raises(ValueError, match="takes 0 or 1"):
        compiled.is_wanted()


def test_compilation_is_kept_for_the_projections_and_for_nothing_that_looks_at_the_batch(
    embedded_base: BaseModel,
) -> None:
    """vLLM's own configuration, as its engine would start with it."""
    program = f"""
        from server.vllm_plugin import cpu_lora
        from adapters.bases import PROJECTIONS
        cpu_lora.register(); cpu_lora.register()
        from vllm.engine.arg_utils import EngineArgs
        def mode(**flags):
            made = EngineArgs(model={str(embedded_base.folder)!r}, enable_lora=True, dtype="float32", **flags)
            return made.create_engine_config().compilation_config.mode.name
        print(
            mode(lora_target_modules=list(PROJECTIONS)),
            mode(lora_target_modules=list(PROJECTIONS), enforce_eager=True),
            mode(),
            mode(lora_target_modules=list(PROJECTIONS), fully_sharded_loras=True),
        )
    """
    found = {}
    for word in ("1", "0"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            env={**os.environ, "HOTSHOE_LORA_COMPILE": word, "VLLM_PLUGINS": "hotshoe_cpu_lora"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[word] = done.stdout.splitlines()[-1]
    assert found == {"1": "DYNAMO_TRACE_ONCE NONE NONE NONE", "0": "NONE NONE NONE NONE"}
