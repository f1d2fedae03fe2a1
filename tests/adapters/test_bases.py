"""A base is known by its folder: its shapes by config, its identity by a digest that tells two fine-tunes apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapters.bases import base_digest, load_base, module_shapes, wire_id
from adapters.errors import BaseInvalid


def config(**changes: Any) -> dict[str, Any]:
    plain = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": 300,
    }
    return plain | changes


def write_base(folder: Path, settings: dict[str, Any], fill: float | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if fill is not None:
        save_file({"w": np.full((100, 100), fill, np.float32)}, folder / "model.safetensors")
    return folder


# hidden, intermediate, layers, heads, key-value heads, head_dim -> millions of LoRA parameters at rank 16, all linear,
# as published for these sizes.
SIZES = [
    ((896, 4864, 24, 14, 2, None), 8.8),  # Qwen2.5-0.5B
    ((1536, 8960, 28, 12, 2, None), 18.5),  # Qwen2.5-1.5B
    ((3584, 18944, 28, 28, 4, None), 40.4),  # Qwen2.5-7B
    ((1024, 3072, 28, 16, 8, 128), 10.1),  # Qwen3-0.6B: head_dim is not hidden / heads
    ((4096, 12288, 36, 32, 8, 128), 43.6),  # Qwen3-8B
]


@pytest.mark.parametrize(("size", "millions"), SIZES)
def test_shapes_give_the_published_adapter_sizes(size: tuple[int, ...], millions: float) -> None:
    hidden, middle, layers, heads, key_value_heads, head_dim = size
    shapes = module_shapes(
        {
            "hidden_size": hidden,
            "intermediate_size": middle,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": head_dim,
        }
    )
    parameters = sum(16 * (shape.in_features + shape.out_features) for shape in shapes.values())
    assert round(parameters / 1e6, 1) == millions


def test_two_fine_tunes_of_one_architecture_have_two_digests(tmp_path: Path) -> None:
    one = write_base(tmp_path / "one", config(), fill=1.0)
    same = write_base(tmp_path / "same", config(), fill=1.0)
    other = write_base(tmp_path / "other", config(), fill=1.5)
    assert base_digest(one) == base_digest(same) != base_digest(other)


def test_who_saved_the_config_does_not_change_the_digest(tmp_path: Path) -> None:
    one = write_base(tmp_path / "one", config(transformers_version="5.19.0", _name_or_path="/somewhere"))
    other = write_base(tmp_path / "other", config(transformers_version="4.51.3"))
    assert base_digest(one) == base_digest(other)


def test_a_config_alone_is_a_shape_only_base(tmp_path: Path) -> None:
    base = load_base(write_base(tmp_path / "Qwen2.5-Tiny", config()))
    assert base.id == "qwen2.5-tiny"
    assert base.shapes["model.layers.1.self_attn.k_proj"].out_features == 32
    assert len(base.shapes) == 14


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "gpt", config(architectures=["GPT2LMHeadModel"]))
    with pytest.raises(BaseInvalid, match="GPT2LMHeadModel"):
        load_base(folder)


def test_a_config_without_sizes_is_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "broken", {"architectures": ["Qwen3ForCausalLM"]})
    with pytest.raises(BaseInvalid, match="hidden_size"):
        load_base(folder)


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "Qwen/Qwen2.5-7B-Instruct@main"])
def test_what_is_neither_folder_nor_pinned_id_is_refused(source: str) -> None:
    with pytest.raises(BaseInvalid, match="neither a folder"):
        load_base(source)


def test_a_hub_id_needs_a_pinned_revision() -> None:
    with pytest.raises(BaseInvalid, match="pinned revision"):
        load_base("Qwen/Qwen2.5-7B-Instruct")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "sharded", config())
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseInvalid, match="model-00001-of-00002"):
        load_base(folder)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "sharded", config())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../../etc/passwd"}}))
    with pytest.raises(BaseInvalid, match="outside"):
        load_base(folder)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"),
        ("/srv/models/My Base/", "my-base"),
        (r"C:\models\Qwen3-8B", "qwen3-8b"),
    ],
)
def test_the_wire_id_is_the_last_part_in_lower_case(source: str, expected: str) -> None:
    assert wire_id(source) == expected
