"""What the usual trainer would hold for the same rows: padded to the longest, with float32 logits of every position.

transformers' causal loss makes logits in the model's format and again in float32, and cross entropy saves their
log-softmax; backward makes their gradient: about four float32 copies of tokens x vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from training.planner.operators import FLOAT32_BYTES
from training.planner.peak import Peak, peak
from training.planner.sizes import Architecture
from training.planner.work import Method, Pass

FLOAT32_COPIES = 3  # the logits, their log-softmax, and a gradient


def padded(work: Pass) -> Pass:
    """The same rows in a rectangle, every position's logits computed."""
    length = work.prefix + work.longest_rest
    return Pass(work.rows, 0, length, work.rows * length, work.supervised)


def usual_peak(of: Architecture, method: Method, work: Pass, optimizer: str, accumulation: int = 1) -> Peak:
    """The peak with a logits matrix for all positions, whole."""
    rectangle = padded(work)
    found = peak(of, method, rectangle, optimizer, accumulation)
    return replace(found, logits=logits_bytes(of, method, rectangle.tokens))


def logits_bytes(of: Architecture, method: Method, tokens: int) -> int:
    """Of all copies that are alive at once."""
    own = method.itemsize if method.itemsize != FLOAT32_BYTES else 0
    return tokens * of.vocabulary * (FLOAT32_COPIES * FLOAT32_BYTES + own)
