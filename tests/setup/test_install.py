"""`make setup` asks for torch's CPU build where pip is configured to look, and elsewhere only where that has none."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["install"] = module
    spec.loader.exec_module(module)
    return module


class Index:
    """Answers pip's commands as pip does against an index that has, or lacks, the CPU build."""

    def __init__(
        self, install: ModuleType, *, has_cpu_build: bool, fallback_works: bool = True, broken: str = ""
    ) -> None:
        self.result, self.commands = install.PipResult, list[list[str]]()
        self.has_cpu_build, self.fallback_works, self.broken = has_cpu_build, fallback_works, broken

    def __call__(self, arguments: Sequence[str]) -> object:
        self.commands.append(list(arguments))
        if self.broken:
            return self.result(1, self.broken)
        works = self.fallback_works if "--index-url" in arguments else self.has_cpu_build
        return (
            self.result(0, "")
            if works
            else self.result(1, "ERROR: No matching distribution found for torch==2.13.0+cpu")
        )


def test_the_configured_index_is_enough_where_it_has_the_cpu_build(install: ModuleType) -> None:
    pip = Index(install, has_cpu_build=True)
    assert install.install_torch(pip, "https://wheels.example") == "the configured index"
    assert pip.commands == [["install", "--no-deps", "torch==2.13.0+cpu"]]


def test_an_index_with_only_the_cuda_build_leads_to_the_named_one(install: ModuleType) -> None:
    pip = Index(install, has_cpu_build=False)
    assert install.install_torch(pip, "https://wheels.example") == "https://wheels.example"
    assert pip.commands[1] == ["install", "--no-deps", "--index-url", "https://wheels.example", "torch==2.13.0+cpu"]


def test_any_other_failure_is_raised_and_not_tried_elsewhere(install: ModuleType) -> None:
    pip = Index(install, has_cpu_build=False, broken="ERROR: [Errno 28] No space left on device")
    with pytest.raises(install.SetupFailed, match="No space left"):
        install.install_torch(pip, "https://wheels.example")
    assert len(pip.commands) == 1


def test_when_neither_has_it_the_message_names_the_variable(install: ModuleType) -> None:
    pip = Index(install, has_cpu_build=False, fallback_works=False)
    with pytest.raises(install.SetupFailed, match="HOTSHOE_TORCH_INDEX"):
        install.install_torch(pip, "https://wheels.example")


def test_a_changed_lock_makes_the_environment_anew(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "requirements").mkdir()
    for name in ("requirements/cpu.lock", "requirements/install.py", "pyproject.toml"):
        (tmp_path / name).write_text("one")
    before = install.wanted_stamp(tmp_path, "3.11")
    assert install.wanted_stamp(tmp_path, "3.11") == before
    (tmp_path / "requirements/cpu.lock").write_text("two")
    assert install.wanted_stamp(tmp_path, "3.11") != before


def test_every_locked_package_is_pinned_and_hashed() -> None:
    lines = [line for line in (ROOT / "requirements/cpu.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert all("==" in line and "--hash=sha256:" in line for line in lines)
    names = {line.partition("==")[0].lower() for line in lines}
    assert not names & {"torch", "torchvision", "torchaudio", "torchcodec"}
