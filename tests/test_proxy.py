"""The load balancer: a real Caddy in front of small servers that answer with their name, fail, or are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from waiting import wait_for

from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.processes import free_ports
from utils.proxy import Balancer, ProxyError, balancer, caddy_program

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pip has no Caddy for Windows")
TRY_OTHERS = "lb_policy round_robin\nlb_try_duration 5s\nlb_try_interval 50ms"


class Upstream:
    """A server that answers GET with its name, and /ready with 200 or 503."""

    def __init__(self, name: str) -> None:
        self.ready = True
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(503 if self.path == "/ready" and not upstream.ready else 200)
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def two() -> Iterator[tuple[Upstream, Upstream]]:
    both = Upstream("one"), Upstream("two")
    yield both
    for upstream in both:
        upstream.stop()


def ask(front: Balancer, times: int = 10) -> list[str]:
    """What comes back: the name of the server, or the status if it is not 200."""
    with httpx.Client(base_url=front.url, timeout=30, trust_env=False) as client:
        answers = [client.get("/") for _ in range(times)]
    return [answer.text if answer.status_code == 200 else str(answer.status_code) for answer in answers]


def caddy_of(front: Balancer) -> psutil.Process:
    (child,) = psutil.Process(front.process.pid).children()
    return child


def test_servers_take_turns(two: tuple[Upstream, Upstream], tmp_path: Path) -> None:
    addresses = [two[0].address, f"http://{two[1].address}"]
    with balancer(tmp_path / "front", addresses, "lb_policy round_robin") as front:
        assert sorted(ask(front)) == ["one"] * 5 + ["two"] * 5
        assert {one["address"] for one in front.upstreams()} == {upstream.address for upstream in two}
        assert "lb_policy round_robin" in front.config


def test_without_further_tries_a_server_that_is_gone_costs_answers(tmp_path: Path, two: tuple[Upstream, ...]) -> None:
    (nobody,) = free_ports(1)
    upstreams = [two[0].address, f"127.0.0.1:{nobody}"]
    with balancer(tmp_path, upstreams, "lb_policy round_robin") as front:
        assert ask(front).count("502") == 5
        front.configure(upstreams, TRY_OTHERS)
        assert ask(front) == ["one"] * 10


def test_a_server_that_is_not_ready_gets_nothing(tmp_path: Path, two: tuple[Upstream, Upstream]) -> None:
    options = "lb_policy round_robin\nhealth_uri /ready\nhealth_interval 100ms"
    with balancer(tmp_path, [one.address for one in two], options) as front:
        assert set(ask(front)) == {"one", "two"}
        two[1].ready = False
        assert wait_for(lambda: set(ask(front)) == {"one"})
        two[1].ready = True
        assert wait_for(lambda: set(ask(front)) == {"one", "two"})


def test_the_servers_change_while_it_runs(tmp_path: Path, two: tuple[Upstream, Upstream]) -> None:
    with balancer(tmp_path, [two[0].address]) as front:
        before = caddy_of(front)
        assert set(ask(front)) == {"one"}
        front.configure([two[1].address], "lb_policy first")
        assert set(ask(front)) == {"two"}
        assert caddy_of(front) == before, "the same process, at the same address"


def test_wrong_options_are_one_sentence_and_change_nothing(tmp_path: Path, two: tuple[Upstream, Upstream]) -> None:
    with balancer(tmp_path, [two[0].address]) as front:
        before = front.config
        with pytest.raises(ProxyError, match="no_such_policy"):
            front.configure([two[1].address], "lb_policy no_such_policy")
        with pytest.raises(ProxyError, match="missing closing"):
            front.configure([two[1].address], 'health_uri /\nhealth_body "(("')  # Caddyfile is right, the value is not
        assert front.config == before and set(ask(front)) == {"one"}
    with pytest.raises(ProxyError, match="^Caddy refuses these options: .*no_such_option"):
        Balancer(tmp_path / "other", [two[0].address], "no_such_option")
    with pytest.raises(ProxyError, match="name one server or more"):
        Balancer(tmp_path / "none", [], "")
    assert issubclass(ProxyError, CourseError)


def test_it_listens_on_loopback_only_and_ends_with_the_block(tmp_path: Path, two: tuple[Upstream, Upstream]) -> None:
    with balancer(tmp_path, [two[0].address]) as front:
        caddy = caddy_of(front)
        listening = [one for one in caddy.net_connections() if one.status == psutil.CONN_LISTEN]
        assert len(listening) == 2 and {one.laddr.ip for one in listening} == {"127.0.0.1"}
    assert not caddy.is_running() and not front.process.running
    assert {path.name for path in tmp_path.iterdir()} <= {"Caddyfile", "caddy.log", "caddy"}


def test_it_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; import psutil; from utils.proxy import Balancer\n"
        f"front = Balancer(Path({str(tmp_path)!r}), ['127.0.0.1:1'], '')\n"
        "print(*[one.pid for one in psutil.Process(front.process.pid).children()], front.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    owner = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    started = [int(number) for number in owner.stdout.split()]
    assert len(started) == 2, owner.stderr
    assert wait_for(lambda: not any(psutil.pid_exists(number) for number in started))


def test_a_caddy_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProxyError, match="python3 -m utils lab"):
        caddy_program()
    own = tmp_path / "caddy"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert caddy_program() == str(own)
