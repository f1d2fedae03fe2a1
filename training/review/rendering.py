"""Rules on how rows become tokens and labels: length, packing, what is learned, template and special tokens."""

from __future__ import annotations

from collections.abc import Iterator

from training.review.findings import Finding
from training.review.view import View

OF_QWEN = ("qwen", "qwen_25", "qwen2", "qwen3", "qwen3_nothink", "chatml", "chatml_de", "base", "jinja")
THINKING_TEMPLATES = ("qwen3",)
END, PADDING = "<|im_end|>", "<|endoftext|>"
PADDED_SHARE = 0.5


def findings(view: View) -> Iterator[Finding]:
    yield from length(view)
    yield from packing(view)
    yield from learned(view)
    yield from template(view)
    yield from special_tokens(view)


def length(view: View) -> Iterator[Finding]:
    most, data = view.value("max_length"), view.known.data
    if most is None:
        return
    if (context := view.base.context_length_tokens) and most > context:
        yield view.finding("length_above_context", "max_length", f"{context}", f"the base has {context:,}")
    if data is None or not data.tokens:
        if not view.is_written("max_length") and view.value("over_long") != "error":
            yield view.finding("length_default", "max_length")
        return
    above, way = data.above(most), view.value("over_long")
    counted = f"{above:,} of {data.rows:,} rows are longer, counted with {data.counted_with}"
    if above and way in ("cut", "drop"):
        yield view.finding("rows_cut" if way == "cut" else "rows_dropped", "max_length", f"{data.longest}", counted)
    mean = data.total_tokens / data.rows
    if view.value("pads_to_length") and not view.value("packing") and mean < PADDED_SHARE * most:
        detail = f"rows have {mean:.0f} tokens of {most:,}"
        yield view.finding("padding_to_length", "pads_to_length", f"{data.longest} at most", detail)


def packing(view: View) -> Iterator[Finding]:
    if not view.value("packing"):
        return
    if not view.value("packing_isolates"):
        yield view.finding("packing_leaks", "packing")
    if view.value("packing_wraps"):
        yield view.finding("packing_cuts", "packing_wraps")


def learned(view: View) -> Iterator[Finding]:
    if view.value("trains_prompt"):
        is_default = not view.is_written("trains_prompt")
        detail = "unless the rows are prompt and completion" if is_default else ""
        yield view.finding("prompt_trained", "trains_prompt", "", detail)
    if view.value("trains_end") is False:
        yield view.finding("end_unlearned", "trains_end")


def template(view: View) -> Iterator[Finding]:
    named = view.value("template")
    is_qwen = view.base.is_qwen is not False
    if named and is_qwen and not named.lower().startswith(OF_QWEN) and "/" not in named:
        yield view.finding("template_foreign", "template", _template_of(view))
    data = view.known.data
    reasons = data.has_reasoning if data is not None else None
    thinks = named in THINKING_TEMPLATES and view.reading.dialect == "llama-factory"
    if thinks and view.value("thinking") and not reasons:
        detail = "the rows have no reasoning" if reasons is False else "unless every row has reasoning"
        yield view.finding("empty_thought_trained", "thinking", "", detail)
    if "thinking" in view.base.name and reasons is not True:
        detail = "the rows have no reasoning" if reasons is False else "unless every row has reasoning"
        yield view.finding("thinking_base", "base", "", detail)


def special_tokens(view: View) -> Iterator[Finding]:
    if view.base.is_qwen is False:
        return
    pad, end = view.value("pad_token"), view.value("eos_token")
    if pad is not None and pad == (end or END):
        yield view.finding("pad_is_end", "pad_token", PADDING)
    if end is not None and end != END:
        yield view.finding("end_not_chatml", "eos_token", END)


def _template_of(view: View) -> str:
    if view.reading.dialect != "llama-factory":
        return "tokenizer_default" if view.reading.dialect == "axolotl" else "the base's own template"
    if view.base.is_qwen3:
        return "qwen3" if view.base.toggles_thinking else "qwen3_nothink"
    return "qwen"
