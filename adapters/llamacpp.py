"""Answers of the real llama.cpp for a GGUF file, from a child process: `python -m adapters.llamacpp SPEC.json`.

It is the optional package `xllamacpp`, llama.cpp with its server in one wheel. Prompts are token ids, so that nothing
but the model answers; texts are only tokenised, so that nothing but the tokenizer does. The cache is float32 and one
thread computes, so that what is left of a difference is the file's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from adapters.child import run_child
from adapters.errors import HotshoeError, InvalidRequest, ParityFailed

PACKAGE = "xllamacpp==2026.10.11549"
ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation: its token ids, and at each of them the likeliest tokens with their log-probabilities."""

    tokens: tuple[int, ...]
    top: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class LlamaAnswer:
    """One continuation for each prompt, the token ids of each text, and of the stops those that end an answer there."""

    continuations: tuple[Continuation, ...]
    texts: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]


def missing() -> str | None:
    """Why llama.cpp cannot be asked here; None where it can."""
    if find_spec("xllamacpp") is None:
        return f"llama.cpp is not installed: pip install {PACKAGE}"
    return None


def run(
    model: Path,
    *,
    lora: Path | None = None,
    prompts: Sequence[Sequence[int]] = (),
    texts: Sequence[str] = (),
    new_tokens: int = 16,
    stops: Collection[int] = (),
    top: int = 20,
) -> LlamaAnswer:
    """Load a GGUF, with an adapter on it where one is given, and ask.

    A continuation ends after `new_tokens` tokens or with one of `stops`. Raises InvalidRequest where llama.cpp is not
    installed, and ParityFailed with its words where it does not take the file.
    """
    if reason := missing():
        raise InvalidRequest(f"{reason}.", param="parity")
    spec = {
        "model": str(model),
        "lora": str(lora) if lora else None,
        "prompts": [list(prompt) for prompt in prompts],
        "texts": list(texts),
        "new_tokens": new_tokens,
        "stops": list(stops),
        "top": top,
    }
    answer = run_child("adapters.llamacpp", spec, lambda said: _failed(model, said))
    continuations = tuple(
        Continuation(tuple(one["tokens"]), tuple({int(key): value for key, value in row} for row in one["top"]))
        for one in answer["continuations"]
    )
    return LlamaAnswer(continuations, tuple(map(tuple, answer["texts"])), tuple(answer["ends"]))


def _failed(model: Path, said: str) -> HotshoeError:
    return ParityFailed(f"llama.cpp does not run {model.name}: {said}.")


def main(spec_path: str) -> None:
    """The child process: one JSON document on stdout; llama.cpp's own words go to stderr."""
    spec = json.loads(Path(spec_path).read_text())
    server = _server(spec)
    address = str(server.listening_address)
    continuations = [_continue(address, prompt, spec) for prompt in spec["prompts"]]
    texts = [_tokens(address, text) for text in spec["texts"]]
    ends = [token for token in spec["stops"] if _ends_at(address, token)]
    print(json.dumps({"continuations": continuations, "texts": texts, "ends": ends}))


def _server(spec: Mapping[str, Any]) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = spec["model"]
    if spec["lora"]:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(spec["lora"], 1.0)]
    longest = max(map(len, spec["prompts"]), default=0)
    parameters.n_ctx = max(256, longest + spec["new_tokens"] + 8)
    parameters.n_batch = parameters.n_ubatch = parameters.n_ctx
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.n_gpu_layers = 0
    parameters.fit_params = parameters.warmup = parameters.ui = False
    parameters.cache_ram_mib = 0
    parameters.n_threads_http = 1
    parameters.verbosity = 1  # errors only
    with _stderr_in_a_file() as said:
        try:
            return xllamacpp.Server(parameters)
        except RuntimeError as error:  # it says what failed; why, llama.cpp wrote to stderr before
            said.seek(0)
            lines = said.read().decode(errors="replace").splitlines()
            raise SystemExit("; ".join(line.partition(" E ")[2] for line in lines if " E " in line)[:1000]) from error


@contextmanager
def _stderr_in_a_file() -> Iterator[BinaryIO]:
    """What this process and its C++ code write to stderr goes there meanwhile."""
    before = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)


def _continue(address: str, prompt: Sequence[int], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Token by token: the server gives no probabilities of a token whose text ends within a character.

    So each request is made to sample a letter, whatever is likeliest; the log-probabilities are those before that.
    """
    letter = _tokens(address, "a")[-1]
    tokens: list[int] = []
    rows = []
    while len(tokens) < spec["new_tokens"] and not set(tokens[-1:]) & set(spec["stops"]):
        request = {"prompt": [*prompt, *tokens], "n_predict": 1, "n_probs": spec["top"], "cache_prompt": True}
        forced = {"samplers": ["top_k"], "top_k": 1, "logit_bias": [[letter, 1e6]]}
        (row,) = _ask(address, "/completion", {**request, **forced})["completion_probabilities"]
        rows.append([[one["id"], one["logprob"]] for one in row["top_logprobs"]])
        tokens.append(rows[-1][0][0])
    return {"tokens": tokens, "top": rows}


def _ends_at(address: str, token: int) -> bool:
    """An answer in which this token was sampled ends there by itself."""
    forced = {"samplers": ["top_k"], "top_k": 1, "logit_bias": [[token, 1e6]]}
    answer = _ask(address, "/completion", {"prompt": [0], "n_predict": 2, **forced})
    return bool(answer["stop_type"] == "eos")


def _tokens(address: str, text: str) -> Any:
    return _ask(address, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


def _ask(address: str, path: str, body: Mapping[str, Any]) -> Any:
    with closing(HTTPConnection(urlsplit(address).netloc, timeout=ANSWER_SECONDS)) as connection:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    if response.status != 200:
        raise SystemExit(f"{path} answered {response.status}: {content[:500].decode(errors='replace')}")
    return json.loads(content)


if __name__ == "__main__":
    main(sys.argv[1])
