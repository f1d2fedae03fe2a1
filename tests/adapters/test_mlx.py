"""MLX-LM's folders: trainer arguments as config, both halves transposed, a scale in place of lora_alpha."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.bases import BaseModel
from adapters.canonical import canonicalise, check
from adapters.inspect import inspect_folder
from adapters.lora_config import read_config
from tests.fixtures.adapters import WEIGHTS_FILE, AdapterSpec, adapter_tensors, write_adapter, write_safetensors

ARGUMENTS: dict[str, Any] = {
    "adapter_path": "adapters",
    "batch_size": 1,
    "config": None,
    "fine_tune_type": "lora",
    "grad_checkpoint": False,
    "iters": 100,
    "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.5},
    "model": None,
    "num_layers": 8,
    "optimizer_config": {"adam": {}},
    "train": True,
}


def write_mlx(folder: Path, base: BaseModel, more: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """The same adapter as `write_adapter(rank=4, alpha=10)` makes, as MLX-LM saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**ARGUMENTS, **changes}))
    tensors = {}
    for key, array in adapter_tensors(base, AdapterSpec(rank=4)).items():
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a")
        tensors[name.replace("lora_B.weight", "lora_b")] = np.ascontiguousarray(array.T)
    write_safetensors(folder / "adapters.safetensors", {**tensors, **(more or {})}, metadata={"format": "mlx"})
    return folder


def test_an_mlx_folder_becomes_the_same_files_as_the_peft_adapter_of_the_same_weights(
    tmp_path: Path, tiny: BaseModel
) -> None:
    made = []
    folders = (write_mlx(tmp_path / "mlx", tiny), write_adapter(tmp_path / "peft", tiny, rank=4, alpha=10))
    for i, folder in enumerate(folders):
        inspection = inspect_folder(folder)
        verdict = check(inspection, tiny, max_rank=64)
        assert verdict.verdict == ("convert", "accept")[i]
        made.append(canonicalise(folder, inspection, verdict, tmp_path / f"out{i}"))
    assert made[0].digest == made[1].digest
    inspection = inspect_folder(folders[0])
    assert inspection.left_out == ()
    verdict = check(inspection, tiny, max_rank=64)
    assert [(reason.code, reason.path) for reason in verdict.reasons] == [("converted", "tensors")]
    assert "lora_alpha 10" in verdict.reasons[0].message
    assert {line.partition(":")[0] for line in verdict.dropped} >= {"iters", "optimizer_config", "num_layers"}


def test_the_same_bytes_under_pefts_name_are_read_as_well(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_mlx(tmp_path, tiny)
    (folder / "adapters.safetensors").rename(folder / WEIGHTS_FILE)
    assert check(inspect_folder(folder), tiny, max_rank=64).verdict == "convert"


def test_mlx_dora_and_embeddings_are_export_only_and_keep_their_values(tmp_path: Path, tiny: BaseModel) -> None:
    more = {"model.layers.0.self_attn.q_proj.m": np.arange(16, dtype=np.float32)}
    more |= {"model.embed_tokens.lora_a": np.ones((64, 4), np.float32)}
    more |= {"model.embed_tokens.lora_b": np.full((4, 16), 2, np.float32)}
    folder = write_mlx(tmp_path / "dora", tiny, more, fine_tune_type="dora")
    inspection = inspect_folder(folder)
    verdict = check(inspection, tiny, max_rank=64)
    assert verdict.verdict == "export_only"
    assert verdict.reasons[0].path == "config.fine_tune_type"
    made = canonicalise(folder, inspection, verdict, tmp_path / "out")
    from safetensors.numpy import load_file

    tensors = load_file(made.folder / WEIGHTS_FILE)
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (4, 64)
    magnitudes = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"]
    assert magnitudes.tolist() == list(range(16))
    assert json.loads((made.folder / "adapter_config.json").read_text())["use_dora"] is True


@pytest.mark.parametrize(
    ("changes", "code", "path"),
    [
        ({"fine_tune_type": "full"}, "feature_not_supported", "config.fine_tune_type"),
        ({"lora_parameters": {"rank": 4}}, "field_missing", "config.lora_parameters.scale"),
        ({"lora_parameters": {"scale": 1.0}}, "field_missing", "config.lora_parameters.rank"),
        ({"lora_parameters": [4]}, "type_error", "config.lora_parameters"),
        ({"lora_parameters": {"rank": 4, "scale": "20"}}, "type_error", "config.lora_parameters.scale"),
        ({"lora_parameters": {"rank": True, "scale": 1.0}}, "type_error", "config.lora_parameters.rank"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0, "x": 1}}, "field_unknown", "config.lora_parameters.x"),
        ({"lora_parameters": {"rank": 4, "scale": 0.0}}, "out_of_range", "config.lora_alpha"),
        ({"model": 7}, "type_error", "config.base_model_name_or_path"),
    ],
)
def test_an_mlx_config_that_says_too_little_or_something_else_is_refused_where_it_does(
    changes: dict[str, Any], code: str, path: str
) -> None:
    (problem,) = read_config({**ARGUMENTS, **changes}).problems
    assert (problem.code, problem.path) == (code, path)


def test_an_undated_alpha_is_refused_as_two_versions_of_mlx_read_it_differently() -> None:
    undated = {key: value for key, value in ARGUMENTS.items() if key != "fine_tune_type"}
    parameters = {"rank": 4, "scale": 10.0, "alpha": 16}
    (problem,) = read_config({**undated, "lora_parameters": parameters}).problems
    assert (problem.code, problem.path) == ("ambiguous", "config.lora_parameters.alpha")
    for config in (
        {**ARGUMENTS, "lora_parameters": parameters},
        {**undated, "lora_parameters": {**parameters, "alpha": 4}},
    ):
        settings = read_config(config).settings
        assert settings is not None and settings.alpha == 40


def test_a_numpy_archive_of_the_first_mlx_examples_is_named_with_the_way_to_convert(
    tmp_path: Path, tiny: BaseModel
) -> None:
    folder = write_mlx(tmp_path, tiny)
    (folder / "adapters.safetensors").rename(folder / "adapters.npz")
    (problem,) = inspect_folder(folder).problems
    assert (problem.code, problem.path) == ("format_not_allowed", "adapters.npz")
    assert "mx.save_safetensors" in problem.advice


def test_the_quantised_copy_of_the_base_that_mlx_trains_on_is_the_base(tmp_path: Path, tiny: BaseModel) -> None:
    import dataclasses

    base = dataclasses.replace(tiny, names=("Qwen/Qwen2.5-7B-Instruct",))
    for copy in ("4bit", "8bit", "bf16", "4bit-DWQ"):
        folder = write_mlx(tmp_path / copy, tiny, model=f"mlx-community/Qwen2.5-7B-Instruct-{copy}")
        assert check(inspect_folder(folder), base, max_rank=64).verdict == "convert"
    folder = write_mlx(tmp_path / "other", tiny, model="mlx-community/Qwen2.5-14B-Instruct-4bit")
    assert check(inspect_folder(folder), base, max_rank=64).verdict == "refuse"
