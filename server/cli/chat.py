"""`hotshoe chat`: talk to a served model, or with `--local` to a folder through transformers and peft."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import ConfigInvalid
from server.cli.output import print_json

if TYPE_CHECKING:
    from server.cli.client import Client

Turn = Callable[[list[dict[str, Any]]], str]  # prints the answer to a conversation and returns it
LOCAL_MAX_TOKENS = 512


def add_to(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A model: the base, NAME, NAME@N or NAME@ALIAS; a folder with --local."),
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="What to say; left out, each line of the terminal is a turn.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Without a server: an adapter's or a model's folder, or `embedded`.")
    ] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="With --local, an adapter's base; default its own, else the embedded.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens; 512 with --local.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="0 is the likeliest answer, and the default with --local.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as a JSON document.")] = False,
) -> None:
    """Talk to a model; the answer is printed as it comes. The end of the input (Ctrl-D) ends it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if local:
        converse(messages, prompt, local_turn(name, base, max_tokens or LOCAL_MAX_TOKENS, temperature or 0.0, as_json))
        return
    if base is not None:
        raise ConfigInvalid("--base goes with --local; a server has one base.", param="base")
    from server.cli.client import open_client

    body: dict[str, Any] = {"model": name}
    body |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    body |= {"temperature": temperature} if temperature is not None else {}
    with open_client(timeout_seconds=600.0) as client:
        converse(messages, prompt, served_turn(client, body, as_json))


def converse(messages: list[dict[str, Any]], prompt: str | None, turn: Turn) -> None:
    """One turn for the prompt, or one for each line of the terminal; the conversation grows in `messages`."""
    for said in [prompt] if prompt is not None else lines_of_terminal():
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": turn(messages)})


def lines_of_terminal() -> Iterator[str]:
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line.strip():
            yield line


def local_turn(name: str, base: str | None, max_tokens: int, temperature: float, as_json: bool) -> Turn:
    from training.quiet import quieten

    quieten()
    from training.evaluate import Prompt
    from training.reference import open_reference

    if not Path(name).is_dir() and name != "embedded":
        raise ConfigInvalid(f"{name} is no folder: --local takes an adapter's or a model's folder.", param="name")
    reference = open_reference(name, base)

    def say(piece: str) -> None:
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def turn(messages: list[dict[str, Any]]) -> str:
        text = reference.stream(Prompt(messages), say, max_tokens, temperature)
        if as_json:
            print_json({"model": name, "message": {"role": "assistant", "content": text}})
        else:
            typer.echo()
        return text

    return turn


def served_turn(client: Client, body: dict[str, Any], as_json: bool) -> Turn:
    def turn(messages: list[dict[str, Any]]) -> str:
        asked = {**body, "messages": messages}
        if not as_json:
            return print_stream(client, asked)
        answer = client.post("/v1/chat/completions", json=asked)
        print_json(answer)
        return str(answer["choices"][0]["message"]["content"])

    return turn


def print_stream(client: Client, body: dict[str, Any]) -> str:
    """Print the answer piece by piece; returns it whole. Raises the error that a stream ends with."""
    import httpx

    from server.cli.client import error_of, unreachable

    pieces: list[str] = []
    try:
        with client.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.is_error:
                raise error_of(response.status_code, response.read())
            for line in response.iter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise error_of(502, line[5:].encode())
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    typer.echo(piece, nl=False)
                    pieces.append(piece)
    except httpx.HTTPError as error:
        raise unreachable(client.http, error) from error
    typer.echo()
    return "".join(pieces)
