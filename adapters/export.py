"""One export, from adapter to finished folder: plan, merge, prove, seal, rename once.

The output appears whole or not at all: it is written into a hidden sibling folder, fsynced, and renamed. What a killed
process left is swept by the next export beside it. `python -m adapters.export SPEC.json` runs one as a child process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.bases import SINGLE_WEIGHTS, WEIGHT_INDEX, BaseModel, load_base
from adapters.canonical import canonicalise, check, digest_folder
from adapters.child import end_with_stdin
from adapters.durable import sync, write_file
from adapters.errors import BaseMismatch, HotshoeError, InvalidRequest, OutputExists, ParityFailed, Problem, StorageFull
from adapters.inspect import inspect_folder
from adapters.lora_config import MAX_RANK
from adapters.merge import merge, plan_merge
from adapters.merge_plan import MergePlan, check_inputs, checkpoint_bytes
from adapters.parity_page import page
from adapters.parity_report import Questions, Tell, dtype_of, judged, percents, prove, with_verdict
from adapters.peft_merge import merge_by_peft, needs_peft
from adapters.serving import TEMPLATE_FILE
from adapters.staging import explained, json_bytes, publish, sha256, staging

FORMATS = ("hf",)
MANIFEST, PARITY, PARITY_PAGE = "manifest.json", "parity.json", "parity.html"
# What a Hugging Face folder may hold beside its weights; anything else of the base's folder is left out and listed.
COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("LICENSE", "LICENSE.txt", "NOTICE"),
)
EXPECTED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SPACE_MARGIN_BYTES = 16 << 20


@dataclass(frozen=True)
class ExportRequest:
    """What to export. `accepted_digests` are digests of bases, beside the merge base, that it may be made for."""

    adapter: Path
    base: BaseModel
    out: Path
    source: str  # NAME@N or the folder, for the manifest
    format: str = "hf"
    dtype: str | None = None
    with_logits: bool = True
    base_digest: str | None = None  # the base that the adapter was checked against
    accepted_digests: tuple[str, ...] = ()
    card: Mapping[str, Any] | None = None
    chat_template: str | None = None  # the version's own, in place of the base's
    served: tuple[Mapping[str, Any], ...] = ()  # a server's answers to the probe, see parity_served
    evaluation: tuple[Any, ...] = ()  # rows that parity is measured on beside the probe, see parity_prompts
    workers: int | None = None


@dataclass(frozen=True)
class ExportResult:
    """A finished export: the folder, what is in it, and its parity report."""

    folder: Path
    manifest: Mapping[str, Any]
    parity: Mapping[str, Any]
    lacking: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        files = self.manifest["files"]
        return {
            "path": str(self.folder),
            "source": self.manifest["source"],
            "size_bytes": sum(entry["size_bytes"] for entry in files.values()),
            "files": files,
            "lacking": list(self.lacking),
            "parity": self.parity,
        }


def export(request: ExportRequest, report: Tell | None = None) -> ExportResult:
    """Merge into `request.out`, which must not exist, and prove it.

    Raises OutputExists, BaseMismatch, BaseInvalid, MergeFailed, StorageFull or ParityFailed (after `report` got the
    failed parity); whatever is raised, nothing is left behind. The same inputs give the same bytes. `report` gets
    progress as dicts with a `stage`.
    """
    tell = report or (lambda _: None)
    _check_request(request)
    if needs_peft(request.adapter, request.base):
        return _export_by_peft(request, tell)
    plan = plan_merge(request.adapter, request.base, dtype=request.dtype)
    tell({"stage": "planned", **plan.as_dict()})
    try:
        with staging(request.out) as folder:
            _check_space(request, plan.weight_bytes)
            merge(plan, folder, workers=request.workers, progress=percents(tell, "merging", plan.weight_bytes))
            _write_companions(request, folder)
            parity = _prove(request, plan, folder, tell)
            manifest = _seal(request, dtype_of(plan), folder, parity)
            publish(folder, request.out)
    except OSError as error:
        raise explained(error) from error
    tell({"stage": "done"})
    return ExportResult(request.out, manifest, parity, _lacking(request))


def _export_by_peft(request: ExportRequest, tell: Tell) -> ExportResult:
    """The same for an adapter that is more than low-rank updates; its logits are always compared."""
    code = check_inputs(request.base, request.dtype)
    tell({"stage": "merging", "percent": 0})
    try:
        with staging(request.out) as folder:
            _check_space(request, checkpoint_bytes(request.base, code))
            weights = folder / "weights"
            made = merge_by_peft(
                request.adapter, request.base, weights, dtype=request.dtype, questions=_questions(request)
            )
            for path in weights.iterdir():
                if path.suffix == ".safetensors" or path.name == WEIGHT_INDEX:
                    kept = path.rename(folder / path.name)
                    kept.chmod(0o644)
                    sync(kept)
            shutil.rmtree(weights)
            _write_companions(request, folder, is_untied=made["untied"])
            parity = _judged(request, made["logits"], tell)
            manifest = _seal(request, made["dtype"], folder, parity)
            publish(folder, request.out)
    except OSError as error:
        raise explained(error) from error
    tell({"stage": "done"})
    return ExportResult(request.out, manifest, parity, _lacking(request))


def _judged(request: ExportRequest, found: dict[str, Any], tell: Tell) -> dict[str, Any]:
    parity, problems = judged(found, _questions(request).forms, tell)
    notes = ["PEFT merged this adapter: it is more than low-rank updates.", *_notes(request)]
    return _passed(request, with_verdict({**parity, "merged_by": "peft", "notes": notes}, problems), tell)


def canonical_copy(source: Path, base: BaseModel, out: Path, *, base_is_named: bool = False) -> Path:
    """Any trainer's folder as canonical files in `out`; raises AdapterRefused with every problem.

    `base_is_named` believes the caller over the base that the folder's config claims.
    """
    inspection = inspect_folder(source)
    verdict = check(inspection, base, max_rank=MAX_RANK, base_is_served=base_is_named)
    return canonicalise(source, inspection, verdict, out, serving_dtype="float32").folder


def _check_request(request: ExportRequest) -> None:
    if request.format not in FORMATS:
        raise InvalidRequest(f"format {request.format!r} is not one of {', '.join(FORMATS)}.", param="format")
    if os.path.lexists(request.out):
        raise OutputExists(f"{request.out} exists already. Choose another --out, or remove it first.", param="out")
    accepted = {request.base.digest, *request.accepted_digests}
    if request.base_digest is not None and request.base_digest not in accepted:
        raise BaseMismatch(
            f"{request.source} was made for the base {request.base_digest}; the merge base {request.base.folder} is "
            f"{request.base.digest}. Pass --base with the base it was made for.",
            param="base",
        )


def _check_space(request: ExportRequest, weight_bytes: int) -> None:
    parent = request.out.parent
    free = shutil.disk_usage(parent).free
    companions = sum(path.stat().st_size for path in _companions(request.base.folder))
    needed = weight_bytes + companions + SPACE_MARGIN_BYTES
    if free < needed:
        raise StorageFull(f"{parent} has {free:,} bytes free and the export needs {needed:,}.", param="out")


def _companions(folder: Path) -> list[Path]:
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def _lacking(request: ExportRequest) -> tuple[str, ...]:
    """Files of a complete folder that neither the base nor the version has, so the export has not either."""
    folder = request.base.folder
    lacking = [name for name in EXPECTED if not (folder / name).is_file()]
    settings = folder / "tokenizer_config.json"
    has_inline = settings.is_file() and b'"chat_template"' in settings.read_bytes()
    if TEMPLATE_FILE in lacking and (has_inline or request.chat_template is not None):
        lacking.remove(TEMPLATE_FILE)
    return tuple(lacking)


def _left_out(folder: Path) -> list[str]:
    """Files of the base that the export does not carry over."""
    weights = {SINGLE_WEIGHTS, WEIGHT_INDEX, *COMPANIONS}
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name not in weights and not name.endswith(".safetensors") and name[0] != "."]


def _write_companions(request: ExportRequest, folder: Path, *, is_untied: bool = False) -> None:
    for path in _companions(request.base.folder):
        if path.name == TEMPLATE_FILE and request.chat_template is not None:
            continue
        content = path.read_bytes()
        if path.name == "config.json" and (request.dtype or is_untied):
            config = json.loads(content)
            keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
            changes: dict[str, Any] = dict.fromkeys(keys, request.dtype) if request.dtype else {}
            changes |= {"tie_word_embeddings": False} if is_untied else {}
            content = (json.dumps({**config, **changes}, indent=2) + "\n").encode()
        write_file(folder / path.name, content)
    if request.chat_template is not None:
        write_file(folder / TEMPLATE_FILE, request.chat_template.encode())


def _prove(request: ExportRequest, plan: MergePlan, folder: Path, tell: Tell) -> dict[str, Any]:
    """The parity report; raises ParityFailed, after `tell` got the report."""
    parity = prove(plan, folder, with_logits=request.with_logits, questions=_questions(request), tell=tell)
    parity["notes"] = _notes(request)
    return _passed(request, parity, tell)


def _questions(request: ExportRequest) -> Questions:
    return Questions(request.evaluation, request.served, chat_template=request.chat_template)


def _passed(request: ExportRequest, parity: dict[str, Any], tell: Tell) -> dict[str, Any]:
    if parity["verdict"] != "passed":
        tell({"stage": "failed", "parity": parity})
        raise ParityFailed(
            f"The merged weights of {request.source} are not what base + adapter gives; nothing was exported.",
            problems=tuple(Problem("parity_failed", PARITY, text) for text in parity["problems"]),
        )
    return parity


def _notes(request: ExportRequest) -> list[str]:
    """What a reader of the report should know and no figure says."""
    notes = []
    if _says(request.card, {"qlora", "nf4"}):
        notes.append(
            "The adapter was trained on an NF4-quantised base and is merged into the unquantised weights here: "
            "answers may differ a little from those seen in training."
        )
    if request.chat_template is not None:
        notes.append(f"{TEMPLATE_FILE} is the version's own, and not the base's.")
    missing = _lacking(request)
    if missing:
        notes.append(f"The base folder has no {', '.join(missing)}; the export has none either.")
    left = _left_out(request.base.folder)
    if left:
        notes.append(f"Left out of the base folder: {', '.join(left)}.")
    return notes


def _says(value: Any, words: set[str]) -> bool:
    """Some value in a card, at any depth, is one of the words."""
    if isinstance(value, Mapping):
        return any(_says(item, words) for item in value.values())
    if isinstance(value, list):
        return any(_says(item, words) for item in value)
    return isinstance(value, str) and value.lower() in words


def _seal(request: ExportRequest, dtype: str, folder: Path, parity: Mapping[str, Any]) -> dict[str, Any]:
    """Write the parity report, and manifest.json with the digest of every file and of the inputs.

    Without times, so that a re-run is the same.
    """
    facts = {
        "format": request.format,
        "source": request.source,
        "dtype": dtype,
        "base": {"id": request.base.id, "digest": request.base.digest},
        "adapter": {"digest": digest_folder(request.adapter)},
    }
    write_file(folder / PARITY, json_bytes(parity))
    write_file(folder / PARITY_PAGE, page(parity, facts))
    files = {
        path.name: {"sha256": sha256(path), "size_bytes": path.stat().st_size} for path in sorted(folder.iterdir())
    }
    manifest = {**facts, "files": files}
    write_file(folder / MANIFEST, json_bytes(manifest))
    return manifest


def request_from_spec(spec: Mapping[str, Any]) -> ExportRequest:
    """The request in a SPEC.json: the fields of ExportRequest, with `base` a folder."""
    values = dict(spec)
    values["base"] = load_base(values["base"])
    values["adapter"], values["out"] = Path(values["adapter"]), Path(values["out"])
    for name in ("accepted_digests", "served", "evaluation"):
        values[name] = tuple(values.get(name, ()))
    return ExportRequest(**values)


def main(spec_path: str) -> int:
    """The child process: JSON lines on stdout, the last of them `result` or `error`; 0, or 3 with an error.

    It ends with its process group when stdin closes (the parent died) and cleans up on SIGTERM (cancel).
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    spec = json.loads(Path(spec_path).read_text())
    os.nice(spec.pop("nice", 0))
    end_with_stdin()
    try:
        result = export(request_from_spec(spec), _say)
    except HotshoeError as error:
        _say({"stage": "error", "error": error.as_dict()})
        return 3
    _say({"stage": "result", "result": result.as_dict()})
    return 0


def _say(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
