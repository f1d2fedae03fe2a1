"""What an adapter costs the base elsewhere: general text that it finds stranger, instructions that it leaves.

    perplexity of a text   exp(-mean_t log p(x_t | x_<t)), of the base and of the adapter
    mean KL                mean over tokens of KL(base || adapter), how far the predictions moved
    margin of a check      mean log p of the right answer's tokens - that of the wrong one's

The texts (eight languages) and the checks were written for this purpose and ship with the package. Only checks that the
base passes by PASSING nats count; the adapter keeps one while its margin is above 0. The adapter forgot when general
text is surely stranger to it by FORGOT_RATIO, or when it surely lost more than FORGOT_SHARE of the checks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.template import ChatTemplate
from training.evaluation.likelihood import Given, divergence, hidden_states, log_softmax, logprobs
from training.metrics.measure import Floats
from training.model import base_alone
from training.statistics import interval

PASSING = 0.5  # nats by which the base prefers the right answer
FORGOT_RATIO = 1.10  # of perplexities
FORGOT_SHARE = 0.10  # of the checks that the base passes
BATCH = 8
TOKENS = 48  # of a passage: its beginning is enough, and other scripts take several tokens a letter
DIGITS = 5
ADVICE = (
    "mix general rows into the training data: --replay FILE --replay-share 0.1; fewer epochs or a lower "
    "--learning-rate help, too"
)


@dataclass(frozen=True)
class Passage:
    """One general text."""

    language: str
    text: str


@dataclass(frozen=True)
class Check:
    """One instruction, with an answer that follows it and one that does not."""

    kind: str
    prompt: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Readings:
    """Of each passage its mean NLL under base and adapter and its mean KL; of each check both margins. All in nats."""

    passages: Sequence[Passage]
    checks: Sequence[Check]
    base_loss: Floats
    adapter_loss: Floats
    divergence: Floats
    base_margin: Floats
    adapter_margin: Floats

    def as_dict(self) -> dict[str, Any]:
        """Figures with intervals over passages and over checks, by language, and whether it forgot."""
        if not np.isfinite([*self.adapter_loss, *self.divergence, *self.adapter_margin]).all():
            return self._broken()
        moved = interval(self.adapter_loss - self.base_loss)
        passed = self.base_margin >= PASSING
        kept = (self.adapter_margin[passed] > 0).astype(np.float64)
        prompts = [check.prompt for check, was in zip(self.checks, passed, strict=True) if was]
        share = interval(kept, prompts, bounds=(0.0, 1.0)) if len(kept) else None
        kl = interval(self.divergence)
        forgot_text = moved.low > math.log(FORGOT_RATIO)
        forgot_checks = share is not None and share.high < 1 - FORGOT_SHARE
        margins = zip(self.checks, passed, self.adapter_margin, strict=True)
        lost = [check for check, was, now in margins if was and now <= 0]
        return {
            "forgot": bool(forgot_text or forgot_checks),
            "sentence": self._sentence(forgot_text, forgot_checks, moved.estimate, kept),
            "advice": ADVICE if forgot_text or forgot_checks else None,
            "passages": len(self.passages),
            "perplexity": {"base": _perplexity(self.base_loss), "adapter": _perplexity(self.adapter_loss)},
            "perplexity_ratio": _range(*map(_exponential, (moved.estimate, moved.low, moved.high))),
            "mean_kl": _range(kl.estimate, kl.low, kl.high),
            "languages": self._languages(),
            "checks": {
                "asked": len(self.checks),
                "base_passes": int(passed.sum()),
                "adapter_keeps": int(kept.sum()),
                "share": _range(share.estimate, share.low, share.high) if share is not None else None,
                "mean_margin": {
                    "base": _mean(self.base_margin[passed]),
                    "adapter": _mean(self.adapter_margin[passed]),
                },
                "lost": [{"kind": check.kind, "prompt": check.prompt, "right": check.right} for check in lost],
            },
        }

    def _broken(self) -> dict[str, Any]:
        """Of an adapter whose predictions are no numbers there is nothing to measure, and nothing is left."""
        count, of = int((~np.isfinite(self.adapter_loss)).sum()), len(self.passages)
        nothing = {"estimate": None, "low": None, "high": None}
        return {
            "forgot": True,
            "sentence": f"The adapter is broken: on {count} of {of} texts its predictions are no numbers.",
            "advice": "train it again with a lower --learning-rate, or with --dtype float32",
            "passages": len(self.passages),
            "perplexity": {"base": _perplexity(self.base_loss), "adapter": None},
            "perplexity_ratio": nothing,
            "mean_kl": nothing,
            "languages": {},
            "checks": {"asked": len(self.checks), "base_passes": int((self.base_margin >= PASSING).sum()), "lost": []},
        }

    def _languages(self) -> dict[str, Any]:
        names = sorted({passage.language for passage in self.passages})
        made: dict[str, Any] = {}
        for name in names:
            rows = np.array([passage.language == name for passage in self.passages])
            made[name] = {
                "base": _perplexity(self.base_loss[rows]),
                "adapter": _perplexity(self.adapter_loss[rows]),
                "mean_kl": _mean(self.divergence[rows]),
            }
        return made

    def _sentence(self, text: bool, checks: bool, moved: float, kept: Floats) -> str:
        times = _exponential(moved)
        figures = f"perplexity of general text times {times:.3f}, {int(kept.sum())} of {len(kept)} checks kept"
        return f"The adapter forgot ({figures})." if text or checks else f"No forgetting was seen ({figures})."


def forgetting(model: Any, template: ChatTemplate, tuned: Any = None) -> Readings:
    """Read all passages and checks with the base and with the adapter that is on `model`.

    With `tuned` (a whole model of the same vocabulary) that stands for the adapter, and `model` is its base.
    """
    passages, checks = shipped_passages(), shipped_checks()
    pair = _Pair(model, model if tuned is None else tuned)
    losses = _read(pair, template, passages)
    base, adapter = (_margins(*side, template, checks) for side in (pair.base(), pair.tuned()))
    return Readings(passages, checks, losses[:, 0], losses[:, 1], losses[:, 2], base, adapter)


@dataclass(frozen=True)
class _Pair:
    """A base and what became of it: one model with and without its adapter, or two models."""

    model: Any
    other: Any

    def base(self) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
        alone = self.other is self.model
        return self.model, (lambda: base_alone(self.model)) if alone else nullcontext

    def tuned(self) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
        return self.other, nullcontext


@torch.inference_mode()
def _read(pair: _Pair, template: ChatTemplate, passages: Sequence[Passage]) -> Floats:
    """(passages, 3): the base's loss, the adapter's loss, KL; each the mean over the tokens after the first."""
    ids = [template.tokenizer(one.text, add_special_tokens=False)["input_ids"][:TOKENS] for one in passages]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    found = np.zeros((len(ids), 3))
    for at in range(0, len(order), BATCH):
        rows = order[at : at + BATCH]
        states = []
        for model, context in (pair.base(), pair.tuned()):
            with context():
                states.append(hidden_states(model, [ids[row] for row in rows], template.pad))
        for place, row in enumerate(rows):
            end = len(ids[row]) - 1
            targets = torch.tensor(ids[row][1:], device=pair.model.device)[:, None]
            base = log_softmax(pair.model, states[0][place, :end])
            tuned = log_softmax(pair.other, states[1][place, :end])
            apart = divergence(base, tuned).mean()
            found[row] = float(-base.gather(1, targets).mean()), float(-tuned.gather(1, targets).mean()), float(apart)
    return found


def _margins(
    model: Any, context: Callable[[], AbstractContextManager[Any]], template: ChatTemplate, checks: Sequence[Check]
) -> Floats:
    """(checks,): the right answer's mean log-probability less the wrong one's, the end of the turn among the tokens."""
    ends = [] if (end := template.end_of_turn()) is None else [end]
    rows = [_given(template, check.prompt, text, ends) for check in checks for text in (check.right, check.wrong)]
    with context():
        found = np.array([values.mean() for values in logprobs(model, rows, template.pad, BATCH)], dtype=np.float64)
    margins: Floats = found[0::2] - found[1::2]
    return margins


def _given(template: ChatTemplate, prompt: str, answer: str, ends: Sequence[int]) -> Given:
    before = template.prompt_ids([{"role": "user", "content": prompt}], thinking=False)
    after = template.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Given([*before, *after, *ends], len(before))


def shipped_passages() -> list[Passage]:
    """The general texts of the package."""
    return [Passage(**row) for row in _rows("general.jsonl")]


def shipped_checks() -> list[Check]:
    """The instruction checks of the package."""
    return [Check(**row) for row in _rows("instructions.jsonl")]


def _rows(name: str) -> list[dict[str, str]]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _perplexity(losses: Floats) -> float | None:
    return round(_exponential(float(losses.mean())), 3) if len(losses) else None


def _mean(values: Floats) -> float | None:
    return round(float(values.mean()), DIGITS) if len(values) else None


def _exponential(value: float) -> float:
    return math.exp(min(value, 700.0))


def _range(estimate: float, low: float, high: float) -> dict[str, float]:
    return {"estimate": round(estimate, DIGITS), "low": round(low, DIGITS), "high": round(high, DIGITS)}
