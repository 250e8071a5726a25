"""llama.cpp in this process: a GGUF file behind llama.cpp's own HTTP server, on a loopback port that only we know.

llama.cpp batches what its slots decode, so that requests at the same time share the processor; further ones wait in the
order in which they came. Each slot keeps the beginning of the last prompt, so a repeated system prompt costs nothing.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import psutil

from utils.errors import CourseError
from utils.offline import Speed
from utils.offline.protocol import ApiError

Json = dict[str, Any]
SLOTS = 4
# What the model says must not depend on chance, unless the request asks for that.
SEED = 42
_TIMEOUT = httpx.Timeout(None, connect=10)


class ModelFileError(CourseError):
    """llama.cpp cannot run the model file."""


class Llama:
    """A model file that is loaded and answers.

    Args:
        file: the GGUF file.
        context: tokens that one request may have, its reply included.

    Raises:
        ModelFileError: the file cannot be loaded, or there is too little memory; the sentence says what to do.
    """

    def __init__(self, file: Path, context: int) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise ModelFileError(
                f"llama.cpp (the package xllamacpp) cannot be loaded here ({error}): use MODEL_PROVIDER=offline, or "
                "OPENAI_BASE_URL with a model server of your own."
            ) from None
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context * SLOTS
        params.n_parallel = SLOTS
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
        params.cache_ram_mib = 0  # else up to 8 GB of prompts are kept beside the slots
        params.endpoint_metrics = True
        params.verbosity = 1  # errors only
        key = secrets.token_urlsafe(24)
        params.api_keys = [key]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError:
            raise ModelFileError(
                f"llama.cpp cannot load {file.name} with a context of {context} tokens for each of {SLOTS} requests: "
                "either the file is damaged or of a kind that this llama.cpp does not know (fetch it again), or the "
                "memory is too small (set LOCAL_CONTEXT lower, or MODEL_ID=small)."
            ) from None
        self._http = httpx.AsyncClient(
            base_url=self._server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=_TIMEOUT,
            # llama.cpp closes a connection that waits, and may do so just when the next request is sent on it.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )

    def close(self) -> None:
        """End llama.cpp's threads: one that still computes when this process ends reads what is already gone."""
        del self._server

    async def stream(self, body: Json) -> AsyncGenerator[Json, None]:
        """The chunks of a streamed chat completion, the one with the usage last.

        Raises:
            ApiError: llama.cpp refuses the request, or fails.
        """
        asked = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "seed": SEED, **body}
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=asked) as response:
                if response.status_code != 200:
                    raise _error(json.loads(await response.aread()))
                async for line in _lines(response):
                    if line.startswith(b"data: {"):
                        chunk = json.loads(line.removeprefix(b"data: "))
                        if "error" in chunk:
                            raise _error(chunk)
                        yield chunk
        except httpx.TransportError as error:
            raise ApiError(
                f"llama.cpp ended the connection ({type(error).__name__}).", 500, kind="server_error"
            ) from None

    async def whole(self, body: Json, begins: str = "") -> tuple[str, Json]:
        """The text of a chat completion and its last chunk, which has `usage` and `timings`.

        Args:
            body: the request.
            begins: characters; a text that begins with none of them is given up there.
        """
        text, last = "", Json()
        async with aclosing(self.stream(body)) as chunks:
            async for chunk in chunks:
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                last = {**last, **chunk, "choices": chunk["choices"] or last.get("choices", [])}
                if begins and text and text[0] not in begins:
                    break
        return text, last

    def measure(self) -> Speed:
        """Ask for a few tokens and time them; this also loads what a first request would wait for.

        Raises:
            ModelFileError: the model does not answer.
        """
        body = {"messages": [{"role": "user", "content": "Count from one to forty in words. " * 8}], "max_tokens": 24}
        asked = {**body, "temperature": 0}
        try:
            answer = httpx.post(
                f"{self._http.base_url}/v1/chat/completions",
                json=asked,
                headers=self._http.headers,
                timeout=_TIMEOUT,
                trust_env=False,
            )
            timings = answer.raise_for_status().json()["timings"]
        except (httpx.HTTPError, KeyError) as error:
            raise ModelFileError(f"llama.cpp loaded the model, but it does not chat ({error}): use another.") from None
        return Speed(timings["prompt_ms"] / 1000, timings["prompt_per_second"], timings["predicted_per_second"])

    async def metrics(self) -> str:
        """llama.cpp's own metrics, in Prometheus's text format."""
        return (await self._http.get("/metrics")).text


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a stream of events; httpx's own would also end at U+2028 and the like, within a model's words."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line


def threads() -> int:
    """One for each core that this process may use: a hyper-thread beside it would slow llama.cpp down."""
    cores, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical or 1
    return max(1, min(cores or usable, usable))


def _error(body: Json) -> ApiError:
    error = body.get("error", {})
    message, kind, status = str(error.get("message", "")), error.get("type"), error.get("code", 500)
    if kind == "exceed_context_size_error":
        return ApiError(
            f"This model's maximum context length is {error.get('n_ctx')} tokens. However, your messages resulted in "
            f"{error.get('n_prompt_tokens')} tokens. LOCAL_CONTEXT sets it.",
            param="messages",
            code="context_length_exceeded",
        )
    if status == 400:
        return ApiError(f"llama.cpp refuses the request: {message[:300]}")
    return ApiError(f"llama.cpp failed: {message[:300]}", status=500, kind="server_error")
