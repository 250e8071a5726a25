"""Milvus Distributed: one process for each role, and query nodes that come and go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.milvus_lab import keeper
from utils.milvus_lab.programs import LabError
from utils.milvus_lab.servers import GRACE, ServerLab
from utils.processes import ServerProcess, free_ports

# Milvus 2.3 has its index coordinator inside the data coordinator; the role of that name does nothing.
ROLES = ("rootcoord", "datacoord", "querycoord", "datanode", "indexnode", "proxy")
QUERY_NODE = "querynode-"
PROXY_REFRESH = 3.1  # Milvus' proxy.shardLeaderCacheInterval, as shipped, and a little more


class Cluster(ServerLab):
    """Milvus Distributed as processes, with its etcd and the lab broker."""

    kind = "cluster"

    def __init__(self, folder: Path, query_nodes: int, port: int | None, progress: bool) -> None:
        if query_nodes < 1:
            raise LabError(f"query_nodes is {query_nodes}; a cluster starts with 1 or more.")
        super().__init__(folder, port, progress)
        self.roles: Sequence[str] = [*ROLES, *(f"{QUERY_NODE}{number}" for number in range(1, query_nodes + 1))]
        self._last_number = query_nodes

    @property
    def query_nodes(self) -> list[str]:
        """Names of the running query nodes, the oldest first."""
        return [name for name in self._processes if name.startswith(QUERY_NODE)]

    def add_query_node(self) -> str:
        """Start one more query node, wait until it is healthy, and return its name; Milvus gives it work by itself.

        Raises:
            LabError: it does not start.
        """
        self._last_number += 1
        name = f"{QUERY_NODE}{self._last_number}"
        self.metrics[name] = f"http://127.0.0.1:{free_ports(1)[0]}/metrics"
        try:
            self._start_role(name)
            self._wait_healthy([name])
        except BaseException:
            self._remove(name).stop()
            raise
        return name

    def stop_query_node(self, name: str | None = None) -> str:
        """Ask a query node (by default the newest) to end, wait until it has, and return its name.

        It hands over what it has loaded first, for up to 15 seconds (1 as a rule), and answers until then. The last
        query node has nobody to hand over to and ends at once: searches fail until one is added.

        Raises:
            LabError: there is no such query node.
        """
        name = self._query_node(name)
        last = len(self.query_nodes) == 1
        self._remove(name).stop(0 if last else GRACE + 5)
        if not last:
            time.sleep(PROXY_REFRESH)  # until then a client that was idle may still be sent to the node that has ended
        return name

    def kill_query_node(self, name: str | None = None) -> str:
        """End a query node (by default the newest) as a crash would (SIGKILL), and return its name.

        Milvus takes it for gone after 10 seconds and then loads what it had into the others.

        Raises:
            LabError: there is no such query node.
        """
        name = self._query_node(name)
        self._remove(name).kill()
        return name

    def restart_role(self, name: str, away: float = 1.0) -> None:
        """Kill one of Milvus' processes as a crash would (SIGKILL), start it again, and wait until it is healthy.

        What a query node had loaded is gone for a while, as after `kill_query_node()`.

        Args:
            name: of the process, such as "proxy"; `metrics` has them all.
            away: seconds until it is started again.

        Raises:
            LabError: no such process runs, or it does not come up again.
        """
        running = [one for one in self._processes if one in self.metrics]
        if name not in running:
            raise LabError(f"There is no role {name!r}; the cluster has {', '.join(running)}.")
        self._processes[name].kill()
        time.sleep(away)
        self._start_role(name)
        self._wait_healthy([name])

    def _query_node(self, name: str | None) -> str:
        names = self.query_nodes
        if not names:
            raise LabError("The cluster has no query node; start one with add_query_node().")
        if name is not None and name not in names:
            raise LabError(f"There is no query node {name!r}; the cluster has {', '.join(names)}.")
        return name or names[-1]

    def _remove(self, name: str) -> ServerProcess:
        del self.metrics[name]
        return self._processes.pop(name)

    def _start_keeper(self, *options: str) -> None:
        super()._start_keeper("--broker", str(self.folder / self.kind / "messages"), *options)
        self._broker = str(keeper.read_lock(self.folder / keeper.LOCK_FILE)["broker"])

    def _set_message_queue(self, settings: dict[str, Any]) -> None:
        settings["mq"]["type"] = "kafka"
        settings["kafka"] = {"brokerList": self._broker}
        settings["queryCoord"]["autoBalance"] = True  # the package is made for one node and has it off

    def _start_role(self, name: str, **environment: str) -> None:
        if name.startswith(QUERY_NODE):
            environment["QUERYNODE_PORT"] = str(free_ports(1)[0])
        super()._start_role(name, **environment)
