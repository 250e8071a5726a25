"""What groups of processes use while a block lasts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from types import TracebackType

import pandas as pd
import psutil


class Usage:
    """Processor time and memory of groups of processes while a `with` block lasts.

    A process counts with all its children; only this process counts alone, because its children are the servers.

    Args:
        groups: process ids by the name of their group, such as {"agents": [4711, 4712]}.

    Attributes:
        table: after the block, a row for each group: `cores`, the processor time over the clock's, and `MB`, the
            resident memory at the end. Shared pages count in each process. A process that ended meanwhile counts
            with nothing.
    """

    def __init__(self, groups: Mapping[str, Iterable[int]]) -> None:
        self._groups = {name: list(ids) for name, ids in groups.items()}
        self.table = pd.DataFrame()

    def __enter__(self) -> Usage:
        self._before = {name: _seconds(ids) for name, ids in self._groups.items()}
        self._begin = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lasted = time.perf_counter() - self._begin
        rows = {}
        for name, ids in self._groups.items():
            before, after = self._before[name], _seconds(ids)
            used = sum(seconds - before.get(process, 0.0) for process, seconds in after.items())
            rows[name] = {"cores": used / lasted, "MB": sum(_memory(process) for process in after) / 1e6}
        self.table = pd.DataFrame.from_dict(rows, orient="index")


def _seconds(ids: Iterable[int]) -> dict[psutil.Process, float]:
    """Processor seconds of the processes and of all below them."""
    found = {}
    for number in ids:
        try:
            first = psutil.Process(number)
            family = [first] if number == os.getpid() else [first, *first.children(recursive=True)]
        except psutil.Error:
            continue
        for process in family:
            try:
                times = process.cpu_times()
            except psutil.Error:  # it has just ended
                continue
            found[process] = times.user + times.system
    return found


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
