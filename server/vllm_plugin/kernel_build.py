"""Compiling the LoRA kernel for the instructions that this machine has, into the cache, without a network.

`python -m server.vllm_plugin.kernel_build` is what `make setup` runs, so that the first start does not wait for it;
with `--all` every level is made, for an image that runs elsewhere. A library is named after source, flags and
compiler; one that is there is used also where the compiler is not.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from adapters.durable import sync
from adapters.embedded import cache_folder
from server.engine.vllm_flags import processor_flags

SOURCE = Path(__file__).with_name("lora_kernel.c")
SWITCH = "HOTSHOE_LORA_KERNEL"  # `c` or `torch`; unset: the kernel where it can be built, else torch's products
COMPILERS = ("cc", "gcc", "clang")  # the first that is there; CC wins
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Level:
    """A set of instructions: what the processor has to name among its flags, and what the compiler is told."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


LEVELS = (  # the best first
    Level(
        "avx512",
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"}),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    ),
    Level("avx2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c")),
    Level("generic", frozenset(), ()),
)


class KernelUnavailable(Exception):
    """There is no compiled kernel and none can be made here; the message says why and what would help."""


def best_level(flags: frozenset[str]) -> Level:
    """The widest level that a processor with these flags runs."""
    return next(level for level in LEVELS if level.needs <= flags)


def is_kernel_there() -> bool:
    """Whether an engine on this machine's CPU runs LoRA on the kernel: nobody asks for torch, and it can be had."""
    if os.environ.get(SWITCH) == "torch":
        return False
    return _can_be_had(best_level(processor_flags()), cache_folder() / "kernels", find_compiler())


@cache
def _can_be_had(level: Level, folder: Path, compiler: str | None) -> bool:
    """Asked several times at a start; a compiler that fails is tried once, and not each time."""
    try:
        built_kernel(level, folder)
    except (KernelUnavailable, OSError):
        return False
    return True


def built_kernel(level: Level, folder: Path | None = None) -> Path:
    """The library of this level in `folder` (`kernels` in the cache), compiled if it is absent; KernelUnavailable.

    Safe beside other processes that do the same and against a kill: a temporary sibling, one rename.
    """
    folder = folder or cache_folder() / "kernels"
    stem = f"lora-{level.name}-{_digest(SOURCE.read_bytes(), *FLAGS, *level.flags, platform.machine())}"
    compiler = find_compiler()
    if compiler is None:
        found = sorted(folder.glob(f"{stem}-*.so"))
        if found:
            return found[0]
        raise KernelUnavailable(f"no C compiler ({', '.join(COMPILERS)}, or CC) and no {stem}-*.so in {folder}")
    target = folder / f"{stem}-{_digest(_version(compiler))}.so"
    if not target.is_file():
        _compile(compiler, level, target)
    return target


def find_compiler() -> str | None:
    """The C compiler's path: `CC` where it is set, else the first of COMPILERS."""
    named = os.environ.get("CC")
    return next(filter(None, map(shutil.which, (named,) if named else COMPILERS)), None)


def _compile(compiler: str, level: Level, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as scratch:
            made = Path(scratch) / target.name
            command = [compiler, *FLAGS, *level.flags, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
            if done.returncode != 0:
                raise KernelUnavailable(f"{compiler} failed: {done.stderr.strip()[-500:]}")
            sync(made)
            made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{target} cannot be made: {error}") from error


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{compiler} does not run: {error}") from error
    return done.stdout


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str]) -> int:
    """Build for this processor, or with `--all` for every one, and print where it lies; 1 where that fails."""
    levels = LEVELS if "--all" in arguments else (best_level(processor_flags()),)
    try:
        for level in levels:
            print(f"LoRA kernel ({level.name}): {built_kernel(level)}")
    except KernelUnavailable as error:
        print(f"no LoRA kernel, so adapters on a CPU run on torch's products, which are slower: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
