"""The merge against PEFT's own, over the shapes, dtypes and LoRA settings that PEFT knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.bases import BaseModel, load_base
from adapters.merge import merge, plan_merge
from adapters.readback import verify_weights
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2, tiny_qwen3

PATTERNS = {
    "rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "down_proj": 7},
    "alpha_pattern": {"model.layers.1.mlp.up_proj": 3.0},
}
LORA: dict[str, dict[str, Any]] = {
    "plain": {"rank": 8, "alpha": 16},
    "rslora": {"rank": 8, "alpha": 16, "use_rslora": True},
    "patterns": {"rank": 4, "alpha": 8, **PATTERNS},
    "patterns_rslora_bf16_adapter": {"rank": 4, "alpha": 8, "use_rslora": True, "dtype": "BF16", **PATTERNS},
    "two_targets_one_layer": {
        "rank": 1,
        "alpha": 1,
        "targets": ["q_proj", "v_proj"],
        "layers": [1],
        "config": {"layers_to_transform": [1]},
    },
}
BASES: dict[str, Any] = {
    "qwen2_tied_f32": (tiny_qwen2, True, "float32", None),
    "qwen2_untied_bf16_sharded": (tiny_qwen2, False, "bfloat16", "100KB"),
    "qwen2_tied_f16": (tiny_qwen2, True, "float16", None),
    "qwen3_tied_bf16": (tiny_qwen3, True, "bfloat16", None),
    "qwen3_untied_f32_sharded": (tiny_qwen3, False, "float32", "100KB"),
}


def make_base(folder: Path, kind: str) -> BaseModel:
    from transformers import AutoModelForCausalLM

    make, is_tied, dtype, shard = BASES[kind]
    make(folder, tokenizer="bytes", tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return load_base(folder)


@pytest.fixture(scope="module", params=BASES)
def base(request: Any, tmp_path_factory: Any) -> BaseModel:
    return make_base(tmp_path_factory.mktemp("base") / request.param, request.param)


def merged_by_peft(base: BaseModel, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.folder)
    merged: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return merged


def merged_by_us(base: BaseModel, adapter: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    out.mkdir()
    plan = plan_merge(adapter, base, dtype=options.pop("dtype", None))
    merge(plan, out, **options)
    report = verify_weights(plan, out)
    assert report.problems == []
    return {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("lora", LORA)
def test_merge_equals_peft_to_one_unit_in_the_last_place(base: BaseModel, lora: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **LORA[lora])
    theirs, ours = merged_by_peft(base, adapter), merged_by_us(base, adapter, tmp_path / "out")
    if base.is_tied:
        assert "lm_head.weight" not in ours
        theirs.pop("lm_head.weight", None)
    assert ours.keys() == theirs.keys()
    changed = {update.module + ".weight" for update in plan_merge(adapter, base).updates}
    original = {k: v for path in base.folder.glob("*.safetensors") for k, v in load_file(path).items()}
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == original[name].dtype
        if name not in changed:
            assert torch.equal(tensor, original[name]), name
            continue
        assert not torch.equal(tensor, original[name]), name
        epsilon = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor, theirs[name], rtol=epsilon, atol=1e-7, msg=name)
        assert (tensor == theirs[name]).float().mean() > (0.999 if tensor.dtype != torch.float32 else 0.5), name
