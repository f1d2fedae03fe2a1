"""Canonical files: deterministic, a fixpoint, of the source dtype, finite, and to PEFT the same adapter."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel, load_base
from adapters.canonical import CanonicalAdapter, canonicalise, check, digest_folder
from adapters.errors import AdapterRefused
from adapters.inspect import inspect_folder
from tests.fixtures.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterSpec,
    adapter_tensors,
    shape_only_base,
    write_adapter,
    write_safetensors,
)


def make(source: Path, base: BaseModel, out: Path, **options: Any) -> CanonicalAdapter:
    inspection = inspect_folder(source)
    return canonicalise(source, inspection, check(inspection, base, max_rank=64), out, **options)


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(),
        AdapterSpec(dtype="BF16", rank=3),
        AdapterSpec(dtype="F16", use_rslora=True, alpha=3.5),
        AdapterSpec(rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 2}, alpha_pattern={"mlp.up_proj": 5}),
        AdapterSpec(layers=(1,), targets=("v_proj",), config={"bias": "none", "revision": "abc"}),
    ],
    ids=["float32", "bfloat16", "rslora", "patterns", "one module"],
)
def test_u32_canonical_files_are_a_fixpoint(tmp_path: Path, tiny: BaseModel, spec: AdapterSpec) -> None:
    first = make(write_adapter(tmp_path / "source", tiny, spec), tiny, tmp_path / "first")
    second = make(first.folder, tiny, tmp_path / "second")
    assert second == CanonicalAdapter(second.folder, first.digest, first.rank, first.size_bytes, first.modules)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    assert sorted(path.name for path in first.folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_the_bytes_do_not_depend_on_how_the_trainer_ordered_or_spelled_things(tmp_path: Path, tiny: BaseModel) -> None:
    plain = make(write_adapter(tmp_path / "plain", tiny), tiny, tmp_path / "a")
    other = write_adapter(
        tmp_path / "other", tiny, config={"lora_alpha": 8.0, "lora_dropout": 0.3, "peft_version": "0"}
    )
    tensors = adapter_tensors(tiny, AdapterSpec())
    write_safetensors(other / WEIGHTS_FILE, dict(reversed(tensors.items())), metadata={"format": "pt", "made": "today"})
    assert make(other, tiny, tmp_path / "b").digest == plain.digest
    changed = write_adapter(tmp_path / "changed", tiny, alpha=9)
    assert make(changed, tiny, tmp_path / "c").digest != plain.digest


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_keep_their_dtype_and_bits(tmp_path: Path, tiny: BaseModel, dtype: str) -> None:
    source = write_adapter(tmp_path / "source", tiny, dtype=dtype)
    made = make(source, tiny, tmp_path / "out")
    before, after = (
        {tensor.name: (tensor.dtype, bytes_of(folder, tensor)) for tensor in inspect_folder(folder).tensors}
        for folder in (source, made.folder)
    )
    assert before == after


def bytes_of(folder: Path, tensor: Any) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()[tensor.offset : tensor.offset + tensor.size_bytes]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_u17_a_value_that_is_not_finite_is_refused_with_its_tensor(
    tmp_path: Path, tiny: BaseModel, dtype: str, value: float
) -> None:
    source = write_adapter(tmp_path / "source", tiny)
    tensors = adapter_tensors(tiny, AdapterSpec())
    bad = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors[bad][3, 1] = value
    write_safetensors(source / WEIGHTS_FILE, tensors, dtype)
    with pytest.raises(AdapterRefused) as caught:
        make(source, tiny, tmp_path / "out")
    assert [(problem.code, problem.path) for problem in caught.value.problems] == [("non_finite", bad)]


def test_u17_a_value_that_overflows_in_the_serving_dtype_is_refused(tmp_path: Path, tiny: BaseModel) -> None:
    source = write_adapter(tmp_path / "source", tiny, fill=(1e5, 1.0))
    assert make(source, tiny, tmp_path / "bf16").rank == 4
    with pytest.raises(AdapterRefused, match="overflows"):
        make(source, tiny, tmp_path / "fp16", serving_dtype="float16")
    source = write_adapter(tmp_path / "large", tiny, fill=(3.4e38, 1.0))
    assert make(source, tiny, tmp_path / "fp32", serving_dtype="float32").rank == 4
    with pytest.raises(AdapterRefused, match="overflows"):
        make(source, tiny, tmp_path / "large-bf16")


def test_the_config_holds_only_what_has_meaning(tmp_path: Path, tiny: BaseModel) -> None:
    spec = AdapterSpec(rank=4, rank_pattern={"q_proj": 6}, alpha_pattern={"layers.1.mlp.up_proj": 2.5})
    made = make(write_adapter(tmp_path / "source", tiny, spec), tiny, tmp_path / "out")
    config = json.loads((made.folder / CONFIG_FILE).read_bytes())
    assert config == {
        "alpha_pattern": {"model.layers.1.mlp.up_proj": 2.5},
        "base_model_name_or_path": tiny.digest,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {f"model.layers.{i}.self_attn.q_proj": 6 for i in (0, 1)},
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def test_an_export_only_version_keeps_what_it_cannot_be_served_with(tmp_path: Path, tiny: BaseModel) -> None:
    source = write_adapter(tmp_path / "source", tiny, config={"use_dora": True})
    vector = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    tensors = {**adapter_tensors(tiny, AdapterSpec()), vector: np.ones(16, np.float32)}
    write_safetensors(source / WEIGHTS_FILE, tensors)
    made = make(source, tiny, tmp_path / "out")
    assert json.loads((made.folder / CONFIG_FILE).read_bytes())["use_dora"] is True
    assert vector in {tensor.name for tensor in inspect_folder(made.folder).tensors}


def test_memory_is_bounded_by_a_chunk_and_not_by_the_adapter(tmp_path: Path) -> None:
    base = shape_only_base(tmp_path / "base", hidden_size=2048, intermediate_size=8192, num_hidden_layers=1)
    source = write_adapter(tmp_path / "source", base, rank=256, fill=(0.5, 0.25), dtype="BF16")
    inspection = inspect_folder(source)
    assert max(tensor.size_bytes for tensor in inspection.tensors) == 4 << 20
    verdict = check(inspection, base, max_rank=256)
    tracemalloc.start()
    made = canonicalise(source, inspection, verdict, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.size_bytes > 20 << 20
    assert peak < 48 << 20  # one 4 MiB chunk as float32, its magnitudes, and buffers


def test_the_digest_is_of_names_and_contents(tmp_path: Path, tiny: BaseModel) -> None:
    made = make(write_adapter(tmp_path / "source", tiny), tiny, tmp_path / "out")
    assert digest_folder(made.folder) == made.digest
    data = bytearray((made.folder / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (made.folder / WEIGHTS_FILE).write_bytes(data)
    assert digest_folder(made.folder) != made.digest


def test_a_source_that_shrinks_while_it_is_read_is_an_error_not_a_short_file(tmp_path: Path, tiny: BaseModel) -> None:
    source = write_adapter(tmp_path / "source", tiny)
    inspection = inspect_folder(source)
    verdict = check(inspection, tiny, max_rank=64)
    data = (source / WEIGHTS_FILE).read_bytes()
    (source / WEIGHTS_FILE).write_bytes(data[:-100])
    with pytest.raises(Exception, match="ended inside tensor"):
        canonicalise(source, inspection, verdict, tmp_path / "out")


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(scale=0.2),
        AdapterSpec(
            scale=0.2,
            use_rslora=True,
            rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 2},
            alpha_pattern={"mlp.up_proj": 5, "model.layers.0.self_attn.o_proj": 3},
        ),
    ],
    ids=["plain", "patterns"],
)
def test_u32_peft_reads_canonical_files_as_the_same_adapter(tmp_path: Path, spec: AdapterSpec) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.fixtures.bases import tiny_qwen2

    base = load_base(tiny_qwen2(tmp_path / "base"))
    source = write_adapter(tmp_path / "source", base, spec)
    made = make(source, base, tmp_path / "out")
    tokens = torch.arange(1, 33).reshape(2, 16)

    def logits(adapter: Path | None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
        if adapter:
            model = peft.PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            return model(tokens).logits

    assert torch.allclose(logits(source), logits(made.folder), atol=1e-4)
    assert (logits(source) - logits(None)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about the settings it is given here
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"trainable_token_indices": [1, 2, 3]},
    ],
    ids=["dora", "lora_bias", "bias", "modules_to_save", "embeddings", "tokens"],
)
def test_u4b_peft_reads_the_canonical_files_of_an_export_only_version_as_the_same_adapter(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.fixtures.bases import tiny_qwen2

    base = load_base(tiny_qwen2(tmp_path / "base", tie_word_embeddings=False))
    tokens = torch.arange(1, 33).reshape(2, 16)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "source")
    inspection = inspect_folder(tmp_path / "source")
    verdict = check(inspection, base, max_rank=64)
    assert verdict.verdict == "export_only"
    made = canonicalise(tmp_path / "source", inspection, verdict, tmp_path / "out")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), made.folder).eval()
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, expected, atol=1e-5)
    assert make(made.folder, base, tmp_path / "twice").digest == made.digest
