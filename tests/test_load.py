"""The load generator, its figures, and what processes use: open arrivals, latency from when a request was due."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_for

from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.load import OK, TIMEOUT, WRONG, Request, Usage, open_loop, outage, poisson, summary, timeline
from utils.load.generator import LoadError, Send
from utils.load.limit import CpuLimit

BUSY = "while True: pass"


def run(send: Send, arrivals: list[float], **options: Any) -> list[Request]:
    return asyncio.run(open_loop(send, arrivals, progress=False, **options))


def request(scheduled: float, latency: float = 0.1, outcome: str = OK, late: float = 0.0) -> Request:
    return Request(0, scheduled, scheduled + late, scheduled + latency, outcome)


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    yield process
    process.kill()
    process.wait()


@settings(deadline=None)
@given(st.floats(1, 50), st.floats(1, 20), st.integers(0, 9))
def test_arrivals_are_as_many_as_asked_for_and_in_order(rate: float, seconds: float, seed: int) -> None:
    times = poisson(rate, seconds, seed)
    assert len(times) == round(rate * seconds)
    assert times == sorted(times) and times[0] >= 0 and times[-1] < seconds
    assert times == poisson(rate, seconds, seed)


def test_arrivals_know_nothing_of_each_other() -> None:
    """In a Poisson process gaps are as long as their own standard deviation; evenly spaced ones have none."""
    times = poisson(100, 50)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.1)
    assert times != poisson(100, 50, seed=1)


@pytest.mark.parametrize(("rate", "seconds"), [(0, 5), (5, 0), (-1, 5), (0.01, 1), (1e6, 10)])
def test_a_load_of_nothing_or_of_too_much_is_one_sentence(rate: float, seconds: float) -> None:
    with pytest.raises(LoadError, match="1 to 100000 are possible"):
        poisson(rate, seconds)
    assert issubclass(LoadError, CourseError)


def test_a_request_does_not_wait_for_the_answers_before_it() -> None:
    all_sent = asyncio.Event()

    async def send(number: int) -> str:
        if number == 19:
            all_sent.set()
        await all_sent.wait()  # a closed loop of fewer than 20 users would wait for ever
        return OK

    requests = run(send, [0.001 * number for number in range(20)], timeout=20)
    assert [one.number for one in requests] == list(range(20))
    assert {one.outcome for one in requests} == {OK}


def test_latency_counts_from_when_the_request_was_due() -> None:
    async def send(number: int) -> str:
        if number == 0:
            time.sleep(0.3)  # the generator itself cannot go on
        return OK

    first, second = run(send, [0.0, 0.05])
    assert second.started >= 0.3 and second.latency >= 0.25
    assert second.ended - second.started < second.latency, "what a closed generator would have called the latency"
    assert summary([first, second], 0, 1)["late ms"] >= 250


def test_outcomes_are_words_and_errors_are_outcomes() -> None:
    async def send(number: int) -> str:
        if number == 0:
            return WRONG
        if number == 1:
            raise ConnectionResetError
        await asyncio.sleep(60 if number == 2 else 0)
        return OK

    found = run(send, [0.0] * 4, timeout=0.2)
    assert [one.outcome for one in found] == [WRONG, "ConnectionResetError", TIMEOUT, OK]


def test_an_error_of_the_course_ends_the_load() -> None:
    ended = []

    async def send(number: int) -> str:
        if number == 1:
            raise CourseError("The server is not there.")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(number)
        return OK

    with pytest.raises(CourseError, match="^The server is not there.$"):
        run(send, [0.0, 0.01, 30.0])
    assert ended == [0], "what was on its way is cancelled, what was not due is not sent"


def test_an_interrupt_ends_the_load() -> None:
    async def send(number: int) -> str:
        await asyncio.sleep(60)
        return OK

    async def interrupted() -> None:
        load = asyncio.create_task(open_loop(send, [0.0, 50.0], progress=False))
        await asyncio.sleep(0.05)
        load.cancel()
        await load

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())


def test_a_load_ends_when_it_is_enough() -> None:
    seen = []

    async def send(number: int) -> str:
        return OK

    def enough(done: Sequence[Request]) -> bool:
        seen.append(len(done))
        return len(done) >= 3

    requests = run(send, [0.02 * number for number in range(100)], enough=enough)
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] >= 3
    assert len(requests) == len(seen) - 1 < 100, "asked before each, and the one that was enough was not sent"


def test_the_progress_display_ends_with_what_was_met(capsys: pytest.CaptureFixture[str]) -> None:
    async def send(number: int) -> str:
        return OK if number else "502"

    asyncio.run(open_loop(send, [0.0, 0.1, 0.2], title="three"))
    shown, errors = capsys.readouterr()
    assert not errors and shown.count("\n") == 1, "one line, written again and again"
    assert re.fullmatch(r"three: 3 of 3 sent, 0 waiting, 1 failed, \d+\.\d s\n", shown.rpartition("\r")[2])
    asyncio.run(open_loop(send, [0.0, 0.1, 5.0], title="two", enough=lambda done: len(done) == 2))
    assert "\rtwo: 2 of 2 sent, 0 waiting" in capsys.readouterr().out


def test_the_figures_of_a_load() -> None:
    answered = [request(1 + number / 10, latency=(number + 1) / 10) for number in range(10)]  # due in second 1
    others = [request(0.5, 0.1), request(0.9, 0.2), request(1.5, 9, TIMEOUT), request(1.6, 0.1, WRONG, late=0.05)]
    found = summary([*answered, *others], 1, 2)
    assert found["offered"] == 12
    assert found["throughput"] == 6, "1.1, 1.3, 1.5, 1.7, 1.9 and the one due before"
    assert found["p50 ms"] == pytest.approx(550) and found["p95 ms"] == pytest.approx(955)
    assert found["failed %"] == pytest.approx(100 * 2 / 12)
    assert found["late ms"] == pytest.approx(50)


def test_the_figures_of_a_load_without_answers() -> None:
    found = summary([request(0.5, 1, TIMEOUT)], 0, 1)
    assert found["throughput"] == 0 and found["failed %"] == 100 and found["p50 ms"] != found["p50 ms"]
    assert summary([], 0, 1)["offered"] == 0


def test_a_time_line_has_a_row_for_each_half_second() -> None:
    line = timeline([request(0.1, 0.2), request(0.4, 0.4), request(0.6, 0.1, "502"), request(1.9)])
    assert line.index.tolist() == [0.0, 0.5, 1.5]
    assert line["answered"].tolist() == [2, 0, 1] and line["failed"].tolist() == [0, 1, 0]
    assert line["p50 ms"].round().tolist() == [400, 100, 100], "of two the higher"


def steady(seconds: int, **changed: Request) -> list[Request]:
    """Ten requests a second, some of them replaced; the keys are t followed by the tenth of a second."""
    return [changed.get(f"t{tenth}", request(tenth / 10)) for tenth in range(10 * seconds)]


@pytest.mark.parametrize(
    ("requests", "seconds"),
    [
        (steady(10), 0.0),
        (steady(10, t40=request(4.0, outcome="502")), 0.5),  # the bin in which it broke
        (steady(10, t38=request(3.8, outcome="502")), 0.0),  # was in flight, and nobody after it noticed
        (steady(10, t41=request(4.1, outcome="502"), t62=request(6.2, outcome="502")), 2.5),
        (steady(10, t12=request(1.2, 5.0)), 0.0),  # before it broke
        (steady(10, **{f"t{t}": request(t / 10, 2.0) for t in range(50, 60)}), 2.0),  # nothing failed, but all wait
        (steady(10, t70=request(7.0, 2.0)), 0.0),  # one that is slow is no outage
        ([request(t / 4, 2.0 if 20 < t < 40 and t % 2 else 0.1) for t in range(60)], 6.0),  # one server of two hangs
        (steady(10, t97=request(9.7, outcome="502")), None),
    ],
)
def test_an_outage_lasts_until_service_is_as_usual(requests: list[Request], seconds: float | None) -> None:
    assert outage(requests, at=4.0) == seconds


def test_an_outage_needs_to_know_what_is_usual() -> None:
    with pytest.raises(LoadError, match="break it later"):
        outage(steady(2), at=0.5)


def test_usage_tells_the_busy_process_from_this_one(busy: subprocess.Popen[bytes]) -> None:
    with Usage({"this": [os.getpid()], "busy": [busy.pid]}) as usage:
        child = psutil.Process(busy.pid)
        start = child.cpu_times().user
        assert wait_for(lambda: child.cpu_times().user > start + 0.3)
    cores = usage.table["cores"]
    assert cores["busy"] > cores["this"] >= 0, "the children of this process are the servers, and are not counted"
    assert usage.table["MB"].between(2, 4000).all()


def test_usage_counts_the_children_of_a_server() -> None:
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BUSY!r}]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code])
    process = psutil.Process(parent.pid)
    try:
        assert wait_for(process.children)
        (child,) = process.children()
        with Usage({"both": [parent.pid]}) as usage:
            start = child.cpu_times().user
            assert wait_for(lambda: child.cpu_times().user > start + 0.2)
        assert usage.table["cores"]["both"] > 0
    finally:
        for one in [*process.children(), process]:
            one.kill()
        parent.wait()


def test_usage_of_a_process_that_ends_is_nothing(busy: subprocess.Popen[bytes]) -> None:
    with Usage({"busy": [busy.pid]}) as usage:
        busy.kill()
        busy.wait()
    assert usage.table.to_dict("index") == {"busy": {"cores": 0, "MB": 0}}


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_limited_process_gets_its_share_and_is_free_again(busy: subprocess.Popen[bytes]) -> None:
    process = psutil.Process(busy.pid)
    with CpuLimit(0.2) as limit:
        start, before = time.monotonic(), process.cpu_times().user
        limit.add(busy.pid)
        assert wait_for(lambda: process.status() == psutil.STATUS_STOPPED), "its share is used up"
        assert wait_for(lambda: process.status() != psutil.STATUS_STOPPED), "and it goes on"
        time.sleep(1.5)
        used, lasted = process.cpu_times().user - before, time.monotonic() - start
        # What it may use before the first look comes on top; on a busy machine the looks are far apart.
        assert used < 0.2 * lasted + 0.3
    end = process.cpu_times().user
    assert wait_for(lambda: process.cpu_times().user > end + 0.2)


LEFT = """
import sys, psutil
from utils.load.limit import CpuLimit
process = psutil.Process(int(sys.argv[1]))
limit = CpuLimit(0.01).__enter__()
limit.add(process.pid)
while process.status() != psutil.STATUS_STOPPED:
    pass
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("way", ["an error", "the end of the program", "a fault in the limit itself"])
def test_every_way_out_lets_it_run_again(
    busy: subprocess.Popen[bytes], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = psutil.Process(busy.pid)
    if way == "the end of the program":
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", LEFT, str(busy.pid)], env=environment, check=True, timeout=300)
    elif way == "an error":
        with pytest.raises(KeyboardInterrupt), CpuLimit(0.01) as limit:
            limit.add(busy.pid)
            assert wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
            raise KeyboardInterrupt
    else:
        monkeypatch.setattr("threading.excepthook", lambda arguments: None)
        with CpuLimit(0.01) as limit:
            limit.add(busy.pid)
            assert wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
            monkeypatch.setattr("utils.load.limit._used", lambda process: 1 / 0)
            assert wait_for(lambda: not limit._thread.is_alive())
    used = process.cpu_times().user
    assert wait_for(lambda: process.cpu_times().user > used + 0.2)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_limited_process_may_end(busy: subprocess.Popen[bytes]) -> None:
    with CpuLimit(0.1) as limit:
        limit.add(busy.pid)
        busy.kill()
        busy.wait()
        assert wait_for(lambda: not limit._processes)
