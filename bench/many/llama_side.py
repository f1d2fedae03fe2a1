"""llama.cpp's server with all adapters loaded, as a process of its own: `python -m bench.many.llama_side JSON`.

The base is an F32 GGUF, adapters are F16 or F32 ones. Each request chooses its adapter; the server computes requests of
different adapters one after the other. Its KV cache has llama.cpp's own default type, F16.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.many.sides import Files

PLACES = 32  # requests at the same time
CONTEXT_TOKENS = 16_384  # of all of them together


def gguf_files(files: Files, dtype: str) -> dict[str, Any]:
    """The base and every adapter as GGUF, written where they are absent; 16-bit adapters as F16, as our exports do."""
    from adapters.gguf_lora import plan_gguf_lora, write_gguf_lora
    from adapters.gguf_plan import plan_base_gguf
    from adapters.gguf_write import write_gguf

    model = files.scratch / "base.gguf"
    if not model.exists():
        write_gguf(plan_base_gguf(files.base, quantisation="f32", name="base"), model)
    adapters = []
    for folder in files.adapters:
        path = files.scratch / f"{folder.name}.gguf"
        if not path.exists():
            write_gguf_lora(plan_gguf_lora(folder, files.base, dtype="f32" if dtype == "F32" else "f16"), path)
        adapters.append(str(path))
    return {"model": str(model), "adapters": adapters}


def main(given: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = given["model"]
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in given["adapters"]]
    parameters.lora_init_without_apply = True
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = given["port"]
    parameters.n_parallel = PLACES
    parameters.n_ctx = CONTEXT_TOKENS
    parameters.kv_unified = True
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = given["threads"]
    parameters.n_gpu_layers = 0
    parameters.fit_params = parameters.ui = False
    parameters.cache_ram_mib = 0
    parameters.verbosity = 1  # errors only
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
