"""What a merge computes block by block with is what a QLoRA layer holds, to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.checkpoint import read_header
from adapters.nf4 import nf4_scales, nf4_weight


def of_a_layer(weight: torch.Tensor) -> torch.Tensor:
    """The weight that bitsandbytes' own layer computes with after it was given this one."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.to("cpu")
    back: torch.Tensor = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return back.reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 64), (640, 576), (33, 128)], ids=str)
def test_rows_put_through_alone_are_those_of_the_layer(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    stored = read_header(tmp_path / "w.safetensors")[0]
    handle = os.open(stored.path, os.O_RDONLY)
    try:
        scales = nf4_scales(stored, handle)
    finally:
        os.close(handle)
    expected = of_a_layer(weight)
    assert torch.equal(nf4_weight(weight), expected) and not torch.equal(expected, weight)
    flat, step = weight.reshape(-1).float(), 64 * 5
    pieces = [scales.through(flat[first : first + step], first) for first in range(0, flat.numel(), step)]
    assert torch.equal(torch.cat(pieces).reshape(shape), expected.float())


def test_the_scales_of_a_large_matrix_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """From 32,768 scales on torch's threads share the sum that the mean is of."""
    torch.manual_seed(0)
    weight = (torch.randn(4096, 1024) * torch.rand(4096, 1)).bfloat16()
    save_file({"w": weight}, tmp_path / "w.safetensors")
    stored = read_header(tmp_path / "w.safetensors")[0]
    before, found = torch.get_num_threads(), []
    handle = os.open(stored.path, os.O_RDONLY)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(nf4_scales(stored, handle).scales)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        os.close(handle)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
