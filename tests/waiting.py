"""What tests of processes wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def wait_for(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Whether the condition holds within so many seconds; they are many, since other tests may keep all cores busy."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def gone(process: psutil.Process) -> bool:
    """Whether the process ended; where nobody has collected its end yet it is a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
