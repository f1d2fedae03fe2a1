"""The plan for a data file on a machine: every size and method with memory, time and money, and what to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import ConfigInvalid, DataInvalid
from training.config import SERVED_RANK
from training.planner import machines, sizes
from training.planner.advice import advice
from training.planner.candidates import Candidate, Wishes, candidates
from training.planner.latency import latency
from training.planner.sizes import Architecture
from training.planner.target import Target, target_of
from training.planner.usual import usual_peak
from training.planner.workload import Workload, worst

FIRST_PARAMETERS = 2_000_000_000  # a first adapter is trained on at most so many: quick to try, and often enough


@dataclass(frozen=True)
class Asked:
    """What a plan is made for. `tokenizer` is a base folder whose tokenizer counts; `epochs` None is the trainer's."""

    data: Path
    base: str | None = None
    gpu: str = "auto"
    price: float | None = None
    budget: float | None = None
    latency_ms: float | None = None
    max_rank: int = SERVED_RANK
    max_length: int | None = None
    epochs: float | None = None
    tokenizer: str | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, least in (("price", 0.0), ("budget", 0.0), ("latency_ms", 0.0), ("max_rank", 1), ("max_length", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigInvalid(f"{key} is {value}; it must be at least {least:g}.", param=key)


def plan(asked: Asked, report: dict[str, Any] | None = None) -> dict[str, Any]:
    """The whole plan as plain JSON; `report` is a calibration's. Raises ConfigInvalid, BaseInvalid, DataInvalid."""
    target = target_of(asked.gpu, report)
    bases = [sizes.find(asked.base)] if asked.base is not None else list(sizes.SIZES)
    work, counted = workload(asked, bases)
    prices = machines.prices_of(target.key, asked.price)
    wishes = Wishes(asked.max_rank, asked.max_length, tuple(prices), asked.epochs)
    rows = [found for of in bases for found in candidates(of, work, target, wishes)]
    picks = _picks(rows, asked, target)
    chosen = picks[0][1] if picks else None
    return {
        "data": {"file": asked.data.name, **work.as_dict(), "counted_with": counted},
        "machine": target.as_dict(),
        "prices": prices,
        "asked": {"budget": asked.budget, "latency_ms": asked.latency_ms, "max_rank": asked.max_rank},
        "candidates": [_row(found, asked, target) for found in rows],
        "picks": [{"why": why, **found.as_dict()} for why, found in picks],
        "settings": advice(chosen, work, asked.max_rank) if chosen else [],
        "usual": _usual(chosen, work) if chosen else None,
        "fits": chosen is not None,
        "smallest": None if chosen else _smallest(rows, target),
    }


def workload(asked: Asked, bases: Sequence[Architecture]) -> tuple[Workload, str]:
    """The data rendered and counted, and with which tokenizer; raises DataInvalid with every bad row."""
    from adapters.embedded import EMBEDDED, open_base
    from training.data.columns import Columns
    from training.data.dataset import prepare
    from training.data.formats import read_data
    from training.data.template import load_template

    file = read_data(asked.data, Columns(asked.columns))
    source = asked.tokenizer or _own_tokenizer(asked.base) or EMBEDDED
    base = open_base(source)
    length = min(asked.max_length or 10**7, min(of.context_tokens for of in bases))
    made = prepare(file, file.rows, load_template(base.folder), max_length=length, over_long="cut")
    if not made.sequences:
        raise DataInvalid(f"{asked.data} has no row to plan with.", param="data")
    said = f"the tokenizer of {base.id}"
    if source == EMBEDDED and any(of.name != "embedded" for of in bases):
        said += "; Qwen's makes about as many of English and fewer of most other languages: --tokenizer FOLDER counts"
    cut = f"; {len(made.cut):,} rows above {length:,} tokens are counted as cut" if made.cut else ""
    return Workload(tuple(made.sequences)), said + cut


def _own_tokenizer(base: str | None) -> str | None:
    if base is None:
        return None
    folder = Path(base) if Path(base).is_dir() else Path(base).parent
    return str(folder) if (folder / "tokenizer_config.json").is_file() and (folder / "config.json").is_file() else None


def _row(found: Candidate, asked: Asked, target: Target) -> dict[str, Any]:
    spoken = latency(found.base, target, found.settings.rank, asked.latency_ms)
    return {**found.as_dict(), "is_over_budget": not _is_affordable(found, asked), "latency": spoken}


def _picks(rows: Sequence[Candidate], asked: Asked, target: Target) -> list[tuple[str, Candidate]]:
    """What to begin with first; then, where they differ, the largest that fits, and one that reasons."""
    fitting = [found for found in rows if found.fits and _is_affordable(found, asked)]
    best = list(_preferred(fitting).values())
    if not best:
        return []
    quick = [found for found in best if _is_quick(found, asked, target)]
    if asked.latency_ms is not None and quick:
        first = max(quick, key=_size)
        why = f"the largest that answers within {asked.latency_ms:g} ms a token on this machine (floor)"
    else:
        small = [found for found in best if found.base.parameters <= FIRST_PARAMETERS] or [min(best, key=_size)]
        first = max(small, key=_size)
        why = "the largest of up to 2 billion parameters: quick to try; go on to a larger one when it is not enough"
    picks = [(why, first)]
    largest, thinking = max(best, key=_size), [found for found in best if found.base.thinks]
    if largest is not first:
        picks.append(("the largest that fits: for quality, where time and money do not matter", largest))
    if thinking and not first.base.thinks:
        reasoner = max(thinking, key=_size)
        if reasoner is not largest:
            picks.append(("the largest that reasons, when asked to: answers come after its thoughts", reasoner))
    return picks


def _preferred(fitting: Sequence[Candidate]) -> dict[str, Candidate]:
    """For each base LoRA where it fits, else QLoRA; full only where it is alone."""
    chosen: dict[str, Candidate] = {}
    for method in ("lora", "qlora", "full"):
        for found in fitting:
            if found.settings.method == method:
                chosen.setdefault(found.base.name, found)
    return chosen


def _is_affordable(found: Candidate, asked: Asked) -> bool:
    return asked.budget is None or found.dollars is None or found.dollars <= asked.budget


def _is_quick(found: Candidate, asked: Asked, target: Target) -> bool:
    return bool(latency(found.base, target, found.settings.rank, asked.latency_ms)["is_within"])


def _usual(found: Candidate, work: Workload) -> dict[str, Any]:
    """What a trainer would hold that pads its batches and makes logits of every position, for the same settings."""
    settings, passes = found.settings, work.passes(found.settings.pass_size)
    peaks = (
        usual_peak(found.base, found.method, one, settings.optimizer, settings.accumulation) for one in worst(passes)
    )
    largest = max(peaks, key=lambda one: one.total)
    return replace(largest, workspace=found.peak.workspace).as_dict()


def _size(found: Candidate) -> int:
    return found.base.parameters


def _smallest(rows: Sequence[Candidate], target: Target) -> dict[str, Any]:
    """Of what does not fit the least, and the GPU of the table that has room for it."""
    least = min(rows, key=lambda found: found.peak.total)
    wanted = least.peak.total * (1 + target.error[1])
    rooms = sorted((gpu for gpu in machines.GPUS if gpu.memory_bytes >= wanted), key=lambda gpu: gpu.memory_bytes)
    return {
        **least.as_dict(),
        "wanted_bytes": wanted,
        "fits_on": rooms[0].key if rooms and not least.is_floor else None,
    }
