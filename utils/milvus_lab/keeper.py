"""The keeper of a lab: `python -m utils.milvus_lab.keeper --owner MARK --folder DIR --lab ID [--broker DIR]`.

One process beside the servers. It holds the folder's lock, runs the lab broker of a cluster, and ends the lab's
processes when their owner is gone or it is told to end itself. It finds them by the variable MILVUS_LAB in their
environment, so none is missed, not even one that was started in the moment in which the owner was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import psutil

from utils.milvus_lab.broker import LabBroker
from utils.processes import end_with_owner, is_alive

VARIABLE = "MILVUS_LAB"
LOCK_FILE = "lab.lock"
BUSY = 3  # exit code
# A lab whose owner was killed lets go of its folder within this many seconds.
LEAVES_WITHIN = 10.0


def main() -> int:
    """Take the folder, write its lock file, and stay until stopped or until the owner is gone."""
    parser = argparse.ArgumentParser(prog="python -m utils.milvus_lab.keeper")
    parser.add_argument("--owner", required=True)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--lab", required=True)
    parser.add_argument("--broker", type=Path, help="run a lab broker with its files in this folder")
    arguments = parser.parse_args()
    path = arguments.folder / LOCK_FILE
    with path.open("a+") as lock:  # open until the end: the lock lasts as long
        if not _take(lock, path):
            return BUSY
        end_with_owner(arguments.owner, lambda: end_lab(arguments.lab))
        # Whoever ends all Python processes of a session ends this one too, and the owner may go at the same moment.
        signal.signal(signal.SIGTERM, lambda *_: end_lab(arguments.lab))
        asyncio.run(_stay(lock, arguments))
    return 0


async def _stay(lock: TextIO, arguments: argparse.Namespace) -> None:
    address = ""
    if arguments.broker is not None:
        broker = LabBroker(arguments.broker)
        await broker.start()
        address = broker.address
    lock.truncate(0)
    lock.write(json.dumps({"owner": arguments.owner, "keeper": os.getpid(), "broker": address}))
    lock.flush()
    await asyncio.Event().wait()


def _take(lock: TextIO, path: Path) -> bool:
    end = time.monotonic() + LEAVES_WITHIN
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if is_alive(str(read_lock(path).get("owner", ""))) or time.monotonic() > end:
                return False
            time.sleep(0.05)


def read_lock(path: Path) -> dict[str, Any]:
    """What the keeper wrote into the lock file; empty while it is being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def end_lab(lab: str) -> None:
    """Kill every process of this lab, and then leave."""
    while True:
        found = [process for process in psutil.process_iter() if _belongs(process, lab)]
        for process in found:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                process.kill()
        if not found:
            os._exit(0)
        psutil.wait_procs(found, timeout=1)


def _belongs(process: psutil.Process, lab: str) -> bool:
    try:
        return process.environ().get(VARIABLE) == lab
    except (psutil.Error, OSError):
        return False


if __name__ == "__main__":
    raise SystemExit(main())
