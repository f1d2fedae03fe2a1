"""A YAML of settings: what it may hold, what is refused with which words, and that hostile files do no harm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ConfigInvalid
from adapters.strict_yaml import MAX_BYTES
from training.config import TrainingConfig
from training.config_file import read_config, settable

EXAMPLES: dict[str, tuple[str, Any]] = {
    "data": ("rows.jsonl", Path("rows.jsonl")),
    "name": ("no", "no"),  # text stays text: YAML's own rules would make this false
    "out": ("made/here", Path("made/here")),
    "columns": ("[prompt=Question, completion=My answer]", ("prompt=Question", "completion=My answer")),
    "validation": ("v.jsonl", Path("v.jsonl")),
    "validation_share": ("0.2", 0.2),
    "base": ("embedded", "embedded"),
    "method": ("qlora", "qlora"),
    "epochs": ("2", 2.0),
    "learning_rate": ("1e-4", 1e-4),  # which YAML 1.1 takes for text
    "learning_rate_multiplier": ("2", 2),
    "scheduler": ("linear", "linear"),
    "warmup_ratio": ("0.1", 0.1),
    "batch_size": ("8", 8),
    "tokens_per_pass": ("4096", 4096),
    "pass_size": ("4", 4),
    "rank": ("4", 4),
    "alpha": ("8", 8.0),
    "target_modules": ("[q_proj, v_proj]", ("q_proj", "v_proj")),
    "use_rslora": ("true", True),
    "dropout": ("0.05", 0.05),
    "weight_decay": ("0.01", 0.01),
    "max_gradient_norm": ("0.5", 0.5),
    "max_length": ("512", 512),
    "over_long": ("drop", "drop"),
    "supervise": ("last", "last"),
    "thinking": ("off", False),
    "evaluations": ("3", 3),
    "patience": ("1", 1),
    "best_by": ("score", "score"),
    "goal": ("classification", "classification"),
    "canaries": ("8", 8),
    "baseline": ("baseline.json", Path("baseline.json")),
    "samples": ("2", 2),
    "data_check": ("false", False),
    "rules": ("[email_address=off]", ("email_address=off",)),
    "replay": ("general.jsonl", Path("general.jsonl")),
    "replay_share": ("0.2", 0.2),
    "seed": ("5", 5),
    "dtype": ("float32", "float32"),
    "gradient_checkpointing": ("on", True),
    "checkpoint_steps": ("20", 20),
    "compare": ("false", False),
    "report_to": ("tensorboard, wandb", ("tensorboard", "wandb")),
    "logs": ("logs", Path("logs")),
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_setting_can_be_set_by_its_name_and_has_its_type(tmp_path: Path) -> None:
    assert set(settable()) == set(EXAMPLES)
    path = write(tmp_path, "".join(f"{key}: {text}\n" for key, (text, _) in EXAMPLES.items()))
    settings = read_config(path)
    assert settings == {key: value for key, (_, value) in EXAMPLES.items()}
    assert TrainingConfig(**settings).epochs == 2.0


def test_an_empty_file_and_empty_values_leave_settings_open(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "# nothing\n")) == {}
    assert read_config(write(tmp_path, "epochs:\nrank: null\nseed: 3\n")) == {"seed": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1e-4\n", r":1: there is no setting 'learning_rte'; did you mean learning_rate\?"),
        ("epochs: 3\nbatch-size: 4\n", r":2: there is no setting 'batch-size'; did you mean batch_size\?"),
        ("zzz: 1\n", "there is no setting 'zzz'; known are alpha, "),
        ("initial_adapter: x\n", "there is no setting 'initial_adapter'"),
        ("epochs: three\n", "epochs is 'three'; it must be a number"),
        ("rank: 8.5\n", "rank is '8.5'; it must be a whole number"),
        ("thinking: perhaps\n", "thinking is 'perhaps'; it must be true or false"),
        ("seed: [1]\n", r"seed is \['1'\]; it must be a whole number"),
        ("target_modules: [[q_proj]]\n", "nested deeper than 2 levels in line 1"),
        ("target_modules: {a: b}\n", "it must be a list of names"),
        ("rank: 4\nrank: 8\n", ":2: rank is set twice"),
        ("- epochs\n", "one mapping of settings"),
        ("just text\n", "one mapping of settings"),
        ("epochs: [1\n", "is not YAML"),
        ("a: 1\n---\nb: 2\n", "is not YAML|no setting"),
        ("\x00", "is not YAML"),
    ],
)
def test_what_is_wrong_is_said_with_line_value_and_what_it_must_be(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        read_config(write(tmp_path, text))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "anchor or alias in line 1"),
        ("name: !!python/object/apply:os.system ['touch /tmp/owned']\n", "tag '.*os.system' in line 1"),
        ("name: !!python/name:os.system\n", "tag"),
        ("a: " + "[" * 30_000, "nested deeper than 2 levels"),
        ("{" * 30_000, "nested deeper than 2 levels"),
        ("epochs: 1\n" * 20_000, f"more than {MAX_BYTES:,} bytes"),
        ("seed: " + "9" * 60_000 + "\n", "seed is '9"),
    ],
    ids=["aliases", "apply", "name", "lists", "mappings", "size", "digits"],
)
def test_a_hostile_file_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigInvalid, match=message) as caught:
        read_config(write(tmp_path, text))
    assert time.monotonic() - started < 5
    assert len(caught.value.message) < 700


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="cannot be read: No such file"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigInvalid, match="not UTF-8"):
        read_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigInvalid, match="cannot be read: Is a directory"):
        read_config(tmp_path)
