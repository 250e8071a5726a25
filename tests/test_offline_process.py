"""The offline server as a process: where it listens, what it writes, and that it ends with its owner.

All of it holds for both engines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from waiting import gone, wait_for

from utils import local_models
from utils.bootstrap import ROOT
from utils.offline import OfflineServer
from utils.processes import ServerError

pytestmark = pytest.mark.model_server
unix = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups as on Unix")
# A program that starts a server (with the model file that it is given, if any), tells its process id and address, and
# does what it is asked to.
OWNER = """
import sys, time
from pathlib import Path
from utils import offline
model = offline.LanguageModelFile(Path(sys.argv[2])) if sys.argv[2:] else None
server = offline.start(Path(sys.argv[1]), model=model)
print(server.process.pid, server.base_url, flush=True)
what = sys.stdin.readline().strip()
if what == "raise":
    raise RuntimeError("owner failed")
if what == "sleep":
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.readline()
"""


def answers(base_url: str) -> bool:
    try:
        url = f"{base_url.removesuffix('/v1')}/health"
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


Start = Callable[..., OfflineServer]


class Owner:
    """A running OWNER with its server."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=sys.platform != "win32",
        )
        assert self.process.stdout
        pid, self.base_url = self.process.stdout.readline().split()
        self.server = psutil.Process(int(pid))

    def tell(self, what: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()


@pytest.fixture
def owner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Owner]:
    """The owner of a server with the engine under test, which logs to `tmp_path`/server.log."""
    model = [str(local_models.find("small").path)] if request.config.getoption("--local-model") else []
    made = Owner(str(tmp_path / "server.log"), *model)
    yield made
    made.process.kill()
    made.process.communicate()


def test_it_listens_on_loopback_only(offline_server: OfflineServer) -> None:
    port = int(offline_server.base_url.rsplit(":", 1)[1].removesuffix("/v1"))
    connections = psutil.Process(offline_server.process.pid).net_connections("all" if os.name == "posix" else "inet")
    listening = {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}
    assert {host for host, _ in listening} == {"127.0.0.1"}
    others = [other for _, other in listening if other != port]
    assert len(others) == len(listening) - 1 == (0 if offline_server.speed is None else 1)
    for other in others:  # llama.cpp, which has a key of its own that nobody else is told
        for key in (offline_server.api_key, "none"):
            headers = {"Authorization": f"Bearer {key}"}
            url = f"http://127.0.0.1:{other}/v1/chat/completions"
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            assert httpx.post(url, json=body, headers=headers, trust_env=False).status_code == 401


def test_two_servers_at_once_and_each_has_its_own_key(
    offline_server: OfflineServer, start_server: Start, tmp_path: Path
) -> None:
    with start_server(tmp_path / "second.log") as second:
        assert second.base_url != offline_server.base_url and second.api_key != offline_server.api_key
        for server in (offline_server, second):
            with openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0) as client:
                assert len(list(client.models.list())) == 3
        with (
            openai.OpenAI(base_url=second.base_url, api_key=offline_server.api_key, max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
    assert not second.process.running and not answers(second.base_url)
    assert answers(offline_server.base_url)
    second.process.stop()  # a second time does nothing


def test_the_log_exists_and_no_output_holds_the_key(start_server: Start, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    with start_server(log) as server:
        for key in (server.api_key, "wrong"):
            httpx.get(f"{server.base_url}/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
        headers = {"Authorization": f"Bearer {server.api_key}"}
        bodies: list[dict[str, object]] = [{}, {"model": server.model, "messages": [{"role": "user", "content": "x"}]}]
        for body in bodies:
            body |= {"max_tokens": 3}
            httpx.post(f"{server.base_url}/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)
        assert log.exists() and server.api_key not in log.read_text()
        assert server.api_key not in repr(server)
        assert not any(server.api_key in part for part in psutil.Process(server.process.pid).cmdline())
    assert log.read_text() == "", "a run without trouble writes nothing, neither when it ends"


def test_a_server_that_cannot_start_is_one_error(
    start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "uvicorn.py").write_text("raise ImportError('uvicorn is broken here')")
    with pytest.raises(ServerError, match="(?s)The offline model server ended while starting.*uvicorn is broken here"):
        start_server(tmp_path / "server.log")


@pytest.mark.parametrize("end", ["return", "raise"])
def test_it_ends_when_its_owner_ends(owner: Owner, end: str) -> None:
    assert answers(owner.base_url)
    owner.tell(end)
    _, errors = owner.process.communicate(timeout=120)
    assert (owner.process.returncode, "owner failed" in errors) == ((1, True) if end == "raise" else (0, False))
    assert wait_for(lambda: gone(owner.server)) and not answers(owner.base_url)


def test_it_ends_when_its_owner_is_killed(owner: Owner, tmp_path: Path) -> None:
    assert answers(owner.base_url)
    owner.process.kill()
    # On Unix the owner is a zombie until the fixture collects its end.
    assert wait_for(lambda: gone(owner.server)) and not answers(owner.base_url)
    assert (tmp_path / "server.log").read_text() == ""


@unix
def test_an_interrupt_of_the_owners_group_does_not_reach_it(owner: Owner) -> None:
    owner.tell("sleep")
    # Until it sleeps, an interrupt would end the owner.
    assert wait_for(lambda: psutil.Process(owner.process.pid).status() == psutil.STATUS_SLEEPING)
    time.sleep(0.2)
    os.killpg(owner.process.pid, signal.SIGINT)
    assert owner.process.stdout and owner.process.stdout.readline() == "interrupted\n"
    assert not gone(owner.server) and answers(owner.base_url)
    owner.tell("end")
    owner.process.communicate(timeout=120)
    assert wait_for(lambda: gone(owner.server))
