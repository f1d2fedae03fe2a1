"""F18: a client that leaves, wherever its request stands just then, leaves no place, slot, quota or file behind."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import load_base
from server.limits import Limiter
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.service import Server, eventually, running

KEY = "a-key-of-the-leaving"
BACK_SECONDS = 3.0  # 1 s is the claim, and 0.05 s what it takes; a busy machine may be late
CHAT, TEXT = "/v1/chat/completions", "w " * 400
MULTIPART = "multipart/form-data; boundary=x"
LARGE_BYTES = 256 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "tiny-qwen2"))
    bounds: dict[str, Any] = {"slots": 1, "max_running": 1, "staged_limit": 4, "api_key": KEY}
    with running(base, tmp_path_factory.mktemp("left"), **bounds) as one:
        for name in ("first", "second"):
            one.pushed(name)
        one.http.put("/v1/tenants/default", json={"limits": {"concurrent_requests": 50}}).raise_for_status()
        yield one


@pytest.fixture(autouse=True)
def undisturbed(server: Server) -> Iterator[None]:
    before = held(server)
    yield
    script = server.script
    script.seconds_to_first_token = script.seconds_per_token = script.seconds_to_load = 0.0
    check_as(server, before)


@pytest.fixture(scope="module")
def large_file(server: Server) -> str:
    """A file whose bytes do not fit into the sockets' buffers."""
    made = server.http.post("/v1/files", files={"file": ("f.jsonl", b"x" * (64 << 20))}, data={"purpose": "evals"})
    return str(made.json()["id"])


@pytest.fixture(scope="module")
def large_export(server: Server) -> str:
    row = server.http.post("/v1/exports", json={"model": "first", "parity": False}).json()
    url = f"/v1/exports/{row['id']}"
    eventually(lambda: server.http.get(url).json()["status"] == "succeeded", 120)
    exports = server.services.exports
    folder = exports.results.place(server.services.registry.get_export("default", row["id"]).result).out
    with (folder / "large.bin").open("wb") as file:
        file.truncate(LARGE_BYTES)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["large.bin"] = {"size_bytes": LARGE_BYTES, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return url


def held(server: Server) -> dict[str, Any]:
    """All that a request may hold, as it is now."""
    services = server.services
    admission, limiter = services.door.admission, services.limiter
    assert isinstance(limiter, Limiter)
    return {
        "places": admission.running,
        "waiting": admission.waiting,
        "adapters": sum(row.references for row in services.residents.rows()),
        "quota": sum(account.running for account in limiter._accounts.values()),
        "at the engine": server.call(server.engine.usage()).running,
        "files": sorted(open_files(services.settings.home)),
        "staged": sorted(str(path) for path in services.settings.home.rglob("*staging*/*")),
        "bulk": services.bulk._value,
        "requests": len(server._server.server_state.tasks),
    }


def open_files(home: Path) -> Iterator[str]:
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        if target.startswith(str(home)) and "registry" not in target:
            yield target


def asked(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> socket.socket:
    """A request on a socket of its own, sent as far as `body` goes; what comes back is not read."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    one.connect(("127.0.0.1", server.port))
    told = {"host": "localhost", "authorization": f"Bearer {KEY}", "content_length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in told.items())
    one.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
    return one


def chat(server: Server, model: str, stream: bool = False) -> socket.socket:
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": TEXT}]}
    return asked(server, "POST", CHAT, json.dumps(body).encode(), content_type="application/json")


def check_as(server: Server, before: dict[str, Any]) -> None:
    """All is as it was."""
    deadline = time.monotonic() + BACK_SECONDS
    while held(server) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held(server) == before


def leave(server: Server, one: socket.socket, is_there: Callable[[], bool], before: dict[str, Any]) -> None:
    """Wait until the request is where it shall be, leave, and find everything as it was."""
    with one:
        eventually(is_there)
    check_as(server, before)


@pytest.mark.parametrize("model", ["tiny-qwen2", "first"])
@pytest.mark.parametrize("stream", [True, False])
def test_f18_at_the_engine(server: Server, model: str, stream: bool) -> None:
    server.script.seconds_per_token = 0.05
    server.script.seconds_to_first_token = 0.0 if stream else 30.0
    before = held(server)
    leave(server, chat(server, model, stream), lambda: held(server)["places"] == 1, before)


def test_f18_while_it_waits_for_a_place(server: Server) -> None:
    server.script.seconds_to_first_token = 30.0
    start = held(server)
    with chat(server, "first") as running_one:
        eventually(lambda: held(server)["places"] == 1)
        before = held(server)
        for model in ("first", "second", "tiny-qwen2"):  # `second` also waits for the one slot
            leave(server, chat(server, model), lambda: held(server)["waiting"] == 1, before)
        assert running_one.fileno() > 0
    check_as(server, start)


def test_f18_while_its_adapter_is_loaded(server: Server) -> None:
    """The load goes on, for whoever comes next; the reference does not stay."""
    (version,) = [one for one in server.services.registry.all_versions("default") if one.name == "first"]
    server.call(server.services.residents.drop(version))
    server.script.seconds_to_load = 0.5
    before = held(server)
    leave(server, chat(server, "first"), lambda: held(server)["quota"] == 1, before)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (CHAT, "application/json"),
        ("/v1/keys", "application/json"),
        ("/v1/adapters", MULTIPART),
        ("/v1/files", MULTIPART),
    ],
)
def test_f18_in_the_middle_of_its_body(server: Server, path: str, kind: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n' % (
        b"weights" if path == "/v1/adapters" else b"file"
    )
    body = (part if kind == MULTIPART else b"") + b" " * 300_000
    before = held(server)
    one = asked(server, "POST", path, body, content_length="8000000", content_type=kind)
    leave(server, one, lambda: held(server)["requests"] > before["requests"], before)


def test_f18_in_the_middle_of_a_part(server: Server) -> None:
    begun = server.http.post(
        "/v1/uploads", json={"purpose": "evals", "filename": "f", "bytes": 8_000_000, "mime_type": "text/plain"}
    ).json()
    before = held(server)
    body = b'--x\r\nContent-Disposition: form-data; name="data"; filename="f"\r\n\r\n' + b" " * 300_000
    path = f"/v1/uploads/{begun['id']}/parts"
    one = asked(server, "POST", path, body, content_length="8000000", content_type=MULTIPART)
    leave(server, one, lambda: held(server)["requests"] > before["requests"], before)


def test_f18_in_the_middle_of_a_download(server: Server, large_file: str, large_export: str) -> None:
    before = held(server)
    for path in (
        f"/v1/files/{large_file}/content",
        f"{large_export}/content",
        f"{large_export}/content?file=large.bin",
    ):
        with asked(server, "GET", path) as one:
            assert one.recv(1000).startswith(b"HTTP/1.1 200")
            eventually(lambda: bool(held(server)["files"]))
        check_as(server, before)


def test_f18_while_it_waits_for_a_proof(server: Server) -> None:
    before = held(server)
    server.script.seconds_to_load = 2.0
    folder = server.adapter()
    files = {"config": (folder / "adapter_config.json"), "weights": (folder / "adapter_model.safetensors")}
    parts = {name: path.read_bytes() for name, path in files.items()}
    made = server.http.post("/v1/adapters", data={"name": "waited"}, files=parts)
    assert made.json()["status"] == "quarantined"
    one = asked(server, "GET", "/v1/adapters/waited/versions/1?wait=60")
    leave(server, one, lambda: held(server)["requests"] > before["requests"], {**before})
    eventually(lambda: server.http.get("/v1/adapters/waited/versions/1").json()["status"] == "ready")


def test_f18_many_at_once_in_any_state(server: Server) -> None:
    server.script.seconds_per_token = 0.02
    before = held(server)
    with ExitStack() as stack:
        for number in range(24):
            model = ("tiny-qwen2", "first", "second")[number % 3]
            stack.enter_context(chat(server, model, stream=number % 2 == 0))
        eventually(lambda: held(server)["quota"] == 24)
    check_as(server, before)
    server.script.seconds_per_token = 0.0
    assert server.say("second").status_code == 200
