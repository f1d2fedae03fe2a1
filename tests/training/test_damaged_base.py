"""A base folder that is damaged: one clear sentence before the first step, and never random weights in silence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterRefused, BaseInvalid
from tests.training.test_train import run
from training.reference import open_reference

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.down_proj.weight"


def cut(name: str) -> Callable[[Path], None]:
    return lambda base: os.truncate(base / name, (base / name).stat().st_size // 2)


def empty(base: Path) -> None:
    (base / WEIGHTS).write_bytes(b"")


def lack(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    del tensors[LAYER]
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})


def reshape(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    tensors[LAYER] = tensors[LAYER][:32].contiguous()
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})


HARM: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut weights": (cut(WEIGHTS), "cannot be (read|loaded)"),
    "no weights": (empty, "cannot be (read|loaded)"),
    "a layer lacking": (lack, rf"lacks 1 of its weights, {LAYER} among them; random ones"),
    "a layer of another shape": (reshape, r"another shape than config\.json says"),
    "a cut tokenizer": (cut("tokenizer.json"), "no tokenizer that can be read"),
    "a cut generation config": (cut("generation_config.json"), "generation_config.json cannot be read"),
    "a cut config": (cut("config.json"), "does not describe a base"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_base_is_refused_with_what_is_wrong(
    harm: str, colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    do, message = HARM[harm]
    base = tmp_path / "base"
    shutil.copytree(qwen2_base, base)
    do(base)
    with pytest.raises(BaseInvalid, match=message):
        run(colours, base, tmp_path / "out", compare=False)
    with pytest.raises(BaseInvalid, match=message):
        open_reference(base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "colours.jsonl"]


def test_a_cut_adapter_to_go_on_from_is_refused(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    first = run(colours, qwen2_base, tmp_path / "one", epochs=0.2).folder
    cut("adapter_model.safetensors")(first)
    with pytest.raises(AdapterRefused, match="cannot be gone on from"):
        run(colours, qwen2_base, tmp_path / "two", initial_adapter=first, rank=None)
    assert not (tmp_path / "two").exists()
