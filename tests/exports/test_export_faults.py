"""What goes wrong under an export, over HTTP: a failed job that says what and what to do, and nothing half there."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.bases import BaseModel, load_base
from tests.adapters.exporting import damage
from tests.exports.test_exports import ended, hidden, ordered
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2
from tests.fixtures.processes import HOTSHOE, Served
from tests.fixtures.service import Server, eventually, running

SHARD = "model-00002-of-*.safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return damage(load_base(tiny_qwen2(folder / "tiny")), folder / "sharded", lambda _: None)


@pytest.fixture
def base(sharded: Path, tmp_path: Path) -> BaseModel:
    return load_base(Path(shutil.copytree(sharded, tmp_path / "sharded")))


@pytest.fixture
def server(base: BaseModel, tmp_path: Path) -> Iterator[Server]:
    with running(base, tmp_path) as server:
        server.pushed("router")
        yield server


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def flipped(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [(cut, "have changed since"), (Path.unlink, "lacks"), (flipped, "have changed since")],
    ids=["cut", "missing", "flipped"],
)
def test_a_shard_that_is_not_what_it_was_fails_the_job_and_another_order_goes_well_once_it_is(
    server: Server, base: BaseModel, sharded: Path, wrong: Callable[[Path], None], says: str
) -> None:
    (shard,) = base.folder.glob(SHARD)
    wrong(shard)
    row = ended(server, ordered(server)["id"])
    assert (row["status"], row["error"]["code"]) == ("failed", "base_invalid"), row["error"]
    assert says in row["error"]["message"] and not row["has_content"] and row["files"] is None
    assert sorted(server.services.exports.results.root.iterdir()) == []
    shutil.copyfile(sharded / shard.name, shard)
    assert ended(server, ordered(server)["id"])["status"] == "succeeded"


def test_an_order_of_a_server_with_another_base_is_refused_with_both(base: BaseModel, tmp_path: Path) -> None:
    other = load_base(tiny_qwen2(tmp_path / "other", seed=7))
    with running(base, tmp_path) as server:
        server.pushed("router")
        row = ordered(server)
    with running(other, tmp_path) as server:
        found = ended(server, row["id"])
        assert found["status"] in ("failed", "succeeded")  # it may have been done before the first server ended
        if found["status"] == "failed":
            assert found["error"]["code"] == "base_mismatch" and other.digest in found["error"]["message"]
        refused = server.http.post("/v1/exports", json={"model": "router"})
        assert refused.status_code == 422 and base.digest in refused.json()["error"]["message"]
        eventually(lambda: hidden(server) == [])


class OnASmallDisk(Served):
    """A server whose exports have a file system of their own, of 24 MiB and 64 files."""

    def __init__(self, home: Path, *flags: str) -> None:
        exports = home / "exports"
        exports.mkdir(parents=True)
        mount = f'mount -t tmpfs -o size=24m,nr_inodes=64 none {exports} && exec "$@"'
        self.program = ("unshare", "-rm", "sh", "-c", mount, "sh", *HOTSHOE, "serve")
        super().__init__(home, *flags)

    @property
    def exports(self) -> Path:
        """Its exports as it sees them."""
        return Path(f"/proc/{self.process.pid}/root{self.home / 'exports'}")

    def ended(self) -> dict[str, Any]:
        body = {"model": "router", "parity": False}
        row: dict[str, Any] = httpx.post(f"{self.url}/v1/exports", json=body, timeout=60).json()
        while row["status"] in ("queued", "running"):
            time.sleep(0.05)
            row = httpx.get(f"{self.url}/v1/exports/{row['id']}", timeout=60).json()
        return row

    def listed(self) -> list[str]:
        return sorted(path.name for path in self.exports.iterdir() if not path.name.startswith("filler"))


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Iterator[OnASmallDisk]:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system of their own")
    base = load_base(tiny_qwen2(tmp_path / "tiny"))
    server = OnASmallDisk(tmp_path / "home", "--engine", "scripted", "--base", str(base.folder))
    assert server.verb("push", str(write_adapter(tmp_path / "router", base)), "--name", "router").returncode == 0
    yield server
    server.end()


def test_a_full_disk_is_a_failed_job_before_and_during_the_export_and_a_good_one_when_there_is_room(
    on_a_small_disk: OnASmallDisk,
) -> None:
    server = on_a_small_disk
    filler = server.exports / "filler"
    filler.write_bytes(b"x" * (12 << 20))
    row = server.ended()
    assert (row["status"], row["error"]["code"]) == ("failed", "storage_full")
    assert "bytes free and the export needs" in row["error"]["message"]
    assert server.listed() == []
    filler.unlink()
    # Bytes enough and names too few: the export begins, and its last files find no place.
    fillers = [server.exports / f"filler{number}" for number in range(os.statvfs(server.exports).f_favail - 6)]
    for path in fillers:
        path.touch()
    row = server.ended()
    assert (row["status"], row["error"]["code"]) == ("failed", "storage_full")
    assert row["error"]["message"].startswith("The disk filled up during the export") and row["bytes_done"] > 0
    assert server.listed() == []
    for path in fillers:
        path.unlink()
    row = server.ended()
    assert row["status"] == "succeeded", row["error"]
    assert [name[:7] for name in server.listed()] == ["export-"]
