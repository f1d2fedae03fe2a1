"""The direction of dependencies, and what may be imported where: held by reading every module's imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("adapters", "training", "server")
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "sklearn"}


def modules(package: str) -> Iterator[Path]:
    return (path for path in (ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path)}


def test_adapters_import_nothing_of_ours() -> None:
    wrong = {str(path): roots(path) & {"training", "server", "examples"} for path in modules("adapters")}
    assert not {path: names for path, names in wrong.items() if names}


def test_training_imports_only_adapters_of_ours() -> None:
    wrong = {str(path): roots(path) & {"server", "examples"} for path in modules("training")}
    assert not {path: names for path, names in wrong.items() if names}


REACHED = ("training.job", "training.kept", "training.scores", "training.card_page", "training.card_readme")  # light


def test_the_server_reaches_training_only_through_jobs_scores_a_cards_forms_and_the_command_line() -> None:
    for path in modules("server"):
        if "cli" in path.relative_to(ROOT).parts:
            continue
        reached = {name for name in imports_of(path) if name.partition(".")[0] == "training"}
        assert all(name.startswith(REACHED) for name in reached), (path, reached)


def test_vllm_is_imported_only_by_the_plugin_that_runs_inside_it() -> None:
    for package in OURS:
        for path in modules(package):
            if "vllm_plugin" not in path.parts:
                assert "vllm" not in roots(path), path


def test_no_module_uses_global_state() -> None:
    for package in OURS:
        for path in modules(package):
            assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(path.read_text()))), path


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        *("adapters", "adapters.errors", "adapters.bases", "server.settings", "server.cli.main"),
        *("training.config", "training.scores", "training.card_page", "training.card_readme"),
    ],
)
def test_importing_words_settings_and_the_command_loads_no_tensor_library(module: str) -> None:
    loaded = loaded_after(f"import {module}")
    assert not loaded & (HEAVY | {"vllm"}), loaded & (HEAVY | {"vllm"})


def test_import_adapters_is_ours() -> None:
    code = "import adapters; from pathlib import Path; sys.stderr.write(str(Path(adapters.__file__).resolve()))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stderr == str(ROOT / "adapters" / "__init__.py")
