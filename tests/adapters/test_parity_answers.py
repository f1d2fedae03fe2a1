"""Greedy answers of two runners: where they part, and whether rounding can be why; so, too, other forms of a merge."""

from __future__ import annotations

import math
from typing import Any

import pytest

from adapters.parity_answers import compare_answers, first_difference, gap_at, side_by_side
from adapters.parity_forms import compare_form, quantised_limit
from adapters.parity_prompts import MAX_ROWS, prompt_sets
from adapters.parity_verdict import largest_gap, logits_problems
from tests.fixtures.bases import qwen_tokenizer


def answer(greedy: list[int], gap: float = 1.0, ids: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """An answer of a runner that finds the next token number up less likely by `gap` nats, and a third by ten more."""
    logs = [-math.log(1 + math.exp(-gap) + math.exp(-gap - 10)) - lead for lead in (0.0, gap, gap + 10)]
    return {"ids": list(ids), "greedy": greedy, "top": [{t + i: logs[i] for i in range(3)} for t in greedy]}


def test_answers_part_at_the_first_token_that_is_not_the_same() -> None:
    assert first_difference(answer([5, 6, 7]), answer([5, 6, 7])) is None
    assert first_difference(answer([5, 6, 7]), answer([5, 9, 7])) == 1
    assert first_difference(answer([5, 6, 7]), answer([5, 6])) == 2
    assert gap_at(answer([5, 6], gap=0.25), answer([5, 7]), 1) == pytest.approx(0.25)
    assert gap_at(answer([5, 6], gap=0.25), answer([5, 99]), 1) == pytest.approx(10.25), (
        "no likelier than the least named"
    )
    assert gap_at(answer([5, 6]), answer([5]), 1) is None


def test_a_difference_is_rounding_within_the_gap_or_where_peft_rounded_does_the_same() -> None:
    reference = [answer([5, 6, 7], gap=0.25), answer([8, 9], gap=0.25)]
    other = [answer([5, 6, 7]), answer([8, 10])]
    found = compare_answers(reference, other, limit=0.3)
    assert (found["identical"], found["agreement"], found["beyond_rounding"]) == (1, 0.5, 0)
    assert found["first_differences"] == [{"prompt": 1, "token": 1, "gap": 0.25, "is_rounding": True}]
    assert compare_answers(reference, other, limit=0.2)["beyond_rounding"] == 1
    assert compare_answers(reference, other, limit=0.2, excused=other)["beyond_rounding"] == 0
    assert compare_answers(reference, other, limit=0.2, excused=reference)["beyond_rounding"] == 1
    assert compare_answers(reference, [other[0], answer([8])], limit=9.0)["beyond_rounding"] == 1, (
        "one has no token there"
    )
    with pytest.raises(ValueError, match="prompt 1 is not the same"):
        compare_answers(reference, [other[0], answer([8, 9], ids=(3,))], limit=1.0)


def test_the_gap_that_rounding_closes_follows_from_its_floor() -> None:
    figures: dict[str, Any] = {
        "merged_against_peft": {"max_abs": 0.11, "mean_abs": 0.01, "largest_logit": 20.0},
        "rounding_floor": {"max_abs": 0.1, "mean_abs": 0.01},
    }
    assert largest_gap(figures) == pytest.approx(2 * (2 * 0.1 + 1e-4 * 20))
    difference = {"prompt": 3, "token": 7, "gap": 4.5, "is_rounding": False}
    figures["answers"] = {"merged_against_peft": {"first_differences": [difference]}}
    (problem,) = logits_problems(figures)
    assert "answers of the probe: that to prompt 3 parts" in problem and "4.5 nats" in problem and "0.404" in problem
    difference["is_rounding"] = True
    assert logits_problems(figures) == []
    figures["evaluation"] = {**figures, "merged_against_peft": {"max_abs": math.nan, "mean_abs": 1, "largest_logit": 1}}
    assert [problem.partition(":")[0] for problem in logits_problems(figures)] == ["logits of the evaluation"] * 2


def test_texts_side_by_side_are_split_where_they_part_and_never_inside_a_letter() -> None:
    tokenizer = qwen_tokenizer("qwen2_5", "bytes")

    def of(text: str) -> dict[str, Any]:
        return answer(tokenizer(text)["input_ids"])

    found = side_by_side(tokenizer, of("the cat sat"), of("the dog"), [])
    assert found == {"first_difference": 4, "same": "the ", "peft": "cat sat", "merged": "dog"}
    assert side_by_side(tokenizer, of("same"), of("same"), []) == {
        "first_difference": None,
        "same": "same",
        "peft": "",
        "merged": "",
    }
    cut = side_by_side(tokenizer, of("giá ấ"), of("giá ẫ"), [])  # two letters that share their first bytes
    assert (cut["same"], cut["peft"], cut["merged"]) == ("giá ", "ấ", "ẫ")
    stop = tokenizer.eos_token_id
    ended = answer([*of("go")["greedy"], stop])
    assert side_by_side(tokenizer, ended, of("go on"), [stop])["peft"] == ""


def test_rows_that_cannot_be_used_are_counted_under_their_reason() -> None:
    tokenizer = qwen_tokenizer("qwen2_5", "bytes")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "secret answer"}]
    rows = [{"messages": turns}, "plain", {"messages": turns[1:]}, {"text": "no messages"}, 7, "x" * 5000]
    probe, evaluation = prompt_sets(tokenizer, rows, 320)
    assert (probe.rows, len(probe.ids), dict(probe.left_out)) == (8, 8, {})
    assert (evaluation.rows, evaluation.texts) == (6, ["hi", "plain"])
    assert sorted(evaluation.left_out.values()) == [1, 1, 2] and sum(evaluation.left_out.values()) == 4
    assert "beyond 4,096 tokens in all" in evaluation.left_out
    shown = tokenizer.decode(evaluation.ids[0])
    assert shown.endswith("<|im_start|>assistant\n") and "secret" not in shown
    _, many = prompt_sets(tokenizer, [str(i) for i in range(2 * MAX_ROWS)], 320)
    assert many.texts[:3] == ["0", "2", "4"] and many.left_out["beyond 64 rows, evenly thinned out"] == MAX_ROWS
    _, none = prompt_sets(None, rows, 320)
    assert none.ids == [] and none.left_out == {"the base has no tokenizer": 6}


def moved(one: dict[str, Any], by: float) -> dict[str, Any]:
    return {**one, "top": [{token: value + by for token, value in top.items()} for top in one["top"]]}


PEFT = [answer([5, 6, 7, 8]), answer([9, 10])]


def test_a_form_in_full_precision_is_judged() -> None:
    found = compare_form("model-f32.gguf", "F32", PEFT, PEFT, PEFT)
    assert found["problems"] == [] and found["is_judged"]
    against = found["against_peft"]
    assert (against["identical"], against["positions"], against["log_probabilities"]) == (2, 6, 18)
    assert against["max_abs"] == against["mean_kl"] == 0
    shifted = compare_form("model-f32.gguf", "F32", PEFT, PEFT, [moved(one, -0.03) for one in PEFT])
    (problem,) = shifted["problems"]
    assert problem == "model-f32.gguf: log-probabilities are 0.03 nats off in the mean, the limit is 0.02"
    assert compare_form("m", "F16", PEFT, PEFT, [moved(one, -0.03) for one in PEFT])["problems"] == []
    parted = [PEFT[0], answer([9, 11])]
    assert "1 of 2 answers part" in compare_form("m", "F16", PEFT, PEFT, parted)["problems"][-1]
    close = [answer([5, 6, 7, 8], gap=0.1), answer([9, 10], gap=0.1)]
    assert (
        compare_form("m", "F32", close, close, [close[0], answer([9, 11], gap=0.1)])["against_peft"]["identical"] == 1
    )


def test_what_comes_after_the_first_difference_is_not_compared() -> None:
    far = {**answer([5, 99, 7, 8]), "top": [*answer([5, 6])["top"], {1: -0.1}, {2: -0.1}]}
    against = compare_form("m", "Q4_K_M", PEFT[:1], PEFT[:1], [far])["against_peft"]
    assert (against["positions"], against["top1_agreement"], against["log_probabilities"]) == (2, 0.5, 6)


def test_a_runner_may_leave_out_the_token_that_ended_its_answer() -> None:
    without = [PEFT[0], {**PEFT[1], "greedy": [9], "top": PEFT[1]["top"][:1]}]
    assert compare_form("m", "F32", PEFT, PEFT, without)["against_peft"]["identical"] == 2
    shorter = [{**PEFT[0], "greedy": [5, 6], "top": PEFT[0]["top"][:2]}, PEFT[1]]
    assert compare_form("m", "F32", PEFT, PEFT, shorter)["against_peft"]["beyond_rounding"] == 1


def test_a_quantised_form_is_reported_and_fails_only_where_quantising_cannot_be_why() -> None:
    loss = [moved(one, -0.05) for one in PEFT]
    found = compare_form("model-q4_k_m.gguf", "Q4_K_M", PEFT, PEFT, loss)
    assert found["problems"] == [] and not found["is_judged"] and 0.04 < found["against_peft"]["mean_kl"] < 0.06
    broken = [
        {**one, "top": [{token + 1: value for token, value in top.items()} for top in one["top"]]} for one in PEFT
    ]
    (problem,) = compare_form("model-q4_k_m.gguf", "Q4_K_M", PEFT, PEFT, broken)["problems"]
    assert problem.endswith("quantising alone is below 0.5")
    published = {"Q8_0": 0.0014, "Q6_K": 0.0055, "Q5_K_M": 0.011, "Q4_0": 0.072, "IQ4_XS": 0.036, "Q3_K_S": 0.23}
    published |= {"Q2_K": 0.445, "IQ2_XXS": 0.81}
    for dtype, mean_kl in published.items():
        assert quantised_limit(dtype) > 1.5 * mean_kl, dtype
