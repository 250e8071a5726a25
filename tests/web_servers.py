"""Small real web servers that tests talk to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar

Server = TypeVar("Server", bound=ThreadingHTTPServer)


class QuietHandler(BaseHTTPRequestHandler):
    """Answers without a line on stderr."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing, where the base class writes a line."""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Let the server answer, in a thread of its own, while the block lasts."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
