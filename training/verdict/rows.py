"""The loss of each validation row at each validation, kept in small files beside a run's checkpoints.

A resumed run finds those of its first start; a validation that is made again writes the same file again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adapters.durable import replace_file
from training.data.template import Rendered


class RowFiles:
    """The files in one folder, one for each step that was validated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, step: int, losses: Sequence[float]) -> None:
        """Keep nats of each row, summed over its learned tokens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._file(step), json.dumps([round(loss, 6) for loss in losses]).encode())

    def read(self, step: int) -> list[float] | None:
        """As they were written; None where nothing was, or half of it."""
        try:
            found: Any = json.loads(self._file(step).read_bytes())
        except (OSError, ValueError):
            return None
        return [float(loss) for loss in found]

    def _file(self, step: int) -> Path:
        return self.folder / f"rows-{step}.json"


def per_row(values: Sequence[float], rows: Iterable[Rendered]) -> list[float]:
    """One value for each learned token, summed for each row."""
    made, start = [], 0
    for row in rows:
        made.append(sum(values[start : start + row.supervised_tokens]))
        start += row.supervised_tokens
    return made
