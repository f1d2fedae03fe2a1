"""Compiles and runs one chat template, as a program of its own: question on stdin, answer on stdout, both JSON.

The environment is the one that transformers and so vLLM render with:
https://huggingface.co/docs/transformers/chat_templating_writing. Nothing of ours is imported: `python -I` runs it.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

PROCESSOR_SECONDS = 2
MEMORY_BYTES = 512 << 20
MAX_RENDERED = 1 << 20
MAX_MESSAGE = 300
WORDS = "What is a hot shoe?"
MESSAGES = [{"role": "user", "content": WORDS}]


class Generation(Extension):
    """`{% generation %}` marks what the model writes, for training; the text inside is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_stands"), [], [], body).set_lineno(line)

    def _as_it_stands(self, caller: Callable[[], str]) -> str:
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def trouble(template: str, tokens: dict[str, str]) -> str | None:
    """What is wrong with the template; None when it renders a question with the words of its user."""
    try:
        compiled = environment().from_string(template)
        text = compiled.render(messages=MESSAGES, tools=None, documents=None, add_generation_prompt=True, **tokens)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        return f"does not render a conversation of one message{where}: {str(error)[:MAX_MESSAGE]}"
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a template can raise anything that its expressions raise
        return f"does not render a conversation of one message: {type(error).__name__}: {str(error)[:MAX_MESSAGE]}"
    if len(text) > MAX_RENDERED:
        return f"makes {len(text):,} characters of a conversation of one message; at most {MAX_RENDERED:,} are taken"
    return None if WORDS in text else "leaves the user's words out of the prompt"


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    question = json.load(sys.stdin)
    found = trouble(question["template"], question["tokens"])
    json.dump({"is_sound": found is None, "message": found}, sys.stdout)


if __name__ == "__main__":
    main()
