"""Step 8 of the demo: the table of what happened, and the same as `report.json`."""

from __future__ import annotations

from typing import Any

from examples.agent_routing.console import clock, columns
from examples.agent_routing.learn import Results
from examples.agent_routing.workshop import Workshop

MEBIBYTE = 1 << 20


def collect(shop: Workshop, results: Results) -> None:
    """What the server knows: bytes and load seconds of each version, resident memory, VRAM where there is a GPU."""
    results.facts["system"] = shop.get("/v1/system")


def summary(results: Results, seconds: dict[str, float]) -> str:
    """The tables, as text."""
    system = results.facts["system"]
    scores = [
        (what, found.n, *(f"{value:.3f}" for value in (found.label_accuracy, found.exact_match, found.field_f1)))
        for what, found in results.scores.items()
    ]
    tested = len(results.data("english").splits["test"])
    scores.append(("TF-IDF and a linear model, test", tested, f"{results.linear_accuracy:.3f}", "-", "-"))
    times = [
        (
            model,
            *(
                f"{1000 * value:.0f}"
                for value in (
                    found.ttft_p50_seconds,
                    found.ttft_p95_seconds,
                    found.tpot_p50_seconds,
                    found.tpot_p95_seconds,
                )
            ),
        )
        for model, found in results.latencies.items()
    ]
    adapters = [
        (row["id"], row["place"], f"{row['size_bytes']:,}", _seconds(row["load_seconds"])) for row in system["adapters"]
    ]
    memory = [(key.removesuffix("_bytes"), f"{value / MEBIBYTE:,.0f} MiB") for key, value in _bytes(system["memory"])]
    memory.append(("video memory", _video_memory()))
    parts = (
        columns(("scores", "rows", "intent", "exact", "slot F1"), scores),
        columns(("ms, one request at a time", "TTFT p50", "p95", "TPOT p50", "p95"), times),
        columns(("adapter", "place", "bytes", "load s"), adapters),
        columns(("memory", ""), memory),
        columns(("step", "time"), [(step, clock(took)) for step, took in seconds.items()]),
    )
    return "\n\n".join(parts)


def as_report(results: Results, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything measured, as one JSON document; the answers themselves are left out."""
    return {
        "scores": {what: found.as_dict() for what, found in results.scores.items()},
        "linear_intent_accuracy": results.linear_accuracy,
        "latency": {model: found.as_dict() for model, found in results.latencies.items()},
        "facts": {key: value for key, value in results.facts.items() if not key.startswith("answers: ")},
        "seconds": seconds,
    }


def _bytes(memory: dict[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in memory.items() if key.endswith("_bytes") and isinstance(value, int | float)]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _video_memory() -> str:
    """What the GPU says is in use, on a machine that has one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        used = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used
    except Exception:  # noqa: BLE001 - no driver, no library, no device: each its own error, one answer
        return "no GPU"
    return f"{used / MEBIBYTE:,.0f} MiB"
