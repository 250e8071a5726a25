"""Milvus Lite as a server."""

from __future__ import annotations

import sys
import time

from utils.lesson import show_path
from utils.milvus_lab.lab import Lab, require_port
from utils.milvus_lab.programs import LabError
from utils.processes import ServerProcess, owner_mark

LOCKED = 3  # the process's exit code when another one has its data open


class LiteServer(Lab):
    """Milvus Lite in a process of its own, for several programs on the same data."""

    kind = "lite"
    needed_bytes = 10 * 10**6

    def start(self) -> None:
        """Start the server and wait until a write and a read succeed.

        Raises:
            LabError: it cannot be started; the message shows the end of its log.
        """
        started = time.monotonic()
        if self._port is not None:
            require_port(self._port)
        self.prepare_folder()
        self._run(self._port or 0)
        self.say(f"ready at {self.uri} after {time.monotonic() - started:.1f} s")

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL)."""
        for process in self._processes.values():
            process.kill()
        self._processes.clear()

    def restart(self) -> None:
        """Start the server again at the same address with its data, running or killed, and wait until it is ready.

        Raises:
            LabError: it does not come up again.
        """
        port = int(self.uri.rpartition(":")[2])
        self.stop()
        self._run(port)

    def _run(self, port: int) -> None:
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "utils.milvus_lab.lite_process", "--owner", owner_mark()]
        command += ["--data", str(self.folder / "milvus.db"), "--port", str(port), "--port-file", str(port_file)]
        process = ServerProcess("Milvus Lite server", command, self.folder / "logs" / "lite.log")
        self._processes["lite"] = process
        try:
            self.wait(lambda: "" if port_file.exists() else "lite")
        except LabError:
            if process.exit_code == LOCKED:
                raise LabError(f"{show_path(self.folder)} is in use by another Milvus Lite: end it first.") from None
            raise
        self.uri = f"http://127.0.0.1:{port_file.read_text(encoding='ascii')}"
        self.wait_until_ready()
