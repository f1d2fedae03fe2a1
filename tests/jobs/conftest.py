"""A server on a tiny base that really trains, which a module's tests of jobs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters.bases import load_base
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.service import Server, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("jobs")
    with running(load_base(tiny_qwen2(home / "base")), home) as one:
        yield one
