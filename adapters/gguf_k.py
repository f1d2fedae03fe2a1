"""K-quants as they lie in a file, and whether they are what they should be.

A super-block of 256 elements has one step d in float16 (and one dmin in Q4_K and Q5_K); each of its sub-blocks has a
scale, and in those two a minimum, of 6 bits (8 in Q6_K):

    element = d * scale * q - dmin * minimum        q in 0..15 or 0..31, sub-blocks of 32
    element = d * scale * (q - 32)                  q in 0..63, sub-blocks of 16, scale signed

ggml's block_q4_K, block_q5_K and block_q6_K: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Which
scales are best is a search that llama.cpp makes (adapters/ggml.py). That its result is right needs no second search:
each element must be the nearest that its sub-block's scales can say, and those scales may cut off no more than their
own rounding explains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
K_BLOCK = 256
K_LIMITS = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}  # the largest q
F16_LOST = 2.0**-25  # of a step, where float16 has no more exponents


@dataclass(frozen=True)
class KBlocks:
    """Super-blocks as stored, all (blocks, 256): an element is `base` + `step` * q; `cut` is what may be cut off."""

    values: Floats
    step: Floats
    base: Floats
    cut: Floats


def decode_k(blocks: Bytes, kind: str) -> KBlocks:
    """(blocks, bytes) -> what they hold."""
    return _six_bits(blocks) if kind == "Q6_K" else _with_minimum(blocks, kind)


def _float16(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float64)


def _with_minimum(blocks: Bytes, kind: str) -> KBlocks:
    d, dmin, packed = _float16(blocks[:, 0:2]), _float16(blocks[:, 2:4]), blocks[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    nibbles = blocks[:, -128:].reshape(-1, 4, 1, 32)
    numbers = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(-1, 8, 32).astype(np.float64)
    if kind == "Q5_K":
        fifth = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1) & 1
        numbers += 16.0 * fifth
    step, base = ((d * scale)[:, :, None], (-dmin * minimum)[:, :, None])
    cut = 2 * np.abs(step) + (K_LIMITS[kind] * np.abs(d) + 2 * np.abs(dmin))[:, :, None]
    cut = cut + 64 * (K_LIMITS[kind] + 1) * F16_LOST
    return _flat(step * numbers + base, step, base, cut)


def _six_bits(blocks: Bytes) -> KBlocks:
    low, high = blocks[:, 0:128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    scale, d = blocks[:, 192:208].view(np.int8).astype(np.float64), _float16(blocks[:, 208:210])
    four = np.concatenate([low & 15, low >> 4], axis=2)  # (blocks, 2, 4, 32)
    two = high >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3
    numbers = (four | two << 4).reshape(-1, 16, 16).astype(np.float64)
    step = (d * scale)[:, :, None]
    cut = 2 * np.abs(step) + (32 * np.abs(d))[:, :, None] + 128 * 32 * F16_LOST
    return _flat(step * (numbers - 32), step, -32 * step, cut)


def _flat(values: Floats, *others: Floats) -> KBlocks:
    step, base, cut = (np.broadcast_to(one, values.shape).reshape(-1, K_BLOCK) for one in others)
    return KBlocks(values.reshape(-1, K_BLOCK), step, base, cut)


def hold_k(exact: Floats, lost: Floats, stored: KBlocks, kind: str) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Which elements of `exact` (blocks, 256) are stored as another number than the nearest, or cut off too far; and
    the nearest ones. `lost` is what the computation in float32 may have lost of each.
    """
    size, far_end = np.abs(stored.step), stored.base + K_LIMITS[kind] * stored.step
    kept = np.clip(exact, np.minimum(stored.base, far_end), np.maximum(stored.base, far_end))
    steps = np.divide(kept - stored.base, stored.step, out=np.zeros_like(kept), where=stored.step != 0)
    slack = lost + size * 2.0**-12 + (np.abs(exact) + np.abs(stored.base)) * 2.0**-22
    is_nearest = np.abs(stored.values - kept) <= size / 2 + slack
    is_within = np.abs(exact - kept) <= stored.cut + slack
    return ~(is_nearest & is_within), np.rint(steps) * stored.step + stored.base  # NaN is wrong, too
