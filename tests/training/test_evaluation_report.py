"""The report by arithmetic: figures over clusters, rivals, noise, distance from training rows, page and lines."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.conftest import chat, write_jsonl
from training.data.formats import read_data
from training.data.rows import Row
from training.evaluation.card import figures_of
from training.evaluation.confusion import confusion_svg, matrix
from training.evaluation.figures import Grouping, difference, figure, noise, sides
from training.evaluation.lines import report_lines
from training.evaluation.page import report_html
from training.evaluation.report import LONGEST_SHOWN, Answered, Asked, Choice, Report, made
from training.evaluation.run import MODEL_METRICS
from training.evaluation.similarity import nearest, nearness
from training.gate.twins import jaccard
from training.metrics import METRICS, items
from training.metrics.measure import Measure

LABELS = ("billing", "shipping", "account")
HOSTILE = '<script>alert("x")</script>\x1b[31m\u202ered & "quoted"'


def asked(expected: Sequence[str], clusters: Sequence[str] | None = None) -> Asked:
    rows = range(len(expected))
    return Asked(
        [f"question {row}?" for row in rows],
        expected,
        [f"test.jsonl:{row + 1}" for row in rows],
        clusters or [str(row) for row in rows],
    )


def labels_report(rows: int = 60, **options: Any) -> Report:
    """Of three rows one is wrong; the base is right in half of them."""
    expected = [LABELS[row % 3] for row in range(rows)]
    answers = [text if row % 3 else "no idea" for row, text in enumerate(expected)]
    base = [text if row % 2 else "billing" for row, text in enumerate(expected)]
    again = {row: answers[row] if row else "billing" for row in range(0, rows, 2)}
    own = Answered("tickets@2", answers, again, {"loss": 0.5})
    about = {"model": "tickets@2", "data": "test.jsonl", "grouped_by": "template", "notes": ["a note"]}
    return made(about, asked(expected), own, [Answered("base", base, said={"loss": 1.5})], **options)


def test_every_figure_has_its_interval_over_clusters_and_rows_of_one_cluster_count_once() -> None:
    scores = np.array([1.0, 1.0, 0.0, 1.0] * 40)
    alone = figure(Measure("m", scores), Grouping([str(at) for at in range(160)]))
    joined = figure(Measure("m", scores), Grouping([str(at // 8) for at in range(160)]))
    assert alone["estimate"] == joined["estimate"] == 0.75
    assert (alone["clusters"], joined["clusters"], joined["items"]) == (160, 20, 160)
    halves = figure(Measure("m", np.repeat([1.0, 1, 0, 1], 40)), Grouping([str(at // 40) for at in range(160)]))
    assert not halves["is_telling"] and halves["high"] - halves["low"] > 3 * (alone["high"] - alone["low"])
    assert sides(halves, 0.5) == "too few"
    assert (sides(alone, 0.5), sides(alone, 0.75), sides(alone, 0.95)) == ("above", "unclear", "below")


def test_scores_that_could_not_be_measured_are_left_out_and_counted() -> None:
    scores = np.array([0.5, np.nan, 1.5, np.nan])
    grouping = Grouping(["a", "b", "c", "d"])
    found = figure(Measure("m", scores, bounds=None), grouping)
    assert (found["estimate"], found["items"], found["left_out"]) == (1.0, 2, 2)
    rival = Measure("m", np.array([np.nan, 1.0, 1.0, 1.0]), bounds=None)
    paired = difference(Measure("m", scores, bounds=None), rival, grouping)
    assert (paired["estimate"], paired["items"], paired["left_out"]) == (0.5, 1, 3)
    nothing = figure(Measure("m", np.full(4, np.nan)), grouping)
    assert (nothing["estimate"], nothing["left_out"]) == (None, 4)


def test_a_difference_is_paired_row_by_row_also_for_the_figure_of_a_corpus() -> None:
    expected = [LABELS[row % 3] for row in range(90)]
    better = items(expected, [text if row % 4 else "no idea" for row, text in enumerate(expected)])
    worse = items(expected, [text if row % 2 else "no idea" for row, text in enumerate(expected)])
    grouping = Grouping([str(row) for row in range(90)], better.strata)
    for name in ("accuracy", "macro_f1"):
        found = difference(better.measures[name], worse.measures[name], grouping)
        assert found["estimate"] == pytest.approx(better.figures()[name] - worse.figures()[name], abs=1e-6)
        assert found["low"] > 0 and found["p"] < 0.001, name
        itself = difference(better.measures[name], better.measures[name], grouping)
        assert (itself["estimate"], itself["p"]) == (0.0, 1.0)


def test_the_noise_of_batching_is_no_larger_than_the_rows_that_changed() -> None:
    first, second = Measure("m", np.array([1.0, 0, 1, 1])), Measure("m", np.array([1.0, 0, 0, 1]))
    found = noise(first, second, 400)
    assert found == {"rows": 4, "moved": -0.25, "floor": pytest.approx(1.96 * np.sqrt(0.25 / 400), abs=1e-6)}
    assert noise(first, first, 400)["floor"] == 0.0


def test_the_report_says_figures_rivals_labels_and_noise_in_plain_json() -> None:
    report = labels_report().as_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["task"], report["primary"], report["rows"], report["clusters"]) == ("labels", "accuracy", 60, 60)
    figures = report["metrics"]
    assert figures["accuracy"]["estimate"] == pytest.approx(2 / 3)
    assert figures["accuracy"]["low"] < 2 / 3 < figures["accuracy"]["high"]
    assert figures["invalid"]["estimate"] == pytest.approx(1 / 3)
    assert report["noise"] == {"rows": 30, "changed": 1, "share": pytest.approx(1 / 30, abs=1e-6)}
    assert figures["accuracy"]["noise"]["floor"] > 0  # the one that changed became right
    (base,) = report["against"]
    assert (base["name"], base["loss"]) == ("base", 1.5)
    assert base["metrics"]["accuracy"]["estimate"] == pytest.approx(0.0)
    assert {row["label"]: row["recall"] for row in report["labels"]} == {
        "billing": 0.0,
        "shipping": 1.0,
        "account": 1.0,
    }
    assert report["confusion"][0]["rows"] == 20
    scores = [row["score"] for row in report["rows_shown"]]
    assert scores == sorted(scores)
    assert report["rows_shown"][0]["rivals"]["base"]["score"] == 1.0  # of the wrong ones first those the base has right
    assert "rows_shown" not in labels_report().summary()


def rows_of(path: Path, texts: Sequence[str]) -> list[Row]:
    return read_data(write_jsonl(path, [chat(text, "ok") for text in texts])).rows


def test_rows_are_near_middle_or_far_by_their_nearest_training_row(tmp_path: Path) -> None:
    trained = rows_of(tmp_path / "train.jsonl", ["Please turn on the lamp in room 12", "Where is my parcel today"])
    test = rows_of(
        tmp_path / "test.jsonl",
        [
            "please turn on the lamp in room 99.",
            "Please turn on the radio in room 12",
            "Explain photosynthesis to a child",
            "??",
        ],
    )
    found = nearness(test, trained)
    assert {name: rows.tolist() for name, rows in found.bins().items()} == {"near": [0], "middle": [1], "far": [2, 3]}
    assert found.similarity[0] == 1.0
    assert found.places[0].endswith("train.jsonl:1")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("ab c", min_size=1, max_size=12), min_size=1, max_size=6, unique=True),
    st.lists(st.text("ab c", min_size=1, max_size=12), min_size=1, max_size=6),
)
def test_the_similarity_is_the_best_jaccard_of_all_pairs(trained: list[str], asked_texts: list[str]) -> None:
    best, at = nearest(asked_texts, trained)
    for text, similarity, place in zip(asked_texts, best, at, strict=True):
        assert similarity == pytest.approx(max(jaccard(text, one) for one in trained))
        assert jaccard(text, trained[place]) == pytest.approx(similarity)


def test_a_verdict_uses_far_rows_or_says_that_there_are_too_few(tmp_path: Path) -> None:
    trained = rows_of(tmp_path / "train.jsonl", ["Please turn on the lamp in room 12"])
    far = [f"{word} {word[::-1]} quarrels with {word.upper()}" for word in LABELS] * 20
    near = nearness(rows_of(tmp_path / "test.jsonl", far), trained)
    told = labels_report(near=near).as_dict()["similarity"]
    assert (told["verdict_bin"], told["bins"]["far"]["rows"], told["bins"]["near"]["rows"]) == ("far", 60, 0)
    assert told["bins"]["far"]["metrics"]["accuracy"]["estimate"] == pytest.approx(2 / 3)
    assert told["bins"]["far"]["against"]["base"]["clusters"] == 60
    same = nearness(rows_of(tmp_path / "same.jsonl", ["Please turn on the lamp in room 3"] * 60), trained)
    refused = labels_report(near=same).as_dict()["similarity"]
    assert refused["verdict_bin"] is None and "fewer than 20" in refused["why"]


def test_metrics_and_scores_of_models_come_in_the_order_that_was_asked_for() -> None:
    texts = ["Trời hôm nay rất đẹp.", "The parcel left on Monday."]
    score = Measure("gptscore", np.array([-0.5, np.nan]), bounds=None)
    own = Answered("m", texts, measures={"gptscore": score})
    about = {"model": "m", "data": "d", "grouped_by": "template", "notes": []}
    report = made(about, asked(texts), own, choice=Choice(metrics=("gptscore", "rougeL"))).as_dict()
    assert list(report["metrics"]) == ["gptscore", "rougeL"]
    assert (report["primary"], report["metrics"]["gptscore"]["left_out"]) == ("gptscore", 1)
    assert report["rows_shown"][0]["score"] is None  # what could not be measured is looked at first


class Tags(HTMLParser):
    """The tags of a page, its text, and whether everything that is opened is closed."""

    VOID = ("meta", "rect", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs), (tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def hostile_report() -> Report:
    """Every text of it wants to be more than text."""
    expected = [HOSTILE if row % 2 else "billing" for row in range(40)]
    own = Answered(HOSTILE, [HOSTILE] * 39 + ["\ud83d" + "long " * 4_000])
    about = {"model": HOSTILE, "data": HOSTILE, "grouped_by": "template", "notes": [HOSTILE]}
    rows = Asked([HOSTILE] * 40, expected, [HOSTILE] * 40, [str(row) for row in range(40)])
    return made(about, rows, own, [Answered(HOSTILE + "2", [HOSTILE] * 40)])


def test_the_page_is_one_file_in_which_everything_is_escaped() -> None:
    page = report_html(hostile_report().as_dict())
    tags = Tags(page)
    assert not tags.open
    assert "script" not in tags.seen and "link" not in tags.seen and "img" not in tags.seen
    assert 'alert("x")' in tags.words  # it is there, as text
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f\u202a-\u202e]", page)
    page.encode()  # the half of a surrogate pair is gone
    assert "http" not in page.replace("http-equiv", "")
    assert "letters left out" in page and len(page) < 40 * 5 * LONGEST_SHOWN
    assert 'name="viewport"' in page and "@media print" in page


def test_the_page_shows_figures_rivals_confusion_and_the_worst_rows_first() -> None:
    words = Tags(report_html(labels_report().as_dict())).words
    for text in (
        "tickets@2",
        "macro-F1",
        "Against base",
        "What was taken for what",
        "a note",
        "no idea",
        "test.jsonl:1",
    ):
        assert text in words, text
    assert words.index("no idea") < words.index("question 1?")


def test_where_less_is_better_the_page_begins_with_invalid_answers_and_those_that_a_rival_has_better() -> None:
    expected = [LABELS[row % 3] for row in range(6)]
    answers = [*expected[:4], "no idea", "no idea"]
    base = [*expected[:2], "no idea", *expected[3:5], "no idea"]
    report = made(
        {"model": "m", "data": "d", "grouped_by": "template", "notes": []},
        asked(expected),
        Answered("m", answers),
        [Answered("base", base)],
        Choice(metrics=["invalid"], label=""),
    ).as_dict()
    assert (report["primary"], report["less_is_better"]) == ("invalid", ["invalid"])
    assert [row["place"][-1] for row in report["rows_shown"]] == ["5", "6", "1", "2", "4", "3"]
    kinds = re.findall('<article class="([a-z]+)">', report_html(report))
    assert kinds == ["wrong"] * 2 + ["right"] * 4


def test_the_lines_are_for_a_terminal_and_carry_no_control_characters() -> None:
    text = "\n".join(report_lines(labels_report().as_dict()))
    for part in (
        "tickets@2 on test.jsonl: 60 rows in 60 clusters",
        "accuracy",
        "against base",
        "wanted below",
        "note: a",
    ):
        assert part in text, part
    hostile = "\n".join(report_lines(hostile_report().as_dict()))
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f\u202a-\u202e]", hostile)


def test_of_many_labels_the_picture_keeps_the_most_wanted_and_joins_the_rest() -> None:
    pairs = [{"expected": f"label {at}", "given": f"label {at}", "rows": 100 - at} for at in range(50)]
    pairs += [
        {"expected": "label 0", "given": None, "rows": 3},
        {"expected": "label 49", "given": "label 0", "rows": 2},
    ]
    rows, columns, counts = matrix(pairs, most=5)
    assert rows == [*(f"label {at}" for at in range(5)), "(other labels)"]
    assert columns[-2:] == ["(other labels)", None]
    assert sum(map(sum, counts)) == sum(pair["rows"] for pair in pairs)
    assert counts[0][-1] == 3 and counts[-1][0] == 2
    assert confusion_svg(pairs).count("<rect") == 31 * 32


def test_one_row_is_reported_without_certainty() -> None:
    about = {"model": "m", "data": "d", "grouped_by": "template", "notes": []}
    for expected, answer in (("A sentence.", ""), ('{"intent": "on"}', '{"intent": "on"}')):
        report = made(about, asked([expected]), Answered("m", [answer]), [Answered("base", [answer])]).as_dict()
        for name, found in report["metrics"].items():
            assert not found["is_telling"], name
            assert found["low"] <= found["estimate"] <= found["high"] and found["high"] - found["low"] > 0.5, name
        assert "the intervals tell little" in "\n".join(report_lines(report))
        Tags(report_html(report))


def test_a_card_takes_figures_without_texts(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", [f"{word} of {word[::-1]}" for word in ("lamp", "radio", "parcel", "door")])
    expected, answers = ["on", "off"] * 2, ["on", "off", "off", "off"]
    found = figures_of(rows, expected, answers, ["on"] * 4, nearness(rows, rows), None)
    assert found["metrics"]["exact_match"]["estimate"] == 0.75
    assert found["against"][0]["metrics"]["exact_match"]["estimate"] == 0.25
    assert found["similarity"]["bins"]["near"]["rows"] == 4
    assert "lamp" not in json.dumps(found, allow_nan=False)


def test_every_metric_is_in_the_docs_and_what_ships_is_counted_there() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    table = text.split("| Metric | What it is |", 1)[1].split("\n\n", 1)[0]
    named = set(re.findall(r"`(\w+)`", "".join(line.split(" | ")[0] for line in table.splitlines())))
    assert named == {*METRICS, *MODEL_METRICS}
    folder = Path(__file__).parents[2] / "training" / "evaluation"
    for name, word in (("general.jsonl", "passages"), ("instructions.jsonl", "small ones")):
        assert f"{len((folder / name).read_text().splitlines())} {word}" in text
