"""What an engine cannot serve and PEFT can merge is exported: the folder's logits are those of PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from adapters.checkpoint import read_header
from adapters.errors import BaseInvalid, InvalidRequest, MergeFailed
from adapters.export import ExportRequest, canonical_copy, export
from adapters.export_forms import plan_form
from adapters.export_tokenizer import own_tokenizer
from adapters.readback_peft import verify_peft_merge
from tests.fixtures.bases import tiny_qwen2

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "bias": {"bias": "all"},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 2, 3]},
}


def trained(base: BaseModel, folder: Path, options: dict[str, Any]) -> tuple[Path, Any]:
    """An adapter that PEFT saved, and the logits that it had."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = model(torch.arange(1, 33).reshape(2, 16)).logits
    model.save_pretrained(folder)
    return folder, expected


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about the settings it is given here
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("dora", "lm_head") else pytest.mark.long) for kind in KINDS]
)
def test_u4b_what_cannot_be_served_is_merged_and_its_folder_computes_what_peft_does(tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = load_base(tiny_qwen2(tmp_path / "base", tie_word_embeddings=kind == "lm_head"))
    source, expected = trained(base, tmp_path / "source", KINDS[kind])
    adapter = canonical_copy(source, base, tmp_path / "canonical", base_is_named=True)
    result = export(ExportRequest(adapter, base, tmp_path / "out", source="adapter"))
    assert (result.parity["verdict"], result.parity["merged_by"]) == ("passed", "peft")
    weights = result.parity["weights"]
    assert weights["outside_bound"] == 0 and weights["changed_tensors"] > 0 and weights["unchanged_tensors_equal"] > 0
    assert set(result.manifest["files"]) >= {"config.json", "model.safetensors", "parity.json", "tokenizer.json"}
    model = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    with torch.no_grad():
        assert torch.allclose(model(torch.arange(1, 33).reshape(2, 16)).logits, expected, atol=1e-4)
    assert (result.folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    config = json.loads((result.folder / "config.json").read_bytes())
    assert config["tie_word_embeddings"] is False, "a trained output layer is no longer the embeddings"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_every_export_refuses_is_refused_before_peft_is_asked(tmp_path: Path) -> None:
    base = load_base(tiny_qwen2(tmp_path / "base"))
    source, _ = trained(base, tmp_path / "source", KINDS["dora"])
    adapter = canonical_copy(source, base, tmp_path / "canonical", base_is_named=True)
    with pytest.raises(InvalidRequest, match="float64"):
        export(ExportRequest(adapter, base, tmp_path / "out", source="adapter", dtype="float64"))
    quantised = replace(base, config={**base.config, "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(BaseInvalid, match="quantised weights"):
        export(ExportRequest(adapter, quantised, tmp_path / "out", source="adapter"))
    assert not (tmp_path / "out").exists()


def with_added_tokens(base: BaseModel, folder: Path, modules: list[str], *, is_tied: bool) -> Any:
    """An adapter of a vocabulary that grew by two tokens, as a trainer saves it beside its tokenizer; its logits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|route|>"]})
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    model.resize_token_embeddings(base.config["vocab_size"] + 2, mean_resizing=False)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = adapted(torch.arange(290, 322).reshape(2, 16)).logits
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return expected


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about resized embeddings
@pytest.mark.parametrize("is_tied", [pytest.param(True, marks=pytest.mark.long), False], ids=["tied", "untied"])
def test_added_tokens_and_a_vocabulary_that_grew_come_out_right(tmp_path: Path, is_tied: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = load_base(tiny_qwen2(tmp_path / "base", tie_word_embeddings=is_tied))
    expected = with_added_tokens(base, tmp_path / "source", ["embed_tokens", "lm_head"], is_tied=is_tied)
    adapter = canonical_copy(tmp_path / "source", base, tmp_path / "canonical", base_is_named=True)
    tokenizer = own_tokenizer(tmp_path / "source", adapter, base)
    assert tokenizer == tmp_path / "source"
    result = export(ExportRequest(adapter, base, tmp_path / "out", source="adapter", tokenizer=tokenizer))
    assert json.loads((result.folder / "config.json").read_bytes())["vocab_size"] == base.config["vocab_size"] + 2
    model = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    with torch.no_grad():
        assert torch.allclose(model(torch.arange(290, 322).reshape(2, 16)).logits, expected, atol=1e-4)
    opened = AutoTokenizer.from_pretrained(result.folder)
    ids = opened("<|call|>turn on<|route|>")["input_ids"]
    assert [opened.convert_ids_to_tokens(ids[0]), opened.convert_ids_to_tokens(ids[-1])] == ["<|call|>", "<|route|>"]
    assert any("tokenizer is the one beside the adapter" in note for note in result.parity["notes"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_of_a_grown_vocabulary_that_were_not_saved_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = load_base(tiny_qwen2(tmp_path / "base", tie_word_embeddings=False))
    with_added_tokens(base, tmp_path / "source", ["embed_tokens", "lm_head"], is_tied=False)
    weights = tmp_path / "source" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "lm_head" not in name}, weights)
    adapter = canonical_copy(tmp_path / "source", base, tmp_path / "canonical", base_is_named=True)
    with pytest.raises(MergeFailed, match="lm_head were not saved"):
        export(ExportRequest(adapter, base, tmp_path / "out", source="adapter"))


def test_a_tokenizer_that_is_not_the_bases_is_refused(tmp_path: Path) -> None:
    from tests.fixtures.adapters import write_adapter

    base = load_base(tiny_qwen2(tmp_path / "base"))
    source = write_adapter(tmp_path / "source", base)
    content = json.loads((base.folder / "tokenizer.json").read_bytes())
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert own_tokenizer(source, source, base) is None
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeFailed, match="2 of its tokens"):
        own_tokenizer(source, source, base)


def flip(folder: Path, name: str) -> None:
    """Make one element of a tensor in the folder another number."""
    path = folder / "model.safetensors"
    (tensor,) = (one for one in read_header(path) if one.name == name)
    raw = bytearray(path.read_bytes())
    raw[tensor.begin + tensor.size_bytes - 2] ^= 0x08
    path.write_bytes(raw)


CHANGED = {
    "dora": "model.layers.1.self_attn.q_proj.weight",
    "lora_bias": "model.layers.0.self_attn.v_proj.bias",
    "bias": "model.layers.0.self_attn.k_proj.bias",
    "lm_head": "lm_head.weight",
    "embeddings": "model.embed_tokens.weight",
    "tokens": "model.embed_tokens.weight",
    "dora_embeddings": "model.embed_tokens.weight",
    "patterns": "model.layers.1.mlp.up_proj.weight",
}
FURTHER: dict[str, dict[str, Any]] = {
    "dora_embeddings": {"use_dora": True, "target_modules": ["up_proj", "embed_tokens"]},
    "patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", CHANGED)
def test_every_element_that_peft_merged_is_what_base_and_adapter_give_and_a_flipped_one_is_found(
    tmp_path: Path, kind: str, is_tied: bool
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_base(tiny_qwen2(tmp_path / "base", tie_word_embeddings=is_tied))
    source, _ = trained(base, tmp_path / "source", {**KINDS, **FURTHER}[kind])
    adapter = canonical_copy(source, base, tmp_path / "canonical", base_is_named=True)
    for code, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16)):
        plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
        merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload().to(dtype)
        if is_tied and merged.lm_head.weight.data_ptr() != merged.model.embed_tokens.weight.data_ptr():
            merged.config.tie_word_embeddings = False
        merged.save_pretrained(tmp_path / code)
        report = verify_peft_merge(adapter, base, tmp_path / code, code)
        assert report.problems == [], report.problems
        assert CHANGED[kind] in {check.name for check in report.changed}
        assert report.as_dict()["relative_error"] <= 1.1 * report.as_dict()["rounding_floor"] + 1e-6
        for name in (CHANGED[kind], "model.norm.weight"):
            flip(tmp_path / code, name)
            (problem,) = verify_peft_merge(adapter, base, tmp_path / code, code).problems
            assert name in problem
            flip(tmp_path / code, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_export_by_peft_with_one_wrong_element_fails(tmp_path: Path) -> None:
    base = load_base(tiny_qwen2(tmp_path / "base", tie_word_embeddings=False))
    source, _ = trained(base, tmp_path / "source", KINDS["dora"])
    adapter = canonical_copy(source, base, tmp_path / "canonical", base_is_named=True)
    form = plan_form(ExportRequest(adapter, base, tmp_path / "out", source="adapter"))
    (tmp_path / "made").mkdir()
    form.write(tmp_path / "made", lambda _: None)
    assert form.prove(tmp_path / "made", lambda _: None)["verdict"] == "passed"
    flip(tmp_path / "made", CHANGED["dora"])
    parity = form.prove(tmp_path / "made", lambda _: None)
    assert parity["verdict"] == "failed" and CHANGED["dora"] in parity["problems"][0]
    assert parity["weights"]["outside_bound"] == 1
