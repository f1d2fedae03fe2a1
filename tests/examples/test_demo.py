"""The demo's own promises: nothing is left behind, a missed bar is one sentence, a foreign folder is not touched."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from examples.agent_routing.console import Console, StepFailed, clock, columns
from examples.agent_routing.exporting import compare, first_difference
from examples.agent_routing.learn import five_examples, linear_intent_accuracy
from examples.agent_routing.serving import check_bars
from examples.agent_routing.workshop import Workshop, stop
from tests.fixtures.engines import eventually
from training.scores import Scores

ROOT = Path(__file__).parents[2]
# A child that ignores SIGTERM and has a child of its own in another session.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "demo", Console())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_sweep_ends_children_of_children_in_other_sessions_and_says_which(shop: Workshop) -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], env=shop.env, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = shop.sweep(grace_seconds=1.0)
        assert child.wait(5) == -signal.SIGKILL
    assert child.pid in found
    assert len(found) == 2
    eventually(lambda: not any(is_alive(pid) for pid in found), 5)  # its memory goes first, its entry in /proc last


def test_a_sweep_leaves_the_processes_of_another_run_alone(shop: Workshop, tmp_path: Path) -> None:
    other = Workshop(tmp_path / "other", Console())
    with subprocess.Popen([sys.executable, "-c", "input()"], env=other.env, stdin=subprocess.PIPE) as child:
        assert shop.sweep() == []
        assert child.poll() is None
        stop(child)
    assert child.returncode == -signal.SIGTERM


def test_a_folder_that_the_demo_did_not_make_is_not_emptied(shop: Workshop) -> None:
    shop.folder.mkdir()
    (shop.folder / "thesis.txt").write_text("mine")
    with pytest.raises(StepFailed, match="was not made by the demo"):
        shop.clear()
    assert (shop.folder / "thesis.txt").read_text() == "mine"


def test_its_own_folder_is_emptied_when_it_runs_again(shop: Workshop) -> None:
    shop.clear()
    (shop.folder / "old.txt").write_text("old")
    shop.clear()
    assert not (shop.folder / "old.txt").exists()


def test_a_command_that_fails_stops_the_step_with_its_own_words(shop: Workshop) -> None:
    shop.clear()
    with pytest.raises(StepFailed, match=r"hotshoe base show --base /nowhere.*exit code 1: /nowhere is neither"):
        shop.hotshoe_json("base", "show", "--base", "/nowhere")


def test_commands_see_the_demos_home_and_none_of_the_users_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOTSHOE_API_KEY", "secret")
    monkeypatch.setenv("HOTSHOE_CACHE", "/cache")
    env = Workshop(tmp_path, Console()).env
    ours = {key: value for key, value in env.items() if key.startswith("HOTSHOE_")}
    assert set(ours) == {"HOTSHOE_HOME", "HOTSHOE_URL", "HOTSHOE_CACHE", "HOTSHOE_DEMO"}
    assert ours["HOTSHOE_HOME"] == str(tmp_path / "home")


def test_every_missed_bar_is_named_with_what_was_expected() -> None:
    check_bars(Scores(192, 0.5, 1.0, 0.88, 0.75))
    with pytest.raises(StepFailed, match=r"exact match is 0.490, at least 0.50 .*slot F1 is 0.700, at least 0.75"):
        check_bars(Scores(192, 0.49, 1.0, 0.90, 0.70))


def test_the_demo_ends_with_one_plain_sentence_and_code_1_when_a_step_fails(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, "-m", "examples.agent_routing.demo", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stdout.strip().startswith("The demo stops here: ")
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_the_demo_with_code_130_and_no_child(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.agent_routing.demo", "--out", str(tmp_path / "demo")]
    # A run that a shell put into the background hands an ignored SIGINT down; a terminal does not.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=hears) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "$ hotshoe base prepare" in line:
                break
        time.sleep(0.2)
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
        assert demo.wait(60) == 130
    assert "Interrupted." in rest
    assert not [entry for entry in Path("/proc").iterdir() if _carries(entry, f"HOTSHOE_DEMO={demo.pid}-")]


def _carries(process: Path, text: str) -> bool:
    try:
        return text.encode() in (process / "environ").read_bytes()
    except OSError:
        return False


def test_the_plain_script_refuses_where_peft_would_come_and_hides_it() -> None:
    code = (
        "import runpy; found = runpy.run_path('examples/agent_routing/plain.py'); found['forbid_peft']()\n"
        "from transformers.utils import is_peft_available; assert not is_peft_available(); import transformers"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_first_difference_is_within_the_second_sequence() -> None:
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3], [1, 2]) == 1


@pytest.mark.model
def test_a_difference_carries_the_margin_where_the_answers_part() -> None:
    from transformers import AutoTokenizer

    from adapters.embedded import default_base

    tokenizer = AutoTokenizer.from_pretrained(default_base())
    ids = tokenizer("turn it on")["input_ids"] + [tokenizer.eos_token_id]
    plain = [{"text": "turn it on", "ids": ids, "margins": [9.0, 8.0, 0.0005, 7.0]}] * 2
    found = compare(["a", "b"], ["turn it on", "turn it off"], plain, default_base())
    assert [(difference.sentence, difference.margin, difference.is_near_tie) for difference in found] == [
        ("b", 0.0005, True)
    ]


def test_examples_for_the_base_are_of_five_different_labels_and_from_training_rows() -> None:
    from examples.agent_routing.data import ENGLISH, make

    data = make(ENGLISH)
    chosen = five_examples(data.splits["train"])
    assert len({json.loads(answer)["intent"] for _, answer in chosen}) == 5
    assert {sentence for sentence, _ in chosen} <= {row.sentence for row in data.splits["train"]}
    assert 0.9 < linear_intent_accuracy(data) <= 1.0


def test_tables_line_up() -> None:
    assert columns(("model", "n"), [("base", 1), ("router-en", 20)]) == "model       n\nbase        1\nrouter-en  20"
    assert clock(125.9) == "2:05"
