"""Servers over the scripted engine, open and with a key, that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters.bases import BaseModel
from tests.fixtures.service import Server, running

KEY = "a-key-of-the-surface"


@pytest.fixture(scope="module")
def server(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("open")) as one:
        yield one


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("keyed"), api_key=KEY) as one:
        yield one
