"""A template of a stranger: compiled and run in a process of its own, ended in time, and told by its bytes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from adapters.chat_template import PROBE_SECONDS, base_template, probe_template, special_tokens, template_digest
from tests.fixtures.bases import TEMPLATES

SOUND = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
NESTED = "".join("{% for a in range(1000) %}" for _ in range(8)) + "x" + "{% endfor %}" * 8


def message_of(text: str, **tokens: str) -> str:
    problem = probe_template(text, tokens)
    assert problem is not None
    assert (problem.code, problem.path) == ("template_invalid", "chat_template.jinja")
    return problem.message


@pytest.mark.parametrize("name", sorted(path.name for path in TEMPLATES.glob("*.jinja")))
def test_the_templates_of_real_bases_are_sound(name: str) -> None:
    assert probe_template((TEMPLATES / name).read_text("utf-8"), {"eos_token": "<|im_end|>"}) is None


def test_what_transformers_adds_to_jinja_is_there() -> None:
    more = "{% generation %}{{ messages | tojson }}{% endgeneration %}{{ strftime_now('%Y') }}{{ bos_token + 'x' }}"
    assert probe_template(SOUND + more + "{% for a in messages %}{% break %}{% endfor %}", {"bos_token": "<s>"}) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for message in messages %}", "line 1"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[7].content }}", "no element"),
        ("{{ 1 + 'x' }}", "TypeError"),
        ("Hello", "leaves the user's words out"),
        (SOUND + "{{ 'x' * 2000000 }}", "characters"),
    ],
)
def test_a_template_that_renders_no_prompt_is_refused_with_why(text: str, said: str) -> None:
    assert said in message_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds_what_reaches_out_of_a_template(text: str) -> None:
    message_of(SOUND + text)


@pytest.mark.parametrize(
    "text", [SOUND + NESTED, "{{ 'x' * 10 ** 10 }}", "{{ ['x' * 9999] * 10 ** 9 }}", "{{ 9 ** 9 ** 9 }}"]
)
def test_a_template_that_would_run_for_ever_or_fill_the_memory_is_ended(text: str) -> None:
    begun = time.monotonic()
    message_of(text)
    assert time.monotonic() - begun < PROBE_SECONDS + 2


def test_a_template_sees_nothing_of_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOTSHOE_API_KEY", "canary-key")
    assert "canary" not in message_of("{{ raise_exception(self | string ~ config | string) }}")


def test_the_bases_template_is_found_where_transformers_looks(tmp_path: Path) -> None:
    assert base_template(tmp_path) is None and special_tokens(tmp_path) == {}
    settings = {
        "chat_template": "from settings",
        "bos_token": None,
        "eos_token": {"content": "</s>"},
        "pad_token": "<p>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert base_template(tmp_path) == "from settings"
    assert special_tokens(tmp_path) == {"eos_token": "</s>", "pad_token": "<p>"}
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert base_template(tmp_path) == "b"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert base_template(tmp_path) == "from the file"
    assert template_digest("from the file").startswith("sha256:")
