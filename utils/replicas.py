"""What the drills do to a part of a cluster that `utils.milvus_lab` starts as a whole."""

from __future__ import annotations

import time

from utils.milvus_lab.distributed import Cluster


def restart_role(cluster: Cluster, name: str, away: float = 1.0) -> None:
    """Kill one process of a Milvus cluster as a crash would (SIGKILL), start it again, and wait until it is healthy.

    Args:
        cluster: a running one.
        name: of the role, such as "proxy"; `cluster.processes` lists them.
        away: seconds until it is started again.

    Raises:
        LabError: it does not come up again.
    """
    cluster.processes[name].kill()
    time.sleep(away)
    cluster._start_role(name)
    cluster._wait_healthy([name])
