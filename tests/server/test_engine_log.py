"""What is read out of vLLM's log: the phases of a start, and the one line that says why it failed."""

from __future__ import annotations

from pathlib import Path

from server.engine.vllm_log import StartLog, last_meaningful_line


def test_phases_take_the_seconds_between_their_marks(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_text("an older start: non-default args\n")
    start = StartLog(path, 100.0)
    marks = [
        (106.0, "INFO non-default args: {}\n"),
        (112.0, "Initializing a V1 LLM engine\n"),
        (118.5, "Starting to load model x\nLoading weights took 2.04 seconds\n"),
        (120.0, "KV cache size: 11,648 tokens\n"),
        (121.0, "init engine (profile, create kv cache, warmup model) took 1.95 s\n"),
    ]
    for now, text in marks:
        with path.open("a") as file:
            file.write(text)
        start.read(now)
    start.finish(122.0)
    assert list(start.phases.items()) == [
        ("imports_api_server", 6.0),
        ("imports_engine", 6.0),
        ("imports_worker", 6.5),
        ("weights", 0.0),
        ("slots", 1.5),
        ("kv_cache", 1.0),
        ("routes", 1.0),
    ]


def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.touch()
    start = StartLog(path, 0.0)
    path.write_text("INFO non-def")
    start.read(1.0)
    assert start.phases == {}
    path.write_text("INFO non-default args: {}\n")
    start.read(2.0)
    assert start.phases == {"imports_api_server": 2.0}


def test_the_reason_is_the_root_error_of_this_start(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_text("ValueError: of an older start\n")
    start = StartLog(path, 0.0)
    with path.open("a") as file:
        file.write("(EngineCore pid=7) ERROR [core.py:1] ValueError: No available memory for the cache blocks.\n")
        file.write("(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.\n\n")
    assert start.reason() == "ValueError: No available memory for the cache blocks."


def test_without_an_error_the_reason_is_the_last_line() -> None:
    assert last_meaningful_line(["Loading", "Killed", ""]) == "Killed"
    assert last_meaningful_line(["usage: x", "entry.py: error: unrecognized arguments: --foo"]).startswith(
        "error: unrec"
    )
    assert last_meaningful_line([]) == "it wrote nothing"
