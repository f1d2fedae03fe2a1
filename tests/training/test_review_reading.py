"""How a review reads a config: its dialect, the lines, the keys of the installed libraries, and hostile files."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import ConfigInvalid
from adapters.strict_yaml import MAX_BYTES
from tests.training.review_configs import CLEAN, LLAMA_FACTORY, TRL
from training.review import known_keys
from training.review.check import Asked, review
from training.review.dialects import DIALECTS
from training.review.reading import read
from training.review.words import WORDS


def test_every_dialect_translates_into_the_one_vocabulary_and_knows_its_own_keys() -> None:
    inner = {"four", "eight", "all_linear", "early_stopping", "quant_method", "use_peft", "answers_only"}
    inner |= {"completions_only", "packing_strategy", "dtype"}  # which `finish` takes out again
    for dialect in DIALECTS.values():
        assert {name for name, _ in dialect.words.values()} <= set(WORDS) | inner, dialect.name
        assert set(dialect.words) <= dialect.known, dialect.name
        assert dialect.marks - dialect.sections <= dialect.known | {"special_tokens"}, dialect.name
        assert not set(dialect.renamed) & dialect.known or dialect.name == "axolotl", dialect.name


def declared(package: str, module: str, kind: str) -> dict[str, Any]:
    """Fields of an installed class with their plain defaults, read from its source: importing TRL takes ten seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / module).read_text("utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            given = node.value
            if isinstance(given, ast.Call):
                given = next((word.value for word in given.keywords if word.arg == "default"), None)
            found[node.target.id] = ast.literal_eval(given) if isinstance(given, ast.Constant) else None
    return found


TRAINING = ("transformers", "training_args.py", "TrainingArguments")
SFT = ("trl", "trainer/sft_config.py", "SFTConfig")
LORA = ("peft", "tuners/lora/config.py", "LoraConfig")


def test_the_lists_of_keys_are_those_of_the_installed_libraries() -> None:
    arguments, lora = set(declared(*TRAINING)), set(declared(*LORA))
    of_trl = set(declared(*SFT)) | set(declared("trl", "trainer/base_config.py", "_BaseConfig"))
    assert arguments == known_keys.TRAINING_ARGUMENTS
    assert of_trl - arguments - {"_VALID_DICT_FIELDS"} == known_keys.SFT
    assert lora <= known_keys.LORA
    parents = [set(declared("peft", "config.py", kind)) for kind in ("PeftConfigMixin", "PeftConfig")]
    assert known_keys.LORA - lora <= set.union(*parents)
    script = {
        *declared("trl", "trainer/model_config.py", "ModelConfig"),
        *declared("trl", "scripts/utils.py", "ScriptArguments"),
    }
    assert {name for name in script if not name.startswith("_")} == known_keys.SCRIPT


def test_the_defaults_of_trl_and_peft_are_those_of_the_installed_libraries() -> None:
    defaults = declared(*TRAINING) | declared("trl", "trainer/base_config.py", "_BaseConfig") | declared(*SFT)
    for name in ("learning_rate", "max_length", "batch", "accumulation", "epochs", "gradient_checkpointing", "seed"):
        key, value = DIALECTS["trl"].defaults[name]
        assert defaults[key] == value, key
    assert (defaults["save_steps"], defaults["weight_decay"], defaults["max_grad_norm"]) == (500, 0.0, 1.0)
    lora = declared(*LORA)
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (8, 8, 0.0)


def test_keys_that_no_trainer_has_are_listed_with_the_nearest_and_those_without_a_rule_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(LLAMA_FACTORY | {"lora_alhpa": 32, "zzz": 1, "plot_loss": True}), "utf-8")
    made = review(Asked(path)).as_dict()
    unknown = {row["setting"]: row for row in made["findings"] if row["rule"] == "key_unknown"}
    assert unknown["lora_alhpa"]["suggestion"] == "lora_alpha?"
    assert set(unknown) == {"lora_alhpa", "zzz"}
    assert "plot_loss" in made["without_a_rule"]
    told = {row["key"] for row in made["settings"].values()} | set(made["without_a_rule"]) | set(unknown)
    assert set(yaml.safe_load(path.read_text("utf-8"))) <= told | {"do_train"}


def test_a_finding_tells_the_line_of_the_file_and_a_default_has_none(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base_model: Qwen/Qwen2.5-7B-Instruct\nadapter: lora\nlora_r: 8\nlora_alpha: 800\n", "utf-8")
    rows = {row["rule"]: row for row in review(Asked(path)).as_dict()["findings"]}
    assert (rows["alpha_odd"]["line"], rows["alpha_odd"]["is_default"], rows["alpha_odd"]["value"]) == (4, False, 800)
    assert (rows["length_default"]["line"], rows["length_default"]["value"]) == (None, 512)


@pytest.mark.parametrize("dialect", CLEAN)
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_every_value_keeps_the_line_that_its_own_key_stands_in(dialect: str, ending: str, tmp_path: Path) -> None:
    path, config = tmp_path / f"run.{ending}", CLEAN[dialect]
    path.write_text(json.dumps(config, indent=1) if ending == "json" else yaml.safe_dump(config), "utf-8")
    lines = path.read_text("utf-8").splitlines()
    for name, told in read(path, dialect).values.items():
        assert told.is_default or lines[told.line - 1].strip(' "').startswith(told.key.rpartition(".")[2]), name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x 1\nb: *x\n", "anchor"),
        ("!!python/object/apply:os.system ['true']\n", "tag"),
        ("learning_rate: 1\nlearning_rate: 2\n", "twice"),
        ("- 1\n", "mapping"),
        ("nothing: known\n", "no key that tells"),
        ("model: x\ntrain_dataset: y\ndist_config: {name: ddp}\n", "v1 format"),
        ("a: " + "[" * 40 + "]" * 40 + "\n", "nested"),
        ("x" * (MAX_BYTES + 1), "bytes"),
    ],
)
def test_a_hostile_or_foreign_file_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigInvalid, match=reason):
        review(Asked(path))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"r": 8, "r": 9}', "twice"),
        (b'{"r": NaN}', "NaN"),
        (b"[1]", "object"),
        (b"[" * 100_000, "bytes"),
        (b'{"a": [' + b"0," * 20_000 + b"0]}", "values"),
        (b"\xff", "UTF-8"),
    ],
)
def test_a_hostile_json_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(data)
    with pytest.raises(ConfigInvalid, match=reason):
        review(Asked(path))


VALUES: list[Any] = [None, True, False, 0, -1, 3, 10**12, 0.5, 1e-9, "", "auto", "none", "1e-4", "x y", [], ["q_proj"]]
VALUES += [{}, {"a": [1]}, "all", [1, None], float("inf"), float("nan"), "*", "☃", "2020-01-01"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_values_are_a_review_is_made_and_is_json(data: st.DataObject, tmp_path: Path) -> None:
    dialect = data.draw(st.sampled_from(sorted(DIALECTS)))
    keys = st.sampled_from(sorted([*DIALECTS[dialect].words, *DIALECTS[dialect].renamed, "datasets", "nothing"]))
    config = data.draw(st.dictionaries(keys, st.sampled_from(VALUES).map(copy.deepcopy), max_size=25))
    path = tmp_path / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
    made = review(Asked(path, dialect, gpu=data.draw(st.sampled_from([None, "t4", "cpu"]))))
    json.dumps(made.as_dict(), allow_nan=False)


@pytest.mark.parametrize("rank", [-1, 0])
def test_a_rank_below_one_has_no_scale(rank: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"r": rank, "lora_alpha": 64, "use_rslora": True}), "utf-8")
    found = json.dumps(review(Asked(path, "peft")).as_dict())
    assert "rslora_scale" not in found and "alpha_odd" not in found


def test_thousands_of_unknown_keys_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text("".join(f"lora_rank{n}: 1\n" for n in range(3_000)), "utf-8")
    started = time.process_time()
    assert len(review(Asked(path, "llama-factory")).reading.unknown) == 3_000
    assert time.process_time() - started < 20


def test_a_dialect_can_be_named_and_a_wrong_one_is_told_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 0.0002\nlora_alpha: 32\n", "utf-8")
    with pytest.raises(ConfigInvalid, match="--dialect"):
        review(Asked(path))
    assert review(Asked(path, "axolotl")).reading.dialect == "axolotl"
    with pytest.raises(ConfigInvalid, match="did you mean axolotl"):
        review(Asked(path, "axolot"))


def test_trl_is_read_flat_and_in_sections_alike(tmp_path: Path) -> None:
    flat = {key: value for section in TRL.values() for key, value in section.items()}
    seen = []
    for name, config in (("nested", TRL), ("flat", flat)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config, indent=1), "utf-8")
        seen.append({key: given.value for key, given in read(path).values.items()})
    assert seen[0] == seen[1]
