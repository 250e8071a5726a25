"""What tests of processes wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import httpx
import psutil

MANY = 4  # answers of a service that waits for something: more than it could give between two waits that hold it up


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


def named(processes: Iterable[psutil.Process], word: str) -> list[psutil.Process]:
    """Those whose command line holds the word and that have not ended meanwhile."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # also a zombie
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


async def answered_meanwhile(url: str, posts: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[int], int]:
    """Send all requests at once; their status codes, and how often /health answered before the first of them did.

    A service that waits for them on its event loop answers nobody else meanwhile.
    """
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as api:
        waiting = [asyncio.create_task(api.post(path, **options)) for path, options in posts]
        others = 0
        while not any(task.done() for task in waiting):
            assert (await api.get("/health")).status_code == 200
            others += not any(task.done() for task in waiting)
            await asyncio.sleep(0.05)
        return [answer.status_code for answer in await asyncio.gather(*waiting)], others
