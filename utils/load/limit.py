"""Small nodes on one machine: processes that get a share of a core, as a container's CPU limit gives it."""

from __future__ import annotations

import atexit
import signal
import threading
import time
from contextlib import suppress
from types import TracebackType

import psutil

LOOK_SECONDS = 0.01
BURST_SECONDS = 0.1  # of unused time that may be made up for, the period of Linux's own limit


class CpuLimit:
    """Keep processes to a share of one core each, while a `with` block lasts (Linux, macOS).

    A process that has used its share is stopped (SIGSTOP) until it may run again, which is what the kernel does with a
    container at its limit: over a second the share is exact, and a request that meets the stop waits for up to a tenth
    of a second longer. So several nodes fit on a machine with few cores without taking them from each other.

    Every way out lets them run again: the end of the block, an error, `stop()`, the end of the program. Only a program
    that is killed (SIGKILL) cannot; what watches its owner, as the servers of this course do, ends then all the same.

    Args:
        share: of a core, for each process; 0.25 are 250 milliCPU. Children of a process are not counted.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._processes: dict[psutil.Process, tuple[float, float]] = {}  # since when, and the seconds used by then
        self._stopped: set[psutil.Process] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu-limit", daemon=True)

    def add(self, process_id: int) -> None:
        """Limit one process more; one that has ended is forgotten."""
        process = psutil.Process(process_id)
        with self._lock:
            self._processes[process] = (time.monotonic(), _used(process))

    def __enter__(self) -> CpuLimit:
        atexit.register(self.stop)  # a program that ends without leaving the block would stop this thread anywhere
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Let all of them run freely again."""
        atexit.unregister(self.stop)
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._end.wait(LOOK_SECONDS):
                with self._lock:
                    for process in list(self._processes):
                        try:
                            self._look(process)
                        except psutil.Error:  # it has ended
                            del self._processes[process]
        finally:
            for process in self._stopped:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)

    def _look(self, process: psutil.Process) -> None:
        """Stop the process if it is over its share, let it go on if it is not."""
        since, before = self._processes[process]
        used, now = _used(process) - before, time.monotonic()
        if used > self._share * (now - since):
            self._stopped.add(process)  # first: whatever happens next, it will be let go on
            process.send_signal(signal.SIGSTOP)
        elif process in self._stopped:
            process.send_signal(signal.SIGCONT)
            self._stopped.remove(process)
        if used < self._share * (now - since - BURST_SECONDS):  # idle time is not saved up
            self._processes[process] = (now - BURST_SECONDS, before + used)


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
