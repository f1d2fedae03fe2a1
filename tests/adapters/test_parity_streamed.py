"""A model that does not fit is compared layer by layer, with the logits of the whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.bases import BaseModel, load_base
from adapters.checkpoint import read_header
from adapters.child import run_child
from adapters.errors import MergeFailed
from adapters.export import ExportRequest, export
from adapters.merge import merge, plan_merge
from adapters.merge_plan import MergePlan
from adapters.parity_logits import Ground, base_logits, kept_positions, run
from adapters.parity_prompts import PROBE
from adapters.parity_report import Questions, prove, way_of
from adapters.parity_streamed import LAYER_BYTES, Streamed, memory_bytes
from adapters.parity_verdict import logits_problems
from tests.fixtures.adapters import QWEN25_7B, shape_only_base, write_adapter
from tests.fixtures.bases import tiny_qwen2, tiny_qwen3

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
KINDS: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "qwen2_tied_f32": (tiny_qwen2, {"tie_word_embeddings": True}, None),
    "qwen2_untied_bf16_sharded": (tiny_qwen2, {"tie_word_embeddings": False}, "bfloat16"),
    "qwen2_one_layer_with_a_window": (tiny_qwen2, {"tie_word_embeddings": True, **WINDOW}, "float16"),
    "qwen3_tied_f16": (tiny_qwen3, {"tie_word_embeddings": True}, "float16"),
    "qwen3_untied_f32_sharded": (tiny_qwen3, {"tie_word_embeddings": False, "attention_bias": True}, None),
}


def merged_plan(kind: str, folder: Path) -> tuple[MergePlan, Path]:
    """A base of that kind, an adapter that moves it, and the merged folder."""
    from transformers import AutoModelForCausalLM

    make, config, dtype = KINDS[kind]
    make(folder / "base", tokenizer="bytes", **config)
    if kind.endswith("sharded"):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        (folder / "base" / "model.safetensors").unlink()
        model.save_pretrained(folder / "base", max_shard_size="100KB")
    base = load_base(folder / "base")
    adapter = write_adapter(folder / "adapter", base, rank=4, scale=0.3, use_rslora=True, rank_pattern={"v_proj": 2})
    plan, out = plan_merge(adapter, base, dtype=dtype), folder / "out"
    out.mkdir()
    merge(plan, out)
    (out / "config.json").write_text(json.dumps(base.config))
    return plan, out


def streamed(plan: MergePlan, out: Path, dtype: str, ground: Ground) -> dict[str, Any]:
    written = {tensor.name: tensor for file in plan.files for tensor in read_header(out / file.name)}
    with torch.no_grad():
        return {name: one.logits[PROBE] for name, one in Streamed(plan, written, dtype).runs(ground).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_run_read_layer_by_layer_has_the_logits_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plan, out = merged_plan(kind, tmp_path)
    dtype = KINDS[kind][2] or "float32"
    rows = [list(b"one layer at a time"), [3], list(b"and all sequences together")]
    ground = Ground((), {PROBE: rows}, plan.base.config["vocab_size"], (), ())
    found = streamed(plan, out, dtype, ground)
    model = AutoModelForCausalLM.from_pretrained(plan.base.folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, plan.adapter).eval()
    expected = {"peft": run(adapted, ground, answers={}).logits[PROBE]}
    own = adapted.merge_and_unload()
    for parameter in own.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    expected["rounded"] = run(own, ground, answers={}).logits[PROBE]
    expected["merged"] = base_logits(str(out), "float32", ground)[PROBE]
    if dtype != "float32":
        expected["base"] = base_logits(str(plan.base.folder), "float32", ground)[PROBE]
        expected["narrow"] = base_logits(str(plan.base.folder), dtype, ground)[PROBE]
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        atol = 1e-5 if name != "narrow" else 0.05  # the order of sums in 16 bits
        for one, two in zip(found[name], logits, strict=True):
            np.testing.assert_allclose(one, two, atol=atol, rtol=1e-5, err_msg=name)
    assert max(np.abs(one - two).max() for one, two in zip(found["peft"], expected["peft"], strict=True)) < 1e-5
    bare = base_logits(str(plan.base.folder), "float32", ground)[PROBE]
    assert max(np.abs(one - two).max() for one, two in zip(found["peft"], bare, strict=True)) > 0.01, "no effect"


def test_whole_models_are_compared_where_they_fit_else_layers_else_nothing_but_weights(tmp_path: Path) -> None:
    base = shape_only_base(tmp_path / "base", **QWEN25_7B)
    plan = plan_merge(write_adapter(tmp_path / "adapter", base, layers=[0]), base, allow_shape_only=True)
    one, two = Questions(), Questions(evaluation=["a row"])
    by_layers = memory_bytes(plan, 1)
    assert by_layers < 7 << 30 < 28 << 30 < 4 * plan.weight_bytes // 2, "the whole in float32 would not fit in 28 GiB"
    assert way_of(plan, one, 64 << 30) == ("adapters.parity_logits", None)
    assert way_of(plan, one, 28 << 30) == way_of(plan, one, by_layers) == ("adapters.parity_streamed", None)
    module, reason = way_of(plan, two, by_layers)
    assert module is None and reason is not None
    assert f"{memory_bytes(plan, 2):,} layer by layer; {by_layers:,} are free" in reason


@pytest.mark.long
def test_the_report_of_layers_says_so_and_why_nothing_was_answered(tmp_path: Path) -> None:
    plan, out = merged_plan("qwen2_untied_bf16_sharded", tmp_path)
    spec = {"base": str(plan.base.folder), "adapter": str(plan.adapter), "merged": str(out), "dtype": "bfloat16"}
    spec |= {"plan_dtype": "bfloat16", "evaluation": ["Where is my parcel?", {"no": "messages"}]}
    found = run_child("adapters.parity_streamed", spec, MergeFailed)
    assert (found["forward"], found["answers"]) == ("layer_by_layer", None)
    assert "read a layer at a time" in found["answers_left_out"]
    whole = run_child("adapters.parity_logits", spec, MergeFailed)
    assert whole["forward"] == "whole" and "answers_left_out" not in whole
    for name in ("merged_against_peft", "rounding_floor", "dtype_floor"):  # over other positions: the whole has answers
        for one, two in ((found, whole), (found["evaluation"], whole["evaluation"])):
            assert 0.4 < one[name]["mean_abs"] / two[name]["mean_abs"] < 2.5, name
    nothing = prove(plan, out, with_logits=True, free_bytes=0, tell=lambda _: None)
    assert (nothing["verdict"], nothing["level"]) == ("passed", "weights_only") and "0 are free" in nothing["reason"]


PEAK = """
import json, resource, sys
from pathlib import Path
from adapters.parity_streamed import streamed
import numpy, peft, transformers.models.qwen2.modeling_qwen2  # noqa: F401
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
streamed(json.loads(Path(sys.argv[1]).read_text()))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.long
def test_the_peak_of_layers_is_two_of_them_whatever_the_number_of_layers(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = Qwen2Config(vocab_size=300, num_hidden_layers=12, tie_word_embeddings=True, **sizes)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="100MB")
    base = load_base(tmp_path / "base")
    plan, out = plan_merge(write_adapter(tmp_path / "adapter", base), base), tmp_path / "out"
    out.mkdir()
    merge(plan, out)
    spec = {"base": str(base.folder), "adapter": str(plan.adapter), "merged": str(out), "dtype": "bfloat16"}
    (tmp_path / "spec.json").write_text(json.dumps({**spec, "plan_dtype": None}))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "spec.json"], capture_output=True, text=True, check=True
    )
    layer = 4 * 1024 * 1024 + 3 * 1024 * 4096
    assert int(done.stdout) < LAYER_BYTES * layer + (64 << 20) < 4 * 12 * layer / 3


def test_a_wrong_layer_fails_layer_by_layer_as_it_does_whole(tmp_path: Path) -> None:
    from adapters.parity_streamed import streamed as compare

    plan, out = merged_plan("qwen3_tied_f16", tmp_path)
    spec = {"base": plan.base.folder, "adapter": plan.adapter, "merged": out, "dtype": "float16"}
    spec["plan_dtype"] = plan.dtype
    assert logits_problems(compare(spec)) == []
    tensors = load_file(out / "model.safetensors")
    first, second = (f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert len(logits_problems(compare(spec))) == 2, "largest and mean difference of the probe"


def test_more_positions_than_are_kept_are_thinned_out_evenly() -> None:
    rows = [list(range(100)), list(range(300))]
    assert kept_positions(rows, 320) == [list(range(100)), list(range(300))]
    kept = kept_positions(rows, (128 << 20) // 4 // 40)
    assert list(map(len, kept)) == [10, 30] and kept[1][:3] == [0, 10, 20]


def test_an_export_streams_no_model_that_fits(request_for: Callable[..., ExportRequest], base: BaseModel) -> None:
    parity = export(request_for(with_logits=True)).parity
    assert parity["logits"]["forward"] == "whole" and parity["logits"]["answers"]["merged_against_peft"]["prompts"] == 8
