"""Before training: every prompt and every simple model on the validation rows, and the best prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from training.baseline import words
from training.baseline.asking import Asker
from training.baseline.ground import Ground
from training.baseline.ledger import now
from training.baseline.models import base_of, served_base
from training.baseline.prompts import Recipe, Written
from training.baseline.report import FORMAT, KIND
from training.baseline.rivals import TITLES, Rival, simple_rivals, why_none
from training.baseline.verdict import mean_of
from training.evaluation.figures import figure
from training.quiet import Progress, unwatched
from training.reference import Reference

LABEL_METRIC = "accuracy"
Say = Callable[[str], None]
Report = dict[str, Any]


def measure(
    ground: Ground, say: Say, progress: Progress, kept: Report | None, save: Callable[[Report], None]
) -> Report:
    """The report before training, saved after each prompt; the `kept` one of a measurement cut off is gone on from."""
    asker, reference = base_of(ground, served_base(ground))
    report = _begun(ground, asker, kept)
    kitchen = ground.kitchen()
    known = {one["name"] for one in report["prompts"]}
    for recipe in kitchen.recipes(ground.asked.examples, ground.asked.prompts):
        if recipe.name not in known:
            say(f"{len(ground.sets.validation.examples):,} validation rows, {recipe.name}")
            written = kitchen.write(recipe, ground.sets.validation, ground.tokens, ground.most_prompt_tokens())
            report["prompts"].append(_tried(ground, recipe, written, asker, progress))
            save(report)
    return _finished(ground, report, [_rival(ground, one) for one in rivals_of(ground, reference, say, progress)])


def rivals_of(ground: Ground, reference: Reference | None, say: Say, progress: Progress = unwatched) -> list[Rival]:
    """The simple models, fitted on training rows."""
    fitted = simple_rivals(ground.sets, ground.task)
    if reference is not None and ground.wants_probe:
        from training.baseline.probe import probe

        say("the linear probe on the frozen base")
        found = probe(reference, ground.sets, ground.task, ground.asked.seed, progress)
        fitted += [found] if found is not None else []
    return fitted


def about(ground: Ground, rival: Rival) -> dict[str, Any]:
    """What a rival is, and whether what it gives is the whole answer or its label alone."""
    is_all = ground.task.kind == "labels" or "field_f1" not in ground.task.metrics
    return {
        "name": rival.name,
        "title": TITLES[rival.name],
        "gives": "answer" if is_all else "label",
        "metric": LABEL_METRIC,
        "detail": rival.detail,
    }


def _begun(ground: Ground, asker: Asker, kept: Report | None) -> Report:
    """A report without prompts, or with those of the unfinished one that was kept, where it measures the same."""
    begun: Report = {
        "format": FORMAT,
        "kind": KIND,
        "made_at": now(),
        "is_finished": False,
        **ground.facts(),
        "form": asker.form,
        "settings": _settings(ground),
        "prompts": [],
        "best": None,
        "rivals": [],
        "no_rivals": None,
        "said": [],
        "verdict": None,
    }
    same = ("base", "data", "task", "form", "settings")
    if kept is not None and not kept["is_finished"] and all(kept.get(key) == begun[key] for key in same):
        begun["prompts"] = list(kept["prompts"])
    return begun


def _finished(ground: Ground, report: Report, rivals: list[dict[str, Any]]) -> Report:
    """The best prompt comes first."""
    metric = ground.metric
    tried = sorted(report["prompts"], key=_order)
    best, no_rivals = tried[0], why_none(ground.sets, ground.task)
    return {
        **report,
        "is_finished": True,
        "prompts": tried,
        "best": {"name": best["name"], "recipe": best["recipe"], "messages": best["messages"]},
        "rivals": rivals,
        "no_rivals": no_rivals,
        "said": words.before_training(best, len(tried), rivals, no_rivals, metric, ground.asked.margin),
    }


def _order(tried: Mapping[str, Any]) -> tuple[float, ...]:
    """By the deciding score, then by the others in their order, then the shortest."""
    return (*(-one["estimate"] for one in tried["figures"].values()), tried["prompt_tokens"]["mean"])


def _tried(ground: Ground, recipe: Recipe, written: Written, asker: Asker, progress: Progress) -> dict[str, Any]:
    begun = time.monotonic()
    replies = asker.answers(written.prompts, ground.max_tokens(), progress)
    seconds = time.monotonic() - begun
    scored = ground.scored(ground.sets.validation, replies.texts)
    return {
        "name": recipe.name,
        "recipe": recipe.as_dict(),
        "figures": ground.figures(ground.sets.validation, scored),
        "prompt_tokens": {"mean": round(mean_of(written.tokens), 1), "most": max(written.tokens)},
        "rows_with_fewer_examples": written.left_out,
        "seconds": round(seconds, 1),
        "ttft_p50_seconds": replies.ttft_p50_seconds,
        "messages": [dict(message) for message in written.prompts[0].messages],
    }


def _rival(ground: Ground, rival: Rival) -> dict[str, Any]:
    validation = ground.sets.validation
    scored = ground.scored(validation, rival.answers(validation), (LABEL_METRIC,))
    found = figure(scored.primary, ground.grouping(validation, scored))
    return {**about(ground, rival), "figure": found, "is_enough": _is_enough_alone(found, ground.asked.margin)}


def _is_enough_alone(found: dict[str, Any], margin: float) -> bool | None:
    """Whether nothing can be better by the margin; None where these rows do not tell."""
    if found["estimate"] is None or 1 - found["high"] > margin:
        return False
    return True if 1 - found["low"] <= margin and found["is_telling"] else None


def _settings(ground: Ground) -> dict[str, Any]:
    asked = ground.asked
    return {
        "margin": asked.margin,
        "seed": asked.seed,
        "examples": list(asked.examples),
        "rows": asked.rows,
        "by": asked.by,
        "max_tokens": ground.max_tokens(),
        "max_prompt_tokens": ground.most_prompt_tokens(),
    }
