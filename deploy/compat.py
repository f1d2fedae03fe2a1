"""`make compat`: whether a vLLM has every name and signature that our plugins use, read from its source.

`python -m deploy.compat` downloads the newest wheel for GPUs, without its dependencies, and compares it with the vLLM
that is installed here; with a path it reads that wheel or folder instead. Nothing of it is installed or run.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.uses import Call, Uses, uses_of
from deploy.vllm_source import Found, Source, members

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "server" / "vllm_plugin"
START = ROOT / "server" / "engine" / "vllm_flags.py"


@dataclass(frozen=True)
class Finding:
    """One thing that is not there, or not as we use it."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


def compare(uses: Uses, installed: Source, other: Source) -> list[Finding]:
    """What of `uses` is in `installed` and not, or not so, in `other`; imports and calls need no `installed`."""
    checks: tuple[Iterator[Finding], ...] = (
        _imports(uses, other),
        _attributes(uses, installed, other),
        _overrides(uses, installed, other),
    )
    checks += (_calls(uses, installed, other), _handed(uses, installed, other), _words(uses, installed, other))
    return sorted({finding for check in checks for finding in check}, key=str)


def _imports(uses: Uses, other: Source) -> Iterator[Finding]:
    found = {item: _find(other, f"{item.module}:{item.name}") is not None for item in uses.imports}
    saved = {item.group for item, is_there in found.items() if is_there and item.group is not None}
    for item, is_there in found.items():
        if not is_there and item.group not in saved:
            yield Finding(f"{item.module}:{item.name}".rstrip(":"), "is not there")


def _attributes(uses: Uses, installed: Source, other: Source) -> Iterator[Finding]:
    """Attributes of imported names; one that is not here either is our own addition."""
    for owner, name in uses.attributes:
        if _has(installed, owner, name) and _find(other, owner) is not None and not _has(other, owner, name):
            yield Finding(f"{owner}.{name}", "is not there")


def _has(source: Source, owner: str, name: str) -> bool:
    found = _find(source, owner)
    if found is None:
        return False
    if isinstance(found.node, ast.ClassDef):
        return _member(source, found, name) is not None
    return source.find(found.module, name) is not None


def _overrides(uses: Uses, installed: Source, other: Source) -> Iterator[Finding]:
    """A method of ours that takes the place of one of vLLM's must still have one, and take what that takes."""
    for owner, methods in uses.subclasses.items():
        before, now = _find(installed, owner), _find(other, owner)
        for name, ours in methods.items():
            if now is None or before is None or _member(installed, before, name) is None:
                continue
            theirs = _member(other, now, name)
            if theirs is None:
                yield Finding(f"{owner}.{name}", "we override it, and it is not there any more")
            elif isinstance(theirs, ast.FunctionDef) and (why := _misfit(theirs, ours)):
                yield Finding(f"{owner}.{name}", why)


def _misfit(theirs: ast.FunctionDef, ours: ast.FunctionDef) -> str | None:
    """Why a caller of theirs cannot call ours."""
    wanted = [argument.arg for argument in theirs.args.args]
    taken = [argument.arg for argument in ours.args.args]
    more = set(wanted) - set(taken)
    if more and ours.args.kwarg is None:
        return f"takes {', '.join(sorted(more))}, ours does not"
    shared = [name for name in taken if name in wanted]
    if shared != wanted[: len(shared)]:
        return f"takes {', '.join(wanted)}, ours {', '.join(taken)}"
    return None


def _calls(uses: Uses, installed: Source, other: Source) -> Iterator[Finding]:
    for call in uses.calls:
        if call.name.startswith("."):
            yield from _method_call(call, installed, other)
            continue
        found = _find(other, call.name)
        if found is not None and found.node is not None and (why := _refused(other, found, call)):
            yield Finding(call.name, why)


def _method_call(call: Call, installed: Source, other: Source) -> Iterator[Finding]:
    """A method of an object that we are handed: some class there must take the call, of those that take it here."""
    name = call.name.removeprefix(".")
    had = {holder for holder, item in installed.holders.get(name, {}).items() if _refusal(call, item) is None}
    whys = [_refusal(call, item) for holder, item in other.holders.get(name, {}).items() if holder in had]
    if whys and all(whys):
        yield Finding(call.name, str(whys[0]))


def _refused(source: Source, found: Found, call: Call) -> str | None:
    if not isinstance(found.node, ast.ClassDef):
        return _refusal(call, found.node, is_method=False) if found.node else None
    init = _member(source, found, "__init__")
    if isinstance(init, ast.FunctionDef):
        return _refusal(call, init)
    fields = {name for above in source.lineage(found) for name, item in members(above).items() if _is_field(item)}
    unknown = call.keywords - fields
    return f"has no field {', '.join(sorted(unknown))}" if fields and unknown else None


def _is_field(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.AnnAssign)


def _refusal(call: Call, taker: ast.stmt, *, is_method: bool = True) -> str | None:
    """Why this call of a function does not fit its signature."""
    if not isinstance(taker, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    names = [argument.arg for argument in (*taker.args.posonlyargs, *taker.args.args)][is_method:]
    known = {*names, *(argument.arg for argument in taker.args.kwonlyargs)}
    unknown = call.keywords - known
    if unknown and taker.args.kwarg is None:
        return f"takes no {', '.join(sorted(unknown))}"
    if call.positions > len(names) and taker.args.vararg is None:
        return f"takes {len(names)} arguments, we give {call.positions}"
    needed = names[: len(names) - len(taker.args.defaults)][call.positions :]
    missing = [name for name in needed if name not in call.keywords]
    return f"wants {', '.join(missing)} too" if missing else None


def _handed(uses: Uses, installed: Source, other: Source) -> Iterator[Finding]:
    """An attribute that a class has here, where objects come from, must be on a class of that name there."""
    for name in uses.handed:
        had = installed.holders.get(name, {}).keys()
        if had and not had & other.holders.get(name, {}).keys():
            yield Finding(f".{name}", f"was in {', '.join(sorted(had))}, and is in none of them")


def _words(uses: Uses, installed: Source, other: Source) -> Iterator[Finding]:
    """Flags, variables and metrics are looked for as words: a flag is a field with underscores."""
    for flag in uses.flags:
        spellings = (flag.replace("-", "_"), f"--{flag}")
        if any(word in installed.everything for word in spellings) and not any(
            w in other.everything for w in spellings
        ):
            yield Finding(f"--{flag}", "is no flag")
    for word in uses.variables | uses.metrics:
        if word in installed.everything and word not in other.everything:
            yield Finding(word, "is not there")


def _find(source: Source, owner: str) -> Found | None:
    module, _, name = owner.partition(":")
    if name:
        return source.find(module, name)
    return Found(module) if module in source.texts else None


def _member(source: Source, found: Found, name: str) -> ast.stmt | None:
    return next((held[name] for above in source.lineage(found) if name in (held := members(above))), None)


def our_uses() -> Uses:
    """What our plugins and the start of the engine use."""
    return uses_of((path.read_text() for path in sorted(PLUGINS.glob("*.py"))), [START.read_text()])


def installed_source() -> Source:
    """The vLLM of this environment, found without importing it; raises SystemExit."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vLLM is not installed here: make setup")
    return Source.of_folder(Path(spec.submodule_search_locations[0]))


def download(folder: Path, version: str | None) -> Path:
    """vLLM's wheel for GPUs, without its dependencies; raises CalledProcessError."""
    wanted = f"vllm=={version}" if version else "vllm"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, wanted], check=True)
    return next(folder.glob("vllm-*.whl"))


def read(path: Path) -> Source:
    return Source.of_folder(path) if path.is_dir() else Source.of_wheel(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.compat", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="a wheel, or vLLM's own folder; downloaded when not given")
    parser.add_argument("--version", help="download this one instead of the newest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.path or download(Path(folder), given.version)
        other = read(path)
    uses, name = our_uses(), path.name
    findings = compare(uses, installed_source(), other)
    print(f"{name}: {len(other.texts)} modules, against {len(uses.imports)} imports of ours")
    for finding in findings:
        print(f"  {finding}")
    print(f"{len(findings)} differences" if findings else "everything that the plugins use is there")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
