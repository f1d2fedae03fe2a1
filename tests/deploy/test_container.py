"""The image for CPUs, built and run as compose runs it, where no container engine is: see tests/fixtures/container.py.

Ten minutes and 4 GB of disk. The minimal Debian is kept in build/, and `make clean` takes it away.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.embedded import open_base
from tests.fixtures.adapters import write_adapter
from tests.fixtures.container import Container, Image, debian, why_not
from tests.fixtures.dockerfile import parse, stage

ROOT = Path(__file__).resolve().parent.parent.parent
USER = 10001
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
ASK = """
import json, sys, urllib.request as u
body = {"model": sys.argv[2], "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
headers = {"authorization": "Bearer " + sys.argv[1], "content-type": "application/json"}
request = u.Request("http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(), headers)
print(u.urlopen(request, timeout=100).read().decode())
"""
METRICS = """
import sys, urllib.request as u
request = u.Request("http://127.0.0.1:8000/metrics", headers={"authorization": "Bearer " + sys.argv[1]})
print(u.urlopen(request, timeout=30).read().decode())
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Every instruction of the target cpu, carried out."""
    built = Image(debian(ROOT / "build" / "rehearsal" / "debian"), tmp_path_factory.mktemp("image"))
    built.build(stage(parse((ROOT / "Dockerfile").read_text()), "cpu"), ROOT)
    return built


@pytest.fixture
def container(image: Image, tmp_path: Path) -> Iterator[Container]:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    os.chown(state, USER, USER)
    made = Container(image, state, {"HF_TOKEN_PATH": "/state/hf_token"})
    yield made
    made.kill()


def test_layers_keep_no_download_and_nothing_of_the_checkout(image: Image) -> None:
    files = {str(path) for path in image.layer_files()}
    assert "opt/hotshoe/server/app.py" in files
    assert "opt/hotshoe-cache/bases/smollm2-135m-instruct/model.safetensors" in files
    assert not [path for path in files if path.startswith(("state/", "root/.cache/", "var/lib/apt/lists/deb"))]
    assert not [
        path for path in files if path.startswith(("opt/hotshoe/tests", "opt/hotshoe/.git", "opt/hotshoe/deploy"))
    ]
    assert not [path for path in files if "/site-packages/pytest/" in path or "/site-packages/mypy/" in path]


def test_a_server_without_a_key_does_not_start(container: Container) -> None:
    assert container.run(container.image.command, 120) == 1
    assert "no API key is set" in container.log.read_text()


def test_it_serves_as_process_1_without_rights_or_network_on_a_read_only_root(container: Container) -> None:
    (container.state / "hf_token").write_text("hf_canary\n")
    write_adapter(container.state / "adapter", open_base("embedded"), rank=8, seed=7)
    admin, metrics = make_key(container, "admin"), make_key(container, "metrics")
    container.start()
    container.wait_healthy(600)

    inside = container.execute(["sh", "-c", "id -u; cat /proc/1/cmdline; grep Cap /proc/1/status; touch /x /opt/x"])
    assert inside.stdout.splitlines()[0] == str(USER) and "serve" in inside.stdout
    assert not [line for line in inside.stdout.splitlines() if line.startswith("Cap") and not line.endswith("0" * 16)]
    assert inside.stderr.count("Read-only file system") == 2

    push = [
        "env",
        f"HOTSHOE_API_KEY={admin}",
        "hotshoe",
        "push",
        "/state/adapter",
        "--name",
        "router",
        "--base-is",
        "served",
    ]
    pushed = container.execute(push, 300)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    for model, answers in (("router", "router@1"), ("smollm2-135m-instruct", "smollm2-135m-instruct")):
        asked = container.execute(["python", "-c", ASK, admin, model], 120)
        assert json.loads(asked.stdout)["model"] == answers, asked.stderr
    seen = container.execute(["python", "-c", METRICS, metrics]).stdout
    assert "hotshoe_engine_ready 1.0" in seen

    with_file = container.execute(["sh", "-c", "grep -l HF_TOKEN_PATH /proc/[0-9]*/environ"]).stdout.split()
    assert "/proc/1/environ" in with_file and not engine_processes(container) & set(with_file)

    assert container.stop(signal.SIGTERM) == 0
    logs = container.log.read_text() + (container.state / "hotshoe" / "engine.log").read_text()
    assert "hf_canary" not in logs and admin not in logs.split("It is shown this once only.")[-1]
    assert sorted(path.name for path in container.state.iterdir()) == ["adapter", "cache", "hf_token", "hotshoe"]


def make_key(container: Container, scope: str) -> str:
    """A key made before the first start, as the README makes it."""
    assert container.run(["keys", "create", "--scope", scope]) == 0
    return [line for line in container.log.read_text().splitlines() if line.startswith("hs-")][-1]


def engine_processes(container: Container) -> set[str]:
    """The environments of the engine's processes."""
    found = container.execute(["sh", "-c", "grep -l VLLM_PLUGINS /proc/[0-9]*/environ"]).stdout.split()
    assert found
    return set(found)
