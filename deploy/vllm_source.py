"""vLLM's source as a tree that is read and never imported: a folder, or a wheel as pip downloads it."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

DEPTH = 8  # how far a name is followed through re-exports
# Where the classes of the objects live that vLLM hands to a plugin.
HANDED_BY = ("vllm.lora", "vllm.engine", "vllm.config", "vllm.entrypoints.openai.models", "vllm.v1", "vllm.platforms")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """Where a name ends up: its module, and its definition where that is a class or function."""

    module: str
    node: Definition | None = None


@dataclass
class Source:
    """Every Python file of the package, by module name."""

    texts: dict[str, str]
    packages: frozenset[str]
    _trees: dict[str, ast.Module] = field(default_factory=dict)
    _bound: dict[str, dict[str, Definition | tuple[str, str] | None]] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: Path) -> Source:
        """`folder` is the package's own, site-packages/vllm."""
        paths = {path.relative_to(folder.parent).as_posix(): path for path in folder.rglob("*.py")}
        return cls.of_files({name: path.read_text("utf-8") for name, path in paths.items()})

    @classmethod
    def of_wheel(cls, wheel: Path) -> Source:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            return cls.of_files({name: archive.read(name).decode("utf-8") for name in names})

    @classmethod
    def of_files(cls, files: dict[str, str]) -> Source:
        """From texts by path, `vllm/version.py`."""
        texts = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): t for name, t in files.items()}
        packages = {
            name.removesuffix("/__init__.py").replace("/", ".") for name in files if name.endswith("__init__.py")
        }
        return cls(texts, frozenset(packages))

    @cached_property
    def everything(self) -> str:
        return "\n".join(self.texts.values())

    def tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            self._trees[module] = ast.parse(self.texts[module])
        return self._trees[module]

    def find(self, module: str, name: str, depth: int = DEPTH) -> Found | None:
        """The name of a module, followed through what the module imports it from; None when it is not there."""
        if module not in self.texts:
            return None
        if f"{module}.{name}" in self.texts:
            return Found(f"{module}.{name}")
        bound = self._names(module).get(name)
        if isinstance(bound, tuple):
            return self._follow(*bound, depth)
        return Found(module, bound) if name in self._names(module) else None

    def absolute(self, module: str, node: ast.ImportFrom) -> str:
        """The module that an import statement in `module` names."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        kept = parts[: len(parts) - node.level + (module in self.packages)]
        return ".".join([*kept, *([node.module] if node.module else [])])

    def lineage(self, found: Found) -> Iterator[ast.ClassDef]:
        """A class and its bases, as far as they are vLLM's."""
        if not isinstance(found.node, ast.ClassDef):
            return
        yield found.node
        for base in found.node.bases:
            if isinstance(base, ast.Name) and (above := self.find(found.module, base.id)) is not None:
                yield from self.lineage(above)

    @cached_property
    def holders(self) -> dict[str, dict[str, ast.stmt]]:
        """Attribute -> class -> its statement, over the classes of the modules where handed objects come from."""
        found: dict[str, dict[str, ast.stmt]] = {}
        for module in self.texts:
            if module.startswith(HANDED_BY):
                for node in self.tree(module).body:
                    for name, statement in (members(node) if isinstance(node, ast.ClassDef) else {}).items():
                        found.setdefault(name, {})[getattr(node, "name", "")] = statement
        return found

    def _follow(self, module: str, name: str, depth: int) -> Found | None:
        if not module.startswith("vllm"):
            return Found(module)
        return self.find(module, name, depth - 1) if depth else None

    def _names(self, module: str) -> dict[str, Definition | tuple[str, str] | None]:
        """What a module's statements bind, also under `if` and `try`: a definition, (module, name), or None."""
        if module in self._bound:
            return self._bound[module]
        bound: dict[str, Definition | tuple[str, str] | None] = {}
        tops: list[ast.stmt] = list(self.tree(module).body)
        for node in tops:
            if isinstance(node, ast.If | ast.Try):
                tops += [*node.body, *node.orelse, *(s for h in getattr(node, "handlers", ()) for s in h.body)]
            elif isinstance(node, Definition):
                bound[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                source = self.absolute(module, node)
                bound |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
            else:
                bound |= {target.id: None for target in _targets(node) if isinstance(target, ast.Name)}
        self._bound[module] = bound
        return bound


def members(node: ast.ClassDef) -> dict[str, ast.stmt]:
    """What a class defines, in its body or on `self`: name -> the statement."""
    found: dict[str, ast.stmt] = {}
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            found.setdefault(statement.name, statement)
            for inner in ast.walk(statement):
                for target in _targets(inner):
                    if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                        found.setdefault(target.attr, statement)
        for target in _targets(statement):
            if isinstance(target, ast.Name):
                found.setdefault(target.id, statement)
    return found


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [inner for target in node.targets for inner in (getattr(target, "elts", None) or [target])]
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []
