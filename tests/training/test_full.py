"""Full fine-tuning: what it leaves is a base of its own, tied as before, whose gradients are those of the plain way."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.embedded import open_base
from adapters.errors import AdapterRefused, TrainingStopped
from server.cli.push import check_folder
from tests.fixtures.bases import tiny_qwen2
from tests.training.killed import call, run
from tests.training.test_packed import assert_same_loss_and_gradients, rows, settings
from training.model import load_model
from training.run import training_arguments

SHORT: dict[str, Any] = {
    "name": "n",
    "method": "full",
    "epochs": 0.6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "compare": False,
    "report_to": ("none",),
}


@pytest.mark.parametrize("is_tied", [True, False])
def test_loss_and_gradients_of_every_weight_equal_the_padded_computation(tmp_path: Path, is_tied: bool) -> None:
    base = open_base(tiny_qwen2(tmp_path / "base", tie_word_embeddings=is_tied))
    model = load_model(base, settings("full"), "cpu")
    assert all(value.requires_grad and value.dtype == torch.float32 for value in model.parameters())
    assert_same_loss_and_gradients(model, rows(12, [(5, 4), (9, 2), (1, 7)]))


@pytest.mark.parametrize(("is_tied", "dtype"), [(True, "float32"), (False, "float32"), (True, "bfloat16")])
def test_a_full_run_leaves_a_folder_that_transformers_loads_and_that_is_served_as_a_base(
    colours: Path, tmp_path: Path, is_tied: bool, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_qwen2(tmp_path / "tiny", tie_word_embeddings=is_tied)
    AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).save_pretrained(source)
    out = tmp_path / "colours"
    run({**SHORT, "data": colours, "validation": colours, "base": str(source), "out": out, "epochs": 2.0})
    card = json.loads((out / "card.json").read_text())
    curve = card["result"]["curve"]["training"]
    assert curve[-1][1] < 0.9 * curve[0][1]  # it learns
    assert card["settings"]["method"] == "full" and "rank" not in card["settings"]

    weights = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in weights) is not is_tied
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}
    before = load_file(source / "model.safetensors")
    assert weights.keys() == before.keys()
    assert all(not torch.equal(weights[name], before[name]) for name in weights if "proj.weight" in name)

    base, parent = open_base(out), open_base(source)
    assert (base.id, base.is_tied) == ("colours", is_tied)
    assert base.digest != parent.digest and base.shapes == parent.shapes
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is is_tied
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "Colour number 3?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == AutoTokenizer.from_pretrained(
        source
    ).apply_chat_template(messages, tokenize=False)
    adapter = tmp_path / "adapter"
    run({**SHORT, "method": "lora", "data": colours, "base": str(out), "out": adapter, "epochs": 0.2, "rank": 2})
    assert json.loads((adapter / "card.json").read_text())["base"]["digest"] == base.digest


def test_pushing_a_full_result_says_what_to_do_instead(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run({**SHORT, "data": colours, "base": str(qwen2_base), "out": out, "epochs": 0.2})
    with pytest.raises(AdapterRefused) as caught:
        check_folder(out)
    assert caught.value.problems[0].advice == (
        f"This is a whole model: serve it as a base of its own with `hotshoe serve --base {out}`."
    )


def test_a_killed_full_run_ends_in_the_same_bits(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    asked = {**SHORT, "data": str(colours), "base": str(qwen2_base), "checkpoint_steps": 2}
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call({**asked, "out": str(whole)}).code == 0
    assert call({**asked, "out": str(out)}, "step:4").code == -signal.SIGKILL
    done = call({**asked, "out": str(out)}, resume=True)
    assert done.code == 0, done.said
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_full_run_that_changes_nothing_is_no_success(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"changed no weight of the base\. Nothing was saved"):
        run({**SHORT, "data": colours, "base": str(qwen2_base), "out": tmp_path / "out", "learning_rate": 1e-60})
    assert list(tmp_path.glob("*out*")) == []


def test_bfloat16_is_computed_in_while_the_weights_stay_in_float32(tmp_path: Path) -> None:
    assert training_arguments(settings("full", dtype="bfloat16"), tmp_path, "cpu").bf16
