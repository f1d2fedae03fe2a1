"""The shipped deployment files say what the code does: paths, ports, settings and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


def test_the_image_runs_without_rights_and_keeps_its_state_on_one_volume() -> None:
    service = COMPOSE["services"]["hotshoe"]
    assert "USER hotshoe" in DOCKERFILE and "VOLUME /state" in DOCKERFILE
    assert service["volumes"] == ["state:/state"] and "state" in COMPOSE["volumes"]
    assert "HOTSHOE_HOME=/state" in DOCKERFILE


def test_compose_never_starts_a_reachable_server_without_a_key() -> None:
    service = COMPOSE["services"]["hotshoe"]
    assert service["environment"]["HOTSHOE_API_KEY"].startswith("${HOTSHOE_API_KEY:?")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_every_hotshoe_variable_in_the_files_is_one_that_the_code_reads() -> None:
    known = {f"HOTSHOE_{name.upper()}" for name in Settings.model_fields} | {"HOTSHOE_CACHE"}
    for text in (DOCKERFILE, (ROOT / "deploy" / "compose.yaml").read_text()):
        assert set(re.findall(r"\bHOTSHOE_[A-Z]+\b", text)) <= known


def test_the_grace_of_the_container_outlasts_the_servers() -> None:
    stop = int(COMPOSE["services"]["hotshoe"]["stop_grace_period"].rstrip("s"))
    assert stop >= Settings.model_fields["grace_seconds"].default + 10


def test_every_make_target_that_the_image_uses_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^RUN make ([a-z-]+)", DOCKERFILE, re.MULTILINE))
    assert used and used <= targets
