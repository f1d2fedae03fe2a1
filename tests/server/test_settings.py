from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import ConfigInvalid
from server.app import slots_of
from server.engine.vllm_flags import is_cpu_build
from server.settings import Settings, default_home, is_loopback, load_settings
from server.vllm_plugin.kernel_build import find_compiler


@pytest.fixture(autouse=True)
def no_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"HOTSHOE_{name.upper()}", raising=False)


def test_a_flag_wins_over_the_environment_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().port == 8000 and load_settings().slots is None
    monkeypatch.setenv("HOTSHOE_SLOTS", "3")
    assert load_settings(slots=None).slots == 3
    assert load_settings(slots=5).slots == 5
    monkeypatch.setenv("HOTSHOE_ENGINE_ARGS", '["--max-model-len", "512"]')
    assert load_settings().engine_args == ("--max-model-len", "512")


def test_an_empty_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSHOE_API_KEY", "")
    assert load_settings().is_keyless


def test_state_lies_in_the_users_data_folder_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert str(default_home()) == "/somewhere/hotshoe"
    monkeypatch.setenv("HOTSHOE_HOME", "/elsewhere")
    assert str(load_settings().home) == "/elsewhere"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])  # noqa: S104 - refused is the point
def test_without_a_key_only_loopback_is_allowed(host: str) -> None:
    with pytest.raises(ConfigInvalid, match="--api-key"):
        load_settings(host=host)
    assert load_settings(host=host, api_key="long-enough").host == host


@pytest.mark.parametrize(
    ("flags", "param"),
    [
        ({"port": 99_999}, "port"),
        ({"engine": "magic"}, "engine"),
        ({"api_key": "short"}, "api_key"),
        ({"tls_cert": "/x"}, "tls_cert"),
        ({"slots": 8, "staged_limit": 4}, "staged_limit"),
        ({"slots": 0}, "slots"),
    ],
)
def test_a_setting_that_cannot_be_is_named(flags: dict[str, object], param: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(**flags)
    assert caught.value.param == param


def test_a_key_is_never_printed() -> None:
    assert "a-secret-key" not in repr(load_settings(api_key="a-secret-key"))


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("localhost", True), ("127.0.0.9", True), ("::1", True), ("10.0.0.1", False), ("localhost.evil", False)],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local


def test_slots_that_take_no_memory_are_as_many_as_may_be_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not is_cpu_build() or find_compiler() is None:
        pytest.skip("slots take memory here: there is no kernel for them")
    monkeypatch.delenv("HOTSHOE_LORA_KERNEL", raising=False)
    assert slots_of(load_settings()) == 64 and slots_of(load_settings(staged_limit=5)) == 5
    assert slots_of(load_settings(slots=3)) == 3
    assert slots_of(load_settings(engine="scripted")) == 8, "it has no kernel"
    assert slots_of(load_settings(engine="scripted", staged_limit=5)) == 5
    monkeypatch.setenv("HOTSHOE_LORA_KERNEL", "torch")
    assert slots_of(load_settings()) == 8
    monkeypatch.delenv("HOTSHOE_LORA_KERNEL")
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("HOTSHOE_CACHE", str(tmp_path))
    assert slots_of(load_settings()) == 8, "no compiler, and none that was built before"


def test_a_tenants_weight_has_a_range_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(tenant_weights={"acme": 3}).tenant_weights == {"acme": 3.0}
    for wrong in ('{"acme": 0}', '{"acme": 1000}', '{"a b": 1}', '["acme"]'):
        monkeypatch.setenv("HOTSHOE_TENANT_WEIGHTS", wrong)
        with pytest.raises(ConfigInvalid, match="tenant_weights"):
            load_settings()
