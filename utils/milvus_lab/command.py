"""`python3 -m utils milvus standalone|cluster|lite`: one lab in the foreground, for a second terminal or a class."""

from __future__ import annotations

import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

from utils.lesson import show_path
from utils.milvus_lab import cluster, lite_server, standalone
from utils.milvus_lab.lab import Lab
from utils.milvus_lab.programs import LabError
from utils.settings import load_settings


def milvus_command(kind: str, folder: str | None, port: int | None, query_nodes: int | None) -> int:
    """Run a lab until Ctrl-C or SIGTERM, and return the exit code.

    Raises:
        LabError: it does not start, or a part of it ends.
    """
    if query_nodes is not None and kind != "cluster":
        raise LabError(f"--query-nodes is for a cluster; {kind} has none.")
    place = Path(folder).expanduser() if folder else load_settings().data_folder / f"milvus-{kind}"
    labs: dict[str, AbstractContextManager[Lab]] = {
        "standalone": standalone(place, port=port),
        "cluster": cluster(place, query_nodes=2 if query_nodes is None else query_nodes, port=port),
        "lite": lite_server(place, port=port),
    }

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        with labs[kind] as lab:
            _describe(lab)
            while True:
                for name, process in lab.processes.items():
                    if not process.running:
                        raise LabError(f"{name} has ended. {lab.log_end(name)}")
                time.sleep(0.2)
    except KeyboardInterrupt:
        print(f"\nStopped. The data stays in {show_path(place)}; the same command opens it again.")
        return 0


def _describe(lab: Lab) -> None:
    token = f", token={lab.token!r}" if lab.token else ""
    print(f"URI    {lab.uri}")
    print(f"token  {lab.token or '(none: any is accepted)'}")
    print(f"data   {show_path(lab.folder)}")
    print("Use it in a notebook or another terminal:")
    print(f"    export MILVUS_URI={lab.uri}" + (f" MILVUS_TOKEN={lab.token}" if lab.token else ""))
    print(f"    MilvusClient({lab.uri!r}{token})")
    print("Ctrl-C stops it.", flush=True)
