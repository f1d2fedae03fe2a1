"""Which triples an engine was given: the rules of load and unload, shared by the plugin inside vLLM and the double."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import Conflict, EngineBusy, InvalidRequest, ModelNotFound
from server.engine.base import EngineAdapter


class Ledger:
    """Loaded adapters by engine name, and every id ever used. The caller does the loading, one at a time."""

    def __init__(self, base_id: str, staged_limit: int) -> None:
        self.base_id = base_id
        self.staged_limit = staged_limit
        self.loaded: dict[str, EngineAdapter] = {}
        self._by_id: dict[int, EngineAdapter] = {}
        self._burnt: set[int] = set()

    def is_loaded(self, adapter: EngineAdapter) -> bool:
        """True when the very triple is loaded, False when it may be loaded; else raises Conflict or EngineBusy."""
        if adapter.engine_name == self.base_id:
            raise Conflict(f"{self.base_id} is the base: an adapter cannot have its name.", param="engine_name")
        if adapter.engine_id in self._burnt:
            raise Conflict(
                f"Engine id {adapter.engine_id} was burnt by a failed load: use a new one.", param="engine_id"
            )
        owner = self._by_id.get(adapter.engine_id, adapter)
        if owner != adapter:
            raise Conflict(
                f"Engine id {adapter.engine_id} belongs to {owner.engine_name} at {owner.path}, not to "
                f"{adapter.engine_name} at {adapter.path}.",
                param="engine_id",
            )
        present = self.loaded.get(adapter.engine_name)
        if present == adapter:
            return True
        if present is not None:
            raise Conflict(
                f"{adapter.engine_name} is loaded with id {present.engine_id} from {present.path}: unload it first.",
                param="engine_name",
            )
        if not self.staged_limit:
            raise Conflict(
                f"This engine serves {self.base_id} without LoRA: it takes no adapters.", param="engine_name"
            )
        if len(self.loaded) >= self.staged_limit:
            raise EngineBusy(f"{self.staged_limit} adapters are loaded, which is the limit: unload one first.")
        return False

    def record(self, adapter: EngineAdapter) -> None:
        self._by_id[adapter.engine_id] = adapter
        self.loaded[adapter.engine_name] = adapter

    def burn(self, adapter: EngineAdapter) -> None:
        self._burnt.add(adapter.engine_id)

    def forget(self, engine_name: str) -> EngineAdapter:
        """Take the name out; its id keeps standing for the triple. Raises ModelNotFound for an unknown name."""
        try:
            return self.loaded.pop(engine_name)
        except KeyError:
            raise ModelNotFound(f"No adapter {engine_name} is loaded.", param="engine_name") from None


def parse_load(body: Mapping[str, Any]) -> EngineAdapter:
    """The triple in a load call's body; raises InvalidRequest."""
    name, path, number = body.get("engine_name"), body.get("path"), body.get("engine_id")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("engine_name must be a string that is not empty.", param="engine_name")
    if not isinstance(path, str) or not Path(path).is_absolute():
        raise InvalidRequest(f"path must be an absolute path, not {path!r}.", param="path")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InvalidRequest(f"engine_id must be a whole number from 1, not {number!r}.", param="engine_id")
    return EngineAdapter(name, Path(path), number)


def parse_unload(body: Mapping[str, Any]) -> str:
    name = body.get("engine_name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("engine_name must be a string that is not empty.", param="engine_name")
    return name
