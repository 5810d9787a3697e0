"""Structured logs: one JSON object a line on stderr, with the request id bound by the call or the task."""

import logging
import sys
from typing import Any, cast

import orjson
import structlog

Logger = structlog.typing.FilteringBoundLogger


def configure_logging(service: str, *, level: str = "info") -> None:
    """Send structlog and the standard library's logs to stderr as JSON lines. Call once, at start."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.BytesLoggerFactory(file=sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_StdlibFormatter(service))
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)


def get_logger(**initial: Any) -> Logger:
    """Return a logger with some values bound."""
    return cast("Logger", structlog.get_logger(**initial))


def _dumps(value: Any, **_: Any) -> bytes:
    return orjson.dumps(value, default=str)


class _StdlibFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "service": self._service,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _dumps(entry).decode()
