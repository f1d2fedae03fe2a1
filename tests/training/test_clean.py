"""Cleaned data has pseudonyms in the place of private values; the map alone undoes it; the data stays as it is."""

from __future__ import annotations

import json
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from adapters.errors import ConfigInvalid, DataInvalid, OutputExists
from server.cli.main import build_app
from tests.training.conftest import chat, write_jsonl
from training.cleaning.pseudonyms import Pseudonyms, Restorer
from training.cleaning.run import CleanAsked, clean, restore
from training.cleaning.values import alike, changed
from training.data.formats import read_data
from training.gate.check import Asked, check
from training.gate.privacy import MASKABLE, matches

PROGRAM = "from server.cli.main import run; run()"
SECRET = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
PRIVATE = {
    "email_address": "jo.doe@corp.io",
    "phone_number": "0912 345 678",
    "card_number": "4539 1488 0343 6467",
    "bank_account": "DE89 3704 0044 0532 0130 00",
    "national_id": "079203001234",
    "ip_address": "91.198.174.192",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows: list[Any] = [
        chat(f"what about {value}, please", f"{value} it is, order 12345 of 2024-05-06") for value in PRIVATE.values()
    ]
    rows += [chat("call +84 912 345 678 or 0912345678", json.dumps({"phone": "0912 345 678", "n": 3}))]
    rows += [chat(f"my key is {SECRET}", "never say that"), chat("nothing here", "yes")]
    return write_jsonl(tmp_path / "data.jsonl", rows)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_private_values_are_gone_and_the_rows_with_secrets_too(data: Path, tmp_path: Path) -> None:
    before = data.read_bytes()
    report = clean(CleanAsked(data, tmp_path / "out.jsonl"))
    text = (tmp_path / "out.jsonl").read_text("utf-8")
    assert not any(value in text for value in (*PRIVATE.values(), SECRET))
    assert "order 12345 of 2024-05-06" in text
    assert data.read_bytes() == before
    assert (report["rows"], report["kept_rows"], report["changed_rows"]) == (9, 8, 7)
    assert report["dropped"] == {"secret": {"rows": 1, "places": ["data.jsonl:8"]}}
    assert report["masked"]["phone_number"] == {"times": 5, "values": 3, "rows": 2}
    assert report["left"] == {}
    codes = {finding["code"] for finding in check(Asked(tmp_path / "out.jsonl")).findings}
    assert not codes & set(MASKABLE)


def test_equal_values_have_equal_pseudonyms_of_their_shape_and_json_stays_json(data: Path, tmp_path: Path) -> None:
    clean(CleanAsked(data, tmp_path / "out.jsonl"))
    rows = lines(tmp_path / "out.jsonl")
    phone = rows[1]["messages"][1]["content"].removeprefix("what about ").removesuffix(", please")
    answer = json.loads(rows[6]["messages"][2]["content"])
    assert answer == {"phone": phone, "n": 3}
    assert [letter for letter in phone if not letter.isdigit()] == [" ", " "] and len(phone) == len("0912 345 678")
    assert phone.replace(" ", "") in rows[6]["messages"][1]["content"]
    assert rows[0]["messages"][1]["content"].split()[2].endswith("@example.com,")


def test_only_the_map_turns_it_back_and_it_is_its_owners_alone(data: Path, tmp_path: Path) -> None:
    clean(CleanAsked(data, tmp_path / "out.jsonl"))
    mapped = tmp_path / "out.jsonl.map"
    assert stat.S_IMODE(mapped.stat().st_mode) == 0o600
    assert SECRET not in mapped.read_text("utf-8")
    report = restore(tmp_path / "out.jsonl", mapped, tmp_path / "back.jsonl")
    assert lines(tmp_path / "back.jsonl") == [row for row in lines(data) if SECRET not in json.dumps(row)]
    assert report["restored"] == 15
    assert stat.S_IMODE((tmp_path / "back.jsonl").stat().st_mode) == 0o600
    other = write_jsonl(tmp_path / "other.jsonl", [chat("write to an@corp.io", "yes")])
    clean(CleanAsked(other, tmp_path / "other.out"))
    report = restore(tmp_path / "out.jsonl", tmp_path / "other.out.map", tmp_path / "no.jsonl")
    assert report["restored"] == 0 and lines(tmp_path / "no.jsonl") == lines(tmp_path / "out.jsonl")


def test_a_map_is_used_again_so_that_two_files_agree(data: Path, tmp_path: Path) -> None:
    first = clean(CleanAsked(data, tmp_path / "one.jsonl", map=tmp_path / "map"))
    second = clean(CleanAsked(data, tmp_path / "two.jsonl", map=tmp_path / "map"))
    assert lines(tmp_path / "one.jsonl") == lines(tmp_path / "two.jsonl")
    assert second["map_values_before"] == first["map_values"] == second["map_values"]
    clean(CleanAsked(data, tmp_path / "three.jsonl"))
    assert lines(tmp_path / "three.jsonl") != lines(tmp_path / "one.jsonl")


def test_forgetting_keeps_no_map(data: Path, tmp_path: Path) -> None:
    assert clean(CleanAsked(data, tmp_path / "out.jsonl", forget=True))["map"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl"]


def test_rules_decide_what_is_masked_dropped_and_left(data: Path, tmp_path: Path) -> None:
    asked = CleanAsked(data, tmp_path / "out.jsonl", mask=("email_address", "secret"), drop=("phone_number",))
    report = clean(asked)
    assert set(report["masked"]) == {"email_address", "secret"} and report["dropped"]["phone_number"]["rows"] == 2
    assert report["left"] == {"card_number": 2, "bank_account": 2, "national_id": 2, "ip_address": 2}
    assert "<secret-" in (tmp_path / "out.jsonl").read_text("utf-8")


def test_rows_are_dropped_by_any_rule_of_the_data_check(data: Path, tmp_path: Path) -> None:
    rows = [*lines(data), chat("the caf\ufffd", "yes"), chat("nothing here", "yes")]
    write_jsonl(data, rows)
    report = clean(CleanAsked(data, tmp_path / "out.jsonl", drop=("text_replaced", "twins_exact")))
    assert report["dropped"] == {
        "text_replaced": {"rows": 1, "places": ["data.jsonl:10"]},
        "twins_exact": {"rows": 1, "places": ["data.jsonl:11"]},
    }


def test_rows_that_cannot_be_read_are_an_error_or_dropped_by_name(data: Path, tmp_path: Path) -> None:
    with data.open("a") as file:
        file.write('{"messages": []}\nno json\n')
    with pytest.raises(DataInvalid, match="2 of 11 rows"):
        clean(CleanAsked(data, tmp_path / "out.jsonl"))
    report = clean(CleanAsked(data, tmp_path / "out.jsonl", drop=("secret", "row_unreadable")))
    assert report["dropped"]["row_unreadable"]["rows"] == 2
    assert (report["rows"], report["kept_rows"], report["dropped_rows"]) == (11, 8, 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.parquet", b"PAR1" + b"\0" * 40),
        ("b.parquet", b"prompt,completion"),
        ("b.csv.gz", b"\x1f\x8b" + b"\0" * 40),
        ("b.csv", b"colour,size\nred,3\n"),
        ("b.json", b"[" * 100_000),
        ("b.jsonl", b""),
    ],
)
def test_a_file_that_cannot_be_read_is_one_unreadable_row(name: str, content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [chat("nothing here", "yes")])
    write_jsonl(folder / "c.jsonl", [chat("nor here", "no")])
    (folder / name).write_bytes(content)
    with pytest.raises(DataInvalid):
        clean(CleanAsked(folder, tmp_path / "out.jsonl"))
    report = clean(CleanAsked(folder, tmp_path / "out.jsonl", drop=("row_unreadable",)))
    assert len(lines(tmp_path / "out.jsonl")) == report["kept_rows"] == 2
    assert report["dropped"]["row_unreadable"] == {"rows": 1, "places": [f"{folder / name}:1"]}
    assert report["dropped_rows"] == 1


@pytest.mark.parametrize("depth", [450, 900, 100_000])
def test_answers_that_nest_deeply_are_kept_and_what_they_say_is_masked(depth: int, tmp_path: Path) -> None:
    nested = '{"a":' + "[" * depth + '"a\\\\b, jo.doe@corp.io"' + "]" * depth + "}"
    data = write_jsonl(tmp_path / "data.jsonl", [chat("deep?", nested), chat("nothing here", "yes")])
    report = clean(CleanAsked(data, tmp_path / "out.jsonl", drop=("twins_exact", "text_replaced")))
    assert report["kept_rows"] == 2 and report["masked"]["email_address"]["times"] == 1


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"mask": ("names",)}, "--mask has 'names'"),
        ({"drop": ("names",)}, "--drop has 'names'"),
        ({"drop": ("secret", "row_too_long")}, "row_too_long.*rendered for a base"),
        ({"drop": ("thought_unrendered",)}, "thought_unrendered.*rendered for a base"),
        ({"drop": ("leak_exact",)}, "leak_exact.*test or validation data"),
        ({"drop": ("validation_leak",)}, "validation_leak.*test or validation data"),
        ({"drop": ("labels_unbalanced",)}, "labels_unbalanced.*no single rows"),
        ({"mask": ("secret",), "drop": ("secret",)}, "in --mask and in --drop"),
    ],
)
def test_a_rule_that_is_none_is_refused(asked: dict[str, Any], reason: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        clean(CleanAsked(data, tmp_path / "out.jsonl", **asked))


def test_nothing_is_written_over(data: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExists):
        clean(CleanAsked(data, data))
    with pytest.raises(ConfigInvalid, match="inside of the data"):
        clean(CleanAsked(tmp_path, tmp_path / "out.jsonl"))
    (tmp_path / "map").write_text("{}")
    with pytest.raises(DataInvalid, match="no map of pseudonyms"):
        clean(CleanAsked(data, tmp_path / "out.jsonl", map=tmp_path / "map"))
    assert (tmp_path / "map").read_text() == "{}"


def test_a_text_like_a_pseudonym_is_noticed_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    clean(CleanAsked(data, tmp_path / "one.jsonl", map=tmp_path / "map"))
    like = json.loads((tmp_path / "map").read_text())["entries"][0]["pseudonym"]
    write_jsonl(data, [*lines(data), chat(f"is {like} one?", "yes")])
    with pytest.raises(DataInvalid, match="could not be restored"):
        clean(CleanAsked(data, tmp_path / "two.jsonl", map=tmp_path / "map"))
    assert not (tmp_path / "two.jsonl").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = [chat(f"mail to user{n}@corp.io " + "and wait " * 20, "yes") for n in range(100)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    words = [sys.executable, "-c", PROGRAM, "data", "clean", str(data), "--out", str(tmp_path / "out.jsonl"), "--json"]
    ended = subprocess.run(words, capture_output=True, text=True, preexec_fn=small_files, check=False)
    assert (ended.returncode, json.loads(ended.stdout)["error"]["code"]) == (1, "storage_full")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize("form", ["csv", "alpaca", "sharegpt", "tools"])
def test_every_form_is_read_and_kept(form: str, tmp_path: Path) -> None:
    mail = PRIVATE["email_address"]
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "send", "arguments": json.dumps({"to": mail, "text": "a\nb"})},
    }
    rows = {
        "alpaca": {"instruction": f"mail {mail}", "output": "ok", "owner": mail, "number": 4539148803436467},
        "sharegpt": {"conversations": [{"from": "human", "value": mail}, {"from": "gpt", "value": "ok"}]},
        "tools": {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        },
    }
    data = tmp_path / f"data.{'csv' if form == 'csv' else 'jsonl'}"
    if form == "csv":
        data.write_text(f"prompt,completion,owner\nmail {mail},ok,{mail}\n")
    else:
        write_jsonl(data, [rows[form]])
    clean(CleanAsked(data, tmp_path / "out.jsonl"))
    (made,) = lines(tmp_path / "out.jsonl")
    assert mail not in json.dumps(made) and "user-" in json.dumps(made)
    assert read_data(tmp_path / "out.jsonl").rows[0].form == read_data(data).rows[0].form
    restore(tmp_path / "out.jsonl", tmp_path / "out.jsonl.map", tmp_path / "back.jsonl")
    (back,) = lines(tmp_path / "back.jsonl")
    assert alike(back, {"prompt": f"mail {mail}", "completion": "ok", "owner": mail} if form == "csv" else rows[form])


@settings(deadline=None)  # the first text loads the libraries
@given(
    st.sampled_from(sorted(PRIVATE)), st.integers(0, 5), st.text("ab .,\n", max_size=9), st.text("cd .,\n", max_size=9)
)
def test_pseudonyms_are_nothing_private_and_come_back_from_any_text(code: str, seed: int, head: str, tail: str) -> None:
    made = Pseudonyms(key=bytes([seed]) * 32)
    pseudonym = made.of(code, PRIVATE[code])
    assert pseudonym != PRIVATE[code] and not matches(pseudonym)
    assert Restorer(made.values).text(f"{head} {pseudonym} {tail}") == f"{head} {PRIVATE[code]} {tail}"


def test_a_thousand_short_numbers_have_a_thousand_pseudonyms() -> None:
    made = Pseudonyms()
    assert len({made.of("phone_number", f"{number:07}") for number in range(1000)}) == 1000


def test_json_with_escapes_is_changed_in_what_it_says() -> None:
    text = '{"to":"jo\\u0040corp.io","n":1}'
    made = changed(text, lambda said: said.replace("jo@corp.io", "x"))
    assert made == '{"to":"x","n":1}'
    assert changed(text, lambda said: said) == text
    assert alike(text, '{"n": 1, "to": "jo@corp.io"}') and not alike(text, '{"n": 2, "to": "jo@corp.io"}')


def test_the_commands_say_what_was_done_and_what_to_keep_apart(data: Path, tmp_path: Path) -> None:
    out, back = str(tmp_path / "out.jsonl"), str(tmp_path / "back.jsonl")
    ran = CliRunner().invoke(build_app(), ["data", "clean", str(data), "--out", out, "--drop", "secret,card_number"])
    assert ran.exit_code == 0, ran.output
    assert "9 rows, 7 kept" in ran.output and "mode 0600" in ran.output and PRIVATE["email_address"] not in ran.output
    ran = CliRunner().invoke(build_app(), ["data", "restore", out, "--map", f"{out}.map", "--out", back, "--json"])
    assert json.loads(ran.output)["rows"] == 7
