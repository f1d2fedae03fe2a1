"""A chat template that a version brings: its identity, and the proof that it renders a conversation in bounded time.

A template is a program. It is compiled and run here as the engine does it, in jinja2's immutable sandbox, but in a
process of its own, because a sandbox bounds what a template reaches and not how long it runs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import BaseInvalid, Problem
from adapters.serving import TEMPLATE_FILE

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_SETTINGS_BYTES = 64 << 20
PROBE_SECONDS = 5.0  # of the whole process; its rendering has less, see PROCESSOR_SECONDS there
PROBE = Path(__file__).with_name("template_probe.py")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
ADVICE = "Send the chat_template.jinja that the tokenizer of the training run saved."


def template_digest(text: str) -> str:
    """`sha256:...` of the template's text, as a card names the one of its run."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def base_template(folder: Path) -> str | None:
    """The base's own template, from its chat_template.jinja or its tokenizer_config.json; None where it has none."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text("utf-8")
    found = _tokenizer_settings(folder).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def special_tokens(folder: Path) -> dict[str, str]:
    """The base's special tokens, which a template may name as variables."""
    settings = _tokenizer_settings(folder)
    found = {name: settings.get(name) for name in SPECIAL_TOKENS}
    texts = {name: one.get("content") if isinstance(one, dict) else one for name, one in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def probe_template(text: str, tokens: Mapping[str, str]) -> Problem | None:
    """What is wrong with the template: it does not compile, fails or runs too long on a small conversation, or leaves
    the user's words out. Blocks for up to PROBE_SECONDS.
    """
    question = json.dumps({"template": text, "tokens": dict(tokens)})
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(PROBE)], input=question.encode(), capture_output=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return _problem(f"takes more than {PROBE_SECONDS:g} seconds for a conversation of one message")
    if done.returncode != 0:  # its limits on processor time and memory end it by a signal or a MemoryError
        return _problem("needs more processor time or memory than a conversation of one message may")
    answer = json.loads(done.stdout)
    return None if answer["is_sound"] else _problem(str(answer["message"]))


def _problem(message: str) -> Problem:
    return Problem("template_invalid", TEMPLATE_FILE, message, ADVICE)


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file() or file.stat().st_size > MAX_SETTINGS_BYTES:
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise BaseInvalid(f"{file} is not JSON: {error}.") from error
    return found if isinstance(found, dict) else {}
