"""Which part of some bytes a request gets, by RFC 9110, and how a tar is read from any place in it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.content import Content
from server.errors import RangeNotSatisfiable
from server.ranges import Asked, asked_part
from server.tar import tar_parts

ETAG, SIZE = '"abc"', 100
WHOLE, SAME = Asked(200, 0, SIZE), Asked(304, 0, 0)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, WHOLE),
        ({"range": "bytes=0-9"}, Asked(206, 0, 10)),
        ({"range": "bytes=90-"}, Asked(206, 90, 100)),
        ({"range": "bytes=90-999"}, Asked(206, 90, 100)),
        ({"range": "bytes=99-99"}, Asked(206, 99, 100)),
        ({"range": "bytes=-10"}, Asked(206, 90, 100)),
        ({"range": "bytes=-999"}, Asked(206, 0, 100)),
        ({"range": "BYTES = 1 - 2"}, Asked(206, 1, 3)),
        ({"range": "bytes=9-1"}, WHOLE),
        ({"range": "bytes=0-1,5-6"}, WHOLE),
        ({"range": "bytes=-"}, WHOLE),
        ({"range": "lines=0-1"}, WHOLE),
        ({"range": "bytes=\u0661-2"}, WHOLE),
        ({"range": "bytes=1-2", "if-range": ETAG}, Asked(206, 1, 3)),
        ({"range": "bytes=1-2", "if-range": '"other"'}, WHOLE),
        ({"range": "bytes=1-2", "if-range": f"W/{ETAG}"}, WHOLE),
        ({"range": "bytes=1-2", "if-range": "Mon, 30 Nov 2026 00:00:00 GMT"}, WHOLE),
        ({"if-none-match": ETAG}, SAME),
        ({"if-none-match": f'"x", W/{ETAG}'}, SAME),
        ({"if-none-match": "*", "range": "bytes=200-"}, SAME),
        ({"if-none-match": '"x"', "range": "bytes=1-2"}, Asked(206, 1, 3)),
    ],
)
def test_a_request_gets_the_part_that_it_asks_for(headers: dict[str, str], expected: Asked) -> None:
    assert asked_part(headers, ETAG, SIZE) == expected


@pytest.mark.parametrize("wanted", ["bytes=100-", "bytes=100-200", "bytes=-0", f"bytes={10**19}-"])
def test_a_range_behind_the_end_is_refused_with_the_size(wanted: str) -> None:
    with pytest.raises(RangeNotSatisfiable, match="there are 100 bytes") as caught:
        asked_part({"range": wanted}, ETAG, SIZE)
    assert caught.value.size_bytes == SIZE
    assert asked_part({"range": wanted}, ETAG, SIZE, is_get=False) == WHOLE, "only a GET has ranges"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("files")
    content = {"empty": b"", "block": b"b" * 512, "odd": bytes(range(256)) * 5 + b"x", "n" * 120: b"a long name"}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder, content


def tar_of(content: dict[str, bytes]) -> Content:
    return Content(tar_parts({name: len(data) for name, data in content.items()}), ETAG, "x.tar")


def read(folder: Path, content: Content, start: int, end: int) -> bytes:
    handle = os.open(folder, os.O_RDONLY)
    try:
        return b"".join(content.read(handle, start, end))
    finally:
        os.close(handle)


def test_a_tar_is_as_long_as_it_says_and_has_every_file(files: tuple[Path, dict[str, bytes]]) -> None:
    folder, expected = files
    content = tar_of(expected)
    whole = read(folder, content, 0, content.size_bytes)
    assert len(whole) == content.size_bytes == tar_of(dict(reversed(expected.items()))).size_bytes
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert {one.name: tar.extractfile(one).read() for one in tar} == expected  # type: ignore[union-attr]
        assert {(one.mode, one.mtime, one.uid, one.uname) for one in tar} == {(0o644, 0, 0, "")}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_part_of_a_tar_is_that_part_of_the_whole(files: tuple[Path, dict[str, bytes]], data: st.DataObject) -> None:
    folder, expected = files
    content = tar_of(expected)
    start = data.draw(st.integers(0, content.size_bytes))
    end = data.draw(st.integers(start, content.size_bytes))
    assert read(folder, content, start, end) == read(folder, content, 0, content.size_bytes)[start:end]


def test_a_file_that_became_shorter_is_an_error_and_no_short_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    content = Content(tar_parts({"file": 6}), ETAG, "x.tar")
    with pytest.raises(OSError, match="1 bytes are lacking"):
        read(tmp_path, content, 0, content.size_bytes)
