"""U31: whatever an adapter's names, shapes and fields are, the answer is a verdict. See also tests/fuzz/parsers.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.bases import BaseModel
from adapters.check import check
from adapters.inspect import CONFIG_FILE, WEIGHTS_FILE, inspect_folder
from adapters.mlx_config import MlxReading
from adapters.tensor_names import read_mlx_name, read_name
from tests.fixtures.adapters import write_raw_safetensors

WORDS = (
    *("base_model", "model", "layers", "0", "1", "99", "self_attn", "q_proj", "mlp", "up_proj", "lora_A", "lora_B"),
    *("weight", "bias", "default", "lora_a", "lora_b", "m", "module", "_orig_mod", "lm_head", "embed_tokens", ""),
    *("lora_magnitude_vector", "lora_embedding_A", "modules_to_save", "original_module", "é", " ", "\0"),
)
NAMES = st.lists(st.sampled_from(WORDS), max_size=10).map(".".join) | st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_dora"),
    *("fine_tune_type", "lora_parameters", "model", "modules_to_save", "loftq_config", "task_type", "surprise"),
)
LIKELY = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "use_rslora": True, "init_lora_weights": "pissa",
          "rank_pattern": {"^model.layers.0.mlp.up_proj": 2}, "fine_tune_type": "lora",
          "lora_parameters": {"rank": 1, "scale": 2.0}}  # fmt: skip
CONFIGS = st.dictionaries(st.sampled_from(FIELDS), VALUES).flatmap(
    lambda odd: st.lists(st.sampled_from(sorted(LIKELY)), unique=True, max_size=8).map(
        lambda keys: {**{key: LIKELY[key] for key in keys}, **odd}
    )
)
SHAPES = st.lists(st.sampled_from([1, 2, 16, 24]), min_size=1, max_size=2)
NO_LIMITS = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@NO_LIMITS
@given(NAMES)
def test_u31_every_tensor_name_is_read_to_something(tiny: BaseModel, name: str) -> None:
    for found in (read_name(name, tiny.shapes), read_mlx_name(name, tiny.shapes)):
        assert found.key == name


@NO_LIMITS
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_u31_every_mlx_config_is_read_to_something(config: dict[str, Any]) -> None:
    MlxReading(config)


@NO_LIMITS
@given(CONFIGS, st.dictionaries(NAMES, SHAPES, max_size=5), st.dictionaries(NAMES, SHAPES, max_size=3) | st.none())
def test_u31_every_folder_gets_a_verdict_that_can_be_sent(
    tmp_path: Path,
    tiny: BaseModel,
    config: dict[str, Any],
    tensors: dict[str, list[int]],
    initial: dict[str, list[int]] | None,
) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "initial_adapter.safetensors").unlink(missing_ok=True)
    for file, shapes in ((WEIGHTS_FILE, tensors), ("initial_adapter.safetensors", initial)):
        if shapes is not None:
            entries = [(name, "F16", shape, bytes(2 * shape[0] * shape[-1] if len(shape) > 1 else 2 * shape[0]))
                       for name, shape in shapes.items()]  # fmt: skip
            write_raw_safetensors(tmp_path / file, entries)
    verdict = check(inspect_folder(tmp_path), tiny, max_rank=64).as_dict()
    json.dumps(verdict).encode()
    assert (verdict["verdict"] == "refuse") <= bool(verdict["reasons"])
