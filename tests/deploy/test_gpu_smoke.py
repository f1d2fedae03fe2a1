"""The smoke run and its report: on the embedded base with a real engine, and its parts without one."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from adapters.canonical import check
from adapters.inspect import inspect_folder
from deploy.smoke_adapter import write_adapter
from deploy.smoke_asked import Answer, apart
from deploy.smoke_report import Found

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_made_adapter_fits_its_base_and_two_seeds_differ(tiny_base: BaseModel, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(seed), tiny_base, seed) for seed in (1, 2)]
    verdicts = [check(inspect_folder(folder), tiny_base, max_rank=64) for folder in folders]
    assert [verdict.verdict for verdict in verdicts] == ["accept", "accept"]
    assert len(verdicts[0].modules) == len(tiny_base.shapes)
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert files[0] != files[1]


def test_the_report_has_machine_checks_and_figures_and_says_what_failed() -> None:
    found = Found("some/base", "CPU")
    found.check("a thing holds", True, "1 s")
    found.figure("ready", "2 | 3 s")
    text = found.markdown()
    assert text.startswith("## Hotshoe smoke run: passed")
    assert (
        "| a thing holds | yes | 1 s |" in text and "| ready | 2 \\| 3 s |" in text and "| base | some/base |" in text
    )
    found.check("another does not", False)
    assert "FAILED" in found.markdown() and "| another does not | **no** |  |" in found.markdown()


def test_answers_are_apart_by_their_text_or_by_how_likely_it_was() -> None:
    one = Answer("base", "Paris.", (-0.1, -0.2))
    assert apart(one, Answer("a", "Lyon.", (-0.1, -0.2))) == math.inf
    assert apart(one, Answer("a", "Paris.", (-0.1, -0.9))) == pytest.approx(0.7)
    assert apart(one, one) == 0.0


def test_without_a_gpu_it_says_how_to_try_the_script() -> None:
    from deploy.smoke_report import gpus

    if gpus():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, "-m", "deploy.gpu_smoke"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and "--device cpu" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_whole_run_passes_on_the_embedded_base(tmp_path: Path) -> None:
    report = tmp_path / "smoke.md"
    command = [sys.executable, "-m", "deploy.gpu_smoke", "--device", "cpu", "--out", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text()
    for wanted in ("smoke run: passed", "| ready |", "TTFT", "TPOT", "engine killed until ready", "parity"):
        assert wanted in text
