"""What the control calls make of an engine's own troubles."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from adapters.errors import EngineUnavailable
from server.engine.base import EngineAdapter, EngineCapacity, EngineUsage
from server.engine.control import Control, attach


class Worker:
    """Fails the way it is told to."""

    trouble: Exception | None = None

    async def add(self, adapter: EngineAdapter) -> None:
        if self.trouble is not None:
            raise self.trouble

    async def remove(self, adapter: EngineAdapter) -> None:
        await self.add(adapter)

    async def in_slots(self) -> set[int]:
        return set()

    async def usage(self) -> EngineUsage:
        return EngineUsage(0, 0, 0.0, 0, 0, 0)

    def capacity(self) -> EngineCapacity:
        return EngineCapacity(1, 4, 8, "float32", 128, "base", "test")


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def client(worker: Worker) -> TestClient:
    app, control = Starlette(), Control(worker)
    attach(app, lambda request: control)
    return TestClient(app)


def load(client: TestClient, number: int = 1) -> tuple[int, str]:
    body = {"engine_name": "a@1", "path": str(Path("/adapters/a")), "engine_id": number}
    answer = client.post("/hotshoe/load", json=body)
    return answer.status_code, answer.json().get("error", {}).get("code", "")


def test_an_engine_that_dies_while_it_loads_does_not_burn_the_id(client: TestClient, worker: Worker) -> None:
    worker.trouble = EngineUnavailable("gone")
    assert load(client) == (503, "engine_unavailable")
    worker.trouble = None
    assert load(client) == (200, "")


def test_an_adapter_that_fails_to_load_burns_it(client: TestClient, worker: Worker) -> None:
    worker.trouble = ValueError("wrong shape")
    assert load(client) == (500, "engine_failed")
    worker.trouble = None
    assert load(client) == (409, "conflict")
    assert load(client, 2) == (200, "")


def test_an_adapter_whose_weights_do_not_leave_is_forgotten_and_its_id_burnt(
    client: TestClient, worker: Worker
) -> None:
    load(client)
    worker.trouble = RuntimeError("still there")
    assert client.post("/hotshoe/unload", json={"engine_name": "a@1"}).status_code == 500
    worker.trouble = None
    assert client.get("/hotshoe/loaded").json() == {"adapters": []}
    assert load(client) == (409, "conflict")
