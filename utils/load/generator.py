"""The generator: arrivals, and a coroutine for each of them."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from utils.errors import CourseError

OK = "ok"
WRONG = "wrong answer"
TIMEOUT = "timeout"
LIMIT = 100_000  # requests of one load; each is a task and a record in memory
BAR = "{desc}: {n_fmt} of {total_fmt} sent{postfix}, {elapsed_s:.1f} s"


class LoadError(CourseError):
    """A load that cannot be made as asked."""


@dataclass(frozen=True)
class Request:
    """One request; all times in seconds since the load began.

    Attributes:
        number: its place in the schedule, from 0.
        scheduled: when it was due.
        started: when it was sent; later than `scheduled` only if the generator itself was late.
        ended: when its outcome was known.
        outcome: OK, WRONG, TIMEOUT, or another word for what went wrong.
    """

    number: int
    scheduled: float
    started: float
    ended: float
    outcome: str

    @property
    def latency(self) -> float:
        """Seconds from when it was due to its outcome."""
        return self.ended - self.scheduled


Send = Callable[[int], Awaitable[str]]
Enough = Callable[[Sequence[Request]], bool]


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Arrivals that know nothing of each other: a Poisson process; the same times for the same seed.

    Their number is fixed to `rate` times `seconds`, so that also a short load offers what it says; given its number of
    arrivals, a Poisson process spreads them uniformly.

    Args:
        rate: requests per second.
        seconds: all times are below.

    Raises:
        LoadError: there would be no request, or too many.
    """
    number = round(rate * seconds)
    if not 1 <= number <= LIMIT:
        raise LoadError(f"{rate:g} requests a second for {seconds:g} seconds are {number}; 1 to {LIMIT} are possible.")
    return sorted(float(time) for time in np.random.default_rng(seed).uniform(0, seconds, number))


async def open_loop(
    send: Send,
    arrivals: Sequence[float],
    *,
    timeout: float = 30.0,
    enough: Enough | None = None,
    title: str = "load",
    progress: bool = True,
) -> list[Request]:
    """Send a request at each arrival, wait for all outcomes, and return them in the order of the schedule.

    Args:
        send: sends the request of this number and returns OK or another outcome. What it raises is an outcome too, by
            the name of the error's class; a CourseError and the cancellation end the load.
        arrivals: seconds from the beginning at which requests are due, in order.
        timeout: seconds that one request may take, counted from when it was sent.
        enough: asked before each request with those that have ended, the last one last; once it says yes, no more
            are sent.
        title: what the progress display calls the load.
        progress: show how many were sent, wait and failed; the last state stays.
    """
    begin = time.perf_counter()
    done: list[Request] = []

    async def one(number: int, scheduled: float) -> None:
        started = time.perf_counter() - begin
        try:
            async with asyncio.timeout(timeout):
                outcome = await send(number)
        except TimeoutError:
            outcome = TIMEOUT
        except CourseError:
            raise
        except Exception as error:
            outcome = type(error).__name__
        done.append(Request(number, scheduled, started, time.perf_counter() - begin, outcome))

    # On standard output, because a notebook shows standard error in red.
    with tqdm(total=len(arrivals), desc=title, bar_format=BAR, file=sys.stdout, disable=not progress) as bar:
        showing = asyncio.create_task(_show(bar, done))
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, scheduled in enumerate(arrivals):
                    await asyncio.sleep(scheduled - (time.perf_counter() - begin))
                    if enough is not None and enough(done):
                        break
                    tasks.create_task(one(number, scheduled))
                    bar.update()
        except* CourseError as several:
            raise several.exceptions[0] from None
        finally:
            showing.cancel()
            bar.total = bar.n
            _set_state(bar, done)
    return sorted(done, key=lambda request: request.number)


async def _show(bar: tqdm[NoReturn], done: Sequence[Request]) -> None:
    while True:
        _set_state(bar, done)
        await asyncio.sleep(0.5)


def _set_state(bar: tqdm[NoReturn], done: Sequence[Request]) -> None:
    failed = sum(request.outcome != OK for request in done)
    bar.set_postfix_str(f"{bar.n - len(done)} waiting, {failed} failed")
