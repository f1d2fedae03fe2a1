"""`hotshoe jobs create | ls | show | watch | publish | cancel | pause | resume`: fine-tuning on a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.options import AsJson
from server.cli.output import EXIT_FAILED, print_json

if TYPE_CHECKING:
    import httpx

JOBS = "/v1/fine_tuning/jobs"
ENDED = ("succeeded", "failed", "cancelled")
STREAM_SECONDS = 60.0  # without a word, after which the stream is taken up again
Job = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the app."""
    jobs = typer.Typer(no_args_is_help=True, help="Fine-tuning on a server, as OpenAI's API has it.")
    for name, verb in (("create", create), ("ls", list_jobs), ("show", show), ("watch", watch)):
        jobs.command(name)(verb)
    jobs.command("publish")(publish)
    for name in ("cancel", "pause", "resume"):
        jobs.command(name, help=HELP[name])(_turn(name))
    app.add_typer(jobs, name="jobs")


HELP = {
    "cancel": "End a job for good; its checkpoints stay listed.",
    "pause": "Let a job rest: its process saves its step and ends.",
    "resume": "Go on with a job that was paused, from its last checkpoint.",
}


def create(
    data: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet to train on.")],
    name: Annotated[str, typer.Option(help="The adapter's name.")],
    model: Annotated[str | None, typer.Option(help="The base, or NAME@N to go on from; default the base.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Rows to validate on.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default as the server chooses.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step; default as the server chooses.")] = None,
    seed: Annotated[int | None, typer.Option(help="The run's seed; default a random one.")] = None,
    method: Annotated[str | None, typer.Option(help="qlora or lora; default as the server chooses.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the update.")] = None,
    alias: Annotated[str | None, typer.Option(help="Moved to the version once it is ready.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens; default the base's context.")] = None,
    over_long: Annotated[str | None, typer.Option(help="Rows above it: error, cut or drop.")] = None,
    rules: Annotated[str | None, typer.Option(help="Levels of the data check's rules, as CODE=warn,CODE=off.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="How well the base is asked before: quick, full or off; default quick.")
    ] = None,
    minimum_score: Annotated[
        float | None, typer.Option(help="Of the answers to validation rows; below it nothing is published.")
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Say what happens until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send the data and have the server train on it."""
    from server.cli.client import open_client
    from training.config_file import split_list

    with open_client() as client:
        files = {"training_file": data, **({"validation_file": validation} if validation else {})}
        sent = {param: _send(client, path) for param, path in files.items()}
        asked = {"n_epochs": epochs, "batch_size": batch_size}
        ours = {
            "method": method,
            "rank": rank,
            "alias": alias,
            "max_length": max_length,
            "over_long": over_long,
            "rules": list(split_list(rules)) if rules else None,
            "baseline": baseline,
            "minimum_score": minimum_score,
        }
        hyperparameters = {key: value for key, value in asked.items() if value is not None}
        body = {
            **sent,
            "model": model or client.get("/v1/models")["data"][0]["id"],
            "suffix": name,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            "hotshoe": {key: value for key, value in ours.items() if value is not None},
            **({"seed": seed} if seed is not None else {}),
        }
        job = client.post(JOBS, json=body)
    if follow:
        watch(job["id"], as_json)
    elif as_json:
        print_json(job)
    else:
        typer.echo(f"{job['id']}: {job['status']}; `hotshoe jobs watch {job['id']}` says what happens")


def list_jobs(as_json: AsJson = False) -> None:
    """List the jobs, newest first."""
    from server.cli.client import open_client

    with open_client() as client:
        rows = client.get(JOBS, params={"limit": 100})["data"]
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("job", "status", "model", "step", "made", box=None)
    for job in rows:
        progress = job["hotshoe"]["progress"] or {}
        step = f"{progress['step']}/{progress['of']}" if progress else ""
        table.add_row(job["id"], job["hotshoe"]["status"], job["model"], step, job["fine_tuned_model"] or "")
    Console().print(table)


def show(job_id: Job, as_json: AsJson = False) -> None:
    """Show one job: settings, progress, what went wrong."""
    from server.cli.client import open_client

    with open_client() as client:
        job = client.get(f"{JOBS}/{job_id}")
    if as_json:
        print_json(job)
        return
    _say(job)


def publish(
    job_id: Job,
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; default the newest one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of a job a version of its own."""
    from adapters.errors import NotFound
    from server.cli.client import open_client

    with open_client() as client:
        found = client.get(f"{JOBS}/{job_id}/checkpoints", params={"limit": 100})["data"]
        chosen = next((one for one in found if step in (None, one["step_number"])), None)
        if chosen is None:
            steps = ", ".join(str(one["step_number"]) for one in found) or "none"
            raise NotFound(f"{job_id} has no checkpoint of step {step}; it has {steps}.", param="step")
        version = client.post(f"{JOBS}/{job_id}/checkpoints/{chosen['id']}/publish")
    if as_json:
        print_json(version)
    else:
        typer.echo(f"{version['name']}@{version['version']} is step {chosen['step_number']} of {job_id}")


def watch(job_id: Job, as_json: AsJson = False) -> None:
    """Say what a job does until it ends; leaves with 0 only where it succeeded."""
    from server.cli.client import Unreachable, open_client

    last = None
    with ExitStack() as stack:
        client = stack.enter_context(open_client(STREAM_SECONDS))
        shown = None if as_json else stack.enter_context(_bar())
        while (job := client.get(f"{JOBS}/{job_id}"))["status"] not in ENDED:
            try:
                for event in _events(client.http, job_id, last):
                    last = event["id"]
                    if shown is not None:
                        shown(event)
            except Unreachable:
                continue  # the server says itself whether it is there
    if as_json:
        print_json(job)
    else:
        _say(job)
    if job["status"] != "succeeded":
        raise typer.Exit(EXIT_FAILED)


def _turn(name: str) -> Any:
    def verb(job_id: Job, as_json: AsJson = False) -> None:
        from server.cli.client import open_client

        with open_client() as client:
            job = client.post(f"{JOBS}/{job_id}/{name}")
        if as_json:
            print_json(job)
        else:
            typer.echo(f"{job_id} is {job['hotshoe']['status']}")

    return verb


def _send(client: Any, path: Path) -> str:
    """The id of a file, sent."""
    from adapters.errors import DataInvalid

    try:
        with path.open("rb") as file:
            row = client.post(
                "/v1/files", files={"file": (path.name, file)}, data={"purpose": "fine-tune"}, timeout=None
            )
    except OSError as error:
        raise DataInvalid(f"{path} cannot be read: {error.strerror}.", param="data") from error
    return str(row["id"])


def _events(http: httpx.Client, job_id: str, after: str | None) -> Iterator[dict[str, Any]]:
    """What a job says, as it says it; raises Unreachable where the stream breaks."""
    import httpx

    from server.cli.client import error_of, unreachable

    params = {"stream": "true", **({"after": after} if after else {})}
    try:
        with http.stream("GET", f"{JOBS}/{job_id}/events", params=params) as response:
            if response.is_error:
                raise error_of(response.status_code, response.read())
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))
    except httpx.HTTPError as error:
        raise unreachable(http, error) from error


def _bar() -> Any:
    """What shows events: lines, and a bar for steps where there is a terminal."""
    import sys
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    @contextmanager
    def shown() -> Iterator[Any]:
        console = Console(stderr=True)
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("", total=None, visible=False)

            def show_event(event: dict[str, Any]) -> None:
                data = event.get("data") or {}
                if "of" in data:
                    loss = data.get("loss")
                    text = "" if loss is None else f"loss {loss:.4f}"
                    progress.update(task, completed=data["step"], total=data["of"], description=text, visible=True)
                if "of" not in data or progress.disable:
                    console.print(event["message"], style="red" if event["level"] == "error" else None, markup=False)

            yield show_event

    return shown()


def _say(job: dict[str, Any]) -> None:
    ours = job["hotshoe"]
    made = f", {job['fine_tuned_model']}" if job["fine_tuned_model"] else ""
    typer.echo(f"{job['id']}: {ours['status']}{made}")
    if ours["progress"]:
        typer.echo(f"  step {ours['progress']['step']} of {ours['progress']['of']}, loss {ours['progress']['loss']}")
    if job["error"]:
        typer.secho(f"  {job['error']['code']}: {job['error']['message']}", fg="red")
        for problem in job["error"]["problems"]:
            typer.echo(f"  {problem['path']}: {problem['message']}")
