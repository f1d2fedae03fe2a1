"""uvicorn as the server starts it: its bounds, its certificate, and what it leaves to us switched off."""

from __future__ import annotations

import resource
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from server.connections import Connections
from server.metrics import Metrics
from server.settings import MOST_RUNNING, Settings
from server.tls import Certificate

BACKLOG = 2048
MAX_OPEN_FILES = 65_536
OWN_FILES = 256  # the registry's, blobs', exports', the engine's sockets
KEEP_ALIVE_SECONDS = 75  # longer than the 60 s for which common proxies keep a connection, so that they close first


def front_config(
    settings: Settings, app: ASGIApp, metrics: Metrics, certificate: Certificate | None = None
) -> uvicorn.Config:
    """How uvicorn answers for the app."""
    connections = Connections(
        header_seconds=settings.header_seconds,
        write_seconds=settings.write_seconds,
        limit=connection_limit(settings),
        on_cut=lambda reason: metrics.cut.labels(reason).inc(),
    )
    options: dict[str, Any] = {}
    if certificate is not None:
        options["ssl_context_factory"] = lambda _config, _default: certificate.context
    return uvicorn.Config(
        app,
        http=connections.protocol(),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        ws="none",
        lifespan="on",
        **options,
    )


def connection_limit(settings: Settings) -> int:
    """The setting, or less where the process may not have so many files open: the rest of it needs some too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    running = settings.max_running or MOST_RUNNING
    room = settings.max_connections if soft == resource.RLIM_INFINITY else soft - running - OWN_FILES
    return max(16, min(settings.max_connections, room))


def allow_many_connections() -> None:
    """Raise this process's soft limit of open files to MAX_OPEN_FILES, or as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def certificate_of(settings: Settings) -> Certificate | None:
    """What HTTPS is spoken with, where the settings name it; raises ConfigInvalid."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificate(settings.tls_cert, settings.tls_key)
