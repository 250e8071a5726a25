"""A model server for use without a key: real embeddings and an extractive chat engine behind OpenAI's API.

`start()` runs it as a process of its own. How an answer is made: `answers.py`; when a tool is called: `policy.py`.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from utils.processes import ServerProcess, owner_mark

CHAT_MODEL = "extractive-offline"
EMBEDDING_MODEL = "wordllama-256"
RERANK_MODEL = "wordllama-maxsim"
DIMENSIONS = 256
START_TIMEOUT = 30.0


@dataclass(frozen=True)
class OfflineServer:
    """A running offline server.

    Attributes:
        base_url: ends in /v1, as the OpenAI client expects it.
        api_key: made for this server alone; requests without it get 401.
        process: the server's process; `process.stop()` ends it.
    """

    base_url: str
    api_key: str = field(repr=False)
    process: ServerProcess

    def __enter__(self) -> OfflineServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()


def start(log_file: Path | None = None, port: int = 0, api_key: str = "", tokens_per_second: int = 0) -> OfflineServer:
    """Start an offline server on 127.0.0.1 and wait until it answers.

    It ends with `process.stop()`, at the end of this process, and within a second also if this process is killed.

    Args:
        log_file: by default in the system's folder for temporary files.
        port: to listen on; a free one by default.
        api_key: that clients must name; by default one is made. With both, a server takes the place of one that ended.
        tokens_per_second: how fast it answers; 0 for at once.

    Raises:
        ServerError: it did not come up; the message ends with its log.
    """
    api_key = api_key or secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory(prefix="offline-server-") as folder:
        port_file = Path(folder) / "port"
        log = log_file or Path(tempfile.gettempdir()) / f"offline-server-{secrets.token_hex(4)}.log"
        process = ServerProcess(
            "offline model server",
            [sys.executable, "-m", "utils.offline", "--owner", owner_mark()]
            + ["--port", str(port), "--tokens-per-second", str(tokens_per_second), "--port-file", str(port_file)],
            log,
            {"OFFLINE_API_KEY": api_key},
        )
        try:
            process.wait_until(port_file.exists, START_TIMEOUT)
            url = f"http://127.0.0.1:{port_file.read_text(encoding='ascii')}"
            process.wait_until(lambda: _answers(url), START_TIMEOUT)
        except BaseException:
            process.stop()
            raise
    return OfflineServer(f"{url}/v1", api_key, process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
