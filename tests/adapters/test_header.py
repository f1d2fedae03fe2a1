"""Weights files from strangers: what is refused, named for what it is, before anything is parsed or loaded."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.header import MAX_TENSORS, read_header
from tests.fixtures.adapters import write_raw_safetensors, write_safetensors


def codes(path: Path) -> set[str]:
    return {problem.code for problem in read_header(path).problems}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def framed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(**changes: Any) -> bytes:
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return framed(json.dumps({"a": tensor}).encode(), b"\0" * 16)


def test_a_good_file_gives_every_tensor_with_its_place(tmp_path: Path) -> None:
    arrays = {"b": np.ones((2, 3), np.float32), "a": np.full((3, 2), 2, np.float32)}
    header = read_header(write_safetensors(tmp_path / "x", arrays, metadata={"format": "pt"}))
    assert header.problems == ()
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in header.tensors] == [
        ("b", "F32", (2, 3)),
        ("a", "F32", (3, 2)),
    ]
    last = header.tensors[1]
    raw = (tmp_path / "x").read_bytes()[last.offset : last.offset + last.size_bytes]
    assert np.array_equal(np.frombuffer(raw, "<f4").reshape(last.shape), arrays["a"])


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x10580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    tensor = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    good = write(tmp_path / "a.safetensors", framed(tensor.ljust(length), b"\0" * 16))
    assert good.read_bytes()[:1] == b"\x80" and read_header(good).problems == ()


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"GGUF"])
def test_u1_another_format_renamed_to_safetensors_is_refused_with_the_way_to_convert(
    tmp_path: Path, magic: bytes
) -> None:
    (problem,) = read_header(write(tmp_path / "x", magic + b"\0" * 64)).problems
    assert problem.code == "format_not_allowed"
    assert "safe_serialization" in problem.advice


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (0).to_bytes(8, "little") + b"\0" * 100,
        (2**63).to_bytes(8, "little") + b"{}",
        (200 << 20).to_bytes(8, "little") + b"{}" + b" " * 1000,
        (1000).to_bytes(8, "little") + b"{}",
        framed(b"[]"),
        framed(b"not json"),
        framed(b'{"a": NaN}'),
        framed(b'{"__metadata__": {"a": 1}}'),
        framed(json.dumps({"a": 1}).encode()),
        framed(b"\xef\xbb\xbf{}"),
    ],
    ids=["empty", "7 bytes", "0", "2^63", "200 MB", "beyond the end", "list", "text", "NaN", "metadata", "int", "BOM"],
)
def test_u10_a_header_that_cannot_be_is_refused_at_once_and_in_little_memory(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "x", data)
    tracemalloc.start()
    started = time.process_time()
    assert codes(path) == {"safetensors_invalid"}
    elapsed = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20
    assert elapsed < 0.05


def test_u10_a_200_mb_header_in_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x", (90 << 20).to_bytes(8, "little") + b'{"')
    os.truncate(path, 100 << 20)
    tracemalloc.start()
    assert codes(path) == {"safetensors_invalid"}
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_u11_too_many_tensors_are_counted_before_the_header_is_parsed(tmp_path: Path) -> None:
    one = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = ("{" + ",".join(one.format(i) for i in range(300_000)) + "}").encode()
    assert len(header) > 16_000_000
    path = write(tmp_path / "x", framed(header))
    tracemalloc.start()
    assert codes(path) == {"too_many_tensors"}
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_u11_the_limit_lets_every_real_adapter_through(tmp_path: Path) -> None:
    assert MAX_TENSORS > 4 * 7 * 80  # halves, magnitudes and biases of every projection of a 72B model
    entries = [(f"t{i}", "F16", [1, 1], b"\0\0") for i in range(MAX_TENSORS)]
    assert codes(write_raw_safetensors(tmp_path / "x", entries)) == set()


def test_u12_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    tensor = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    assert codes(write(tmp_path / "x", framed(f'{{"a":{tensor},"a":{tensor}}}'.encode(), b"\0" * 4))) == {
        "duplicate_key"
    }
    twice = framed(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4)
    assert codes(write(tmp_path / "x", twice)) == {"duplicate_key"}


@pytest.mark.parametrize(
    "shape", [[], [0], [0, 2**40], [1, 2, 2], [1, 1, 1, 2, 2], [2**40, 1], [-1, 4], [2.0, 2], "2", [True, 4]]
)
def test_u13_a_shape_no_adapter_has_is_refused(tmp_path: Path, shape: Any) -> None:
    assert codes(write(tmp_path / "x", entry(shape=shape))) == {"shape_invalid"}


@pytest.mark.parametrize("dtype", ["I8", "F64", "F8_E4M3", "BOOL", "f32", 7, None])
def test_u22_other_dtypes_are_refused_with_the_allowed_ones(tmp_path: Path, dtype: Any) -> None:
    (problem,) = read_header(write(tmp_path / "x", entry(dtype=dtype))).problems
    assert problem.code == "dtype_not_allowed"
    assert "F32, F16, BF16" in problem.message


def test_u23_a_git_lfs_pointer_is_named_for_what_it_is(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    (problem,) = read_header(write(tmp_path / "x", pointer)).problems
    assert problem.code == "git_lfs_pointer"
    assert "git lfs pull" in problem.advice


def test_u23_empty_tensors_are_named_as_what_zero_3_leaves_behind(tmp_path: Path) -> None:
    (problem,) = read_header(write_raw_safetensors(tmp_path / "x", [("a", "F32", [0], b"")])).problems
    assert problem.code == "shape_invalid"
    assert "ZeRO-3" in problem.message


@pytest.mark.parametrize(
    ("offsets", "data"),
    [
        ([[0, 4], [0, 4]], b"\0" * 8),  # both in one place
        ([[0, 4], [8, 12]], b"\0" * 12),  # a gap
        ([[0, 4], [4, 8]], b"\0" * 12),  # more bytes than tensors
        ([[0, 4], [4, 8]], b"\0" * 7),  # fewer
        ([[4, 8], [8, 12]], b"\0" * 12),  # a gap at the start
        ([[0, 4], [4, 2**62]], b"\0" * 8),
        ([[4, 0], [4, 8]], b"\0" * 8),
        ([[0, 4, 8], [4, 8]], b"\0" * 8),
    ],
)
def test_data_must_be_one_run_that_ends_with_the_file(tmp_path: Path, offsets: list[list[int]], data: bytes) -> None:
    header = {str(i): {"dtype": "F32", "shape": [1], "data_offsets": pair} for i, pair in enumerate(offsets)}
    assert codes(write(tmp_path / "x", framed(json.dumps(header).encode(), data))) == {"safetensors_invalid"}


def test_every_bad_tensor_is_reported_and_the_rest_counted(tmp_path: Path) -> None:
    entries = [(f"t{i}", "I8", [1, 1], b"\0") for i in range(70)]
    problems = read_header(write_raw_safetensors(tmp_path / "x", entries)).problems
    assert len(problems) == 51
    assert "20 more" in problems[-1].message


def test_a_pipe_or_folder_is_refused_without_waiting(tmp_path: Path) -> None:
    assert codes(tmp_path) == {"safetensors_invalid"}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_u31_no_bytes_raise_anything(tmp_path: Path, data: bytes, is_framed: bool) -> None:
    read_header(write(tmp_path / "x", framed(data, b"\0" * 16) if is_framed else data))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F16"]) | JSON_VALUES, "shape": JSON_VALUES,
                               "data_offsets": JSON_VALUES | st.lists(st.integers(0, 64), min_size=2, max_size=2)}),
        max_size=3,
    )
)  # fmt: skip
def test_u31_no_header_raises_anything(tmp_path: Path, header: dict[str, Any]) -> None:
    read_header(write(tmp_path / "x", framed(json.dumps(header).encode(), b"\0" * 64)))
