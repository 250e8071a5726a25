"""A model server for use without a key: real embeddings, and a chat engine behind OpenAI's API.

The engine is extractive (`engine.py`, `answers.py`), or a language model that llama.cpp runs (`model.py`, `llama.py`).
When a tool is called: `policy.py`. `start()` runs the server as a process of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from utils.processes import ServerError, ServerProcess, owner_mark

CHAT_MODEL = "extractive-offline"
EMBEDDING_MODEL = "wordllama-256"
RERANK_MODEL = "wordllama-maxsim"
DIMENSIONS = 256
# llama.cpp's threads would spin while they wait for each other. Beside any other busy program that is fatal: two
# servers on two cores wrote 0.6 tokens a second each, and 5.8 with threads that sleep.
_THREADS = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
START_TIMEOUT = 30.0
# A model of a gigabyte or more is read from the disk.
LOAD_TIMEOUT = 300.0


@dataclass(frozen=True)
class LanguageModelFile:
    """A model for llama.cpp.

    Attributes:
        path: the GGUF file; its name without the ending is the model's name.
        context: tokens that one request may have, its reply included.
        native_tools: the model calls tools by itself instead of when the policy finds a call due.
    """

    path: Path
    context: int = 8192
    native_tools: bool = False


@dataclass(frozen=True)
class Speed:
    """How fast a language model was when it started, on a short prompt."""

    first_token_seconds: float
    prompt_tokens_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class OfflineServer:
    """A running offline server.

    Attributes:
        base_url: ends in /v1, as the OpenAI client expects it.
        api_key: made for this server alone; requests without it get 401.
        process: the server's process; `process.stop()` ends it.
        model: the name of the chat model.
        speed: of a language model; None for the extractive engine.
    """

    base_url: str
    api_key: str = field(repr=False)
    process: ServerProcess
    model: str = CHAT_MODEL
    speed: Speed | None = None

    def __enter__(self) -> OfflineServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()


def start(
    log_file: Path | None = None,
    port: int = 0,
    api_key: str = "",
    tokens_per_second: int = 0,
    model: LanguageModelFile | None = None,
) -> OfflineServer:
    """Start an offline server on 127.0.0.1 and wait until it answers.

    It ends with `process.stop()`, at the end of this process, and within a second also if this process is killed.

    Args:
        log_file: by default in the system's folder for temporary files.
        port: to listen on; a free one by default.
        api_key: that clients must name; by default one is made. With both, a server takes the place of one that ended.
        tokens_per_second: how fast the extractive engine answers; 0 for at once.
        model: a language model in place of the extractive engine.

    Raises:
        ServerError: it did not come up; the message is what it said last, or ends with its log.
    """
    api_key = api_key or secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory(prefix="offline-server-") as folder:
        ready_file = Path(folder) / "ready"
        log = log_file or Path(tempfile.gettempdir()) / f"offline-server-{secrets.token_hex(4)}.log"
        options = ["--port", str(port), "--tokens-per-second", str(tokens_per_second), "--ready-file", str(ready_file)]
        if model is not None:
            options += ["--model", str(model.path), "--context", str(model.context)]
            options += ["--native-tools"] * model.native_tools
        process = ServerProcess(
            "offline model server",
            [sys.executable, "-m", "utils.offline", "--owner", owner_mark(), *options],
            log,
            {"OFFLINE_API_KEY": api_key, **_THREADS},
        )
        try:
            process.wait_until(ready_file.exists, START_TIMEOUT if model is None else LOAD_TIMEOUT)
            told = json.loads(ready_file.read_text(encoding="ascii"))
            url = f"http://127.0.0.1:{told['port']}"
            process.wait_until(lambda: _answers(url), START_TIMEOUT)
        except BaseException as error:
            process.stop()
            if isinstance(error, ServerError) and (sentence := _why(process)):
                raise ServerError(sentence) from None
            raise
    speed = Speed(**told["speed"]) if told["speed"] else None
    return OfflineServer(f"{url}/v1", api_key, process, told["model"], speed)


def _why(process: ServerProcess) -> str:
    """What the server said last, or what its exit code says; "" if neither says anything."""
    last = process.log_tail(1)
    if last.startswith("error: "):
        return last.removeprefix("error: ")
    return _EXITS.get(process.exit_code or 0, "")


_ILLEGAL = (
    "This processor lacks an instruction that llama.cpp needs (on x86: AVX2): use MODEL_PROVIDER=offline, or "
    "OPENAI_BASE_URL with a model server on another machine."
)
_EXITS = {
    -int(getattr(signal, "SIGILL", 4)): _ILLEGAL,
    0xC000001D: _ILLEGAL,  # Windows
    -int(getattr(signal, "SIGKILL", 9)): "The model server was killed while it loaded the model, probably because the "
    "memory ran out: close other programs, set LOCAL_CONTEXT lower, or MODEL_ID=small.",
}


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
