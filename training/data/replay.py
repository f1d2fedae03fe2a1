"""General rows mixed into the training rows, so that what the base could do is practised beside what it learns.

Rehearsal of a small share of other data is the plainest cure of forgetting (Scialom et al., arXiv 2205.12393). The rows
are drawn without replacement, the same for the same seed; they are no part of validation, and the data check does not
look at them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from adapters.errors import ConfigInvalid
from training.data.formats import DataFile
from training.data.rows import Row


@dataclass(frozen=True)
class Replay:
    """The rows that were drawn of a file, to be learned beside `beside` rows of the task."""

    file: DataFile
    rows: list[Row]
    beside: int

    @property
    def share(self) -> float:
        """Of all rows that are learned."""
        return len(self.rows) / (len(self.rows) + self.beside)

    def as_dict(self) -> dict[str, Any]:
        """Its file and counts, for the card."""
        return {
            "file": self.file.path.name,
            "digest": self.file.digest,
            "rows": len(self.rows),
            "of_rows": len(self.file.rows),
            "share": round(self.share, 6),
        }


def replayed(file: DataFile, beside: int, share: float, seed: int) -> Replay:
    """So many rows of the file that they are `share` of all; every row where it has fewer. Raises ConfigInvalid."""
    if not file.rows:
        raise ConfigInvalid(f"{file.path} has no row to replay.", param="replay")
    wanted = max(1, round(beside * share / (1 - share)))
    chosen = random.Random(seed).sample(range(len(file.rows)), min(wanted, len(file.rows)))  # noqa: S311
    return Replay(file, [file.rows[index] for index in sorted(chosen)], beside)
