"""Random shapes, ranks, patterns, dtypes, tying and shard layouts: a new base and adapter each time, against PEFT."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters.bases import PROJECTIONS, BaseModel, load_base
from adapters.merge import merge, plan_merge
from adapters.readback import verify_weights
from tests.fixtures.adapters import write_adapter

numbers = itertools.count()


@dataclass(frozen=True)
class Case:
    """One base and one adapter to make."""

    family: str
    heads: tuple[int, int, int]  # attention heads, key-value heads, head_dim
    sizes: tuple[int, int, int]  # hidden, intermediate, layers
    is_tied: bool
    dtype: str
    shard: str | None
    lora: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    key_value = draw(st.sampled_from([1, 2]))
    heads = (key_value * draw(st.integers(1, 3)), key_value, draw(st.sampled_from([4, 8, 10])))
    sizes = (draw(st.sampled_from([8, 12, 24, 34])), draw(st.integers(5, 40)), draw(st.integers(1, 3)))
    targets = draw(st.lists(st.sampled_from(PROJECTIONS), min_size=1, max_size=7, unique=True))
    names = [f"model.layers.{sizes[2] - 1}.{part}.{p}" for p in targets for part in (_part(p),)]
    pattern = st.dictionaries(st.sampled_from([*targets, *names]), st.integers(1, 9), max_size=3)
    lora = {
        "rank": draw(st.integers(1, 12)),
        "alpha": draw(st.sampled_from([1, 4, 16, 12.5])),
        "targets": targets,
        "seed": draw(st.integers(0, 1000)),
        "scale": draw(st.sampled_from([0.001, 0.02, 1.0])),
        "dtype": draw(st.sampled_from(["F32", "F16", "BF16"])),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(pattern),
        "alpha_pattern": draw(pattern),
    }
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    shard = draw(st.sampled_from([None, "3KB", "20KB"]))
    return Case(draw(st.sampled_from(["Qwen2", "Qwen3"])), heads, sizes, draw(st.booleans()), dtype, shard, lora)


def _part(projection: str) -> str:
    return "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def make_base(case: Case, folder: Path) -> BaseModel:
    import transformers

    config = getattr(transformers, f"{case.family}Config")(
        vocab_size=31,
        hidden_size=case.sizes[0],
        intermediate_size=case.sizes[1],
        num_hidden_layers=case.sizes[2],
        num_attention_heads=case.heads[0],
        num_key_value_heads=case.heads[1],
        head_dim=case.heads[2],
        tie_word_embeddings=case.is_tied,
        initializer_range=0.2,
    )
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).to(getattr(torch, case.dtype))
    model.save_pretrained(folder, **({"max_shard_size": case.shard} if case.shard else {}))
    return load_base(folder)


def merged_equals_peft(case: Case, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(case, folder / "base")
    adapter = write_adapter(folder / "adapter", base, **case.lora)
    (folder / "out").mkdir()
    plan = plan_merge(adapter, base)
    merge(plan, folder / "out")
    assert verify_weights(plan, folder / "out").problems == []
    ours = {name: value for path in (folder / "out").glob("*.safetensors") for name, value in load_file(path).items()}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), adapter)
    theirs = model.merge_and_unload().state_dict()
    if case.is_tied:
        theirs.pop("lm_head.weight")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        epsilon = torch.finfo(value.dtype).eps
        largest = float(theirs[name].abs().max())
        torch.testing.assert_close(value, theirs[name], rtol=epsilon, atol=largest * 1e-6, msg=name)


def fuzz(examples: int, tmp_path: Path) -> Callable[[], None]:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def run(case: Case) -> None:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        merged_equals_peft(case, folder)

    return run


def test_ten_random_merges_equal_those_of_peft(tmp_path: Path) -> None:
    fuzz(10, tmp_path)()


@pytest.mark.long
def test_three_hundred_random_merges_equal_those_of_peft(tmp_path: Path) -> None:
    fuzz(300, tmp_path)()
