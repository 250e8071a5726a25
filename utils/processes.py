"""Servers as child processes: a free port, a log file, a health check, and an end that cannot be forgotten.

A server started here is ended by its own process id when its owner asks for it, when the owner exits, and - because the
server itself watches its owner - also when the owner is killed and can no longer clean up.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from utils.bootstrap import ROOT
from utils.errors import CourseError


class ServerError(CourseError):
    """A server did not start, or ended before its time."""


class ServerProcess:
    """One server in its own process, writing to its own log file.

    Args:
        name: what error messages call it, such as "offline model server".
        command: program and arguments.
        log_file: receives standard output and error; its folder is made if needed.
        environment: variables added to those of this process.
        patience: seconds between the request to end and the kill when the server is stopped.
        append: keep what the log file holds, such as the log of the same server before its restart.
        folder: its working folder; the course's own by default, so that it finds `utils`.

    The server runs in a process group of its own, so interrupting a notebook cell does not interrupt the server.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_file: Path,
        environment: Mapping[str, str] | None = None,
        patience: float = 5,
        append: bool = False,
        folder: Path = ROOT,
    ) -> None:
        self.name = name
        self._patience = patience
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab" if append else "wb") as log:
            try:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env={**os.environ, **(environment or {})},
                    start_new_session=sys.platform != "win32",
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
            except OSError as error:
                raise ServerError(f"The {name} cannot be started ({error.strerror}): {command[0]}") from None
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process still runs."""
        return self.exit_code is None

    @property
    def exit_code(self) -> int | None:
        """How the process ended; None while it runs."""
        return self._process.poll()

    def wait_until(self, ready: Callable[[], bool], timeout: float) -> None:
        """Return once `ready()` is true.

        Raises:
            ServerError: the process ended, or `timeout` seconds passed; the message shows the end of the log. The
                process is stopped first.
        """
        end = time.monotonic() + timeout
        while not ready():
            if not self.running:
                raise ServerError(f"The {self.name} ended while starting. Its log ends with: {self.log_tail()}")
            if time.monotonic() > end:
                self.stop()
                raise ServerError(
                    f"The {self.name} did not answer within {timeout:.0f} seconds. Its log ends with: {self.log_tail()}"
                )
            time.sleep(0.02)

    def log_tail(self, lines: int = 5) -> str:
        """The last lines of the log, or a note that it is empty."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace").strip()
        return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"

    def kill(self) -> None:
        """End the server at once, as a crash would, and wait until it has ended."""
        atexit.unregister(self.stop)
        self._process.kill()
        self._process.wait()

    def stop(self, timeout: float | None = None) -> None:
        """End the server: ask first, kill after `timeout` seconds (default: its `patience`).

        Does nothing when it has ended already.
        """
        atexit.unregister(self.stop)
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(self._patience if timeout is None else timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_ports(number: int) -> list[int]:
    """Ports on which nothing listens now, on any interface."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("", 0))  # all of them before one is let go, so that they differ
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def owner_mark() -> str:
    """This process as `pid:start time`, so that a later process with the same id is not taken for it."""
    return f"{os.getpid()}:{psutil.Process().create_time()}"


def is_alive(mark: str) -> bool:
    """Whether the process of an `owner_mark` still runs (a zombie does not)."""
    process = _process_of(mark)
    return process is not None and _runs(process)


def _process_of(mark: str) -> psutil.Process | None:
    pid, _, started = mark.partition(":")
    try:
        process = psutil.Process(int(pid))
        # A process that got the id later started later; a corrected clock moves start times a little.
        return process if abs(process.create_time() - float(started)) < 5 else None
    except (psutil.Error, ValueError):  # a process of someone else is not ours either; ValueError: not an owner mark
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_with_owner(mark: str, stop: Callable[[], None], interval: float = 0.5) -> None:
    """Call `stop()` from a background thread once the owner is gone; leave the process 3 seconds later in any case."""
    owner = _process_of(mark)

    def watch() -> None:
        while owner is not None and _runs(owner):
            time.sleep(interval)
        stop()
        time.sleep(3)
        os._exit(0)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()
