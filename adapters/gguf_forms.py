"""The two forms of an export that llama.cpp runs: a merged model as one file, and an adapter for its `--lora`."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.bases import load_base, stored_dtype
from adapters.checkpoint import FLOATS
from adapters.errors import InvalidRequest
from adapters.export_forms import Form, PeftFolder
from adapters.export_request import GGUF_LORA, HF, NF4, ExportRequest
from adapters.gguf_lora import plan_gguf_lora, verify_gguf_lora, write_gguf_lora
from adapters.gguf_plan import GgufPlan, plan_base_gguf, plan_gguf
from adapters.gguf_types import BITS, check_type
from adapters.gguf_verify import verify_gguf
from adapters.gguf_write import write_gguf
from adapters.llamacpp import missing
from adapters.merge_plan import checkpoint_bytes, plan_merge
from adapters.parity_gguf import GgufFiles, ask_llamacpp
from adapters.parity_report import Tell, available_memory_bytes, percents, with_verdict
from adapters.peft_merge import needs_peft, resized_rows

MEMORY_FACTOR = 8  # bytes per weight: a float32 model and PEFT's merge of it
MERGED_BY_PEFT = "merged-by-peft"


def plan_gguf_form(request: ExportRequest) -> Form:
    """Raises InvalidRequest, BaseInvalid or MergeFailed with all that does not fit."""
    by_peft = needs_peft(request.adapter, request.base)
    if request.format == GGUF_LORA:
        if by_peft:
            raise InvalidRequest(
                "This adapter is more than low-rank updates; llama.cpp adds those only with --lora. Export it as gguf.",
                param="format",
            )
        return GgufAdapter(request)
    return GgufOfPeft(request) if by_peft else GgufMerged(request)


@dataclass
class GgufMerged:
    """A merge by us as one GGUF file."""

    request: ExportRequest
    plan: GgufPlan = field(init=False)

    def __post_init__(self) -> None:
        asked = self.request
        merged = plan_merge(asked.adapter, asked.base, through_nf4=asked.merge_into == NF4)
        self.plan = plan_gguf(
            merged,
            quantisation=self.dtype,
            name=asked.source,
            chat_template=asked.chat_template,
            tokenizer=asked.tokenizer,
        )

    @property
    def dtype(self) -> str:
        return type_of(self.request)

    @property
    def size_bytes(self) -> int:
        return self.plan.size_bytes

    @property
    def weight_bytes(self) -> int:
        return self.size_bytes

    @property
    def files(self) -> tuple[str, ...]:
        return ()

    def as_dict(self) -> dict[str, Any]:
        return self.plan.as_dict()

    def write(self, folder: Path, tell: Tell) -> None:
        progress = percents(tell, "merging", self.plan.size_bytes)
        write_gguf(self.plan, folder / file_name(self.request), workers=self.request.workers, progress=progress)

    def prove(self, folder: Path, tell: Tell) -> dict[str, Any]:
        return proved(self.request, self.plan, folder, tell)


@dataclass
class GgufOfPeft:
    """A merge by PEFT in float32, then as one GGUF file."""

    request: ExportRequest
    merged: PeftFolder = field(init=False)
    plan: GgufPlan | None = None
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.merged = PeftFolder(replace(self.request, format=HF, dtype="float32"))

    @property
    def dtype(self) -> str:
        return type_of(self.request)

    @property
    def size_bytes(self) -> int:
        return 2 * self.merged.size_bytes  # the folder that PEFT's merge is read from lies beside it

    @property
    def weight_bytes(self) -> int:
        """Of the file, about, until it is planned."""
        if self.plan is not None:
            return self.plan.size_bytes
        return round(checkpoint_bytes(self.request.base, "F32") * BITS[self.dtype] / BITS["f32"])

    def as_dict(self) -> dict[str, Any]:
        return {"merged_by": "peft", "quantisation": self.dtype}

    def write(self, folder: Path, tell: Tell) -> None:
        made = folder / MERGED_BY_PEFT
        made.mkdir()
        self.merged.write(made, tell)
        self.plan = plan_base_gguf(load_base(made), quantisation=self.dtype, name=self.request.source)
        tell({"stage": "merging", "weight_bytes": self.weight_bytes})
        progress = percents(tell, "merging", self.plan.size_bytes)
        write_gguf(self.plan, folder / file_name(self.request), workers=self.request.workers, progress=progress)

    def prove(self, folder: Path, tell: Tell) -> dict[str, Any]:
        if self.plan is None:
            raise RuntimeError("nothing was written yet")
        found = self.merged.prove(folder / MERGED_BY_PEFT, tell)
        if found["verdict"] != "passed":
            return found
        parity = proved(self.request, self.plan, folder, tell)
        shutil.rmtree(folder / MERGED_BY_PEFT)
        return {**parity, "merged_by": "peft", "notes": [*found["notes"], *parity["notes"]]}


@dataclass
class GgufAdapter:
    """The adapter alone, for llama.cpp's `--lora` beside a GGUF of its base."""

    request: ExportRequest
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        asked = self.request
        self.plan = plan_gguf_lora(asked.adapter, asked.base, dtype=self.dtype, name=asked.source)

    @property
    def dtype(self) -> str:
        return check_type(self.request.dtype, is_lora=True) or "f32"

    @property
    def size_bytes(self) -> int:
        """With the base in float32 where llama.cpp will be asked, and needs it beside the adapter."""
        beside = 0 if unasked(self.request) else checkpoint_bytes(self.request.base, "F32")
        return self.weight_bytes + beside

    @property
    def weight_bytes(self) -> int:
        return self.plan.size_bytes

    def as_dict(self) -> dict[str, Any]:
        return self.plan.as_dict()

    def write(self, folder: Path, tell: Tell) -> None:
        progress = percents(tell, "merging", self.plan.size_bytes)
        write_gguf_lora(self.plan, folder / file_name(self.request), workers=self.request.workers, progress=progress)

    def prove(self, folder: Path, tell: Tell) -> dict[str, Any]:
        """The base is written beside it for llama.cpp to load, in float32, and goes again."""
        path = folder / file_name(self.request)
        weights = verify_gguf_lora(self.plan, path, percents(tell, "checking", self.plan.size_bytes))
        parity = report(weights.as_dict(), list(self.plan.file.notes))
        return answered(self.request, parity, lambda: self._on_its_base(folder), tell)

    @contextmanager
    def _on_its_base(self, folder: Path) -> Iterator[GgufFiles]:
        asked = self.request
        with tempfile.TemporaryDirectory(prefix=".base-", dir=folder) as scratch:
            path = Path(scratch) / "base.gguf"
            write_gguf(plan_base_gguf(asked.base, quantisation="f32", name=asked.base.id), path, workers=asked.workers)
            yield GgufFiles(path, self.dtype.upper(), folder / file_name(asked))


def proved(request: ExportRequest, plan: GgufPlan, folder: Path, tell: Tell) -> dict[str, Any]:
    """Read back, then asked in llama.cpp."""
    path = folder / file_name(request)
    weights = verify_gguf(plan, path, percents(tell, "checking", plan.size_bytes))
    notes = list(plan.notes)
    if plan.fallbacks:
        kinds = " or ".join(sorted(set(plan.fallbacks.values()))).lower()
        notes.append(
            f"{len(plan.fallbacks)} tensors whose rows are no whole blocks of {plan.quantisation} are {kinds}."
        )
    files = GgufFiles(path, plan.quantisation.upper())
    return answered(request, report(weights.as_dict(), notes), lambda: nullcontext(files), tell)


def answered(
    request: ExportRequest, parity: dict[str, Any], files: Callable[[], AbstractContextManager[GgufFiles]], tell: Tell
) -> dict[str, Any]:
    """The report of the read-back with llama.cpp's answers from `files`, where it can be asked and nothing is wrong."""
    reason = unasked(request)
    if parity["problems"] or reason:
        return ended(parity, reason)
    tell({"stage": "comparing logits"})
    with files() as run_there:
        found = ask_llamacpp(run_there, request.base.folder, request.adapter, **asking(request))
    return ended({**parity, **found}, None)


def unasked(request: ExportRequest) -> str | None:
    """Why llama.cpp is not asked; None where it is."""
    return missing() or no_room(request) if request.with_logits else "not asked for"


def asking(request: ExportRequest) -> dict[str, Any]:
    """What PEFT's side needs to know of the request."""
    return {
        "evaluation": request.evaluation,
        "chat_template": request.chat_template,
        "tokenizer": request.tokenizer,
        "rows": resized_rows(request.adapter, request.base),
        "through_nf4": request.merge_into == NF4,
    }


def report(weights: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """A report as far as the read-back goes."""
    return {"weights": weights, "notes": notes, "problems": list(weights["problems"])}


def ended(parity: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """With its verdict and level."""
    problems = parity.pop("problems")
    level = {"level": "answers"} if "forms" in parity else {"level": "weights_only", "reason": reason or "see problems"}
    return with_verdict({**level, **parity}, problems)


def no_room(request: ExportRequest) -> str | None:
    """Why PEFT's side cannot be computed here; None where it can."""
    if request.base.config.get("quantization_config"):
        return "the base is quantised, and PEFT's side needs its 16-bit weights"
    weights = sum(path.stat().st_size for path in request.base.folder.glob("*.safetensors")) // 2
    needed, free = weights * MEMORY_FACTOR, available_memory_bytes()
    return f"the answers need about {needed:,} bytes of memory, {free:,} are free" if needed > free else None


def type_of(request: ExportRequest) -> str:
    """The type asked for, or the base's own."""
    codes = {name: code.lower() for code, name in FLOATS.items()}
    return check_type(request.dtype) or codes[stored_dtype(request.base.config) or "float32"]


def file_name(request: ExportRequest) -> str:
    """What was exported and its type, as such files are named: router-en-2-Q8_0.gguf."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", request.source).strip("-.") or "model"
    if request.format == GGUF_LORA:
        return f"{plain}-lora-{(check_type(request.dtype, is_lora=True) or 'f32').upper()}.gguf"
    return f"{plain}-{type_of(request).upper()}.gguf"
