"""The card as a page: from card.json alone, whatever is in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from training.card_page import card_html
from training.curve import curve_svg, points, smooth, ticks

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}\u202e\x00"
VOID = {"meta", "circle", "line", "polyline"}


def card(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "router",
        "base": {"id": "tiny"},
        "data": {"training": {"file": "data.jsonl", "rows": 40}, "validation": {"rows": 4}},
        "settings": {"method": "lora", "rank": 4},
        "adapter": {"parameters": 10, "bytes": 1_500_000},
        "result": {
            "steps": 3,
            "best_step": 2,
            "training_loss": 0.5,
            "validation_loss": 0.75,
            "curve": {
                "training": [[1, 2.0], [2, 1.0], [3, 0.5]],
                "validation": [[2, 0.75], [3, 0.9]],
                "learning_rate": [[1, 1e-3], [2, 5e-4], [3, 0.0]],
            },
        },
        "evaluation": {
            "sequences": 4,
            "loss": {"base": 2.5, "adapter": 0.75},
            "answers": {"rows": 4, "base": {"exact_match": 0.0}, "adapter": {"exact_match": 0.75}},
            "verdict": "The adapter is better than the base.",
        },
        "cost": {"seconds": 75.0, "peak_memory_bytes": 2_400_000_000, "tokens_per_second": 190.4},
        "versions": {"torch": "2.13.0"},
    }
    return {**made, **changes}


class Page(HTMLParser):
    """Well-formedness, the tags and attributes that occur, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def test_a_page_has_the_figures_the_comparison_and_both_losses_as_a_picture() -> None:
    source = card_html(card())
    page = Page(source)
    for shown in ("router", "lora on tiny", "better than the base", "1.5 MB", "2.40 GB", "1 min 15 s", "0.7500", "190"):
        assert shown in page.text, shown
    kinds = set(re.findall(r'class="(raw|loss|validation|rate|base|best|grid)"', source))
    assert kinds == {"raw", "loss", "validation", "rate", "base", "best", "grid"}
    assert source == card_html(json.loads(json.dumps(card())))


def test_a_page_needs_no_network_and_no_script_and_forbids_both() -> None:
    source = card_html(card())
    page = Page(source)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form", "a", "base"}
    assert not page.attributes & {"src", "href", "style", "onload", "onerror"}
    assert "default-src 'none'" in source and "url(" not in source and "@import" not in source
    assert "prefers-color-scheme: dark" in source


def hostile(value: Any) -> Any:
    """The same with a hostile key and text in every object."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()} | {HOSTILE: HOSTILE}
    return value


def test_hostile_text_anywhere_stays_text() -> None:
    made = hostile(card())
    made |= {"name": HOSTILE, "parent": HOSTILE, "created_at": HOSTILE}
    made["evaluation"]["verdict"] = made["base"]["id"] = made["data"]["training"]["file"] = HOSTILE
    made["evaluation"]["answers"]["adapter"]["label"] = made["settings"]["method"] = HOSTILE
    page = Page(card_html(made))
    assert not page.tags & {"script", "img"}
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in page.text and "\x00" not in page.text


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"name": None, "result": [], "data": "x", "evaluation": 3, "settings": None},
        {"result": {"curve": {"training": [[1, float("nan")], [2, float("inf")], ["3", 1], [4], None, [True, 1]]}}},
        {"result": {"curve": {"training": [[1, 1e308], [2, -1], [10**400, 1]], "validation": {"a": 1}}}},
        {"result": {"curve": {"training": [[0, 0], [0, 0]]}, "best_step": {}}, "cost": {"seconds": "soon"}},
        {"settings": {f"k{i}": "v" * 5000 for i in range(5000)}, "name": "n" * 100_000},
        {"evaluation": {"loss": {"base": "x", "adapter": []}, "answers": {"base": 1, "adapter": {"exact_match": {}}}}},
        {"versions": {"deep": [[[[["x"]]]]], "huge": 10**300, "lone": "\ud800"}},
    ],
)
def test_a_card_of_any_shape_gives_a_small_page(made: dict[str, Any]) -> None:
    source = card_html(made)
    assert len(source.encode()) < 100_000
    Page(source)


def test_a_run_without_a_comparison_says_why() -> None:
    made = card(evaluation=None)
    assert "it was turned off" in card_html(made)
    made["data"]["validation"] = None
    assert "there were no validation rows" in card_html(made)


def test_an_adapter_worse_than_the_base_is_marked() -> None:
    made = card()
    assert '<p class="verdict">' in card_html(made)
    made["evaluation"]["loss"] = {"base": 0.5, "adapter": 0.75}
    assert '<p class="verdict worse">' in card_html(made)


def test_a_long_curve_is_thinned_and_stays_in_its_frame() -> None:
    long = [[step, 1 + step % 7] for step in range(50_000)]
    assert len(points(long)) <= 1200
    picture = curve_svg({"training": long, "validation": [[60_000, 9.0]]})
    for x, y in re.findall(r"([\d.-]+),([\d.-]+)", picture):
        assert 0 <= float(x) <= 720 and 0 <= float(y) <= 300


def test_ticks_are_round_and_an_average_begins_at_the_first_value() -> None:
    assert ticks(3.4) == [0, 1, 2, 3]
    assert ticks(0.9) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert ticks(0) == [0]
    assert smooth([(1, 4.0), (2, 4.0)]) == [(1, pytest.approx(4.0)), (2, pytest.approx(4.0))]
