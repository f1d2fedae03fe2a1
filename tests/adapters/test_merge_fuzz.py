"""Random shapes, ranks, patterns, dtypes, tying and shard layouts: a new base and adapter each time, against PEFT.

Bases are built in memory from a config and written here byte by byte: any order of tensors, any number of shards. So a
case takes some hundredths of a second, and hundreds fit into an ordinary run.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters.bases import PROJECTIONS, SINGLE_WEIGHTS, WEIGHT_INDEX, BaseModel, load_base
from adapters.checkpoint import read_header
from adapters.merge import merge, plan_merge
from adapters.readback import verify_weights
from tests.fixtures.adapters import write_adapter, write_raw_safetensors

numbers = itertools.count()
DTYPES = ("float32", "bfloat16", "float16")
CODES = dict(zip(DTYPES, ("F32", "BF16", "F16"), strict=True))
INVERSE_FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"  # a buffer that old checkpoints carry


@dataclass(frozen=True)
class Case:
    """One base and one adapter to make, and how to merge them. `out` is None for the base's own dtype."""

    family: str
    config: dict[str, Any]
    dtype: str
    out: str | None
    shards: int
    order: int  # seed of the order of tensors over and within the shards
    stores: tuple[bool, bool]  # a tied output layer that is stored all the same; an old buffer
    workers: int
    lora: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    key_value, family = draw(st.integers(1, 3)), draw(st.sampled_from(["Qwen2", "Qwen3"]))
    layers, is_tied = draw(st.integers(1, 3)), draw(st.booleans())
    config = {
        "vocab_size": draw(st.integers(3, 70)),
        "hidden_size": draw(st.integers(2, 40)),
        "intermediate_size": draw(st.integers(1, 50)),
        "num_hidden_layers": layers,
        "num_key_value_heads": key_value,
        "num_attention_heads": key_value * draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([2, 4, 6, 10, 16])),
        "tie_word_embeddings": is_tied,
        "attention_bias": family == "Qwen3" and draw(st.booleans()),
        "initializer_range": draw(st.sampled_from([0.02, 0.2])),
    }
    return Case(
        family=family,
        config=config,
        dtype=draw(st.sampled_from(DTYPES)),
        out=draw(st.sampled_from([None, *DTYPES])),
        shards=draw(st.integers(1, 5)),
        order=draw(st.integers(0, 1000)),
        stores=(is_tied and draw(st.booleans()), draw(st.booleans())),
        workers=draw(st.integers(1, 4)),
        lora=draw(loras(layers)),
    )


@st.composite
def loras(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """The fields of an AdapterSpec; patterns name a projection, or a module of one layer."""
    targets = draw(st.lists(st.sampled_from(PROJECTIONS), min_size=1, max_size=7, unique=True))
    some = draw(st.none() | st.lists(st.integers(0, layers - 1), min_size=1, unique=True))
    modules = [f"model.layers.{n}.{_part(p)}.{p}" for n in some or range(layers) for p in targets]
    pattern = st.sampled_from([*targets, *modules])
    return {
        "rank": draw(st.integers(1, 12)),
        "alpha": draw(st.sampled_from([1, 3, 16, 12.5])),
        "targets": targets,
        "seed": draw(st.integers(0, 1000)),
        "scale": draw(st.sampled_from([0.001, 0.02, 1.0])),
        "dtype": draw(st.sampled_from(["F32", "F16", "BF16"])),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(pattern, st.integers(1, 9), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(pattern, st.sampled_from([1, 2, 7, 0.5]), max_size=3)),
        "layers": some,
        "config": {} if some is None else {"layers_to_transform": some},
    }


def _part(projection: str) -> str:
    return "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def make_base(case: Case, folder: Path) -> tuple[BaseModel, Any]:
    """The base's folder and the same model in memory."""
    import transformers

    config = getattr(transformers, f"{case.family}Config")(**case.config)
    torch.manual_seed(case.order)
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).to(getattr(torch, case.dtype)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms, which start out as zeros and ones
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    folder.mkdir()
    described = {**config.to_dict(), "architectures": [f"{case.family}ForCausalLM"], "dtype": case.dtype}
    (folder / "config.json").write_text(json.dumps(described))
    stored = dict(model.state_dict())
    if case.config["tie_word_embeddings"] and not case.stores[0]:
        del stored["lm_head.weight"]
    if case.stores[1]:
        stored[INVERSE_FREQUENCIES] = torch.ones(case.config["head_dim"] // 2, dtype=getattr(torch, case.dtype))
    write_shards(folder, stored, case)
    return load_base(folder), model


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], case: Case) -> None:
    """Every tensor in some shard, in some order."""
    chance = random.Random(case.order)
    names = sorted(tensors)
    chance.shuffle(names)
    shards: list[list[str]] = [[] for _ in range(case.shards)]
    for name in names:
        chance.choice(shards).append(name)
    files = {f"model-{i + 1:05d}-of-{case.shards:05d}.safetensors": one for i, one in enumerate(shards) if one}
    if case.shards == 1:
        files = {SINGLE_WEIGHTS: names}
    else:
        where = {name: file for file, held in files.items() for name in held}
        (folder / WEIGHT_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for file, held in files.items():
        entries = [(n, CODES[case.dtype], list(tensors[n].shape), tensors[n].view(-1).view(torch.uint8)) for n in held]
        write_raw_safetensors(folder / file, [(n, c, s, bytes(raw.numpy().tobytes())) for n, c, s, raw in entries])


def merged_by_peft(model: Any, adapter: Path, case: Case) -> dict[str, torch.Tensor]:
    """PEFT's own merge: in the base's dtype where that is the output's too, else in float32 and rounded once."""
    from peft import PeftModel

    if case.out is not None:
        model = model.float()
    merged: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return {name: value.to(getattr(torch, case.out or case.dtype)) for name, value in merged.items()}


def merged_equals_peft(case: Case, folder: Path) -> None:
    base, model = make_base(case, folder / "base")
    adapter = write_adapter(folder / "adapter", base, **case.lora)
    (folder / "out").mkdir()
    plan = plan_merge(adapter, base, dtype=case.out)
    merge(plan, folder / "out", workers=case.workers)
    report = verify_weights(plan, folder / "out")
    assert report.problems == [] and all(check.outside == 0 for check in report.changed)
    names = [path.name for path in base.folder.glob("*.safetensors*")]
    assert sorted(names) == sorted(path.name for path in (folder / "out").iterdir()), "shards keep their layout"
    ours: dict[str, torch.Tensor] = {}
    for name in names:
        if name != WEIGHT_INDEX:
            order = [tensor.name for tensor in read_header(base.folder / name)]
            assert [tensor.name for tensor in read_header(folder / "out" / name)] == order
            ours |= load_file(folder / "out" / name)
    theirs = merged_by_peft(model, adapter, case)
    ours.pop(INVERSE_FREQUENCIES, None)
    if "lm_head.weight" not in ours:
        assert case.config["tie_word_embeddings"]
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
        shutil.rmtree(folder)

    return run


def test_three_hundred_random_merges_equal_those_of_peft(tmp_path: Path) -> None:
    fuzz(300, tmp_path)()


@pytest.mark.long
def test_five_thousand_random_merges_equal_those_of_peft(tmp_path: Path) -> None:
    fuzz(5000, tmp_path)()
