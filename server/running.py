"""One server process from the lock to the last line: uvicorn in front, signals, what is printed at the start."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import closing

import uvicorn

from adapters.errors import ConfigInvalid
from adapters.keys import BOOTSTRAP_ID
from server.app import build_services, create_app
from server.cli.output import exit_code_of
from server.engine.base import Engine, engine_name
from server.front import allow_many_connections, certificate_of, front_config
from server.lifecycle import state_lock
from server.logs import configure_logging
from server.services import Services
from server.settings import Settings
from server.tls import Certificate

EXIT_INTERRUPTED = 130


def run_server(settings: Settings, engine: Engine | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Raises AlreadyRunning and ConfigInvalid first.

    An engine that is given is used in place of the one that the settings name.
    """
    lines = configure_logging(settings.log_level)
    allow_many_connections()
    certificate = certificate_of(settings)
    with state_lock(settings.home), closing(listen(settings)) as listener:
        services = build_services(settings, engine)
        lines.on_lost = services.metrics.lost_lines.inc
        app = create_app(settings, services)
        server = uvicorn.Server(front_config(settings, app, services.metrics, certificate))
        return asyncio.run(_serve(server, services, listener, certificate))


async def _serve(
    server: uvicorn.Server, services: Services, listener: socket.socket, certificate: Certificate | None
) -> int:
    received: list[int] = []
    # uvicorn puts its own handlers over these while it serves and raises the signal again afterwards, for us.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: received.append(signum))
    if certificate is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, certificate.renew)

    def give_up() -> None:
        server.should_exit = True

    services.lifecycle.on_failure = give_up
    services.lifecycle.is_leaving = lambda: server.should_exit
    services.lifecycle.on_ready = lambda: say(*ready_lines(services))
    announce(services.settings, services, listener)
    show_first_key(services.settings, services)
    try:
        await server.serve(sockets=[listener])
    finally:
        await services.lifecycle.stop(services)
    failure = services.lifecycle.failure
    if failure is not None:
        sys.stderr.write(f"{failure.code}: {failure.message}\n")
        return exit_code_of(failure)
    return EXIT_INTERRUPTED if signal.SIGINT in received else 0


def listen(settings: Settings) -> socket.socket:
    """The listening socket, bound before anything dear is started; raises ConfigInvalid."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigInvalid(
            f"Cannot listen on {settings.host} port {settings.port}: {error.strerror}. Choose another with --port.",
            param="port",
        ) from error
    return listener


def announce(settings: Settings, services: Services, listener: socket.socket) -> None:
    """Say where the server is and what its engine is started with."""
    scheme = "https" if settings.tls_cert else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    is_open = settings.is_keyless and not services.registry.has_keys()
    merged = [f"  merged  {services.merged.version.ref}: it alone answers"] if services.merged else []
    lines = [
        f"hotshoe serves {services.base.id} on {scheme}://{host}:{listener.getsockname()[1]}/v1",
        f"  base    {services.base.folder} ({services.base.digest[:19]})",
        *merged,
        f"  state   {settings.home}",
        f"  key     {'none: this machine only' if is_open else 'required'}",
        f"  engine  {describe_engine(settings, services)}",
        *services.memory.outlook.lines(),
        f"  log of the engine: {settings.home / 'engine.log'}",
    ]
    say(*lines)


def ready_lines(services: Services) -> list[str]:
    """That requests are answered from now on, and which warm versions are not back, each with its reason."""
    left_out = services.residents.left_out()
    count = len(services.residents.rows())
    lines = ["ready" if services.merged else f"ready, with {count} adapters loaded"]
    for (tenant, name, number), error in sorted(left_out.items()):
        lines.append(f"  not loaded: {engine_name(tenant, name, number)} ({error.code}): {error.message}")
    return lines


def show_first_key(settings: Settings, services: Services) -> None:
    """Make and print the bootstrap key: at the first start of a state folder, where no key was made or given."""
    key = services.registry.add_bootstrap_key(services.keyring.pepper) if settings.is_keyless else None
    if key is None:
        return
    say(
        f"  first key: {key}",
        "  It is shown this once, and opens everything from the moment when `hotshoe keys create` makes the first key",
        f"  of yours; until then this machine needs none. `hotshoe keys revoke {BOOTSTRAP_ID}` takes it back.",
    )


def say(*lines: str) -> None:
    """To the person who started the server; logs go to standard error."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def describe_engine(settings: Settings, services: Services) -> str:
    """The engine with every flag that it is started with."""
    flags = getattr(services.engine, "flags", settings.engine_args)
    return " ".join((settings.engine, *flags))
