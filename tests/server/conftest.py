"""Servers over the scripted engine: one that a module's tests share, and a maker for those that need their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel
from tests.fixtures.service import Server, running


@pytest.fixture(scope="module")
def server(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("server")) as one:
        yield one


@pytest.fixture
def make_server(tiny_base: BaseModel, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server with settings of one's own; stopped when the test ends."""
    with ExitStack() as stack:

        def make(base: BaseModel = tiny_base, **settings: Any) -> Server:
            return stack.enter_context(running(base, tmp_path, **settings))

        yield make
