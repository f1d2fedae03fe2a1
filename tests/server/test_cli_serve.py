"""The command itself, as processes: serve, its signals and lock, and the verbs that speak to it."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.bases import BaseModel
from bench.served import free_port
from tests.fixtures.adapters import write_adapter
from tests.fixtures.processes import HOTSHOE, Served, environment

VERBS = ("serve", "doctor", "push", "ls", "show", "promote", "rollback", "retire", "chat")


def scripted(base: BaseModel, home: Path, **env: str) -> Served:
    return Served(home, "--engine", "scripted", "--base", str(base.folder), **env)


@pytest.fixture(scope="module")
def served(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = scripted(tiny_base, tmp_path_factory.mktemp("served") / "home", HOTSHOE_LOG_LEVEL="debug")
    yield one
    one.end()


def test_it_prints_where_it_is_and_what_its_engine_runs_with(served: Served) -> None:
    printed = served.out.read_text()
    assert f"hotshoe serves tiny on {served.url}/v1" in printed
    assert "engine  scripted" in printed and str(served.home) in printed
    assert "ready, with 0 adapters loaded" in printed


def test_push_sends_what_is_allowed_says_what_it_left_out_and_waits(
    served: Served, tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "mine", tiny_base, seed=1001)
    for name in ("tokenizer.json", "training_args.bin", "README.md"):
        (folder / name).write_text("x")
    done = served.run("push", str(folder), "--name", "mine")
    assert done.returncode == 0, done.stderr
    assert "left out: README.md, tokenizer.json, training_args.bin\n" in done.stdout
    assert "mine@1 is ready and named by stable" in done.stdout
    again = json.loads(served.verb("push", str(folder), "--name", "mine", "--json").stdout)
    assert (again["id"], again["status"]) == ("mine@1", "ready")
    assert again["left_out"] == ["README.md", "tokenizer.json", "training_args.bin"]


def test_promote_rollback_show_retire_and_ls_speak_json(served: Served, tiny_base: BaseModel, tmp_path: Path) -> None:
    for seed in (2001, 2002):
        folder = write_adapter(tmp_path / str(seed), tiny_base, seed=seed)
        flags = ["--promote"] if seed == 2002 else []
        row = json.loads(served.verb("push", str(folder), "--name", "two", *flags, "--json").stdout)
    assert (row["version"], row["aliases"]) == (2, ["stable"])
    assert json.loads(served.verb("rollback", "two", "--json").stdout)["version"] == 1
    assert served.verb("promote", "two@2", "--if-generation", "1").returncode == 1
    assert "two is two@2 (generation 4)" in served.verb("promote", "two@2").stdout
    assert json.loads(served.verb("show", "two", "--json").stdout)["stable"] == 2
    assert json.loads(served.verb("show", "two@1", "--json").stdout)["status"] == "ready"
    assert served.verb("retire", "two@2").returncode == 1
    assert json.loads(served.verb("retire", "two@1", "--json").stdout)["status"] == "retired"
    assert "two@2" in served.verb("ls").stdout
    assert json.loads(served.verb("ls", "--json").stdout)[0]["id"] == "tiny"


def test_promote_with_a_share_tries_a_version_and_rollback_ends_it(
    served: Served, tiny_base: BaseModel, tmp_path: Path
) -> None:
    for seed in (3001, 3002):
        folder = write_adapter(tmp_path / str(seed), tiny_base, seed=seed)
        assert served.verb("push", str(folder), "--name", "tried").returncode == 0
    done = served.verb("promote", "tried@2", "--share", "5%")
    assert done.stdout == "tried is tried@1, 5% to tried@2 (generation 2)\n", done.stderr
    shown = served.verb("show", "tried").stdout
    assert "alias stable: tried@1, 5% to tried@2 (generation 2)\n" in shown
    assert "tried@2: ready, resident and given 5% of stable\n" in shown
    assert "stable (5%)" in served.verb("ls").stdout
    assert json.loads(served.verb("show", "tried@2", "--json").stdout)["candidate_of"] == {"stable": 0.05}
    grown = json.loads(served.verb("promote", "tried@2", "--share", "0.125", "--if-generation", "2", "--json").stdout)
    assert (grown["candidate"], grown["share"], grown["generation"]) == (2, 0.125, 3)
    for share in ("5", "0", "100%", "-1%", "five", "5%5", "nan"):
        assert "5% or 0.05" in served.verb("promote", "tried@2", "--share", share).stderr, share
    assert served.verb("rollback", "tried").returncode == 1, "it names its first version"
    ended = served.verb("rollback", "tried", "--candidate")
    assert ended.stdout == "tried is tried@1 (generation 4)\n"


def test_chat_streams_or_prints_json(served: Served) -> None:
    assert served.verb("chat", "tiny", "hello there").stdout == "tiny heard: hello there\n"
    answer = json.loads(served.verb("chat", "tiny", "hello", "--json").stdout)
    assert answer["model"] == "tiny"


def test_exit_codes_tell_refused_from_failed_from_unreachable(
    served: Served, tiny_base: BaseModel, tmp_path: Path
) -> None:
    idle = write_adapter(tmp_path / "idle", tiny_base, fill=(1.0, 0.0))
    rejected = served.verb("push", str(idle), "--name", "idle", "--json")
    assert rejected.returncode == 3
    assert json.loads(rejected.stdout)["error"]["problems"][0]["code"] == "no_effect"
    assert served.verb("push", str(tmp_path), "--name", "empty").returncode == 3
    assert served.verb("show", "nobody").returncode == 1
    assert served.verb("promote", "nobody").returncode == 1
    assert served.verb("chat").returncode == 2
    away = served.verb("ls", HOTSHOE_URL=f"http://127.0.0.1:{free_port()}")
    assert away.returncode == 4 and "HOTSHOE_URL" in away.stderr


def test_a_second_server_on_the_same_state_refuses_to_start_and_so_does_doctor(
    served: Served, tiny_base: BaseModel
) -> None:
    words = ("serve", "--engine", "scripted", "--base", str(tiny_base.folder), "--port", str(free_port()))
    second = served.run(*words)
    assert second.returncode == 1 and "already_running" in second.stderr
    assert str(served.process.pid) in second.stderr
    assert served.run("doctor").returncode == 1


def test_a_port_that_is_taken_is_one_sentence(served: Served, tiny_base: BaseModel, tmp_path: Path) -> None:
    words = ("serve", "--engine", "scripted", "--base", str(tiny_base.folder), "--port", str(served.port))
    taken = served.run(*words, HOTSHOE_HOME=str(tmp_path / "other"))
    assert taken.returncode == 1 and "--port" in taken.stderr and "Traceback" not in taken.stderr


def test_without_a_key_only_loopback_is_served(served: Served, tmp_path: Path) -> None:
    refused = served.run("serve", "--host", "::", HOTSHOE_HOME=str(tmp_path / "other"))
    assert refused.returncode == 1 and "--api-key" in refused.stderr


def test_s4_prompts_answers_and_keys_are_in_no_log_and_no_metric(tiny_base: BaseModel, tmp_path: Path) -> None:
    key = "canary-key-of-the-test"
    one = scripted(tiny_base, tmp_path / "home", HOTSHOE_LOG_LEVEL="debug", HOTSHOE_API_KEY=key)
    try:
        folder = write_adapter(tmp_path / "secret", tiny_base, seed=77)
        (folder / "card.json").write_text('{"note": "a canary in the card"}')
        assert one.verb("push", str(folder), "--name", "logged", HOTSHOE_API_KEY=key).returncode == 0
        assert one.verb("push", str(folder), "--name", "logged").returncode == 1
        assert one.verb("chat", "logged", "a canary in the stream", HOTSHOE_API_KEY=key).returncode == 0
        with httpx.Client(base_url=one.url, headers={"authorization": f"Bearer {key}"}) as http:
            http.post("/v1/chat/completions", content=b'{"model": "a canary in the body')
            http.post("/v1/completions", json={"model": "canary", "prompt": "a canary in the prompt"})
            http.get("/v1/models/a-canary-in-the-path")
            http.post(
                "/v1/adapters", content=b"canary", headers={"content-type": "multipart/form-data; boundary=canary"}
            )
            metrics = http.get("/metrics").text
    finally:
        assert one.stop() == 0
    logged = one.err.read_text()
    assert '"route": "/v1/models/{model}"' in logged
    assert all(json.loads(line) for line in logged.splitlines())
    for text in (
        logged,
        one.out.read_text(),
        metrics,
        (tmp_path / "home" / "engine.log").read_text() if (tmp_path / "home" / "engine.log").exists() else "",
    ):
        assert "canary" not in text


def test_f19_sigterm_lets_running_answers_end_and_leaves_with_0(tiny_base: BaseModel, tmp_path: Path) -> None:
    one = scripted(tiny_base, tmp_path / "home")
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "w " * 300}]}
    with httpx.stream("POST", f"{one.url}/v1/chat/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        one.process.send_signal(signal.SIGTERM)
        assert list(lines)[-2] == "data: [DONE]"
    assert one.process.wait(30) == 0
    assert json.loads(one.run("doctor", "--json").stdout)["is_sound"]
    log = one.err.read_text()
    assert "Traceback" not in log


@pytest.mark.parametrize("home", ["home", "h" * 120], ids=["short path", "long path"])
def test_sigint_leaves_with_130_and_no_socket_folder_stays(tiny_base: BaseModel, tmp_path: Path, home: str) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    one = scripted(tiny_base, tmp_path / home, TMPDIR=str(scratch))
    assert len([*scratch.iterdir(), *(tmp_path / home).glob("run")]) == 1
    assert one.stop(signal.SIGINT) == 130
    assert [*scratch.iterdir(), *(tmp_path / home).glob("run")] == []


def test_after_a_kill_the_state_is_free_and_sound(tiny_base: BaseModel, tmp_path: Path) -> None:
    one = scripted(tiny_base, tmp_path / "home")
    assert one.stop(signal.SIGKILL) == -signal.SIGKILL
    assert one.run("doctor").returncode == 0
    scripted(tiny_base, tmp_path / "home").stop()


def test_help_comes_at_once_and_loads_no_torch() -> None:
    script = "import sys, typer.testing as t; from server.cli.main import build_app\n"
    script += "for verb in sys.argv[1:]:\n"
    script += "    assert t.CliRunner().invoke(build_app(), [verb, '--help']).exit_code == 0, verb\n"
    script += "heavy = {'torch', 'transformers', 'vllm', 'fastapi', 'sqlalchemy', 'httpx', 'numpy'}\n"
    script += "print(sorted(heavy & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script, *VERBS], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.strip() == "[]"
    times = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([*HOTSHOE, "--help"], capture_output=True, check=True, env=environment())
        times.append(time.monotonic() - started)
    bare = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    bare = time.monotonic() - bare
    # 300 ms on an idle machine; a loaded one shows it in how long a bare interpreter takes.
    assert min(times) < 0.3 or statistics.median(times) < 10 * bare, (times, bare)
