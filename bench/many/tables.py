"""The tables of the bench of many adapters, from what was kept: medians over the rounds, and ratios within a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.many.cases import HOT, MANY, SLO, Case
from bench.many.kept import Kept, seen_of
from bench.many.plan import CLASS_NAMES, Classes
from bench.many.stats import (
    Seen,
    goodput,
    jain,
    paired_ratios,
    quantile,
    served_shares,
    spread,
    tpots,
    waits,
)
from bench.report import Report

OURS = "hotshoe"
Values = Mapping[int, float]  # of each round
Figures = dict[tuple[str, str], dict[int, float]]  # (case, side) -> its values


def reports(kept: Kept, cases: Sequence[Case]) -> Iterator[tuple[str, Report]]:
    """Each table of which something was measured, with its name."""
    makers: dict[str, Callable[[Kept, Sequence[Case]], Report]] = {
        "starts": starts,
        "mix": mix,
        "closed": closed,
        "first": first,
        "open": opened,
        "classes": classes,
        "stalls": stalls,
    }
    for name, maker in makers.items():
        report = maker(kept, cases)
        if report.rows:
            yield name, report


def figures(kept: Kept, table: str, of: Callable[[list[Seen], dict[str, Any]], float]) -> Figures:
    """One number of every measurement of a table."""
    found: Figures = {}
    for line in kept.of(table):
        if "seen" in line:
            found.setdefault((line["case"], line["side"]), {})[line["round"]] = of(seen_of(line), line)
    return found


def windows(cases: Sequence[Case]) -> dict[tuple[str, str], Case]:
    return {(case.table, case.name): case for case in cases}


def ratio(ours: Values | None, theirs: Values | None) -> float | str:
    """The median of the rounds' own ratios; `-` where there is none."""
    found = paired_ratios(ours or {}, theirs or {})
    return statistics.median(found) if found else "-"


def shown(values: Values, scale: float = 1.0) -> tuple[float, str]:
    """Median, and least..greatest of the rounds."""
    middle, least, most = spread([value * scale for value in values.values()])
    return middle, f"{least:.3g}..{most:.3g}"


def rate_of(cases: Sequence[Case]) -> Callable[[list[Seen], dict[str, Any]], float]:
    by_name = windows(cases)

    def rate(seen: list[Seen], line: dict[str, Any]) -> float:
        return sum(one.window_tokens for one in seen) / by_name[line["table"], line["case"]].window.seconds

    return rate


def rounds_of(found: Mapping[Any, Values]) -> str:
    least, most = min(map(len, found.values()), default=0), max(map(len, found.values()), default=0)
    return f"{least} rounds" if least == most else f"{least} to {most} rounds"


def starts(kept: Kept, cases: Sequence[Case]) -> Report:
    """Seconds from the start of each side to ready; hotshoe's is before adapters are published, stock's with them."""
    report = Report("Start to ready, seconds")
    seen: dict[tuple[str, str], list[float]] = {}
    for line in kept.lines:
        if "start" in line:
            seen.setdefault((line["start"], line["setup"]), []).append(line["seconds"])
    for (side, setup), values in seen.items():
        middle, least, most = spread(values)
        row = {"side": side, "setup": setup, "starts": len(values), "seconds": middle, "min..max": ""}
        report.rows.append({**row, "min..max": f"{least:.3g}..{most:.3g}"})
    report.notes.append(
        "vLLM's and llama.cpp's are with all adapters, hotshoe's without: its adapters are published, and checked, "
        "after. peft's is the reading of base and adapters."
    )
    return report


def mix(kept: Kept, cases: Sequence[Case]) -> Report:
    """Times to the first token count from when a client sent its request, and are of all rounds together."""
    found, by_name = figures(kept, "mix", rate_of(cases)), windows(cases)
    answers = figures(kept, "mix", lambda seen, line: _ended(seen, by_name["mix", line["case"]].window.seconds))
    pooled = _pooled(kept, "mix")
    report = Report(f"HTTP, 32 clients, 32 prompt and 24 output tokens: tokens/s ({rounds_of(found)})")
    for (name, side), values in sorted(found.items(), key=_order(cases)):
        middle, span = shown(values)
        times = waits(pooled[name, side], by_name["mix", name].window.seconds)
        report.rows.append(
            {
                "load": name,
                "side": side,
                "tokens/s": middle,
                "min..max": span,
                "of its base": ratio(values, found.get(("base", side))),
                "of its four adapters": ratio(values, found.get(("four adapters", side))),
                "hotshoe, times this": ratio(found.get((name, OURS)), values),
                "requests/s": shown(answers[name, side])[0],
                "TTFT p50, ms": _ms(times, 50),
                "TTFT p99, ms": _ms(times, 99),
            }
        )
    return report


def _ended(seen: Sequence[Seen], seconds: float) -> float:
    """Answers a second that ended whole within the window."""
    return sum(one.is_whole and one.last is not None and 0 <= one.last < seconds for one in seen) / seconds


def closed(kept: Kept, cases: Sequence[Case]) -> Report:
    found = figures(kept, "closed", rate_of(cases))
    report = Report(f"Closed loop, 32 prompt and 48 output tokens: tokens/s ({rounds_of(found)})")
    for (name, side), values in sorted(found.items(), key=_order(cases)):
        base = "base, " + name.split(", ")[1]
        middle, span = shown(values)
        report.rows.append(
            {
                "load": name,
                "side": side,
                "tokens/s": middle,
                "min..max": span,
                "of its base": ratio(values, found.get((base, side))),
                "of bare": ratio(values, found.get((base, "bare"))),
                "hotshoe, times this": ratio(found.get((name, OURS)), values),
            }
        )
    return report


def first(kept: Kept, cases: Sequence[Case]) -> Report:
    """The last of a round's requests: the one before it brought the adapter into its slot."""
    found = figures(kept, "first", lambda seen, line: waits(seen[-1:], 60.0)[0])
    report = Report(f"Time to the first token of one request, ms ({rounds_of(found)})")
    for (name, side), values in sorted(found.items(), key=_order(cases)):
        base = name.split(", ")[0] + ", base"
        middle, span = shown(values, 1e3)
        report.rows.append(
            {
                "load": name,
                "side": side,
                "ms": middle,
                "min..max": span,
                "times its base": ratio(values, found.get((base, side))),
                "hotshoe, times as fast": ratio(values, found.get((name, OURS))),
            }
        )
    return report


def opened(kept: Kept, cases: Sequence[Case]) -> Report:
    """One row a load and side; requests of all rounds together for the fairness, rounds by themselves for the rest."""
    by_name = windows(cases)
    kinds: dict[str, Callable[[list[Seen], dict[str, Any]], float]] = {
        "offered requests/s": lambda seen, line: len(seen) / by_name["open", line["case"]].window.seconds,
        "answered/s": lambda seen, line: (
            sum(one.is_whole for one in seen) / by_name["open", line["case"]].window.seconds
        ),
        "goodput/s": lambda seen, line: goodput(seen, SLO, by_name["open", line["case"]].window.seconds),
        "tokens/s": rate_of(cases),
    }
    found = {kind: figures(kept, "open", of) for kind, of in kinds.items()}
    pooled = _pooled(kept, "open")
    report = Report(f"Open loop, {MANY.adapters} adapters on {MANY.slots} slots ({rounds_of(found['tokens/s'])})")
    for name, side in sorted(pooled, key=lambda key: _order(cases)((key, {}))):
        seen = pooled[name, side]
        row: dict[str, Any] = {"load": name, "side": side}
        row |= {kind: shown(values[name, side])[0] for kind, values in found.items()}
        row["min..max of goodput"] = shown(found["goodput/s"][name, side])[1]
        for name_of, key in (("adapters", "model"), ("tenants", "tenant")):
            shares = served_shares(seen, key)
            row[f"Jain, {name_of}"] = jain(shares) if any(shares) else "-"
        row["failed"] = sum(bool(one.problem) for one in seen)
        row["goodput, hotshoe's over this"] = ratio(
            found["goodput/s"].get((name, OURS)), found["goodput/s"][name, side]
        )
        report.rows.append(row)
    report.notes.append(
        f"Goodput: requests a second whose first token came within {SLO.ttft_seconds:g} s of when they were meant to "
        f"be sent, and the others within {SLO.tpot_seconds * 1e3:g} ms each, on average. Jain's index is over what "
        "each adapter, or tenant, got of the tokens that it asked for, all rounds together."
    )
    return report


def classes(kept: Kept, cases: Sequence[Case]) -> Report:
    """TTFT and TPOT of base, hot, warm and cold: requests of all rounds together."""
    by_name, of = windows(cases), Classes(HOT)
    report = Report("Open loop, by class of adapter: ms to the first token, and a token after it")
    pooled = _pooled(kept, "open")
    for name, side in sorted(pooled, key=lambda key: _order(cases)((key, {}))):
        window = by_name["open", name].window
        until = window.seconds + window.drain_seconds
        for kind in CLASS_NAMES:
            seen = [one for one in pooled[name, side] if of.of(one.model) == kind]
            if seen:
                times, each = waits(seen, until), tpots(seen)
                row: dict[str, Any] = {"load": name, "side": side, "class": kind, "requests": len(seen)}
                row |= {f"TTFT p{share:g}": _ms(times, share) for share in (50, 95, 99)}
                row |= {f"TPOT p{share:g}": _ms(each, share) for share in (50, 95, 99)}
                row["without a first token"] = sum(one.first is None for one in seen)
                report.rows.append(row)
    report.notes.append(
        f"By popularity: hot are the {HOT} adapters asked for most; warm the next {3 * HOT}; cold the others. Times "
        "count from when a request was meant to be sent; one that had no first token when the measurement ended counts "
        "as long as it had waited, one that failed as infinite."
    )
    return report


def stalls(kept: Kept, cases: Sequence[Case]) -> Report:
    lines = [line for line in kept.of("stalls") if "stalls" in line]
    report = Report("Live streams while an adapter is loaded: gaps between tokens, ms")
    for side in dict.fromkeys(line["side"] for line in lines):
        own = [line["stalls"] for line in lines if line["side"] == side]
        row: dict[str, Any] = {"side": side, "rounds": len(own)}
        for key in own[0]:
            row[key] = statistics.median(one[key] for one in own)
        most = [one["of the load"] for one in own]
        report.rows.append({**row, "min..max of the load": f"{min(most):.3g}..{max(most):.3g}"})
    report.notes.append(
        "Four streams run, two of the base and two of resident adapters. Medians over the rounds; a gap at an event is "
        "the largest of any stream from its request to its first token. Of the load: what an adapter on disk takes "
        "more than a resident one, whose request needs a prefill too."
    )
    return report


def _pooled(kept: Kept, table: str) -> dict[tuple[str, str], list[Seen]]:
    """The requests of all rounds together, by case and side."""
    found: dict[tuple[str, str], list[Seen]] = {}
    for line in kept.of(table):
        found.setdefault((line["case"], line["side"]), []).extend(seen_of(line))
    return found


def _ms(values: Sequence[float], share: float) -> float | str:
    found = quantile(values, share / 100) * 1e3 if values else math.nan
    return found if math.isfinite(found) else ("-" if math.isnan(found) else "never")


def _order(cases: Sequence[Case]) -> Callable[[tuple[tuple[str, str], Any]], tuple[int, int]]:
    """Rows in the order of the cases, and of a case's sides."""
    places = [case.name for case in cases]
    sides = ["hotshoe", "stock", "bare", "llama.cpp", "peft"]
    return lambda item: (places.index(item[0][0]), sides.index(item[0][1]))
