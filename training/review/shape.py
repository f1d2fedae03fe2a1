"""Rules on the adapter: rank, scaling, what it sits on, and what would keep it from being served."""

from __future__ import annotations

from collections.abc import Iterator

from adapters.bases import PROJECTIONS
from adapters.lora_fields import UNSUPPORTED
from training.review.findings import Finding
from training.review.view import View

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
OUTPUT = frozenset({"lm_head", "embed_tokens", "wte", "embed_in", "embed_out"})
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
LARGE_RANK, FEW_ROWS = 64, 1_000
SMALL_RANK, MANY_ROWS = 4, 20_000
LEAST_RATIO, MOST_RATIO = 0.5, 4.0
MOST_RSLORA_SCALING = 4.0
MOST_DROPOUT = 0.1


def findings(view: View) -> Iterator[Finding]:
    if not view.is_lora:
        return
    yield from rank(view)
    yield from scaling(view)
    yield from targets(view)
    yield from unserved(view)
    yield from dropout(view)


def rank(view: View) -> Iterator[Finding]:
    value, most = view.value("rank"), view.known.max_rank
    if value is None:
        return
    if value > most:
        yield view.finding(
            "rank_unserved", "rank", f"{most}, or HOTSHOE_MAX_RANK={value}", f"the server's limit is {most}"
        )
    elif value >= LARGE_RANK and view.rows is not None and view.rows < FEW_ROWS:
        yield view.finding("rank_large_for_rows", "rank", "16", f"{view.rows:,} rows")
    elif value <= SMALL_RANK and view.rows is not None and view.rows > MANY_ROWS:
        yield view.finding("rank_small_for_rows", "rank", "32", f"{view.rows:,} rows")


def scaling(view: View) -> Iterator[Finding]:
    value, alpha = view.value("rank"), view.value("alpha")
    if value is None or value < 1 or not alpha:  # a rank below 1 has no scale
        return
    if view.value("use_rslora"):
        scale = alpha / value**0.5
        if scale > MOST_RSLORA_SCALING:
            detail = f"{alpha:g} / sqrt({value}) = {scale:.1f}, where alpha / rank is {alpha / value:g}"
            yield view.finding("rslora_scale", "alpha", f"{max(1, round(value**0.5))}", detail)
    elif not LEAST_RATIO <= alpha / value <= MOST_RATIO:
        yield view.finding("alpha_odd", "alpha", f"{2 * value}", f"{alpha:g} / {value} = {alpha / value:g}")


def targets(view: View) -> Iterator[Finding]:
    named = view.value("targets")
    if not isinstance(named, tuple):
        return
    short = {name.rpartition(".")[2] for name in named}
    if on_output := short & OUTPUT:
        yield view.finding("targets_output", "targets", "", ", ".join(sorted(on_output)))
    elif short <= ATTENTION:
        yield view.finding("targets_attention_only", "targets")
    elif missing := [name for name in PROJECTIONS if name not in short and short & set(PROJECTIONS)]:
        yield view.finding("targets_partial", "targets", "", f"without {', '.join(missing)}")
    is_pattern = len(named) == 1 and any(mark in named[0] for mark in "*|()[]^$\\")
    unknown = sorted(short - set(PROJECTIONS) - OUTPUT)
    if unknown and not is_pattern and view.base.is_qwen is not False:
        yield view.finding("targets_unknown", "targets", "", ", ".join(unknown))


def unserved(view: View) -> Iterator[Finding]:
    """What makes a version export-only, or wrong on the base that is served."""
    if view.value("modules_to_save"):
        yield view.finding("modules_saved", "modules_to_save")
    if view.value("use_dora"):
        yield view.finding("dora", "use_dora")
    if view.value("feature"):
        key = view.reading.values["feature"].key.rpartition(".")[2]
        yield view.finding("feature_unserved", "feature", "", UNSUPPORTED.get(key, ""))
    if view.value("bias") not in (None, "none"):
        yield view.finding("bias_trained", "bias")
    init = str(view.value("init") or "")
    if init.startswith(CHANGES_BASE) and not view.value("init_converts"):
        yield view.finding("init_changes_base", "init")
    if view.value("added_tokens"):
        yield view.finding("vocabulary_grows", "added_tokens")


def dropout(view: View) -> Iterator[Finding]:
    value = view.value("dropout")
    if not value:
        return
    if value > MOST_DROPOUT:
        yield view.finding("dropout_high", "dropout")
    if view.value("unsloth"):
        yield view.finding("dropout_unsloth", "dropout")
