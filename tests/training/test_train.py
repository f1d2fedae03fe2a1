"""Whole runs on tiny bases: what they leave, what they refuse, and that they learn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import (
    AdapterRefused,
    AlreadyRunning,
    BaseInvalid,
    ConfigInvalid,
    DataInvalid,
    OutputExists,
    TrainingStopped,
)
from tests.fixtures.bases import tiny_qwen2
from tests.training.conftest import chat, write_jsonl
from training.callbacks import Guard
from training.config import TrainingConfig
from training.staging import staged, staging_folder
from training.trainer import TrainingResult, train


def run(data: Path, base: Path, out: Path, **asked: Any) -> TrainingResult:
    lines: list[str] = []
    asked = {"epochs": 2.0, "batch_size": 4, "learning_rate": 5e-3, "rank": 4, "dtype": "float32", **asked}
    return train(TrainingConfig(data=data, name="colours", base=str(base), out=out, **asked), lines.append)


@pytest.mark.parametrize("base", ["qwen2_base", "qwen3_base"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_leaves_a_folder_that_peft_loads_and_a_card(
    request: pytest.FixtureRequest, base: str, method: str, colours: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request.getfixturevalue(base)
    result = run(colours, folder, tmp_path / "out", method=method, validation=colours)
    assert result.folder == tmp_path / "out"
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.html",
        "card.json",
        "metrics.jsonl",
        "runs",
    ]
    assert list((result.folder / "runs").glob("events.out.tfevents.*"))
    assert not staging_folder(result.folder).exists()
    card = json.loads((result.folder / "card.json").read_text())
    curve = card["result"]["curve"]["training"]
    assert curve[-1][1] < 0.9 * curve[0][1]  # it learns
    assert card["settings"]["method"] == method
    assert card["base"]["digest"].startswith("sha256:")
    tensors = load_file(result.folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("Colour number 3?", return_tensors="pt")
    with torch.no_grad():
        before = model(**tokens).logits
        after = PeftModel.from_pretrained(model, str(result.folder))(**tokens).logits
    assert (before - after).abs().max() > 1e-3


def test_the_card_says_what_was_trained_on_what_and_how(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    card = run(colours, qwen2_base, tmp_path / "out", validation=colours, seed=3).card
    training = card["data"]["training"]
    assert (training["rows"], training["sequences"], training["cut_rows"], training["dropped_rows"]) == (40, 40, 0, 0)
    assert 0 < training["supervised_tokens"] < training["tokens"]
    assert training["digest"] == card["data"]["validation"]["digest"]
    assert not card["data"]["validation"]["is_held_out"]
    assert card["template"]["digest"].startswith("sha256:")
    assert card["settings"]["seed"] == 3
    result, cost = card["result"], card["cost"]
    assert result["steps"] == 20 and len(result["curve"]["training"]) == 20
    assert result["validation_loss"] == min(loss for _, loss in result["curve"]["validation"])
    assert cost["tokens_per_second"] > 0 and cost["peak_memory_bytes"] > 10**8 and cost["seconds"] > 0
    assert {"torch", "transformers", "peft", "python"} <= set(card["versions"])
    assert card["parent"] is None


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    made = [
        load_file(
            run(colours, qwen2_base, tmp_path / f"out{i}", seed=seed, epochs=0.5).folder / "adapter_model.safetensors"
        )
        for i, seed in enumerate((5, 5, 6))
    ]
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert not all(torch.equal(made[0][key], made[2][key]) for key in made[0])


def test_accumulated_passes_give_the_weights_of_one_pass(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    """Rows have different numbers of learned tokens, so a mean of means would differ."""
    whole = run(colours, qwen2_base, tmp_path / "whole", batch_size=8, epochs=0.4)
    longest = whole.card["data"]["training"]["longest_tokens"]
    parts = run(colours, qwen2_base, tmp_path / "parts", batch_size=8, epochs=0.4, tokens_per_pass=2 * longest)
    assert (whole.card["settings"]["accumulation"], parts.card["settings"]["accumulation"]) == (1, 4)
    one, other = (load_file(made.folder / "adapter_model.safetensors") for made in (whole, parts))
    assert all(torch.allclose(one[key], other[key], atol=2e-5) for key in one)


def test_going_on_from_an_adapter_starts_at_its_weights_and_names_its_parent(
    colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    first = run(colours, qwen2_base, tmp_path / "one")
    second = run(colours, qwen2_base, tmp_path / "two", initial_adapter=first.folder, parent="colours@1", rank=None)
    assert second.card["parent"] == "colours@1"
    assert second.card["settings"]["rank"] == 4
    assert second.metrics["curve"]["training"][0][1] < 0.7 * first.metrics["curve"]["training"][0][1]
    with pytest.raises(ConfigInvalid, match="rank is 8"):
        run(colours, qwen2_base, tmp_path / "three", initial_adapter=first.folder, rank=8)
    with pytest.raises(AdapterRefused, match="adapter folder"):
        run(colours, qwen2_base, tmp_path / "three", initial_adapter=tmp_path, rank=None)
    assert not (tmp_path / "three").exists()


def test_an_adapter_of_another_base_cannot_be_gone_on_from(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    first = run(colours, qwen2_base, tmp_path / "one", epochs=0.2)
    wider = tiny_qwen2(tmp_path / "wider", hidden_size=128)
    with pytest.raises(AdapterRefused, match="does not fit"):
        run(colours, wider, tmp_path / "two", initial_adapter=first.folder, rank=None)


def test_without_a_validation_file_a_share_is_held_out_and_said(qwen2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"Number {i}?", f"It is {i}.") for i in range(100)])
    said: list[str] = []
    config = TrainingConfig(
        data=data, name="n", base=str(qwen2_base), out=tmp_path / "out", epochs=0.1, rank=2, dtype="float32"
    )
    card = train(config, said.append).card
    assert (card["data"]["training"]["rows"], card["data"]["validation"]["rows"]) == (90, 10)
    assert card["data"]["validation"]["is_held_out"]
    assert any("held out" in line for line in said)


def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best(qwen2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"Number {i}?", "yes" if i % 2 else "no") for i in range(16)])
    other = write_jsonl(tmp_path / "other.jsonl", [chat(f"Other {i}?", "something else") for i in range(8)])
    card = run(
        data, qwen2_base, tmp_path / "out", validation=other, epochs=40.0, evaluations=20, learning_rate=2e-2
    ).card
    result = card["result"]
    validation = dict(map(tuple, result["curve"]["validation"]))
    assert result["is_stopped_early"] and result["steps"] < card["settings"]["steps"]
    assert result["best_step"] == min(validation, key=lambda step: validation[step])
    assert result["best_step"] < result["steps"]
    kept = run(  # one step at almost no rate: its validation loss is that of what was kept
        *(data, qwen2_base, tmp_path / "again"),
        validation=other,
        initial_adapter=tmp_path / "out",
        rank=None,
        batch_size=16,
        epochs=1.0,
        learning_rate=1e-12,
    )
    assert kept.metrics["validation_loss"] == pytest.approx(result["validation_loss"], abs=1e-4)


def test_rows_above_the_length_are_refused_by_name_or_cut_or_dropped_and_counted(
    qwen2_base: Path, tmp_path: Path
) -> None:
    rows = [chat("Short?", "Yes."), chat("Long?", "No. " * 40), chat("x " * 90, "Yes."), chat("Short?", "No.")]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    limits = {"max_length": 140, "epochs": 1.0}
    with pytest.raises(DataInvalid) as caught:
        run(data, qwen2_base, tmp_path / "out", **limits)
    assert [(p.code, p.path) for p in caught.value.problems] == [
        ("row_too_long", f"{data}:2"),
        ("row_too_long", f"{data}:3"),
    ]
    assert "140" in caught.value.problems[0].message
    cut = run(data, qwen2_base, tmp_path / "cut", over_long="cut", **limits).card["data"]["training"]
    assert (cut["cut"], cut["dropped"]) == (["data.jsonl:2"], ["data.jsonl:3"])  # nothing to learn is left of row 3
    assert cut["longest_tokens"] == 140
    dropped = run(data, qwen2_base, tmp_path / "dropped", over_long="drop", **limits).card["data"]["training"]
    assert (dropped["dropped"], dropped["sequences"]) == (["data.jsonl:2", "data.jsonl:3"], 2)
    with pytest.raises(DataInvalid, match="no supervised token"):
        run(data, qwen2_base, tmp_path / "none", over_long="cut", max_length=5)


def test_a_length_above_the_bases_context_is_refused_and_not_lowered_in_silence(
    colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigInvalid, match=r"max_length is 2,049, and tiny-qwen2 has a context of 2,048 tokens"):
        run(colours, qwen2_base, tmp_path / "out", max_length=2049)
    long = write_jsonl(tmp_path / "long.jsonl", [chat("x " * 1100, "Yes.")])
    with pytest.raises(DataInvalid) as caught:
        run(long, qwen2_base, tmp_path / "out")
    (problem,) = caught.value.problems
    assert "at most 2,048 are allowed" in problem.message and "the base's context" in problem.advice


def test_bad_rows_of_the_data_and_of_the_validation_file_are_reported_at_once(qwen2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat("One?", "One."), "{"])
    validation = write_jsonl(tmp_path / "validation.jsonl", [{"prompt": "One?"}, chat("One?", "One.")])
    both = r"1 of 2 rows of .*data\.jsonl .*1 of 2 rows of .*validation\.jsonl"
    with pytest.raises(DataInvalid, match=both) as caught:
        run(data, qwen2_base, tmp_path / "out", validation=validation)
    assert [problem.path for problem in caught.value.problems] == [f"{data}:2", f"{validation}:1"]


def test_one_row_trains(qwen2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "one.jsonl", [chat("One?", "One.")])
    assert run(data, qwen2_base, tmp_path / "out").card["result"]["steps"] == 2


def test_a_base_that_computes_nan_stops_the_run_and_saves_nothing(
    colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    broken = tiny_qwen2(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingStopped, match="nan"):
        run(colours, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not staging_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_infinite_rate_of_change_stops_with_the_step_and_saves_nothing(
    method: str, colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    """Weights that overflow: finite at first, then no number, within the run."""
    broken = tiny_qwen2(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] *= 3e37
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    rank = None if method == "full" else 4
    with pytest.raises(TrainingStopped, match=r"(loss|grad_norm) is (nan|inf) at step 1: .*nothing was saved"):
        run(colours, broken, tmp_path / "out", method=method, rank=rank, learning_rate=0.1)
    assert not (tmp_path / "out").exists() and not staging_folder(tmp_path / "out").exists()


def test_an_adapter_that_would_change_nothing_is_no_success(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"changes nothing after training: every lora_B is zero\. Nothing"):
        run(colours, qwen2_base, tmp_path / "out", learning_rate=1e-60, epochs=0.2)
    assert not (tmp_path / "out").exists() and not staging_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_is_saved_without_embeddings_and_names_the_base_in_16_bits(
    method: str, colours: Path, tmp_path: Path
) -> None:
    """A vocabulary of 151,936 tokens would be 39 MB in the file."""
    base = tiny_qwen2(tmp_path / "base", tokenizer="real")
    folder = run(colours, base, tmp_path / "out", method=method, epochs=0.1).folder
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
    assert (folder / "adapter_model.safetensors").stat().st_size < 100_000
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["modules_to_save"]) == (str(base), None)


def test_neither_training_nor_validation_ever_holds_the_logits_of_a_batch(colours: Path, tmp_path: Path) -> None:
    """The largest tensor that any operation makes is a block of logits, with a real vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from training.loss import BLOCK_BYTES

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            is_logits = isinstance(made, torch.Tensor) and made.dim() == 2 and made.shape[1] == 151_936
            if is_logits and function is not torch.ops.aten.t.default:  # a view of the weights
                largest[0] = max(largest[0], made.numel())
            return made

    base = tiny_qwen2(tmp_path / "base", tokenizer="real")
    with Watch():
        card = run(colours, base, tmp_path / "out", validation=colours, epochs=0.2, batch_size=16, compare=False).card
    supervised = card["data"]["validation"]["supervised_tokens"]
    assert 0 < largest[0] <= BLOCK_BYTES // 4 < supervised * 151_936


def test_where_the_output_is_no_terminal_progress_is_plain_lines_with_loss_speed_and_time_left(
    colours: Path, qwen2_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(
        TrainingConfig(
            data=colours, validation=colours, name="n", base=str(qwen2_base), out=tmp_path / "out", epochs=0.5, rank=2
        )
    )
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    pattern = r"step \d+/5  loss \d\.\d{3}(  validation \d\.\d{3})?  [\d,]+ tokens/s  \d+:\d\d passed, \d+:\d\d left"
    assert lines and all(re.fullmatch(pattern, line) for line in lines)
    assert "\x1b" not in said and "━" not in said


def test_a_rate_far_too_high_stops_the_run_with_the_reason(qwen2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat("Colour?", "red")] * 8)
    good = run(data, qwen2_base, tmp_path / "good", epochs=40.0, learning_rate=2e-2, rank=8)
    with pytest.raises(TrainingStopped, match=r"exploded.*learning-rate"):
        run(data, qwen2_base, tmp_path / "out", initial_adapter=good.folder, rank=None, learning_rate=0.1, epochs=20.0)
    assert not (tmp_path / "out").exists()


def test_the_guard_bears_a_spike_and_stops_a_rise_that_stays() -> None:
    guard = Guard()
    for step, loss in enumerate([3.0, 2.0, 9.0, 1.5, 1.2, 1.0, 8.0, 8.0, 8.0, 8.0, 1.0]):
        guard.check(loss, step)
    with pytest.raises(TrainingStopped, match="exploded"):
        for step in range(5):
            guard.check(8.0, 11 + step)


def test_the_guard_leaves_infinite_gradients_in_float16_to_the_gradient_scaler(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    with pytest.raises(TrainingStopped, match="grad_norm is inf"):
        Guard().on_log(arguments, state, control, {"loss": 2.0, "grad_norm": math.inf})
    arguments.fp16 = True
    Guard().on_log(arguments, state, control, {"loss": 2.0, "grad_norm": math.inf})
    with pytest.raises(TrainingStopped, match="loss is nan"):
        Guard().on_log(arguments, state, control, {"loss": math.nan, "grad_norm": math.inf})


def test_an_output_that_exists_is_not_written_over(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputExists, match="out exists"):
        run(colours, qwen2_base, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        (staging.result / "a").write_text("a")
        with pytest.raises(AlreadyRunning), staged(tmp_path / "out"):
            raise AssertionError("two at once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "a"


def test_what_a_killed_run_left_is_cleared_by_the_next(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    left = staging_folder(tmp_path / "out")
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    result = run(colours, qwen2_base, tmp_path / "out", epochs=0.2)
    assert not left.exists()
    assert load_file(result.folder / "adapter_model.safetensors")


def test_a_folder_that_is_no_base_is_refused(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseInvalid):
        run(colours, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_serving_is_told_whether_to_think(qwen3_bytes_base: Path, tmp_path: Path) -> None:
    thinking = {
        "messages": [
            {"role": "user", "content": "Is it dark?"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "It is night."},
        ]
    }
    plain = chat("Is it dark?", "Yes.")
    for name, rows, expected in (
        ("plain", [plain], False),
        ("thinking", [thinking], True),
        ("mixed", [plain, thinking], None),
    ):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        card = run(data, qwen3_bytes_base, tmp_path / name, epochs=1.0).card
        assert card["template"]["enable_thinking"] is expected


def test_recomputed_activations_give_the_same_weights(colours: Path, qwen3_bytes_base: Path, tmp_path: Path) -> None:
    one, other = (
        load_file(
            run(colours, qwen3_bytes_base, tmp_path / str(saves), epochs=0.3, gradient_checkpointing=saves).folder
            / "adapter_model.safetensors"
        )
        for saves in (False, True)
    )
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_bfloat16_learns_with_an_adapter_in_float32(
    method: str, colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    result = run(colours, qwen2_base, tmp_path / "out", method=method, dtype="bfloat16")
    curve = result.metrics["curve"]["training"]
    assert curve[-1][1] < 0.9 * curve[0][1]
    tensors = load_file(result.folder / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_with_dropout_every_row_has_masks_of_its_own(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    plain = run(colours, qwen2_base, tmp_path / "plain", epochs=0.2)
    dropped = run(colours, qwen2_base, tmp_path / "dropped", epochs=0.2, dropout=0.1)
    costs = [made.card["cost"] for made in (plain, dropped)]
    assert costs[0]["computed_tokens"] < costs[1]["computed_tokens"]  # the prefix went through once a batch
    assert costs[1]["computed_tokens"] < costs[1]["tokens"]  # and in both no row's end, which nothing is learned from


def test_more_than_one_process_is_refused_by_name(
    colours: Path, qwen2_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigInvalid, match="WORLD_SIZE"):
        run(colours, qwen2_base, tmp_path / "out")


@pytest.mark.model
def test_the_embedded_base_learns_a_routing_task_in_a_few_steps(tmp_path: Path) -> None:
    rooms = ["kitchen", "garage", "attic", "hall"]
    rows = [
        chat(f"{verb} the lamp in the {room}", f'{{"intent": "{intent}", "area": "{room}"}}')
        for room in rooms
        for verb, intent in (("switch on", "TurnOn"), ("kill", "TurnOff"))
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows * 3)
    card = train(
        TrainingConfig(data=data, name="rooms", out=tmp_path / "out", method="qlora", batch_size=8, epochs=4.0),
        lambda line: None,
    ).card
    assert card["settings"]["learning_rate"] == 1e-3 and card["settings"]["dtype"] == "float32"
    assert card["result"]["training_loss"] < 0.5 < 1.0 < card["result"]["curve"]["training"][0][1]
    assert card["base"]["id"] == "smollm2-135m-instruct"
