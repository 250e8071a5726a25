"""The offline server's process: `python -m utils.offline --owner MARK --port-file FILE`, the key in OFFLINE_API_KEY."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

import uvicorn

from utils.offline.server import create_app
from utils.processes import end_with_owner


def main() -> None:
    """Listen on a loopback port, write its number to the port file, serve until stopped or the owner is gone."""
    parser = argparse.ArgumentParser(prog="python -m utils.offline")
    parser.add_argument("--owner", required=True)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--tokens-per-second", type=int, default=0, help="0 answers at once")
    parser.add_argument("--port-file", required=True, type=Path)
    arguments = parser.parse_args()
    # The protocol is named because asyncio switches Nagle's algorithm off (40 ms an answer) only on sockets that name
    # it.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":  # there it would allow two programs on one port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", arguments.port))
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(os.environ["OFFLINE_API_KEY"], arguments.tokens_per_second),
            log_level="warning",
            timeout_graceful_shutdown=2,
        )
    )

    def stop() -> None:
        server.should_exit = True

    end_with_owner(arguments.owner, stop)
    # Written under another name first, so that a reader never sees half a number.
    draft = arguments.port_file.with_suffix(".draft")
    draft.write_text(str(listener.getsockname()[1]), encoding="ascii")
    draft.replace(arguments.port_file)
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
