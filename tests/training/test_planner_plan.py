"""`hotshoe plan` on the command line, and the rules behind its picks, prices and settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import ConfigInvalid, DataInvalid
from server.cli.main import build_app
from server.settings import Settings
from tests.training.conftest import chat, write_jsonl
from training.config import SERVED_RANK
from training.data.template import Rendered
from training.planner import machines
from training.planner.calibration import read_report, report_of, write_report
from training.planner.candidates import Wishes, candidate
from training.planner.latency import milliseconds_a_token
from training.planner.plan import Asked
from training.planner.plan import plan as make
from training.planner.sizes import find
from training.planner.table import lines
from training.planner.target import of_device, target_of
from training.planner.workload import Workload, pass_of

GIB = 2**30


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said = [chat(f"Colour number {i}?", f"It is colour {i}" + "!" * (i % 7)) for i in range(300)]
    return write_jsonl(tmp_path_factory.mktemp("plan") / "rows.jsonl", said)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.fixtures.bases import tiny_qwen2

    return str(tiny_qwen2(tmp_path_factory.mktemp("plan") / "bytes"))


def planned(rows: Path, tokenizer: str, **asked: Any) -> dict[str, Any]:
    return make(Asked(rows, tokenizer=tokenizer, **{"gpu": "t4", **asked}))


def work(count: int = 200, length: int = 100) -> Workload:
    row = Rendered(tuple(range(length)), (-100,) * (length - 10) + (1,) * 10, (1,))
    return Workload((row,) * count)


def test_a_plan_lists_every_size_and_method_with_parts_that_add_up(rows: Path, tokenizer: str) -> None:
    found = planned(rows, tokenizer)
    assert len(found["candidates"]) == 3 * 14
    for row in found["candidates"]:
        memory = row["memory"]
        parts = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace")
        assert sum(memory[part] for part in parts) == memory["total"]
        assert memory["low"] < memory["total"] < memory["high"]
        assert row["fits"] == (not row["is_lower_bound"] and memory["high"] <= found["machine"]["memory_bytes"])
        assert row["time"]["low"] < row["time"]["seconds"] < row["time"]["high"]
    fits = {(row["base"], row["method"]) for row in found["candidates"] if row["fits"]}
    assert {("Qwen2.5-7B", "qlora"), ("Qwen3-8B", "qlora"), ("Qwen2.5-1.5B", "lora")} <= fits
    assert not {("Qwen2.5-7B", "lora"), ("Qwen2.5-7B", "full"), ("Qwen2.5-72B", "qlora")} & fits


def test_a_t4_is_planned_without_bfloat16_and_says_so(rows: Path, tokenizer: str) -> None:
    found = planned(rows, tokenizer)
    assert all(row["dtype"] != "bfloat16" for row in found["candidates"])
    said = {line["setting"]: line["reason"] for line in found["settings"]}
    assert "no bfloat16" in said["precision"]
    assert "unvalidated" in found["machine"]["status"] and not found["machine"]["is_validated"]
    modern = planned(rows, tokenizer, gpu="a10", base="Qwen2.5-7B")
    assert modern["picks"][0]["dtype"] == "bfloat16"


def test_every_setting_has_a_reason_in_one_line(rows: Path, tokenizer: str) -> None:
    found = planned(rows, tokenizer, base="Qwen2.5-3B")
    settings = {line["setting"]: line for line in found["settings"]}
    assert set(settings) == {
        *("method", "precision", "rank", "alpha", "target_modules", "learning_rate", "batch", "epochs", "max_length"),
        *("gradient_checkpointing", "attention", "packing", "optimizer"),
    }
    assert all(line["reason"] and "\n" not in line["reason"] for line in settings.values())
    assert "not for commercial use" in "\n".join(lines(found)), "the licence of Qwen2.5-3B is said"


def test_the_rank_stays_within_what_is_served(rows: Path, tokenizer: str) -> None:
    found = planned(rows, tokenizer, base="Qwen3-0.6B", max_rank=8)
    settings = {line["setting"]: line for line in found["settings"]}
    assert settings["rank"]["value"] == 8 and settings["alpha"]["value"] == 16
    assert "8 at most (max_rank)" in settings["rank"]["reason"]


def test_the_rank_that_a_plan_reckons_with_is_the_servers() -> None:
    assert Asked(Path("rows.jsonl")).max_rank == SERVED_RANK == Settings.model_fields["max_rank"].default


def test_money_is_time_times_price_and_a_budget_leaves_out_what_costs_more(rows: Path, tokenizer: str) -> None:
    found = planned(rows, tokenizer, gpu="a100", price=3600.0, base="Qwen3-0.6B")
    row = found["candidates"][0]
    assert row["money"][0]["dollars"] == pytest.approx(row["time"]["seconds"])
    costs = sorted(row["money"][0]["dollars"] for row in found["candidates"] if row["fits"])
    within = planned(rows, tokenizer, gpu="a100", price=3600.0, budget=costs[0], base="Qwen3-0.6B")
    assert all(pick["money"][0]["dollars"] <= costs[0] for pick in within["picks"])
    assert any(row["is_over_budget"] for row in within["candidates"])


def test_known_prices_have_a_date_and_a_source() -> None:
    assert {price.gpu for price in machines.PRICES} == {"t4", "a10"}
    for price in machines.PRICES:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", price.date) and price.source and price.dollars_per_hour > 0
    assert machines.prices_of("h100", None) == []


def test_a_latency_picks_the_largest_base_that_keeps_it_and_one_that_reasons(rows: Path, tokenizer: str) -> None:
    target = target_of("a10")
    limit = milliseconds_a_token(find("Qwen2.5-3B"), target, 16) * 1.01
    found = planned(rows, tokenizer, gpu="a10", latency_ms=limit)
    assert found["picks"][0]["base"] == "Qwen2.5-3B"
    assert any(pick["thinks"] for pick in found["picks"][1:])
    assert all(row["latency"]["is_within"] == (row["latency"]["ms_per_token"] <= limit) for row in found["candidates"])


def test_nothing_that_fits_names_the_smallest_and_where_it_would(rows: Path, tokenizer: str) -> None:
    result = CliRunner().invoke(
        build_app(), ["plan", str(rows), "--base", "Qwen2.5-32B", "--gpu", "t4", "--tokenizer", tokenizer]
    )
    assert result.exit_code == 3
    assert "Nothing fits" in result.output and "Qwen2.5-32B with qlora: at least" in result.output


def test_an_unknown_gpu_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ConfigInvalid, match="nearest: a100"):
        target_of("a1000")
    assert target_of("RTX 4090").key == "4090"
    assert target_of("A10G").key == "a10"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L40S", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_a_device_is_the_gpu_that_its_name_says_in_whole_words_with_its_own_memory(name: str, key: str | None) -> None:
    found = of_device(name, 85 * 10**9)
    assert (found.key if found else None) == key
    if found:
        assert (found.name, found.memory_bytes, found.device) == (name, 85 * 10**9, "cuda")


@pytest.mark.parametrize(("key", "value"), [("price", -1.0), ("budget", -0.5), ("max_rank", 0), ("max_length", 1)])
def test_a_number_that_cannot_be_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigInvalid, match=f"{key} is {value}"):
        Asked(Path("rows.jsonl"), **{key: value})


def test_data_that_cannot_be_read_is_refused_with_its_lines(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(DataInvalid):
        planned(write_jsonl(tmp_path / "bad.jsonl", ["{", {"messages": []}]), tokenizer)
    with pytest.raises(DataInvalid):
        planned(tmp_path / "missing.jsonl", tokenizer)


def test_the_json_of_the_command_is_the_plan(rows: Path, tokenizer: str) -> None:
    result = CliRunner().invoke(
        build_app(), ["plan", str(rows), "--base", "embedded", "--gpu", "l4", "--tokenizer", tokenizer, "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["usual"]["total"] > found["picks"][0]["memory"]["total"]
    assert found["picks"][0]["base"] == "embedded" and found["asked"]["max_rank"] == 64


def test_a_plan_without_data_is_wrong_usage() -> None:
    result = CliRunner().invoke(build_app(), ["plan"])
    assert result.exit_code != 0


def test_a_pass_is_the_rows_laid_end_to_end_after_their_prefix() -> None:
    first = Rendered((1, 2, 3, 4, 5), (-100, -100, -100, 4, 5), (1,))
    second = Rendered((1, 2, 9, 8, 7, 6), (-100, -100, -100, -100, 7, 6), (1,))
    found = pass_of([first, second])
    assert (found.prefix, found.longest_rest, found.tokens, found.supervised) == (2, 3, 7, 4)
    assert pass_of([first, second], shares_prefix=False).tokens == 9


def test_recomputing_comes_before_giving_up_and_costs_a_third_more() -> None:
    wishes, target = Wishes(64, None, ()), target_of("a10")
    short = candidate(find("Qwen2.5-7B"), "qlora", work(200, 200), target, wishes)
    long = candidate(find("Qwen2.5-7B"), "qlora", work(200, 4000), target, wishes)
    assert short.fits and not short.settings.gradient_checkpointing
    assert long.fits and long.settings.gradient_checkpointing


def report(ratio: float = 1.04) -> dict[str, Any]:
    runs = [
        {
            "name": "lora, float32",
            "itemsize": 4,
            "flops": 50e9,
            "step_seconds": [1.0, 1.1, 1.0],
            "peak_ratio": ratio,
            "peak_bytes": 10**9,
        }
    ]
    return report_of(runs)


def test_a_report_of_the_machine_makes_its_figures_calibrated(tmp_path: Path) -> None:
    write_report(tmp_path / "report.json", report(1.14))
    read = read_report(tmp_path / "report.json")
    target = target_of("cpu", read)
    if read["machine"]["key"] == "cpu":
        assert target.is_validated and "calibrated" in target.status
        assert target.rates[4].flops == 50e9
        assert target.error[1] == pytest.approx(0.14), "the error bar is as wide as the worst run"
    assert not target_of("h100", read).is_validated, "another machine's report says nothing"


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "else"}', '{"kind": "hotshoe-calibration", "format": 1}'])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigInvalid):
        read_report(tmp_path / "report.json")


@pytest.mark.gpu
def test_this_gpus_report_calibrates_plans_for_it(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from training.planner.calibration import calibrate

    found = calibrate()
    write_report(tmp_path / "report.json", found)
    assert all(0.5 < ratio < 1.5 for ratio in found["peak_ratios"])
    assert target_of("auto", read_report(tmp_path / "report.json")).is_validated
