"""Settings: what is chosen where they are left open, and what is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ConfigInvalid, NameInvalid
from training.config import Facts, TrainingConfig, choose, default_batch_size, default_dtype, default_method
from training.config_file import read_config

EMBEDDED = Facts(1280, 60, True, 135_000_000, 8192, "float32", "cpu", 24 << 30, False)
SEVEN = Facts(5000, 900, True, 7_600_000_000, 32768, "bfloat16", "cuda", 80 << 30, True)


def config(**asked: Any) -> TrainingConfig:
    return TrainingConfig(data=Path("data.jsonl"), name="router", **asked)


def test_a_small_base_gets_a_higher_rate_than_a_large_one() -> None:
    small, large = choose(config(), EMBEDDED), choose(config(), SEVEN)
    assert (small.learning_rate, large.learning_rate) == (1e-3, 2e-4)
    assert (small.rank, small.alpha, small.batch_size, small.epochs) == (16, 32, 16, 3)
    assert small.steps == 240
    assert small.evaluation_steps == 60
    assert not small.gradient_checkpointing and large.gradient_checkpointing
    assert (small.optimizer, large.optimizer) == ("adamw_torch", "paged_adamw_8bit")


@pytest.mark.parametrize(("rows", "size"), [(1280, 16), (534, 16), (533, 8), (240, 4), (20, 4)])
def test_the_batch_shrinks_until_there_are_100_steps(rows: int, size: int) -> None:
    assert default_batch_size(rows, 3) == size


def test_qlora_only_where_lora_does_not_fit() -> None:
    assert default_method(SEVEN, "bfloat16") == "lora"
    assert default_method(replace(SEVEN, device_memory_bytes=16 << 30), "bfloat16") == "qlora"
    assert default_method(EMBEDDED, "float32") == "lora"


def test_bfloat16_only_where_the_base_and_the_machine_have_it() -> None:
    assert default_dtype(SEVEN) == "bfloat16"
    assert default_dtype(replace(SEVEN, has_bfloat16=False)) == "float32"
    assert default_dtype(replace(EMBEDDED, has_bfloat16=True)) == "float32"


def test_long_rows_go_through_in_fewer_at_once_with_the_same_rows_a_step() -> None:
    chosen = choose(config(batch_size=16), replace(SEVEN, longest_row_tokens=4096))
    assert (chosen.pass_size, chosen.accumulation, chosen.batch_size) == (2, 8, 16)


def test_what_is_asked_for_is_what_is_used() -> None:
    asked = {"epochs": 1.5, "learning_rate": 3e-4, "rank": 8, "alpha": 8.0, "batch_size": 8, "method": "qlora"}
    chosen = choose(config(**asked, dtype="bfloat16", max_length=64), EMBEDDED).as_dict()
    assert {key: chosen[key] for key in asked} == asked
    assert (chosen["dtype"], chosen["max_length"], chosen["steps"]) == ("bfloat16", 64, 240)


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "prefix"},
        {"epochs": 0},
        {"epochs": float("nan")},
        {"learning_rate": 1.0},
        {"rank": 0},
        {"rank": 1024},
        {"alpha": -1.0},
        {"batch_size": 0},
        {"over_long": "ignore"},
        {"supervise": "first"},
        {"scheduler": "exponential"},
        {"dtype": "int8"},
        {"warmup_ratio": 1.0},
        {"dropout": 1.0},
        {"seed": -1},
        {"patience": -1},
        {"target_modules": ("lm_head",)},
        {"target_modules": ()},
        {"checkpoint_steps": 0},
        {"report_to": ("mlflow",)},
        {"report_to": ("none", "wandb")},
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name_value_and_limit(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        config(**asked)
    (key,) = asked
    assert caught.value.param == key
    assert caught.value.message.startswith(f"{key} is {asked[key]!r}; it must be ")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"rank": 8}, "rank"),
        ({"alpha": 8.0}, "alpha"),
        ({"target_modules": ("q_proj",)}, "target_modules"),
        ({"use_rslora": True}, "use_rslora"),
        ({"dropout": 0.1}, "dropout"),
        ({"initial_adapter": Path("x")}, "from"),
    ],
)
def test_full_refuses_what_only_an_adapter_has(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigInvalid, match="method full") as caught:
        config(method="full", **asked)
    assert caught.value.param == param


def test_full_trains_at_a_tenth_of_the_rate_and_its_card_has_no_settings_of_an_adapter() -> None:
    small, large = choose(config(method="full"), EMBEDDED), choose(config(method="full"), SEVEN)
    assert (small.learning_rate, large.learning_rate) == pytest.approx((1e-4, 2e-5))
    assert not {"rank", "alpha", "target_modules", "use_rslora", "dropout"} & small.as_dict().keys()


def test_there_are_ten_checkpoints_a_run_and_never_more_than_500_steps_between() -> None:
    assert choose(config(), EMBEDDED).checkpoint_steps == 24  # of 240
    assert choose(config(epochs=100.0), SEVEN).checkpoint_steps == 500
    assert choose(config(checkpoint_steps=7), SEVEN).checkpoint_steps == 7


def test_a_name_that_cannot_be_served_is_refused_before_training() -> None:
    with pytest.raises(NameInvalid):
        TrainingConfig(data=Path("x"), name="no/slashes")


def test_every_setting_is_documented_where_it_is_defined_and_the_page_says_the_same() -> None:
    assert all(item.metadata.get("doc") for item in fields(TrainingConfig))
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.split("| Setting | What it is |\n|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == [f"| `{name}` | {doc} |" for name, doc in TrainingConfig.documentation().items()]


def test_the_pages_file_of_settings_is_one_that_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert TrainingConfig(**read_config(tmp_path / "run.yaml")).report_to == ("tensorboard", "wandb")
