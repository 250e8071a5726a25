"""What the offline server counts and times, in Prometheus's text format."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from utils.offline.engine import End, Piece

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Meter:
    """The metrics of one server. A reply without an end counts as an error: its client left, or it failed."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        self._requests = Counter("model_requests", "Chat requests", ["outcome"], registry=r)
        self._tokens = Counter("model_tokens", "Tokens of chat requests", ["kind"], registry=r)
        self._first = Histogram(
            "model_time_to_first_token_seconds",
            "Seconds until the first piece of a reply",
            buckets=_SECONDS,
            registry=r,
        )
        self._speed = Histogram(
            "model_tokens_per_second",
            "Tokens a second of a reply, after its first piece",
            buckets=_SPEEDS,
            registry=r,
        )

    async def measured(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        """The same pieces; when they end, the reply is counted."""
        started, first, outcome, pieces_of_text = time.perf_counter(), 0.0, "error", 0
        try:
            async for piece in pieces:
                if not first:
                    first = time.perf_counter()
                    self._first.observe(first - started)
                pieces_of_text += isinstance(piece, str)
                if isinstance(piece, End):
                    outcome = piece.finish_reason
                    self._tokens.labels("prompt").inc(piece.prompt_tokens)
                    self._tokens.labels("completion").inc(piece.completion_tokens)
                    # A text that was sent when it was whole, such as JSON, says nothing about the speed.
                    if pieces_of_text > 1 and (took := time.perf_counter() - first):
                        self._speed.observe((piece.completion_tokens - 1) / took)
                yield piece
        finally:
            self._requests.labels(outcome).inc()

    def text(self) -> str:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry).decode()
