"""`/metrics` as Prometheus reads it, whom its labels are for, and what it says of files, versions and memory."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from adapters.bases import BaseModel
from server.memory_watch import GPU, MAIN, PlaceMemory
from server.metrics import NO_MODEL, OTHER, OUTCOMES, RETIRED_SECONDS, Metrics, Sample, passed_on
from tests.fixtures.borrowed import BorrowedEngine
from tests.fixtures.engines import EngineRig
from tests.fixtures.service import Server, eventually, running

SeriesKey = tuple[str, tuple[tuple[str, str], ...]]


def scraped(server: Server) -> list[Metric]:
    """Every family, from an answer that has to be right as a whole."""
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.text))
    assert [name for name, count in Counter(family.name for family in families).items() if count > 1] == []
    counts = Counter(key for family in families for key in series([family]))
    assert [key for key, count in counts.items() if count > 1] == []
    return families


def series(families: list[Metric]) -> Iterator[SeriesKey]:
    """Name and labels of every sample."""
    return ((sample.name, tuple(sorted(sample.labels.items()))) for family in families for sample in family.samples)


def values(families: list[Metric], name: str) -> dict[tuple[str, ...], float]:
    """Label values -> value of every sample of this name."""
    samples = (sample for family in families for sample in family.samples if sample.name == name)
    return {tuple(sample.labels.values()): sample.value for sample in samples}


def test_the_answer_is_ours_and_the_engines_and_no_name_is_in_it_twice(server: Server) -> None:
    server.pushed("shown")
    server.events("shown")
    names = {family.name for family in scraped(server)}
    assert "vllm:num_requests_running" in names
    assert {family.name for family in server.services.metrics.registry.collect()} <= names


def test_what_the_engine_says_passes_but_for_our_names_and_the_family_without_end() -> None:
    text = b"""# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="hotshoe_tiny"} 1.0
# HELP vllm:lora_requests_info Running stats on lora requests.
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="9",running_lora_adapters="a,b",waiting_lora_adapters=""} 1.7e+09
# HELP hotshoe_requests_total Not ours.
# TYPE hotshoe_requests_total counter
hotshoe_requests_total{model="x"} 3.0
hotshoe_ready 1
vllm:lora_requests_info_total 5.0
"""
    kept = passed_on(text).decode().splitlines()
    assert kept == [*text.decode().splitlines()[:3], "vllm:lora_requests_info_total 5.0"]
    assert passed_on(b"") == b""


def test_names_that_clients_make_up_make_no_series(server: Server) -> None:
    for model in ("nobody", "tiny"):
        server.say(model)
    server.http.get("/v1/models/nobody")
    before = set(series(scraped(server)))
    for number in range(10):
        for model in (f"evil-{number}", f"tiny@{number}", f"{number}\n# TYPE x", 'a"}', f"t{number}/x@1", "x" * 500):
            assert server.say(model).status_code in (400, 404)
    for number in range(10):
        server.http.get(f"/v1/models/evil-{number}")
        server.http.get(f"/nowhere/{number}")
    after = set(series(scraped(server)))
    new = {
        key
        for key in after - before
        if key[0] not in ("hotshoe_http_responses_total", "hotshoe_http_responses_created")
    }
    assert not new
    routes = {dict(labels)["route"] for name, labels in after if name == "hotshoe_http_responses_total"}
    assert "none" in routes and not any("evil" in route or "nowhere" in route for route in routes)


def sample(model: str) -> Sample:
    return Sample(model, "completed", 1.0, 0.1, 5, 7, first_token_seconds=0.2, token_seconds=0.01)


def labelled(metrics: Metrics) -> set[str]:
    """Every value of the label `model`."""
    families = metrics.registry.collect()
    return {one.labels["model"] for family in families for one in family.samples if "model" in one.labels}


def test_models_beyond_the_limit_are_counted_together() -> None:
    metrics = Metrics(label_limit=2)
    for model in ("a@1", "b@1", "c@1", "d@1", NO_MODEL, "a@1"):
        metrics.record(sample(model))
    assert labelled(metrics) == {"a@1", "b@1", OTHER, NO_MODEL}
    assert metrics.registry.get_sample_value("hotshoe_requests_total", {"model": OTHER, "outcome": "completed"}) == 2


def test_a_retired_versions_series_end_after_a_while_and_its_label_is_free() -> None:
    metrics = Metrics(label_limit=2)
    for model in ("a@1", "b@1"):
        metrics.record(sample(model))
    metrics.retired({"a@1", "never-asked@1"}, now=100.0)
    metrics.retired({"a@1"}, now=100.0 + RETIRED_SECONDS - 1)
    assert labelled(metrics) == {"a@1", "b@1"}, "its last counts can still be scraped"
    metrics.retired({"a@1"}, now=100.0 + RETIRED_SECONDS)
    assert labelled(metrics) == {"b@1"}
    metrics.record(sample("c@1"))
    assert labelled(metrics) == {"b@1", "c@1"}
    assert metrics.registry.get_sample_value("hotshoe_prompt_tokens_total", {"model": "c@1"}) == 5


def test_each_request_is_in_every_family_of_its_model(server: Server) -> None:
    server.pushed("whole")
    server.events("whole", max_tokens=4)
    labels = {"model": "whole@1"}
    eventually(lambda: server.metric("hotshoe_requests_total", outcome="completed", **labels) == 1)
    for family in ("time_to_first_token", "time_per_output_token", "request", "queue"):
        assert server.metric(f"hotshoe_{family}_seconds_count", **labels) == 1, family
    assert server.metric("hotshoe_prompt_tokens_total", **labels) > 0
    assert server.metric("hotshoe_completion_tokens_total", counted="usage", **labels) == 3
    assert set(OUTCOMES) >= {key[1] for key in values(scraped(server), "hotshoe_requests_total")}


def test_versions_are_counted_with_their_bytes_and_one_that_loads_is_staging(
    make_server: Callable[..., Server],
) -> None:
    server = make_server()
    row = server.pushed("counted")
    found = scraped(server)
    assert values(found, "hotshoe_adapter_versions")[("ready",)] == 1
    assert values(found, "hotshoe_adapter_version_bytes")[("ready",)] == row["size_bytes"] > 0
    assert values(found, "hotshoe_resident_adapters") == {("staging",): 0, ("resident",): 1, ("draining",): 0}
    assert values(found, "hotshoe_resident_adapter_bytes") == {(): row["size_bytes"]}
    server.script.seconds_to_load = 2.0
    pushing = threading.Thread(target=server.push, args=("slow",), daemon=True)
    pushing.start()
    eventually(lambda: values(scraped(server), "hotshoe_resident_adapters")[("staging",)] == 1)
    pushing.join()
    found = scraped(server)
    assert values(found, "hotshoe_resident_adapters") == {("staging",): 0, ("resident",): 2, ("draining",): 0}
    assert values(found, "hotshoe_adapter_load_seconds_count") == {(): 2}


def test_files_and_open_uploads_are_counted_by_purpose(make_server: Callable[..., Server]) -> None:
    server = make_server()
    for purpose, text in (("evals", b"abc"), ("evals", b"defgh"), ("adapter", b"x")):
        answer = server.http.post("/v1/files", files={"file": ("f", text)}, data={"purpose": purpose})
        assert answer.status_code == 200, answer.text
    order = {"purpose": "fine-tune", "filename": "r.jsonl", "bytes": 10, "mime_type": "text/plain"}
    upload = server.http.post("/v1/uploads", json=order).json()["id"]
    for text in (b"1234", b"56"):
        server.http.post(f"/v1/uploads/{upload}/parts", files={"data": ("p", text)}).raise_for_status()
    found = scraped(server)
    nothing = dict.fromkeys([("adapter",), ("evals",), ("fine-tune",), ("fine-tune-results",), ("user_data",)], 0)
    assert values(found, "hotshoe_files") == nothing | {("adapter",): 1, ("evals",): 2}
    assert values(found, "hotshoe_file_bytes") == nothing | {("adapter",): 1, ("evals",): 8}
    assert values(found, "hotshoe_open_uploads") == nothing | {("fine-tune",): 1}
    assert values(found, "hotshoe_open_upload_bytes") == nothing | {("fine-tune",): 6}
    server.http.post(f"/v1/uploads/{upload}/cancel").raise_for_status()
    found = scraped(server)
    assert values(found, "hotshoe_open_uploads") == values(found, "hotshoe_open_upload_bytes") == nothing


def test_without_a_model_there_are_no_parts_and_the_server_is_still_measured(server: Server) -> None:
    found = scraped(server)
    measured = values(found, "hotshoe_process_memory_bytes")[("main",)]
    assert 0.5 < measured / psutil.Process(os.getpid()).memory_info().rss < 2
    assert values(found, "hotshoe_memory_bytes") == values(found, "hotshoe_memory_unaccounted_bytes") == {}
    assert values(found, "hotshoe_memory_limit_bytes")[("main",)] <= psutil.virtual_memory().total
    (place,) = server.http.get("/v1/system").json()["memory"]["places"]
    assert (place["place"], place["computed"], place["unaccounted_bytes"]) == ("main", {}, None)


def test_what_is_not_known_has_no_sample() -> None:
    metrics = Metrics(1)
    whole = PlaceMemory(GPU, {"weights": 10, "slots": 5}, process_bytes=18, limit_bytes=24)
    assert (whole.computed_bytes, whole.unaccounted_bytes) == (15, 3)
    metrics.show_memory([whole])
    assert metrics.registry.get_sample_value("hotshoe_memory_unaccounted_bytes", {"place": GPU}) == 3
    partly = PlaceMemory(MAIN, {"slots": 5}, unknown=("weights",), process_bytes=18)
    starting = PlaceMemory(GPU, {"slots": 5}, process_bytes=1, is_up=False)
    metrics.show_memory([partly, starting, PlaceMemory("none", {"slots": 5})])
    assert metrics.registry.get_sample_value("hotshoe_memory_unaccounted_bytes", {"place": MAIN}) is None
    assert metrics.registry.get_sample_value("hotshoe_memory_unaccounted_bytes", {"place": GPU}) is None
    assert metrics.registry.get_sample_value("hotshoe_process_memory_bytes", {"place": MAIN}) == 18
    assert metrics.registry.get_sample_value("hotshoe_process_memory_bytes", {"place": "none"}) is None
    assert metrics.registry.get_sample_value("hotshoe_memory_bytes", {"place": GPU, "part": "weights"}) is None


@pytest.mark.model
def test_the_real_engine_has_allocated_what_is_computed_and_its_metrics_pass(
    vllm_engine: EngineRig, embedded_base: BaseModel, tmp_path: Path
) -> None:
    """Slots, weights, KV cache: equal. Staged adapters: equal with all seven projections, and packed copies the same,
    on torch's products; where adapters come packed for the kernel, a 16-bit one stays so, and there are no copies."""
    vllm_engine.unload_all()
    with running(
        embedded_base, tmp_path, on=BorrowedEngine(vllm_engine, tmp_path / "engine"), staged_limit=6
    ) as server:
        for name, shape in (("small", {"rank": 8}), ("short", {"rank": 16, "dtype": "BF16"})):
            row = server.push(name, server.adapter(**shape), wait=120).json()
            assert row["status"] == "ready", row
        narrow = server.push("narrow", server.adapter(rank=64, targets=("q_proj",)), wait=120).json()
        memory = server.http.get("/v1/system").json()["memory"]
        (place,) = memory["places"]
        computed = place["computed"]
        for part, told in (("weights", "weights_bytes"), ("slots", "slot_bytes"), ("kv_cache", "kv_cache_bytes")):
            assert computed[part] == memory[told], part
            assert memory[told] > 0 or part == "slots", "slots that are pointers take nothing"
        rank_bytes: int = server.services.memory.outlook.plan.rank_bytes  # type: ignore[union-attr, assignment]
        engine = server.http.get("/v1/system").json()["engine"]
        is_staging = engine["is_staging"]
        assert is_staging == engine["lora_kernel"].startswith("c (")
        ranks, most = 8 + (8 if is_staging else 16), (8 + 16) * rank_bytes + 2 * narrow["size_bytes"]
        assert ranks * rank_bytes < memory["stage_bytes"] <= ranks * rank_bytes + 2 * narrow["size_bytes"]
        assert memory["stage_bytes"] <= computed["stage"] <= most
        if is_staging:
            assert memory["packed_bytes"] == computed["packed"] == 0
        else:
            assert memory["packed_bytes"] == memory["stage_bytes"] <= computed["packed"] <= most
        found = scraped(server)
        assert values(found, "hotshoe_memory_bytes") == {(part, "main"): size for part, size in computed.items()}
        assert 0 < place["unaccounted_bytes"] < 8e9, "interpreters and libraries of all processes"
        names = {family.name for family in found}
        assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:generation_tokens"} <= names
        assert "vllm:lora_requests_info" not in names
