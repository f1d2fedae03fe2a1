"""Tiny bases and small chat files for the trainer's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.bases import qwen_tokenizer, tiny_qwen2, tiny_qwen3


@pytest.fixture(scope="session")
def qwen2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("bases") / "tiny-qwen2")


@pytest.fixture(scope="session")
def qwen3_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("bases") / "tiny-qwen3")


@pytest.fixture(scope="session")
def qwen3_bytes_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("bases") / "tiny-qwen3-bytes", tokenizer="bytes")


@pytest.fixture(scope="session")
def qwen2_5_tokenizer() -> Any:
    return qwen_tokenizer("qwen2_5")


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Any:
    return qwen_tokenizer("qwen3")


def chat(user: str, answer: str, system: str | None = "Answer briefly.") -> dict[str, Any]:
    first = [{"role": "system", "content": system}] if system else []
    return {
        "messages": [*first, {"role": "user", "content": user}, {"role": "assistant", "content": answer}],
    }


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """40 rows whose answers are longer and shorter, with a system prompt in common."""
    names = ["red", "green", "blue", "dark orange"]
    rows = [chat(f"Colour number {i}?", f"It is {names[i % 4]}" + "!" * (i % 7)) for i in range(40)]
    return write_jsonl(tmp_path / "colours.jsonl", rows)
