"""Order, keeping and tables of the bench of many adapters, on measurements whose figures are arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.many import run
from bench.many.cases import SERVERS, Case, expected_seconds, full, short
from bench.many.drive import Window
from bench.many.kept import SEED, Kept, head, line_of, seen_of
from bench.many.pictures import pictures
from bench.many.plan import BASE
from bench.many.stats import Seen
from bench.many.tables import reports

WINDOW = Window(0.0, 10.0, 5.0)
CASES = [replace(case, window=WINDOW) for case in full() if case.load]
STALLS = [case for case in full() if not case.load]


def request(model: int, tokens: int, first: float = 1.0) -> Seen:
    return Seen(model, model % 4, 0.5, 0.5, first, first + 1.0, 11, 11, window_tokens=tokens)


def keep(path: Path, cases: list[Case], tokens: dict[str, int], rounds: int = 3) -> Kept:
    """In each round a side has so many tokens a second, times the round's number."""
    kept = Kept.open(path, cases)
    for turn in range(rounds):
        for case in cases:
            for side in case.sides:
                each = tokens[side] * (turn + 1) * int(WINDOW.seconds) // 2
                seen = [request(BASE, each), request(20, each, first=0.5 + tokens[side] / 100)]
                kept.add(line_of(turn, case, side, seen))
    return kept


TOKENS = {"hotshoe": 100, "stock": 50, "bare": 80, "llama.cpp": 40, "peft": 20}


def test_sides_take_turns_in_an_order_that_turns_and_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    case = CASES[0]
    path = tmp_path / "kept.jsonl"
    Kept.open(path, CASES).add(line_of(0, case, "stock", []))
    todo = list(Kept.open(path, CASES).pending([case], 3))
    order = [[side for turn, _, side in todo if turn == number] for number in range(3)]
    assert order == [
        [side for side in case.sides if side != "stock"],
        list(reversed(case.sides)),
        list(case.sides),
    ]
    assert expected_seconds(todo) > sum(case.window.total_seconds for _ in todo)


def test_a_line_is_read_back_as_it_was_and_holds_its_seed(tmp_path: Path) -> None:
    seen = [request(BASE, 3), replace(request(1, 0), first=None, last=None, problem="503")]
    kept = Kept.open(tmp_path / "kept.jsonl", CASES)
    kept.add(line_of(2, CASES[0], "stock", seen))
    (line,) = Kept.open(tmp_path / "kept.jsonl", CASES).lines
    assert seen_of(line) == seen and line["seed"] == SEED + 2


def test_measurements_with_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    Kept.open(path, CASES).add(line_of(0, CASES[0], "stock", []))
    others = [replace(case, window=Window(0.0, 11.0)) for case in CASES]
    with pytest.raises(ValueError, match="1 measurements with other settings, the first of 'base'"):
        Kept.open(path, others)
    assert Kept.open(path, CASES[1:]).lines == []  # of cases that are not asked for nothing is shown


def test_ratios_are_to_the_same_rounds_of_the_peer_of_its_base_and_of_bare(tmp_path: Path) -> None:
    tables = dict(reports(keep(tmp_path / "kept.jsonl", CASES, TOKENS), CASES))
    assert list(tables) == ["mix", "closed", "first", "open", "classes"]
    rows = {(row["load"], row["side"]): row for row in tables["mix"].rows}
    zipf = rows["64 Zipf", "stock"]
    assert zipf["tokens/s"] == 100.0 and zipf["min..max"] == "50..150"  # the rounds' 50, 100, 150
    assert (zipf["of its base"], zipf["of its four adapters"], zipf["hotshoe, times this"]) == (1.0, 1.0, 2.0)
    assert rows["base", "bare"]["of its four adapters"] == "-" and ("64 Zipf", "bare") not in rows
    closed = {(row["load"], row["side"]): row for row in tables["closed"].rows}
    assert closed["one adapter, 4 at once", "hotshoe"]["of bare"] == pytest.approx(1.25)
    first = {(row["load"], row["side"]): row for row in tables["first"].rows}
    assert first["512 prompt tokens, one adapter", "stock"]["ms"] == pytest.approx(500.0)
    assert first["512 prompt tokens, one adapter", "stock"]["hotshoe, times as fast"] == pytest.approx(0.5)


def test_the_open_loads_table_has_goodput_fairness_and_classes(tmp_path: Path) -> None:
    kept = keep(tmp_path / "kept.jsonl", CASES, TOKENS)
    case = next(case for case in CASES if case.table == "open")
    unfair = replace(request(1, 0), first=None, last=None, got_tokens=0)
    kept.add(line_of(3, case, "stock", [unfair]))
    tables = dict(reports(kept, CASES))
    rows = {(row["load"], row["side"]): row for row in tables["open"].rows}
    assert rows[case.name, "hotshoe"]["goodput/s"] == pytest.approx(0.2)  # two requests in ten seconds
    assert rows[case.name, "hotshoe"]["Jain, adapters"] == 1.0
    assert rows[case.name, "stock"]["Jain, adapters"] == pytest.approx(0.5)  # of two adapters one got all, one nothing
    classes = {(row["load"], row["side"], row["class"]): row for row in tables["classes"].rows}
    assert classes[case.name, "hotshoe", "cold"]["TTFT p50"] == pytest.approx(1000.0)
    assert classes[case.name, "stock", "hot"]["TTFT p99"] == pytest.approx(14_500.0)  # waited until the end
    assert classes[case.name, "stock", "hot"]["without a first token"] == 1


def test_stalls_are_medians_over_the_rounds(tmp_path: Path) -> None:
    kept = Kept.open(tmp_path / "kept.jsonl", STALLS)
    for turn, load in enumerate((5.0, 70.0, 9.0)):
        row = {"normal gap, p50": 20.0, "normal gap, p99": 25.0, "of the load": load}
        row |= {"gap, resident adapter asked": 30.0, "gap, absent adapter asked": 30.0 + load}
        kept.add({**head(turn, STALLS[0], "hotshoe"), "stalls": row})
    (table,) = (report for name, report in reports(kept, STALLS) if name == "stalls")
    assert table.rows[0]["of the load"] == 9.0 and table.rows[0]["min..max of the load"] == "5..70"
    assert next(pictures("stalls", table))[1].count("<rect") == 1 + 4


def test_every_table_has_a_picture_that_is_well_formed_and_says_its_figures(tmp_path: Path) -> None:
    kept = keep(tmp_path / "kept.jsonl", CASES, TOKENS)
    kept.add({"start": "stock", "setup": "many", "seconds": 27.5, "commit": "c" * 40 + "+", "date": "2026-11-30"})
    assert kept.taken() == "2026-11-30, commit cccccccccc+"
    drawn = {name: dict(pictures(name, report)) for name, report in reports(kept, CASES)}
    assert all(len(found) == 1 for found in drawn.values()), drawn.keys()
    for found in drawn.values():
        for svg in found.values():
            root = ElementTree.fromstring(svg)  # noqa: S314 - our own
            words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
            assert any(word in ("hotshoe", "stock") for word in words) and "nan" not in svg and "inf" not in svg
    assert ">27.5<" in drawn["starts"]["many-starts"] and ">200 ms<" not in drawn["starts"]["many-starts"]


def test_tables_and_sides_are_chosen_by_their_names() -> None:
    found = run.chosen(full(), ["closed"], ["stock", "bare"])
    assert {case.table for case in found} == {"closed"}
    assert {case.sides for case in found} == {("stock",), ("stock", "bare")}
    with pytest.raises(SystemExit, match="no nonsense: tables are mix"):
        run.chosen(short(), ["nonsense"], [])


def test_tables_go_between_their_marks_in_the_docs_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep(tmp_path / "kept.jsonl", CASES[:4], TOKENS)
    found = list(reports(kept, CASES[:4]))
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    place = "<!-- bench many: mix begins -->\nold\n<!-- bench many: mix ends -->"
    run.DOCS.write_text(f"before\n{place}\nafter\n")
    run.into_docs(found, {"many-mix": "<svg/>"}, "`the command`, today.")
    text = run.DOCS.read_text()
    assert text.startswith("before\n<!-- bench many: mix begins -->\n### HTTP, 32 clients") and text.endswith("after\n")
    assert (
        "old" not in text
        and "| 64 Zipf | stock |" in text
        and "](bench/many-mix.svg)" in text
        and "\n`the command`, today.\n" in text
    )
    assert (run.PICTURES / "many-mix.svg").read_text() == "<svg/>"
    run.DOCS.write_text("nothing")
    with pytest.raises(SystemExit, match="has no place for the table mix"):
        run.into_docs(found, {}, "")


def test_figures_are_written_with_what_they_were_taken_on(tmp_path: Path) -> None:
    found = list(reports(keep(tmp_path / "kept.jsonl", CASES[:4], TOKENS), CASES[:4]))
    run.put(tmp_path, found, {"many-mix": "<svg/>"}, CASES[:4])
    body = json.loads((tmp_path / "many.json").read_text())
    assert {"cpu", "cores", "versions", "command", "commit"} <= set(body["machine"])
    assert body["first_seed"] == SEED and body["slo"] == {"ttft_seconds": 2.0, "tpot_seconds": 0.2}
    assert body["loads"][0]["load"]["clients"] == 32 and body["tables"][0]["rows"][0]["side"] == SERVERS[0]
