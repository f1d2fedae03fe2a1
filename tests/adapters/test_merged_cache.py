"""Merged bases in the cache: made once, found by what they are made of, mended, and no more of them than are kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import BaseMismatch, MergeFailed
from adapters.export_request import ExportRequest, request_from_spec, spec_of
from adapters.merged_cache import KEPT, find_or_make
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2

Make = Callable[..., ExportRequest]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(tiny_qwen2(tmp_path_factory.mktemp("base") / "tiny-qwen2"))


@pytest.fixture
def request_of(base: BaseModel, tmp_path: Path) -> Make:
    def make(seed: int = 1, **options: object) -> ExportRequest:
        folder = tmp_path / f"adapter-{seed}"
        if not folder.exists():
            write_adapter(folder, base, seed=seed)
        values = {"with_logits": False, "source": f"router@{seed}", "out": tmp_path, **options}
        return ExportRequest(adapter=folder, base=base, **values)  # type: ignore[arg-type]

    return make


def folders(cache: Path) -> set[str]:
    return {path.name for path in (cache / "merged").iterdir() if path.name != ".lock"}


def test_a_request_is_the_same_after_its_way_to_another_process(request_of: Make, tmp_path: Path) -> None:
    request = request_of(dtype="bf16", accepted_digests=("one", "two"), shard_bytes=1 << 20, tokenizer=tmp_path)
    assert request_from_spec(json.loads(json.dumps(spec_of(request)))) == request


def test_a_merge_is_made_once_and_found_again_until_it_is_damaged(request_of: Make, tmp_path: Path) -> None:
    stages: list[str] = []
    made = find_or_make(tmp_path, request_of(), lambda message: stages.append(message["stage"]))
    assert {"merging", "reading back"} & set(stages), stages
    weights = made.path / "model.safetensors"
    written = weights.stat()
    made.release()
    made.release()

    stages.clear()
    found = find_or_make(tmp_path, request_of(), lambda message: stages.append(message["stage"]))
    assert (found.path, stages, weights.stat().st_ino) == (made.path, [], written.st_ino)

    found.release()
    good = weights.read_bytes()
    with weights.open("r+b") as file:
        file.seek(written.st_size - 3)
        file.write(b"x")
    mended = find_or_make(tmp_path, request_of())
    assert mended.path == made.path
    assert weights.read_bytes() == good
    assert folders(tmp_path) == {made.path.name}


def test_another_format_is_another_folder_and_of_those_that_nobody_runs_on_the_newest_stay(
    request_of: Make, tmp_path: Path
) -> None:
    held = find_or_make(tmp_path, request_of())
    os.utime(held.path, (1, 1))
    unused = [tmp_path / "merged" / f"{number:032x}" for number in range(2 + KEPT)]
    for number, path in enumerate(unused):
        path.mkdir()
        os.utime(path, (10 + number, 10 + number))
    halved = find_or_make(tmp_path, request_of(dtype="bfloat16"))
    assert folders(tmp_path) == {held.path.name, halved.path.name, *(path.name for path in unused[-KEPT:])}
    assert json.loads((halved.path / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_the_export_refuses_is_raised_as_it_is_and_leaves_nothing(request_of: Make, tmp_path: Path) -> None:
    with pytest.raises(BaseMismatch, match="made for the base"):
        find_or_make(tmp_path, request_of(base_digest="sha256:another"))
    request = request_of()
    (request.adapter / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(Exception, match=r"adapter|header|safetensors"):
        find_or_make(tmp_path, request)
    assert folders(tmp_path) == set()


def test_a_merge_ends_with_the_process_that_wanted_it(request_of: Make, tmp_path: Path, base: BaseModel) -> None:
    request = request_of()
    program = (
        "import sys; from pathlib import Path; from adapters.bases import load_base\n"
        "from adapters.export_request import ExportRequest; from adapters.merged_cache import find_or_make\n"
        "cache, adapter, base = map(Path, sys.argv[1:])\n"
        "asked = ExportRequest(adapter=adapter, base=load_base(base), out=cache, source='x', with_logits=False)\n"
        "find_or_make(cache, asked, lambda message: print(message['stage'], flush=True))\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path), str(request.adapter), str(base.folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == "planned"
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(name.endswith("partial") for name in folders(tmp_path)):
        assert time.monotonic() < deadline, folders(tmp_path)
        time.sleep(0.05)
    made = find_or_make(tmp_path, request)
    assert folders(tmp_path) == {made.path.name}


def test_a_process_that_dies_without_a_word_is_named(
    request_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MergeFailed, match="status 1"):
        find_or_make(tmp_path, request_of())
