"""One server process from the lock to the last line: uvicorn in front, signals, what is printed at the start."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import sys
from contextlib import closing
from typing import Any

import structlog
import uvicorn

from adapters.errors import ConfigInvalid
from adapters.keys import BOOTSTRAP_ID
from server.app import build_services, create_app
from server.cli.output import exit_code_of
from server.gateway import Gateway
from server.lifecycle import state_lock
from server.services import Services
from server.settings import Settings

EXIT_INTERRUPTED = 130
BACKLOG = 2048
MAX_OPEN_FILES = 65_536
KEEP_ALIVE_SECONDS = 75  # longer than the 60 s for which common proxies keep a connection, so that they close first


def run_server(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Raises AlreadyRunning and ConfigInvalid first."""
    configure_logging(settings.log_level)
    allow_many_connections()
    with state_lock(settings.home), closing(listen(settings)) as listener:
        services = build_services(settings)
        app = create_app(settings, services)
        return asyncio.run(_serve(settings, app, services, listener))


async def _serve(settings: Settings, app: Gateway, services: Services, listener: socket.socket) -> int:
    received: list[int] = []
    # uvicorn puts its own handlers over these while it serves and raises the signal again afterwards, for us.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: received.append(signum))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            ws="none",
            lifespan="on",
        )
    )

    def give_up() -> None:
        server.should_exit = True

    services.lifecycle.on_failure = give_up
    services.lifecycle.on_ready = lambda: say(f"ready, with {len(services.residents.rows())} adapters loaded")
    announce(settings, services, listener)
    show_first_key(settings, services)
    try:
        await server.serve(sockets=[listener])
    finally:
        await services.lifecycle.stop(services)
    failure = services.lifecycle.failure
    if failure is not None:
        sys.stderr.write(f"{failure.code}: {failure.message}\n")
        return exit_code_of(failure)
    return EXIT_INTERRUPTED if signal.SIGINT in received else 0


def allow_many_connections() -> None:
    """Raise this process's soft limit of open files to MAX_OPEN_FILES, or as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
    lines = [
        f"hotshoe serves {services.base.id} on {scheme}://{host}:{listener.getsockname()[1]}/v1",
        f"  base    {services.base.folder} ({services.base.digest[:19]})",
        f"  state   {settings.home}",
        f"  key     {'none: this machine only' if is_open else 'required'}",
        f"  engine  {describe_engine(settings, services)}",
        f"  log of the engine: {settings.home / 'engine.log'}",
    ]
    say(*lines)


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


def configure_logging(level: str) -> None:
    """JSON lines on stderr, ours and the libraries', without any content of requests."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=structlog.processors.JSONRenderer(), foreign_pre_chain=shared)
    )
    logging.basicConfig(handlers=[handler], level=number, force=True)
    for chatty in ("httpx", "asyncio", "uvicorn.error", "aiohttp.access", "alembic"):
        logging.getLogger(chatty).setLevel(max(number, logging.WARNING))
