"""Real Milvus servers as processes of this machine, without Docker: `standalone()`, `cluster()` and `lite_server()`.

    with standalone(Path("data/local/lab")) as lab:
        client = MilvusClient(lab.uri, token=lab.token)

The servers are Milvus 2.3.5 out of the pip package `milvus`, for Linux on x86-64; `lite_server()` is Milvus Lite and
runs everywhere. Several labs run at once, each in a folder and on free ports of its own. A folder that has data is
opened again. When the block is left, and also when the program is killed, every process ends: Milvus with SIGKILL,
because it takes minutes to end by itself and loses nothing that it has confirmed.

Who can reach a server: Milvus 2.3.5 listens on all interfaces of the machine. The port of `uri` wants `token`, whose
password is made for the lab and kept in the folder's file `token`. The ports between Milvus' own roles, and the
metrics, have no password: on a network that you do not trust, close them with a firewall. etcd, the lab broker and
Milvus Lite listen on loopback only. Milvus Lite has no password.

What differs from the settings that Milvus ships: it looks for work more often, so that loading a collection takes 2
seconds instead of 3; a killed server counts as gone after 10 seconds instead of 30; logs go to the folder. Consistency
is as shipped. A cluster's message queue is the lab broker, see broker.py for its limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from utils.milvus_lab.distributed import Cluster
    from utils.milvus_lab.lab import Lab
    from utils.milvus_lab.lite import LiteServer
    from utils.milvus_lab.servers import ServerLab

LabType = TypeVar("LabType", bound="Lab")

# The modules are imported when a lab is made: the keeper's process comes through here too, and would need 150 MB more.


@contextmanager
def standalone(
    folder: Path, *, port: int | None = None, progress: bool = True, settings: Mapping[str, str] | None = None
) -> Iterator[ServerLab]:
    """Run Milvus Standalone while the block lasts (Linux x86-64; 250 MB of memory, 280 MB of disk, ready in 5 s).

    Args:
        folder: for its data, configuration, logs and token; made if needed.
        port: of `uri`; a free one by default.
        progress: print the steps of the start.
        settings: of Milvus, by the names of its milvus.yaml: {"dataCoord.segment.sealProportion": "1"}. They count
            for each start of the server, and win over the lab's own.

    Raises:
        LabError: it cannot run here, the folder or the port is taken, Milvus has no such setting, or a part does not
            start.
    """
    from utils.milvus_lab.servers import ServerLab

    with _running(ServerLab(folder, port, progress, settings)) as lab:
        yield lab


@contextmanager
def cluster(folder: Path, *, query_nodes: int = 2, port: int | None = None, progress: bool = True) -> Iterator[Cluster]:
    """Run Milvus Distributed while the block lasts (Linux x86-64; 1.3 GB of memory with 2 query nodes, ready in 6 s).

    Args:
        folder: for its data, configuration, logs and token; made if needed.
        query_nodes: how many to start with; `add_query_node()` and its two counterparts change the number.
        port: of `uri`; a free one by default.
        progress: print the steps of the start.

    Raises:
        LabError: as for `standalone()`, or `query_nodes` is less than 1.
    """
    from utils.milvus_lab.distributed import Cluster

    with _running(Cluster(folder, query_nodes, port, progress)) as lab:
        yield lab


@contextmanager
def lite_server(folder: Path, *, port: int | None = None, progress: bool = True) -> Iterator[LiteServer]:
    """Run Milvus Lite as a server for several programs while the block lasts (any platform; ready in 1 to 2 s).

    Args:
        folder: for its data and log; made if needed.
        port: of `uri`; a free one by default.
        progress: print the steps of the start.

    Raises:
        LabError: the folder or the port is taken, or it does not start.
    """
    from utils.milvus_lab.lite import LiteServer

    with _running(LiteServer(folder, port, progress)) as lab:
        yield lab


@contextmanager
def _running(lab: LabType) -> Iterator[LabType]:
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
