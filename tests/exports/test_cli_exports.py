"""`hotshoe exports` against a server: what it says, and a fetch that goes on where it was cut off."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.exporting import contents
from tests.exports.test_exports import ended, ordered, result_of
from tests.fixtures.processes import Served
from tests.fixtures.service import Server


class Shell(Served):
    """The verbs, spoken to a server of this process, whose log is not in what they say."""

    def __init__(self, server: Server) -> None:
        self.home, self.url = server.services.settings.home, server.url


@pytest.fixture(scope="module")
def row(server: Server) -> dict[str, Any]:
    return ended(server, ordered(server)["id"])


@pytest.fixture
def shell(server: Server) -> Shell:
    return Shell(server)


def test_a_fetched_folder_is_the_result_to_the_byte(
    shell: Shell, server: Server, row: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    done = shell.run("exports", "fetch", row["id"], "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == row["files"]
    assert contents(out) == contents(result_of(server, row["id"]))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    again = shell.run("exports", "fetch", row["id"], "--out", str(out))
    assert again.returncode == 1 and "output_exists" in again.stderr


def test_a_fetch_goes_on_with_what_has_come_and_refuses_what_is_not_the_manifests(
    shell: Shell, server: Server, row: dict[str, Any], tmp_path: Path
) -> None:
    staged, result = tmp_path / ".merged.hotshoe-fetch" / row["id"], result_of(server, row["id"])
    staged.mkdir(parents=True)
    weights = (result / "model.safetensors").read_bytes()
    (staged / "model.safetensors").write_bytes(weights[:1000])
    (staged / "config.json").write_bytes((result / "config.json").read_bytes() + b"too long")
    (staged / "of_an_earlier_result").write_bytes(b"")
    before = server.metric("hotshoe_http_responses_total", route="/v1/exports/{export_id}/content", status="206")
    assert shell.run("exports", "fetch", row["id"], "--out", str(tmp_path / "merged")).returncode == 0
    after = server.metric("hotshoe_http_responses_total", route="/v1/exports/{export_id}/content", status="206")
    assert contents(tmp_path / "merged") == contents(result) and after > before
    shutil.rmtree(tmp_path / "merged")
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"x" * 1000)  # of a disk that lied, or of somebody else
    done = shell.run("exports", "fetch", row["id"], "--out", str(tmp_path / "merged"))
    assert done.returncode == 3 and "the manifest says" in done.stderr and not (tmp_path / "merged").exists()
    assert shell.run("exports", "fetch", row["id"], "--out", str(tmp_path / "merged")).returncode == 0


HOLDER = """
import sys, time
from pathlib import Path
from adapters.staging import own_folder
with own_folder(Path(sys.argv[1]), "held"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_of_two_fetches_into_one_folder_the_second_is_told_so_and_a_killed_one_blocks_none(
    shell: Shell, server: Server, row: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    first = [sys.executable, "-c", HOLDER, str(tmp_path / ".merged.hotshoe-fetch")]
    with subprocess.Popen(first, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        refused = shell.run("exports", "fetch", row["id"], "--out", str(out))
        assert refused.returncode == 1 and "already_running" in refused.stderr and not out.exists()
        assert str(out) in refused.stderr and "choose another --out" in refused.stderr
        assert shell.run("exports", "fetch", row["id"], "--out", str(tmp_path / "else")).returncode == 0
        other.kill()
    assert shell.run("exports", "fetch", row["id"], "--out", str(out)).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else", "merged"]


def test_the_verbs_say_how_exports_stand_cancel_them_and_remove_them(
    shell: Shell, server: Server, row: dict[str, Any], tmp_path: Path
) -> None:
    shown = shell.run("exports", "show", row["id"]).stdout
    assert f"{row['id']}: router@1 as hf, succeeded" in shown and "model.safetensors" in shown and "kept until" in shown
    waiting = ordered(server, dtype="float16", parity=True)["id"]
    assert shell.run("exports", "cancel", waiting).stdout == f"{waiting} is cancelled\n"
    refused = shell.run("exports", "fetch", waiting, "--out", str(tmp_path / "x"))
    assert refused.returncode == 1 and "is cancelled" in refused.stderr and list(tmp_path.iterdir()) == []
    listed = shell.run("exports", "ls").stdout
    assert listed.index(waiting) < listed.index(row["id"]) and "hf float16" in listed
    assert json.loads(shell.run("exports", "ls", "--json").stdout)[0]["id"] == waiting
    assert shell.run("exports", "rm", waiting).stdout == f"{waiting} is gone\n"
    gone = shell.run("exports", "show", waiting)
    assert gone.returncode == 1 and "not_found" in gone.stderr
