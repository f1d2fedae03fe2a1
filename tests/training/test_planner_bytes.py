"""The planner's exact part: parameters, adapter, NF4 and optimizer bytes against real models of the same shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import PROJECTIONS, load_base
from adapters.errors import BaseInvalid
from bench.planner_fake import config_of, fake_model
from tests.training.test_packed import settings
from training.model import load_model
from training.planner.sizes import SIZES, Architecture, find, of_config
from training.planner.weights import EIGHT_BIT, fixed_bytes, frozen_bytes
from training.planner.work import Method

GIB = 2**30
LORA = Method(16, PROJECTIONS, 2)
SMALL = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32}
FACTS = {  # millions of adapter parameters at rank 16, GiB of 16-bit weights, GiB in NF4
    "Qwen2.5-0.5B": (8.8, 0.9, 0.43),
    "Qwen2.5-1.5B": (18.5, 2.9, 1.06),
    "Qwen2.5-3B": (29.9, 5.7, 1.91),
    "Qwen2.5-7B": (40.4, 14.2, 5.17),
    "Qwen2.5-14B": (68.8, 27.5, 9.25),
    "Qwen3-0.6B": (10.1, 1.1, 0.50),
    "Qwen3-1.7B": (17.4, 3.2, 1.26),
    "Qwen3-4B": (33.0, 7.5, 2.47),
    "Qwen3-8B": (43.6, 15.3, 5.66),
    "Qwen3-14B": (64.2, 27.5, 9.25),
}


def sizes_of(model: Any) -> tuple[int, int]:
    """(all parameters, those of the adapter)."""
    counts = {name: value.numel() for name, value in model.named_parameters()}
    adapter = sum(count for name, count in counts.items() if "lora_" in name)
    return sum(counts.values()), adapter


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_every_size_has_the_parameters_of_transformers_model(size: Architecture) -> None:
    few = replace(size, layers=2)
    total, adapter = sizes_of(fake_model(few, LORA))
    assert adapter == few.lora_parameters(16)
    assert total - adapter == few.parameters


@pytest.mark.parametrize("name", FACTS)
def test_full_depth_has_the_figures_that_were_published(name: str) -> None:
    size, (adapter, plain, quantised) = find(name), FACTS[name]
    assert size.lora_parameters(16) / 1e6 == pytest.approx(adapter, abs=0.06)
    assert frozen_bytes(size, LORA) / GIB == pytest.approx(plain, abs=0.06)
    assert frozen_bytes(size, replace(LORA, is_quantised=True)) / GIB == pytest.approx(quantised, abs=0.006)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_loaded_model_holds_the_planned_bytes(method: Any, tmp_path: Path) -> None:
    from tests.fixtures.bases import tiny_qwen2

    base = load_base(tiny_qwen2(tmp_path / "base", **SMALL))
    of = of_config(base.config, "tiny", "config.json")
    planned = Method(0, (), 4) if method == "full" else Method(16, PROJECTIONS, 4, method == "qlora")
    fixed = fixed_bytes(of, planned, "adamw_torch")
    model = load_model(base, settings(method), "cpu")
    held = sum(value.nbytes for name, value in model.named_parameters() if "lora_" not in name)
    held += sum(scale.nbytes for module in model.modules() for scale in scales_of(module))
    adapter = sum(value.nbytes for name, value in model.named_parameters() if "lora_" in name)
    assert held == pytest.approx(fixed.weights, rel=0.001)
    assert adapter == fixed.adapter


def scales_of(module: Any) -> list[Any]:
    """The tensors of bitsandbytes' quantisation state; the code of the scales' scales is one for all layers."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)  # PEFT's layer shows its base's weight
    if state is None:
        return []
    return [state.absmax, state.code, state.offset, state.state2.absmax]


def test_adamw_holds_the_planned_state(qwen2_base: Path) -> None:
    import torch

    base = load_base(qwen2_base)
    of = of_config(base.config, "tiny", "config.json")
    model = load_model(base, settings("lora"), "cpu")
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for value in trained:
        value.grad = torch.ones_like(value)
    optimizer.step()
    moments = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    rank = settings("lora").rank
    assert moments == fixed_bytes(of, Method(rank, PROJECTIONS, 4), "adamw_torch").optimizer


def test_the_8_bit_state_is_what_bitsandbytes_makes_of_each_tensor() -> None:
    import bitsandbytes as bnb
    import torch

    from training.planner.weights import _state_bytes

    for count in (100, 4096, 5000):
        parameter = torch.nn.Parameter(torch.ones(count))
        optimizer = bnb.optim.AdamW8bit([parameter])
        parameter.grad = torch.ones(count)
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
        state = optimizer.state[parameter]
        held = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2") if key in state)
        assert _state_bytes(count, EIGHT_BIT, False) == held


def test_a_config_of_transformers_is_the_same_base_as_the_table(tmp_path: Path) -> None:
    for size in SIZES:
        config = {**config_of(size).to_dict(), "architectures": [architecture_of(size)]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = find(str(tmp_path))
        assert replace(read, name=size.name, licence=size.licence, dtype=size.dtype) == size
    assert find(str(tmp_path / "config.json")) == read


def architecture_of(size: Architecture) -> str:
    return "Qwen3ForCausalLM" if size.has_head_norms else "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("name", "same"),
    [("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"), ("qwen3-4b", "Qwen3-4B"), ("embedded", "embedded")],
)
def test_a_size_is_found_under_its_other_spellings(name: str, same: str) -> None:
    assert find(name).name == same


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen2.5-8B", "Nearest: .*Qwen2.5-7B"),
        ("Qwen3-30B-A3B", "mixture of experts"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "mixture of experts"),
        ("Qwen3.5-4B", "Qwen3.5 is not supported"),
    ],
)
def test_an_unknown_or_unsupported_base_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(BaseInvalid, match=said):
        find(name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "hidden_size": 8}, "lacks num_hidden_layers, num_attention_heads"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "mixture of experts"),
        (
            {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5"},
            "Qwen3.5, which the trainer does not know",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "is a LlamaForCausalLM; supported are"),
        ([], "no JSON object"),
    ],
)
def test_a_config_that_is_no_base_is_refused_with_what_is_wrong(config: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseInvalid, match=said):
        find(str(tmp_path))


def test_a_config_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(BaseInvalid, match="cannot be read as JSON"):
        find(str(tmp_path / "missing.json"))
