"""`hotshoe train` and `hotshoe data show` as commands: output, exit codes, and going on from a server's version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner, Result

from adapters.bases import load_base
from adapters.errors import DataInvalid, EngineUnavailable, InvalidRequest, ModelNotFound, OutputExists
from server.cli.main import build_app
from tests.fixtures.service import running
from tests.training.conftest import chat, write_jsonl
from training.config import TrainingConfig
from training.config_file import settable

QUICK = ("--epochs", "0.2", "--rank", "4", "--dtype", "float32")


def hotshoe(*arguments: object) -> Result:
    """The command in this process; its HotshoeErrors are raised, as the console script then prints them."""
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments], catch_exceptions=False)


def test_train_prints_the_losses_and_where_the_adapter_is(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = hotshoe("train", colours, "--name", "colours", "--base", qwen2_base, "--out", out, *QUICK)
    assert result.exit_code == 0
    assert str(out) in result.stdout and "training loss" in result.stdout and "tokens/s" in result.stdout
    assert "40 rows" in result.stderr and "step 1/" in result.stderr
    assert "validation: " not in result.stderr and "no validation rows" in result.stderr


def test_train_with_json_prints_one_document(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--validation", colours, "--target-modules", "q_proj,v_proj", "--json")
    result = hotshoe("train", colours, "--name", "colours", "--base", qwen2_base, "--out", out, *QUICK, *options)
    printed = json.loads(result.stdout)
    assert printed["path"] == str(out)
    assert printed["card"]["settings"]["target_modules"] == ["q_proj", "v_proj"]
    assert printed["card"] == {k: v for k, v in json.loads((out / "card.json").read_text()).items() if k != "format"}


def test_bad_rows_leave_with_exit_code_3_and_every_line(qwen2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "bad.jsonl", [chat("a", "b"), "{", {"text": "a"}])
    command = [sys.executable, "-c", "from server.cli.main import run; run()", "train", str(data), "--name", "n"]
    done = subprocess.run(
        [*command, "--base", str(qwen2_base), "--out", str(tmp_path / "o")], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert f"{data}:2" in done.stderr and f"{data}:3" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_going_on_from_a_servers_version_fetches_its_files_and_names_it(
    colours: Path, qwen2_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    common = ("train", colours, "--name", "colours", "--base", qwen2_base, "--dtype", "float32", "--epochs", "0.2")
    hotshoe(*common, "--out", first, "--rank", "4")
    with running(load_base(qwen2_base), tmp_path / "server") as server:
        monkeypatch.setenv("HOTSHOE_URL", server.url)
        assert server.push("colours", first).json()["status"] == "ready"
        hotshoe(*common, "--out", second, "--from", "colours@1")
        with pytest.raises(ModelNotFound, match="colours/versions/9"):
            hotshoe(*common, "--out", tmp_path / "third", "--from", "colours@9")
        assert server.push("colours", second).json()["status"] == "ready"
        assert server.http.get("/v1/adapters/colours/versions/2").json()["parent"] == "colours@1"
    card = json.loads((second / "card.json").read_text())
    assert (card["parent"], card["settings"]["rank"]) == ("colours@1", 4)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    with pytest.raises(EngineUnavailable, match="HOTSHOE_URL"):
        hotshoe(*common, "--out", tmp_path / "third", "--from", "colours@1")
    with pytest.raises(InvalidRequest, match="names no version"):
        hotshoe(*common, "--out", tmp_path / "third", "--from", "colours")


def test_going_on_from_a_folder(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    common = ("train", colours, "--name", "colours", "--base", qwen2_base, "--dtype", "float32", "--epochs", "0.2")
    hotshoe(*common, "--out", tmp_path / "first", "--rank", "4")
    result = hotshoe(*common, "--out", tmp_path / "second", "--from", tmp_path / "first", "--json")
    assert json.loads(result.stdout)["card"]["parent"] == str(tmp_path / "first")


def test_data_show_marks_exactly_the_learned_tokens(qwen2_base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b"), chat("Is it dark?", "Rất tối.")])
    printed = json.loads(hotshoe("data", "show", data, "--row", "2", "--base", qwen2_base, "--json").stdout)
    assert printed["line"] == 2
    (tokens,) = printed["sequences"]
    assert tokens[-1] == {"id": tokens[-1]["id"], "text": "<|im_end|>", "is_learned": True}
    assert sum(token["is_learned"] for token in tokens) == len("Rất tối.".encode()) + 1
    shown = hotshoe("data", "show", data, "--row", "2", "--base", qwen2_base).stdout
    assert "Rất tối.<|im_end|>" in shown and "messages 2" in shown
    with pytest.raises(DataInvalid, match="2 rows"):
        hotshoe("data", "show", data, "--row", "3", "--base", qwen2_base)


def test_flags_win_over_the_file_and_the_card_holds_what_was_used(
    colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "run.yaml").write_text(
        f"data: {colours}\nname: colours\nbase: {qwen2_base}\nout: {out}\nepochs: 0.2\nrank: 4\nseed: 5\n"
        "target_modules: [q_proj]\nuse_rslora: true\n"
    )
    config = ("--config", tmp_path / "run.yaml", "--rank", "2", "--target-modules", "v_proj, o_proj", "--no-use-rslora")
    settings = json.loads(hotshoe("train", *config, "--json").stdout)["card"]["settings"]
    assert (settings["rank"], settings["seed"], settings["epochs"]) == (2, 5, 0.2)
    assert (settings["target_modules"], settings["use_rslora"]) == (["v_proj", "o_proj"], False)
    with pytest.raises(OutputExists):
        hotshoe("train", *config)


def test_from_may_stand_in_the_file(colours: Path, qwen2_base: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("from: colours\n")
    with pytest.raises(InvalidRequest, match="names no version"):
        hotshoe("train", colours, "--name", "n", "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "n"], "There is no data: give DATA, or data in the --config file"),
        (["rows.jsonl"], "There is no name: give --name NAME, or name in the --config file"),
        (["rows.jsonl", "--name", "n", "--report-to", "wandb"], "not installed: run `pip install wandb`"),
        (
            ["rows.jsonl", "--name", "n", "--method", "prefix"],
            "method is 'prefix'; it must be one of qlora, lora, full",
        ),
        (["rows.jsonl", "--name", "n", "--config", "absent.yaml"], "absent.yaml cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_torch_is_loaded(arguments: list[str], message: str) -> None:
    code = (
        "import sys\nfrom server.cli.main import run\nsys.argv[0] = 'hotshoe'\n"
        "try:\n    run()\nexcept SystemExit as leaving:\n    print(leaving.code)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "train", *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["1", "False"]
    assert message in done.stderr


def test_resume_on_the_command_line_goes_on_or_says_that_there_is_nothing(
    colours: Path, qwen2_base: Path, tmp_path: Path
) -> None:
    from tests.training.killed import call

    out = tmp_path / "out"
    asked = {"data": str(colours), "name": "colours", "base": str(qwen2_base), "out": str(out), "checkpoint_steps": 1}
    command = ("train", colours, "--name", "colours", "--base", qwen2_base, "--out", out, "--dtype", "float32")
    assert call({**asked, "epochs": 0.2, "rank": 4, "dtype": "float32"}, "SIGTERM:1").code == 130
    result = hotshoe(*command, "--epochs", "0.2", "--rank", "4", "--resume")
    assert "going on after step 1" in result.stderr and str(out) in result.stdout
    with pytest.raises(OutputExists, match="nothing to resume"):
        hotshoe(*command, "--resume")


def test_every_setting_is_a_flag_with_the_words_of_its_definition() -> None:
    command: Any = get_command(build_app())
    options = {option.opts[0]: option.help for option in command.commands["train"].params}
    docs = {f"--{name.replace('_', '-')}": TrainingConfig.documentation()[name] for name in settable()}
    docs["data"] = docs.pop("--data")
    assert docs.items() <= options.items()
    assert set(options) - set(docs) == {"--config", "--from", "--resume", "--dry-run", "--json"}


def test_help_of_train_loads_no_torch() -> None:
    code = (
        "import sys\nfrom server.cli.main import run\nsys.argv = ['hotshoe', 'train', '--help']\n"
        "try:\n    run()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert "--learning-rate" in done.stdout
