"""A plan in words and a table, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.planner.machines import GIB

HEADER = (
    *("base", "method", "precision", "fits", "peak GiB"),
    *("weights", "adapter", "grad.", "optim.", "activ.", "logits", "beside", "time", "$"),
)
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace")


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The plan, line by line."""
    data, machine = found["data"], found["machine"]
    yield (
        f"{data['file']}: {data['sequences']:,} sequences, {data['tokens']:,} tokens, {data['supervised_tokens']:,} of "
        f"them learned; lengths p50 {data['length_p50']:,}, p95 {data['length_p95']:,}, longest {data['length_max']:,}"
    )
    yield f"  counted with {data['counted_with']}"
    short = "" if machine["has_bfloat16"] else "no "
    yield f"{machine['name']}: {machine['memory_bytes'] / GIB:.1f} GiB, {short}bfloat16"
    yield f"  {machine['status']}"
    yield ""
    yield from _table(found["candidates"])
    yield ""
    if not found["fits"]:
        yield nothing_fits(found)
        return
    yield from _picked(found)
    ours, usual = found["picks"][0]["memory"]["total"], found["usual"]["total"]
    said = f"would hold {usual / GIB:.1f} GiB, ours {ours / GIB:.1f}"
    yield f"  a trainer that pads its batches and makes logits of every position {said}"
    yield ""
    yield f"settings for {found['picks'][0]['base']}, {found['picks'][0]['method']}:"
    for line in found["settings"]:
        yield f"  {line['setting']} = {_shown(line['value'])}: {line['reason']}"
    for price in found["prices"]:
        dated = f", {price['date']}, {price['source']}" if price["date"] else ""
        yield f"price: ${price['dollars_per_hour']:g} an hour, {price['where']}{dated}"
    if not found["prices"]:
        yield "price: none is known for this machine; --price DOLLARS sets one an hour"


def nothing_fits(found: dict[str, Any]) -> str:
    """The smallest thing that would, and where it would."""
    least = found["smallest"]
    bound = "at least " if least["is_lower_bound"] else ""
    room = f"; the {least['fits_on']} has room for it" if least["fits_on"] else ""
    return (
        f"Nothing fits (or is within the budget). Least of all needs {least['base']} with {least['method']}: {bound}"
        f"{least['wanted_bytes'] / GIB:.1f} GiB with its error bar{room}. Shorter rows (--max-length) need less."
    )


def _table(candidates: list[dict[str, Any]]) -> Iterator[str]:
    rows = [HEADER, *(_cells(row) for row in candidates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        first = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True))
        rest = "  ".join(cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True))
        yield f"{first}  {rest}".rstrip()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    memory = row["memory"]
    parts = [f"{memory[part] / GIB:.2f}" for part in PARTS]
    if row["is_lower_bound"]:
        least = f">{memory['total'] / GIB:.1f}"
        return (row["base"], row["method"], row["dtype"], "no", least, *parts[:4], "", "", parts[6], "", "")
    peak = f"{memory['total'] / GIB:.1f} ({memory['low'] / GIB:.1f}..{memory['high'] / GIB:.1f})"
    dollars = min((price["dollars"] for price in row["money"]), default=None)
    money = "" if dollars is None else f"{dollars:.2f}" + (" over" if row["is_over_budget"] else "")
    return (row["base"], row["method"], row["dtype"], _fits(row), peak, *parts, _duration(row["time"]), money)


def _fits(row: dict[str, Any]) -> str:
    if row["fits"]:
        return "yes, recomputing" if row["gradient_checkpointing"] else "yes"
    return "maybe" if row["fits_barely"] else "no"


def _picked(found: dict[str, Any]) -> Iterator[str]:
    for pick in found["picks"]:
        row = next(row for row in found["candidates"] if (row["base"], row["method"]) == (pick["base"], pick["method"]))
        spoken = row["latency"]
        yield f"{pick['base']} with {pick['method']}: {pick['why']}"
        line = f"  answers at {spoken['ms_per_token']:.1f} ms a token or slower ({spoken['evidence']})"
        if spoken["reasoning_seconds"] is not None:
            line += f"; about {spoken['reasoning_seconds']:.0f} s more where it thinks first"
        yield line
        if "not for commercial" in pick["licence"]:
            yield f"  licence: {pick['licence']}"


def _duration(spent: dict[str, Any]) -> str:
    return f"{_clock(spent['seconds'])} ({_clock(spent['low'])}..{_clock(spent['high'])})"


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
