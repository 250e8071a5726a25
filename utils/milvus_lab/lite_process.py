"""The process of `lite_server()`: `python -m utils.milvus_lab.lite_process --owner MARK --data DIR --port N ...`."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from milvus_lite.adapter.grpc.server import start_server_in_thread
from milvus_lite.exceptions import DataDirLockedError

from utils.processes import end_with_owner

LOCKED = 3  # utils.milvus_lab.lite knows it too, but is not imported here: its libraries take a second to load


def main() -> int:
    """Serve on loopback, write the port to the port file, and stay until stopped or until the owner is gone."""
    parser = argparse.ArgumentParser(prog="python -m utils.milvus_lab.lite_process")
    parser.add_argument("--owner", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--port-file", required=True, type=Path)
    arguments = parser.parse_args()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    end_with_owner(arguments.owner, ended.set)
    try:
        server, database, port = start_server_in_thread(arguments.data, "127.0.0.1", arguments.port)
    except DataDirLockedError:
        return LOCKED
    draft = arguments.port_file.with_suffix(".draft")
    draft.write_text(str(port), encoding="ascii")
    draft.replace(arguments.port_file)
    ended.wait()
    server.stop(grace=2).wait()
    database.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
