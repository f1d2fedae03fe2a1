"""Read an adapter folder without loading a tensor: its config and the header of its weights, each held to its rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import Problem
from adapters.header import CONVERT_ADVICE, LFS_POINTER, TensorInfo, read_header
from adapters.lora_config import LoraSettings, read_config
from adapters.strict_json import JsonInvalid, parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MLX_WEIGHTS_FILE = "adapters.safetensors"  # MLX-LM's name for the same part
CARD_FILE = "card.json"
INITIAL_ADAPTER_FILE = "initial_adapter.safetensors"
ALLOWED_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, INITIAL_ADAPTER_FILE)
MAX_CONFIG_BYTES = 1 << 20
MAX_CARD_BYTES = 1 << 20
MAX_CONFIG_VALUES = 1 << 15  # ten thousand patterns fit; parsed in about 20 ms and 5 MB
MAX_CARD_VALUES = 1 << 16
UNSAFE_WEIGHTS = (
    "adapter_model.bin",
    "adapter_model.pt",
    "adapter_model.pth",
    "adapter_model.pkl",
    "adapter_model.ckpt",
    "adapters.npz",
)


@dataclass(frozen=True)
class Inspection:
    """All that the two files say, before any base is looked at."""

    folder: Path
    settings: LoraSettings | None
    tensors: tuple[TensorInfo, ...]
    problems: tuple[Problem, ...]
    limits: tuple[Problem, ...] = ()  # why the version could only be exported
    dropped: tuple[str, ...] = ()  # config fields that say nothing that is kept
    left_out: tuple[str, ...] = ()  # files beside the allowed ones; not read, not sent
    initial_tensors: tuple[TensorInfo, ...] | None = None  # of initial_adapter.safetensors, when it is there
    weights_file: str = WEIGHTS_FILE
    outline: LoraSettings | None = None  # what a refused config still says of names and base
    is_header_whole: bool = True  # every tensor of the weights could be read

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the config's meaning and what was found."""
        settings = self.settings
        return {
            "folder": str(self.folder),
            "rank": settings and settings.rank,
            "lora_alpha": settings and settings.alpha,
            "use_rslora": settings and settings.use_rslora,
            "base_claim": settings and settings.base_claim,
            "tensors": len(self.tensors),
            "dtypes": sorted({tensor.dtype for tensor in self.tensors}),
            "size_bytes": self.size_bytes,
            "problems": [problem.as_dict() for problem in self.problems],
            "limits": [problem.as_dict() for problem in self.limits],
            "dropped": list(self.dropped),
            "left_out": list(self.left_out),
        }


def inspect_folder(folder: Path) -> Inspection:
    """Read an adapter folder as any trainer writes it; every problem of both files is reported at once."""
    problems: list[Problem] = []
    settings = outline = None
    limits: tuple[Problem, ...] = ()
    dropped: tuple[str, ...] = ()
    config = _config(folder, problems)
    if config is not None:
        reading = read_config(config)
        settings, limits, dropped = reading.settings, reading.limits, reading.dropped
        outline = reading.outline
        problems += reading.problems
    tensors: tuple[TensorInfo, ...] = ()
    weights, is_header_whole = weights_of(folder), False
    if weights.is_file():
        header = read_header(weights)
        tensors, dropped = header.tensors, (*dropped, *_metadata_notes(header.metadata))
        problems += header.problems
        is_header_whole = not header.problems
    else:
        problems.append(_missing_weights(folder))
    initial = _initial_tensors(folder, problems)
    left_out = tuple(_left_out(folder, weights.name))
    return Inspection(
        folder,
        settings,
        tensors,
        tuple(problems),
        limits,
        dropped,
        left_out,
        initial,
        weights.name,
        outline,
        is_header_whole,
    )


def weights_of(folder: Path) -> Path:
    """The folder's weights: PEFT's file, or MLX-LM's where only that is there."""
    peft, mlx = folder / WEIGHTS_FILE, folder / MLX_WEIGHTS_FILE
    return mlx if mlx.is_file() and not peft.is_file() else peft


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card beside the adapter, kept as its maker's claim; None without one. Raises JsonInvalid."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    return parse_card(read_bounded(path, MAX_CARD_BYTES))


def parse_card(data: bytes) -> dict[str, Any]:
    """A card from a client: a JSON object of at most 1 MB; raises JsonInvalid."""
    if len(data) > MAX_CARD_BYTES:
        raise JsonInvalid(f"is larger than {MAX_CARD_BYTES:,} bytes", code="payload_too_large")
    card = parse_json(data, max_values=MAX_CARD_VALUES)
    if not isinstance(card, dict):
        raise JsonInvalid(f"is a {type(card).__name__}, not an object")
    return card


def read_bounded(path: Path, limit: int) -> bytes:
    """The file's bytes, at most one more than `limit`, so that a larger file shows itself without being read."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def _config(folder: Path, problems: list[Problem]) -> Any:
    path = folder / CONFIG_FILE
    if not path.is_file():
        advice = "Point at the folder that save_pretrained() wrote."
        problems.append(Problem("file_missing", CONFIG_FILE, f"is not in {folder.name or folder}", advice))
        return None
    data = read_bounded(path, MAX_CONFIG_BYTES)
    if data.startswith(LFS_POINTER):
        advice = "Run `git lfs pull` and retry."
        problems.append(Problem("git_lfs_pointer", CONFIG_FILE, "is a Git LFS pointer, not the file itself", advice))
    elif len(data) > MAX_CONFIG_BYTES:
        problems.append(Problem("payload_too_large", CONFIG_FILE, f"is larger than {MAX_CONFIG_BYTES:,} bytes"))
    else:
        try:
            return parse_json(data, max_values=MAX_CONFIG_VALUES)
        except JsonInvalid as error:
            problems.append(Problem(error.code, CONFIG_FILE, str(error)))
    return None


def _missing_weights(folder: Path) -> Problem:
    unsafe = next((name for name in UNSAFE_WEIGHTS if (folder / name).is_file()), None)
    if unsafe == "adapters.npz":
        advice = 'Save it as safetensors where MLX is: mx.save_safetensors("adapters.safetensors", dict(mx.load(...))).'
        return Problem("format_not_allowed", unsafe, "is a NumPy archive; only safetensors files are read here", advice)
    if unsafe:
        message = f"is a pickle, which can run code when it is read; {WEIGHTS_FILE} is not there"
        return Problem("format_not_allowed", unsafe, message, CONVERT_ADVICE)
    return Problem("file_missing", WEIGHTS_FILE, f"is not in {folder.name or folder}", CONVERT_ADVICE)


def _metadata_notes(metadata: Any) -> Iterator[str]:
    names = sorted(name for name in metadata or {} if name != "format")
    if names:
        yield f"{WEIGHTS_FILE} metadata: {', '.join(name[:40] for name in names[:10])} ({len(names)} in all)"


def _initial_tensors(folder: Path, problems: list[Problem]) -> tuple[TensorInfo, ...] | None:
    path = folder / INITIAL_ADAPTER_FILE
    if not path.is_file():
        return None
    header = read_header(path)
    problems += header.problems
    return header.tensors


def _left_out(folder: Path, weights: str) -> Iterator[str]:
    if folder.is_dir():
        yield from sorted(item.name for item in folder.iterdir() if item.name not in (*ALLOWED_FILES, weights))
