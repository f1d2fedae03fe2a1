"""The command as a whole: what its help lists without reading any options, and where each verb is."""

from __future__ import annotations

import importlib

import pytest
import typer
from typer.testing import CliRunner

from server.cli.main import VERB_MODULES, build_app, list_verbs


def verbs_of(app: typer.Typer) -> list[str]:
    return sorted(typer.main.get_group(app).commands)


def test_help_lists_what_the_whole_command_lists() -> None:
    quick, whole = (CliRunner().invoke(app, ["--help"]).output for app in (list_verbs(), build_app()))
    assert quick == whole and "train" in quick


@pytest.mark.parametrize("module", VERB_MODULES)
def test_each_module_has_the_verbs_that_are_named_beside_it(module: str) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    importlib.import_module(module).add_to(app)
    assert verbs_of(app) == sorted(VERB_MODULES[module])
    for verb in VERB_MODULES[module]:
        assert verbs_of(build_app(verb)) == sorted(VERB_MODULES[module])


def test_an_unknown_word_is_answered_by_the_whole_command() -> None:
    result = CliRunner().invoke(build_app("trian"), ["trian"])
    assert result.exit_code == 2 and "train" in result.output
