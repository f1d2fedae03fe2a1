"""Make `.venv` from the locks and install the project into it: what `make setup` runs. Needs no package.

With `--packages` it stops at what runs, for an image: no tools, not the project, no base; so a change of the code
leaves that layer as it is.

Quick when nothing changed: a stamp in the environment holds the digest of everything the environment is made from. An
interrupted run leaves no stamp, so the next one goes on from where pip is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS, TOOLS = "requirements/cpu.lock", "requirements/tools.lock"
MADE_FROM = (RUNS, TOOLS, "pyproject.toml", "requirements/install.py")
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX_VARIABLE = "HOTSHOE_TORCH_INDEX"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
REQUIRED_PYTHON = (3, 11)
NO_MATCH = "No matching distribution found"


@dataclass(frozen=True)
class PipResult:
    exit_code: int
    output: str


Pip = Callable[[Sequence[str]], PipResult]


class SetupFailed(Exception):
    """Setup cannot go on; the message says what to do."""


def install_torch(pip: Pip, fallback_index: str) -> str:
    """Install torch's CPU build from the configured index, or from `fallback_index` where that has only the CUDA build.

    Answers which of the two it came from. Only pip's "no matching distribution" leads to the fallback: any other
    failure (no network, a full disk) would fail there too and is raised as it is.
    """
    first = pip(["install", "--no-deps", TORCH])
    if first.exit_code == 0:
        return "the configured index"
    if NO_MATCH not in first.output:
        raise SetupFailed(f"pip could not install {TORCH}:\n{first.output}")
    second = pip(["install", "--no-deps", "--index-url", fallback_index, TORCH])
    if second.exit_code != 0:
        raise SetupFailed(
            f"No {TORCH} in the configured index, nor in {fallback_index} "
            f"(set {TORCH_INDEX_VARIABLE} to an index that has PyTorch's CPU wheels):\n{second.output}"
        )
    return fallback_index


def wanted_stamp(root: Path, python: str) -> str:
    """Digest of all that the environment is made from."""
    digest = hashlib.sha256(python.encode())
    for name in MADE_FROM:
        digest.update((root / name).read_bytes())
    return digest.hexdigest() + "\n" + str(root) + "\n"


def run_pip(python: Path) -> Pip:
    """A pip that runs in the environment of `python`, with its messages passed on and kept."""

    def pip(arguments: Sequence[str]) -> PipResult:
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return PipResult(done.returncode, done.stdout)

    return pip


def must(result: PipResult, what: str) -> None:
    if result.exit_code != 0:
        raise SetupFailed(f"{what} failed:\n{result.output}")


def make_environment(root: Path, environment: Path) -> None:
    """Create the environment, fill it from the locks, then install the project, editable and without dependencies."""
    pip = install_packages(root, environment)
    install_lock(pip, root / TOOLS)
    must(pip(["install", "--no-deps", "--no-build-isolation", "--editable", str(root)]), "Installing hotshoe itself")


def install_packages(root: Path, environment: Path) -> Pip:
    """Create the environment and fill it with what runs; answers its pip."""
    python = environment / "bin" / "python"
    if not python.exists():
        say("making .venv")
        venv.create(environment, with_pip=True)
    pip = run_pip(python)
    say(f"installing {TORCH}")
    source = install_torch(pip, os.environ.get(TORCH_INDEX_VARIABLE, TORCH_INDEX))
    say(f"{TORCH} came from {source}; installing the locked packages (about two minutes)")
    install_lock(pip, root / RUNS)
    return pip


def build_kernel(python: Path) -> None:
    """Compile the LoRA kernel into the cache; where that fails, adapters on a CPU are slower, and nothing else."""
    done = subprocess.run(
        [str(python), "-m", "server.vllm_plugin.kernel_build"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode != 0:
        say((done.stdout or done.stderr).strip()[-500:])


def install_lock(pip: Pip, lock: Path) -> None:
    must(pip(["install", "--no-deps", "--require-hashes", "-r", str(lock)]), f"Installing {lock}")


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Bring `.venv` and the embedded base up to date; with `--packages` the packages only."""
    if sys.version_info[:2] != REQUIRED_PYTHON or sysconfig.get_platform() != "linux-x86_64":
        say(
            f"this is Python {sys.version.split()[0]} on {sysconfig.get_platform()}; the lock is for Python 3.11 on "
            "linux-x86_64. Run `make PYTHON=/path/to/python3.11 setup`."
        )
        return 1
    environment = ROOT / ".venv"
    stamp = environment / ".hotshoe-setup"
    try:
        if "--packages" in arguments:
            install_packages(ROOT, environment)
            return 0
        wanted = wanted_stamp(ROOT, sys.version)
        if not stamp.is_file() or stamp.read_text() != wanted:
            make_environment(ROOT, environment)
            stamp.write_text(wanted)
        build_kernel(environment / "bin" / "python")
        return subprocess.run(
            [str(environment / "bin" / "hotshoe"), "base", "prepare", "--quiet"], check=False
        ).returncode
    except SetupFailed as failure:
        say(str(failure))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
