"""From evidence to a verdict: one primary outcome, flags beside it, and what to do. Pure; the rules are in `rules`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from training.verdict import figures
from training.verdict.evidence import Evidence, HeldOut
from training.verdict.rules import LEAST_ROWS, LIMITS, Limits

if TYPE_CHECKING:
    from training.statistics import Interval


@dataclass(frozen=True)
class Verdict:
    """What a run came to. `figures` are those that decided, each with its interval where it has one."""

    primary: str
    flags: tuple[str, ...]
    sentence: str
    advice: tuple[str, ...]
    figures: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "flags": list(self.flags), "advice": list(self.advice)}


def judge(evidence: Evidence, limits: Limits = LIMITS) -> Verdict:
    """The verdict on one run; the same evidence gives the same."""
    from training.verdict.advice import advice

    shown: dict[str, Any] = {}
    primary, why = _primary(evidence, limits, shown)
    flags = tuple(_flags(primary, evidence, limits, shown))
    return Verdict(primary, flags, _sentence(primary, why), tuple(advice(primary, flags, evidence, shown)), shown)


def _primary(evidence: Evidence, limits: Limits, shown: dict[str, Any]) -> tuple[str, str]:
    """The first rule that holds, and what it saw."""
    if why := _diverged(evidence, limits, shown):
        return "diverged", why
    rows = evidence.held_out
    if rows is None:
        return "cannot tell", "there are no validation rows"
    if why := _missing(rows):
        return "cannot tell", why
    gain = figures.fall(rows.start, rows.best, rows)
    shown["gain"] = gain.as_dict()
    far = figures.fall_of(rows.is_far, rows)
    if far is not None:
        shown["far_gain"] = far.as_dict()
    before, best = figures.mean_loss(rows.start, rows), figures.mean_loss(rows.best, rows)
    if _is_worse(rows, gain, limits) and not figures.fell(evidence.training):
        return "diverged", f"the training loss did not fall, and the validation loss rose ({_rise(gain)})"
    if gain.low <= 0 and figures.rose(evidence.training) > _material(evidence, limits):
        return "diverged", f"the training loss rose at first, and the validation loss did not fall ({_change(gain)})"
    if why := _overfit(evidence, rows, gain, limits, shown):
        return "overfit", why
    effect = max(limits.effect_nats, limits.effect_share * before)
    if -effect < gain.low and gain.high < effect:
        return "no effect", f"the validation loss went from {before:.3f} to {best:.3f}, which is no change"
    if gain.low > 0 and (why := _underfit(rows, limits, shown)):
        return "underfit", why
    if gain.low > 0:
        return "learned", f"the validation loss fell from {before:.3f} to {best:.3f} ({_between(gain.low, gain.high)})"
    return "cannot tell", f"the validation loss went from {before:.3f} to {best:.3f} ({_change(gain)})"


def _diverged(evidence: Evidence, limits: Limits, shown: dict[str, Any]) -> str:
    found = figures.lost_again(evidence.training)
    if found is None:
        return ""
    lost, fallen = found["lost"], found["fallen"]
    if lost < _material(evidence, limits) or lost < limits.lost_share * fallen:
        return ""
    shown["lost"] = found
    return f"the training loss ended {lost:.2f} nats above its lowest level"


def _material(evidence: Evidence, limits: Limits) -> float:
    """How far the training loss must move to mean something."""
    return max(limits.lost_nats, 3 * figures.noise_of(evidence.training))


def _missing(rows: HeldOut) -> str:
    if not rows.start or not rows.best:
        return "the base was not measured on the validation rows"
    count = len(set(rows.clusters))
    if count < LEAST_ROWS:
        return f"{len(rows.tokens)} validation rows of {count} templates are too few: {LEAST_ROWS} templates are needed"
    return ""


def _is_worse(rows: HeldOut, gain: Interval, limits: Limits) -> bool:
    """Whether the kept weights are surely worse than the start."""
    return gain.high < -max(limits.effect_nats, limits.effect_share * figures.mean_loss(rows.start, rows))


def _overfit(evidence: Evidence, rows: HeldOut, gain: Interval, limits: Limits, shown: dict[str, Any]) -> str:
    best = figures.mean_loss(rows.best, rows)
    if _is_worse(rows, gain, limits):
        return f"the kept weights are worse on the validation rows than the start ({_rise(gain)})"
    if not rows.last or evidence.best_step >= evidence.steps:
        return ""
    rise = figures.fall(rows.last, rows.best, rows)
    shown["rise"] = rise.as_dict()
    if rise.low <= max(limits.rise_nats, limits.rise_share * best):
        return ""
    if not figures.fell_after(evidence.training, evidence.best_step):
        return ""
    last = figures.mean_loss(rows.last, rows)
    return f"after step {evidence.best_step} the validation loss rose from {best:.3f} to {last:.3f} while training fell"


def _underfit(rows: HeldOut, limits: Limits, shown: dict[str, Any]) -> str:
    if not rows.middle or not rows.last:
        return ""
    late = figures.fall(rows.middle, rows.last, rows)
    whole = figures.fall(rows.start, rows.last, rows)
    last = figures.mean_loss(rows.last, rows)
    more = figures.hopes(late.estimate, whole.estimate, last)
    shown |= {"late_fall": late.as_dict(), "twice_the_steps": more}
    if late.low <= 0 or more < max(limits.left_nats, limits.left_share * last):
        return ""
    return f"the validation loss was still falling at {last:.3f}: twice the steps would lower it by about {more:.2f}"


def _flags(primary: str, evidence: Evidence, limits: Limits, shown: dict[str, Any]) -> list[str]:
    found = []
    if _memorised(evidence, limits, shown):
        found.append("memorised")
    if evidence.general is not None:
        rise = figures.forgotten(evidence.general)
        shown["general_rise"] = rise.as_dict()
        if rise.low > limits.forgot_nats:
            found.append("forgot")
    can_doubt = primary == "learned" and evidence.seen is not None
    doubted = figures.doubted_share(evidence.seen, limits.doubt_nats) if can_doubt and evidence.seen else None
    if doubted is not None:
        shown["doubted"] = doubted.as_dict()
        if doubted.low > limits.doubt_share:
            found.append("label noise")
    return found


def _memorised(evidence: Evidence, limits: Limits, shown: dict[str, Any]) -> bool:
    if evidence.canaries is not None and evidence.canaries.ranks:
        shown["canaries_p"] = figures.canaries_p(evidence.canaries)
        return bool(shown["canaries_p"] < limits.canary_p)
    rows, seen = evidence.held_out, evidence.seen
    if rows is None or seen is None or not rows.start or len(rows.tokens) < 2 or len(seen.tokens) < 2:
        return False
    apart = figures.told_apart(rows, seen)
    shown["told_apart"] = apart.as_dict()
    return bool(apart.low > limits.memorised_auc)


def _sentence(primary: str, why: str) -> str:
    return f"{primary.capitalize()}: {why}."


def _between(low: float, high: float) -> str:
    return f"by {low:.3f} to {high:.3f}"


def _rise(gain: Interval) -> str:
    return _between(-gain.high, -gain.low)


def _change(gain: Interval) -> str:
    return f"a change of {-gain.high:+.3f} to {-gain.low:+.3f}"
