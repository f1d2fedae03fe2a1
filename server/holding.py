"""Versions that are kept and not proven: their update is larger beside the base than the operator lets be served."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.bases import BaseModel
from adapters.errors import Problem
from adapters.magnitude import CODE, largest_update
from adapters.store import BlobStore
from adapters.types import AdapterVersion


@dataclass(frozen=True, slots=True)
class Holding:
    """Decides by the limit of this run, so that raising it and starting again lets a held version be proven."""

    store: BlobStore
    base: BaseModel
    max_update_ratio: float

    def problem(self, version: AdapterVersion) -> Problem | None:
        """What is said of a version whose update is above the limit; measures it."""
        largest = largest_update(self.store.folder(version.digest), self.base) if version.digest else None
        is_above = largest is not None and largest.ratio > self.max_update_ratio
        return largest.problem(self.max_update_ratio) if largest is not None and is_above else None

    def holds(self, version: AdapterVersion) -> bool:
        """True while the version's update is above the limit. Measures only what was found too large before."""
        is_suspect = any(reason["code"] == CODE for reason in version.reasons)
        return is_suspect and self.problem(version) is not None
