"""Small nodes on one machine: processes that get a share of a core, as a container's CPU limit gives it."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from types import TracebackType

import psutil

LOOK_SECONDS = 0.01
BURST_SECONDS = 0.1  # of unused time that may be made up for, the period of Linux's own limit


class CpuLimit:
    """Keep processes, each with its children, to a share of one core while a `with` block lasts (Linux, macOS).

    A process that has used its share is stopped (SIGSTOP) until it may run again, which is what the kernel does with a
    container at its limit: over a second the share is exact, and a request that meets the stop waits for up to a tenth
    of a second longer. So several nodes fit on a machine with few cores without taking them from each other.

    Args:
        share: of a core, for each process; 0.25 are 250 milliCPU.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._processes: dict[psutil.Process, tuple[float, float]] = {}  # since when, and the seconds used by then
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu-limit", daemon=True)

    def add(self, process_id: int) -> None:
        """Limit one process more; one that has ended is forgotten."""
        process = psutil.Process(process_id)
        self._processes = {**self._processes, process: (time.monotonic(), _used(process))}

    def __enter__(self) -> CpuLimit:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Let all of them run freely again."""
        self._end.set()
        self._thread.join()
        for process in self._processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)

    def _watch(self) -> None:
        stopped: set[psutil.Process] = set()
        while not self._end.wait(LOOK_SECONDS):
            for process, (since, before) in self._processes.items():
                try:
                    used, now = _used(process) - before, time.monotonic()
                    over = used > self._share * (now - since)
                    if over != (process in stopped):
                        process.send_signal(signal.SIGSTOP if over else signal.SIGCONT)
                        (stopped.add if over else stopped.remove)(process)
                    if used < self._share * (now - since - BURST_SECONDS):  # idle time is not saved up
                        self._processes[process] = (now - BURST_SECONDS, before + used)
                except psutil.Error:
                    self._processes = {one: state for one, state in self._processes.items() if one != process}


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
