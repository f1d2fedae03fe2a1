"""What a job's process tells, written into the registry: its phase, its progress, its events, its checkpoints."""

from __future__ import annotations

import time
from typing import Any

from adapters.errors import LeaseLost
from adapters.job_rows import JobChange, JobRow, Phase
from adapters.registry import Registry
from server.tasks import insist

SECONDS_BETWEEN_WRITES = 2.0
EVENTS_A_RUN = 100  # of steps, at most
CHATTER = ("step ",)  # lines for people that are told as figures, too


class Telling:
    """Takes one message after another. Once the job is not this worker's any more, only its checkpoints are noted."""

    def __init__(self, registry: Registry, job: JobRow) -> None:
        self.registry = registry
        self.job = job
        self.error: dict[str, Any] | None = None
        self.is_done = False
        self.is_lost = False
        self._written_at = 0.0
        self._said_step = 0

    async def take(self, message: dict[str, Any]) -> None:
        kind = message.pop("kind")
        handler = getattr(self, f"_on_{kind}", None)
        if handler is not None:
            await handler(**message)

    async def _on_begun(self) -> None:
        await self._note(JobChange(phase=Phase.VALIDATING), f"Validating training file: {self.job.training_file}")

    async def _on_resumed(self) -> None:
        await self._note(JobChange(phase=Phase.VALIDATING), "Going on from the last checkpoint")

    async def _on_said(self, message: str, level: str = "info") -> None:
        if not message.startswith(CHATTER):
            await self._note(None, message, level=level)

    async def _on_validated(self, gate: dict[str, Any] | None) -> None:
        level = "warn" if gate is not None and gate["verdict"] != "pass" else "info"
        await self._note(None, "Files validated", level=level, data=gate)

    async def _on_planned(self, settings: dict[str, Any], plan: dict[str, Any] | None) -> None:
        figures = _planned(plan or {})
        await self._note(JobChange(settings=settings), f"Planned: {settings['steps']} steps{figures}", data=plan)

    async def _on_baseline(self, lines: list[str], summary: dict[str, Any]) -> None:
        await self._note(None, "Baseline: " + "; ".join(line.strip() for line in lines[1:]), data=summary)

    async def _on_started(self) -> None:
        await self._note(JobChange(phase=Phase.TRAINING), "Fine-tuning job started")

    async def _on_step(self, step: int, of: int, loss: float | None, seconds_left: float) -> None:
        now = time.time()
        if now - self._written_at < SECONDS_BETWEEN_WRITES and step < of:
            return
        self._written_at = now
        progress = {"step": step, "of": of, "loss": loss, "ends_at": round(now + seconds_left)}
        says, data = "", None
        if step - self._said_step >= of / EVENTS_A_RUN or step == of:
            self._said_step = step
            says, data = f"Step {step}/{of}: training loss={_shown(loss)}", {**progress, "train_loss": loss}
        await self._note(JobChange(progress=progress), says, data=data)

    async def _on_validation(self, step: int, loss: float | None) -> None:
        await self._note(None, f"Step {step}: validation loss={_shown(loss)}", data={"step": step, "valid_loss": loss})

    async def _on_checkpoint(self, step: int, kept: list[int], losses: dict[str, float]) -> None:
        await insist(lambda: self.registry.note_checkpoint(self.job.tenant, self.job.id, step, losses, kept))

    async def _on_error(self, **error: Any) -> None:
        self.error = error

    async def _on_result(self) -> None:
        self.is_done = True
        await self._note(None, "Training has ended")

    async def _note(self, change: JobChange | None, says: str, *, level: str = "info", data: Any = None) -> None:
        if self.is_lost:
            return
        try:
            await insist(lambda: self.registry.note_job(self.job, change, says=says, level=level, data=data))
        except LeaseLost:
            self.is_lost = True


def _shown(loss: float | None) -> str:
    return "?" if loss is None else f"{loss:.4f}"


def _planned(plan: dict[str, Any]) -> str:
    if "peak_bytes" not in plan:
        return ""
    return f", about {plan['peak_bytes'] / 1e9:.2f} GB of memory and {plan['seconds'] / 60:.1f} minutes of training"
