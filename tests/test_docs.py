"""What the docs promise exists: commands parse, make targets and links are there, Python blocks compile."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from server.cli.main import build_app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").glob("*.md")])
WrongUsage: Any = typer.BadParameter.__base__  # typer carries its own click
SHELLS = ("bash", "sh", "console", "shell", "")


def blocks(page: Path, languages: tuple[str, ...]) -> Iterator[str]:
    """The fenced blocks of a page whose language is one of these."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Each call of a program in the page's shell blocks, as words; comments, pipes and redirections left out."""
    for body in blocks(page, SHELLS):
        for line in body.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            end = next((i for i, word in enumerate(words) if re.fullmatch(r"[|&;]+|\d?>.*|<", word)), len(words))
            if words and Path(words[0]).name == program:
                yield words[1:end]


@cache
def command_line() -> Any:
    return typer.main.get_command(build_app())


def parse(words: list[str]) -> None:
    """Parse as the command would, invoking nothing; raises WrongUsage for an unknown verb, option or value."""
    command, rest = command_line(), words
    context = typer.Context(command, info_name="hotshoe")
    while isinstance(command, TyperGroup):
        name, command, rest = command.resolve_command(context, list(rest))
        context = typer.Context(command, parent=context, info_name=name)
    if "--help" not in rest:
        command.make_context(context.info_name, list(rest), parent=context.parent)


CALLS = [(page.relative_to(ROOT), words) for page in PAGES for words in commands(page, "hotshoe")]


@pytest.mark.parametrize(("page", "words"), CALLS, ids=[f"{page}: {' '.join(words)}" for page, words in CALLS])
def test_every_command_in_the_docs_is_one_that_the_program_takes(page: Path, words: list[str]) -> None:
    parse(words)


def test_the_check_itself_sees_a_wrong_command() -> None:
    with pytest.raises(WrongUsage):
        parse(["train", "data.jsonl", "--no-such-flag"])
    with pytest.raises(WrongUsage):
        parse(["fly"])
    assert len(CALLS) > 8


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for words in commands(page, "make"):
            used = {word for word in words if re.fullmatch(r"[a-z-]+", word)}
            assert used <= targets, (page, used - targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_in_the_docs_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_in_the_docs_compiles(page: Path) -> None:
    for body in blocks(page, ("python",)):
        compile(body, page.name, "exec")


def test_every_page_is_reached_from_the_readme_or_a_page_that_is() -> None:
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
        waiting.extend((page.parent / link).resolve() for link in links if "://" not in link)
    assert {page for page in PAGES if page.parent.name == "docs"} <= reached


def test_every_module_that_contributing_names_exists() -> None:
    for name in re.findall(r"`((?:adapters|training|server|docs)/[\w./]*)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / name).exists(), name
