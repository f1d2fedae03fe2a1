"""The server's own log: JSON lines on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from server.lines import LineHandler, LineWriter


def configure_logging(level: str) -> LineWriter:
    """JSON lines on stderr, ours and the libraries', without any content of requests; returns what writes them."""
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
    stderr = sys.stderr.fileno()
    writer = LineWriter(lambda: stderr)
    handler = LineHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=structlog.processors.JSONRenderer(), foreign_pre_chain=shared)
    )
    logging.basicConfig(handlers=[handler], level=number, force=True)
    for chatty in ("httpx", "asyncio", "uvicorn.error", "aiohttp.access", "alembic"):
        logging.getLogger(chatty).setLevel(max(number, logging.WARNING))
    return writer
