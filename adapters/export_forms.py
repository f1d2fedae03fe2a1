"""The forms that an export can have. Each is planned before a byte is written, writes its files, and proves them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from adapters.bases import WEIGHT_INDEX
from adapters.checkpoint import FLOATS
from adapters.durable import sync
from adapters.errors import InvalidRequest
from adapters.export_files import companions, says, write_companions
from adapters.export_request import ADAPTER, HF, NF4, ExportRequest
from adapters.merge import merge, plan_merge
from adapters.merge_plan import MergePlan, check_inputs, checkpoint_bytes
from adapters.parity_nf4 import note
from adapters.parity_report import Questions, Tell, dtype_of, percents, prove, with_verdict
from adapters.parity_verdict import logits_problems
from adapters.peft_merge import merge_by_peft, needs_peft
from adapters.staging import sha256


class Form(Protocol):
    """One export in the making, planned when it is made."""

    @property
    def dtype(self) -> str:
        """Of its weights, for the manifest; known once they are written."""

    @property
    def size_bytes(self) -> int:
        """What its files will take on the disk."""

    @property
    def weight_bytes(self) -> int:
        """What of it are the weights that are delivered, without what lies beside them only while they are made."""

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files that may stay of an earlier run of the same request."""

    def as_dict(self) -> dict[str, Any]:
        """What a person may want to know before it runs."""

    def write(self, folder: Path, tell: Tell) -> None:
        """Write every file but the report and the manifest; raises MergeFailed and OSError."""

    def prove(self, folder: Path, tell: Tell) -> dict[str, Any]:
        """The parity report of what lies in `folder`: `verdict` passed, or failed with `problems`."""


def plan_form(request: ExportRequest) -> Form:
    """The form that a request asks for; raises InvalidRequest, BaseInvalid or MergeFailed with all that is wrong."""
    if request.format == ADAPTER:
        return AdapterFolder(request)
    if request.format == HF:
        return PeftFolder(request) if needs_peft(request.adapter, request.base) else MergedFolder(request)
    from adapters.gguf_forms import plan_gguf_form

    return plan_gguf_form(request)


@dataclass
class MergedFolder:
    """A Hugging Face folder of low-rank updates merged by us."""

    request: ExportRequest
    plan: MergePlan = field(init=False)

    def __post_init__(self) -> None:
        asked = self.request
        self.plan = plan_merge(
            asked.adapter,
            asked.base,
            dtype=asked.dtype,
            shard_bytes=asked.shard_bytes,
            through_nf4=asked.merge_into == NF4,
        )

    @property
    def dtype(self) -> str:
        return dtype_of(self.plan)

    @property
    def size_bytes(self) -> int:
        return self.plan.weight_bytes + companion_bytes(self.request)

    @property
    def weight_bytes(self) -> int:
        return self.plan.weight_bytes

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(file.name for file in self.plan.files)

    def as_dict(self) -> dict[str, Any]:
        return self.plan.as_dict()

    def write(self, folder: Path, tell: Tell) -> None:
        progress = percents(tell, "merging", self.plan.weight_bytes)
        merge(self.plan, folder, workers=self.request.workers, progress=progress)
        write_companions(self.request, folder, {})

    def prove(self, folder: Path, tell: Tell) -> dict[str, Any]:
        asked = self.request
        parity = prove(self.plan, folder, with_logits=asked.with_logits, questions=questions_of(asked), tell=tell)
        found = (parity.get("logits") or {}).get("training_base")
        return {**parity, "notes": [note(found)]} if found else parity


@dataclass
class PeftFolder:
    """A Hugging Face folder of what is more than low-rank updates, merged by PEFT; its logits are always compared."""

    request: ExportRequest
    made: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._code = check_inputs(self.request.base, self.request.dtype)
        if self.request.merge_into == NF4:
            raise InvalidRequest(
                "This adapter is more than low-rank updates, so PEFT merges it, into the original weights alone: leave "
                "merge_into out.",
                param="merge_into",
            )

    @property
    def dtype(self) -> str:
        return str(self.made["dtype"])

    @property
    def size_bytes(self) -> int:
        return self.weight_bytes + companion_bytes(self.request)

    @property
    def weight_bytes(self) -> int:
        return checkpoint_bytes(self.request.base, self._code)

    def as_dict(self) -> dict[str, Any]:
        return {"merged_by": "peft", "weight_bytes": self.weight_bytes}

    def write(self, folder: Path, tell: Tell) -> None:
        tell({"stage": "merging", "percent": 0})
        asked, weights = self.request, folder / "weights"
        self.made = merge_by_peft(
            asked.adapter,
            asked.base,
            weights,
            dtype=asked.dtype,
            shard_bytes=asked.shard_bytes,
            questions=questions_of(asked),
        )
        for path in weights.iterdir():
            if path.suffix == ".safetensors" or path.name == WEIGHT_INDEX:
                kept = path.rename(folder / path.name)
                kept.chmod(0o644)
                sync(kept)
        shutil.rmtree(weights)
        write_companions(asked, folder, self.made["config"])

    def prove(self, folder: Path, tell: Tell) -> dict[str, Any]:
        from adapters.readback_peft import verify_peft_merge

        asked, logits = self.request, self.made["logits"]
        codes = {name: code for code, name in FLOATS.items()}
        progress = percents(tell, "checking", self.weight_bytes)
        weights = verify_peft_merge(asked.adapter, asked.base, folder, codes[self.dtype], progress)
        notes = ["PEFT merged this adapter: it is more than low-rank updates."]
        parity = {
            "level": "logits",
            "merged_by": "peft",
            "weights": weights.as_dict(),
            "logits": logits,
            "notes": notes,
        }
        return with_verdict(parity, [*weights.problems, *logits_problems(logits)])


@dataclass
class AdapterFolder:
    """The canonical PEFT folder, byte for byte."""

    request: ExportRequest
    files: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        return "as stored"

    @property
    def _sources(self) -> list[Path]:
        return [self.request.adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._sources)

    @property
    def weight_bytes(self) -> int:
        return self.size_bytes

    def as_dict(self) -> dict[str, Any]:
        return {"files": {path.name: path.stat().st_size for path in self._sources}}

    def write(self, folder: Path, tell: Tell) -> None:
        tell({"stage": "merging", "percent": 0})
        for path in self._sources:
            shutil.copyfile(path, folder / path.name)
            sync(folder / path.name)

    def prove(self, folder: Path, tell: Tell) -> dict[str, Any]:
        differ = [path.name for path in self._sources if sha256(path) != sha256(folder / path.name)]
        parity = {"level": "files", "reason": "the files are the adapter's own, digest for digest"}
        return with_verdict(parity, [f"{name} differs" for name in differ])


def questions_of(request: ExportRequest) -> Questions:
    """What a request wants to be asked of its merge."""
    on_nf4 = request.merge_into == NF4 or says(request.card, {"qlora", "nf4"})
    return Questions(
        request.evaluation,
        request.served,
        chat_template=request.chat_template,
        trained_on_nf4=on_nf4,
        tokenizer=request.tokenizer,
    )


def companion_bytes(request: ExportRequest) -> int:
    """What the files beside the weights take."""
    return sum(path.stat().st_size for path in companions(request))
