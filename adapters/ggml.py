"""llama.cpp's own quantiser of K-quants, called in the library of the optional package `xllamacpp`.

The search for the best scales of a block is llama.cpp's (`ggml_quantize_chunk` of ggml.h); what it gives is checked by
adapters/gguf_k.py. Blocks are searched one by one, so the bytes depend on no number of threads.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters.errors import InvalidRequest
from adapters.gguf_types import BLOCK_SIZES, TYPE_CODES
from adapters.llamacpp import missing


def quantise(rows: npt.NDArray[np.float32], kind: str) -> npt.NDArray[np.uint8]:
    """(rows, columns), whole blocks in a row, as the bytes of a type; raises InvalidRequest without llama.cpp."""
    held = np.ascontiguousarray(rows, np.float32)
    elements, size_bytes = BLOCK_SIZES[kind]
    written = np.empty(held.size // elements * size_bytes, np.uint8)
    size = _library().ggml_quantize_chunk(
        TYPE_CODES[kind], held.ctypes.data, written.ctypes.data, 0, held.shape[0], held.shape[1], None
    )
    if size != written.size:
        raise RuntimeError(f"ggml_quantize_chunk wrote {size} bytes of {written.size} as {kind}")
    return written


@cache
def _library() -> ctypes.CDLL:
    if reason := missing():
        raise InvalidRequest(f"K-quants are made by llama.cpp. {reason}.", param="dtype")
    found = find_spec("xllamacpp")
    folder = Path(next(iter((found and found.submodule_search_locations) or ()), ""))
    library = next((ctypes.CDLL(str(path)) for path in sorted(folder.glob("xllamacpp*.so"))), None)
    if library is None or not hasattr(library, "ggml_quantize_chunk"):
        raise InvalidRequest(f"xllamacpp in {folder} has no ggml_quantize_chunk to call.", param="dtype")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    return library
