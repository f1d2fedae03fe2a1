"""The recommended settings of one candidate, each with its value and its reason in one line."""

from __future__ import annotations

from typing import Any

from training.gate.amount import percentile
from training.planner.candidates import Candidate
from training.planner.workload import Workload

Line = dict[str, Any]


def advice(chosen: Candidate, work: Workload, max_rank: int) -> list[Line]:
    """Every setting that a person would otherwise guess."""
    settings = chosen.settings
    lines = [
        _line("method", settings.method, _method(chosen)),
        _line("precision", settings.dtype, _precision(chosen)),
    ]
    if settings.method != "full":
        lines += [
            _line("rank", settings.rank, _rank(chosen, work, max_rank)),
            _line("alpha", settings.alpha, "twice the rank: the update's scale stays the same when the rank changes"),
            _line(
                "target_modules",
                list(settings.target_modules),
                "all seven projections: attention alone learns less at equal size (LoRA Without Regret); the engine "
                "refuses embeddings and lm_head",
            ),
        ]
    lines += [
        _line("learning_rate", settings.learning_rate, _rate(chosen)),
        _line("batch", f"{settings.pass_size} x {settings.accumulation}", _batch(chosen)),
        _line("epochs", settings.epochs, f"{settings.steps} steps in all; early stopping ends a run that has learned"),
        _line("max_length", work.lengths[-1], _length(chosen, work)),
        _line("gradient_checkpointing", settings.gradient_checkpointing, _checkpointing(chosen)),
        _line("attention", "sdpa", _attention(chosen)),
        _line(
            "packing", True, "rows lie end to end without padding and attention sees each row alone, so nothing leaks"
        ),
        _line("optimizer", settings.optimizer, _optimizer(chosen)),
    ]
    return lines


def _line(setting: str, value: Any, reason: str) -> Line:
    return {"setting": setting, "value": value, "reason": reason}


def _method(chosen: Candidate) -> str:
    if chosen.settings.method == "qlora":
        return "the base in 16 or 32 bits leaves too little of the memory; NF4 takes 4.13 bits a weight and more time"
    if chosen.settings.method == "lora":
        return "the base fits without quantising, which is faster and trains on the weights that are served"
    return "every weight is trained and the result is a base of its own, which no adapter slot serves"


def _precision(chosen: Candidate) -> str:
    settings, target = chosen.settings, chosen.target
    if settings.method == "full":
        return "weights and gradients in float32, because small updates vanish in 16 bits"
    if settings.dtype == "bfloat16":
        return "the machine computes in bfloat16, which has float32's range; the adapter stays in float32"
    if settings.dtype == "float16":
        return (
            f"{target.name} has no bfloat16 and float32 does not fit; float16 overflows to NaN on some Qwen2 models "
            "(QwenLM/Qwen3 issues 670 and 868): the run stops at the first NaN"
        )
    if not target.has_bfloat16:
        return f"{target.name} has no bfloat16, and float16 training of Qwen2 turns to NaN (QwenLM/Qwen3 issue 670)"
    return "the base's own number format"


def _rank(chosen: Candidate, work: Workload, max_rank: int) -> str:
    rows = len(work.rows)
    said = f"16 up to 20,000 rows, 32 above: here are {rows:,}"
    if chosen.settings.rank == max_rank:
        return f"{said}; the server serves {max_rank} at most (max_rank)"
    return f"{said}; below the server's largest, {max_rank}"


def _rate(chosen: Candidate) -> str:
    if chosen.settings.method == "full":
        return "a tenth of LoRA's (LoRA Without Regret)"
    if chosen.settings.learning_rate >= 1e-3:
        return "small bases take 1e-3; measured for the embedded one"
    return "LoRA's usual rate, about ten times that of full fine-tuning (LoRA Without Regret; TRL's default)"


def _batch(chosen: Candidate) -> str:
    settings = chosen.settings
    rows = settings.pass_size * settings.accumulation
    why = "16, or 8 or 4 where 16 would give fewer than 100 steps" if rows <= 16 else "as asked"
    split = "at once" if settings.accumulation == 1 else f"in {settings.accumulation} passes, which fit"
    return f"{rows} rows a step {split}: {why}; LoRA takes large batches less well"


def _length(chosen: Candidate, work: Workload) -> str:
    p99 = percentile(work.lengths, 99)
    if work.lengths[-1] > 1.5 * p99:
        return f"the longest row; p99 is {p99:,} tokens, so --max-length {p99} with --over-long drop saves memory"
    return f"the longest row; p99 is {p99:,} tokens, and nothing is cut"


def _checkpointing(chosen: Candidate) -> str:
    if chosen.settings.gradient_checkpointing:
        return "without it the activations do not fit; it computes every layer's forward pass twice"
    return "the activations fit, and recomputing them takes about a third more time"


def _attention(chosen: Candidate) -> str:
    if chosen.target.device == "cpu":
        return "torch's own fused attention on the CPU; flash-attention is for GPUs"
    if chosen.target.has_flash_attention:
        return "torch's SDPA takes its flash kernel on this GPU where no prefix is shared, and needs no package"
    return f"torch's SDPA; FlashAttention-2 needs compute capability 8.0, which {chosen.target.name} has not"


def _optimizer(chosen: Candidate) -> str:
    if chosen.settings.optimizer == "adamw_torch":
        return "AdamW with both moments in float32; the 8-bit one runs on GPUs only"
    return "AdamW with its moments in 8 bits, moved out of the GPU's memory when that is short (arXiv 2110.02861)"
