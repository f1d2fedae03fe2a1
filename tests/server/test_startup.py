"""Which engines keep the model in the core's process: one worker, no bound threads, and nobody asked otherwise."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from server.vllm_plugin import startup


def platform() -> Any:
    """A platform class that does to the executor what vLLM's for a CPU does."""

    class Platform:
        @classmethod
        def check_and_update_config(cls, config: Any) -> None:
            if config.parallel_config.distributed_executor_backend == "uni":
                config.parallel_config.distributed_executor_backend = "mp"

    return Platform


def backend(of: Any, asked: str | None, world_size: int = 1) -> str | None:
    parallel = SimpleNamespace(distributed_executor_backend=asked, world_size=world_size)
    of.check_and_update_config(SimpleNamespace(parallel_config=parallel))
    found: str | None = parallel.distributed_executor_backend
    return found


def test_one_worker_stays_in_the_core_and_several_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.BINDING, startup.UNBOUND)
    monkeypatch.delenv(startup.SWITCH, raising=False)
    ours = platform()
    assert backend(ours, "uni") == "mp"
    startup.install(ours)
    startup.install(ours)
    assert backend(ours, "uni") == "uni"
    assert (backend(ours, "mp"), backend(ours, "mp", 2), backend(ours, None)) == ("mp", "mp", None)
    assert backend(ours, "uni", 2) == "mp"


@pytest.mark.parametrize(("binding", "word"), [("0-3", "0"), ("auto", ""), (startup.UNBOUND, "1")])
def test_bound_threads_or_the_operators_word_leave_it_as_it_is(
    binding: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(startup.BINDING, binding)
    monkeypatch.setenv(startup.SWITCH, word)
    ours = platform()
    startup.install(ours)
    assert backend(ours, "uni") == "mp"


def test_another_word_than_0_and_1_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.SWITCH, "yes")
    with pytest.raises(ValueError, match="takes 0 or 1"):
        startup.install(platform())


def test_the_vllm_that_is_installed_still_parts_them() -> None:
    """When it does no longer, this module has nothing to do."""
    from vllm.platforms.cpu import CpuPlatform

    source = inspect.getsource(getattr(CpuPlatform, "hotshoe_checked", CpuPlatform.check_and_update_config))
    assert 'distributed_executor_backend = "mp"' in source
