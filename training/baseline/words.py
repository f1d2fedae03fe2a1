"""What a baseline says in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.baseline.verdict import CANNOT_TELL, NOT_WORTH_IT, WORTH_IT, Verdict, points


def before_training(
    best: Mapping[str, Any],
    tried: int,
    rivals: Sequence[Mapping[str, Any]],
    no_rivals: str | None,
    metric: str,
    margin: float,
) -> list[str]:
    """What is known before anything is trained."""
    estimate = best["figures"][metric]["estimate"]
    said = [
        f"The best of {tried} prompts ({best['name']}) reaches {estimate:.3f} {metric}. It was chosen on these rows, "
        "so on others it is likely to do a little worse."
    ]
    room = 1 - estimate
    if room <= margin:
        said.append(
            f"Prompting is enough as far as these rows tell: an adapter could gain {points(room)} points at most, and "
            f"the margin is {points(margin, signed=False)}."
        )
    said += [_rival_before(rival, best, margin) for rival in rivals]
    if no_rivals is not None:
        said.append(f"No simple model stands beside it: {no_rivals}.")
    return said


def _rival_before(rival: Mapping[str, Any], best: Mapping[str, Any], margin: float) -> str:
    figure, prompt = rival["figure"]["estimate"], best["figures"].get("accuracy", {}).get("estimate")
    of_what = "label accuracy" if rival["gives"] == "answer" else "label accuracy (it gives the label alone)"
    beside = f", the prompt {prompt:.3f}" if prompt is not None else ""
    said = f"{rival['title'][0].upper()}{rival['title'][1:]} reaches {figure:.3f} {of_what}{beside}"
    if 1 - figure <= margin and rival["gives"] == "answer":
        return (
            f"{said}: it is enough as far as these rows tell, for an adapter could gain {points(1 - figure)} at most."
        )
    if 1 - figure <= margin:
        return f"{said}: for the label it is enough as far as these rows tell."
    return f"{said}: an adapter has to beat that."


def after_training(
    judged: Verdict, name: str, prompt: str, rivals: Sequence[Mapping[str, Any]], readings: int, margin: float
) -> list[str]:
    """The verdict first, then what goes with it."""
    head = {
        WORTH_IT: f"{name} is worth it against the best prompt ({prompt}).",
        NOT_WORTH_IT: f"{name} is not worth it against the best prompt ({prompt}).",
        CANNOT_TELL: f"It cannot be told whether {name} is worth it against the best prompt ({prompt}).",
    }[judged.verdict]
    said = [f"{head} {judged.why}"]
    said += [_rival_after(rival, margin) for rival in rivals if rival["is_enough"] is not False]
    if readings > 1:
        said.append(
            f"These test rows have now been read {readings} times, for {judged.comparisons} "
            f"comparison{'s' if judged.comparisons > 1 else ''}; the interval's level is {judged.level:.1%} and p is "
            "corrected by Holm. Each further look makes them worse as test rows."
        )
    return said


def _rival_after(rival: Mapping[str, Any], margin: float) -> str:
    found = rival["difference"]
    figures = f"{points(found['estimate'])} points ({points(found['low'])} to {points(found['high'])})"
    for_what = "" if rival["gives"] == "answer" else " for the label"
    title = f"{rival['title'][0].upper()}{rival['title'][1:]}"
    if rival["is_enough"]:
        return (
            f"{title} is enough{for_what}: the adapter is better by {figures}, and the margin is "
            f"{points(margin, signed=False)}."
        )
    return f"{title} may be enough{for_what}: the adapter is better by {figures}, which cannot be told from the margin."


def drift(found: Mapping[str, Any]) -> str:
    """How the score moved from the form of training to the form of serving."""
    difference = found["difference"]
    return (
        f"Scored on the base as it was trained on ({found['trained_form']}): {found['trained']['estimate']:.3f}; as it "
        f"is served ({found['final_form']}): {found['final']['estimate']:.3f}, a drift of "
        f"{points(difference['estimate'])} points ({points(difference['low'])} to {points(difference['high'])}); "
        f"{found['changed_answers']:,} of {found['rows']:,} answers differ."
    )


def cost(found: Mapping[str, Any]) -> str:
    """What the two cost when they are served."""
    tokens = found["prompt_tokens"]
    said = f"The best prompt has {tokens['prompt']:,.0f} tokens, the adapter's {tokens['adapter']:,.0f} (means)"
    times = found.get("ttft_p50_seconds")
    if times is None:
        return f"{said}; {found['not_timed']}."
    return (
        f"{said}; the first token comes after {1000 * times['prompt']:,.0f} ms and {1000 * times['adapter']:,.0f} ms "
        f"(medians of {found['rows']} rows, one request at a time)."
    )
