"""Leave with 1 when a package that a requirements file names is not installed: a step of the GPU image's build.

Versions are the image's: vLLM's own bounds hold there, and gpu.lock pins the rest.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(requirements: str) -> list[str]:
    """Names of the packages in the text of a requirements file that are not installed."""
    names = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)", requirements, re.MULTILINE)
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    lacking = missing(Path(sys.argv[1]).read_text())
    if lacking:
        sys.exit(f"not installed, though {sys.argv[1]} names it: {', '.join(lacking)}")
