"""The shipped deployment files say what the code does: paths, ports, settings and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings
from tests.fixtures.dockerfile import Instruction, context_files, is_ignored, parse, stage

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = parse((ROOT / "Dockerfile").read_text())
TARGETS = ("cpu", "gpu")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
BIN = Path(sys.executable).parent


def rest(target: str, word: str) -> list[str]:
    return [one.rest for one in stage(DOCKERFILE, target) if one.word == word]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_without_rights_and_writes_to_one_volume(target: str) -> None:
    assert rest(target, "USER") == ["10001"] and rest(target, "VOLUME") == ["/state"]
    made = rest(target, "RUN")[-1]
    assert "useradd --uid 10001" in made and "install --directory --owner hotshoe --mode 0700 /state" in made
    places = dict(word.partition("=")[::2] for text in rest(target, "ENV") for word in text.split())
    written = {name: value for name, value in places.items() if name.endswith(("HOME", "CACHE_DIR"))}
    assert written["HOTSHOE_HOME"] == "/state/hotshoe" and len(written) >= 3
    assert all(value.startswith("/state") for value in written.values())


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_installed_is_a_layer_before_the_code(target: str) -> None:
    words = [(one.word, one.rest) for one in stage(DOCKERFILE, target)]
    code = words.index(("COPY", ". ."))
    installed = [i for i, (word, text) in enumerate(words) if word == "RUN" and "requirements/" in text and i < code]
    assert installed


def test_the_gpu_image_replaces_nothing_of_vllms() -> None:
    runs = rest("gpu", "RUN")
    assert all("--no-deps" in text for text in runs) and "--require-hashes" in runs[0]
    assert "vllm/vllm-openai:v" in next(one.rest for one in DOCKERFILE if one.word == "ARG")


@pytest.mark.parametrize("target", TARGETS)
def test_no_download_is_left_in_a_layer(target: str) -> None:
    for text in rest(target, "RUN"):
        assert "pip install" not in text or "--no-cache-dir" in text
        assert "install.py" not in text or "PIP_NO_CACHE_DIR=1" in text
        assert "apt-get" not in text or "rm -rf /var/lib/apt/lists/*" in text


@pytest.mark.parametrize("target", TARGETS)
def test_the_healthcheck_asks_the_port_that_the_command_listens_on(target: str) -> None:
    assert "http://127.0.0.1:8000/ready" in rest(target, "HEALTHCHECK")[0]
    assert rest(target, "CMD") == ['["serve", "--host", "0.0.0.0", "--port", "8000"]']
    assert COMPOSE["services"]["hotshoe"]["ports"] == ["127.0.0.1:8000:8000"]


def test_only_what_images_are_made_of_goes_into_a_build() -> None:
    files = set(context_files(ROOT, (ROOT / ".dockerignore").read_text()))
    assert {path.parts[0] for path in files} == {
        *("adapters", "server", "training", "requirements"),
        *("pyproject.toml", "README.md", "LICENSE"),
    }
    assert Path("server/vllm_plugin/routes.py") in files and Path("adapters/chatml.jinja") in files
    assert not any(path.suffix == ".pyc" for path in files)


def test_a_secret_in_the_checkout_does_not_get_into_a_build() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for path in ("deploy/secrets/hf_token", ".env", ".git/config", "server/__pycache__/app.pyc", "notes/server"):
        assert is_ignored(Path(path), rules)
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_an_instruction_that_is_not_known_is_an_error_and_no_gap() -> None:
    with pytest.raises(ValueError, match="line 2: ADD"):
        parse("FROM a\nADD b c\n")
    assert parse("# a\nRUN a \\\n  # why\n  && b\n") == [Instruction("RUN", "a && b", 2)]


def test_compose_runs_it_read_only_without_rights_and_on_this_machine_only() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert COMPOSE["services"]["hotshoe"]["volumes"] == ["state:/state"]
    assert COMPOSE["services"]["hotshoe"]["build"]["target"] == "cpu"
    assert GPU["services"]["hotshoe"]["build"]["target"] == "gpu"


def test_a_token_is_a_file_and_in_no_environment() -> None:
    for document in (COMPOSE, GPU):
        for service in document["services"].values():
            assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"} & set(service.get("environment", {}))
        for secret in document["secrets"].values():
            assert secret["file"].startswith("./secrets/")
    gpu = GPU["services"]["hotshoe"]
    assert gpu["environment"]["HF_TOKEN_PATH"] == f"/run/secrets/{gpu['secrets'][0]}"


def test_prometheus_reads_its_key_from_the_secret_and_scrapes_the_service() -> None:
    job = PROMETHEUS["scrape_configs"][0]
    service = COMPOSE["services"]["prometheus"]
    assert job["authorization"] == {"credentials_file": f"/run/secrets/{service['secrets'][0]}"}
    assert job["static_configs"] == [{"targets": ["hotshoe:8000"]}] and "hotshoe" in COMPOSE["services"]
    mounted = [volume.split(":")[1] for volume in service["volumes"]]
    assert "/etc/prometheus/prometheus.yml" in mounted and set(PROMETHEUS["rule_files"]) <= set(mounted)
    assert all((DEPLOY / volume.split(":")[0]).is_file() for volume in service["volumes"] if volume.startswith("./"))


def test_every_hotshoe_variable_in_the_files_is_one_that_the_code_reads() -> None:
    known = {f"HOTSHOE_{name.upper()}" for name in Settings.model_fields} | {"HOTSHOE_CACHE", "HOTSHOE_URL"}
    for path in (ROOT / "Dockerfile", *DEPLOY.glob("*.yaml"), DEPLOY / "README.md"):
        assert set(re.findall(r"\bHOTSHOE_[A-Z_]+\b", path.read_text())) <= known, path


def test_the_grace_of_the_container_outlasts_the_servers() -> None:
    stop = int(COMPOSE["services"]["hotshoe"]["stop_grace_period"].rstrip("s"))
    assert stop >= Settings.model_fields["grace_seconds"].default + 10


def lint_compose(path: Path) -> int:
    command = [str(BIN / "check-jsonschema"), "--quiet", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


def test_the_linters_of_make_check_pass_what_is_shipped_and_see_a_fault(tmp_path: Path) -> None:
    check = (ROOT / "Makefile").read_text()
    assert "hadolint Dockerfile" in check and "deploy/compose.yaml deploy/compose.gpu.yaml" in check
    assert lint_compose(DEPLOY / "compose.yaml") == 0 and lint_compose(DEPLOY / "compose.gpu.yaml") == 0
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    assert lint_compose(wrong) == 1
    wrong.write_text((DEPLOY / "compose.yaml").read_text() + "\nvolumes:\n  twice:\n")
    assert lint_compose(wrong) == 1
    hadolint = [str(BIN / "hadolint"), "-"]
    text = (ROOT / "Dockerfile").read_text()
    planted = text.replace("python:3.11-slim-bookworm", "python")
    for document, status in ((text, 0), (planted, 1)):
        done = subprocess.run(hadolint, input=document, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, done.stdout


def test_a_package_that_the_image_lacks_ends_its_build(tmp_path: Path) -> None:
    script = ROOT / "requirements" / "satisfied.py"
    (tmp_path / "good.in").write_text("# a note\npydantic>=2.12\nfastapi[standard]<1\n")
    (tmp_path / "bad.in").write_text("pydantic\nno-such-package==1\n")
    for name, status in (("good.in", 0), ("bad.in", 1)):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / name)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == status and ("no-such-package" in done.stderr) == bool(status)
