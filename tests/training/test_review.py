"""The review of configs: each rule fires on the setting it is about, by the user's own key, and on no clean config."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from adapters.errors import ConfigInvalid
from server.cli.main import build_app
from tests.training.review_configs import AXOLOTL, CLEAN, LLAMA_FACTORY, OURS, TRL, Config
from training.config import Facts, TrainingConfig, choose
from training.levels import LEVELS, levels_of
from training.review import of_settings
from training.review.check import Asked, found, review
from training.review.dialects import DIALECTS
from training.review.facts import Data, Known, base_beside, base_named, lacks_bf16
from training.review.findings import KINDS
from training.review.reading import read
from training.review.rules import RULES
from training.review.view import View

ROOT = Path(__file__).parents[2]
SHORT = Data(400, tuple(range(20, 420)), 88_000, False, "the base")
FEW = Data(60, tuple(range(20, 80)), 3_000, False, "the base")
QWEN2 = {"model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "template": "qwen"}


def trl(**sections: Mapping[str, Any]) -> Config:
    return {name: {**TRL.get(name, {}), **changed} for name, changed in sections.items()}


# Code -> dialect, what is changed in its clean config (None takes a key out), the key that is named, what is known.
Case = tuple[str, Config, str, dict[str, Any]]
CASES: dict[str, Case] = {
    "key_unknown": ("llama-factory", {"lora_rnk": 8}, "lora_rnk", {}),
    "key_renamed": ("trl", trl(sft_config={"warmup_ratio": 0.05}), "sft_config.warmup_ratio", {}),
    "value_unreadable": ("axolotl", {"learning_rate": "fast"}, "learning_rate", {}),
    "config_refused": ("hotshoe", {"method": "magic"}, "config", {}),
    "stage_other": ("llama-factory", {"stage": "dpo"}, "stage", {}),
    "lr_low_lora": ("trl", trl(sft_config={"learning_rate": None}), "learning_rate", {}),
    "lr_high_lora": ("axolotl", {"learning_rate": 2e-3}, "learning_rate", {}),
    "lr_high_full": ("llama-factory", {"finetuning_type": "full"}, "learning_rate", {}),
    "lr_low_full": ("llama-factory", {"finetuning_type": "full", "learning_rate": "1e-7"}, "learning_rate", {}),
    "rate_never_falls": ("hotshoe", {"scheduler": "constant_with_warmup"}, "scheduler", {}),
    "warmup_long": (
        "llama-factory",
        {"warmup_ratio": None, "warmup_steps": 50},
        "warmup_steps",
        {"data": SHORT},
    ),
    "warmup_none": ("hotshoe", {"warmup_ratio": 0.0}, "warmup_ratio", {}),
    "weight_decay": ("axolotl", {"weight_decay": 0.1}, "weight_decay", {}),
    "clipping_off": ("axolotl", {"max_grad_norm": 0}, "max_grad_norm", {}),
    "optimizer_on_cpu": ("axolotl", {}, "optimizer", {"is_cpu": True}),
    "batch_large": ("llama-factory", {"gradient_accumulation_steps": 16}, "per_device_train_batch_size", {}),
    "batch_small": ("llama-factory", {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2},
                    "per_device_train_batch_size", {}),
    "epochs_many": ("hotshoe", {"epochs": 12}, "epochs", {}),
    "steps_few": ("llama-factory", {}, "per_device_train_batch_size", {"data": FEW}),
    "max_steps_win": ("axolotl", {"max_steps": 40}, "max_steps", {}),
    "rows_limited": ("llama-factory", {"max_samples": 100}, "max_samples", {}),
    "rank_unserved": ("axolotl", {"lora_r": 128, "lora_alpha": 256}, "lora_r", {}),
    "rank_large_for_rows": ("peft", {"r": 64, "lora_alpha": 128}, "r", {"data": SHORT}),
    "rank_small_for_rows": ("peft", {"r": 4, "lora_alpha": 8}, "r", {"data": Data(30_000)}),
    "alpha_odd": ("trl", trl(lora_config={"lora_alpha": 512}), "lora_config.lora_alpha", {}),
    "rslora_scale": ("peft", {"use_rslora": True}, "lora_alpha", {}),
    "targets_attention_only": ("trl", trl(lora_config={"target_modules": None}), "target_modules", {}),
    "targets_partial": ("axolotl", {"lora_target_modules": ["q_proj", "up_proj"]}, "lora_target_modules", {}),
    "targets_output": ("peft", {"target_modules": ["q_proj", "lm_head"]}, "target_modules", {}),
    "targets_unknown": ("peft", {"target_modules": ["q_proj", "up_proj", "c_attn"]}, "target_modules", {}),
    "modules_saved": ("axolotl", {"lora_modules_to_save": ["embed_tokens"]}, "lora_modules_to_save", {}),
    "dora": ("axolotl", {"peft_use_dora": True}, "peft_use_dora", {}),
    "feature_unserved": ("peft", {"layer_replication": [[0, 4], [2, 6]]}, "layer_replication", {}),
    "bias_trained": ("peft", {"bias": "all"}, "bias", {}),
    "init_changes_base": ("llama-factory", {"pissa_init": True}, "pissa_init", {}),
    "dropout_high": ("axolotl", {"lora_dropout": 0.3}, "lora_dropout", {}),
    "dropout_unsloth": ("llama-factory", {"use_unsloth": True, "lora_dropout": 0.05}, "lora_dropout", {}),
    "vocabulary_grows": ("axolotl", {"tokens": ["<role>"]}, "tokens", {}),
    "fp16_qwen": ("llama-factory", {**QWEN2, "bf16": None, "fp16": True}, "fp16", {}),
    "bf16_gpu": ("trl", {}, "sft_config.bf16", {"gpu": "T4"}),
    "precision_twice": ("llama-factory", {"fp16": True}, "fp16", {}),
    "bf16_pure": ("llama-factory", {"pure_bf16": True}, "pure_bf16", {}),
    "base_8bit": ("llama-factory", {"quantization_bit": 8}, "quantization_bit", {}),
    "quant_not_nf4": ("llama-factory", {"quantization_bit": 4, "quantization_type": "fp4"}, "quantization_type", {}),
    "quant_single": ("llama-factory", {"quantization_bit": 4, "double_quantization": False},
                     "double_quantization", {}),
    "quant_full": ("axolotl", {"adapter": None}, "load_in_4bit", {}),
    "quant_needless": ("trl", trl(quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
                       "quantization_config.load_in_4bit", {}),
    "flash_gpu": ("axolotl", {}, "flash_attention", {"gpu": "t4"}),
    "checkpointing_off": ("axolotl", {"gradient_checkpointing": False, "sequence_len": 8192},
                          "gradient_checkpointing", {}),
    "checkpointing_needless": ("trl", {}, "gradient_checkpointing", {"is_cpu": True}),
    "length_default": ("trl", trl(sft_config={"max_length": None}), "max_length", {}),
    "rows_cut": ("llama-factory", {"cutoff_len": 128}, "cutoff_len", {"data": SHORT}),
    "rows_dropped": ("axolotl", {"sequence_len": 128}, "sequence_len", {"data": SHORT}),
    "length_above_context": ("hotshoe", {"max_length": 99_999}, "max_length", {"context": 32_768}),
    "padding_to_length": ("axolotl", {"sample_packing": False, "pad_to_sequence_len": True},
                          "pad_to_sequence_len", {"data": SHORT}),
    "packing_leaks": ("llama-factory", {"packing": True}, "packing", {}),
    "packing_cuts": ("trl", trl(sft_config={"packing": True, "packing_strategy": "wrapped"}),
                     "sft_config.packing_strategy", {}),
    "prompt_trained": ("trl", trl(sft_config={"assistant_only_loss": None}), "assistant_only_loss", {}),
    "end_unlearned": ("axolotl", {"datasets": [{"path": "x", "train_on_eos": "none"}]},
                      "datasets[0].train_on_eos", {}),
    "data_unchecked": ("hotshoe", {"data_check": False}, "data_check", {}),
    "template_foreign": ("llama-factory", {"template": "llama3"}, "template", {}),
    "empty_thought_trained": ("llama-factory", {"model_name_or_path": "Qwen/Qwen3-8B", "template": "qwen3"},
                              "enable_thinking", {}),
    "thinking_base": ("llama-factory", {"model_name_or_path": "Qwen/Qwen3-4B-Thinking-2507"},
                      "model_name_or_path", {}),
    "pad_is_end": ("axolotl", {"special_tokens": {"pad_token": "<|im_end|>"}}, "special_tokens.pad_token", {}),
    "end_not_chatml": ("axolotl", {"special_tokens": {"eos_token": "<|endoftext|>"}}, "special_tokens.eos_token", {}),
    "base_unsupported": ("llama-factory", {"model_name_or_path": "Qwen/Qwen3-30B-A3B"}, "model_name_or_path", {}),
    "base_no_stop": ("axolotl", {"base_model": "Qwen/Qwen2.5-7B"}, "base_model", {}),
    "base_licence": ("axolotl", {"base_model": "Qwen/Qwen2.5-3B-Instruct"}, "base_model", {}),
    "base_quantised": ("axolotl", {"base_model": "Qwen/Qwen2.5-7B-Instruct-AWQ"}, "base_model", {}),
    "remote_code": ("llama-factory", {"trust_remote_code": True}, "trust_remote_code", {}),
    "validation_none": ("llama-factory", {"val_size": None}, "val_size", {}),
    "validation_unused": ("llama-factory", {"eval_strategy": None}, "val_size", {}),
    "best_unkept": ("axolotl", {"early_stopping_patience": None}, "evals_per_epoch", {}),
    "best_by_loss": ("llama-factory", {"metric_for_best_model": "eval_loss"}, "metric_for_best_model", {}),
    "saves_none": ("llama-factory", {"save_steps": 500}, "save_steps", {"data": SHORT}),
    "seed_open": ("trl", trl(sft_config={"seed": None}), "seed", {}),
    "neftune": ("axolotl", {"neftune_noise_alpha": 5}, "neftune_noise_alpha", {}),
    "curves_nowhere": ("llama-factory", {"report_to": "none"}, "report_to", {}),
    "devices_qlora": ("axolotl", {"fsdp_config": {"fsdp_version": 2}}, "fsdp_config", {}),
}  # fmt: skip


def merged(config: Config, changed: Config) -> Config:
    """The config with the changes; None takes a key out, a section is changed inside."""
    made = dict(config)
    for key, value in changed.items():
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            value = merged(made[key], value)
        if value is None:
            made.pop(key, None)
        else:
            made[key] = value
    return made


Look = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """The findings on a clean config with changes, the dialect told by the file itself."""

    def run(dialect: str, changed: Config, context: int | None = None, **known: Any) -> list[dict[str, Any]]:
        path = tmp_path / ("config.json" if dialect == "peft" else "config.yaml")
        config = merged(CLEAN[dialect], changed)
        path.write_text(json.dumps(config) if dialect == "peft" else yaml.safe_dump(config, sort_keys=False), "utf-8")
        reading = read(path)
        assert reading.dialect == dialect
        base = dataclasses.replace(base_named(reading.value("base")), context_length_tokens=context)
        return found(View(reading, Known(**{"base": base, **known})), {})

    return run


@pytest.mark.parametrize("code", CASES)
def test_a_rule_names_the_setting_that_trips_it_and_is_silent_on_the_clean_config(code: str, look: Look) -> None:
    dialect, changed, key, known = CASES[code]
    tripped = [row for row in look(dialect, changed, **known) if row["rule"] == code]
    assert [row["setting"] for row in tripped] == [key]
    assert tripped[0]["severity"] in LEVELS and tripped[0]["suggestion"]
    assert code not in {row["rule"] for row in look(dialect, {})}


@pytest.mark.parametrize("dialect", CLEAN)
def test_a_clean_config_has_no_finding(dialect: str, look: Look) -> None:
    assert look(dialect, {}) == []


def test_every_rule_has_a_case_an_effect_evidence_and_advice() -> None:
    assert set(CASES) == set(RULES) and len(RULES) >= 30
    for rule in RULES.values():
        assert rule.kind in KINDS and rule.level in LEVELS, rule.code
        assert rule.effect and rule.evidence and rule.advice, rule.code
        if rule.kind == "paper":
            assert re.search(r"\d{4}\.\d{5}|LoRA Without Regret", rule.evidence), rule.code
        for named in re.findall(r"(?:docs|training|adapters)/[\w./]+\w", rule.evidence):
            assert (ROOT / named).exists(), rule.code
        if rule.kind == "issue":
            assert re.search(r"[\w-]+/[\w.-]+#\d+", rule.evidence), rule.code


def test_steps_count_held_out_rows_packing_and_a_limit(look: Look, tmp_path: Path) -> None:
    def view(config: Config, data: Data) -> View:
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(config), "utf-8")
        return View(read(path), Known(data=data))

    data = Data(1000, tuple([512] * 1000), 512_000)
    plain = view(merged(LLAMA_FACTORY, {"cutoff_len": 2048}), data)
    assert (plain.rows, plain.batch, plain.steps) == (900, 16, 171)
    packed = view(merged(LLAMA_FACTORY, {"cutoff_len": 2048, "neat_packing": True}), data)
    assert (packed.sequences, packed.steps) == (225, 45)
    limited = view(merged(LLAMA_FACTORY, {"max_samples": 160}), data)
    assert (limited.rows, limited.steps) == (160, 30)
    assert view(merged(AXOLOTL, {"max_steps": 7}), data).steps == 7


def test_with_data_our_own_config_is_reviewed_with_what_training_would_choose(tmp_path: Path, qwen2_base: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"question {n}", "completion": "yes"}) + "\n" for n in range(50))
    (tmp_path / "rows.jsonl").write_text(rows, "utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(OURS | {"base": str(qwen2_base), "rank": 8}), "utf-8")
    made = review(Asked(path, data=tmp_path / "rows.jsonl")).as_dict()
    facts = made["facts"]
    assert (facts["training_rows"], facts["rows_a_step"], facts["steps"]) == (50, 4, 39)
    found_rules = {row["rule"]: row for row in made["findings"]}
    assert {"steps_few", "validation_none"} <= set(found_rules)  # rows are held out from a hundred on
    assert found_rules["steps_few"]["is_default"] and made["settings"]["alpha"]["value"] == 16.0
    many = "".join(json.dumps({"prompt": f"question {n}", "completion": "yes"}) + "\n" for n in range(1000))
    (tmp_path / "rows.jsonl").write_text(many, "utf-8")
    made = review(Asked(path, data=tmp_path / "rows.jsonl")).as_dict()
    assert made["facts"]["training_rows"] == 900 and made["findings"] == []


def test_a_run_of_ours_is_reviewed_from_its_settings_and_facts() -> None:
    facts = Facts(60, 80, False, 134_000_000, 8192, "float32", "cpu", 2**34, False)
    chosen = choose(TrainingConfig(data=Path("x"), name="x"), facts).as_dict()
    known = {"base": "embedded", "parameters": 134_000_000, "rows": 60, "longest_row_tokens": 80, "device": "cpu"}
    rows = {row["rule"]: row for row in of_settings(chosen, known)}
    assert set(rows) == {"steps_few", "validation_none"}
    assert json.loads(json.dumps(list(rows.values()))) == list(rows.values())
    fast = {row["rule"] for row in of_settings(chosen | {"learning_rate": 0.02, "rank": 96}, known)}
    assert {"lr_high_lora", "rank_unserved"} <= fast
    full = choose(TrainingConfig(data=Path("x"), name="x", method="full", learning_rate=2e-3), facts).as_dict()
    assert "lr_high_full" in {row["rule"] for row in of_settings(full, known | {"has_validation": True})}


def test_validation_rows_of_a_run_are_no_share_that_its_rows_lose() -> None:
    facts = Facts(1000, 80, True, 134_000_000, 8192, "float32", "cpu", 2**34, False)
    chosen = choose(TrainingConfig(data=Path("x"), name="x", rank=64), facts).as_dict()
    known = {"base": "embedded", "parameters": 134_000_000, "rows": 1000, "longest_row_tokens": 80, "device": "cpu"}
    assert of_settings(chosen, known | {"has_validation": True}) == []
    few = of_settings(chosen, known | {"has_validation": True, "rows": 500})
    assert {row["rule"]: row["detail"] for row in few}["rank_large_for_rows"] == "500 rows"


def test_a_base_beside_the_config_tells_what_the_configs_own_name_does_not(tmp_path: Path, qwen2_base: Path) -> None:
    path = tmp_path / "c.yaml"
    long = {"base_model": "Qwen/Qwen2.5-0.5B-Instruct", "sequence_len": 131072}
    path.write_text(yaml.safe_dump(merged(AXOLOTL, long)), "utf-8")
    assert "length_above_context" not in {row["rule"] for row in review(Asked(path)).findings}
    made = review(Asked(path, base=str(qwen2_base)))
    above = next(row for row in made.findings if row["rule"] == "length_above_context")
    assert above["suggestion"] == "2048" and made.facts["parameters"] == 0.5e9
    assert base_beside("mine", str(qwen2_base)) == base_named(str(qwen2_base))
    assert base_beside("meta-llama/Llama-3.1-8B", str(qwen2_base)) == base_named("meta-llama/Llama-3.1-8B")


def test_levels_are_set_by_rule_and_wrong_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(LLAMA_FACTORY | {"trust_remote_code": True}), "utf-8")
    assert review(Asked(path)).verdict == "warn"
    assert review(Asked(path, rules=("remote_code=off",))).verdict == "pass"
    assert review(Asked(path, rules=("remote_code=block",))).verdict == "block"
    for rule, reason in (("remote_cod=off", "did you mean remote_code"), ("dora=maybe", "must be one of")):
        with pytest.raises(ConfigInvalid, match=reason):
            levels_of((rule,), RULES, "docs/review.md")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("unsloth/Qwen3-14B-unsloth-bnb-4bit", 14e9),
        ("smollm2-135m-instruct", 135e6),
        ("mine", None),
    ],
)
def test_a_base_tells_its_size_by_its_name(name: str, parameters: float | None) -> None:
    assert base_named(name).parameters == parameters


def test_a_base_folder_tells_more_than_its_name(qwen2_base: Path, tmp_path: Path) -> None:
    base = base_named(str(qwen2_base))
    assert base.context_length_tokens == 2048 and base.is_qwen and (base.parameters or 0) < 1e6
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', "utf-8")
    assert base_named(str(tmp_path)).is_qwen is False


def test_gpus_before_ampere_have_no_bf16() -> None:
    assert lacks_bf16("Tesla T4") and lacks_bf16("v100")
    assert not lacks_bf16("A10") and not lacks_bf16("RTX 4090") and not lacks_bf16("cpu")


def test_the_command_reads_data_on_a_base_and_leaves_with_the_verdict(tmp_path: Path, qwen2_base: Path) -> None:
    rows = [{"prompt": f"question {n} " + "more " * n, "completion": "yes"} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(merged(LLAMA_FACTORY, {"cutoff_len": 200, **QWEN2})), "utf-8")
    words = ["review", str(path), "--data", str(data), "--base", str(qwen2_base), "--json"]
    done = CliRunner().invoke(build_app(), words)
    made = json.loads(done.stdout)
    assert done.exit_code == 3 and made["verdict"] == "block"
    cut = next(row for row in made["findings"] if row["rule"] == "rows_cut")
    assert cut["setting"] == "cutoff_len" and cut["suggestion"] == str(made["facts"]["tokens"]["max"])
    assert made["facts"]["rows"] == 40 and made["facts"]["training_rows"] == 36
    spoken = CliRunner().invoke(build_app(), words[:-1]).stdout
    assert "read as LLaMA-Factory" in spoken and "[rows_cut]" in spoken and "arXiv" in spoken
    path.write_text(yaml.safe_dump(LLAMA_FACTORY | {"trust_remote_code": True}), "utf-8")
    assert CliRunner().invoke(build_app(), ["review", str(path)]).exit_code == 0
    assert CliRunner().invoke(build_app(), ["review", str(path), "--strict"]).exit_code == 1


def test_the_docs_have_every_rule_and_every_word_as_the_code_has_them() -> None:
    page = (ROOT / "docs" / "review.md").read_text("utf-8")
    for rule in RULES.values():
        assert f"| `{rule.code}` | {rule.level} | {rule.effect} | {rule.evidence} | {rule.advice} |" in page, rule.code
    assert len(re.findall(r"^\| `\w+` \| (?:block|warn|note) \|", page, re.MULTILINE)) == len(RULES)
    for dialect in DIALECTS.values():
        assert dialect.title in page and f"`{dialect.name}`" in page
