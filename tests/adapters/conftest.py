from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from adapters.publish import PublishContext
from adapters.registry import Registry
from adapters.store import BlobStore
from tests.fixtures.adapters import shape_only_base


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
