"""Servers as child processes, with real processes: how they start, fail, end, and notice that their owner is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import wait_for

from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.processes import ServerError, ServerProcess, is_alive, owner_mark

SLEEP = "import time; time.sleep(60)"


def server(folder: Path, code: str, **environment: str) -> ServerProcess:
    return ServerProcess("test server", [sys.executable, "-c", code], folder / "logs" / "server.log", environment)


def mark_of(pid: int) -> str:
    return f"{pid}:{psutil.Process(pid).create_time()}"


def test_a_server_gets_its_variables_a_log_and_the_repository_as_folder(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['EXTRA'], os.getcwd()); print('grün', file=sys.stderr)"
    with server(tmp_path, code, EXTRA="given") as process:
        assert wait_for(lambda: not process.running)
        # Two streams into one file: only their own lines are in order.
        assert sorted(process.log_file.read_text(encoding="utf-8").splitlines()) == [f"given {ROOT}", "grün"]


def test_it_is_ready_when_the_check_says_so(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with server(tmp_path, f"open({str(ready)!r}, 'w').close(); {SLEEP}") as process:
        process.wait_until(ready.exists, 60)
        assert process.running and psutil.pid_exists(process.pid)
    assert not process.running, "leaving the context ends the server"


def test_the_tail_of_the_log(tmp_path: Path) -> None:
    with server(
        tmp_path, "import sys; sys.stdout.buffer.write(b'\\xff bad\\n')\nfor i in range(9): print('line', i)"
    ) as process:
        assert wait_for(lambda: not process.running)
        assert process.log_tail(2) == "line 7\nline 8"
        assert process.log_tail().splitlines() == [f"line {i}" for i in range(4, 9)]
        assert process.log_tail(99).startswith("\ufffd bad")
    with server(tmp_path, SLEEP) as process:
        assert process.log_tail() == "(the log is empty)"


def test_a_server_that_ends_while_starting_is_an_error_with_its_log(tmp_path: Path) -> None:
    process = server(tmp_path, "print('the port is taken'); raise SystemExit(3)")
    with pytest.raises(ServerError) as error:
        process.wait_until(lambda: False, 20)
    assert str(error.value) == "The test server ended while starting. Its log ends with: the port is taken"
    assert isinstance(error.value, CourseError)


def test_a_server_that_never_answers_is_stopped(tmp_path: Path) -> None:
    process = server(tmp_path, f"print('loading', flush=True); {SLEEP}")
    assert wait_for(lambda: process.log_tail() == "loading")
    with pytest.raises(
        ServerError, match="The test server did not answer within 0 seconds. Its log ends with: loading"
    ):
        process.wait_until(lambda: False, 0.05)
    assert not process.running and not psutil.pid_exists(process.pid)


def test_a_program_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"^The test server cannot be started \(.+\): .*no-program$"):
        ServerProcess("test server", [str(tmp_path / "no-program")], tmp_path / "log")


def test_stop_may_be_called_again_and_after_the_end(tmp_path: Path) -> None:
    process = server(tmp_path, SLEEP)
    process.stop()
    process.stop()
    assert not process.running
    ended = server(tmp_path, "")
    assert wait_for(lambda: not ended.running)
    ended.stop()
    assert not ended.running


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_server_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True)); print('up', flush=True); "
    process = server(tmp_path, code + SLEEP)
    assert wait_for(lambda: process.log_tail() == "up")
    process.stop(timeout=0.3)
    assert not process.running
    assert process.log_tail() == "up\nno", "it was asked before it was killed"
    assert process._process.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="POSIX process groups")
def test_an_interrupt_of_the_notebook_does_not_reach_the_server(tmp_path: Path) -> None:
    with server(tmp_path, SLEEP) as process:
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0)


def test_a_server_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from utils.processes import ServerProcess\n"
        f"print(ServerProcess('s', [sys.executable, '-c', {SLEEP!r}], Path({str(tmp_path / 'log')!r})).pid)"
    )
    owner = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert owner.returncode == 0, owner.stderr
    assert not psutil.pid_exists(int(owner.stdout))


def test_this_process_is_alive_and_one_with_its_reused_id_is_not() -> None:
    assert is_alive(owner_mark())
    pid, _, started = owner_mark().partition(":")
    assert not is_alive(f"{pid}:{float(started) - 60}")


def test_an_ended_process_and_a_zombie_are_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEP])
    mark = mark_of(process.pid)
    assert is_alive(mark)
    process.kill()
    assert wait_for(lambda: not is_alive(mark)), "killed, but nobody has fetched its exit code: a zombie"
    if os.name == "posix":
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.wait()
    assert not is_alive(mark)


@settings(deadline=None)
@given(st.text(max_size=20) | st.builds("{}:{}".format, st.integers(), st.floats()))
def test_a_text_that_is_not_a_mark_is_nobody(text: str) -> None:
    assert not is_alive(text)


def test_end_with_owner_stops_the_server_and_leaves_even_if_that_hangs(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", SLEEP])
    code = """
import sys, threading
from pathlib import Path
from utils.processes import end_with_owner
asked = threading.Event()
def stop():
    Path({file!r}).write_text("asked")
    {stop}
end_with_owner({mark!r}, stop, 0.05)
print("up", flush=True)
asked.wait(60)
"""
    servers, files = [], []
    for number, does in enumerate(("asked.set()", "pass")):
        files.append(tmp_path / f"asked{number}")
        program = code.format(file=str(files[-1]), stop=does, mark=mark_of(owner.pid))
        servers.append(ServerProcess("watcher", [sys.executable, "-c", program], tmp_path / f"log{number}"))
    willing, stubborn = servers
    for process in servers:
        process.wait_until(lambda process=process: process.log_tail() == "up", 20)  # type: ignore[misc]
    assert not any(file.exists() for file in files), "nothing happens while the owner lives"
    owner.kill()
    owner.wait()
    assert wait_for(lambda: not willing.running)
    assert wait_for(lambda: not stubborn.running)
    assert [file.read_text() for file in files] == ["asked", "asked"]
    assert stubborn._process.returncode == 0
