"""A run that was killed, stopped or filled its disk: what is left, and that going on ends in the same weights."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ConfigInvalid, OutputExists, StorageFull
from tests.training.conftest import chat, write_jsonl
from tests.training.killed import call, in_a_process, run
from training.checkpoints import MANIFEST, complete
from training.staging import Staging, staging_folder

ADAPTER = "adapter_model.safetensors"
# 12 steps of 2 rows in 2 passes, 4 steps an epoch; validations after 3, 6, 9 and 12, checkpoints after 2, 4, ... beside
SHORT: dict[str, Any] = {
    "name": "n",
    "epochs": 3.0,
    "batch_size": 2,
    "tokens_per_pass": 60,
    "learning_rate": 5e-3,
    "rank": 2,
    "dropout": 0.1,
    "dtype": "float32",
    "evaluations": 4,
    "patience": 9,
    "checkpoint_steps": 2,
    "compare": False,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rows")
    words = ["red", "green", "blue", "dark orange"]
    data = [chat(f"Colour number {i}?", f"It is {words[i % 4]}" + "!" * (3 * i % 7)) for i in range(8)]
    return write_jsonl(folder / "data.jsonl", data), write_jsonl(folder / "validation.jsonl", data[:3])


@pytest.fixture(scope="module")
def asked(rows: tuple[Path, Path], qwen2_base: Path) -> dict[str, Any]:
    return {**SHORT, "data": str(rows[0]), "validation": str(rows[1]), "base": str(qwen2_base)}


@pytest.fixture(scope="module")
def whole(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What an uninterrupted run of each method leaves."""
    made = {}
    for method in ("lora", "qlora"):
        made[method] = tmp_path_factory.mktemp("whole") / method
        done = call({**asked, "method": method, "out": str(made[method])})
        assert done.code == 0, done.said
    assert card(made["lora"])["settings"]["accumulation"] == 2
    return made


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return found


def staging_of(asked: dict[str, Any]) -> Staging:
    return Staging(staging_folder(Path(asked["out"])))


def assert_same(one: Path, other: Path) -> None:
    """The same bytes of weights, the same history and count, and each step once in what a page can follow."""
    assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()
    first, second = card(one), card(other)
    assert first["result"] == second["result"]
    assert first["cost"]["tokens"] == second["cost"]["tokens"]
    assert first["verdict"] == second["verdict"]
    assert followed(one) == followed(other)


def followed(folder: Path) -> list[tuple[int, float | None, float | None]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]


@pytest.mark.parametrize(
    ("method", "when"),
    [
        pytest.param("lora", ["step:3"], marks=pytest.mark.long),  # the validation after 3 had not begun: on from 2
        pytest.param("lora", ["step:7"], marks=pytest.mark.long),  # after a validation (6), in the middle of an epoch
        ("lora", ["step:5", "step:5", "save:1"]),  # on from 4; killed at 9, on from 8; killed while saving 9
        ("lora", ["card"]),  # trained and saved, and killed before it was there
        ("qlora", ["step:7", "save:2"]),
    ],
)
def test_f5_a_run_killed_at_any_step_and_resumed_ends_in_the_same_bits(
    asked: dict[str, Any], whole: dict[str, Path], tmp_path: Path, method: str, when: list[str]
) -> None:
    mine = {**asked, "method": method, "out": str(tmp_path / "out")}
    for number, moment in enumerate(when):
        killed = call(mine, moment, resume=number > 0)
        assert killed.code == -signal.SIGKILL, killed.said
        assert not Path(mine["out"]).exists()
    done = call(mine, resume=True)
    assert done.code == 0, done.said
    assert "going on after step" in done.said
    assert_same(tmp_path / "out", whole[method])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_best_checkpoint_and_the_patience_survive_even_in_a_folder_that_was_moved(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [chat(f"Other {i}?", "something else") for i in range(4)])
    mine = {**asked, "validation": str(other), "method": "lora", "learning_rate": 2e-2, "epochs": 20.0, "patience": 2}
    mine |= {"evaluations": 20, "checkpoint_steps": 3, "dropout": 0.0}
    uninterrupted = call({**mine, "out": str(tmp_path / "whole")})
    assert uninterrupted.code == 0, uninterrupted.said
    result = card(tmp_path / "whole")["result"]
    assert result["is_stopped_early"] and result["best_step"] < result["steps"]
    (tmp_path / "here").mkdir()
    last_but_one = result["steps"] - 2  # one validation without a gain has been counted
    killed = call({**mine, "out": str(tmp_path / "here" / "out")}, f"step:{last_but_one}")
    assert killed.code == -signal.SIGKILL, killed.said
    (tmp_path / "here").rename(tmp_path / "there")
    done = call({**mine, "out": str(tmp_path / "there" / "out")}, resume=True)
    assert done.code == 0, done.said
    assert_same(tmp_path / "there" / "out", tmp_path / "whole")


@pytest.fixture(scope="module")
def cut_off(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that was killed after step 7: the checkpoints of 6 and 4 are there, and that of 3, the best until 4."""
    mine = {**asked, "method": "lora", "out": str(tmp_path_factory.mktemp("cut") / "out")}
    assert call(mine, "step:7").code == -signal.SIGKILL
    assert [one.step for one in complete(staging_of(mine).checkpoints)] == [6, 4, 3]
    return mine


def copied(cut_off: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    mine = {**cut_off, "out": str(tmp_path / "out")}
    shutil.copytree(staging_of(cut_off).root, staging_of(mine).root)
    return mine


@pytest.mark.parametrize(
    "harm",
    [
        "no manifest",
        "a flipped byte",
        *(pytest.param(f"half a {it}", marks=pytest.mark.long) for it in ("file", "manifest")),
    ],
)
def test_f5_a_cut_checkpoint_is_never_gone_on_from_and_the_one_before_is_used_and_said(
    cut_off: dict[str, Any], whole: dict[str, Path], tmp_path: Path, harm: str
) -> None:
    mine = copied(cut_off, tmp_path)
    newest = staging_of(mine).checkpoints / "checkpoint-6"
    weights = newest / "optimizer.pt"
    if harm == "no manifest":
        (newest / MANIFEST).unlink()
    elif harm == "half a manifest":
        os.truncate(newest / MANIFEST, 40)
    elif harm == "half a file":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    done = call(mine, resume=True)
    assert done.code == 0, done.said
    what = "is damaged" if harm == "a flipped byte" else "was cut off while it was written"
    assert f"checkpoint-6 {what}: going on from checkpoint-4, the last whole one" in done.said
    assert_same(tmp_path / "out", whole["lora"])


def test_without_one_whole_checkpoint_there_is_nothing_to_resume_and_a_new_run_may_begin(
    cut_off: dict[str, Any], tmp_path: Path
) -> None:
    mine = copied(cut_off, tmp_path)
    for one in complete(staging_of(mine).checkpoints):
        (one.folder / MANIFEST).unlink()
    with pytest.raises(ConfigInvalid, match="before its first checkpoint was whole"):
        run(mine, resume=True)


def test_with_nothing_cut_off_there_is_nothing_to_resume(
    asked: dict[str, Any], whole: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigInvalid, match=r"There is nothing to resume: no run into .*out was cut off"):
        run({**asked, "out": str(tmp_path / "out")}, resume=True)
    with pytest.raises(OutputExists, match="is there and whole: there is nothing to resume"):
        run({**asked, "out": str(whole["lora"])}, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, "had learning_rate 0.005, not 0.001"),
        ({"seed": 5, "rank": 4}, "had rank 2, not 4; alpha 4.0, not 8.0; seed 17, not 5"),
        ({"method": "qlora"}, "had method lora, not qlora"),
        ({"data": "{other}"}, r"had other data \(or another rendering of it\)"),
        ({"validation": "{other}"}, r"had other validation data \(or another rendering of it\)"),
    ],
)
def test_another_run_is_not_gone_on_with_and_what_differs_is_named(
    cut_off: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    mine = copied(cut_off, tmp_path)
    before = sorted(staging_of(mine).root.rglob("*"))
    lines = Path(mine["data"]).read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*lines[:-1], lines[-1].replace("Colour", "Color")]) + "\n")
    changed = {key: str(value).format(other=other) if "{" in str(value) else value for key, value in change.items()}
    with pytest.raises(ConfigInvalid, match=message):
        run({**mine, **changed}, resume=True)
    assert sorted(staging_of(mine).root.rglob("*")) == before


def test_a_new_run_does_not_throw_away_one_that_can_be_resumed(cut_off: dict[str, Any], tmp_path: Path) -> None:
    mine = copied(cut_off, tmp_path)
    with pytest.raises(
        OutputExists, match=r"cut off after step 6: go on with it by --resume, or remove .*\.out\.partial"
    ):
        run(mine)
    assert complete(staging_of(mine).checkpoints)


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.long), "SIGTERM"])
def test_a_signal_saves_says_how_to_go_on_and_leaves_with_130(
    asked: dict[str, Any], whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    mine = {**asked, "method": "lora", "out": str(tmp_path / "out")}
    stopped = call(mine, f"{name}:5")
    assert stopped.code == 130, stopped.said
    assert "Stopped after step 5 of 12, which is saved. Go on with the same command and --resume." in stopped.said
    assert not Path(mine["out"]).exists()
    assert call(mine, resume=True).code == 0
    assert_same(tmp_path / "out", whole["lora"])


def test_a_second_ctrl_c_stops_at_once_and_names_what_was_saved_before(asked: dict[str, Any], tmp_path: Path) -> None:
    mine = {**asked, "method": "lora", "out": str(tmp_path / "out")}
    stopped = call(mine, "twice:5")
    assert stopped.code == 130, stopped.said
    assert "Stopped at once. Step 4 is saved: go on with the same command and --resume." in stopped.said
    first = call({**mine, "out": str(tmp_path / "first")}, "twice:1")
    assert "Stopped at once. Nothing was saved." in first.said
    assert not staging_folder(tmp_path / "first").exists()


def test_a_signal_outside_of_the_steps_stops_at_once_and_leaves_nothing_but_what_can_be_gone_on_with(
    asked: dict[str, Any], whole: dict[str, Path], tmp_path: Path
) -> None:
    mine = {**asked, "method": "lora", "out": str(tmp_path / "out")}
    stopped = call(mine, "asked")
    assert stopped.code == 130, stopped.said
    assert "Stopped at once. Step 12 is saved: go on with the same command and --resume." in stopped.said
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]  # and no lock
    assert call(mine, resume=True).code == 0
    assert_same(tmp_path / "out", whole["lora"])


CLONE_NEWNS, CLONE_NEWUSER, MS_REMOUNT = 0x00020000, 0x10000000, 32


def fill_a_disk(asked: dict[str, Any], kilobytes: int) -> None:
    """In a process of its own: a run on a small file system of its own, and on with it when there is room."""
    out = Path(asked["out"])
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        print("no mount")
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if mount(libc, out.parent, 0, kilobytes):
        print("no mount")
        return
    try:
        run(asked)
    except StorageFull as error:
        print(f"full: {error.message}")
    assert not out.exists()
    left = complete(Staging(staging_folder(out)).checkpoints)
    print(f"left: {[one.step for one in left]}")
    mount(libc, out.parent, MS_REMOUNT, 100_000)
    run(asked, resume=bool(left))
    print(f"weights: {(out / ADAPTER).read_bytes().hex()}")


def mount(libc: Any, folder: Path, flags: int, kilobytes: int) -> int:
    options = f"size={kilobytes}k".encode()
    return int(libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options))


@pytest.mark.parametrize(
    "kilobytes", [230, *(pytest.param(size, marks=pytest.mark.long) for size in (40, 100, 190, 210, 260, 330))]
)
def test_a_full_disk_is_named_loses_no_checkpoint_and_the_run_goes_on_when_there_is_room(
    asked: dict[str, Any], whole: dict[str, Path], tmp_path: Path, kilobytes: int
) -> None:
    (tmp_path / "disk").mkdir()
    mine = {**asked, "method": "lora", "out": str(tmp_path / "disk" / "out"), "report_to": ("none",)}
    ended = in_a_process(fill_a_disk, (mine, kilobytes), tmp_path / "log")
    if "no mount" in ended.said:
        pytest.skip("this machine lets no process mount a file system of its own")
    print(ended.said[:2000])
    assert ended.code == 0, ended.said
    assert "full: The disk is full" in ended.said
    assert (whole["lora"] / ADAPTER).read_bytes().hex() in ended.said
