"""`hotshoe serve --config FILE`: every setting, vLLM's flags under `engine`, and what a file must not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import ConfigInvalid
from adapters.strict_yaml import MAX_BYTES
from server.config_file import flags_of
from server.settings import CONFIG_VARIABLE, Settings, load_settings


@pytest.fixture(autouse=True)
def no_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*(f"HOTSHOE_{name.upper()}" for name in Settings.model_fields), CONFIG_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "hotshoe.yaml"


def test_a_flag_wins_over_the_environment_and_that_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("slots: 2\nmax-rank: 16\npatience_seconds: 0.5\nmerge_base:\n")
    found = load_settings(file)
    assert (found.slots, found.max_rank, found.patience_seconds, found.merge_base) == (2, 16, 0.5, None)
    monkeypatch.setenv("HOTSHOE_SLOTS", "3")
    assert load_settings(file).slots == 3
    assert load_settings(file, slots=5).slots == 5


def test_every_command_on_the_state_folder_reads_the_named_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("home: /srv/hotshoe\nbase_names: [Qwen/Qwen2.5-7B, qwen-seven]\n")
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    assert load_settings().home == Path("/srv/hotshoe")
    assert load_settings().base_names == ("Qwen/Qwen2.5-7B", "qwen-seven")


def test_sources_are_written_out_as_they_are_in_json(file: Path) -> None:
    file.write_text("sources:\n  - name: shared\n    url: s3://bucket/adapters\n    options: {region: eu-west-1}\n")
    (source,) = load_settings(file).sources
    assert (source.name, source.every_seconds, source.options) == ("shared", 60.0, {"region": "eu-west-1"})


def test_the_engine_section_becomes_vllms_words(file: Path) -> None:
    file.write_text(
        "engine:\n  tensor-parallel-size: 2\n  enforce_eager: true\n  enable-prefix-caching: false\n  quantization:\n"
        "  speculative-config: {method: ngram, num_speculative_tokens: 4}\n  cudagraph-capture-sizes: [1, 2]\n"
    )
    assert load_settings(file).engine_args == (
        "--tensor-parallel-size=2",
        "--enforce_eager",
        "--no-enable-prefix-caching",
        '--speculative-config={"method": "ngram", "num_speculative_tokens": 4}',
        "--cudagraph-capture-sizes",
        "1",
        "2",
    )


def test_flags_of_the_command_line_stand_behind_the_files(file: Path) -> None:
    file.write_text("engine: {max-model-len: 512}\n")
    given = load_settings(file, engine_args=("--max-model-len", "1024"))
    assert given.engine_args == ("--max-model-len=512", "--max-model-len", "1024")


def test_the_engine_itself_is_still_chosen_by_name(file: Path) -> None:
    file.write_text("engine: scripted\nengine_args: [--max-model-len, '512']\n")
    assert (load_settings(file).engine, load_settings(file).engine_args) == ("scripted", ("--max-model-len", "512"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("slot: 3\n", r":1: there is no setting 'slot'; did you mean slots\?"),
        ("tensor_parallel_size: 2\n", "vLLM's stand under engine"),
        ("slots: 3\nslots: 4\n", ":2: slots is set twice"),
        ("slots: 3\nengine: {a: 1, a: 2}\n", ":2: a is set twice"),
        ("engine: {a: 1}\nengine_args: [--b]\n", "engine_args is set twice, with vLLM's flags under engine"),
        ("engine: {--tensor-parallel-size: 2}\n", "without its dashes"),
        ('engine: {"a\\nb": 2}\n', "without its dashes"),
        ("slots: many\n", r"slots: .*set in .*hotshoe.yaml"),
        ("home: !!python/object/apply:os.system [id]\n", "has the tag"),
        ("home: &a /x\nbase: *a\n", "anchor or alias in line 1"),
        ("sources: [[[[[[[]]]]]]]\n", "nested deeper than 6 levels"),
        ("- slots\n", "must be one mapping"),
        ("slots: [\n", "is not YAML"),
        ("host: 2026-99-99\n", "is not YAML|host"),
        ("#" * MAX_BYTES + "\n", "more than 64,000 bytes"),
    ],
)
def test_what_a_file_of_settings_must_not_hold_is_refused_with_its_place(file: Path, text: str, reason: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigInvalid, match=reason):
        load_settings(file)


def test_a_file_that_is_not_there_is_said(file: Path) -> None:
    with pytest.raises(ConfigInvalid, match="cannot be read: No such file"):
        load_settings(file)


@pytest.mark.parametrize(("mode", "warnings"), [(0o644, 1), (0o600, 0)])
def test_a_key_in_a_file_that_everybody_may_read_is_warned_of(
    file: Path, mode: int, warnings: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("api_key: a-long-enough-key\n")
    file.chmod(mode)
    load_settings(file)
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", warnings)
    assert "a-long-enough-key" not in said.err


def test_a_word_that_begins_with_a_dash_stays_a_value() -> None:
    assert list(flags_of({"seed": -1, "chat-template": "--host"}, "here")) == ["--seed=-1", "--chat-template=--host"]
