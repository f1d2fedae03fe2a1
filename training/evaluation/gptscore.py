"""GPTScore (Fu et al., arXiv 2302.04166): how likely a language model finds an answer, once told what is wanted.

    GPTScore(h | d, a, S) = 1/m sum_t log p(h_t | h_<t, T(d, a, S))

h is the answer of m tokens, d the task, a the aspect, S the source; T puts the three into the evaluator's prompt. In
nats a token, at most 0. The evaluator judges by its own taste: one that is the base of the judged adapter favours what
the base would have said, and a small one is a weak judge. Both are said in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.errors import BaseInvalid, ConfigInvalid
from training.data.jsontext import RowInvalid
from training.data.template import ChatTemplate
from training.evaluate import Prompt
from training.metrics.measure import Measure
from training.scores import spoken

if TYPE_CHECKING:
    from training.evaluation.likelihood import Given

TASK = "Answer the message below."
ASPECTS = {
    "correct": "The answer must be correct: what it says is true and follows from the message.",
    "relevant": "The answer must be relevant: it answers what the message asks, and nothing else.",
    "fluent": "The answer must be fluent: well written and grammatical.",
    "informative": "The answer must be informative: it says all that the asker needs.",
}
BATCH = 8


def gptscore(
    model: Any, template: ChatTemplate, prompts: Sequence[Prompt], answers: Sequence[str], aspect: str = "correct"
) -> Measure:
    """Mean log-probability of each answer under the evaluator; NaN for an empty one, or one beyond its context."""
    from training.evaluation.likelihood import logprobs

    check_aspect(aspect)
    longest = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
    rows = [_given(template, prompt, spoken(answer), aspect) for prompt, answer in zip(prompts, answers, strict=True)]
    usable = [at for at, row in enumerate(rows) if row.start < len(row.ids) <= longest]
    scores = np.full(len(rows), np.nan)
    found = logprobs(model, [rows[at] for at in usable], template.pad, BATCH)
    scores[usable] = [values.mean() for values in found]
    scores[~np.isfinite(scores)] = np.nan
    return Measure("gptscore", scores, signature=f"aspect {aspect}, mean log p a token", bounds=None)


def check_aspect(aspect: str) -> None:
    """Raises ConfigInvalid for an aspect that there is not."""
    if aspect not in ASPECTS:
        raise ConfigInvalid(f"There is no aspect {aspect[:80]!r}; there are {', '.join(ASPECTS)}.", param="aspect")


def _given(template: ChatTemplate, prompt: Prompt, answer: str, aspect: str) -> Given:
    """T(d, a, S) as one user's message, so that the evaluator's own template holds, and the answer behind it."""
    from training.evaluation.likelihood import Given

    said = [f"{message['role']}: {message['content']}" for message in prompt.messages if message.get("content")]
    source = said[0].partition(": ")[2] if len(said) == 1 else "\n".join(said)
    asked = f"{TASK} {ASPECTS[aspect]}\n\n{source}"
    try:
        before = template.prompt_ids([{"role": "user", "content": asked}], thinking=False)
    except RowInvalid as error:
        raise BaseInvalid(f"The evaluator's chat template cannot render a prompt: {error.message}") from error
    after = template.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Given([*before, *after], len(before))
