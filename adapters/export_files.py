"""What lies beside the weights of an export: the base's config, tokenizer and template, and the manifest over all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adapters.bases import SINGLE_WEIGHTS, WEIGHT_INDEX
from adapters.canonical import digest_folder
from adapters.durable import write_file
from adapters.export_request import ADAPTER, HF, NF4, ExportRequest
from adapters.parity_page import page
from adapters.serving import TEMPLATE_FILE
from adapters.staging import json_bytes, sha256

MANIFEST, PARITY, PAGE = "manifest.json", "parity.json", "parity.html"
CONFIG = "config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
# What a Hugging Face folder may hold beside its weights; anything else of the base's folder is left out and listed.
COMPANIONS = (CONFIG, "generation_config.json", *TOKENIZER, "LICENSE", "LICENSE.txt", "NOTICE")
EXPECTED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def companions(request: ExportRequest) -> list[Path]:
    """The files to carry over: the base's, its tokenizer replaced where the request brings another."""
    found = []
    for name in COMPANIONS:
        folder = request.tokenizer if request.tokenizer and name in TOKENIZER else request.base.folder
        if (folder / name).is_file():
            found.append(folder / name)
    return found


def write_companions(request: ExportRequest, folder: Path, changes: Mapping[str, Any]) -> None:
    """Write them; `changes` are keys of config.json that the merge changed."""
    for path in companions(request):
        if path.name == TEMPLATE_FILE and request.chat_template is not None:
            continue
        content = path.read_bytes()
        if path.name == CONFIG and (request.dtype or changes):
            config = json.loads(content)
            keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
            dtype = dict.fromkeys(keys, request.dtype) if request.dtype else {}
            content = (json.dumps({**config, **dtype, **changes}, indent=2) + "\n").encode()
        write_file(folder / path.name, content)
    if request.chat_template is not None:
        write_file(folder / TEMPLATE_FILE, request.chat_template.encode())


def lacking(request: ExportRequest) -> tuple[str, ...]:
    """Files of a complete Hugging Face folder that neither base nor version has, so the export has not either."""
    if request.format != HF:
        return ()
    names = {path.name: path for path in companions(request)}
    missing = [name for name in EXPECTED if name not in names]
    settings = names.get("tokenizer_config.json")
    has_inline = settings is not None and b'"chat_template"' in settings.read_bytes()
    if TEMPLATE_FILE in missing and (has_inline or request.chat_template is not None):
        missing.remove(TEMPLATE_FILE)
    return tuple(missing)


def _left_out(folder: Path) -> list[str]:
    """Files of the base that the export does not carry over."""
    weights = {SINGLE_WEIGHTS, WEIGHT_INDEX, *COMPANIONS}
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name not in weights and not name.endswith(".safetensors") and name[0] != "."]


def notes(request: ExportRequest) -> list[str]:
    """What a reader of the report should know and no figure says."""
    found = []
    if request.merge_into == NF4:
        found.append("The adapter is merged into what NF4 leaves of the base's projections, as training saw them.")
    elif request.format != ADAPTER and says(request.card, {"qlora", "nf4"}):
        found.append(
            "The adapter was trained on an NF4-quantised base and is merged into the unquantised weights here: "
            "answers may differ a little from those seen in training. `merge_into: nf4` merges into what NF4 left."
        )
    if request.format != HF:
        return found
    if request.chat_template is not None:
        found.append(f"{TEMPLATE_FILE} is the version's own, and not the base's.")
    if request.tokenizer is not None:
        found.append("The tokenizer is the one beside the adapter, and not the base's.")
    missing = lacking(request)
    if missing:
        found.append(f"The base folder has no {', '.join(missing)}; the export has none either.")
    left = _left_out(request.base.folder)
    if left:
        found.append(f"Left out of the base folder: {', '.join(left)}.")
    return found


def says(value: Any, words: set[str]) -> bool:
    """Some value in a card, at any depth, is one of the words."""
    if isinstance(value, Mapping):
        return any(says(item, words) for item in value.values())
    if isinstance(value, list):
        return any(says(item, words) for item in value)
    return isinstance(value, str) and value.lower() in words


def seal(request: ExportRequest, dtype: str, folder: Path, parity: Mapping[str, Any]) -> dict[str, Any]:
    """Write the parity report, its page, and manifest.json: the digest of every file and of the inputs.

    No times are in them, so that a re-run is the same.
    """
    facts = {
        "format": request.format,
        "source": request.source,
        "dtype": dtype,
        "merged_into": request.merge_into,
        "base": {"id": request.base.id, "digest": request.base.digest},
        "adapter": {"digest": digest_folder(request.adapter)},
    }
    write_file(folder / PARITY, json_bytes(parity))
    write_file(folder / PAGE, page(parity, facts))
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(sha256, paths))
    files = {
        path.name: {"sha256": digest, "size_bytes": path.stat().st_size}
        for path, digest in zip(paths, digests, strict=True)
    }
    manifest = {**facts, "files": files}
    write_file(folder / MANIFEST, json_bytes(manifest))
    return manifest
