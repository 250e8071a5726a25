"""Standalone and cluster: etcd, the keeper and the Milvus server's roles as processes of this machine."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from utils.lesson import quiet_logs, show_path
from utils.milvus_lab import keeper
from utils.milvus_lab.lab import START_TIMEOUT, Lab, PortTaken, require_port
from utils.milvus_lab.programs import (
    LabError,
    etcd_program,
    milvus_folder,
    milvus_version,
    require_server,
    shipped_settings,
)
from utils.processes import ServerProcess, free_ports, is_alive, owner_mark

# Milvus waits for these intervals (ms; the third in seconds) before it does what it was asked for. Its defaults are
# 1000, 500, 1000, 1000 and 10: a collection would be loaded 1 s later, and available up to 10 s later after a restart.
QUICK = {
    "checkInterval": 100,
    "distPullInterval": 100,
    "checkSegmentInterval": 100,
    "checkChannelInterval": 100,
    "updateNextTargetInterval": 1,
}
# A server that was killed counts as gone after this many seconds; Milvus ships 30. The lab does not wait for it itself.
SESSION_TTL = 10
GRACE = 15  # seconds in which a query node that is asked to end hands over what it has loaded; Milvus ships 1800
PORTS = ("rootCoord", "dataCoord", "queryCoord", "queryNode", "indexCoord", "indexNode", "dataNode", "proxy")
FIRST_TOKEN = "root:Milvus"  # what Milvus starts with
SESSIONS = "by-dev/meta/session/"


class ServerLab(Lab):
    """Milvus Standalone as a process, with its etcd."""

    kind = "standalone"
    roles: Sequence[str] = ("standalone",)
    needed_bytes = 300 * 10**6

    def __init__(
        self, folder: Path, port: int | None, progress: bool, settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(folder, port, progress)
        self._settings = settings or {}

    def start(self) -> None:
        """Start everything and wait until a write and a read succeed.

        Raises:
            LabError: it cannot be started here; the message names the part and shows the end of its log.
        """
        started = time.monotonic()
        require_server()
        if self._port is not None:
            require_port(self._port)
        self.say(f"preparing Milvus {milvus_version()} (unpacked once, 250 MB)")
        self._programs = milvus_folder()
        self.prepare_folder()
        self._lab = secrets.token_hex(8)
        self._start_keeper()
        self._data = self.folder / self.kind
        self._prepare_data()
        for attempt in range(3):
            try:
                self._start_servers()
                break
            except PortTaken:
                if attempt == 2:
                    raise
                self._stop_servers()  # and try again with other ports
            except LabError as error:
                raise self._explained(error) from None
        self.say(f"ready at {self.uri} after {time.monotonic() - started:.1f} s")

    def kill(self) -> None:
        """End Milvus as a crash would (SIGKILL); etcd and the message queue go on."""
        for name in self.metrics:  # which stays as it is: restart() starts what it names
            if name in self._processes:
                self._processes.pop(name).kill()

    def restart(self) -> None:
        """Start Milvus again at the same address with its data, running or killed, and wait until it is ready.

        Raises:
            LabError: it does not come up again.
        """
        started = time.monotonic()
        self.kill()
        self._forget_sessions()
        for name in self.metrics:
            self._start_role(name)
        self._wait_healthy(self.metrics)
        self.wait_until_ready()
        self.wait_for_collections()
        self.say(f"ready again at {self.uri} after {time.monotonic() - started:.1f} s")

    def _prepare_data(self) -> None:
        """Make the data folder and the token, or find those of an earlier run."""
        file = self.folder / "token"
        self._reopened = (self._data / "etcd").exists()
        if self._reopened:
            try:
                self.token = file.read_text(encoding="ascii")
            except (OSError, UnicodeDecodeError):
                raise LabError(
                    f"{show_path(file)} is missing, and without it the data beside it cannot be opened: delete the "
                    f"folder {show_path(self.folder)} to start with an empty one."
                ) from None
            return
        file.unlink(missing_ok=True)
        self.token = f"root:{secrets.token_urlsafe(16)}"
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(self.token)
        self._data.mkdir(exist_ok=True)

    def _run(self, name: str, command: Sequence[str], patience: float, **environment: str) -> None:
        log = self.folder / "logs" / f"{name}.log"
        self._processes[name] = ServerProcess(name, command, log, environment, patience)

    def _start_keeper(self, *options: str) -> None:
        command = [sys.executable, "-m", "utils.milvus_lab.keeper", "--owner", owner_mark()]
        command += ["--folder", str(self.folder), "--lab", self._lab, *options]
        self._run("keeper", command, 5)
        lock, process = self.folder / keeper.LOCK_FILE, self._processes["keeper"]

        def missing() -> str:
            return "" if keeper.read_lock(lock).get("keeper") == process.pid else "keeper"

        try:
            self.wait(missing)
        except LabError:
            holder = str(keeper.read_lock(lock).get("owner", ""))
            if process.running or not is_alive(holder):
                raise
            raise LabError(
                f"{show_path(self.folder)} is in use by process {holder.partition(':')[0]}, which runs a lab in it: "
                "stop that one, or name another folder."
            ) from None

    def _start_servers(self) -> None:
        self._start_etcd()
        self._forget_sessions()
        self._configure()
        self.say("starting " + " ".join(self.metrics))  # fits a notebook's page
        for name in self.metrics:
            self._start_role(name)
        self._wait_healthy(self.metrics)
        self._set_password()
        self.say("healthy; waiting for a first write and read")
        self.wait_until_ready()
        self.wait_for_collections()

    def _stop_servers(self) -> None:
        for name in [name for name in self._processes if name != "keeper"]:
            self._processes.pop(name).stop()
        self.metrics.clear()

    def _start_etcd(self) -> None:
        client, peer = free_ports(2)
        self._etcd = f"http://127.0.0.1:{client}"
        own = f"http://127.0.0.1:{peer}"
        command = [str(etcd_program()), "--name", "lab", "--data-dir", str(self._data / "etcd")]
        command += ["--listen-client-urls", self._etcd, "--advertise-client-urls", self._etcd]
        command += ["--listen-peer-urls", own, "--initial-advertise-peer-urls", own, "--initial-cluster", f"lab={own}"]
        self._run("etcd", [*command, "--log-level", "warn"], 2, **{keeper.VARIABLE: self._lab})
        self.wait(lambda: "" if _answers(f"{self._etcd}/health", '"true"') else "etcd")

    def _forget_sessions(self) -> None:
        """Remove the registrations of servers that were killed; Milvus would wait until they expire."""
        end = SESSIONS[:-1] + chr(ord(SESSIONS[-1]) + 1)
        key, range_end = (base64.b64encode(text.encode()).decode() for text in (SESSIONS, end))
        try:
            httpx.post(
                f"{self._etcd}/v3/kv/deleterange",
                json={"key": key, "range_end": range_end},
                trust_env=False,
                timeout=10,
            ).raise_for_status()
        except httpx.HTTPError:
            raise LabError(f"Milvus {self.kind} did not start: etcd does not answer. {self.log_end('etcd')}") from None

    def _configure(self) -> None:
        """Write milvus.yaml, and name the roles with their addresses."""
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        if self._port is not None:
            ports["proxy"] = self._port
        settings = shipped_settings()
        for name in self._settings:
            _require_setting(settings, name)
        for role, port in ports.items():
            settings.setdefault(role, {}).update(ip="127.0.0.1", port=port)
        settings["proxy"]["internalPort"] = free_ports(1)[0]
        settings["queryCoord"].update(QUICK)
        settings["queryNode"]["gracefulStopTimeout"] = GRACE
        settings["etcd"].update(endpoints=self._etcd.removeprefix("http://"), use={"embed": False})
        settings["localStorage"]["path"] = str(self._data / "storage")
        settings["common"]["security"]["authorizationEnabled"] = True
        settings["common"]["session"]["ttl"] = SESSION_TTL
        settings["log"]["file"]["rootPath"] = ""
        self._set_message_queue(settings)
        folder = self.folder / "configs"
        folder.mkdir(exist_ok=True)
        (folder / "milvus.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        shutil.copy(self._programs / "glog.conf", folder)
        self.uri = f"http://127.0.0.1:{ports['proxy']}"
        self.metrics = {
            role: f"http://127.0.0.1:{port}/metrics"
            for role, port in zip(self.roles, free_ports(len(self.roles)), strict=True)
        }

    def _set_message_queue(self, settings: dict[str, Any]) -> None:
        settings["rocksmq"]["path"] = str(self._data / "rocksmq")

    def _start_role(self, name: str, **environment: str) -> None:
        # Milvus reads each setting from the environment, too, and that one wins over its file.
        environment |= {name.upper().replace(".", "_"): value for name, value in self._settings.items()}
        environment |= {
            keeper.VARIABLE: self._lab,
            "MILVUSCONF": str(self.folder / "configs"),
            "LD_LIBRARY_PATH": str(self._programs),
            "METRICS_PORT": self.metrics[name].rpartition(":")[2].partition("/")[0],
            "DEPLOY_MODE": "STANDALONE" if self.kind == "standalone" else "DISTRIBUTED",
        }
        # Milvus 2.3.5 takes minutes to end when asked: it waits for parts of itself that have ended already. Killed
        # it loses nothing, because what a client was told is written is in the message queue and in etcd.
        self._run(name, [str(self._programs / "milvus"), "run", name.partition("-")[0]], 0, **environment)

    def _wait_healthy(self, names: Iterable[str]) -> None:
        waiting = [*names]

        def missing() -> str:
            while waiting and _answers(self.metrics[waiting[0]].replace("/metrics", "/healthz"), "OK"):
                waiting.pop(0)
            return waiting[0] if waiting else ""

        self.wait(missing)

    def _set_password(self) -> None:
        """Put the lab's own password in place of the one that everybody knows."""
        quiet_logs()
        end = time.monotonic() + START_TIMEOUT
        while True:
            for token in (self.token, FIRST_TOKEN):
                try:
                    # dedicated: pymilvus would keep the connection and give it to the next client with this token.
                    client = MilvusClient(self.uri, token=token, timeout=5, dedicated=True)
                    if token == FIRST_TOKEN:
                        client.update_password("root", token.partition(":")[2], self.token.partition(":")[2])
                    client.close()
                    return
                except MilvusException as error:
                    reason = error.message
            if time.monotonic() > end:
                raise LabError(f"Milvus {self.kind} did not start: it refuses its own password ({reason}).")
            time.sleep(0.1)

    def _explained(self, error: LabError) -> LabError:
        hint = f"\nIf its data is damaged, delete {show_path(self.folder)} to start with an empty folder."
        return LabError(f"{error}{hint}") if self._reopened else error


def _require_setting(settings: Any, name: str) -> None:
    """Raise LabError unless `name`, with dots, is in the settings: Milvus would ignore it without a word."""
    for part in name.split("."):
        if not isinstance(settings, dict) or part not in settings:
            raise LabError(f"Milvus {milvus_version()} has no setting {name!r}: its milvus.yaml has their names.")
        settings = settings[part]


def _answers(url: str, text: str) -> bool:
    try:
        return text in httpx.get(url, timeout=2, trust_env=False).text
    except httpx.HTTPError:
        return False
