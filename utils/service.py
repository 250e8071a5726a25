"""An AgentOS service as a process of this machine: `service()` starts it, waits until it is ready, and ends it.

`python -m utils.service FILE` runs a file that serves, and ends when the owner named in SERVICE_OWNER is gone.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from utils.processes import ServerError, ServerProcess, end_with_owner, free_ports, owner_mark

START_SECONDS = 120.0
STOP_SECONDS = 35.0  # a little more than the app gives its running requests


class Service:
    """A running service.

    Attributes:
        url: where it answers, such as http://127.0.0.1:7777.
        folder: its SQLite and Milvus Lite files, if it uses them, and its log.
        log_file: one JSON object a line.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], port: int | None, app: str | Path) -> None:
        self.folder = folder.resolve()
        self.log_file = self.folder / "service.log"
        # A file of the learner's has no other route than the one that Agno brings.
        own_file = isinstance(app, Path)
        self._route = "health" if own_file else "ready"
        self._command = ["utils.service", str(app)] if own_file else [str(app)]
        self._environment = {"SERVICE_FOLDER": str(self.folder), **environment}
        self._port = port or free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: ServerProcess | None = None

    @property
    def process(self) -> ServerProcess:
        """Its process; after `restart()` another one."""
        assert self._process is not None
        return self._process

    def start(self) -> float:
        """Start it and wait until it says that it is ready; return the seconds this took.

        Raises:
            ServerError: it did not start; the message is its own, or ends with its log.
        """
        started = time.monotonic()
        own = {"SERVICE_PORT": str(self._port), "SERVICE_HOST": "127.0.0.1", "SERVICE_OWNER": owner_mark()}
        process = ServerProcess(
            "service",
            [sys.executable, "-m", *self._command],
            self.log_file,
            {**self._environment, **own},
            patience=STOP_SECONDS,
            append=self._process is not None,
        )
        self._process = process
        try:
            with httpx.Client(timeout=5, trust_env=False) as client:  # making one takes longer than asking
                process.wait_until(lambda: self._is_ready(process, client), START_SECONDS)
        except ServerError:
            if process.exit_code == 1:  # it said why, in one sentence
                reason = process.log_tail(1).removeprefix("error: ")
                raise ServerError(f"The service did not start: {reason}") from None
            raise
        return time.monotonic() - started

    def stop(self) -> None:
        """Ask it to end, and wait until the requests that run are done."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()

    def restart(self) -> float:
        """Start it again at the same address with the same data, running or killed; return the seconds this took.

        Raises:
            ServerError: as for `start()`.
        """
        self.stop()
        return self.start()

    def _is_ready(self, process: ServerProcess, client: httpx.Client) -> bool:
        if not process.running:
            return False
        try:
            return client.get(f"{self.url}/{self._route}").status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def service(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    port: int | None = None,
    app: str | Path = "utils.apps.knowledge_agent",
    progress: bool = True,
) -> Iterator[Service]:
    """Run a service while the block lasts.

    Args:
        folder: for its data and its log; made if needed.
        environment: settings of the service (utils/hosting/config.py lists them) over those of this process.
        port: to listen on; a free one by default.
        app: a module of utils/apps, or a Python file that calls `AgentOS.serve` on the port SERVICE_PORT.
        progress: print where it answers.

    Raises:
        ServerError: it did not start.
    """
    running = Service(folder, environment or {}, port, app)
    try:
        seconds = running.start()
        if progress:
            print(f"service {running.folder.name}: ready at {running.url} after {seconds:.1f} s")
        yield running
    finally:
        running.stop()


def main() -> None:
    """Run the file named on the command line as a program."""
    file = Path(sys.argv[1])
    end_with_owner(os.environ["SERVICE_OWNER"], lambda: os.kill(os.getpid(), signal.SIGTERM))
    sys.path.insert(0, str(file.parent))  # `serve(app="name:app")` imports the file by its name
    os.chdir(file.parent)
    runpy.run_path(str(file), run_name="__main__")


if __name__ == "__main__":
    main()
