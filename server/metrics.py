"""Every metric of the service once. `docs/http.md` holds the same table; a test compares them.

The label `model` is the concrete id (`NAME@N`, or the base's); after `label_limit` of them the rest counts as `other`.
A version that is retired gives its label free after a while, with its series.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from server.memory_watch import PlaceMemory

OTHER = "other"
NO_MODEL = "none"
OUTCOMES = (
    "completed",  # answered to the end
    "refused",  # the request could not be right, or named no servable model: 4xx
    "overloaded",  # no place: 503 from admission or residency
    "unavailable",  # the engine was not there
    "failed",  # the engine or the server failed, before or during the answer
    "aborted",  # the client went away
)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
RETIRED_SECONDS = 600.0  # so long the last counts of a retired version can still be scraped
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Of the engine's families: names like ours, and the one that gets a series for every set of adapters that ran together.
KEPT_BACK = re.compile(rb"(?:# (?:HELP|TYPE) )?(?:hotshoe_\w*|vllm:lora_requests_info)\b")
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one finished inference request adds."""

    model: str
    outcome: str
    seconds: float
    queue_seconds: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_estimated: bool = False  # counted from the events delivered, as the stream ended early
    first_token_seconds: float | None = None
    token_seconds: float | None = None


class Metrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self, label_limit: int) -> None:
        self.registry = CollectorRegistry()
        self._label_limit = label_limit
        self._labels: set[str] = set()
        self._retired_at: dict[str, float] = {}
        self.requests = self._counter("requests", "Inference requests by how they ended.", "model", "outcome")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests.", "model")
        self.completion_tokens = self._counter(
            "completion_tokens",
            "Tokens generated; `counted` is usage, or events where a stream ended early.",
            "model",
            "counted",
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first event of a stream.", SECONDS
        )
        self.per_token = self._histogram("time_per_output_token_seconds", "Between tokens of a stream.", TOKEN_SECONDS)
        self.request_seconds = self._histogram("request_seconds", "Arrival to end.", SECONDS)
        self.queue_seconds = self._histogram("queue_seconds", "Waiting for a place or a slot.", SECONDS)
        self.waits = Histogram(
            "hotshoe_wait_seconds",
            "Waits of queued requests by for what.",
            ("reason",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.refusals = self._counter("refusals", "Requests for which there was no place, by why.", "reason")
        self.slot_switches = self._counter("slot_switches", "Slots that were given to another adapter.")
        self.running = self._gauge("running_requests", "Inference requests at the engine.")
        self.queued = self._gauge("queued_requests", "Inference requests waiting for a place.")
        self.versions = self._gauge("adapter_versions", "Versions by durable status.", "status")
        self.version_bytes = self._gauge("adapter_version_bytes", "File bytes of versions by durable status.", "status")
        self.residents = self._gauge("resident_adapters", "Versions by residency in the engine.", "residency")
        self.resident_bytes = self._gauge("resident_adapter_bytes", "File bytes of the versions in the engine.")
        self.loads = self._counter("adapter_loads", "Loads into the engine by outcome.", "outcome")
        self.load_seconds = self._plain_histogram("adapter_load_seconds", "One load into the engine.", SECONDS)
        self.cold_requests = self._counter(
            "cold_requests", "Requests for an adapter that was not in the engine, by outcome.", "outcome"
        )
        self.cold_wait_seconds = self._plain_histogram(
            "cold_wait_seconds", "Waiting for the load of an adapter that was not in the engine.", SECONDS
        )
        self.evictions = self._counter("adapter_evictions", "Idle versions that left the engine to make room.")
        self.proofs = self._counter("adapter_proofs", "Proofs of effect by outcome.", "outcome")
        self.source_looks = self._counter("source_looks", "Looks at a source by outcome.", "source", "outcome")
        self.source_pulls = self._counter("source_pulls", "Pulls from a source by outcome.", "source", "outcome")
        self.files = self._gauge("files", "Files of clients by purpose.", "purpose")
        self.file_bytes = self._gauge("file_bytes", "Bytes of those files.", "purpose")
        self.open_uploads = self._gauge("open_uploads", "Uploads that wait for parts, by purpose.", "purpose")
        self.upload_bytes = self._gauge("open_upload_bytes", "Bytes of their parts that are here.", "purpose")
        self.exports = self._gauge("exports", "Exports that have not ended, by status.", "status")
        self.export_bytes = self._gauge("export_bytes", "Bytes of results of exports that are kept.")
        self.export_runs = self._counter("export_runs", "Exports that were worked off, by outcome.", "outcome")
        self.memory = self._gauge("memory_bytes", "What the engine's memory is for, computed.", "place", "part")
        self.process_memory = self._gauge("process_memory_bytes", "What server and engine take, measured.", "place")
        self.unaccounted = self._gauge(
            "memory_unaccounted_bytes", "Measured less the sum of computed parts, while the engine is up.", "place"
        )
        self.memory_limit = self._gauge("memory_limit_bytes", "What there is of this memory.", "place")
        self.engine_ready = self._gauge("engine_ready", "1 while the engine answers and the warm set is back.")
        self.engine_restarts = self._counter("engine_restarts", "Times that a dead engine was started again.")
        self.cut = self._counter("connections_cut", "Connections that the server ended, by why.", "reason")
        self.lost_lines = self._counter("lost_log_lines", "Lines of a log that could not be written in time.")
        self.http = self._counter("http_responses", "All responses by route and status.", "route", "status")

    def label(self, model: str) -> str:
        """The label for a model: itself while there is room, then `other`."""
        if model in self._labels or model == NO_MODEL:
            return model
        if len(self._labels) >= self._label_limit:
            return OTHER
        self._labels.add(model)
        return model

    def record(self, sample: Sample) -> None:
        """Count one finished inference request."""
        model = self.label(sample.model)
        self.requests.labels(model, sample.outcome).inc()
        self.request_seconds.labels(model).observe(sample.seconds)
        self.prompt_tokens.labels(model).inc(sample.prompt_tokens)
        counted = "events" if sample.is_estimated else "usage"
        self.completion_tokens.labels(model, counted).inc(sample.completion_tokens)
        if sample.queue_seconds is not None:
            self.queue_seconds.labels(model).observe(sample.queue_seconds)
        if sample.first_token_seconds is not None:
            self.first_token.labels(model).observe(sample.first_token_seconds)
        if sample.token_seconds is not None:
            self.per_token.labels(model).observe(sample.token_seconds)

    def retired(self, models: Collection[str], now: float) -> None:
        """Forget the series of models that are retired for RETIRED_SECONDS; their labels are free for others."""
        for model in self._labels.intersection(models):
            if now - self._retired_at.setdefault(model, now) >= RETIRED_SECONDS:
                self._forget(model)

    def show_memory(self, places: Iterable[PlaceMemory]) -> None:
        """Set the memory gauges; one that is not known has no sample."""
        for gauge in (self.memory, self.process_memory, self.unaccounted, self.memory_limit):
            gauge.clear()
        for found in places:
            for part, size in found.parts.items():
                self.memory.labels(found.place, part).set(size)
            for gauge, value in (
                (self.process_memory, found.process_bytes),
                (self.unaccounted, found.unaccounted_bytes),
                (self.memory_limit, found.limit_bytes),
            ):
                if value is not None:
                    gauge.labels(found.place).set(value)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _forget(self, model: str) -> None:
        self._labels.discard(model)
        self._retired_at.pop(model, None)
        for metric in (self.requests, self.prompt_tokens, self.completion_tokens, self.first_token, self.per_token):
            metric.remove_by_labels({"model": model})
        for metric in (self.request_seconds, self.queue_seconds):
            metric.remove_by_labels({"model": model})

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hotshoe_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"hotshoe_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"hotshoe_{name}", text, ("model",), buckets=buckets, registry=self.registry)

    def _plain_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"hotshoe_{name}", text, buckets=buckets, registry=self.registry)


def passed_on(engine_text: bytes) -> bytes:
    """The engine's own metrics, less the families that are ours to tell and those whose series never end."""
    return b"".join(line for line in engine_text.splitlines(keepends=True) if not KEPT_BACK.match(line))
