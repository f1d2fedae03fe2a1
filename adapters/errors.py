"""Every error that is the user's, the machine's or the engine's, as one tree. Each class has a stable `code`.

HotshoeError
├── InvalidRequest        invalid_request      something in the request or command cannot be right
│   ├── NameInvalid       name_invalid
│   ├── DigestInvalid     digest_invalid
│   ├── LengthMismatch    length_mismatch
│   └── UnknownParameter  unknown_parameter
├── NotFound              not_found
│   └── ModelNotFound     model_not_found      no such adapter, version, alias or base
├── AdapterRefused        adapter_refused      the files cannot become a version; carries every problem at once
├── BaseMismatch          base_mismatch        made for another base than the one at hand
├── BaseInvalid           base_invalid         the base folder or id cannot be used
├── MergeBaseMissing      merge_base_missing   export asked, but no 16-bit base is configured
├── Conflict              conflict
│   ├── NotServable       not_servable         the version exists but may not answer requests
│   ├── IdempotencyReused idempotency_key_reused
│   ├── SourceChanged     source_changed       files changed while they were fetched, or are still being written
│   ├── LeaseLost         lease_lost           a job is another worker's by now, or was paused or cancelled
│   └── AlreadyRunning    already_running      another process holds this state folder or output folder
├── GenerationMismatch    generation_mismatch  If-Match named another generation of the alias
├── PayloadTooLarge       payload_too_large
├── QuotaExceeded         quota_exceeded       the tenant has all it may have of something that is kept
├── OutputExists          output_exists        refuses to write over what is there
├── DataInvalid           data_invalid         a data file; carries every problem with its line
│   └── DataBlocked       data_invalid         it can be read, and the data check blocks it
├── ConfigInvalid         config_invalid       a setting; says value, limit and what to set
├── TrainingStopped       training_stopped     NaN or exploding loss; the reason is in the message
├── MemoryLacking         memory_lacking       the run is planned to need more memory than it may have
├── ScoreTooLow           score_too_low        the trained adapter is below the score that was asked for
├── TrainingInterrupted   training_interrupted a signal ended the run; the message says how to go on
├── MergeFailed           merge_failed         the plan does not account for every tensor
├── ParityFailed          parity_failed        merged weights or logits are not what base + adapter gives
├── StorageFull           storage_full
├── StorageDamaged        storage_damaged      bytes on disk do not have their digest
├── StateNewer            state_newer          a newer release wrote the state folder; this one leaves it alone
├── RegistryBusy          registry_busy
├── SourceUnavailable     source_unavailable   where adapters are pulled from does not answer, or refuses us
└── EngineUnavailable     engine_unavailable   the engine is starting, restarting or gone
    ├── EngineBusy        engine_busy          no slot, or the queue is full
    │   └── AdapterLoading adapter_loading     the adapter's load takes longer than a request waits; it goes on
    └── EngineFailed      engine_failed        it answered a control call with an error
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an upload or a data file, where, and what to do about it."""

    code: str
    path: str  # config.r, a tensor's name, or file:line
    message: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class HotshoeError(Exception):
    """An error with a stable code, a message that a person can act on, and the parameter it is about."""

    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        problems: tuple[Problem, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.problems = problems
        self.retry_after_seconds = retry_after

    @property
    def wire_code(self) -> str:
        """What goes into `error.code`: the first problem's code where there are problems, else the class's."""
        return self.problems[0].code if self.problems else self.code

    def as_dict(self) -> dict[str, Any]:
        body: dict[str, Any] = {"code": self.wire_code, "message": self.message, "param": self.param}
        if self.problems:
            body["problems"] = [problem.as_dict() for problem in self.problems]
        return body


class InvalidRequest(HotshoeError):
    code = "invalid_request"


class NameInvalid(InvalidRequest):
    code = "name_invalid"


class DigestInvalid(InvalidRequest):
    code = "digest_invalid"


class LengthMismatch(InvalidRequest):
    code = "length_mismatch"


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class NotFound(HotshoeError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class AdapterRefused(HotshoeError):
    code = "adapter_refused"


class BaseMismatch(HotshoeError):
    code = "base_mismatch"


class BaseInvalid(HotshoeError):
    code = "base_invalid"


class MergeBaseMissing(HotshoeError):
    code = "merge_base_missing"


class Conflict(HotshoeError):
    code = "conflict"


class NotServable(Conflict):
    code = "not_servable"


class IdempotencyReused(Conflict):
    code = "idempotency_key_reused"


class SourceChanged(Conflict):
    code = "source_changed"


class AlreadyRunning(Conflict):
    code = "already_running"


class LeaseLost(Conflict):
    code = "lease_lost"


class GenerationMismatch(HotshoeError):
    code = "generation_mismatch"


class PayloadTooLarge(HotshoeError):
    code = "payload_too_large"


class QuotaExceeded(HotshoeError):
    code = "quota_exceeded"


class OutputExists(HotshoeError):
    code = "output_exists"


class DataInvalid(HotshoeError):
    code = "data_invalid"


class DataBlocked(DataInvalid):
    """Data that can be read, and that the data check blocks; `report` is the whole of what it found."""

    def __init__(self, message: str, *, report: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> None:
        super().__init__(message, **more)
        self.report = report


class ConfigInvalid(HotshoeError):
    code = "config_invalid"


class TrainingStopped(HotshoeError):
    code = "training_stopped"


class MemoryLacking(HotshoeError):
    code = "memory_lacking"


class ScoreTooLow(HotshoeError):
    code = "score_too_low"


class TrainingInterrupted(HotshoeError):
    code = "training_interrupted"


class MergeFailed(HotshoeError):
    code = "merge_failed"


class ParityFailed(HotshoeError):
    code = "parity_failed"


class StorageFull(HotshoeError):
    code = "storage_full"


class StorageDamaged(HotshoeError):
    code = "storage_damaged"


class StateNewer(HotshoeError):
    code = "state_newer"


class RegistryBusy(HotshoeError):
    code = "registry_busy"


class SourceUnavailable(HotshoeError):
    code = "source_unavailable"


class EngineUnavailable(HotshoeError):
    code = "engine_unavailable"


class EngineBusy(EngineUnavailable):
    code = "engine_busy"


class AdapterLoading(EngineBusy):
    code = "adapter_loading"


class EngineFailed(EngineUnavailable):
    code = "engine_failed"
