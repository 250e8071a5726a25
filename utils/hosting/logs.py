"""Logs of a service: one JSON object a line on standard output, each with the request it belongs to."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from contextvars import ContextVar
from typing import TextIO

import structlog
from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict

log = structlog.get_logger("service")
LINES_LOST = Counter("agent_log_lines_lost", "Log lines that could not be written, such as on a full disk.")
# One dictionary for each request, shared by all tasks that work on it: the ids of its run are known only inside.
_ids: ContextVar[dict[str, str | None] | None] = ContextVar("ids", default=None)


def set_ids(**ids: str | None) -> None:
    """Put ids on every further log line of this request."""
    known = _ids.get()
    if known is not None:
        known.update(ids)


def get_ids() -> dict[str, str | None]:
    """The ids on the log lines of this request, as far as they are known."""
    return dict(_ids.get() or {})


def _add_ids(logger: object, method: str, event: EventDict) -> EventDict:
    return {**get_ids(), **event}


class _CountingHandler(logging.StreamHandler[TextIO]):
    """Writes on; a line that cannot be written is counted, since the log cannot tell of it."""

    def handleError(self, record: logging.LogRecord) -> None:
        LINES_LOST.inc()


def configure_logs(level: str) -> None:
    """Send every logger of the process, Agno's and Uvicorn's too, through one JSON formatter.

    Args:
        level: "DEBUG", "INFO", "WARNING" or "ERROR".
    """
    shared: list[structlog.typing.Processor] = [
        _add_ids,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = _CountingHandler(sys.stdout)
    handler.setLevel(level)  # of the handler: each run of Agno sets the level of its own loggers again
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)  # Python's own, which would be plain lines
    for name in (*logging.root.manager.loggerDict, "uvicorn"):  # Agno and pymilvus bring handlers of their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    if level == "INFO":  # where libraries tell each request that they send, and Agno calls failed uploads successful
        handler.addFilter(
            lambda record: record.levelno > logging.INFO or record.name.startswith(("service", "uvicorn"))
        )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


class AccessLog:
    """ASGI middleware: a line for each request, and a request id on every line that is logged meanwhile.

    The id is the client's `X-Request-ID`, or a new one; the answer carries it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if given.isprintable() and 0 < len(given) <= 64 else secrets.token_hex(8)
        _ids.set({"request_id": request_id})
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            user_id = scope.get("state", {}).get("user_id")
            if user_id:
                set_ids(user_id=user_id)
            # Probes come every few seconds and say nothing when all is well.
            write = log.debug if scope["path"] in ("/health", "/ready") and status == 200 else log.info
            write(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round((time.perf_counter() - started) * 1000, 1),
            )
