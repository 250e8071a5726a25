"""The offline server's process: `python -m utils.offline --owner MARK --ready-file FILE`, OFFLINE_API_KEY its key."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import uvicorn

from utils.errors import CourseError
from utils.offline.engine import Engine, Extractive
from utils.offline.llama import Llama
from utils.offline.model import LanguageModel
from utils.offline.server import create_app
from utils.processes import end_with_owner


def main() -> None:
    """Listen on a loopback port, say so in the ready file, serve until stopped or the owner is gone."""
    parser = argparse.ArgumentParser(prog="python -m utils.offline")
    parser.add_argument("--owner", required=True)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--tokens-per-second", type=int, default=0, help="0 answers at once")
    parser.add_argument("--model", type=Path, help="a GGUF file, in place of the extractive engine")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--native-tools", action="store_true")
    parser.add_argument("--ready-file", required=True, type=Path)
    arguments = parser.parse_args()
    servers: list[uvicorn.Server] = []

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    end_with_owner(arguments.owner, stop)  # from now on, since a model may take a minute to load
    with contextlib.ExitStack() as at_the_end:
        engine: Engine = Extractive(arguments.tokens_per_second)
        speed = None
        if arguments.model:
            # Before uvicorn, which takes the signals back that llama.cpp takes for itself.
            try:
                llama = Llama(arguments.model, arguments.context)
                at_the_end.callback(llama.close)
                speed = llama.measure()
            except CourseError as error:
                sys.exit(f"error: {error}")
            engine = LanguageModel(arguments.model.stem, llama, arguments.native_tools)
        listener = _listen(arguments.port)
        app = create_app(os.environ["OFFLINE_API_KEY"], engine)
        servers.append(uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)))
        # Written under another name first, so that a reader never sees half of it.
        draft = arguments.ready_file.with_suffix(".draft")
        told = {"port": listener.getsockname()[1], "model": engine.model, "speed": asdict(speed) if speed else None}
        draft.write_text(json.dumps(told), encoding="ascii")
        draft.replace(arguments.ready_file)
        servers[0].run(sockets=[listener])


def _listen(port: int) -> socket.socket:
    # The protocol is named because asyncio switches Nagle's algorithm off (40 ms an answer) only on sockets that name
    # it.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":  # there it would allow two programs on one port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


if __name__ == "__main__":
    main()
