"""A large upload is never held in memory: the server process grows by less than 32 MB, whichever way it comes.

2 GB of each in the long tier, 192 MB in `make test`. What is measured is the peak of resident memory in /proc.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.bases import BaseModel
from server.cli.sending import PART_BYTES as PUSHED_BYTES
from tests.fixtures.adapters import QWEN25_7B, AdapterSpec, adapter_config, shape_only_base
from tests.fixtures.processes import HOTSHOE, Served, environment
from tests.fixtures.service import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
MOST_BYTES = 32 << 20
SMALL, LARGE = 192 << 20, 2 << 30
PART_BYTES = 64 << 20
BOUNDARY = "b0undary"
PIECE = bytes(range(256)) * 4096
RANK = 512
LAYERS = {SMALL: 2, LARGE: 24}  # that an adapter of this rank in bf16 has at about these sizes


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base of the 7B's shapes, without weights."""
    return shape_only_base(tmp_path_factory.mktemp("big") / "qwen25-7b", "Qwen2ForCausalLM", **QWEN25_7B)


@pytest.fixture(scope="module")
def served(big: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("large") / "home"
    one = Served(home, "--engine", "scripted", "--base", str(big.folder), "--max-rank", "512")
    warm_up(one)
    yield one
    one.end()


def warm_up(served: Served) -> None:
    """Once through every way with little, so that what is loaded at first use is not counted."""
    for send in WAYS.values():
        send(served, 1 << 20)


def resident(served: Served, name: str) -> int:
    """`VmRSS` now, or `VmHWM`, its peak since the last reset, in bytes."""
    text = Path(f"/proc/{served.process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) << 10


def growth(served: Served, act: Callable[[], Any]) -> int:
    """How far resident memory rose above where it was, at its highest, while something was done."""
    Path(f"/proc/{served.process.pid}/clear_refs").write_text("5")  # resets the peak
    before = resident(served, "VmRSS")
    act()
    return resident(served, "VmHWM") - before


def form(name: str, size: int, *texts: tuple[str, bytes]) -> Iterator[bytes]:
    """A form with some text parts and one part of `size` bytes, made as it is sent."""
    for text, value in texts:
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{text}"\r\n\r\n'.encode() + value + b"\r\n"
    yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode()
    for at in range(0, size, len(PIECE)):
        yield PIECE[: size - at]
    yield f"\r\n--{BOUNDARY}--\r\n".encode()


def post(served: Served, path: str, body: Iterator[bytes] | None = None, **options: Any) -> httpx.Response:
    if body is not None:
        options = {"content": body, "headers": {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}}
    with httpx.Client(base_url=served.url, timeout=600) as http:
        return http.post(path, **options)


def by_form(served: Served, size: int) -> None:
    """An adapter's form; the weights are no safetensors, which is said once all of them are here."""
    answer = post(served, "/v1/adapters", form("weights", size, ("name", b"large"), ("config", b"{}")))
    assert answer.status_code == 422, answer.text


def by_file(served: Served, size: int) -> None:
    answer = post(served, "/v1/files", form("file", size, ("purpose", b"adapter")))
    assert answer.status_code == 200 and answer.json()["bytes"] == size, answer.text
    httpx.delete(f"{served.url}/v1/files/{answer.json()['id']}")


def by_parts(served: Served, size: int) -> None:
    order = {"filename": "f", "purpose": "adapter", "bytes": size, "mime_type": "x/y"}
    upload = post(served, "/v1/uploads", json=order).json()["id"]
    ids = []
    for at in range(0, size, PART_BYTES):
        answer = post(served, f"/v1/uploads/{upload}/parts", form("data", min(PART_BYTES, size - at)))
        assert answer.status_code == 200, answer.text
        ids.append(answer.json()["id"])
    answer = post(served, f"/v1/uploads/{upload}/complete", json={"part_ids": ids})
    assert answer.json()["file"]["bytes"] == size, answer.text
    httpx.delete(f"{served.url}/v1/files/{answer.json()['file']['id']}")


WAYS: dict[str, Callable[[Served, int], None]] = {"form": by_form, "file": by_file, "parts": by_parts}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGE, marks=pytest.mark.long)], ids=["192 MB", "2 GB"])
def test_u14_receiving_a_large_file_is_not_holding_it(served: Served, way: str, size: int) -> None:
    grown = growth(served, lambda: WAYS[way](served, size))
    print(f"{way}: {size >> 20} MB received, resident memory rose by {grown / (1 << 20):.1f} MB")
    assert grown < MOST_BYTES


@pytest.mark.parametrize("size", [SMALL, pytest.param(LARGE, marks=pytest.mark.long)], ids=["192 MB", "2 GB"])
def test_checking_and_keeping_a_large_adapter_is_not_holding_it(
    served: Served, big: BaseModel, size: int, tmp_path: Path
) -> None:
    path = write_large(tmp_path / "weights", big, LAYERS[size])
    config = adapter_config(big, AdapterSpec(rank=RANK))
    with path.open("rb") as file, httpx.Client(base_url=served.url, timeout=600) as http:
        sent = http.post("/v1/files", data={"purpose": "adapter"}, files={"file": file}).json()
    order = {"name": f"large{size >> 20}", "config": config, "weights": sent["id"]}
    answers: list[httpx.Response] = []
    grown = growth(served, lambda: answers.append(post(served, "/v1/adapters", json=order)))
    print(f"{sent['bytes'] >> 20} MB checked and kept, resident memory rose by {grown / (1 << 20):.1f} MB")
    assert answers[0].status_code == 201 and answers[0].json()["size_bytes"] > 0.9 * sent["bytes"], answers[0].text
    httpx.delete(f"{served.url}/v1/files/{sent['id']}")
    assert grown < 2 * MOST_BYTES  # numpy looks at values by 4 MB, as float32


def test_a_push_that_was_cut_off_sends_only_what_is_missing(served: Served, big: BaseModel, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(big, AdapterSpec(rank=RANK))))
    size = write_large(folder / "adapter_model.safetensors", big, LAYERS[SMALL]).stat().st_size
    cut = subprocess.Popen(
        [*HOTSHOE, "push", str(folder), "--name", "cut", "--no-wait"],
        env=environment(HOTSHOE_URL=served.url),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    with httpx.Client(base_url=served.url) as http:

        def parts() -> int:
            pending = [row for row in http.get("/v1/uploads").json()["data"] if row["status"] == "pending"]
            return len(http.get(f"/v1/uploads/{pending[0]['id']}").json()["parts"]) if pending else 0

        eventually(lambda: parts() >= 2, 60)
        cut.kill()
        cut.wait()
        there, before = parts(), sent_parts(http)
        again = served.run("push", str(folder), "--name", "cut", "--no-wait", "--json")
        assert again.returncode == 0, again.stderr
        assert f"{there * PUSHED_BYTES >> 20} of {size >> 20} MB" in again.stderr and "there already" in again.stderr
        assert sent_parts(http) - before == -(-size // PUSHED_BYTES) - there
        assert json.loads(again.stdout)["id"] == "cut@1"
        assert http.get("/v1/files").json()["data"] == [], "nothing is left of the way"


def sent_parts(http: httpx.Client) -> int:
    """How many parts the server has taken so far."""
    line = 'hotshoe_http_responses_total{route="/v1/uploads/{upload_id}/parts",status="200"}'
    found = [text for text in http.get("/metrics").text.splitlines() if text.startswith(line)]
    return int(float(found[0].split()[-1])) if found else 0


def write_large(path: Path, base: BaseModel, layers: int, rank: int = RANK) -> Path:
    """Weights of the first layers' seven projections in bf16, values from 1 to 2 that count up by the megabyte."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in base.shapes.items():
        if int(name.split(".")[2]) < layers:
            for side, sizes in (("A", [rank, shape.in_features]), ("B", [shape.out_features, rank])):
                end = offset + 2 * sizes[0] * sizes[1]
                header[f"base_model.model.{name}.lora_{side}.weight"] = {
                    "dtype": "BF16",
                    "shape": sizes,
                    "data_offsets": [offset, end],
                }
                offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, offset, 1 << 20):
            low, high = (at >> 20) % 128, (at >> 27) % 128
            file.write((bytes([0x80 + low, 0x3F, 0x80 + high, 0x3F]) * (1 << 18))[: offset - at])
    return path
