"""The page of a parity report: whole without a network, the same bytes again, and nothing of others' text is run."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from adapters.bases import load_base
from adapters.export import ExportRequest, ExportResult, export
from adapters.parity_page import page
from adapters.parity_picture import Bar, picture_svg
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2

HOSTILE = "<script>alert(1)</script>\u202e\x07<b onclick=x>"


class Outline(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.said = ""
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
    folder = tmp_path_factory.mktemp("page")
    base = load_base(tiny_qwen2(folder / "base"))
    adapter = write_adapter(folder / "adapter", base, rank=4, scale=0.3)
    return ExportRequest(adapter, base, folder / "out", source="router@1")


@pytest.fixture(scope="module")
def result(order: ExportRequest) -> ExportResult:
    return export(replace(order, dtype="bfloat16", evaluation=("Where is my parcel?",)))


def test_the_page_of_an_export_needs_nothing_else_and_says_the_figures(result: ExportResult) -> None:
    content = (result.folder / "parity.html").read_bytes()
    outline = Outline(content)
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.tags)
    assert not {"src", "href", "onclick"} & outline.attributes.keys()
    assert b"default-src 'none'" in content and b"url(" not in content and b"@import" not in content
    assert (
        "Passed: the merged model computes what base and adapter compute together, up to rounding to bfloat16."
        in outline.said
    )
    for words in ("router@1", result.manifest["base"]["digest"], result.manifest["adapter"]["digest"], "8 of 8"):
        assert words in outline.said, words
    assert "Logits: evaluation rows" in outline.said and "Where is my parcel?" in outline.said
    assert outline.tags.count("svg") == 1 and outline.tags.count("circle") == 5
    name = min(result.parity["weights"]["tensors"], key=lambda row: row["update_kept"])["name"]
    assert name in outline.said, "the tensor that kept least of its update is shown"


def test_the_same_report_gives_the_same_page_whatever_its_numbers_went_through(result: ExportResult) -> None:
    content = (result.folder / "parity.html").read_bytes()
    again = json.loads(json.dumps(result.parity)), json.loads(json.dumps(result.manifest))
    assert page(*again) == page(result.parity, result.manifest) == content


def test_names_prompts_and_answers_are_text_and_nothing_in_them_hides(result: ExportResult) -> None:
    parity, facts = deepcopy(dict(result.parity)), deepcopy(dict(result.manifest))
    facts["source"] = HOSTILE
    facts["base"]["id"] = HOSTILE
    parity["notes"] = [HOSTILE]
    parity["logits"]["answers"]["shown"][0].update(
        prompt=HOSTILE, same=HOSTILE, peft=HOSTILE, merged="", first_difference=3
    )
    parity["logits"]["probe"]["left_out"] = {HOSTILE: 1}
    parity["weights"]["tensors"][0].update(name=HOSTILE, outside=1)
    found = {"identical": 1, "prompts": 2, "positions": 9, "top1_agreement": 0.5, "mean_kl": 0.1, "mean_abs": 0.1}
    parity["forms"] = [{"name": HOSTILE, "dtype": HOSTILE, "against_peft": found, "problems": [], "is_judged": True}]
    content = page(parity, facts)
    outline = Outline(content)
    assert "script" not in outline.tags and "b onclick" not in re.sub(r"&lt;b onclick", "", content.decode())
    assert "onclick" not in outline.attributes and "\u202e" not in outline.said and "\x07" not in outline.said
    assert outline.said.count("<script>alert(1)</script>��<b onclick=x>") >= 10
    assert "(ends here)" in outline.said


def test_a_failed_parity_says_what_is_wrong_and_where(result: ExportResult) -> None:
    parity = deepcopy(dict(result.parity))
    parity.update(verdict="failed", problems=[f"problem {number}" for number in range(25)])
    row = parity["weights"]["tensors"][-1]
    row.update(outside=3, relative_error=0.5)
    parity["logits"]["merged_against_peft"].update(max_abs=None, mean_abs=9.5, largest_logit=None)
    difference = {"prompt": 0, "token": 4, "gap": 4.25, "is_rounding": False}
    parity["logits"]["answers"]["merged_against_peft"].update(identical=7, first_differences=[difference])
    shown = next(one for one in parity["logits"]["answers"]["shown"] if one["row"] == 0)
    shown.update(first_difference=4, peft="right", merged="wrong")
    content = page(parity, result.manifest)
    said = Outline(content).said
    assert "Failed: this merge is not what base and adapter give. It was not exported." in said
    assert "problem 19" in said and "problem 20" not in said and "and 5 more" in said
    assert "They part at token 5, over a gap of 4.25 nats, which rounding cannot explain." in said
    assert "not finite" in said and b'class="answer bug"' in content and "Passed" not in said
    assert row["name"] in said.partition("the worst first")[2][:400]


def test_a_report_of_weights_only_and_one_of_peft_say_what_was_not_done(
    order: ExportRequest, result: ExportResult
) -> None:
    bare = export(replace(order, with_logits=False, out=result.folder.with_name("bare")))
    said = Outline((bare.folder / "parity.html").read_bytes()).said
    assert "Passed: every merged weight is base plus adapter, up to the order of additions in float32." in said
    assert "Logits were not compared: not asked for." in said and "Answers:" not in said
    parity = {key: value for key, value in result.parity.items() if key != "weights"} | {"merged_by": "peft"}
    said = Outline(page(parity, result.manifest)).said
    assert "so PEFT merged it" in said and "Changed tensors" not in said


def test_the_picture_puts_each_figure_by_its_logarithm_and_marks_what_is_beyond_its_limit() -> None:
    svg = picture_svg([Bar("one", 0.1, 0.01, 1.0), Bar("two", 1.0, 0.0, 0.5)])
    at = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    floors = [float(x) + 8 for x in re.findall(r'class="floor" x="([\d.]+)"', svg)]
    limits = [float(x) + 1.5 for x in re.findall(r'class="beyond" x="([\d.]+)"', svg)]
    assert limits[0] == pytest.approx(at[1]) and at[0] - floors[0] == pytest.approx(at[1] - at[0], abs=0.2)
    assert floors[1] < floors[0], "nothing at all stands at the left end"
    assert svg.count('<circle class="measured"') == svg.count('<circle class="beyond"') == 1
    assert picture_svg([Bar("none", 0.0, 0.0)]) == ""
    assert "not finite" in picture_svg([Bar("nan", float("nan"), 0.1, 1.0)])
