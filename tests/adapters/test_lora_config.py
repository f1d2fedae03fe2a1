"""adapter_config.json from strangers: what is dropped, what is refused by name, what can only be exported."""

from __future__ import annotations

import json
import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.bases import BaseModel
from adapters.canonical import check
from adapters.inspect import inspect_folder
from adapters.lora_config import read_config
from adapters.lora_fields import DEFAULTS, ESSENTIAL
from adapters.strict_json import JsonInvalid, parse_json
from tests.fixtures.adapters import write_adapter

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}


def codes(**config: Any) -> list[str]:
    return [problem.code for problem in read_config({**PLAIN, **config}).problems]


def problem_paths(**config: Any) -> list[str]:
    return [problem.path for problem in read_config({**PLAIN, **config}).problems]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_mapping", {"base_model_class": "Qwen2ForCausalLM", "custom_class": "evil.Model"}),
        ("auto_mapping", {"base_model_class": ["Qwen2ForCausalLM"]}),
        ("auto_map", {"AutoModel": "modeling.Evil"}),
        ("megatron_config", {"a": 1}),
        ("megatron_core", "evil.core"),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"cache_file": "/etc/passwd"}),
        ("eva_config", {"covariance_file": "x"}),
    ],
)
def test_u3_fields_that_name_code_or_files_are_refused_by_name(field: str, value: Any) -> None:
    (problem,) = read_config({**PLAIN, field: value}).problems
    assert (problem.code, problem.path) == ("field_not_allowed", f"config.{field}")


def test_u3_the_ordinary_auto_mapping_is_a_claim_that_is_dropped_and_listed() -> None:
    ordinary = {"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers.models.qwen2.modeling_qwen2"}
    for mapping in (ordinary, {**ordinary, "unsloth_fixed": True}):
        reading = read_config({**PLAIN, "auto_mapping": mapping})
        assert reading.problems == ()
        assert any(line.startswith("auto_mapping") for line in reading.dropped)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 4], [2, 6]]),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("kasa_config", {"beta": 1}),
        ("arrow_config", {"top_k": 1}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("monteclora_config", {"a": 1}),
        ("enable_lora", [True, False, True]),
        ("peft_type", "ADALORA"),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("task_type", "TOKEN_CLS"),
        ("init_lora_weights", "some_new_init"),
    ],
)
def test_u4_features_no_engine_here_serves_are_refused_by_name(field: str, value: Any) -> None:
    (problem,) = read_config({**PLAIN, field: value}).problems
    assert (problem.code, problem.path) == ("feature_not_supported", f"config.{field}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
    ],
)
def test_u4b_what_cannot_be_swapped_can_be_exported_and_the_reason_says_what_to_change(field: str, value: Any) -> None:
    reading = read_config({**PLAIN, field: value})
    assert reading.problems == ()
    assert [(limit.code, limit.path) for limit in reading.limits] == [("not_servable", f"config.{field}")]
    assert reading.limits[0].advice.startswith("Train with")
    assert reading.settings is not None
    assert reading.settings.extras == {field: value}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000 + "]" * 200_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"r": ' + "1" * 1_000_000 + "}",
        '{"r": NaN}',
        '{"r": Infinity}',
        '{"r": 1e999}',
        '\ufeff{"r": 8}',
        '{"a": "\\ud800"}',
        "",
        "{",
        "{'r': 8}",
    ],
    ids=[
        "depth",
        "object depth",
        "10^6 digits",
        "NaN",
        "Infinity",
        "1e999",
        "BOM",
        "surrogate",
        "empty",
        "cut",
        "quotes",
    ],
)
def test_u15_json_no_parser_should_take_is_refused(text: str) -> None:
    with pytest.raises(JsonInvalid) as caught:
        parse_json(text.encode("utf-8"))
    assert caught.value.code == "json_invalid"


def test_u15_utf_16_and_broken_utf_8_are_refused_and_duplicate_keys_named() -> None:
    for data in ('{"r": 8}'.encode("utf-16"), b'{"a": "\xff"}'):
        with pytest.raises(JsonInvalid):
            parse_json(data)
    with pytest.raises(JsonInvalid, match="'r' twice") as caught:
        parse_json(b'{"r": 8, "r": 16}')
    assert caught.value.code == "duplicate_key"


def test_u15_a_50_mb_config_is_too_large_and_is_not_read_whole(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny)
    (folder / "adapter_config.json").write_bytes(b" " * (50 << 20))
    assert [problem.code for problem in inspect_folder(folder).problems] == ["payload_too_large"]


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+$",
        ".*q_proj",
        "^model.layers.[0]",
        "q_proj$$",
        "^^q_proj",
        "layers.[01].x",
        "q_proj|k_proj",
        "",
        "a..b",
        "é",
        "x" * 300,
    ],
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_u16_a_pattern_key_that_is_not_a_literal_name_is_refused(field: str, key: str) -> None:
    assert codes(**{field: {key: 4}}) == ["pattern_not_allowed"]


def test_u16_ten_thousand_pattern_keys_are_refused_at_once() -> None:
    pattern = {f"model.layers.{i}.q_proj": 4 for i in range(10_000)}
    started = time.process_time()
    assert codes(rank_pattern=pattern) == ["pattern_not_allowed"]
    assert time.process_time() - started < 0.01


def test_u16_a_target_modules_string_is_dropped_unread_and_listed() -> None:
    reading = read_config({**PLAIN, "target_modules": "(a+)+$" * 1000})
    assert reading.problems == ()
    assert any(line.startswith("target_modules: a string is not read") for line in reading.dropped)
    assert reading.settings is not None
    assert reading.settings.target_modules is None


def test_u16_literal_patterns_with_dots_are_read() -> None:
    reading = read_config({**PLAIN, "rank_pattern": {"model.layers.0.self_attn.q_proj": 4, "mlp.up_proj": 2}})
    assert reading.settings is not None
    assert reading.settings.rank_pattern == {"model.layers.0.self_attn.q_proj": 4, "mlp.up_proj": 2}


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, 0, -16, "16", True, None, [16], 0.0])
def test_u18_a_lora_alpha_that_scales_nothing_sanely_is_refused(value: Any) -> None:
    (code,) = codes(lora_alpha=value)
    assert code in ("type_error", "out_of_range")
    assert problem_paths(lora_alpha=value) == ["config.lora_alpha"]


@pytest.mark.parametrize("value", [0, 8.5, 8.0, True, "8", 1e9, 10**9, -1, None])
def test_u18_a_rank_that_is_no_rank_is_refused(value: Any) -> None:
    (code,) = codes(r=value)
    assert code in ("type_error", "out_of_range")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("fan_in_fan_out", "no"),
        ("inference_mode", 1),
        ("lora_dropout", "0.1"),
        ("lora_dropout", 2),
        ("bias", True),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "4"}),
        ("target_modules", 7),
        ("target_modules", [1, 2]),
        ("base_model_name_or_path", 7),
        ("base_model_name_or_path", "x" * 5000),
        ("task_type", 3),
    ],
)
def test_u18_wrong_types_are_refused_at_their_field(field: str, value: Any) -> None:
    (problem,) = read_config({**PLAIN, field: value}).problems
    assert problem.code in ("type_error", "out_of_range")
    assert problem.path.startswith(f"config.{field}")


def test_a_missing_alpha_or_rank_is_refused_rather_than_guessed() -> None:
    reading = read_config({"peft_type": "LORA"})
    assert {(problem.code, problem.path) for problem in reading.problems} == {
        ("field_missing", "config.r"),
        ("field_missing", "config.lora_alpha"),
    }


def test_u23_the_config_of_a_base_model_is_named_for_what_it_is(tiny: BaseModel) -> None:
    (problem,) = read_config(dict(tiny.config)).problems
    assert problem.code == "not_an_adapter_config"


def test_all_problems_are_reported_at_once() -> None:
    reading = read_config({"peft_type": "LORA", "r": "8", "lora_alpha": 0, "use_rslora": "x", "surprise": 1})
    paths = ["config.lora_alpha", "config.r", "config.surprise", "config.use_rslora"]
    assert sorted(problem.path for problem in reading.problems) == paths


def test_an_unknown_field_is_refused_when_it_says_something_and_listed_when_it_is_empty() -> None:
    assert codes(brand_new_field=0.5) == ["field_unknown"]
    empty = {f"new_{i}": value for i, value in enumerate((None, False, "", [], {}))}
    reading = read_config({**PLAIN, **empty})
    assert reading.problems == ()
    assert {line.partition(":")[0] for line in reading.dropped} == set(empty)


def test_every_field_of_the_installed_peft_is_known_and_its_default_is_dropped() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    known = {*DEFAULTS, *ESSENTIAL, "peft_version"}
    assert {field.name for field in fields(config)} <= known
    written = json.loads(json.dumps(config.to_dict(), default=sorted))
    reading = read_config({**written, "peft_type": "LORA"})
    assert reading.problems == () and reading.limits == ()


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*DEFAULTS, *ESSENTIAL, "auto_map", "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_u31_no_config_raises_anything(config: dict[str, Any]) -> None:
    read_config(config)
    read_config({**config, "peft_type": "LORA"})


def test_a_config_that_is_no_object_is_refused(tmp_path: Path, tiny: BaseModel) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny)
    (folder / "adapter_config.json").write_text("[1]")
    verdict = check(inspect_folder(folder), tiny, max_rank=64)
    assert [reason.code for reason in verdict.reasons] == ["type_error"]


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
def test_a_task_that_adds_no_head_is_a_claim_that_is_dropped_and_listed(task: str) -> None:
    reading = read_config({**PLAIN, "task_type": task})
    assert reading.problems == ()
    assert any(line.startswith(f"task_type: {task}") for line in reading.dropped)


def test_a_config_without_its_type_is_lora_when_it_has_both_of_its_numbers() -> None:
    reading = read_config({"r": 8, "lora_alpha": 16})
    assert (reading.problems, reading.settings and reading.settings.alpha) == ((), 16)
    assert any(line.startswith("peft_type: is missing") for line in reading.dropped)
    (problem,) = read_config({"lora_rank": 8, "lora_alpha": 16}).problems
    assert (problem.code, problem.path) == ("field_missing", "config.peft_type")
    assert "'lora_rank', perhaps for r" in problem.message
    assert read_config({**PLAIN, "peft_type": "lora"}).problems == ()


@pytest.mark.parametrize("key", ["alpha", "loraAlpha", "lora-alpha", "lora_alfa", "lora_apha", "lora_scale"])
def test_a_missing_alpha_names_the_misspelt_key(key: str) -> None:
    config = {name: value for name, value in PLAIN.items() if name != "lora_alpha"}
    missing = next(p for p in read_config({**config, key: 16}).problems if p.path == "config.lora_alpha")
    assert missing.code == "field_missing"
    assert repr(key) in missing.message


def test_u16_an_anchored_or_escaped_literal_means_the_module_that_peft_finds(tmp_path: Path, tiny: BaseModel) -> None:
    ranks = {"^model.layers.0.self_attn.q_proj": 2, r"self_attn\.k_proj$": 3, "^v_proj": 9}
    names = {"model.layers.0.self_attn.q_proj": 2, "self_attn.k_proj": 3}
    folder = write_adapter(tmp_path, tiny, rank_pattern=names, config={"rank_pattern": ranks})
    verdict = check(inspect_folder(folder), tiny, max_rank=64)
    assert (verdict.verdict, verdict.reasons) == ("accept", ())
    found = {
        name: verdict.modules[f"model.layers.{name}"].rank for name in ("0.self_attn.q_proj", "1.self_attn.q_proj")
    }
    assert found == {"0.self_attn.q_proj": 2, "1.self_attn.q_proj": 4}
    assert verdict.modules["model.layers.1.self_attn.k_proj"].rank == 3
    assert verdict.modules["model.layers.1.self_attn.v_proj"].rank == 4  # `^v_proj` is no module's whole name
    assert any("^v_proj" in line for line in verdict.dropped)


def test_u16_two_spellings_of_one_pattern_key_are_refused() -> None:
    assert codes(alpha_pattern={"q_proj": 4, "q_proj$": 8}) == ["pattern_not_allowed"]


def test_u5_a_loftq_start_may_keep_its_bits_and_rounds() -> None:
    reading = read_config({**PLAIN, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}})
    assert reading.problems == ()
    assert reading.settings is not None and reading.settings.mutated_init == "loftq"
    assert codes(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "path": "x"}) == ["field_not_allowed"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", "true"),
        ("lora_bias", 1),
        ("modules_to_save", [1]),
        ("modules_to_save", {"a": 1}),
        ("trainable_token_indices", ["a"]),
        ("trainable_token_indices", {"embed_tokens": [-1]}),
    ],
)
def test_u18_what_would_be_kept_for_exports_has_the_type_that_peft_writes(field: str, value: Any) -> None:
    assert codes(**{field: value}) == ["type_error"]


def test_a_config_of_too_many_fields_is_refused_at_once() -> None:
    config = {f"field_{i}": None for i in range(200_000)}
    started = time.process_time()
    (problem,) = read_config(config).problems
    assert (problem.code, problem.path) == ("out_of_range", "config")
    assert time.process_time() - started < 0.05
