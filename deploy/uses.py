"""What our plugins use of vLLM, read from our own source: so the list cannot rot.

Imports, attributes of imported classes, methods that override vLLM's, keywords of calls, attributes of the objects that
vLLM hands us, flags and variables that its process is started with.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

FLAG = re.compile(r"(?:--)?([a-z][a-z0-9]*(?:-[a-z0-9]+)+|model|middleware)")
VARIABLE = re.compile(r"VLLM_[A-Z_]+")
METRIC = re.compile(r"vllm:[a-z_]+")


@dataclass(frozen=True)
class Import:
    """`name` of `module`; `name` is empty where the module itself is meant. `group` joins alternatives of one `try`."""

    module: str
    name: str
    group: int | None = None


@dataclass(frozen=True)
class Call:
    """A call of an imported name, or of a method (`name` begins with a dot): how many positions, which keywords."""

    name: str
    positions: int
    keywords: frozenset[str]


@dataclass
class Uses:
    """Everything that a set of our modules uses."""

    imports: set[Import] = field(default_factory=set)
    attributes: set[tuple[str, str]] = field(default_factory=set)  # (imported class, attribute)
    subclasses: dict[str, dict[str, ast.FunctionDef]] = field(default_factory=dict)  # vLLM's class -> our methods
    calls: set[Call] = field(default_factory=set)
    handed: set[str] = field(default_factory=set)  # attributes of objects whose class our source does not say
    flags: set[str] = field(default_factory=set)  # without dashes before them
    variables: set[str] = field(default_factory=set)
    metrics: set[str] = field(default_factory=set)

    def read(self, text: str) -> None:
        """Add what one module of ours uses."""
        tree = ast.parse(text)
        imported = self._imports(tree)
        own = set(_own_names(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in imported:
                        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                        self.subclasses.setdefault(imported[base.id], {}).update({m.name: m for m in methods})
            elif isinstance(node, ast.Attribute):
                if isinstance(node.value, ast.Name) and node.value.id in imported:
                    self.attributes.add((imported[node.value.id], node.attr))
                elif node.attr not in own:
                    self.handed.add(node.attr)
            elif isinstance(node, ast.Call):
                self._call(node, imported, own)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.metrics |= set(METRIC.findall(node.value))

    def read_start(self, text: str) -> None:
        """Add the flags and variables that the module which starts vLLM writes out, those that are refused too."""
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.flags |= {found[1]} if (found := FLAG.fullmatch(node.value)) else set()
                self.variables |= {node.value} if VARIABLE.fullmatch(node.value) else set()

    def _imports(self, tree: ast.Module) -> dict[str, str]:
        """Note vLLM's imports; local name -> `module:name`."""
        groups = {
            id(inner): index
            for index, node in enumerate(ast.walk(tree))
            if isinstance(node, ast.Try)
            for statement in (*node.body, *(s for handler in node.handlers for s in handler.body))
            for inner in ast.walk(statement)
        }
        local: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    self.imports.add(Import(node.module or "", alias.name, groups.get(id(node))))
                    local[alias.asname or alias.name] = f"{node.module}:{alias.name}"
            elif isinstance(node, ast.Import):
                found = {alias.name for alias in node.names if alias.name.split(".")[0] == "vllm"}
                self.imports |= {Import(name, "", groups.get(id(node))) for name in found}
        return local

    def _call(self, node: ast.Call, imported: dict[str, str], own: set[str]) -> None:
        keywords = frozenset(keyword.arg for keyword in node.keywords if keyword.arg)
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        if isinstance(node.func, ast.Name) and node.func.id in imported:
            self.calls.add(Call(imported[node.func.id], len(node.args), keywords))
        elif isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value not in own:
                self.handed.add(name.value)
        elif isinstance(node.func, ast.Attribute) and node.func.attr not in own:
            self.calls.add(Call(f".{node.func.attr}", len(node.args), keywords))


def uses_of(plugins: Iterable[str], starts: Iterable[str]) -> Uses:
    """What these modules of ours use: plugins' texts, and those that decide how vLLM is started."""
    uses = Uses()
    for text in plugins:
        uses.read(text)
    for text in starts:
        uses.read_start(text)
    return uses


def _own_names(tree: ast.Module) -> Iterator[str]:
    """Names that our module defines itself: no object of vLLM's is meant by them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
