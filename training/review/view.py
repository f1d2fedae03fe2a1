"""What a rule sees: the config's values by neutral name, what is known beside them, and how a finding is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from training.review.facts import Base, Known
from training.review.findings import Finding
from training.review.rules import RULES
from training.review.words import Given, Reading

SMALL = 3e8  # parameters, below which rates are five times higher


@dataclass(frozen=True)
class View:
    """One config under review. A figure that cannot be known is None, and a rule that needs it is silent."""

    reading: Reading
    known: Known

    def value(self, name: str, default: Any = None) -> Any:
        return self.reading.value(name, default)

    def is_written(self, name: str) -> bool:
        """Whether the file itself says it."""
        given = self.reading.values.get(name)
        return given is not None and not given.is_default

    def finding(
        self, code: str, name: str, suggestion: str = "", detail: str = "", level: str | None = None
    ) -> Finding:
        """The rule fired on the setting of this neutral name."""
        given = self.reading.values.get(name) or Given(None, name)
        return Finding(RULES[code], given.key, given.value, given.line, detail, suggestion, level)

    @property
    def is_lora(self) -> bool:
        return bool(self.value("method") in (None, "lora") and (self.value("method") or self.value("rank")))

    @property
    def is_full(self) -> bool:
        return bool(self.value("method") == "full")

    @property
    def base(self) -> Base:
        return self.known.base

    @property
    def is_small(self) -> bool:
        """Without a known size a base counts as a usual one."""
        return (self.base.parameters or SMALL) < SMALL

    @property
    def rows(self) -> int | None:
        """Training rows: those of the data, less a share that the config holds out, and not more than its limit."""
        if self.known.data is None:
            return None
        rows: float = self.known.data.rows
        share = self.value("validation")
        if isinstance(share, int | float) and not isinstance(share, bool) and share:
            rows -= share if share >= 1 else rows * share
        limit = self.value("row_limit")
        return max(1, int(min(rows, limit) if limit else rows))

    @property
    def batch(self) -> int | None:
        """Rows a step on one device."""
        batch = self.value("batch")
        return int(batch * self.value("accumulation", 1)) if batch else None

    @property
    def sequences(self) -> int | None:
        """Sequences an epoch: fewer than rows where they are packed."""
        data, rows = self.known.data, self.rows
        if data is None or rows is None:
            return None
        if self.value("packing") and data.total_tokens and self.value("max_length"):
            return max(1, math.ceil(rows * data.total_tokens / data.rows / float(self.value("max_length"))))
        return rows

    @property
    def steps(self) -> int | None:
        """Optimizer steps in all."""
        if (self.value("max_steps") or 0) > 0:
            return int(self.value("max_steps"))
        sequences, batch, epochs = self.sequences, self.batch, self.value("epochs")
        if not (sequences and batch and epochs):
            return None
        return max(1, math.ceil(math.ceil(sequences / batch) * float(epochs)))

    @property
    def passes(self) -> float | None:
        """How often each row is learned."""
        if (self.value("max_steps") or 0) > 0:
            return self.steps * self.batch / self.sequences if self.sequences and self.batch and self.steps else None
        epochs = self.value("epochs")
        return float(epochs) if epochs else None

    @property
    def warmup_share(self) -> float | None:
        """Share of the steps; a count needs the steps to be known. A ratio wins over a count of zero."""
        count, ratio = self.value("warmup_steps"), self.value("warmup_ratio")
        if not count and ratio is not None:
            return float(ratio)
        if count is None:
            return None
        if count < 1:
            return float(count)
        return count / self.steps if self.steps else None

    @property
    def warmup_name(self) -> str:
        has_count = self.value("warmup_steps") or self.value("warmup_ratio") is None
        return "warmup_steps" if has_count else "warmup_ratio"
