"""The cards of real runs: their schema and other forms, the check as a server does it, and what a run can be asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from adapters.bases import load_base
from adapters.errors import ConfigInvalid
from server.cli.main import build_app
from server.settings import Settings as ServerSettings
from tests.training.conftest import chat, write_jsonl
from training.canaries import canaries_of, row_of, unused_codes
from training.card_diff import diff
from training.card_page import card_html
from training.card_readme import readme
from training.card_schema import problems, schema
from training.config import TrainingConfig
from training.data.formats import read_data
from training.goal import goal_of
from training.reference import open_reference
from training.served_check import SERVED_RANK, check_served
from training.trainer import TrainingResult, train

ROOMS = ("kitchen", "garage", "attic", "hall", "cellar", "study")
VERBS = ("light", "warm", "open", "lock")


def run(data: Path, base: Path, out: Path, **asked: Any) -> TrainingResult:
    asked = {"epochs": 6.0, "batch_size": 8, "learning_rate": 2e-2, "rank": 4, "dtype": "float32", **asked}
    return train(TrainingConfig(data=data, name="rooms", base=str(base), out=out, **asked), lambda line: None)


def hotshoe(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(part) for part in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [chat(f"{verb} the {room}", verb) for verb in VERBS for room in ROOMS]
    rows.append(chat("light it for mia@corp.net", "light"))
    return write_jsonl(tmp_path_factory.mktemp("data") / "rooms.jsonl", rows)


@pytest.fixture(scope="module")
def trained(rooms: Path, qwen2_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """With canaries, the best by its answers, and its data checked."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return run(rooms, qwen2_base, out, validation=rooms, canaries=2, best_by="score", evaluations=4, patience=0)


def test_a_runs_card_has_the_published_form_and_its_verdict_can_be_judged_again(
    trained: TrainingResult, tmp_path: Path
) -> None:
    card = json.loads((trained.folder / "card.json").read_text())
    assert problems(card) == []
    assert hotshoe("card", "check", trained.folder).exit_code == 0
    wrong = {**card, "verdict": {**card["verdict"], "flags": ["forgot"]}}
    (tmp_path / "card.json").write_text(json.dumps(wrong))
    result = hotshoe("card", "check", tmp_path, "--json")
    assert result.exit_code == 3 and "the evidence gives" in json.loads(result.stdout)["problems"][0]
    assert problems({**card, "format": 2}) and problems({key: card[key] for key in card if key != "base"})
    assert set(schema()["properties"]) == set(card), "every section of a card is in its schema"


def test_a_run_is_checked_as_a_server_does_it_and_its_canonical_form_answers_alike(trained: TrainingResult) -> None:
    check = trained.card["check"]
    assert check["passed"] and check["verdict"] == "accept" and check["rank"] == 4
    assert check["parity"]["positions"] > 16 and check["parity"]["max_abs"] <= 1e-4
    assert ServerSettings().max_rank == SERVED_RANK == check["rank_limit"]


def test_an_adapter_whose_files_say_something_else_is_not_called_good(
    trained: TrainingResult, qwen2_base: Path, tmp_path: Path
) -> None:
    reference = open_reference(trained.folder, qwen2_base)
    base, folder = load_base(qwen2_base), shutil.copytree(trained.folder, tmp_path / "copy")
    probes = [list(range(40, 60))]
    again = check_served(reference.model, base, folder, tmp_path / "scratch", probes)
    assert again["passed"] and not (tmp_path / "scratch").exists()
    with torch.no_grad():
        next(value for name, value in reference.model.named_parameters() if "lora_B" in name).add_(0.05)
    changed = check_served(reference.model, base, folder, tmp_path / "scratch", probes)
    assert not changed["passed"] and "answers otherwise" in changed["sentence"]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    refused = check_served(reference.model, base, folder, tmp_path / "scratch", probes)
    assert not refused["passed"] and refused["problems"]


def test_rows_with_private_things_are_no_samples_and_wrong_answers_come_first(trained: TrainingResult) -> None:
    samples = trained.card["samples"]
    assert samples["left_out_private"] == trained.card["privacy"]["samples_left_out"] == 1
    assert len(samples["right"]) <= 3 and all(row["expected"] == row["answer"] for row in samples["right"])
    assert "mia@corp.net" not in json.dumps(trained.card)
    assert trained.card["privacy"]["findings"] == {"email_address": 1}


def test_a_page_has_the_verdict_the_advice_the_check_and_the_samples(trained: TrainingResult) -> None:
    page = (trained.folder / "card.html").read_text()
    verdict = trained.card["verdict"]
    told = ("A server takes it as it is.", "classification", "Review of the settings")
    for shown in (verdict["sentence"], *verdict["advice"][:1], *told):
        assert shown in page, shown
    assert ("Right answers" in page) == bool(trained.card["samples"]["right"])
    learned = {**trained.card, "verdict": {**verdict, "primary": "learned", "flags": [], "sentence": "Learned."}}
    assert 'class="outcome good"' in card_html(learned)
    learned["verdict"] = {**learned["verdict"], "flags": ["memorised"]}
    assert 'class="outcome warn"' in card_html(learned) and '<span class="flag">memorised</span>' in card_html(learned)
    learned["check"] = {"passed": False, "sentence": "A server would not serve it."}
    assert '<p class="verdict worse">A server would not serve it.</p>' in card_html(learned)


def test_a_readme_for_the_hub_is_read_by_its_own_library(trained: TrainingResult) -> None:
    from huggingface_hub import ModelCard

    assert hotshoe("card", "readme", trained.folder, "--base", "Qwen/Qwen2.5-0.5B-Instruct").exit_code == 0
    card = ModelCard.load(trained.folder / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("Qwen/Qwen2.5-0.5B-Instruct", "peft")
    assert "classification" in card.data.tags
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["loss"] == pytest.approx(trained.card["evaluation"]["loss"]["adapter"], rel=1e-4)
    (trained.folder / "README.md").unlink()


def test_hostile_text_in_a_readme_is_neither_yaml_nor_markup() -> None:
    hostile = 'x"\n---\nevil: true\n<script>[a](b) | c'
    made = readme({"name": hostile, "base": {"id": hostile}, "settings": {"method": hostile, hostile: hostile}})
    _, front, body = made.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"}
    assert "<script>" not in body and "[a](b)" not in body


def test_two_cards_differ_in_what_differs(trained: TrainingResult, tmp_path: Path) -> None:
    card = trained.card
    other = {**card, "settings": {**card["settings"], "rank": 8}}
    assert diff(card, card) == []
    assert diff(card, other) == [{"topic": "settings", "path": "settings.rank", "one": 4, "other": 8, "ratio": 2.0}]
    (tmp_path / "card.json").write_text(json.dumps(other))
    assert "settings.rank: 4 -> 8  (x 2)" in hotshoe("card", "diff", trained.folder, tmp_path).stdout
    with pytest.raises(ConfigInvalid, match="There is no card"):
        hotshoe("card", "show", tmp_path / "nowhere")


def test_card_show_says_the_verdict_and_what_to_do(trained: TrainingResult) -> None:
    said = hotshoe("card", "show", trained.folder).stdout
    verdict = trained.card["verdict"]
    assert verdict["sentence"] in said and all(f"-> {line}" in said for line in verdict["advice"])
    assert json.loads(hotshoe("card", "show", trained.folder, "--json").stdout)["name"] == "rooms"


def test_the_weights_of_the_best_answers_are_kept_and_each_validation_has_its_score(trained: TrainingResult) -> None:
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["validation_score"] for line in lines if "validation_score" in line}
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    result = trained.card["result"]
    assert len(scores) == 4 and all(0 <= score <= 1 for score in scores.values())
    best = max(scores, key=lambda step: (scores[step], -losses[step]))
    assert result["best_step"] == best
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, result["steps"] + 1))


def test_answers_too_long_to_be_equal_cannot_choose_the_weights(qwen2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [chat(f"Number {i}?", "word " * 30) for i in range(4)])
    with pytest.raises(ConfigInvalid, match="too long to be equal"):
        run(data, qwen2_base, tmp_path / "out", validation=data, best_by="score")
    with pytest.raises(ConfigInvalid, match="no validation rows"):
        run(data, qwen2_base, tmp_path / "out", best_by="score")


def test_canaries_are_trained_on_ranked_and_counted(trained: TrainingResult) -> None:
    canaries = trained.card["verdict"]["evidence"]["canaries"]
    assert canaries["planted"] == 2 and canaries["candidates"] == 1000
    assert all(1 <= rank <= 1001 for rank in canaries["ranks"]) and len(canaries["ranks"]) == 2
    assert trained.card["data"]["training"]["sequences"] == 25 + 2
    assert trained.card["settings"]["canaries"] == 2


def test_canaries_and_their_candidates_are_the_seeds_own_and_never_meet() -> None:
    assert canaries_of(5, 3) == canaries_of(5, 3) != canaries_of(5, 4)
    canary = canaries_of(1, 3)[0]
    unused = unused_codes(canary, "3 0")
    assert len(set(unused)) == 1000 and canary.code not in unused
    assert row_of(canary).messages[-1]["content"] == canary.code != row_of(canary, unused[0]).messages[-1]["content"]


def of_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    return goal_of(read_data(write_jsonl(tmp_path / "rows.jsonl", rows)).rows).task


def test_the_goal_is_told_by_the_rows_where_nobody_says_it(tmp_path: Path) -> None:
    labels = ("billing", "shipping")
    assert of_rows(tmp_path, [chat(f"m{i}", labels[i % 2]) for i in range(40)]) == "classification"
    routes = [chat(f"m{i}", json.dumps({"intent": labels[i % 2], "n": i})) for i in range(40)]
    assert of_rows(tmp_path, routes) == "agent routing"
    assert (
        of_rows(tmp_path, [chat(f"m{i}", f"Free text number {i}, and more of it.") for i in range(40)]) == "generation"
    )
    played = [chat(f"m{i}", f"Arr {i}!", system="Stay in character: you are a pirate.") for i in range(40)]
    assert of_rows(tmp_path, played) == "role play"
    cited = [chat(f"Context: page {i}\nWhat is it?", f"It is page {i} of the book.") for i in range(40)]
    assert of_rows(tmp_path, cited) == "rag"
    rows = read_data(tmp_path / "rows.jsonl").rows
    assert goal_of(rows, "generation").as_dict()["is_detected"] is False
