"""Versions that are kept and not proven: their update is larger beside the base than the operator lets be served."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.bases import BaseModel
from adapters.magnitude import CODE, largest_update
from adapters.store import BlobStore
from adapters.types import AdapterVersion


@dataclass(frozen=True, slots=True)
class Holding:
    """Decides by the limit of this run, so that raising it and starting again lets a held version be proven."""

    store: BlobStore
    base: BaseModel
    max_update_ratio: float

    def holds(self, version: AdapterVersion) -> bool:
        """True while the version's update is above the limit. Measures only what was found too large before."""
        if version.digest is None or not any(reason["code"] == CODE for reason in version.reasons):
            return False
        largest = largest_update(self.store.folder(version.digest), self.base)
        return largest is not None and largest.ratio > self.max_update_ratio
