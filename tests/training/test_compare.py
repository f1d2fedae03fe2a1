"""Base against adapter within a run, and the reference path: what was trained is what is saved and loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from adapters.bases import load_base
from adapters.errors import AdapterRefused, BaseMismatch, ConfigInvalid, HotshoeError, InvalidRequest
from server.cli.main import build_app
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.service import running
from tests.training.conftest import chat, write_jsonl
from training.compare import Comparison, last_turn, verdict
from training.config import TrainingConfig
from training.data.dataset import prepare
from training.data.formats import read_data
from training.data.template import Rendered, load_template
from training.evaluate import Prompt, load_examples
from training.reference import Reference, open_reference
from training.sample import evenly
from training.trainer import TrainingResult, train


def run(data: Path, base: Path, out: Path, **asked: Any) -> TrainingResult:
    asked = {"epochs": 4.0, "batch_size": 4, "learning_rate": 2e-2, "rank": 4, "dtype": "float32", **asked}
    return train(TrainingConfig(data=data, name="rooms", base=str(base), out=out, **asked), lambda line: None)


def hotshoe(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(build_app(), [str(part) for part in arguments], input=typed, catch_exceptions=False)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [chat(f"{verb} it", f'{{"do": "{verb}"}}') for verb in ("on", "off") for _ in range(8)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rooms.jsonl", rows)


@pytest.fixture(scope="module")
def trained(rooms: Path, qwen2_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    out = tmp_path_factory.mktemp("trained") / "out"
    return run(rooms, qwen2_base, out, validation=rooms, epochs=15.0, evaluations=3, patience=0)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_weights_are_the_same_bits_with_and_without_the_comparison(
    method: str, rooms: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    rate = 1e-3 if method == "full" else 2e-2
    made = [
        run(
            rooms,
            qwen2_base,
            tmp_path / str(compare),
            method=method,
            validation=rooms,
            compare=compare,
            epochs=0.5,
            learning_rate=rate,
            rank=None if method == "full" else 4,
            dropout=0.0 if method == "full" else 0.1,
        )
        for compare in (True, False)
    ]
    with_it, without = (
        {name: tensor for file in result.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for result in made
    )
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], without[name]) for name in with_it)
    assert made[0].card["evaluation"]["loss"].keys() == {"base", "adapter"}
    assert made[1].card["evaluation"] is None
    assert "it was turned off" in (made[1].folder / "card.html").read_text()


def test_the_card_compares_losses_and_answers_on_the_validation_rows(trained: TrainingResult) -> None:
    evaluation, result = trained.card["evaluation"], trained.card["result"]
    assert evaluation["loss"]["adapter"] == pytest.approx(result["validation_loss"], abs=1e-4)
    assert evaluation["loss"]["base"] > 2 * evaluation["loss"]["adapter"]
    answers = evaluation["answers"]
    assert (answers["rows"], answers["of_sequences"], answers["adapter"]["label"]) == (16, 16, "do")
    assert answers["base"]["exact_match"] == 0.0
    assert answers["adapter"]["exact_match"] == answers["adapter"]["label_accuracy"] == 1.0
    assert evaluation["verdict"].startswith("The adapter is better than the base")
    curve = result["curve"]
    assert [step for step, _ in curve["learning_rate"]] == [step for step, _ in curve["training"]]
    assert "better than the base" in (trained.folder / "card.html").read_text()


def test_the_card_s_figures_are_of_the_labels_that_its_goal_names(qwen2_base: Path, tmp_path: Path) -> None:
    words = ("on", "off", "dim")
    rows = [chat(f"{words[i % 3]} {i}", json.dumps({"room": f"r{i % 16}", "do": words[i % 3]})) for i in range(32)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    card = run(data, qwen2_base, tmp_path / "out", validation=data, epochs=0.1, data_check=False).card
    assert card["goal"]["label_field"] == "do"  # two rows share a room, which looks like a label where few are asked
    assert card["evaluation"]["answers"]["adapter"]["label"] == card["evaluation"]["figures"]["label"] == "do"


def test_what_was_trained_is_what_peft_loads(trained: TrainingResult, rooms: Path, qwen2_base: Path) -> None:
    """Loss and answers of the model in memory are in the card; here those of the saved folder, loaded by PEFT."""
    reference = open_reference(trained.folder, qwen2_base)
    examples = load_examples(rooms)
    sequences = reference.sequences([example.row for example in examples])
    losses = trained.card["evaluation"]["loss"]
    assert reference.loss(sequences) == pytest.approx(losses["adapter"], abs=1e-4)
    with reference.without_adapter():
        assert reference.loss(sequences) == pytest.approx(losses["base"], abs=1e-4)
    answers = reference.answers([example.prompt for example in examples], 24)
    assert answers == [example.expected for example in examples]
    pieces: list[str] = []
    assert reference.stream(examples[0].prompt, pieces.append, 24) == answers[0] == "".join(pieces)


def test_an_adapter_worse_than_the_base_is_said_in_a_plain_sentence(qwen2_base: Path, tmp_path: Path) -> None:
    right, wrong = (
        write_jsonl(tmp_path / f"{word}.jsonl", [chat(f"Number {i}?", word) for i in range(8)])
        for word in ("no", "yes")
    )
    base = run(right, qwen2_base, tmp_path / "base", method="full", learning_rate=3e-3, rank=None, epochs=20.0).folder
    out = tmp_path / "out"
    options = ("--validation", right, "--epochs", "20", "--learning-rate", "1e-2", "--rank", "4", "--evaluations", "1")
    result = hotshoe("train", wrong, "--name", "n", "--base", base, "--out", out, *options)
    sentence = json.loads((out / "card.json").read_text())["evaluation"]["verdict"]
    assert sentence.startswith("The adapter is worse than the base on the validation rows")
    assert sentence in result.output
    assert '<p class="verdict worse">' in (out / "card.html").read_text()


def test_a_verdict_needs_a_difference() -> None:
    assert "no better" in verdict(1.0, 1.0005)
    assert "worse" in verdict(1.0, 1.1) and "better than" in verdict(1.0, 0.9)


def test_answers_are_asked_where_equality_means_something(qwen2_base: Path, tmp_path: Path) -> None:
    template = load_template(qwen2_base)

    def asks(answer: str) -> bool:
        file = read_data(write_jsonl(tmp_path / "rows.jsonl", [chat("Say it.", answer)]))
        prepared = prepare(file, file.rows, template, max_length=2000, over_long="error")
        return Comparison(prepared, template, 4).asks

    assert asks("short") and asks(json.dumps({"text": "x" * 100}))
    assert not asks("x" * 100) and not asks(json.dumps({"text": "x" * 300}))


def test_the_asked_rows_are_spread_and_the_prompt_ends_where_the_last_answer_begins() -> None:
    rows = [Rendered((i,), (i,), (1,)) for i in range(100)]
    assert [row.input_ids[0] for row in evenly(rows, 4)] == [0, 25, 50, 75]
    assert evenly(rows[:3], 4) == rows[:3]
    sequence = Rendered((1, 2, 3, 4, 5, 6, 7), (-100, 2, -100, -100, 5, 6, -100), (1, 3))
    assert last_turn(sequence) == ([1, 2, 3, 4], [5, 6])


def test_an_answer_that_time_cut_short_does_not_count(qwen2_base: Path, rooms: Path) -> None:
    base = load_base(qwen2_base)
    template = load_template(base.folder)
    file = read_data(rooms)
    comparison = Comparison(prepare(file, file.rows, template, max_length=2000, over_long="error"), template, 4)
    model = Reference(base).model
    model.train()
    comparison.most_seconds = 0.0
    measured = comparison.measure(packed(model))
    assert measured.answers == [] and model.training


def packed(model: Any) -> Any:
    """The model with the attention that the trainer loads it with."""
    from training.packed import ATTENTION, register_attention

    register_attention()
    model.set_attn_implementation(ATTENTION)
    return model


def test_eval_of_a_folder_scores_it_and_its_base(trained: TrainingResult, rooms: Path, qwen2_base: Path) -> None:
    result = hotshoe(
        *("eval", rooms, "--model", trained.folder, "--base", qwen2_base, "--max-tokens", "24"),
        *("--against-base", "--rows", "8", "--json"),
    )
    printed = json.loads(result.stdout)
    assert (printed["rows"], printed["exact_match"], printed["base_exact_match"]) == (8, 1.0, 0.0)
    assert printed["loss"] < printed["base_loss"]
    alone = json.loads(hotshoe("eval", rooms, "--model", qwen2_base, "--rows", "2", "--json").stdout)
    assert alone["exact_match"] == 0.0 and "base_loss" not in alone


def test_chat_without_a_server_prints_the_answer_and_ends_with_the_input(
    trained: TrainingResult, qwen2_base: Path
) -> None:
    options = ("--local", "--base", qwen2_base, "--system", "Answer briefly.", "--max-tokens", "24")
    assert hotshoe("chat", trained.folder, "on it", *options).stdout == '{"do": "on"}\n'
    result = hotshoe("chat", trained.folder, *options, typed="off it\n\n")
    assert result.exit_code == 0 and '{"do": "off"}' in result.stdout
    printed = json.loads(hotshoe("chat", trained.folder, "on it", *options, "--json").stdout)
    assert printed["message"] == {"role": "assistant", "content": '{"do": "on"}'}


def test_wrong_bases_and_folders_are_named_plainly(
    trained: TrainingResult, rooms: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    wider = tiny_qwen2(tmp_path / "wider", hidden_size=128)
    copied = shutil.copytree(trained.folder, tmp_path / "copied")
    for folder, base, error, words in (
        (trained.folder, wider, BaseMismatch, "name its base with --base"),
        (tmp_path, qwen2_base, ConfigInvalid, "neither an adapter folder nor a model folder"),
    ):
        with pytest.raises(error, match=words):
            hotshoe("eval", rooms, "--model", folder, "--base", base)
    (copied / "card.json").unlink()
    with pytest.raises(AdapterRefused, match="does not load on wider"):
        hotshoe("eval", rooms, "--model", copied, "--base", wider)
    (copied / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(AdapterRefused, match="does not load"):
        hotshoe("chat", copied, "a", "--local", "--base", qwen2_base)
    for arguments in (("chat", "nobody", "a", "--local"), ("chat", "name", "a", "--base", qwen2_base)):
        with pytest.raises(ConfigInvalid):
            hotshoe(*arguments)
    with pytest.raises(HotshoeError, match="server"):
        hotshoe("eval", rooms, "--model", "served", "--url", "http://127.0.0.1:9")


def test_prompts_think_as_the_card_says_and_else_as_the_row(qwen3_bytes_base: Path, tmp_path: Path) -> None:
    base = load_base(qwen3_bytes_base)
    plain, thinking = (Prompt([{"role": "user", "content": "a"}], thinking=value) for value in (False, True))
    reference = Reference(base)
    assert reference.text(reference.render(plain)).endswith("</think>\n\n")
    assert not reference.text(reference.render(thinking)).endswith("</think>\n\n")
    folder = shutil.copytree(qwen3_bytes_base, tmp_path / "full")
    (folder / "card.json").write_text(json.dumps({"template": {"enable_thinking": False}}))
    told = Reference(load_base(folder))
    assert told.render(thinking) == told.render(plain) == reference.render(plain)


def test_eval_of_a_served_version_asks_with_its_cards_thinking_its_rows_tools_and_earlier_turns(
    trained: TrainingResult, qwen2_base: Path, tmp_path: Path
) -> None:
    from training.evaluation.answering import enable_thinking

    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Is it on?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "on"},
        {"role": "assistant", "content": "Yes."},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns, "tools": [tool]}, chat("on it", "no")])
    folder = shutil.copytree(trained.folder, tmp_path / "adapter")
    card = json.loads((folder / "card.json").read_text())
    card["template"]["enable_thinking"] = False
    (folder / "card.json").write_text(json.dumps(card))
    with running(load_base(qwen2_base), tmp_path / "server") as server:
        assert server.push("rooms", folder).json()["status"] == "ready"
        for name, thinking in (("rooms", False), ("rooms@1", False), ("rooms@stable", False), ("tiny-qwen2", None)):
            assert enable_thinking(server.url, "", name) is thinking, name
        shown = hotshoe("eval", data, "--model", "rooms", "--url", server.url, "--json").stdout
        printed, _ = json.JSONDecoder().raw_decode(shown[shown.index("{\n") :])  # the server logs to the same stream
        assert (printed["answered_by"], printed["rows"]) == (["rooms@1"], 2)
        assert printed["ttft_p50_seconds"] > 0
        with pytest.raises(InvalidRequest, match="nobody"):
            hotshoe("eval", data, "--model", "nobody", "--url", server.url)
        options = ("--url", server.url, "--against-base", "--json")
        shown = hotshoe("eval", data, "--model", "rooms", *options).stdout
        printed, _ = json.JSONDecoder().raw_decode(shown[shown.index("{\n") :])
        assert printed["report"]["against"][0]["answered_by"] == ["tiny-qwen2"]
        assert "base_exact_match" in printed and printed["report"]["noise"]["rows"] == 2
        with pytest.raises(ConfigInvalid, match="server's base"):
            hotshoe("eval", data, "--model", "tiny-qwen2", *options)
