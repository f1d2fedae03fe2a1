"""The rules of the verdict as data: what each one asks, and with which limits. `docs/verdict.md` has them as a table.

Limits in nats are of the loss a learned token; a limit is the larger of an absolute and a relative one, so that it
means something for a loss of 4 and for one of 0.04. "Surely" means: the interval of 95%, by the bootstrap over clusters
of validation rows, lies wholly on that side.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_ROWS = 20  # clusters of validation rows below which no interval is to be told from


@dataclass(frozen=True)
class Limits:
    """Every number in the rules."""

    effect_nats: float = 0.005  # a change below this,
    effect_share: float = 0.01  # or below this share of the loss at the start, is none
    rise_nats: float = 0.02  # the last loss above the best by this,
    rise_share: float = 0.05  # and by this share of it, is a rise
    left_nats: float = 0.02  # twice the steps would lower the loss by this,
    left_share: float = 0.10  # and by this share of it: not all was learned
    lost_nats: float = 0.25  # the training loss ended above its lowest by this,
    lost_share: float = 0.5  # and so much of its fall was lost again
    memorised_auc: float = 0.55  # how well the gain tells rows trained on from others
    canary_p: float = 0.01  # chance that canaries rank so high among their candidates by themselves
    forgot_nats: float = 0.10  # the loss of general text rose by this
    doubt_nats: float = 1.1  # the kept model holds another answer to be three times as likely
    doubt_share: float = 0.02  # rows of which it does so, above which labels are wrong


LIMITS = Limits()


@dataclass(frozen=True)
class Rule:
    """One outcome: when it holds, in words for people."""

    code: str
    kind: str  # primary: the first that holds is the verdict; flag: each that holds is raised
    holds: str


RULES = (
    Rule(
        "diverged",
        "primary",
        "the training loss ended 0.25 nats above its lowest level, more than three times its noise, and half or more "
        "of what it had fallen was lost; or it rose so far above its first value and the kept weights are not surely "
        "better than the start; or it did not fall and they are surely worse",
    ),
    Rule(
        "cannot tell",
        "primary",
        "there are no validation rows, fewer than 20 clusters of them, or the base was not measured on them",
    ),
    Rule(
        "overfit",
        "primary",
        "the validation loss ended surely above its best by 0.02 nats and 5% while the training loss fell, or the kept "
        "weights are surely worse than the start",
    ),
    Rule(
        "no effect",
        "primary",
        "the change of the validation loss from the start to the kept weights lies wholly within 0.005 nats or 1%",
    ),
    Rule(
        "underfit",
        "primary",
        "the kept weights are surely better than the start, and the validation loss surely fell in the second half of "
        "the learning, so fast that as many steps again would lower it by 0.02 nats and 10%",
    ),
    Rule("learned", "primary", "the validation loss of the kept weights is surely below that of the start"),
    Rule("cannot tell", "primary", "none of these"),
    Rule(
        "memorised",
        "flag",
        "canaries rank higher among their candidates than chance allows (Fisher's method over the ranks, p below "
        "0.01); without canaries the gain over the start tells rows trained on from validation rows surely better "
        "than an AUC of 0.55",
    ),
    Rule("forgot", "flag", "the loss of general text rose surely by 0.10 nats a token"),
    Rule(
        "label noise",
        "flag",
        "it learned, and of surely more than 2% of a sample of the rows trained on the kept weights are "
        "sure of another short answer: probability 0.6 or more, and three times that of the row's own",
    ),
)
PRIMARY = ("learned", "underfit", "overfit", "diverged", "no effect", "cannot tell")
FLAGS = tuple(rule.code for rule in RULES if rule.kind == "flag")
