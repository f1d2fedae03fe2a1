"""Metrics against scikit-learn's, sacrebleu's and rouge-score's own figures, by hand, and over drawn answers."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import ConfigInvalid, InvalidRequest
from training.metrics import items, task_of
from training.metrics.labels import Labelled
from training.metrics.texts import common_f1
from training.metrics.tokens import bleu_tokenizer, tokens
from training.scores import telling_scores

LABELS = ["billing", "shipping", "account"]
SENTENCES = [
    "Em đã gửi đơn hàng của chị vào sáng nay.",
    "Trời hôm nay rất đẹp, chúng ta đi dạo nhé?",
    "The parcel left our warehouse on Monday.",
]
TEXTS = st.text(max_size=40)


def drawn_labels(rows: int, seed: int) -> tuple[list[str], list[str]]:
    generator = random.Random(seed)
    expected = generator.choices(LABELS, weights=(6, 3, 1), k=rows)
    answers = [generator.choice([label, label, *LABELS, "no idea"]) for label in expected]
    return expected, answers


@pytest.mark.parametrize("seed", range(4))
def test_the_three_averages_of_f1_and_the_table_are_scikit_learns(seed: int) -> None:
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    expected, answers = drawn_labels(200, seed)
    found = items(expected, answers)
    figures = found.figures()
    assert found.primary.name == "accuracy"
    assert figures["accuracy"] == np.mean([one == other for one, other in zip(expected, answers, strict=True)])
    assert figures["invalid"] == answers.count("no idea") / 200
    for average in ("macro", "micro", "weighted"):
        right = f1_score(expected, answers, labels=LABELS, average=average, zero_division=0)
        assert figures[f"{average}_f1"] == pytest.approx(right), average
    assert found.labelled is not None
    table = {row["label"]: row for row in found.labelled.table()}
    precision, recall, f1, rows = precision_recall_fscore_support(expected, answers, labels=LABELS, zero_division=0)
    for at, name in enumerate(LABELS):
        row = table[name]
        assert (row["precision"], row["recall"], row["f1"], row["rows"]) == (
            pytest.approx(precision[at], abs=1e-6),
            pytest.approx(recall[at], abs=1e-6),
            pytest.approx(f1[at], abs=1e-6),
            rows[at],
        )
    matrix = confusion_matrix(expected, answers, labels=[*LABELS, "no idea"])
    for pair in found.labelled.confusion():
        assert pair["rows"] == matrix[LABELS.index(pair["expected"]), [*LABELS, None].index(pair["given"])]


def test_a_figure_of_any_draw_of_rows_is_that_of_the_rows_themselves() -> None:
    expected, answers = drawn_labels(60, 9)
    expected, answers = [*expected, *LABELS], [*answers, *LABELS]  # each label is in the draw, too
    indices = np.array([*random.Random(1).choices(range(60), k=90), 60, 61, 62])
    drawn = items([expected[i] for i in indices], [answers[i] for i in indices])
    for name, measure in items(expected, answers).measures.items():
        assert measure.of(indices) == pytest.approx(drawn.measures[name].value), name
    texts, others = SENTENCES * 3, [text[: 10 + at] for at, text in enumerate(SENTENCES * 3)]
    indices = np.array([0, 0, 4, 5, 8])
    drawn = items([texts[i] for i in indices], [others[i] for i in indices])
    for name, measure in items(texts, others).measures.items():
        assert measure.of(indices) == pytest.approx(drawn.measures[name].value), name


def test_a_label_that_no_answer_gives_and_one_that_no_row_wants_are_counted_as_they_are() -> None:
    found = Labelled.of(["a", "a", "b"], ["a", "c", "a"], known=["c"])
    assert found.f1("macro_f1") == pytest.approx((2 / 4 + 0) / 2)  # b has 0; c is wanted by no row and is no third
    assert [(row["label"], row["rows"], row["given"], row["f1"]) for row in found.table()] == [
        ("a", 2, 2, 0.5),
        ("b", 1, 0, 0.0),
        ("c", 0, 1, 0.0),
    ]
    assert not found.is_invalid.any()
    assert Labelled.of(["a", "a", "b"], ["a", "c", ""]).is_invalid.tolist() == [0, 1, 1]
    assert Labelled.of(["None", "b"], ["", "b"]).given.tolist() == [-1, 1]  # an empty answer is no label "None"


def test_chrf_and_bleu_are_sacrebleus_own_figures_a_hundredth_of_them() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf, sentence_bleu, sentence_chrf

    answers = ["Em đã gửi đơn hàng của chị sáng nay.", "Trời hôm nay đẹp, chúng ta đi nhé?", "The parcel left Monday."]
    found = items(SENTENCES, answers)
    assert found.primary.name == "chrf"
    figures, scores = found.figures(), found.scores()
    assert 100 * figures["chrf"] == pytest.approx(corpus_chrf(answers, [SENTENCES]).score)
    assert 100 * figures["bleu"] == pytest.approx(corpus_bleu(answers, [SENTENCES]).score)
    for at in range(3):
        assert 100 * scores["chrf"][at] == pytest.approx(sentence_chrf(answers[at], [SENTENCES[at]]).score)
        assert 100 * scores["bleu"][at] == pytest.approx(sentence_bleu(answers[at], [SENTENCES[at]]).score)
    assert "tok:13a" in found.measures["bleu"].signature


def test_bleu_of_chinese_takes_each_character_and_says_so() -> None:
    from sacrebleu import corpus_bleu

    expected, answers = ["今天的天气非常好。", "他昨天去了北京的学校。"], ["今天天气非常好。", "他昨天去北京的学校了。"]
    found = items(expected, answers, metrics=["bleu"])
    assert found.figures()["bleu"] == pytest.approx(corpus_bleu(answers, [expected], tokenize="zh").score / 100)
    assert "tok:zh" in found.measures["bleu"].signature
    assert bleu_tokenizer(("今日はとてもいい天気ですね。",)) == bleu_tokenizer(("วันนี้อากาศดีมาก",)) == "char"
    assert bleu_tokenizer(("Trời đẹp quá!",)) == bleu_tokenizer(()) == "13a"


def test_rouge_of_vietnamese_by_hand() -> None:
    # 7 words wanted, 6 given: 5 shared; pairs: 6 wanted, 5 given: "tôi đi", "chợ mua" shared; 5 in order
    found = items(["Hôm nay tôi đi chợ mua rau."], ["Tôi đi ra chợ mua RAU"], metrics=["rouge1", "rouge2", "rougeL"])
    assert found.figures() == {
        "rouge1": pytest.approx(2 * 5 / (7 + 6)),
        "rouge2": pytest.approx(2 * 3 / (6 + 5)),
        "rougeL": pytest.approx(2 * 5 / (7 + 6)),
    }


def test_words_are_those_of_the_script_whatever_the_form_of_its_letters() -> None:
    assert tokens("Tiếng Việt, xin CHÀO!") == ["tiếng", "việt", "xin", "chào"]
    assert tokens("Tie\u0302\u0301ng Vie\u0323\u0302t") == ["tiếng", "việt"]  # letters and their marks apart
    assert tokens("今天天气好,ok 3.5") == [*"今天天气好", "ok", "3", "5"]
    assert tokens("हिन्दी में") == ["हिन्दी", "में"]
    assert tokens(" \x00\u200b…") == []


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcd"), max_size=30))
def test_rouge_l_is_rouge_scores_figure(one: list[str], other: list[str]) -> None:
    from rouge_score.rouge_scorer import _score_lcs

    assert common_f1(one, other) == pytest.approx(_score_lcs(one, other).fmeasure)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
def test_every_score_is_between_0_and_1_and_the_expected_text_has_1(pairs: list[tuple[str, str]]) -> None:
    expected, answers = [one for one, _ in pairs], [other for _, other in pairs]
    found = items(expected, answers)
    for name, measure in found.measures.items():
        assert measure.scores.shape == (len(pairs),)
        assert ((measure.scores >= 0) & (measure.scores <= 1 + 1e-9)).all(), name
        assert 0 <= measure.value <= 1 + 1e-9, name
    itself = items(expected, expected).scores()
    assert itself["exact_match"].tolist() == [1.0] * len(pairs)
    long_enough = np.array([len(text.strip()) > 6 and "</think>" not in text for text in expected])
    if "chrf" in itself:
        assert itself["chrf"][long_enough] == pytest.approx(1.0)


def objects(rows: int) -> list[str]:
    return [json.dumps({"intent": "on" if at % 2 else "off", "area": f"room {at}"}) for at in range(rows)]


def test_objects_are_scored_as_the_promote_gate_scores_them() -> None:
    expected = objects(12)
    answers = [*expected[:5], "no", "{}", expected[9], *[text.replace("room", "hall") for text in expected[8:]]]
    found, old = items(expected, answers), telling_scores(expected, answers)
    figures: dict[str, Any] = found.figures()
    assert found.task.label == old["label"] == "intent"
    assert found.primary.name == "exact_match"
    assert figures["exact_match"] == old["exact_match"]
    assert figures["json_valid"] == old["json_valid"]
    assert figures["accuracy"] == old["label_accuracy"]
    assert figures["field_f1"] == pytest.approx(old["field_f1"])


def test_what_the_data_is_decides_which_metrics_apply() -> None:
    assert task_of(["billing", "shipping"] * 8).kind == "labels"
    assert task_of(["billing", "shipping"]).kind == "text"  # two different answers of two: nothing says label
    assert task_of(["billing", "shipping"], "").kind == "labels"
    assert task_of(SENTENCES).metrics[0] == "chrf"
    assert task_of(objects(8)).metrics[0] == "exact_match"
    assert task_of(['{"intent": "a"}', '{"intent": "b"}'] * 4).metrics[0] == "accuracy"
    assert task_of(objects(8), "area").label == "area"
    assert items(["a"], ["a"]).figures()["exact_match"] == 1.0


def test_metrics_can_be_chosen_and_those_that_cannot_be_are_refused_with_the_reason() -> None:
    assert list(items(SENTENCES, SENTENCES, metrics=["rougeL", "bleu", "rougeL"]).measures) == ["rougeL", "bleu"]
    with pytest.raises(ConfigInvalid, match="--label"):
        items(SENTENCES, SENTENCES, metrics=["macro_f1"])
    with pytest.raises(ConfigInvalid, match="JSON"):
        items(SENTENCES, SENTENCES, metrics=["field_f1"])
    with pytest.raises(ConfigInvalid, match="no metric 'blue'"):
        items(SENTENCES, SENTENCES, metrics=["blue"])
    for expected, answers in ((SENTENCES, []), ([], [])):
        with pytest.raises(InvalidRequest):
            items(expected, answers)


@pytest.mark.parametrize(
    "answer", ["", " \n", "\x00\x1b[31m<script>", "\ud83d", "[" * 5_000, '{"a":' * 900 + "1" + "}" * 900]
)
def test_no_answer_is_too_odd_to_be_scored(answer: str) -> None:
    for expected in (SENTENCES, objects(3), ["a"] * 4 + ["b"] * 4):
        found = items(expected, [answer] * len(expected))
        assert all(0 <= value <= 1 for value in found.figures().values())
        told = found.labelled
        json.dumps([found.figures(), *([told.table(), told.confusion()] if told is not None else [])])


def test_a_huge_answer_takes_no_square_of_its_length() -> None:
    started = time.monotonic()
    words = " ".join(f"từ{at}" for at in range(20_000))
    found = items([words], [f"{words} x"], metrics=["rougeL", "rouge1"])
    assert found.figures()["rougeL"] == pytest.approx(2 * 20_000 / 40_001)
    assert time.monotonic() - started < 20
