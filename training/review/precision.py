"""Rules on number formats, quantisation and memory."""

from __future__ import annotations

from collections.abc import Iterator

from training.review.facts import lacks_bf16
from training.review.findings import Finding
from training.review.view import View

FITS_IN_16_BITS = 2e9  # parameters: 4 GB of weights
LONG, LARGE = 4_096, 3e9
SHORT_TOKENS, SMALL_BASE = 512, 1e9


def findings(view: View) -> Iterator[Finding]:
    yield from precision(view)
    yield from quantisation(view)
    yield from memory(view)


def precision(view: View) -> Iterator[Finding]:
    bf16, fp16, gpu = view.value("bf16"), view.value("fp16"), view.known.gpu
    if bf16 and fp16 and view.is_written("bf16") and view.is_written("fp16"):
        yield view.finding("precision_twice", "fp16")
    if fp16 and view.base.is_qwen is not False and not view.base.is_qwen3:
        yield view.finding("fp16_qwen", "fp16", "", view.base.name)
    if bf16 and gpu and lacks_bf16(gpu):
        yield view.finding("bf16_gpu", "bf16", "", gpu)
    if view.value("pure_bf16"):
        yield view.finding("bf16_pure", "pure_bf16")
    if gpu and lacks_bf16(gpu) and "flash" in str(view.value("attention", "")).replace("fa2", "flash"):
        yield view.finding("flash_gpu", "attention", "", gpu)


def quantisation(view: View) -> Iterator[Finding]:
    bits = view.value("bits")
    if not bits:
        return
    if view.is_full:
        yield view.finding("quant_full", "bits")
        return
    if bits == 8:
        yield view.finding("base_8bit", "bits")
    if bits == 4:
        if view.value("quant_type") not in (None, "nf4"):
            yield view.finding("quant_not_nf4", "quant_type")
        if view.value("double_quant") is False:
            yield view.finding("quant_single", "double_quant")
    if view.base.parameters and view.base.parameters <= FITS_IN_16_BITS:
        size = 2 * view.base.parameters / 1e9
        yield view.finding("quant_needless", "bits", "", f"{size:.1f} GB of weights in 16 bits")
    if view.value("devices"):
        yield view.finding("devices_qlora", "devices")


def memory(view: View) -> Iterator[Finding]:
    is_on, length, parameters = view.value("gradient_checkpointing"), view.value("max_length"), view.base.parameters
    data = view.known.data
    longest = min(length, data.longest) if data is not None and data.longest and length else length
    if is_on is False and longest and longest >= LONG and parameters and parameters >= LARGE:
        yield view.finding("checkpointing_off", "gradient_checkpointing", "", f"{longest:,} tokens on {view.base.name}")
    is_cpu = view.known.is_cpu or view.value("on_cpu")
    is_short = data is not None and data.longest and data.longest <= SHORT_TOKENS
    if is_on and parameters and (is_cpu or (parameters <= SMALL_BASE and is_short)):
        where = "on a CPU" if is_cpu else f"rows of at most {data.longest if data else 0} tokens"
        yield view.finding("checkpointing_needless", "gradient_checkpointing", "", where)
