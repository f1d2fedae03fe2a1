"""Progress in a terminal: a bar with loss, tokens/s and time left. Without one it is plain lines (test_train)."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading
from pathlib import Path

import pytest

from training.config import TrainingConfig
from training.trainer import train


def test_in_a_terminal_a_bar_shows_steps_losses_speed_and_time_left(
    colours: Path, qwen2_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    ours, theirs = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=read, args=(ours, shown))
    reader.start()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        asked = {"validation": colours, "base": str(qwen2_base), "out": tmp_path / "out", "compare": False}
        train(TrainingConfig(data=colours, name="n", epochs=0.5, rank=2, **asked))  # type: ignore[arg-type]
    reader.join(10)
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    assert "━" in text
    last = [line for line in re.split(r"[\r\n]+", text) if "5/5" in line][-1]
    pattern = r"5/5 loss \d\.\d{3}  validation \d\.\d{3}  [\d,]+ tokens/s \d:\d\d:\d\d \d:\d\d:\d\d"
    assert re.search(pattern, last), last
    assert "step 1/5" not in text  # the lines are for logs


def read(terminal: int, shown: list[bytes]) -> None:
    """Until the other end is closed."""
    while True:
        try:
            shown.append(os.read(terminal, 65536))
        except OSError:
            return
