"""GGUF files of merges: what the header says, what the tensors are, and that reading back finds what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.checkpoint import encode_header, expected_tensors
from adapters.errors import BaseInvalid, InvalidRequest, MergeFailed
from adapters.gguf_plan import GgufPlan, gguf_name, plan_base_gguf, plan_gguf
from adapters.gguf_types import QUANTISATIONS
from adapters.gguf_verify import verify_gguf
from adapters.gguf_write import write_gguf
from adapters.merge import merge, plan_merge
from adapters.merge_plan import MergePlan
from tests.fixtures.adapters import encode, write_adapter, write_raw_safetensors
from tests.fixtures.bases import tiny_qwen2, tiny_qwen3

ROWS = 160  # of the tiny bases' gate and up


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(
        tiny_qwen3(tmp_path_factory.mktemp("base") / "qwen3", tokenizer="bytes", head_dim=128)
    )  # transformers takes no other from a file


@pytest.fixture
def plan(base: BaseModel, tmp_path: Path) -> MergePlan:
    return plan_merge(write_adapter(tmp_path / "adapter", base, rank=4, scale=0.3), base)


def written(plan: MergePlan, path: Path, quantisation: str = "f32", **options: Any) -> GgufPlan:
    planned = plan_gguf(plan, quantisation=quantisation, name="router 1", **options)
    write_gguf(planned, path, workers=2)
    return planned


def changed_base(base: BaseModel, folder: Path, **config: Any) -> BaseModel:
    """The same base with another config.json."""
    shutil.copytree(base.folder, folder)
    (folder / "config.json").write_text(json.dumps({**base.config, **config}))
    return load_base(folder)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_every_tensor_has_the_name_that_the_gguf_library_gives_it(base: BaseModel, architecture: str) -> None:
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = MODEL_ARCH.QWEN3 if architecture.startswith("Qwen3") else MODEL_ARCH.QWEN2
    theirs = get_tensor_name_map(arch, 2)
    required, optional = expected_tensors({**base.config, "architectures": [architecture]})
    names = [*required, *optional]
    assert {name: gguf_name(name) for name in names} == {
        name: theirs.get_name(name, try_suffixes=(".weight", ".bias")) for name in names
    }
    assert gguf_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None and gguf_name("visual.weight") is None


def test_the_header_says_what_config_and_tokenizer_say(plan: MergePlan, tmp_path: Path) -> None:
    from gguf import GGUFReader

    written(plan, tmp_path / "f.gguf", "q8_0")
    reader = GGUFReader(tmp_path / "f.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    config = plan.base.config
    wanted = {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "router 1",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "qwen2.context_length": config["max_position_embeddings"],
        "qwen2.embedding_length": 64,
        "qwen2.block_count": 2,
        "qwen2.feed_forward_length": ROWS,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.key_length": 16,
        "qwen2.attention.value_length": 16,
        "qwen2.rope.dimension_count": 16,
        "qwen2.rope.freq_base": 10_000.0,
        "qwen2.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (plan.base.folder / "chat_template.jinja").read_text(),
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert found["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q8_0" and "output.weight" not in kinds
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"


def test_a_version_s_own_template_is_in_the_file(plan: MergePlan) -> None:
    metadata = plan_gguf(plan, quantisation="f32", name="x", chat_template="{{ messages }}").metadata
    assert metadata["tokenizer.chat_template"] == ("STRING", "{{ messages }}")


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_every_type_reads_back_right_and_is_the_same_bytes_for_any_number_of_workers(
    plan: MergePlan, tmp_path: Path, quantisation: str
) -> None:
    planned = plan_gguf(plan, quantisation=quantisation, name="x")
    for workers in (1, 4):
        done: list[int] = []
        write_gguf(planned, tmp_path / str(workers), workers=workers, progress=done.append)
        assert sum(done) == len(planned.header) + sum(tensor.size_bytes for tensor in planned.tensors)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "4").read_bytes()
    assert (tmp_path / "1").stat().st_size == planned.size_bytes
    report = verify_gguf(planned, tmp_path / "1")
    assert report.problems == [] and len(report.changed) >= 14
    figures = report.as_dict()
    assert figures["outside_bound"] == 0 and (quantisation == "f32" or figures["equal_to_rounded_exact"] > 0.999)
    assert figures["relative_error"] <= 1.001 * figures["rounding_floor"] + 1e-7


@pytest.mark.parametrize("quantisation", [name for name in QUANTISATIONS if name.startswith("q")])
def test_blocks_are_those_of_the_gguf_library_for_the_merged_weights(
    plan: MergePlan, tmp_path: Path, quantisation: str
) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, quantize
    from safetensors.numpy import load_file

    written(plan, tmp_path / "f.gguf", quantisation)
    merge(plan, tmp_path)
    merged = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "f.gguf").tensors}
    wanted = quantize(merged, GGMLQuantizationType[quantisation.upper()])
    assert np.array_equal(tensors["blk.1.ffn_down.weight"].data, wanted)


def test_constant_fill_gives_the_arithmetic(base: BaseModel, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    adapter = write_adapter(tmp_path / "a", base, rank=4, alpha=8, fill=(0.5, 0.25), targets=["up_proj"], layers=[1])
    written(plan_merge(adapter, base), tmp_path / "f.gguf")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "f.gguf").tensors}
    weights = load_file(base.folder / "model.safetensors")
    assert np.array_equal(tensors["blk.1.ffn_up.weight"], weights["model.layers.1.mlp.up_proj.weight"] + 2 * 4 * 0.125)
    assert np.array_equal(tensors["blk.0.ffn_up.weight"], weights["model.layers.0.mlp.up_proj.weight"])
    assert np.array_equal(tensors["blk.0.attn_q.weight"], weights["model.layers.0.self_attn.q_proj.weight"])


def test_rows_that_are_no_whole_blocks_fall_back_and_are_listed(tmp_path: Path) -> None:
    odd = load_base(tiny_qwen2(tmp_path / "odd", intermediate_size=150))
    planned = written(plan_merge(write_adapter(tmp_path / "a", odd), odd), tmp_path / "f.gguf", "q8_0")
    assert planned.fallbacks == {"blk.0.ffn_down.weight": "F16", "blk.1.ffn_down.weight": "F16"}
    assert planned.as_dict()["tensors"] == {"F16": 2, "F32": 11, "Q8_0": 13}
    assert verify_gguf(planned, tmp_path / "f.gguf").problems == []


def test_untied_qwen3_has_an_output_layer_and_norms_of_the_heads(qwen3: BaseModel, tmp_path: Path) -> None:
    untied = load_base(tiny_qwen3(tmp_path / "untied", tokenizer="bytes", tie_word_embeddings=False))
    planned = plan_base_gguf(untied, quantisation="q4_0", name="x")
    kinds = {tensor.name: tensor.type for tensor in planned.tensors}
    assert kinds["output.weight"] == kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.1.attn_q_norm.weight"] == kinds["blk.1.attn_k_norm.weight"] == "F32"
    assert "output.weight" not in {t.name for t in plan_base_gguf(qwen3, quantisation="f32", name="x").tensors}


def test_a_copy_of_tied_embeddings_is_left_out_by_name(base: BaseModel, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    copied = changed_base(base, tmp_path / "copied")
    weights = load_file(base.folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    entries = [(name, "F32", list(array.shape), encode(array, "F32")) for name, array in weights.items()]
    write_raw_safetensors(copied.folder / "model.safetensors", entries)
    planned = plan_base_gguf(load_base(copied.folder), quantisation="f32", name="x")
    assert planned.left_out == ("lm_head.weight",)


def flipped(path: Path, at: int, bits: int = 0x40) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (old,) = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ bits]))


@pytest.mark.parametrize("quantisation", ["f32", "bf16", "q8_0", "q4_1"])
@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_norm.weight", "token_embd.weight"])
def test_one_changed_byte_of_a_tensor_is_found(plan: MergePlan, tmp_path: Path, quantisation: str, name: str) -> None:
    planned = written(plan, tmp_path / "f.gguf", quantisation)
    (tensor,) = (tensor for tensor in planned.tensors if tensor.name == name)
    flipped(tmp_path / "f.gguf", tensor.begin + 1)
    (problem,) = verify_gguf(planned, tmp_path / "f.gguf").problems
    assert tensor.name in problem or tensor.source.name in problem


def test_a_changed_header_is_found(plan: MergePlan, tmp_path: Path) -> None:
    planned = written(plan, tmp_path / "f.gguf")
    at = planned.header.index(b"rope.freq_base") + len(b"rope.freq_base") + 4
    flipped(tmp_path / "f.gguf", at + 2, bits=1)
    (problem,) = verify_gguf(planned, tmp_path / "f.gguf").problems
    assert problem.startswith("qwen2.rope.freq_base is not what was planned")


def test_a_file_that_is_cut_short_or_none_is_refused(plan: MergePlan, tmp_path: Path) -> None:
    planned = written(plan, tmp_path / "f.gguf")
    for size, words in ((planned.size_bytes - 4096, "beyond"), (1000, "ends early"), (2, "cannot be read")):
        content = (tmp_path / "f.gguf").read_bytes()[:size]
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(BaseInvalid, match=words):
            verify_gguf(planned, tmp_path / "cut.gguf")


@pytest.mark.parametrize("quantisation", ["f16", "q5_1"])
def test_what_a_type_cannot_hold_is_refused_by_name(base: BaseModel, tmp_path: Path, quantisation: str) -> None:
    adapter = write_adapter(tmp_path / "a", base, rank=1, fill=(300.0, 300.0), targets=["up_proj"], layers=[1])
    with pytest.raises(MergeFailed, match=r"layers\.1\.mlp\.up_proj\.weight does not fit .*limit is 65504"):
        written(plan_merge(adapter, base), tmp_path / "f.gguf", quantisation)


def test_blocks_too_small_for_a_float16_step_become_zero(base: BaseModel, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tiny = changed_base(base, tmp_path / "tiny")
    weights = load_file(base.folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= np.float32(1e-41)
    save_file(weights, tiny.folder / "model.safetensors")
    for quantisation in ("q8_0", "q4_0", "q5_1"):
        planned = plan_base_gguf(load_base(tiny.folder), quantisation=quantisation, name="x")
        write_gguf(planned, tmp_path / quantisation)
        assert verify_gguf(planned, tmp_path / quantisation).problems == []


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}


def test_yarn_is_in_the_header_in_the_older_spelling_too(base: BaseModel, tmp_path: Path) -> None:
    older = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {**YARN, "rope_theta": None, "type": "yarn"}}
    for number, rope in enumerate(({"rope_parameters": YARN}, older)):
        planned = plan_base_gguf(changed_base(base, tmp_path / str(number), **rope), quantisation="f32", name="x")
        found = {key.partition("rope.")[2]: value for key, (_, value) in planned.metadata.items() if "rope." in key}
        scaling = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 512}
        assert found == {"dimension_count": 16, "freq_base": 5e5 if number else 10_000.0, **scaling}


REFUSED = {
    "rope_scaling": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "rope_scaling.beta_fast": {"rope_parameters": {**YARN, "beta_fast": 16}},
    "rope_scaling.attention_factor": {"rope_parameters": {**YARN, "attention_factor": 1.5}},
    "rope_scaling.truncate": {"rope_parameters": {**YARN, "truncate": False}},
    "partial_rotary_factor": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "use_sliding_window": {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(base: BaseModel, tmp_path: Path, key: str) -> None:
    with pytest.raises(BaseInvalid) as raised:
        plan_base_gguf(changed_base(base, tmp_path / "odd", **REFUSED[key]), quantisation="f32", name="x")
    assert [problem.path for problem in raised.value.problems] == [f"config.{key}"]


def test_an_unknown_quantisation_is_refused_with_those_that_there_are(plan: MergePlan) -> None:
    with pytest.raises(InvalidRequest, match=r"'q3_k' is not one of f32, f16, bf16, q8_0"):
        plan_gguf(plan, quantisation="q3_k", name="x")


OPEN = """
import sys, torch, numpy
from pathlib import Path
from transformers import AutoModelForCausalLM
ids = torch.arange(40)[None]
def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad(): return model(ids).logits
for number in range(1, len(sys.argv), 2):
    ours = logits(Path(sys.argv[number + 1]).parent, gguf_file="f.gguf")
    print(float((logits(sys.argv[number]) - ours).abs().max()))
"""


def test_transformers_opens_the_file_and_its_logits_are_those_of_the_merged_folder(
    plan: MergePlan, qwen3: BaseModel, tmp_path: Path
) -> None:
    plans = {"two": plan, "three": plan_merge(write_adapter(tmp_path / "a3", qwen3, scale=0.3), qwen3)}
    arguments = []
    for name, each in plans.items():
        folder = tmp_path / name
        (folder / "hf").mkdir(parents=True)
        merge(each, folder / "hf")
        shutil.copy(each.base.folder / "config.json", folder / "hf")
        written(each, folder / "f.gguf")
        arguments += [str(folder / "hf"), str(folder / "f.gguf")]
    done = subprocess.run([sys.executable, "-c", OPEN, *arguments], capture_output=True, text=True, check=True)
    assert all(float(figure) < 1e-5 for figure in done.stdout.split()), done.stdout


PEAK = """
import json, resource, sys
from pathlib import Path
import gguf, torch
from adapters.bases import load_base
from adapters.gguf_plan import plan_gguf
from adapters.gguf_write import write_gguf
from adapters.merge_plan import plan_merge
base, adapter, out = map(Path, sys.argv[1:])
plan = plan_gguf(plan_merge(adapter, load_base(base)), quantisation="q8_0", name="x")
torch.ones(8, 8) @ torch.ones(8, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_gguf(plan, out, workers=4)
wrote = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(wrote - before) * 1024, plan.memory_bound_bytes]))
"""


def test_peak_memory_stays_under_the_stated_bound_beside_larger_matrices(tmp_path: Path) -> None:
    """Up, gate and down of 134 MB each, in a sparse file of zeros; 16 MiB are for the allocator and the threads."""
    folder = tiny_qwen2(tmp_path / "wide")
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 256, "intermediate_size": 262_144, "num_hidden_layers": 1, "head_dim": 64}
    config = {**json.loads((folder / "config.json").read_text()), **sizes, "layer_types": ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    required, _ = expected_tensors(config)
    header = encode_header((name, "BF16", shape) for name, shape in sorted(required.items()))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(int(np.prod(shape)) for shape in required.values()))
    adapter = write_adapter(tmp_path / "adapter", load_base(folder), rank=2, dtype="BF16")
    arguments = [str(folder), str(adapter), str(tmp_path / "out.gguf")]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    grown, bound = json.loads(done.stdout)
    assert grown <= bound + (16 << 20), f"{grown:,} bytes, the bound is {bound:,}"
