"""The card of a run, `card.json` beside the adapter: on what, how, and with what result it was trained."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

CARD_FILE = "card.json"
CARD_FORMAT = 1
LIBRARIES = ("hotshoe", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """The versions of Python and of every library that has a part in the result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_bytes(device: str) -> int:
    """The most memory that the run held: torch's allocator on a GPU, the process's resident set on a CPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def threads() -> int:
    """How many CPU threads torch computed with."""
    import torch

    return torch.get_num_threads()


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write the card; it is plain JSON that says nothing which JSON cannot (no NaN)."""
    text = json.dumps({"format": CARD_FORMAT, **card}, ensure_ascii=False, indent=2, allow_nan=False)
    (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")
