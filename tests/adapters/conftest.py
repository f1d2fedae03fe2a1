from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from adapters.export import ExportRequest
from adapters.publish import PublishContext
from adapters.registry import Registry
from adapters.store import BlobStore
from tests.fixtures.adapters import shape_only_base, write_adapter
from tests.fixtures.bases import tiny_qwen2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base of two layers that is just a config.json."""
    return shape_only_base(tmp_path_factory.mktemp("base") / "tiny-qwen2")


@pytest.fixture
def context(tmp_path: Path, tiny: BaseModel) -> Iterator[PublishContext]:
    """A fresh registry and store on disk."""
    home = tmp_path / "home"
    registry = Registry.open(home)
    yield PublishContext(registry, BlobStore(home / "blobs"), tiny, max_rank=64)
    registry.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A whole tiny model on disk."""
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "tiny-qwen2"))


@pytest.fixture
def request_for(base: BaseModel, tmp_path: Path) -> Callable[..., ExportRequest]:
    """Makes an order to merge a new adapter of the base, with the changes that are asked for."""

    def make(**changes: Any) -> ExportRequest:
        adapter = write_adapter(tmp_path / "adapter", base, rank=4)
        out = tmp_path / "outputs" / "out"
        request = ExportRequest(adapter, base, out, source="router@1", with_logits=False)
        return replace(request, **changes)

    return make
