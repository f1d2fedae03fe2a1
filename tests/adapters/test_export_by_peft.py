"""What an engine cannot serve and PEFT can merge is exported: the folder's logits are those of PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import BaseInvalid, InvalidRequest
from adapters.export import ExportRequest, canonical_copy, export
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
