from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.engine.scripted import ScriptedEngine
from server.engine.scripted_models import Script
from tests.conftest import engine_options
from tests.fixtures.adapters import shape_only_base
from tests.fixtures.engines import EngineRig


@pytest.fixture(scope="session")
def scripted_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    scratch = tmp_path_factory.mktemp("scripted")
    base = shape_only_base(scratch / "tiny-base")
    script = Script(seconds_per_token=0.005)  # slow enough to be looked at while it streams
    rig = EngineRig(ScriptedEngine(engine_options(base, scratch / "run"), script), base, scratch)
    try:
        rig.call(rig.engine.start())
        yield rig
    finally:
        rig.close()


@pytest.fixture(params=["scripted", pytest.param("vllm", marks=pytest.mark.model)])
def rig(request: pytest.FixtureRequest) -> Iterator[EngineRig]:
    """The contract holds for both engines; each test finds them with no adapter loaded."""
    found: EngineRig = request.getfixturevalue(f"{request.param}_engine")
    yield found
    found.unload_all()
