"""`hotshoe inspect` and `hotshoe base show`: the verdict with every reason, as text and as JSON, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import build_app
from tests.fixtures.adapters import shape_only_base, write_adapter

runner = CliRunner()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shape_only_base(tmp_path / "base").folder


def inspect(folder: Path, base: Path, *more: str) -> tuple[int, str]:
    result = runner.invoke(build_app(), ["inspect", str(folder), "--base", str(base), *more])
    return result.exit_code, result.stdout


def test_an_adapter_that_fits_is_accepted_with_its_modules_and_ranks(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "fits", shape_only_base(tmp_path / "base"), rank=4)
    code, output = inspect(adapter, base, "--json")
    found = json.loads(output)
    assert (code, found["verdict"], found["modules"], found["ranks"]) == (0, "accept", 14, [4])
    code, output = inspect(adapter, base)
    assert code == 0
    assert output.startswith("accept: 14 modules, rank 4")


def test_an_adapter_of_another_shape_is_refused_with_exit_code_3_and_every_reason(tmp_path: Path, base: Path) -> None:
    other = shape_only_base(tmp_path / "other", hidden_size=32)
    code, output = inspect(write_adapter(tmp_path / "big", other), base, "--json")
    found = json.loads(output)
    assert (code, found["verdict"]) == (3, "refuse")
    assert len(found["reasons"]) > 1
    assert {reason["code"] for reason in found["reasons"]} == {"base_mismatch", "shape_mismatch"}


def test_a_foreign_claim_is_refused_until_the_base_is_said_to_be_the_served_one(tmp_path: Path, base: Path) -> None:
    claim = {"base_model_name_or_path": "Somebody/Else-7B"}
    adapter = write_adapter(tmp_path / "claims", shape_only_base(tmp_path / "base"), config=claim)
    code, output = inspect(adapter, base, "--json")
    assert (code, json.loads(output)["reasons"][0]["code"]) == (3, "base_mismatch")
    code, output = inspect(adapter, base, "--base-is", "served", "--json")
    assert (code, json.loads(output)["verdict"]) == (0, "accept")
    assert inspect(adapter, base, "--base-is", "mine")[0] == 2


def test_base_show_says_what_a_base_is(base: Path) -> None:
    result = runner.invoke(build_app(), ["base", "show", "--base", str(base), "--json"])
    shown = json.loads(result.stdout)
    assert (shown["architecture"], shown["layers"], shown["adaptable_modules"]) == ("Qwen2ForCausalLM", 2, 14)
    assert shown["digest"].startswith("sha256:")
