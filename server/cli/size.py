"""`hotshoe size`: what a base with adapters takes on a GPU or CPU, how much fits, and the settings to serve it with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.options import AsJson
from server.cli.output import EXIT_NO, print_json

if TYPE_CHECKING:
    from server.sizing.parts import Device, Form

TIED = "tie_word_embeddings"


def add_to(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command("size")(size)


def size(
    base: Annotated[
        str, typer.Option("--base", help="`embedded`, a Qwen2.5 or Qwen3 size, a folder or a config.json.")
    ] = "embedded",
    gpu: Annotated[
        str,
        typer.Option("--gpu", help="h100, a100-80gb, l40s, 4090, t4, ...; a size as 24GB; cpu; auto: this machine's."),
    ] = "auto",
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs that share each layer (--tensor-parallel-size).")] = 1,
    adapters: Annotated[int | None, typer.Option("--adapters", help="Adapters that are in use.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Their largest LoRA rank.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Longest prompt and answer together, in tokens; default the base's.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="Sequences of that length at a time; default at least one.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")] = "auto",
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="awq, gptq, fp8 or nf4; default as the base's config says.")
    ] = None,
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="Of the KV cache: auto or fp8.")] = "auto",
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", help="vLLM's flag; default vLLM's own for the GPU.")
    ] = None,
    reserved: Annotated[
        str, typer.Option("--reserved", help="Memory that other processes hold on the device, as 2GB.")
    ] = "0GB",
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Main memory of the machine, as 64GB; default this machine's for cpu."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a base with many adapters takes on a device, how many adapters and tokens fit, and the settings to serve it.

    Leaves with 3 where what is asked does not fit, and says what would. No model is loaded and no GPU is needed.
    """
    from server.cli.devices import bytes_of, find_device
    from server.sizing.parts import Traffic
    from server.sizing.report import as_dict, lines
    from server.sizing.size import size as make

    device = find_device(
        gpu, gpus, bytes_of("reserved", reserved), None if memory is None else bytes_of("memory", memory)
    )
    name, config = base_config(base)
    form = form_of(config, device, dtype, quantization, kv_dtype)
    found = make(name, config, form, device, Traffic(adapters, rank, context, concurrency, max_num_seqs))
    if as_json:
        print_json(as_dict(found))
    else:
        for line in lines(found):
            typer.echo(line)
    if not found.fits:
        raise typer.Exit(EXIT_NO)


def base_config(source: str) -> tuple[str, dict[str, Any]]:
    """What a base is called, and its config.json, from its name, folder or file; raises BaseInvalid."""
    from adapters.errors import BaseInvalid
    from training.planner.sizes import find

    path = Path(source)
    try:
        size = find(source)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BaseInvalid(f"{source} does not describe a base: {error}.", param="base") from error
    file = path / "config.json" if path.is_dir() else path
    given = json.loads(file.read_bytes()) if file.is_file() else {}
    kind = "Qwen3ForCausalLM" if size.has_head_norms else "Qwen2ForCausalLM"
    config = {
        "architectures": [kind],
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocabulary,
        TIED: size.is_tied,
        "max_position_embeddings": size.context_tokens,
        "dtype": size.dtype,
    }
    named = "embedded" if size.name == "embedded" else source if given else _hub_name(size.name)
    wrong = [f"{key} {value}" for key, value in config.items() if isinstance(value, int) and value < 1 and key != TIED]
    if wrong:
        raise BaseInvalid(f"{source} does not describe a base: {', '.join(wrong)}; the least is 1.", param="base")
    return named, given | config


def _hub_name(name: str) -> str:
    """As the Hub has the answering one: Qwen2.5's are called Instruct."""
    return f"Qwen/{name}-Instruct" if name.startswith("Qwen2.5") else f"Qwen/{name}"


def form_of(config: Mapping[str, Any], device: Device, dtype: str, quantization: str | None, kv_dtype: str) -> Form:
    """In which numbers it is served: as the server's own settings would have it. Raises ConfigInvalid."""
    from adapters.errors import ConfigInvalid
    from server.engine.vllm_flags import resolve_dtype
    from server.memory_flags import DTYPE_BYTES
    from server.sizing.parts import Form
    from server.sizing.weights import bits_of_a_weight

    said = resolve_dtype(dtype, config, is_cpu=device.is_cpu)
    named = ("bfloat16" if config["dtype"] == "float32" else config["dtype"]) if said == "auto" else said
    if named not in DTYPE_BYTES:
        raise ConfigInvalid(
            f"dtype is {named!r}; known are auto, bfloat16, float16 and float32.",
            param="dtype",
        )
    if kv_dtype not in ("auto", "fp8"):
        raise ConfigInvalid(f"kv-dtype is {kv_dtype!r}; known are auto and fp8.", param="kv-dtype")
    kv_bytes = 1 if kv_dtype == "fp8" else DTYPE_BYTES[named]
    form = _quantised(Form(named, DTYPE_BYTES[named], kv_bytes), config, quantization)
    bits_of_a_weight(form)
    return form


def _quantised(form: Form, config: Mapping[str, Any], asked: str | None) -> Form:
    """With what the option, or else the base's own config, says of its weights; raises ConfigInvalid, BaseInvalid."""
    from adapters.errors import BaseInvalid, ConfigInvalid

    stored = config.get("quantization_config") or {}
    if not isinstance(stored, dict):
        raise BaseInvalid(f"quantization_config is {stored!r}: it has to be an object.", param="base")
    method = stored.get("quant_method")
    if method is None:
        return replace(form, quantization=asked)
    if asked not in (None, method):
        raise ConfigInvalid(
            f"quantization is {asked!r} and the base's own is {method!r}: leave it out, or size the unquantised base.",
            param="quantization",
        )
    if method == "bitsandbytes" and stored.get("load_in_4bit"):
        return replace(form, quantization="nf4")
    group, bits = stored.get("group_size") or 128, stored.get("bits") or 4
    if not isinstance(group, int) or bits not in (4, 8):
        raise BaseInvalid(
            f"quantization_config has group_size {group!r} and bits {bits!r}: sized are whole groups, and 4 or 8 bits.",
            param="base",
        )
    whole = int(config["hidden_size"])  # -1: one group for each column
    return replace(form, quantization=str(method), group_size=group if group > 0 else whole, bits=bits)
