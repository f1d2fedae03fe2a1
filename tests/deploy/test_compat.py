"""The comparison of a vLLM with what our plugins use: on small trees, and on the vLLM that is installed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from deploy.compat import compare, installed_source, our_uses
from deploy.uses import uses_of
from deploy.vllm_source import Source

PLUGIN = """
from vllm.lora.request import LoRARequest
from vllm.lora.wrapper import Wrapper
try:
    from vllm.new.args import make_parser
except ImportError:
    from vllm.old.args import make_parser

class Ours(Wrapper):
    def update(self, mapping, size, **kwargs): ...
    def own(self): ...

async def load(engine):
    await engine.add_lora(LoRARequest(name="a", number=1))
    return engine.manager.slots, getattr(engine, "bytes_used"), "vllm:waiting"
"""
START = 'flags = ["--max-loras", "3"]; names = {"served-model-name": ""}; env = {"VLLM_PLUGINS": "ours"}'
TREE = {
    "__init__.py": "",
    "old/args.py": "def make_parser(): ...",
    "lora/__init__.py": "",
    "lora/request.py": "class Struct: ...\n"
    "class LoRARequest(Struct):\n    name: str\n    number: int\n    path: str = ''",
    "lora/wrapper.py": "from .base import Base\nclass Wrapper(Base): ...",
    "lora/base.py": "class Base:\n    def update(self, mapping, size): ...",
    "v1/engine.py": "class Engine:\n    async def add_lora(self, request): ...\n"
    "    def __init__(self):\n        self.manager = 1\n        self.bytes_used = 2",
    "lora/manager.py": "class Manager:\n    slots: list",
    "args.py": "max_loras: int\nserved_model_name: str\nVLLM_PLUGINS = 'vllm:waiting'",
}


Changes = dict[str, str | None]


def source(changes: Changes | None = None) -> Source:
    """The small vLLM, with some files other ones; None takes one away."""
    files: Changes = {**TREE, **(changes or {})}
    return Source.of_files({f"vllm/{name}": text for name, text in files.items() if text is not None})


def differences(changes: Changes | None = None) -> list[str]:
    return [str(finding) for finding in compare(uses_of([PLUGIN], [START]), source(), source(changes))]


def test_a_vllm_with_everything_has_no_difference() -> None:
    assert differences() == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora/request.py": None}, "vllm.lora.request:LoRARequest: is not there"),
        ({"lora/request.py": "class Request: ..."}, "vllm.lora.request:LoRARequest: is not there"),
        ({"old/args.py": None}, "make_parser: is not there"),
        (
            {"lora/request.py": "class LoRARequest:\n    name: str\n    id: int"},
            "vllm.lora.request:LoRARequest: has no field number",
        ),
        ({"lora/base.py": "class Base:\n    def refresh(self, mapping, size): ..."}, "Wrapper.update: we override it"),
        ({"lora/base.py": "class Base:\n    def update(self, size, mapping): ..."}, "takes self, size, mapping, ours"),
        ({"v1/engine.py": "class Engine:\n    manager: int\n    bytes_used: int"}, ".add_lora: was in Engine"),
        (
            {"v1/engine.py": TREE["v1/engine.py"].replace("request)", "request, tenant)")},
            ".add_lora: wants tenant too",
        ),
        ({"lora/manager.py": "class Manager:\n    places: list"}, ".slots: was in Manager"),
        (
            {"args.py": "loras_max: int\nserved_model_name: str\nVLLM_PLUGINS = 'vllm:waiting'"},
            "--max-loras: is no flag",
        ),
        ({"args.py": "max_loras: int\nmodel: str\nVLLM_PLUGINS = 'vllm:waiting'"}, "--served-model-name: is no flag"),
        ({"args.py": "max_loras: int\nserved_model_name: str\nA = 'vllm:waiting'"}, "VLLM_PLUGINS: is not there"),
        ({"args.py": "max_loras: int\nserved_model_name: str\nVLLM_PLUGINS = 1"}, "vllm:waiting: is not there"),
    ],
)
def test_what_is_missing_or_other_is_named(changes: Changes, says: str) -> None:
    found = differences(changes)
    assert any(says in line for line in found), found


def test_one_of_two_places_of_a_name_is_enough() -> None:
    assert differences({"old/args.py": None, "new/args.py": "def make_parser(): ..."}) == []


def test_a_name_may_come_through_a_package_that_imports_it() -> None:
    moved: Changes = {
        "lora/request.py": "from vllm.lora import LoRARequest",
        "lora/__init__.py": "from .real import LoRARequest",
        "lora/real.py": TREE["lora/request.py"],
    }
    assert differences(moved) == []


def test_a_new_argument_that_ours_takes_among_its_keywords_is_no_difference() -> None:
    assert differences({"lora/base.py": "class Base:\n    def update(self, mapping, size, extra=None): ..."}) == []


def test_a_wheel_and_a_folder_are_read_alike(tmp_path: Path) -> None:
    for name, text in TREE.items():
        (tmp_path / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vllm" / name).write_text(text)
    with zipfile.ZipFile(tmp_path / "vllm-1-py3-none-any.whl", "w") as wheel:
        for name, text in TREE.items():
            wheel.writestr(f"vllm/{name}", text)
    folder = Source.of_folder(tmp_path / "vllm")
    assert folder.texts == Source.of_wheel(tmp_path / "vllm-1-py3-none-any.whl").texts == source().texts


def test_our_own_uses_are_read_from_our_source() -> None:
    uses = our_uses()
    assert "vllm.lora.request" in {item.module for item in uses.imports}
    assert {"add_lora", "lora_requests", "lora_index_to_id", "punica_wrapper_mapping"} <= uses.handed
    assert {"max-cpu-loras", "tool-call-parser", "trust-remote-code"} <= uses.flags
    assert "add_lora_linear" in uses.subclasses["vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"]


@pytest.mark.model
def test_the_installed_vllm_has_everything_that_the_plugins_use() -> None:
    installed = installed_source()
    assert compare(our_uses(), installed, installed) == []
