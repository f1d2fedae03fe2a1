"""Columns under names of their owner's: `prompt=Question` reads the column `Question` as `prompt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapters.errors import ConfigInvalid
from training.data.forms import COLUMNS
from training.data.jsontext import RowInvalid

KNOWN = {name for columns in COLUMNS.values() for name in columns}


class Columns:
    """Which columns of the data are read as which of the known ones. Owners' names are compared without case."""

    def __init__(self, pairs: Iterable[str] = ()) -> None:
        """Takes `KNOWN=OWN` for each; raises ConfigInvalid."""
        self.known: dict[str, str] = {}  # by the folded name of the owner's
        self._found: set[str] = set()
        for pair in pairs:
            known, _, own = (part.strip() for part in pair.partition("="))
            if known not in KNOWN or not own:
                raise ConfigInvalid(
                    f"columns has {pair!r}; write KNOWN=YOURS, as prompt=Question, where KNOWN is one of "
                    f"{', '.join(sorted(KNOWN))}.",
                    param="columns",
                )
            if own.casefold() in self.known or known in self.known.values():
                raise ConfigInvalid(f"columns has {own!r} or {known!r} twice: map each column once.", param="columns")
            self.known[own.casefold()] = known

    def name(self, own: str) -> str:
        """The known name that a column is read as; its own where it is not mapped."""
        known = self.known.get(own.strip().casefold())
        if known is None:
            return own
        self._found.add(known)
        return known

    def names(self, header: Iterable[str]) -> list[str]:
        """The names of a header; raises RowInvalid where a mapped column meets one that has the name already."""
        own = list(header)
        found = [self.name(name) for name in own]
        for before, after in zip(own, found, strict=True):
            if before != after and found.count(after) > 1:
                message = f"the column {before!r} is read as `{after}`, and another column is `{after}`, too."
                raise RowInvalid("duplicate_key", message, "leave one of them out of the data or of --columns")
        return found

    def row(self, value: Any) -> Any:
        """A decoded row under the known names; raises RowInvalid as `names` does."""
        if not self.known or not isinstance(value, Mapping):
            return value
        return dict(zip(self.names(value), value.values(), strict=True))

    @property
    def unmet(self) -> list[str]:
        """The pairs whose column has been in nothing that was read."""
        return [f"{known}={own}" for own, known in self.known.items() if known not in self._found]
