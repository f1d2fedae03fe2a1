"""Rules on the base, on validation and on what is kept of a run."""

from __future__ import annotations

from collections.abc import Iterator

from training.review.facts import ACTIVE
from training.review.findings import Finding
from training.review.view import View

FOREIGN = ("-vl", "vl-", "omni", "audio", "-moe", "qwen3.", "qwen3-next", "coder-next", "qwen1.5", "qwen-", "qwen3_5")
QUANTISED = ("awq", "gptq", "bnb-4bit", "int4", "int8", "fp8", "gguf", "nvfp4", "mlx")
RESTRICTED = ("qwen2.5-3b", "qwen2.5-72b", "qwen2.5-coder-3b", "qwen2-72b")
INSTRUCTED = ("instruct", "chat", "thinking", "it")


def findings(view: View) -> Iterator[Finding]:
    yield from base(view)
    yield from validation(view)
    yield from kept(view)
    yield from other(view)


def base(view: View) -> Iterator[Finding]:
    name = view.base.name
    is_foreign = any(mark in name for mark in FOREIGN) or ACTIVE.search(name) is not None
    if view.base.is_qwen is False or (name and is_foreign):
        what = view.base.architecture or name
        yield view.finding("base_unsupported", "base", "", what)
    elif is_unfinished(name):
        yield view.finding("base_no_stop", "base")
    if name.startswith(RESTRICTED):
        yield view.finding("base_licence", "base")
    if any(mark in name for mark in QUANTISED):
        yield view.finding("base_quantised", "base")
    if view.value("trust_remote_code"):
        yield view.finding("remote_code", "trust_remote_code")


def is_unfinished(name: str) -> bool:
    """A checkpoint before instruction tuning, by the names that Qwen gives: Qwen3's say so, Qwen2.5's others do."""
    if name.startswith("qwen3"):
        return name.endswith("-base")
    return name.startswith("qwen2") and not any(word in name.split("-") for word in INSTRUCTED)


def validation(view: View) -> Iterator[Finding]:
    held, evaluates = view.value("validation"), view.value("evaluates")
    ours = view.reading.dialect == "hotshoe"
    if (view.reading.dialect == "peft" or "epochs" not in view.reading.values) and not ours:
        return
    if ours:
        if held == 0:
            yield view.finding("validation_none", "validation")
        return
    if not held:
        yield view.finding("validation_none", "validation" if "validation" in view.reading.values else "evaluates")
    elif evaluates is False or (evaluates is None and view.reading.dialect == "llama-factory"):
        yield view.finding("validation_unused", "evaluates" if evaluates is False else "validation")
    elif not view.value("keeps_best"):
        yield view.finding("best_unkept", "keeps_best" if view.is_written("keeps_best") else "evaluates")
    elif view.value("best_by") in ("loss", "eval_loss"):
        yield view.finding("best_by_loss", "best_by")


def kept(view: View) -> Iterator[Finding]:
    steps, every = view.steps, view.value("save_steps")
    if view.value("saves") is False and view.is_written("saves"):
        yield view.finding("saves_none", "saves")
    elif every is not None and every >= 1 and steps is not None and every > steps and view.reading.dialect != "axolotl":
        yield view.finding("saves_none", "save_steps", f"{max(1, steps // 10)}", f"every {every:g} of {steps:,} steps")
    if "epochs" in view.reading.values and not view.is_written("seed") and view.reading.dialect != "peft":
        yield view.finding("seed_open", "seed")
    if view.value("reports") == ("none",):
        yield view.finding("curves_nowhere", "reports")


def other(view: View) -> Iterator[Finding]:
    if view.value("checks_data") is False:
        yield view.finding("data_unchecked", "checks_data")
    if view.value("neftune"):
        yield view.finding("neftune", "neftune")
    if view.value("stage") not in (None, "sft"):
        yield view.finding("stage_other", "stage")
