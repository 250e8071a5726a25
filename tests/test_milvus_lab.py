"""The Milvus lab, with real servers: start, crash, restart, a killed owner, query nodes, and what can fail."""

from __future__ import annotations

import asyncio
import lzma
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
import yaml
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from utils.bootstrap import ROOT
from utils.milvus_lab import cluster, lite_server, programs, servers, standalone
from utils.milvus_lab.broker import BATCH_HEADER, LabBroker, Topic
from utils.milvus_lab.command import milvus_command
from utils.milvus_lab.programs import LabError
from utils.processes import free_ports

if TYPE_CHECKING:
    from utils.milvus_lab.distributed import Cluster
    from utils.milvus_lab.lab import Lab
    from utils.milvus_lab.lite import LiteServer
    from utils.milvus_lab.servers import ServerLab

linux_server = pytest.mark.skipif(sys.platform != "linux", reason="the server is for Linux")


def client_of(lab: Lab) -> MilvusClient:
    return MilvusClient(lab.uri, token=lab.token, timeout=30)


def make(client: MilvusClient, name: str, rows: int, dimension: int = 4) -> None:
    client.create_collection(name, dimension=dimension)
    insert(client, name, range(rows), dimension)


def insert(client: MilvusClient, name: str, numbers: range, dimension: int = 4) -> None:
    client.insert(name, [{"id": n, "vector": [float(n), *[1.0] * (dimension - 1)]} for n in numbers])


def count(client: MilvusClient, name: str) -> int:
    return int(client.query(name, output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"])


def listening(pid: int) -> set[str]:
    return {
        c.laddr.ip.removeprefix("::ffff:")
        for c in psutil.Process(pid).net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }


def processes_of(folder: Path) -> list[str]:
    """Names of the processes that have a folder of the lab in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            texts = [*process.cmdline(), process.environ().get("MILVUSCONF", "")]
            if process.status() != psutil.STATUS_ZOMBIE and any(text.startswith(str(folder)) for text in texts):
                found.append(process.name())
        except (psutil.Error, OSError):
            continue
    return sorted(found)


def start(folder: Path, port: int | None = None) -> None:
    with standalone(folder, port=port, progress=False):
        pass


# Standalone


def test_standalone_is_a_milvus_server_with_a_password_of_its_own(milvus_standalone: ServerLab) -> None:
    lab = milvus_standalone
    client = client_of(lab)
    assert client.get_server_version() == f"v{programs.milvus_version()}-lite", "so the package's build calls itself"
    for token in ("", "root:Milvus", lab.token + "x"):
        with pytest.raises(MilvusException, match="illegal connection params"):
            MilvusClient(lab.uri, token=token, timeout=5)
    assert stat.S_IMODE((lab.folder / "token").stat().st_mode) == 0o600
    assert client.list_collections() == [], "the readiness check leaves nothing behind"


def test_standalone_shows_its_processes_metrics_and_memory(milvus_standalone: ServerLab) -> None:
    lab = milvus_standalone
    assert list(lab.processes) == ["keeper", "etcd", "standalone"] == list(lab.memory())
    assert all(process.running for process in lab.processes.values())
    assert all(10_000_000 < size < 1_500_000_000 for size in lab.memory().values())
    assert list(lab.metrics) == ["standalone"]
    assert "milvus_proxy_req_count" in httpx.get(lab.metrics["standalone"], trust_env=False).text
    assert listening(lab.processes["etcd"].pid) == {"127.0.0.1"}
    lab.processes.clear()
    assert lab.processes, "what a caller does with the copy is the caller's business"


def test_settings_are_those_that_milvus_ships_except_for_what_the_lab_says(milvus_standalone: ServerLab) -> None:
    shipped = programs.shipped_settings()
    written = yaml.safe_load((milvus_standalone.folder / "configs" / "milvus.yaml").read_text())
    changed = {
        f"{section}.{name}"
        for section, values in written.items()
        for name, value in values.items()
        if value != shipped[section].get(name) and name not in ("ip", "port")
    }
    assert changed == {
        *(f"queryCoord.{name}" for name in servers.QUICK),
        *("common.security", "common.session", "etcd.endpoints", "etcd.use", "localStorage.path", "log.file"),
        *("proxy.internalPort", "queryNode.gracefulStopTimeout", "rocksmq.path"),
    }
    assert written["proxy"]["timeTickInterval"] == 200 and written["common"]["gracefulTime"] == 5000


def test_what_was_confirmed_survives_a_crash_and_the_client_finds_the_server_again(
    milvus_standalone: ServerLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, uri = milvus_standalone, milvus_standalone.uri
    client = client_of(lab)
    make(client, "crash", 50)
    lab.kill()
    lab.kill()  # twice does no harm
    assert list(lab.processes) == ["keeper", "etcd"]
    with pytest.raises(MilvusException):
        count(client, "crash")
    lab.restart()
    assert lab.uri == uri and "ready again at" in capsys.readouterr().out
    assert count(client, "crash") == 50, "loaded again, without a flush before the crash"
    client.drop_collection("crash")


@linux_server
def test_settings_reach_milvus_at_every_start(tmp_path: Path) -> None:
    before = dict(os.environ)
    with standalone(tmp_path, progress=False, settings={"proxy.maxNameLength": "30"}) as lab:
        for restarted in (False, True):
            if restarted:
                lab.restart()
            client = client_of(lab)
            client.create_collection("x" * 30, dimension=2)
            with pytest.raises(MilvusException, match="less than 30 characters"):
                client.create_collection("x" * 31, dimension=2)
            client.drop_collection("x" * 30)
            client.close()
    assert dict(os.environ) == before, "another server that this program starts has other settings"
    misspelt = standalone(tmp_path, progress=False, settings={"proxy.maxNameLengths": "30"})
    with pytest.raises(LabError, match=r"Milvus 2\.3\.5 has no setting 'proxy\.maxNameLengths'"), misspelt:
        pass


@pytest.fixture
def lost_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lets another program take a port between the search for it and its use, once; the list grows by one each time."""
    searches: list[int] = []
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()

        def search(number: int) -> list[int]:
            found = free_ports(number)
            if number == len(servers.PORTS):
                searches.append(number)
                found[0] = taken.getsockname()[1] if len(searches) == 1 else found[0]
            return found

        monkeypatch.setattr("utils.milvus_lab.servers.free_ports", search)
        yield searches


OWNER = """
import sys, time
from pathlib import Path
from pymilvus import MilvusClient
from utils.milvus_lab import standalone
with standalone(Path({folder!r}), progress=False) as lab:
    client = MilvusClient(lab.uri, token=lab.token)
    client.create_collection("kept", dimension=2)
    client.insert("kept", [{{"id": i, "vector": [1.0, 0.0]}} for i in range(30)])
    print(lab.token, flush=True)
    time.sleep(100)
"""


@linux_server
def test_nothing_survives_a_killed_owner_except_the_data(
    tmp_path: Path, milvus_standalone: ServerLab, lost_port: list[int]
) -> None:
    """Uses `milvus_standalone` so that two standalone servers run at the same time."""
    folder = tmp_path / "with a space" / "grün"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(folder=str(folder))], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    token = owner.stdout.readline().strip()
    assert len(processes_of(folder)) == 3, "the keeper, etcd and Milvus"
    with pytest.raises(LabError, match=f"is in use by process {owner.pid}, which runs a lab in it: stop that one"):
        start(folder)
    owner.kill()
    owner.wait()
    # Opened at once: it waits until the keeper of the killed owner has ended the rest.
    with standalone(folder, progress=False) as lab:
        assert len(processes_of(folder)) == 3, "only those of the new lab"
        assert lab.token == token
        assert count(client_of(lab), "kept") == 30, "never flushed, and loaded again by itself"
        assert len(lost_port) == 2, "a port that was free and then taken is replaced"
    assert processes_of(folder) == []
    assert client_of(milvus_standalone).list_collections() == [], "the other server never saw this data"


# Cluster


def test_cluster_runs_every_role_as_a_process(milvus_cluster: Cluster) -> None:
    lab = milvus_cluster
    roles = ["rootcoord", "datacoord", "querycoord", "datanode", "indexnode", "proxy", "querynode-1", "querynode-2"]
    assert list(lab.metrics) == roles
    assert list(lab.processes) == ["keeper", "etcd", *roles]
    pages = {role: httpx.get(url, trust_env=False).text for role, url in lab.metrics.items()}
    assert "milvus_proxy_req_count" in pages["proxy"] and "milvus_proxy_req_count" not in pages["datanode"]
    assert listening(lab.processes["keeper"].pid) == {"127.0.0.1"}, "the lab broker"


def test_query_nodes_come_and_go_and_every_row_stays(milvus_cluster: Cluster) -> None:
    lab = milvus_cluster
    client = client_of(lab)
    # In one burst more than librdkafka's mock broker would have kept.
    make(client, "burst", 0, dimension=512)
    for start in range(0, 6000, 2000):
        insert(client, "burst", range(start, start + 2000), dimension=512)
    assert count(client, "burst") == 6000

    assert lab.add_query_node() == "querynode-3"
    assert lab.query_nodes == ["querynode-1", "querynode-2", "querynode-3"]
    assert "milvus_querynode" in httpx.get(lab.metrics["querynode-3"], trust_env=False).text

    first = lab.processes["querynode-1"]
    assert lab.stop_query_node("querynode-1") == "querynode-1"
    assert not first.running and first.exit_code == 0, "it was asked, not killed"
    assert count(client, "burst") == 6000, "handed over: answers at once"

    newest = lab.processes["querynode-3"]
    assert lab.kill_query_node() == "querynode-3"
    assert newest.exit_code == -signal.SIGKILL
    assert lab.query_nodes == ["querynode-2"] and "querynode-3" not in lab.metrics
    with pytest.raises(LabError, match=r"There is no query node 'querynode-3'; the cluster has querynode-2\."):
        lab.stop_query_node("querynode-3")
    assert lab.add_query_node() == "querynode-4"
    lab.restart()
    assert count(client, "burst") == 6000, "also after a restart of all roles"
    client.drop_collection("burst")


def test_a_role_that_was_restarted_serves_at_the_same_address(milvus_cluster: Cluster) -> None:
    lab = milvus_cluster
    client = client_of(lab)
    make(client, "again", 20)
    before, places = lab.processes["proxy"], dict(lab.metrics)
    lab.restart_role("proxy", away=0.2)
    assert before.exit_code == -signal.SIGKILL and lab.processes["proxy"].running
    assert lab.metrics == places and list(lab.processes)[2:] == list(places)
    assert count(client, "again") == 20
    client.drop_collection("again")
    with pytest.raises(LabError, match=r"There is no role 'etcd'; the cluster has rootcoord, .*, querynode-"):
        lab.restart_role("etcd")


def test_a_cluster_starts_with_a_query_node(tmp_path: Path) -> None:
    wanted = cluster(tmp_path, query_nodes=0)
    with pytest.raises(LabError, match="query_nodes is 0; a cluster starts with 1 or more"), wanted:
        pass


# Milvus Lite as a server


def test_lite_server_serves_several_programs_and_restarts_with_its_data(milvus_lite_server: LiteServer) -> None:
    lab = milvus_lite_server
    assert lab.token == "" and lab.metrics == {} and list(lab.memory()) == ["lite"]
    assert listening(lab.processes["lite"].pid) == {"127.0.0.1"}
    make(client_of(lab), "shared", 20)
    other = f"from pymilvus import MilvusClient; print(MilvusClient({lab.uri!r}).query('shared', limit=50).__len__())"
    assert subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stdout.strip() == "20"
    uri = lab.uri
    lab.kill()
    assert lab.processes == {}
    lab.restart()
    assert lab.uri == uri
    client = client_of(lab)
    client.load_collection("shared")  # Lite forgets what was loaded
    assert count(client, "shared") == 20
    client.drop_collection("shared")


def test_two_lite_servers_cannot_share_a_folder(milvus_lite_server: LiteServer) -> None:
    second = lite_server(milvus_lite_server.folder, progress=False)
    with pytest.raises(LabError, match="is in use by another Milvus Lite: end it first"), second:
        pass
    assert client_of(milvus_lite_server).list_collections() == [], "the first one goes on"


# What can fail


@linux_server
def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(LabError, match=f"Port {port} is taken: name another one"):
            start(tmp_path, port=port)
    with pytest.raises(LabError, match="70000 is no port"):
        start(tmp_path, port=70000)


@linux_server
def test_a_part_that_does_not_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "standalone" / "etcd" / "member" / "wal" / "0000000000000000-0000000000000000.wal"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"garbage" * 100)
    with pytest.raises(LabError, match="token is missing, .* delete the folder"):
        start(tmp_path)
    (tmp_path / "token").write_text("root:something")
    with pytest.raises(LabError) as error:
        start(tmp_path)
    said = str(error.value)
    assert said.startswith("Milvus standalone did not start: etcd ended. Its log (")
    assert "wal: max entry size limit exceeded" in said
    assert said.splitlines()[-1].startswith("If its data is damaged, delete ")
    assert processes_of(tmp_path) == [], "what had started has ended"


@linux_server
def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match=r"file/lab cannot be written \(Not a directory\): name one that can"):
        start(tmp_path / "file" / "lab")
    with pytest.raises(LabError, match="is full: free 300 MB, then try again"):
        start(small_disk(50) / "lab")
    with pytest.raises(LabError, match="is full: free 260 MB, then try again"):
        programs.milvus_folder(small_disk(50))


def test_where_the_server_does_not_run_the_message_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", "linux")
        patch.setattr("platform.machine", lambda: "x86_64")
        patch.setattr(programs, "distribution", missing)
        with pytest.raises(LabError, match="The package milvus is missing: run python3 -m utils lab"):
            start(tmp_path)
    for system, machine in (("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")):
        monkeypatch.setattr("sys.platform", system)
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        with pytest.raises(LabError, match=r"Linux on x86-64 only: start one with Docker .* and set MILVUS_URI"):
            start(tmp_path)
    assert list(tmp_path.iterdir()) == []


@linux_server
def test_the_server_is_unpacked_once_even_by_two_labs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "milvus" / "data" / "bin"
    packed.mkdir(parents=True)
    (packed.parent / "glog.conf").write_text("")
    (packed / "milvus.lzma").write_bytes(lzma.compress(os.urandom(2_000_000)))
    (packed / "libresolv.so.2.lzma").write_bytes(lzma.compress(b"not wanted"))

    class Package:
        version = "1.0"
        locate_file = staticmethod(tmp_path.joinpath)

    monkeypatch.setattr(programs, "package", lambda name: Package)
    data = tmp_path / "data"
    (data / "milvus-server-1.0.draft").mkdir(parents=True)  # left by one that was killed
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(programs.milvus_folder, [data, data])
    assert first == second == data / "milvus-server-1.0"
    assert sorted(file.name for file in first.iterdir()) == ["glog.conf", "milvus"]
    assert os.access(first / "milvus", os.X_OK)
    assert sorted(file.name for file in data.iterdir()) == ["milvus-server-1.0", "milvus-server-1.0.lock"]
    before = (first / "milvus").stat().st_mtime_ns
    assert programs.milvus_folder(data) == first and (first / "milvus").stat().st_mtime_ns == before


# The lab broker; that Milvus can work with it is shown by the cluster


def batch(messages: int, payload: bytes) -> bytes:
    """A record batch as far as a broker looks into it."""
    body = struct.pack(">iBIhi", 0, 2, 0, 0, messages - 1).ljust(BATCH_HEADER - 12, b"\0") + payload
    return struct.pack(">qi", 0, len(body)) + body


@pytest.fixture
def topic_file(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "topic.log"


def test_a_topic_numbers_its_messages_and_gives_whole_batches(topic_file: Path) -> None:
    topic = Topic(topic_file)
    assert topic.append(batch(3, b"a" * 10) + batch(2, b"b" * 20)) == 0
    assert topic.append(batch(1, b"c" * 30)) == 5
    assert topic.end == 6

    def starts(data: bytes) -> list[int]:
        found, at = [], 0
        while at < len(data):
            first, length = struct.unpack_from(">qi", data, at)
            found.append(first)
            at += 12 + length
        assert at == len(data), "no half batch"
        return found

    everything = 10**6
    assert starts(topic.read(0, everything)) == [0, 3, 5]
    assert starts(topic.read(2, everything)) == [0, 3, 5], "the batch that holds the message"
    assert starts(topic.read(3, everything)) == [3, 5]
    assert starts(topic.read(0, 1)) == [0], "one batch in any case"
    assert starts(topic.read(0, BATCH_HEADER * 2 + 40)) == [0, 3]
    assert topic.read(6, everything) == b""


def test_a_topic_is_read_again_up_to_its_last_whole_batch(topic_file: Path) -> None:
    whole = Topic(topic_file)
    whole.append(batch(4, b"kept"))
    with topic_file.open("ab") as file:
        file.write(batch(1, b"x" * 500)[:-100])
    again = Topic(topic_file)
    assert again.end == 4
    assert again.append(batch(1, b"next")) == 4
    assert Topic(topic_file).read(0, 10**6) == topic_file.read_bytes()


def test_the_broker_hangs_up_on_what_it_does_not_speak(tmp_path: Path) -> None:
    async def ask(api: int, version: int) -> bytes:
        broker = LabBroker(tmp_path)
        await broker.start()
        host, _, port = broker.address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        request = struct.pack(">hhih", api, version, 7, -1)
        writer.write(struct.pack(">i", len(request)) + request)
        answer = await reader.read() if api != 18 else await reader.read(100)
        writer.close()
        return answer

    assert asyncio.run(ask(11, 0)) == b"", "JoinGroup"
    assert asyncio.run(ask(18, 9))[4:10] == struct.pack(">ih", 7, 35), "an unknown version of ApiVersions is answered"


# The command


def run_command(*arguments: str) -> subprocess.Popen[str]:
    code = "import sys; from utils.__main__ import parser, perform; sys.exit(perform(parser().parse_args(), []))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "milvus", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_the_command_says_how_to_use_the_server_and_ends_cleanly(tmp_path: Path) -> None:
    runs = {
        sign: run_command("lite", "--folder", str(tmp_path / sign.name)) for sign in (signal.SIGINT, signal.SIGTERM)
    }
    for sign, process in runs.items():
        assert process.stdout
        shown = ""
        while "Ctrl-C stops it." not in shown and (line := process.stdout.readline()):
            shown += line
        uri = next(line.split()[1] for line in shown.splitlines() if line.startswith("URI"))
        assert f"export MILVUS_URI={uri}\n" in shown and f"MilvusClient('{uri}')" in shown
        make(MilvusClient(uri), "mine", 1)
        process.send_signal(sign)
        rest, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        assert "Stopped. The data stays in" in rest
    assert processes_of(tmp_path) == []


def test_the_command_refuses_query_nodes_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="--query-nodes is for a cluster; lite has none"):
        milvus_command("lite", str(tmp_path), None, 2)
