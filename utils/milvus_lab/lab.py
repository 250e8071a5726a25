"""What the three kinds of lab have in common: processes, progress, and the check that they are ready."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import psutil
from pymilvus import MilvusClient
from pymilvus.client.types import LoadState
from pymilvus.exceptions import MilvusException

from utils.lesson import quiet_logs, show_path
from utils.milvus_lab.programs import LabError, unwritable
from utils.processes import ServerProcess

START_TIMEOUT = 120.0
PROBE = "lab_readiness_check"
TAKEN = "address already in use"
LAST_WORDS = re.compile(r'^(panic|fatal error|SIG[A-Z]+): |\[FATAL\]|"level":"(fatal|panic)"')


class PortTaken(LabError):
    """Another program has taken one of the lab's ports since it was found free."""


class Lab(ABC):
    """A Milvus that runs as processes of this machine.

    Attributes:
        kind: "standalone", "cluster" or "lite".
        folder: holds its data, configuration and logs.
        uri: for MilvusClient and MILVUS_URI.
        token: for MilvusClient and MILVUS_TOKEN; "" if it has none.
        metrics: URL of the Prometheus metrics of each role.
    """

    kind: str
    needed_bytes: int

    def __init__(self, folder: Path, port: int | None, progress: bool) -> None:
        self.folder = folder.resolve()
        self.uri = ""
        self.token = ""
        self.metrics: dict[str, str] = {}
        self._port = port
        self._progress = progress
        self._processes: dict[str, ServerProcess] = {}

    @property
    def processes(self) -> dict[str, ServerProcess]:
        """The running processes by name; a copy."""
        return dict(self._processes)

    def memory(self) -> dict[str, int]:
        """Resident memory of each process, in bytes."""
        return {name: psutil.Process(process.pid).memory_info().rss for name, process in self._processes.items()}

    @abstractmethod
    def start(self) -> None:
        """Start everything and wait until a write and a read succeed."""

    @abstractmethod
    def kill(self) -> None:
        """End Milvus as a crash would (SIGKILL); what it needs besides itself goes on."""

    @abstractmethod
    def restart(self) -> None:
        """Start Milvus again at the same address with its data, running or killed, and wait until it is ready."""

    def stop(self) -> None:
        """End every process, the newest first."""
        for process in reversed(self._processes.values()):
            process.stop()
        self._processes.clear()
        self.metrics.clear()

    def say(self, text: str) -> None:
        """Show a step of the work."""
        if self._progress:
            print(f"Milvus {self.kind}: {text}", flush=True)

    def prepare_folder(self) -> None:
        """Make the folder; raise LabError if it cannot be written or its disk is almost full."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            if shutil.disk_usage(self.folder).free < self.needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise unwritable(self.folder, error, self.needed_bytes) from None

    def wait(self, what: Callable[[], str], timeout: float = START_TIMEOUT) -> None:
        """Return once `what()`, which names what is still missing, is empty.

        Raises:
            LabError: a process ended, or `timeout` seconds passed; the message names it and shows the end of its log.
        """
        end = time.monotonic() + timeout
        look = time.monotonic() + 2
        while missing := what():
            self._require_running()
            if time.monotonic() > look:  # not every time: the logs are long
                look += 2
                for name in self._processes:
                    if TAKEN in self._log(name):
                        raise PortTaken(f"Milvus {self.kind} did not start: {name} ({TAKEN}).")
            if time.monotonic() > end:
                log = self.log_end(missing) if missing in self._processes else ""
                raise LabError(f"Milvus {self.kind} did not start: no {missing} within {timeout:.0f} s. {log}".strip())
            time.sleep(0.05)

    def _require_running(self) -> None:
        for name, process in self._processes.items():
            if not process.running:
                kind = PortTaken if TAKEN in self._log(name) else LabError
                raise kind(f"Milvus {self.kind} did not start: {name} ended. {self.log_end(name)}")

    def _log(self, name: str) -> str:
        return self._processes[name].log_file.read_text(encoding="utf-8", errors="replace").strip()

    def log_end(self, name: str) -> str:
        """Where a process's log says why it failed, or its last lines."""
        lines = [line[:300] for line in self._log(name).splitlines()]
        last_words = [number for number, line in enumerate(lines) if LAST_WORDS.search(line)]
        errors = [line for line in lines if "ERROR" in line]
        # A Go program that panics writes thousands of lines after the one that says why.
        shown = lines[last_words[0] :][:2] if last_words else (errors or lines)[-4:]
        return f"Its log ({show_path(self._processes[name].log_file)}) ends with:\n" + "\n".join(shown)

    def wait_until_ready(self) -> None:
        """Return once a throw-away client has written and read a row."""
        quiet_logs()
        end = time.monotonic() + START_TIMEOUT
        while True:
            try:
                self._write_and_read()
                return
            except MilvusException as error:
                self._require_running()
                if time.monotonic() > end:
                    raise LabError(
                        f"Milvus {self.kind} did not start: its processes run, but a write and a read failed for "
                        f"{START_TIMEOUT:.0f} s ({error.message})."
                    ) from None
                time.sleep(0.1)

    def _write_and_read(self) -> None:
        client = MilvusClient(self.uri, token=self.token, timeout=10, dedicated=True)
        try:
            if client.has_collection(PROBE):
                client.drop_collection(PROBE)
            client.create_collection(PROBE, dimension=2)
            client.insert(PROBE, [{"id": 1, "vector": [1.0, 0.0]}])
            found = client.search(PROBE, [[1.0, 0.0]], limit=1, consistency_level="Strong", timeout=10)
            if not found[0]:
                raise MilvusException(message="the row that was written is not found")
            client.drop_collection(PROBE)
        finally:
            client.close()

    def wait_for_collections(self, timeout: float = 20) -> None:
        """Give the collections that were loaded before `timeout` seconds to answer again, and say which do not."""
        client = MilvusClient(self.uri, token=self.token, timeout=10, dedicated=True)
        try:
            states = {name: client.get_load_state(name)["state"] for name in client.list_collections()}
            late = [name for name, state in states.items() if state != LoadState.NotLoad]
            end = time.monotonic() + timeout
            while late and time.monotonic() < end:
                try:
                    client.query(late[0], output_fields=["count(*)"], consistency_level="Strong", timeout=5)
                    late.pop(0)
                except MilvusException:
                    time.sleep(0.1)
            if late:
                self.say(f"not answering yet: {', '.join(late)} (more replicas than query nodes?)")
        finally:
            client.close()


def require_port(port: int) -> None:
    """Raise LabError unless the port is free."""
    if not 0 < port < 65536:
        raise LabError(f"{port} is no port; name one from 1024 to 65535, or none to get a free one.")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        if sys.platform != "win32":  # there it would allow two programs on one port
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
        except OSError:
            raise LabError(f"Port {port} is taken: name another one, or none to get a free one.") from None
