"""A service as a process: what keeps it from starting, how it ends, what a crash leaves, and several workers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
from conftest import model_environment
from pymilvus import MilvusClient
from waiting import gone, named, wait_for

from utils import offline
from utils.bootstrap import ROOT
from utils.milvus_lab.distributed import Cluster
from utils.milvus_lab.lite import LiteServer
from utils.milvus_lab.servers import ServerLab
from utils.postgres import Postgres, postgres
from utils.processes import ServerError, free_ports
from utils.service import Service, service

APP = "utils.apps.knowledge_agent"
RUNS = "/agents/knowledge-assistant/runs"
QUESTION = "When does the canteen close on Fridays?"
CANTEEN = "# Canteen\n\nThe canteen closes at 14:30 on Fridays."
ANSWER = "The canteen closes at 14:30 on Fridays. [canteen.md]"
# One client, because making one takes 17 ms; no kept connections, because their services are killed.
HTTP = httpx.Client(timeout=60, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def get(found: Service, path: str, **params: str) -> Any:
    return HTTP.get(f"{found.url}{path}", params=params).json()


def upload(found: Service, name: str, text: str) -> str:
    answer = HTTP.post(f"{found.url}/knowledge/content", files={"file": (name, text)})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def status(found: Service, content_id: str) -> tuple[str, str]:
    answer = get(found, f"/knowledge/content/{content_id}/status")
    return answer.get("status", ""), answer.get("status_message", "")


def ask(found: Service, session_id: str, **fields: str) -> httpx.Response:
    form = {"message": QUESTION, "session_id": session_id, "stream": "false", **fields}
    return HTTP.post(f"{found.url}{RUNS}", data=form)


def stream(found: Service, session_id: str) -> list[str]:
    """The names of the events; the last is the name of the error if the connection broke."""
    events = []
    try:
        form = {"message": QUESTION, "session_id": session_id}
        with HTTP.stream("POST", f"{found.url}{RUNS}", data=form) as answer:
            events += [line[7:] for line in answer.iter_lines() if line.startswith("event: ")]
    except httpx.TransportError as error:
        events.append(type(error).__name__)
    return events


# --- what keeps it from starting ---


def environment_of(found: dict[str, str], **settings: str) -> dict[str, str]:
    return {**os.environ, "SERVICE_PORT": str(free_ports(1)[0]), **found, **settings}


@pytest.fixture(scope="module")
def refusals(
    tmp_path_factory: pytest.TempPathFactory, offline_environment: dict[str, str], milvus_standalone: ServerLab
) -> Iterator[dict[str, subprocess.CompletedProcess[str]]]:
    """How each start ended that cannot succeed; they run side by side, because each takes seconds of imports."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "file").touch()
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    with (
        service(folder / "holder", offline_environment, progress=False) as holder,
        postgres(folder / "postgres", progress=False) as database,
    ):
        host = database.url.partition("@")[2]
        cases: dict[str, dict[str, str]] = {
            "port": {"SERVICE_PORT": holder.url.rpartition(":")[2]},
            "milvus": {"MILVUS_URI": dead, "MILVUS_TIMEOUT": "1"},
            "milvus token": {"MILVUS_URI": milvus_standalone.uri, "MILVUS_TOKEN": "root:wrong-s3cret"},
            "database": {"DATABASE_URL": f"postgresql://ann:wrong-s3cret@{dead[7:]}/agents"},
            "password": {"DATABASE_URL": f"postgresql://lab:wrong-s3cret@{host}"},
            "model": {"OPENAI_BASE_URL": f"{dead}/v1"},
            "folder in use": {"SERVICE_FOLDER": str(holder.folder)},
            "file in the way": {"SERVICE_FOLDER": str(folder / "file")},
        }

        def start(name: str) -> subprocess.CompletedProcess[str]:
            own = {"SERVICE_FOLDER": str(folder / name), **cases[name]}
            command, variables = [sys.executable, "-m", APP], environment_of(offline_environment, **own)
            return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)

        with ThreadPoolExecutor(4) as pool:
            yield dict(zip(cases, pool.map(start, cases), strict=True))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("port", ["cannot be used (Address already in use)", "SERVICE_PORT"]),
        ("milvus", ["Milvus cannot be used", "does not answer", "correct the URI"]),
        ("milvus token", ["Milvus cannot be used", "token"]),
        ("database", ["The database agents at 127.0.0.1:", "does not answer or refuses the user ann", "DATABASE_URL"]),
        ("password", ["refuses the user lab", "password authentication failed", "DATABASE_URL"]),
        ("model", ["No model server answers at", "OPENAI_BASE_URL"]),
        ("folder in use", ["Milvus cannot be used", "another process holds it"]),
        ("file in the way", ["SERVICE_FOLDER file cannot be made (File exists); name one that can be written."]),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(
    refusals: dict[str, subprocess.CompletedProcess[str]], name: str, words: list[str]
) -> None:
    ended = refusals[name]
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and line.startswith("error: ") and line.endswith(".")
    assert [word for word in words if word not in line] == [], line
    assert "s3cret" not in line + ended.stdout
    assert all(json.loads(logged)["event"] for logged in ended.stdout.splitlines()), "the libraries' own log lines"


def test_service_says_the_sentence_of_an_app_that_does_not_start(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"^The service did not start: LOG_LEVEL is 'LOUD'; set it to one of "),
        service(tmp_path, {"LOG_LEVEL": "loud"}, progress=False),
    ):
        pass


def test_a_collection_is_loaded_with_the_copies_of_the_setting_and_left_alone_if_it_is_loaded(
    tmp_path: Path, offline_environment: dict[str, str], milvus_cluster: Cluster
) -> None:
    lab, name = milvus_cluster, "of_service"
    environment = {"MILVUS_URI": lab.uri, "MILVUS_TOKEN": lab.token, "MILVUS_COLLECTION": name, "MILVUS_TIMEOUT": "60"}
    milvus = MilvusClient(lab.uri, token=lab.token)
    for number in ("2", "1"):
        settings = {**offline_environment, **environment, "MILVUS_REPLICAS": number}
        with service(tmp_path / number, settings, progress=False) as found:
            assert len(milvus.describe_replica(name)) == 2
            said = f"{name} is loaded with 2 copies and stays so, although replicas is {number}: to change it"
            assert (said in found.log_file.read_text(encoding="utf-8")) is (number == "1")
    milvus.drop_collection(name)


# --- how it ends ---


@pytest.fixture(scope="module")
def slow_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The settings for an offline model that gives its answers out at 16 tokens a second: two seconds for a run."""
    with offline.start(tmp_path_factory.mktemp("slow") / "model.log", tokens_per_second=16) as model:
        yield model_environment(model)


class Background:
    """A call in a thread; `result()` waits for what it returns."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(call, *arguments)

    def result(self) -> Any:
        self._pool.shutdown()
        return self._future.result()


def told_to_end(found: Service) -> int | None:
    """Send SIGTERM and wait for the end; the exit code."""
    os.kill(found.process.pid, signal.SIGTERM)
    assert wait_for(lambda: not found.process.running)
    return found.process.exit_code


def refuses_connections(found: Service) -> bool:
    try:
        HTTP.get(f"{found.url}/health")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # it waited in the queue of the listener that was closed
        return False
    return False


LONG = "".join(f"Sentence {number} of a long text about the harbour and its ships.\n\n" for number in range(8000))


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_what_runs_when_it_is_told_to_end_is_finished_and_nothing_new_begins(
    tmp_path: Path, slow_environment: dict[str, str]
) -> None:
    with service(tmp_path, slow_environment, progress=False) as found:
        first = upload(found, "canteen.md", CANTEEN)
        assert wait_for(lambda: status(found, first)[0] == "completed")
        streamed, plain = Background(stream, found, "streamed"), Background(ask, found, "plain")
        accepted = ask(found, "background", background="true").json()
        document = upload(found, "long.txt", LONG)
        assert status(found, document)[0] == "processing"
        ending = Background(told_to_end, found)
        assert wait_for(lambda: refuses_connections(found))
        assert streamed.result()[-1] == "RunCompleted"
        answer = plain.result()
        assert (answer.status_code, answer.json()["content"]) == (200, ANSWER)
        assert ending.result() == 0

        found.start()
        assert status(found, document)[0] == "completed"
        for session_id in ("streamed", "plain", "background"):
            (stored,) = get(found, f"/sessions/{session_id}/runs")
            assert (stored["status"], stored["content"]) == ("COMPLETED", ANSWER)
        assert accepted["run_id"] == stored["run_id"]
        last = [json.loads(line)["event"] for line in found.log_file.read_text(encoding="utf-8").splitlines()]
        assert "stopped" in last


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_what_takes_longer_than_shutdown_seconds_is_cut_off(
    tmp_path: Path, offline_environment: dict[str, str]
) -> None:
    with (
        offline.start(tmp_path / "model.log", tokens_per_second=1) as model,
        service(tmp_path / "service", {**model_environment(model), "SHUTDOWN_SECONDS": "1"}, progress=False) as found,
    ):
        document = upload(found, "canteen.md", CANTEEN)
        assert wait_for(lambda: status(found, document)[0] == "completed")
        streamed = Background(stream, found, "streamed")
        ask(found, "background", background="true")
        assert wait_for(lambda: get(found, "/sessions/background/runs")[0]["status"] == "RUNNING")
        assert told_to_end(found) == 0
        assert streamed.result()[-1] != "RunCompleted"
        found.start()
        assert get(found, "/sessions/background/runs")[0]["status"] == "CANCELLED", "and not RUNNING for ever"


def test_an_idle_connection_is_kept_longer_than_by_a_balancer_and_does_not_hold_up_the_end(
    tmp_path: Path, offline_environment: dict[str, str]
) -> None:
    with service(tmp_path, {**offline_environment, "SHUTDOWN_SECONDS": "600"}, progress=False) as found:
        address = found.url.removeprefix("http://")
        with closing(http.client.HTTPConnection(address, timeout=60)) as kept:
            for pause in (6, 0):  # uvicorn by itself closes after 5 seconds
                kept.request("GET", "/health")
                answer = kept.getresponse()
                assert answer.status == 200 and answer.read()
                time.sleep(pause)
            assert told_to_end(found) == 0


# --- what a crash leaves ---


def chunks(found: Service, marker: str) -> int:
    """How many chunks a search finds that hold the marker."""
    body = {"query": marker, "max_results": 1000, "meta": {"limit": 100, "page": 1}}
    answer = HTTP.post(f"{found.url}/knowledge/search", json=body).json()
    return int(answer["meta"]["total_count"])


def give_sign(found: Service, content_id: str, seconds_ago: int) -> None:
    """As if what indexes the document had given its last sign so long ago."""
    with closing(sqlite3.connect(found.folder / "agent.db")) as database, database:
        row = [int(time.time()) - seconds_ago, content_id]
        database.execute("UPDATE agno_knowledge SET updated_at = ? WHERE id = ?", row)


def test_a_document_that_was_being_indexed_when_it_was_killed_is_failed_and_can_be_sent_again(
    tmp_path: Path, offline_environment: dict[str, str]
) -> None:
    sections = "".join(f"## Quay {number}\n\nThe quay {number} has {number} ships.\n\n" for number in range(60))
    document = f"# Harbour\n\n{sections}"
    long = document + "".join(f"## More {number}\n\n{LONG[:2000]}\n\n" for number in range(1500))
    with service(tmp_path, offline_environment, progress=False) as found:
        content_id = upload(found, "harbour.md", document)
        assert wait_for(lambda: status(found, content_id)[0] == "completed")
        before = chunks(found, "quay ships")
        assert before == 60
        answered = ask(found, "kept").json()
        assert upload(found, "harbour.md", long) == content_id
        assert status(found, content_id)[0] == "processing"
        found.kill()
        found.start()
        assert get(found, "/sessions/kept/runs")[0]["content"] == answered["content"], "what was answered is stored"
        give_sign(found, content_id, seconds_ago=0)  # for on a busy machine the start may take half a minute
        assert status(found, content_id)[0] == "processing", "another replica might still be at work on it"
        give_sign(found, content_id, seconds_ago=31)
        state, message = status(found, content_id)
        assert (state, message) == ("failed", "The service stopped while this was indexed: upload it again.")
        (row,) = get(found, "/knowledge/content")["data"]
        assert row["status"] == "failed"
        upload(found, "harbour.md", document)
        assert wait_for(lambda: status(found, content_id)[0] == "completed")
        assert chunks(found, "quay ships") == before, "nothing is left of the text that was half indexed"


# --- several workers ---


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with postgres(tmp_path_factory.mktemp("database"), progress=False) as server:
        yield server


@pytest.fixture
def pair(
    tmp_path: Path, offline_environment: dict[str, str], milvus_lite_server: LiteServer, database: Postgres
) -> Iterator[Service]:
    """A service of two workers on an empty PostgreSQL."""
    settings = {
        "SERVICE_WORKERS": "2",
        "MILVUS_URI": milvus_lite_server.uri,
        "MILVUS_COLLECTION": f"pair_{os.getpid()}",
    }
    environment = {**offline_environment, **settings, "DATABASE_URL": database.url}
    with service(tmp_path, environment, progress=False) as found:
        yield found


def workers(found: Service) -> list[psutil.Process]:
    """The processes that serve."""
    return named(psutil.Process(found.process.pid).children(), "spawn_main")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_two_workers_serve_and_a_killed_one_is_replaced(pair: Service) -> None:
    content_id = upload(pair, "canteen.md", CANTEEN)
    assert wait_for(lambda: status(pair, content_id)[0] == "completed")
    assert wait_for(lambda: len(workers(pair)) == 2)

    def many(number: int) -> str:
        try:
            answer = ask(pair, f"session-{number}")
        except httpx.TransportError as error:
            return type(error).__name__
        return f"{answer.status_code} {answer.json()['content']}"

    with ThreadPoolExecutor(16) as pool:
        before = {process.pid: sum(process.cpu_times()[:2]) for process in workers(pair)}
        assert set(pool.map(many, range(100))) == {f"200 {ANSWER}"}
        used = {process.pid: sum(process.cpu_times()[:2]) - before[process.pid] for process in workers(pair)}
        assert len(used) == 2 and min(used.values()) > 0.1, "both work"
        stored = [get(pair, f"/sessions/session-{number}/runs") for number in range(0, 100, 5)]
        assert [(len(runs), runs[0]["content"]) for runs in stored] == [(1, ANSWER)] * 20

        victim = workers(pair)[0]
        timer = threading.Timer(0.3, victim.kill)
        timer.start()
        answers = list(pool.map(many, range(100, 250)))
        timer.join()
    lost = [answer for answer in answers if answer != f"200 {ANSWER}"]
    assert len(lost) <= 16 and not any(answer[:1].isdigit() for answer in lost), "only what was on it"
    assert wait_for(lambda: len(workers(pair)) == 2 and victim.pid not in [one.pid for one in workers(pair)])
    assert ask(pair, "after").json()["content"] == ANSWER

    both = workers(pair)
    os.kill(pair.process.pid, signal.SIGKILL)
    assert wait_for(lambda: all(gone(one) for one in both))
    pair.restart()
    assert ask(pair, "restarted").json()["content"] == ANSWER
    assert told_to_end(pair) == 0


APPS = {
    "knowledge_agent": [RUNS],
    "research_team": ["/teams/research-team/runs", "/workflows/research-workflow/runs"],
}
DEAD = {"detail": "The database does not answer (OperationalError): start it, or correct DATABASE_URL."}


def session_of(path: str) -> str:
    return path.strip("/").replace("/", "-")


def run(found: Service, path: str, **fields: str) -> httpx.Response:
    return HTTP.post(f"{found.url}{path}", data={"message": QUESTION, "session_id": session_of(path), **fields})


def last_event(answer: httpx.Response) -> dict[str, Any]:
    """The data of a stream's last event."""
    assert answer.status_code == 200, answer.text
    return dict(json.loads(answer.text.strip().rpartition("\ndata: ")[2]))


@pytest.fixture(params=APPS)
def on_postgresql(
    request: pytest.FixtureRequest, tmp_path: Path, offline_environment: dict[str, str], database: Postgres
) -> Iterator[tuple[Service, list[str]]]:
    """Each app with one document on PostgreSQL, and the paths of its runs."""
    environment = {**offline_environment, "DATABASE_URL": database.url}
    with service(tmp_path, environment, app=f"utils.apps.{request.param}", progress=False) as found:
        content_id = upload(found, "canteen.md", CANTEEN)
        assert wait_for(lambda: status(found, content_id)[0] == "completed")
        yield found, APPS[request.param]


def test_a_dead_postgresql_is_503_and_one_sentence_and_comes_back(
    on_postgresql: tuple[Service, list[str]], database: Postgres
) -> None:
    found, paths = on_postgresql
    before = [run(found, path, stream="false").json()["run_id"] for path in paths]
    database.kill()
    time.sleep(2.1)
    checks = get(found, "/ready")["checks"]
    answers = [
        run(found, path, **fields)
        for path in paths
        for fields in ({"stream": "false"}, {"stream": "true"}, {"stream": "false", "background": "true"})
    ]
    answers += [HTTP.get(f"{found.url}{path}") for path in ("/sessions", "/sessions/one/runs", "/knowledge/content")]
    database.restart()  # before anything is asserted: other tests use it, too
    assert [name for name in checks if not checks[name]["ok"]] == ["database"]
    assert checks["database"]["error"] == DEAD["detail"]
    assert [answer.status_code for answer in answers] == [503] * len(answers)
    assert all(answer.json() == DEAD for answer in answers)
    assert wait_for(lambda: get(found, "/ready")["status"] == "ready")
    for path, run_id in zip(paths, before, strict=True):
        assert run(found, path, stream="false").json()["content"] == ANSWER
        kept = HTTP.get(f"{found.url}{path}/{run_id}", params={"session_id": session_of(path)})
        assert kept.json()["content"] == ANSWER, "what was written before"
    text = found.log_file.read_text(encoding="utf-8")
    assert database.url.split(":")[2].partition("@")[0] not in text, "the password"


def test_a_run_that_cannot_be_written_is_answered_and_says_so(
    on_postgresql: tuple[Service, list[str]], database: Postgres
) -> None:
    found, paths = on_postgresql
    url = database.url.replace("+psycopg", "")
    run(found, paths[0], stream="false")  # makes the tables
    with psycopg.connect(url, autocommit=True) as sql:
        for path in paths:
            sql.execute("REVOKE INSERT, UPDATE ON ai.agno_runs FROM lab")
            try:
                plain = run(found, path, stream="false")
                streamed = last_event(run(found, path, stream="true"))
                accepted = run(found, path, stream="false", background="true")
            finally:
                sql.execute("GRANT INSERT, UPDATE ON ai.agno_runs TO lab")
            assert (plain.status_code, accepted.status_code) == (200, 202)
            for body in (plain.json(), streamed, accepted.json()):
                assert body.get("stored") is False and body["run_id"], body
            assert plain.json()["content"] == streamed["content"] == ANSWER
            kept = run(found, path, stream="false")
            assert kept.json()["content"] == ANSWER and "stored" not in kept.json()
            assert "stored" not in last_event(run(found, path, stream="true"))
        log = found.log_file.read_text(encoding="utf-8").splitlines()
        lines = [json.loads(line) for line in log if line.startswith("{")]  # Agno prints tracebacks between them
        runs = [line for line in lines if line["event"] == "run" and "stored" in line]
        assert {(line["level"], line["stored"]) for line in runs} == {("error", False)} and len(runs) == 3 * len(paths)
        assert {line["run_id"] for line in runs} <= {line["id"] for line in lines if line["event"] == "not stored"}

        sql.execute("REVOKE SELECT ON ai.agno_sessions FROM lab")
        try:
            assert run(found, paths[0], stream="false").status_code == 500, "PostgreSQL answers: what fails is ours"
        finally:
            sql.execute("GRANT SELECT ON ai.agno_sessions TO lab")
