"""A Hugging Face model card from our card: `README.md` with its metadata as YAML, and the card's figures as text.

The metadata are those that the Hub reads: https://huggingface.co/docs/hub/model-cards#model-card-metadata. The card may
be anybody's claim, so every value is bounded and escaped, in YAML and in Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from training.card_page import number, part, text

SCORES = (
    ("exact_match", "exact_match", "Exact match"),
    ("label_accuracy", "accuracy", "Label accuracy"),
    ("field_f1", "f1", "F1 of the other fields"),
)
PLAIN = re.compile(r"[\w./@-]{1,200}")  # names and folders that may stand in code
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&-])")


def readme(card: Mapping[str, Any], base_name: str | None = None) -> str:
    """The whole file; `base_name` is what the Hub calls the base, where that is known."""
    name = text(card.get("name") or "adapter")
    body = [f"# {escaped(name)}", "", *_summary(card), "", *_scores_table(card), *_usage(card, base_name), *_made(card)]
    return "\n".join(["---", *_front_matter(card, name, base_name), "---", "", *body]).rstrip() + "\n"


def escaped(value: str) -> str:
    """As plain text on one line of Markdown."""
    return SPECIAL.sub(r"\\\1", " ".join(value.split()))


def quoted(value: Any) -> str:
    """A YAML scalar that is this text, whatever is in it: JSON strings are YAML."""
    return json.dumps(text(value), ensure_ascii=True)


def _front_matter(card: Mapping[str, Any], name: str, base_name: str | None) -> Iterator[str]:
    is_adapter = part(card, "settings").get("method") != "full"
    yield f"base_model: {quoted(base_name or part(card, 'base').get('id'))}"
    if is_adapter:
        yield "base_model_relation: adapter"
    yield f"library_name: {'peft' if is_adapter else 'transformers'}"
    yield "pipeline_tag: text-generation"
    tags = [*(["lora"] if is_adapter else []), "hotshoe", *_task_tags(card)]
    yield "tags:"
    yield from (f"- {quoted(tag)}" for tag in tags)
    yield from _model_index(card, name)


def _task_tags(card: Mapping[str, Any]) -> list[str]:
    task = part(card, "goal").get("task")
    return [text(task).replace(" ", "-")] if task else []


def _model_index(card: Mapping[str, Any], name: str) -> Iterator[str]:
    metrics = list(_metrics(card))
    if not metrics:
        return
    validation = part(card, "data", "validation")
    yield "metrics:"
    yield from (f"- {kind}" for kind, _, _ in metrics)
    yield "model-index:"
    yield f"- name: {quoted(name)}"
    yield "  results:"
    yield "  - task:"
    yield "      type: text-generation"
    yield "    dataset:"
    yield f"      name: {quoted(validation.get('file') or 'validation rows')}"
    yield f"      type: {quoted('private')}"
    yield "      split: validation"
    yield "    metrics:"
    for kind, label, value in metrics:
        yield f"    - type: {kind}"
        yield f"      value: {value:.6g}"
        yield f"      name: {quoted(label)}"


def _metrics(card: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(the Hub's name of the metric, ours, the adapter's value)."""
    loss = number(part(card, "evaluation", "loss").get("adapter"))
    if loss is not None:
        yield "loss", "Validation loss", loss
    answers = part(card, "evaluation", "answers", "adapter")
    for key, kind, label in SCORES:
        value = number(answers.get(key))
        if value is not None:
            yield kind, label, value


def _summary(card: Mapping[str, Any]) -> Iterator[str]:
    settings, base = part(card, "settings"), part(card, "base")
    method = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}.get(str(settings.get("method")), "training")
    yield f"Made by {method} of {escaped(text(base.get('id')))} on {escaped(_rows_said(card))}."
    for path in (("verdict", "sentence"), ("check", "sentence"), ("evaluation", "verdict")):
        said = part(card, *path[:-1]).get(path[-1])
        if said:
            yield f"- {escaped(text(said))}"
    advice = part(card, "verdict").get("advice")
    yield from (f"- {escaped(text(line))}" for line in (advice if isinstance(advice, list) else [])[:8])


def _rows_said(card: Mapping[str, Any]) -> str:
    rows = number(part(card, "data", "training").get("rows"))
    return f"{rows:,.0f} rows" if rows is not None else "rows that the card does not count"


def _scores_table(card: Mapping[str, Any]) -> Iterator[str]:
    loss, answers = part(card, "evaluation", "loss"), part(card, "evaluation", "answers")
    rows = [("Validation loss", loss.get("base"), loss.get("adapter"))]
    rows += [(label, part(answers, "base").get(key), part(answers, "adapter").get(key)) for key, _, label in SCORES]
    known = [(label, number(one), number(two)) for label, one, two in rows]
    known = [row for row in known if row[2] is not None]
    if known:
        yield from ("## Base against adapter", "", "| | base | adapter |", "|---|---|---|")
        yield from (f"| {label} | {_figure(one)} | {_figure(two)} |" for label, one, two in known)
        yield ""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _usage(card: Mapping[str, Any], base_name: str | None) -> Iterator[str]:
    if part(card, "settings").get("method") == "full":
        return
    named = base_name or text(part(card, "base").get("id"))
    base = json.dumps(named if PLAIN.fullmatch(named) else "BASE")
    yield from ("## Use", "", "```python", "from peft import PeftModel")
    yield from ("from transformers import AutoModelForCausalLM", "")
    yield from (f"base = AutoModelForCausalLM.from_pretrained({base})", 'model = PeftModel.from_pretrained(base, ".")')
    yield from ("```", "")


def _made(card: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## How it was made", "", "| | |", "|---|---|")
    shown = ("method", "epochs", "learning_rate", "batch_size", "steps", "rank", "alpha", "dtype", "seed")
    settings = part(card, "settings")
    yield from (f"| {key.replace('_', ' ')} | {escaped(text(settings[key]))} |" for key in shown if key in settings)
    lineage = {**part(card, "lineage"), **{f"library {k}": v for k, v in part(card, "versions").items()}}
    yield from (f"| {escaped(text(key))} | {escaped(text(value))} |" for key, value in list(lineage.items())[:40])
