"""A server on a tiny base with an adapter pushed, which a module's tests of exports share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters.bases import BaseModel, load_base
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.service import Server, running


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "tiny-qwen2"))


@pytest.fixture(scope="module")
def server(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(base, tmp_path_factory.mktemp("server")) as server:
        server.pushed("router")
        yield server
