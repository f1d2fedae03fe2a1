"""`hotshoe export DIR`: a trainer's folder in every form, with no server at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from server.cli.export import _bytes
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("cli-export") / "tiny-qwen2"))


@pytest.fixture(scope="module")
def folder(base: BaseModel) -> Path:
    return write_adapter(base.folder.parent / "router-en", base)


def exported(folder: Path, base: BaseModel, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("hotshoe")), "export", str(folder), "--base", str(base.folder)]
    return subprocess.run([*command, "--out", str(out), *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--format", "gguf", "--dtype", "q8_0"), "router-en-Q8_0.gguf"),
        (("--format", "gguf-lora", "--dtype", "f16"), "router-en-lora-F16.gguf"),
        (("--format", "adapter"), "adapter_model.safetensors"),
        (("--dtype", "bfloat16", "--shard-size", "2MB"), "model.safetensors"),
    ],
    ids=["gguf", "gguf-lora", "adapter", "hf"],
)
def test_a_folder_is_exported_in_every_form(
    folder: Path, base: BaseModel, tmp_path: Path, words: tuple[str, ...], name: str
) -> None:
    done = exported(folder, base, tmp_path / "out", *words, "--no-parity", "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert name in result["files"] and result["parity"]["verdict"] == "passed"
    assert (tmp_path / "out" / name).stat().st_size == result["files"][name]["size_bytes"]


def test_the_answers_to_a_data_file_are_compared_too(folder: Path, base: BaseModel, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "turn on the lamp", "completion": "HassTurnOn"}) + "\n")
    done = exported(folder, base, tmp_path / "out", "--eval", str(rows))
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "out" / "parity.json").read_bytes())["logits"]["evaluation"]
    assert evaluation["counts"]["rows"] == 1 and evaluation["answers"]["merged_against_peft"]["prompts"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "zip"), "is not one of hf, gguf, adapter, gguf-lora"),
        (("--shard-size", "many"), "is no size. Write 2GB, 500MB or bytes."),
        (("--format", "gguf", "--merge-into", "int8"), "is not one of original, nf4"),
    ],
    ids=["format", "size", "merge-into"],
)
def test_an_option_that_cannot_be_is_named(
    folder: Path, base: BaseModel, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = exported(folder, base, tmp_path / "out", *words)
    assert done.returncode != 0 and said in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "expected"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1048576", 1 << 20)])
def test_sizes_are_read_in_powers_of_ten(size: str, expected: int) -> None:
    assert _bytes(size) == expected
