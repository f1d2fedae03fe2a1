from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import HotshoeError
from server.uploads import UploadLimits, UploadReader
from tests.fixtures.service import Server, error_of, eventually

BOUNDARY = "b0undary"
HEADERS = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, data: bytes, extra: str = "") -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + data + b"\r\n"


def parts_of(folder: Path, name: str, extra: str = "") -> bytes:
    config, weights = (folder / "adapter_config.json"), (folder / "adapter_model.safetensors")
    return (
        part("name", name.encode())
        + part("config", config.read_bytes(), extra)
        + part("weights", weights.read_bytes(), extra)
    )


def end() -> bytes:
    return f"--{BOUNDARY}--\r\n".encode()


def post(server: Server, body: bytes | Iterator[bytes], headers: dict[str, str] = HEADERS) -> httpx.Response:
    return server.http.post("/v1/adapters", content=body, headers=headers)


def test_u1_pickled_weights_are_refused_and_the_way_out_is_named(server: Server) -> None:
    folder = server.adapter()
    for start in (b"\x80\x04\x95", b"PK\x03\x04"):
        (folder / "adapter_model.safetensors").write_bytes(start + b"x" * 100)
        answer = server.push("pickled", folder)
        assert (answer.status_code, error_of(answer)["code"]) == (422, "format_not_allowed")
        assert "safetensors" in error_of(answer)["problems"][0]["advice"]


def test_u2_parts_that_are_not_taken_are_all_named(server: Server) -> None:
    body = parts_of(server.adapter(), "extra") + part("chat_template.jinja", b"{{x}}") + part("evil.py", b"") + end()
    answer = post(server, body)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (422, "file_not_allowed")
    assert [row["path"] for row in error["problems"]] == ["chat_template.jinja", "evil.py"]


@pytest.mark.parametrize("filename", ["../../../etc/passwd", "/etc/passwd", "a%00b", "x" * 10_000, "model.bin"])
def test_u9_a_file_name_of_the_clients_is_not_looked_at(server: Server, filename: str) -> None:
    body = parts_of(server.adapter(), "named", f'; filename="{filename}"') + end()
    answer = post(server, body)
    assert answer.status_code == 201, answer.text


def test_u14_a_part_over_its_limit_is_413_and_the_disk_keeps_nothing(server: Server) -> None:
    limit = server.services.settings.max_config_bytes
    body = part("name", b"big") + part("config", b"x" * (limit + 1)) + end()
    answer = post(server, body)
    assert (answer.status_code, error_of(answer)["param"]) == (413, "config")
    assert server.services.store.leftovers() == []


def test_u14_a_declared_length_over_the_limit_is_413_before_a_byte_is_read(server: Server) -> None:
    head = f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: {HEADERS['content-type']}\r\n"
    answer = server.raw(head + f"Content-Length: {1 << 40}\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413") and b"payload_too_large" in answer


def test_u14_endless_chunks_end_at_the_limit(server: Server) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield part("name", b"endless") + part("config", b"{}")[:-2] + b"\r\n"
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="card"\r\n\r\n'.encode()
        for _ in range(200):
            sent += 65536
            yield b" " * 65536

    answer = post(server, endless())
    assert answer.status_code == 413
    assert server.services.store.leftovers() == []


def test_u14_a_body_cut_short_is_400_and_leaves_nothing(server: Server) -> None:
    body = parts_of(server.adapter(), "short")
    answer = post(server, body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "length_mismatch")
    assert server.http.get("/v1/adapters/short").status_code == 404
    assert server.services.store.leftovers() == []


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(server: Server) -> None:
    def cut() -> Iterator[bytes]:
        yield parts_of(server.adapter(), "gone")[:2000]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        post(server, cut())
    server.http = httpx.Client(base_url=server.url, timeout=60)
    eventually(lambda: server.services.store.leftovers() == [])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no boundary at all",
        b"x" * 1_000_000,
        b"".join(part(f"p{i}", b"") for i in range(1000)) + end(),
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="name"; x={"y" * 65536}\r\n\r\nx\r\n'.encode() + end(),
        b"".join(part("name", b"x") for _ in range(2)) + end(),
        part("name", b"x") + end(),
        part("name", b"\xff") + part("config", b"{}") + part("weights", b"") + end(),
    ],
    ids=["empty", "no boundary", "preamble", "many parts", "long header", "twice", "missing parts", "not utf-8"],
)
def test_u30_multipart_that_is_no_upload_is_refused(server: Server, body: bytes) -> None:
    answer = post(server, body)
    assert answer.status_code in (400, 413, 422), answer.text
    error_of(answer)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 500])
def test_an_upload_must_be_multipart_with_a_boundary(server: Server, kind: str) -> None:
    answer = post(server, b"{}", {"content-type": kind})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "content-type")


@pytest.mark.parametrize("name", ["wait", "x"])
def test_base_is_can_only_be_served(server: Server, name: str) -> None:
    body = parts_of(server.adapter(), "claims") + part("base_is", name.encode()) + end()
    assert error_of(post(server, body))["param"] == "base_is"


def test_a_claim_of_another_base_is_settled_by_base_is_served(server: Server) -> None:
    folder = server.adapter(config={"base_model_name_or_path": "somebody/else"})
    assert error_of(server.push("claimed", folder))["code"] == "base_mismatch"
    assert server.push("claimed", folder, data={"name": "claimed", "base_is": "served"}).status_code == 201


def test_a_card_that_is_no_object_is_refused(server: Server) -> None:
    folder = server.adapter()
    (folder / "card.json").write_text("[1]")
    answer = server.push("carded", folder)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "card")


def test_the_event_loop_answers_while_a_large_upload_comes_in(server: Server) -> None:
    slowest = 0.0

    def large() -> Iterator[bytes]:
        nonlocal slowest
        yield part("name", b"large") + part("config", b"{}")
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="weights"\r\n\r\n'.encode()
        with httpx.Client(base_url=server.url) as other:
            for i in range(32):
                yield bytes(1 << 20)
                if i % 8 == 0:
                    started = time.monotonic()
                    assert other.get("/health").status_code == 200
                    slowest = max(slowest, time.monotonic() - started)
        yield b"\r\n" + end()

    assert post(server, large()).status_code == 422
    assert slowest < 2.0  # loose: other tests may share the machine


LIMITS = UploadLimits(weights_bytes=5000, config_bytes=2000)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 6))
def test_u31_mangled_multipart_gives_only_our_errors(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random, cuts: int
) -> None:
    folder = tmp_path_factory.mktemp("mangled")
    body = bytearray(part("name", b"n") + part("config", b"{}" * 50) + part("weights", b"w" * 500) + end())
    for _ in range(cuts):
        at = rng.randrange(len(body))
        choice = rng.randrange(3)
        if choice == 0:
            body[at] = rng.randrange(256)
        elif choice == 1:
            del body[at : at + rng.randrange(1, 40)]
        else:
            body[at:at] = rng.choice([b"\r\n", b"--", BOUNDARY.encode(), b"\x00", b'"', b"\r\n--" + BOUNDARY.encode()])
    reader = UploadReader(HEADERS["content-type"], folder, LIMITS)
    try:
        for at in range(0, len(body), 97):
            reader.write(bytes(body[at : at + 97]))
        upload = reader.finish()
        assert upload.name is not None
    except HotshoeError:
        pass
    finally:
        reader.close()
    assert {path.name for path in folder.iterdir()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
        "initial_adapter.safetensors",
    }
