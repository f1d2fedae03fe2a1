"""The Hub's token may be a file: read for sources and bases, and kept from the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import ConfigInvalid
from server.engine.vllm_flags import REMOVED_ENV
from server.source_settings import SourceSettings, hub_token

SOURCE = SourceSettings(name="hub", url="hf://org")


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_token_is_the_files_content_without_its_line_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hf_token").write_text("hf_secret\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "hf_token"))
    assert hub_token(SOURCE) == "hf_secret"


def test_a_variable_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hf_token").write_text("of the file")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "hf_token"))
    monkeypatch.setenv("HF_TOKEN", "of the variable")
    assert hub_token(SOURCE) == "of the variable"


def test_an_empty_file_is_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hf_token").write_text("\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "hf_token"))
    assert hub_token(SOURCE) is None
    monkeypatch.delenv("HF_TOKEN_PATH")
    assert hub_token(SOURCE) is None


def test_a_file_that_cannot_be_read_is_said_and_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(ConfigInvalid, match=r"HF_TOKEN_PATH names .*absent"):
        hub_token(SOURCE)


def test_the_library_that_fetches_bases_reads_the_same_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The constant is read at its import, which in a server comes after its environment is there."""
    import huggingface_hub.constants
    from huggingface_hub import get_token

    (tmp_path / "hf_token").write_text("hf_secret\n")
    assert '"HF_TOKEN_PATH"' in Path(huggingface_hub.constants.__file__).read_text()
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf_token"))
    assert get_token() == "hf_secret"


def test_the_engine_gets_neither_the_token_nor_the_files_name() -> None:
    assert {"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"} <= set(REMOVED_ENV)
