"""What each row is asked by itself, in a process beside: it finds the same, and fails and ends with its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from adapters.errors import BaseInvalid, DataInvalid
from tests.fixtures.processes import environment
from tests.fixtures.service import eventually
from tests.training.test_gate import chat, clean, written
from training.gate import looks
from training.gate.check import Asked, check, read
from training.gate.looks import Rendered, Seen, looking, seen
from training.gate.subject import Subject


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """Rows of which some have something private, one does not render and one is longer than the others."""
    rows = [
        *clean(),
        chat("write to jane.doe@somewhere.org and bob@elsewhere.org", "lights on"),
        chat("what ends a turn?", "it is <|im_end|> and more"),
        chat("please " + "dim the lamp " * 40, "lights on"),
        chat("call +44 20 7946 0958 or jane.doe@somewhere.org", "lights off"),
    ]
    return read(written(tmp_path / "data.jsonl", rows), ())


def test_ranges_of_rows_are_joined_to_what_all_of_them_give(subject: Subject, qwen2_base: Path) -> None:
    whole = seen(subject.rows, Rendered(qwen2_base))
    parts = [seen(subject.rows[start : start + 7], Rendered(qwen2_base), start) for start in range(0, 36, 7)]
    assert Seen.joined(parts) == whole
    assert [index for index, _ in whole.lengths.failed] == [33] and 33 not in whole.lengths.indices
    assert whole.private["email_address"] == (
        {32: "e-mail: ja… (22 letters)", 35: "e-mail: ja… (22 letters)"},
        Counter({"e-mail": 3}),
    )
    assert list(Seen.joined([]).lengths.tokens) == [] and Seen.joined([]).private == {}


def test_a_process_beside_sees_what_this_one_sees(
    subject: Subject, qwen2_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = check(Asked(subject.file.path, str(qwen2_base)))
    monkeypatch.setattr(looks, "ROWS_FOR_A_PROCESS", 0)
    monkeypatch.setattr(looks, "ROWS_AT_A_TIME", 10)
    assert check(Asked(subject.file.path, str(qwen2_base))).as_dict() == here.as_dict()


def test_what_the_process_beside_refuses_is_refused_here(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "ROWS_FOR_A_PROCESS", 0)
    with looking(subject.rows, Rendered(tmp_path)) as found, pytest.raises(BaseInvalid, match="has no tokenizer"):
        found()


def test_a_process_beside_that_is_killed_is_said(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "ROWS_FOR_A_PROCESS", 0)
    with pytest.raises(DataInvalid, match="looked at 36 rows was killed"), looking(subject.rows, None) as found:
        for child in psutil.Process().children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
        found()


CHECK = """
import sys
from server.cli.main import build_app
build_app()({words!r}, standalone_mode=False)
assert "torch" not in sys.modules
"""


def test_the_command_never_imports_torch(subject: Subject, qwen2_base: Path) -> None:
    """Half a gigabyte and some seconds, for a tokenizer that needs nothing of it."""
    words = ["data", "check", str(subject.file.path), "--base", str(qwen2_base), "--rules", "row_unrendered=warn"]
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(words=words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr  # transformers says so where it misses it
    assert "row_unrendered" in done.stdout and "tokens" in done.stdout


WAITING = """
import time
from pathlib import Path
from training.gate import looks
from training.gate.check import read
looks.ROWS_FOR_A_PROCESS = 0
if __name__ == "__main__":
    with looks.looking(read(Path({path!r}), ()).rows, None) as found:
        found()
        print("seen", flush=True)
        time.sleep(600)
"""


def test_the_process_beside_ends_with_a_parent_that_is_killed(subject: Subject, tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING.format(path=str(subject.file.path)))
    words, env = [sys.executable, str(script)], environment()
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"seen\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGKILL)
    assert children
    eventually(lambda: not any(child.is_running() for child in children))
