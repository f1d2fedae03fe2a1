"""What the best prompt and the adapter cost when they are served: tokens of the prompt, and seconds to the first token.

The two are asked in alternation, a few rows at a time and one request at a time, so that what else the machine does
falls on both. A prompt of examples that never change is mostly found in the engine's prefix cache, as it would be.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from training.baseline.asking import Served
from training.baseline.sets import evenly
from training.evaluate import Prompt

ROWS_TIMED = 24
ROWS_AT_A_TIME = 4


def timed(base: Served, adapter: Served, prompts: Sequence[Prompt], plain: Sequence[Prompt]) -> dict[str, Any]:
    """Median seconds to the first token of both, over the same rows."""
    chosen = evenly(len(plain), ROWS_TIMED)
    first: dict[str, list[float]] = {"prompt": [], "adapter": []}
    for start in range(0, len(chosen), ROWS_AT_A_TIME):
        rows = chosen[start : start + ROWS_AT_A_TIME]
        for name, model, asked in (("prompt", base, prompts), ("adapter", adapter, plain)):
            found = model.ask([asked[row] for row in rows], max_tokens=1, concurrency=1)
            first[name] += [answer.ttft_seconds for answer in found]
    medians = {name: round(statistics.median(values), 4) for name, values in first.items()}
    return {"rows": len(chosen), "ttft_p50_seconds": medians}
