"""`hotshoe export`: an adapter merged into its base as a complete Hugging Face folder, with its proof."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.options import AsJson
from server.cli.output import print_json

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from adapters.export import ExportRequest
    from server.cli.client import Client

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    app.command("export")(export)


def export(
    source: Annotated[str, typer.Argument(metavar="NAME[@N]|DIR", help="A version on the server, or a local folder.")],
    out: Annotated[Path, typer.Option(help="The folder to make; it must not exist.")],
    base: Annotated[str | None, typer.Option(help="The 16 or 32-bit base to merge into: a folder or Hub id.")] = None,
    format: Annotated[str, typer.Option(help="hf, gguf, adapter or gguf-lora.")] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="hf: float32, bfloat16 or float16, the base's own unless given. gguf: f32, f16, bf16, q8_0, ..."
        ),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="hf: the largest weight file, as 2GB or 500MB; the base's layout unless given.")
    ] = None,
    merge_into: Annotated[
        str, typer.Option(help="original, or nf4: the weights that a QLoRA run computed with.")
    ] = "original",
    evaluate: Annotated[
        Path | None, typer.Option("--eval", help="A data file: its answers are compared beside the probe's.")
    ] = None,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Leave the comparison of logits out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base: a folder in the chosen form, read back and proved before it appears.

    NAME@N (or NAME, NAME@ALIAS) is fetched from HOTSHOE_URL and merged here; DIR is an adapter folder that any trainer
    made. Exit code 3 when the adapter is refused or parity fails; nothing is left behind then.
    """
    import dataclasses

    from adapters import export as exporting

    shard_bytes = _bytes(shard_size) if shard_size else None
    exporting.check_order(format, dtype, shard_bytes, merge_into if merge_into != "original" else None)
    rows = _rows(evaluate) if evaluate else ()
    with tempfile.TemporaryDirectory(prefix="hotshoe-export-") as scratch, _progress(as_json) as tell:
        is_local = (Path(source) / ADAPTER_FILES[0]).is_file()
        opened = _from_folder if is_local else _from_server
        request = opened(source, base, out.absolute(), Path(scratch))
        request = dataclasses.replace(
            request,
            format=format,
            dtype=dtype,
            shard_bytes=shard_bytes,
            merge_into=merge_into,
            with_logits=not no_parity,
            evaluation=rows,
        )
        if request.with_logits and not is_local:
            request = dataclasses.replace(request, served=_ask_served(request.source))
        result = exporting.export(request, tell)
    if as_json:
        print_json(result.as_dict())
    else:
        _describe(result.as_dict())


def _bytes(size: str) -> int:
    """2GB, 500MB or a plain number as bytes, in powers of ten as Hugging Face counts them; raises InvalidRequest."""
    from adapters.errors import InvalidRequest

    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]?B)?", size.strip().upper(), re.ASCII)
    if match is None:
        raise InvalidRequest(f"--shard-size {size[:40]!r} is no size. Write 2GB, 500MB or bytes.", param="shard_size")
    power: int = ("B", "KB", "MB", "GB", "TB").index(match[2] or "B")
    return int(match[1]) * (1, 10**3, 10**6, 10**9, 10**12)[power]


def _rows(path: Path) -> tuple[dict[str, Any], ...]:
    """The conversations of a data file in any form that training takes; raises DataInvalid."""
    from training.data.formats import read_data

    rows = read_data(path).rows
    return tuple({"messages": list(row.messages), **({"tools": list(row.tools)} if row.tools else {})} for row in rows)


def _from_folder(source: str, base: str | None, out: Path, scratch: Path) -> ExportRequest:
    """A folder of any trainer, made canonical first. A base named by --base is believed over the folder's claim."""
    from adapters.embedded import EMBEDDED, open_base
    from adapters.export import ExportRequest, canonical_copy
    from adapters.export_tokenizer import own_tokenizer
    from adapters.inspect import read_card

    opened = open_base(base or EMBEDDED)
    folder = Path(source)
    adapter = canonical_copy(folder, opened, scratch / "canonical", base_is_named=base is not None)
    name, tokenizer = folder.resolve().name, own_tokenizer(folder, adapter, opened)
    return ExportRequest(adapter, opened, out, source=name, card=read_card(folder), tokenizer=tokenizer)


def _from_server(source: str, base: str | None, out: Path, scratch: Path) -> ExportRequest:
    """The canonical files of a version, fetched and checked against its digest."""
    from adapters.export import ExportRequest
    from server.cli.client import open_client

    with open_client() as client:
        version = _find_version(client, source)
        path = f"/v1/adapters/{version['name']}/versions/{version['version']}"
        for name in ADAPTER_FILES:
            _download(client, f"{path}/files/{name}", scratch / name)
        card = client.get(f"{path}/card") if version["has_card"] else None
        template = _template(client, path, scratch) if version["chat_template"] else None
        system = client.get("/v1/system")
    _check_digest(scratch, version)
    opened = _merge_base(system, version, base)
    family = (system["base"]["digest"],) if system["merge_base"] else ()
    return ExportRequest(
        scratch,
        opened,
        out,
        source=version["id"],
        base_digest=version["base_digest"],
        accepted_digests=family,
        card=card,
        chat_template=template,
    )


def _template(client: Client, path: str, scratch: Path) -> str:
    """The version's own chat template; the file is gone again, as it is none of the adapter's."""
    from adapters.serving import TEMPLATE_FILE

    target = scratch / TEMPLATE_FILE
    _download(client, f"{path}/files/{TEMPLATE_FILE}", target)
    text = target.read_text("utf-8")
    target.unlink()
    return text


def _find_version(client: Client, source: str) -> dict[str, Any]:
    from adapters.errors import ModelNotFound
    from adapters.types import AdapterRef

    ref = AdapterRef.parse(source)
    number = ref.number
    if number is None:
        adapter = client.get(f"/v1/adapters/{ref.name}")
        number = next((row["version"] for row in adapter["aliases"] if row["alias"] == ref.alias), None)
    if number is None:
        raise ModelNotFound(f"{ref.name} has no alias {ref.alias!r}: name a version, {ref.name}@N.", param="source")
    version: dict[str, Any] = client.get(f"/v1/adapters/{ref.name}/versions/{number}")
    return version


def _download(client: Client, path: str, target: Path) -> None:
    import httpx

    from server.cli.client import error_of, unreachable

    try:
        with client.http.stream("GET", path) as response, target.open("wb") as file:
            if response.is_error:
                raise error_of(response.status_code, response.read())
            for piece in response.iter_bytes():
                file.write(piece)
    except httpx.HTTPError as error:
        raise unreachable(client.http, error) from error


def _ask_served(model: str) -> tuple[dict[str, Any], ...]:
    """The served adapter's log-probabilities for the probe; none where the server cannot say, which is then told."""
    from adapters.errors import HotshoeError
    from adapters.parity_served import questions, read_answer
    from server.cli.client import open_client

    try:
        with open_client() as client:
            answers = [read_answer(client.post("/v1/completions", json=body)) for body in questions(model)]
    except HotshoeError as error:
        typer.echo(f"the served adapter is left out of the comparison: {error.message}", err=True)
        return ()
    return tuple(answer for answer in answers if answer is not None)


def _check_digest(folder: Path, version: dict[str, Any]) -> None:
    from adapters.canonical import digest_folder
    from adapters.errors import StorageDamaged

    digest = digest_folder(folder)
    if digest != version["digest"]:
        raise StorageDamaged(f"The files of {version['id']} have the digest {digest}, not {version['digest']}.")


def _merge_base(system: dict[str, Any], version: dict[str, Any], named: str | None) -> BaseModel:
    """--base, else the server's merge base if its folder is on this machine, else the embedded base if it is that."""
    from adapters.bases import load_base
    from adapters.embedded import EMBEDDED, open_base
    from adapters.errors import MergeBaseMissing

    if named is not None:
        return open_base(named)
    folder = system.get("merge_base_folder")
    if folder and (Path(folder) / "config.json").is_file():
        return load_base(folder)
    embedded = open_base(EMBEDDED)
    if embedded.digest == version["base_digest"]:
        return embedded
    raise MergeBaseMissing(
        f"The base of {version['id']} ({version['base_digest']}) is not on this machine: name its folder with --base.",
        param="base",
    )


@contextmanager
def _progress(is_silent: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr that follows the stages of an export."""
    if is_silent:
        yield lambda message: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("planning", total=100)
        yield lambda message: bar.update(task, description=message["stage"], completed=message.get("percent"))


def _describe(result: dict[str, Any]) -> None:
    parity, weights = result["parity"], result["parity"].get("weights")
    typer.echo(
        f"{result['source']} -> {result['path']}  ({len(result['files'])} files, {result['size_bytes']:,} bytes)"
    )
    if weights:
        typer.echo(
            f"weights: {weights['changed_tensors']} changed, {weights['unchanged_tensors_equal']} unchanged and equal; "
            f"relative error {weights['relative_error']:.3g}, of which rounding {weights['rounding_floor']:.3g}"
        )
    if parity["level"] == "logits":
        merged, floor = parity["logits"]["merged_against_peft"], parity["logits"]["rounding_floor"]
        typer.echo(
            f"logits against PEFT: largest difference {merged['max_abs']:.3g} (rounding alone {floor['max_abs']:.3g}), "
            f"same top token in {merged['top1_agreement']:.1%} of {merged['positions']} positions"
        )
        served = parity["logits"]["served_against_merged"]
        if served:
            typer.echo(
                f"log-probabilities served against merged: largest difference {served['max_abs']:.3g}, "
                f"mean {served['mean_abs']:.3g} over {served['log_probabilities']:,}"
            )
    elif parity["level"] != "answers":
        typer.echo(f"logits not compared: {parity['reason']}")
    for form in parity.get("forms", ()):
        found = form["against_peft"]
        typer.echo(
            f"{form['name']}: {found['identical']} of {found['prompts']} answers are PEFT's; log-probabilities differ "
            f"by {found['mean_abs']:.3g} in the mean, mean KL {found['mean_kl']:.3g}, same top token in "
            f"{found['top1_agreement']:.1%} of {found['positions']} positions"
        )
    for note in parity["notes"]:
        typer.echo(f"note: {note}")
