"""The data gate: each rule fires on rows that have its fault, and on none of those that do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import ConfigInvalid, DataInvalid
from server.cli.main import build_app
from training.config import TrainingConfig
from training.data.formats import DataFile
from training.gate import amount, privacy, twins
from training.gate.amount import Lengths
from training.gate.check import Asked, check, passed, read
from training.gate.findings import RULES
from training.gate.page import report_html, report_lines
from training.gate.report import Report
from training.gate.subject import Subject
from training.material import gather
from training.trainer import train

ROOMS = ("kitchen", "garage", "attic", "cellar", "hallway", "bathroom", "nursery", "porch")
QUESTIONS = ("{}: lamps on", "make the {} dark", "is it warm in our {}?", "the {} door, lock it")
ANSWERS = ("lights on", "lights off", "read temperature", "lock door")
ALWAYS = {"rows_few", "names_unchecked", "toxicity_unchecked"}  # of so few rows
Rows = list[dict[str, Any]]


def chat(*said: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)], **more}


def spoken(*said: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in zip(said[::2], said[1::2], strict=True)]}


def clean() -> Rows:
    """Thirty-two rows of four labels that no rule has anything against but their number."""
    return [chat(q.format(room), a) for q, a in zip(QUESTIONS, ANSWERS, strict=True) for room in ROOMS]


def prose() -> Rows:
    """Rows whose answers are texts."""
    return [
        chat(f"{q.format(room)} ({room})", f"The {room} is being seen to: {q[:20]}.")
        for q in QUESTIONS
        for room in ROOMS
    ]


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., Report]:
    def look(rows: Rows, **asked: Any) -> Report:
        for name in ("test", "validation"):
            if isinstance(asked.get(name), list):
                asked[name] = written(tmp_path / f"{name}.jsonl", asked[name])
        return check(Asked(written(tmp_path / "data.jsonl", rows), **asked))

    return look


def written(path: Path, rows: Rows) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def found(report: Report, code: str) -> dict[str, Any]:
    return next(dict(finding) for finding in report.findings if finding["code"] == code)


def codes(report: Report) -> set[str]:
    return {finding["code"] for finding in report.findings}


TOOL = {
    "type": "function",
    "function": {
        "name": "set_light",
        "parameters": {"type": "object", "properties": {"level": {"type": "integer"}}, "required": ["level"]},
    },
}


def calling(name: str, arguments: Any, answered: str = "call_1") -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "dim the lamp"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": answered, "content": "ok"},
            {"role": "assistant", "content": "It is dim."},
        ],
    }


ENGLISH = "How do I change the filter of the machine in the kitchen?"
VIETNAMESE = "Mở nắp phía trước, tháo bộ lọc cũ ra và lắp bộ lọc mới vào."
LONG = " ".join(f"word{index} stands here before the next one" for index in range(12))
# Code -> rows that trip it beside the clean ones, and what else is asked.
CASES: dict[str, tuple[Rows, dict[str, Any]]] = {
    "row_unreadable": ([chat("x", "y") | {"messages": "none"}], {}),
    "nothing_learned": ([chat("only a question")], {}),
    "forms_mixed": ([{"prompt": "what is it?", "completion": "lights on"}], {}),
    "systems_differ": ([spoken("system", "Be brief.", "user", "is it?", "assistant", "lights on")], {}),
    "turns_disordered": ([spoken("user", "one", "assistant", "lights on", "assistant", "two")], {}),
    "user_turn_empty": ([chat("  ", "lights on")], {}),
    "thought_unclosed": ([chat("why?", "<think>because lights on")], {}),
    "thoughts_mixed": ([chat("why?", "<think>because</think>lights on")], {}),
    "tool_unknown": ([calling("set_fan", {})], {}),
    "tool_arguments": ([calling("set_light", {"level": "high"})], {}),
    "tool_answer_unasked": ([calling("set_light", {"level": 1}, "call_2")], {}),
    "text_mojibake": ([chat("the cafÃ© is dark", "lights on")], {}),
    "text_replaced": ([chat("the caf\ufffd is dark", "lights on")], {}),
    "text_control": ([chat("the room is \u202edark", "lights on")], {}),
    "text_decomposed": ([chat("bật đe\u0300n lên", "lights on")], {}),
    "rows_few": ([], {}),
    "languages_differ": ([chat(ENGLISH, VIETNAMESE)], {}),
    "labels_conflict": ([chat("do the thing", label) for label in ANSWERS], {}),
    "labels_near": ([chat(f"please do {word}", "Lights-On") for word in ("one", "some", "most", "all", "less")], {}),
    "labels_unbalanced": ([chat(f"give light {n} {room}", "lights on") for room in ROOMS for n in range(10)], {}),
    "labels_rare": ([chat("sing something", "sing song")], {}),
    "twins_exact": ([chat("Make the KITCHEN  dark.", "Lights off")], {}),
    "twins_template": ([chat(f"dim to {n} percent", "lights off") for n in (10, 20)], {}),
    "twins_near": (
        [chat(f"the lamp over the table by the window is too bright {end}", "lights off") for end in ("now", "noww")],
        {},
    ),
    "leak_exact": ([], {"test": [chat("make the Kitchen dark!", "lights off")]}),
    "leak_template": ([chat("dim to 30 percent", "lights off")], {"test": [chat("dim to 40 percent", "lights off")]}),
    "leak_near": ([chat(LONG + " and so on", "lights on")], {"test": [chat("At first: " + LONG, "lights on")]}),
    "validation_leak": ([], {"validation": [chat("make the kitchen dark", "lights off")]}),
    "secret": ([chat("use ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8", "lights on")], {}),
    "card_number": ([chat("pay with 4539 1488 0343 6467", "lights on")], {}),
    "bank_account": ([chat("to DE89 3704 0044 0532 0130 00", "lights on")], {}),
    "national_id": ([chat("my number is 001099123456", "lights on")], {}),
    "email_address": ([chat("write to jo.doe@corp.io", "lights on")], {}),
    "phone_number": ([chat("call 0912 345 678", "lights on")], {}),
    "ip_address": ([chat("the lamp is at 91.198.174.192", "lights on")], {}),
    "names_unchecked": ([], {}),
    "profanity": ([chat("turn the fucking lamp on", "lights on")], {}),
    "toxicity_unchecked": ([], {}),
    "labels_of_groups": (
        [chat(f"{room[::-1]} {q.format(room)} for a muslim {room}", "lock door") for q in QUESTIONS for room in ROOMS],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", CASES)
def test_a_rule_fires_on_its_fault_and_is_silent_without(code: str, gate: Callable[..., Report]) -> None:
    rows, asked = CASES[code]
    report = gate(clean() + rows, **asked)
    assert code in codes(report), [dict(finding) for finding in report.findings]
    assert code in ALWAYS or code not in codes(gate(clean()))


def test_clean_rows_are_warned_of_for_their_number_only(gate: Callable[..., Report]) -> None:
    report = gate(clean())
    assert codes(report) == ALWAYS
    assert report.verdict == "warn"
    assert gate(clean(), rules=("rows_few=off",)).verdict == "pass"


def test_every_rule_has_a_case() -> None:
    elsewhere = {
        "row_unrendered",
        "row_too_long",
        "rows_many",
        "learned_share",
        "thought_unrendered",
        "labels_doubtful",
        "person_name",
        "place_name",
    }
    assert set(CASES) | elsewhere | {"answers_conflict"} == set(RULES)


def test_answers_that_are_no_labels_conflict_less_gravely(gate: Callable[..., Report]) -> None:
    report = gate([*prose(), chat("what now?", "Wait for a while."), chat("What now", "Go on, but slowly.")])
    assert found(report, "answers_conflict")["level"] == "warn"
    assert "labels_conflict" not in codes(report)


def test_few_conflicting_labels_warn_and_many_block(gate: Callable[..., Report]) -> None:
    pair = [chat("do the thing", label) for label in ANSWERS[:2]]
    many = clean() + [chat(f"{q} at once", a) for q, a in zip(QUESTIONS, ANSWERS, strict=True) for _ in range(8)]
    assert found(gate(many + pair), "labels_conflict")["level"] == "warn"
    assert found(gate(clean() + pair), "labels_conflict")["level"] == "block"
    assert found(gate(many + pair, rules=("labels_conflict=block",)), "labels_conflict")["level"] == "block"


def test_labels_are_read_from_a_field_of_json_answers(gate: Callable[..., Report]) -> None:
    rows = [
        chat(row["messages"][0]["content"], json.dumps({"intent": row["messages"][1]["content"], "n": str(i)}))
        for i, row in enumerate(clean())
    ]
    labels = gate(rows).figures["labels"]
    assert (labels["read_from"], set(labels["counts"].values())) == ("intent", {8})


def test_a_planted_wrong_label_is_found_with_the_likelier_one(gate: Callable[..., Report]) -> None:
    rows = [
        chat(f"{q.format(room)} {n}", a)
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
        for room in ROOMS
        for n in range(4)
    ]
    rows[5]["messages"][1]["content"] = "lock door"
    doubtful = found(gate(rows), "labels_doubtful")
    assert (doubtful["count"], doubtful["examples"][0]["text"]) == (1, "lock door → lights on?")
    assert doubtful["examples"][0]["place"] == "data.jsonl:6"


def test_what_is_private_is_never_printed(gate: Callable[..., Report]) -> None:
    hidden = ("4539 1488 0343 6467", "jo.doe@corp.io", "0912 345 678", "ghp_a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8")
    report = gate([*clean(), chat(" and ".join(hidden), "lights on")])
    shown = json.dumps(report.as_dict()) + report_html(report) + "".join(line for _, line in report_lines(report))
    assert not any(text in shown for text in hidden)
    assert found(report, "card_number")["count"] == 1


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("order 4539148803436467 shipped", ["card"]),
        ("order 4539148803436468 shipped", []),
        ("IMEI 356938035643809", []),
        ("Amex 378282246310005 or Diners 30569309025904", ["card", "card"]),
        ("version 8.8.4.4 and 91.198.174.192", ["IP address"]),
        ("order SO-2124-56789 and #0912345678", []),
        ("version 10.0.0.1 and 192.168.1.7 and 1.2.3", []),
        ("2001:4860:4860::8888 answers at 12:30:45", ["IP address"]),
        ("+84 912 345 678 or (212) 736-5000", ["telephone (VN)", "telephone (US)"]),
        ("CCCD 079203001234", ["VN citizen identity"]),
        ("CCCD 003203001234 and 079999001234", []),
        ("SSN 536-22-8726", ["US social security"]),
        ("mail me@example.com", []),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVPmB92K27uhbUJU1p1r_wW1gFWFOEjXk", ["JSON Web Token"]),
        ("-----BEGIN RSA PRIVATE KEY-----", ["Private Key"]),
    ],
)
def test_checksums_and_forms_decide_what_is_private(text: str, kinds: list[str]) -> None:
    assert [match.kind for match in privacy.matches(text)] == kinds


def test_a_fixed_prompt_around_the_question_makes_no_twins(gate: Callable[..., Report]) -> None:
    head = "You route requests of a smart home to one of four functions. Answer with its name only. Request: "
    rows = [
        chat(f"{head}{q} {word}", a)
        for q, a in zip(("abc", "qrs", "xyz", "lmn"), ANSWERS, strict=True)
        for word in ROOMS
    ]
    assert not codes(gate(rows)) & {"twins_near", "twins_template"}


@pytest.mark.parametrize("depth", [900, 100_000])
def test_an_answer_nested_to_or_beyond_what_a_reader_takes_is_one_more_text(
    depth: int, gate: Callable[..., Report]
) -> None:
    nested = '{"a":' + "[" * depth + '"bathroom"' + "]" * depth + "}"
    plain = codes(gate(clean()))
    assert codes(gate([*clean(), chat("and the bathroom?", nested)])) - plain <= {"labels_rare"}


def test_many_rows_of_one_template_take_no_square_of_time() -> None:
    texts = [f"the lamp number {index} in the room at the end of the hall is broken" for index in range(3_000)]
    compared = []
    original = twins.jaccard
    twins.jaccard = lambda one, other: compared.append(1) or original(one, other)  # type: ignore[func-returns-value]
    try:
        groups = set(twins._near_clusters(texts))
    finally:
        twins.jaccard = original
    assert len(groups) < 30
    assert len(compared) < 3_000 * twins.COMPARED * twins.BANDS


def test_clusters_are_counted_and_their_thresholds_stated(gate: Callable[..., Report]) -> None:
    near = "the lamp over the table by the window is too bright"
    rows = [chat(f"dim to {n} percent", "ok") for n in (10, 20)] * 2 + [chat(f"{near} {end}", "ok") for end in "ab"]
    report = gate(rows)
    assert report.figures["twins"] == {
        "questions": 4,
        "templates": 3,
        "clusters": 2,
        "near_jaccard": 0.8,
        "contained_share": 0.5,
        "contained_words": 13,
    }
    assert any("4 questions, 3 templates, 2 groups" in line for _, line in report_lines(report))


def test_the_command_leaves_with_0_1_or_3_and_prints_one_document(tmp_path: Path, qwen2_base: Path) -> None:
    def ran(rows: Rows, *more: str) -> Any:
        data = written(tmp_path / "data.jsonl", rows)
        return CliRunner().invoke(build_app(), ["data", "check", str(data), "--base", str(qwen2_base), *more])

    page = tmp_path / "report.html"
    passed = ran(clean(), "--rules", "rows_few=off,learned_share=off", "--strict", "--json", "--html", str(page))
    assert passed.exit_code == 0, passed.output
    document = json.loads(passed.output)
    assert document["verdict"] == "pass" and {row["code"] for row in document["findings"]} <= set(RULES)
    assert document["report_digest"] in page.read_text("utf-8")
    assert ran(clean()).exit_code == 0
    assert ran(clean(), "--strict").exit_code == 1
    blocked = ran(clean() + CASES["card_number"][0])
    assert blocked.exit_code == 3 and "block: Not fit to train on" in blocked.output


@pytest.mark.parametrize(
    ("rule", "reason"), [("secrets=warn", "did you mean secret"), ("secret=maybe", "must be one of")]
)
def test_a_rule_or_level_that_is_none_is_refused(rule: str, reason: str, gate: Callable[..., Report]) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        gate(clean(), rules=(rule,))


def test_the_same_data_gives_the_same_digest_and_a_rule_another(gate: Callable[..., Report]) -> None:
    assert gate(clean()).digest == gate(clean()).digest
    assert gate(clean()).digest != gate(clean(), rules=("rows_few=off",)).digest


def test_a_report_that_blocks_is_an_error_with_each_place(gate: Callable[..., Report]) -> None:
    error = gate(clean() + CASES["card_number"][0]).error()
    assert isinstance(error, DataInvalid)
    assert [(problem.code, problem.path) for problem in error.problems] == [("card_number", "data.jsonl:33")]


def test_data_that_is_not_there_is_an_error_and_no_report(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="does not exist"):
        check(Asked(tmp_path / "none.jsonl"))


def test_the_page_escapes_what_the_data_says(gate: Callable[..., Report]) -> None:
    rows = clean() + [chat(f"please do {word}", "<b>On</b>") for word in ROOMS]
    page = report_html(gate(rows))
    assert "&lt;b&gt;On&lt;/b&gt;" in page and "<b>On</b>" not in page


def test_the_docs_have_every_rule_as_the_code_has_it() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    for rule in RULES.values():
        assert f"| `{rule.code}` | {rule.level} | {rule.title} | {rule.advice} |" in page
    assert page.count(" | block | ") + page.count(" | warn | ") + page.count(" | note | ") == len(RULES)


def test_on_a_base_rows_are_measured_and_what_its_template_cannot_render_is_found(
    gate: Callable[..., Report], qwen2_base: Path
) -> None:
    long = chat("please " + "dim the lamp " * 400, "lights on")
    thinking = chat("why?", "<think>because</think>lights on")
    ends_early = chat("what ends a turn?", "it is <|im_end|> and more")
    report = gate([*clean(), long, thinking, ends_early], base=str(qwen2_base), max_length=256)
    assert found(report, "row_too_long")["examples"][0]["place"] == "data.jsonl:33"
    assert found(report, "row_too_long")["level"] == "block"
    assert {"thought_unrendered", "row_unrendered"} <= codes(report)
    assert report.figures["tokens"]["max"] > 256 and report.figures["rows_above"]["256"] == 1
    assert report.figures["learned_tokens"] == round(report.figures["learned_share"] * report.figures["tokens"]["sum"])
    chosen = gate([*clean(), long], base=str(qwen2_base), max_length=256, over_long="cut")
    assert found(chosen, "row_too_long")["level"] == "warn"


def test_a_run_on_data_that_blocks_ends_before_its_model_and_another_keeps_the_verdict(
    tmp_path: Path, qwen2_base: Path
) -> None:
    secret = chat("pay with 4539 1488 0343 6467", "lights on")
    data = written(tmp_path / "data.jsonl", [*clean(), secret])
    config = TrainingConfig(
        data=data, name="router", base=str(qwen2_base), out=tmp_path / "out", method="lora", epochs=0.1
    )
    with pytest.raises(DataInvalid, match="card_number"):
        train(config, lambda _: None)
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    card = train(replace(config, rules=("card_number=warn",)), said.append).card
    assert card["gate"]["verdict"] == "warn" and card["gate"]["findings"]["card_number"] == 1
    assert card["gate"]["report_digest"].startswith("sha256:")
    assert any("data check: warn (" in line for line in said)
    assert train(replace(config, data_check=False, out=tmp_path / "other"), lambda _: None).card["gate"] is None


@pytest.mark.parametrize("has_file", [True, False])
def test_a_run_s_check_is_that_of_the_command_and_reads_no_file_again(
    has_file: bool, tmp_path: Path, qwen2_base: Path
) -> None:
    turns = chat("first?", "<think>because</think>lights on", "and " + "then " * 80 + "?", "lights off")
    rows = [*clean(), turns, chat("please " + "dim the lamp " * 90, "lights on")]
    data = written(tmp_path / "data.jsonl", rows)
    validation = written(tmp_path / "validation.jsonl", [*clean()[:3], chat("quite new?", "lock door")])
    replay = written(tmp_path / "replay.jsonl", prose())
    how: dict[str, Any] = {"supervise": "all", "thinking": None, "max_length": 200, "over_long": "cut"}
    how |= {"validation": validation if has_file else None, "rules": ("labels_rare=note",)}
    asked = Asked(data, str(qwen2_base), **how)
    config = TrainingConfig(
        **{"data": data, "name": "router", "base": str(qwen2_base), "replay": replay, "canaries": 2, **how},
        validation_share=None if has_file else 0.3,
    )
    material, expected = gather(config), check(asked)
    assert material.training.cut and (has_file or material.validation is not None)
    assert {"row_too_long", *(["validation_leak"] if has_file else [])} <= codes(expected)
    for path in (data, validation, replay):
        path.unlink()
    report = passed(config, material)
    assert report is not None and report.digest == expected.digest


def test_a_word_that_is_none_for_over_long_or_supervise_is_refused(gate: Callable[..., Report]) -> None:
    with pytest.raises(ConfigInvalid, match="over_long is 'dorp'; it must be one of error, cut, drop"):
        gate(clean(), over_long="dorp")
    with pytest.raises(ConfigInvalid, match="supervise is 'first'; it must be one of all, last"):
        gate(clean(), supervise="first")


def test_more_rows_than_helped_others_are_a_note(tmp_path: Path) -> None:
    row = read(written(tmp_path / "one.jsonl", [chat("a", "b")]), ()).rows
    subject = Subject(DataFile(Path("x"), row * 50_001, ""))
    assert [finding.code for finding in amount.rows(subject, 1_000_000)] == ["rows_many"]
    assert [finding.code for finding in amount.share(Lengths([1000], [5], [0], []))] == ["learned_share"]
