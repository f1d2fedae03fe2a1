"""The trained adapter looked at as a server will: its files, its canonical form, its rank, and that both say the same.

The server re-encodes what it is sent. So the canonical files are made here, too, loaded beside the trained weights on
the same base, and their logits compared. What is not compared is the base's serving form: after QLoRA the base here is
in NF4, and a server holds it in 16 bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adapters.bases import BaseModel
from adapters.canonical import canonicalise
from adapters.check import VerdictKind, check
from adapters.errors import HotshoeError, Problem
from adapters.inspect import inspect_folder
from adapters.lora_config import MAX_RANK
from adapters.parity import compare_logits
from training.compare import evaluating
from training.config import SERVED_RANK

ADAPTER = "canonical"
PROBES, PROBE_TOKENS = 4, 64
LARGEST_DIFFERENCE = 1e-3  # of two logits, which are the same computation twice

Tokens = Sequence[int]


def check_served(model: Any, base: BaseModel, folder: Path, scratch: Path, probes: Sequence[Tokens]) -> dict[str, Any]:
    """What became of it, for the card: `passed`, why not, and how far the canonical adapter's logits are off."""
    if not hasattr(model, "peft_config"):
        return {"passed": True, "verdict": "base", "problems": [], "sentence": "A base of its own: it has no adapter."}
    inspection = inspect_folder(folder)
    found = check(inspection, base, max_rank=MAX_RANK, base_is_served=True)
    made: dict[str, Any] = {
        "passed": False,
        "verdict": str(found.verdict),
        "rank": found.rank,
        "rank_limit": SERVED_RANK,
        "problems": [problem.as_dict() for problem in found.reasons],
    }
    if found.verdict not in (VerdictKind.ACCEPT, VerdictKind.CONVERT):
        return {**made, "sentence": f"A server would not serve it: {_named(found.reasons)}."}
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        canonical = canonicalise(folder, inspection, found, scratch)
        parity = _parity(model, scratch, probes)
    except HotshoeError as error:
        return {**made, "sentence": f"A server would not serve it: {error}"}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    made |= {"digest": canonical.digest, "bytes": canonical.size_bytes, "parity": parity}
    if parity["max_abs"] > LARGEST_DIFFERENCE:
        why = f"its canonical form answers otherwise (logits off by {parity['max_abs']:.2g})"
        return {**made, "sentence": f"A server would not serve what was trained: {why}."}
    if found.rank > SERVED_RANK:
        why = (
            f"a server takes it once its max_rank is {found.rank} (HOTSHOE_MAX_RANK), which is {SERVED_RANK} by default"
        )
        return {**made, "passed": True, "sentence": f"Rank {found.rank}: {why}."}
    return {**made, "passed": True, "sentence": "A server takes it as it is."}


def _parity(model: Any, folder: Path, probes: Sequence[Tokens]) -> dict[str, Any]:
    """The trained adapter's logits against those of its canonical files, on the same base."""
    trained = _logits(model, probes)
    with torch.random.fork_rng():
        model.load_adapter(str(folder), adapter_name=ADAPTER)
    try:
        model.set_adapter(ADAPTER)
        again = _logits(model, probes)
    finally:
        model.set_adapter("default")
        model.delete_adapter(ADAPTER)
    return compare_logits(trained, again).as_dict()


@torch.inference_mode()
def _logits(model: Any, probes: Sequence[Tokens]) -> list[npt.NDArray[np.float32]]:
    """Of the last positions of each probe: (at most 16, vocabulary)."""
    found = []
    with evaluating(model):
        for probe in probes[:PROBES]:
            ids = torch.tensor([list(probe[-PROBE_TOKENS:])], device=model.device)
            found.append(model(input_ids=ids).logits[0, -16:].float().cpu().numpy())
    return found


def _named(reasons: Sequence[Problem]) -> str:
    return "; ".join(f"{reason.path} {reason.message}" for reason in reasons[:3]) or "it adapts no layer"
