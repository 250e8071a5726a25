"""PostgreSQL for the lab, with real servers: start, crash, restart, a killed owner, and what can fail."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest
from agno.db.base import SessionType
from agno.db.postgres import PostgresDb
from agno.session import AgentSession
from waiting import wait_for

from utils.bootstrap import ROOT
from utils.milvus_lab.programs import LabError
from utils.postgres import Postgres, postgres

OWNER = """
import sys, time
from contextlib import suppress
from pathlib import Path
from utils.postgres import postgres
with postgres(Path(sys.argv[1]), progress=False) as server:
    print(server.url, flush=True)
    time.sleep(60)
"""


def connect(server: Postgres) -> psycopg.Connection:
    return psycopg.connect(server.url.replace("+psycopg", ""), connect_timeout=60)


def processes_of(folder: Path) -> list[str]:
    """Commands of the running processes that name the folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(folder) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path with what paths can have; pytest lets only its own user in."""
    return tmp_path_factory.mktemp("lab") / "Größe 数据" / "it's 100%"


@pytest.fixture
def server(folder: Path) -> Iterator[Postgres]:
    with postgres(folder, progress=False) as found:
        yield found


def test_a_new_folder_gets_a_server_with_a_database(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with postgres(folder) as server:
        said = capsys.readouterr().out
        with connect(server) as connection:
            row = connection.execute("SELECT version(), current_user, current_database(), upper('größer')").fetchone()
            assert row and row[0].startswith("PostgreSQL 18.") and row[1:] == ("lab", "lab", "GRÖßER")
            connection.execute("CREATE TABLE kept (text text)")
            connection.execute("INSERT INTO kept VALUES ('first')")
    assert said.splitlines()[0] == "PostgreSQL: making a new database"
    assert said.splitlines()[1].startswith("PostgreSQL: ready at 127.0.0.1:") and said.count("\n") == 2
    assert server.url.split(":")[2].split("@")[0] not in said, "the password is not shown"
    assert not processes_of(folder)
    with pytest.raises(psycopg.OperationalError):
        connect(server)


def test_the_data_is_there_when_the_folder_is_opened_again(server: Postgres) -> None:
    with connect(server) as connection:
        assert connection.execute("SELECT text FROM kept").fetchall() == [("first",)]


def test_restart_keeps_address_and_data(server: Postgres) -> None:
    url = server.url
    with connect(server) as connection:
        connection.execute("INSERT INTO kept VALUES ('before the restart')")
        connection.commit()
        server.restart()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert server.url == url
    with connect(server) as connection:
        assert ("before the restart",) in connection.execute("SELECT text FROM kept").fetchall()


def test_a_crash_loses_nothing_that_was_committed(server: Postgres, folder: Path) -> None:
    with connect(server) as connection:
        connection.execute("INSERT INTO kept VALUES ('before the crash')")
        connection.commit()
        connection.execute("INSERT INTO kept VALUES ('not committed')")
        server.kill()
        assert not processes_of(folder)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        connect(server)
    server.restart()
    assert "was not properly shut down" in server.log_file.read_text(encoding="utf-8")
    with connect(server) as connection:
        rows = connection.execute("SELECT text FROM kept").fetchall()
    assert ("before the crash",) in rows and ("not committed",) not in rows


def test_only_this_machine_reaches_it_and_only_with_the_password(server: Postgres, folder: Path) -> None:
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    listening = [one.laddr for one in server._server()[0].net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert listening == [("127.0.0.1", port)]
    for user in ("lab", "postgres"):
        for password in ("", "wrong"):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(host="127.0.0.1", port=port, user=user, password=password, dbname="postgres")
    if os.name == "posix":
        assert stat.S_IMODE((folder / "password").stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "data").stat().st_mode) == 0o700


def test_the_user_of_the_url_owns_its_database_and_no_more(server: Postgres) -> None:
    with connect(server) as connection:
        connection.execute("CREATE SCHEMA own")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("COPY (SELECT 1) TO PROGRAM 'true'")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="for root on Linux")
def test_root_runs_it_as_somebody_else(server: Postgres) -> None:
    first, *others = server._server()
    users = [first.username()]
    for process in others:
        with suppress(psutil.NoSuchProcess):  # those of PostgreSQL that tidy up come and go
            users.append(process.username())
    assert len(users) > 3 and set(users) == {"nobody"}
    status = Path(f"/proc/{first.pid}/status").read_text(encoding="ascii")
    assert "CapEff:\t0000000000000002\n" in status, "CAP_DAC_OVERRIDE and nothing else: pytest's folder is closed"


def test_agno_keeps_a_session_in_it(server: Postgres) -> None:
    database = PostgresDb(db_url=server.url)
    session = AgentSession("s1", agent_id="a1", user_id="u1", session_data={"seen": "größe"}, created_at=1)
    database.upsert_session(session)
    server.restart()
    again = PostgresDb(db_url=server.url)
    found = again.get_session("s1", SessionType.AGENT)
    assert isinstance(found, AgentSession) and found.session_data == {"seen": "größe"}
    for one in (database, again):
        one.db_engine.dispose()


def test_a_folder_in_use_is_one_sentence_and_goes_on(server: Postgres, folder: Path) -> None:
    for _ in range(2):
        with (
            pytest.raises(LabError, match=rf"is in use by process {os.getpid()}, which runs PostgreSQL in it: stop"),
            postgres(folder, progress=False),
        ):
            pass
    connect(server).close()


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_nothing_survives_a_killed_owner_except_the_data(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    url = owner.stdout.readline().strip()
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE kept (text text)")
    with pytest.raises(LabError, match=f"is in use by process {owner.pid}, "), postgres(tmp_path, progress=False):
        pass
    owner.kill()
    owner.wait()
    owner.stdout.close()
    # Opened at once: it waits until the server of the killed owner has ended.
    with postgres(tmp_path, progress=False) as server, connect(server) as connection:
        assert connection.execute("SELECT * FROM kept").fetchall() == []
    assert wait_for(lambda: not processes_of(tmp_path))
    assert server.url != url


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_owner_that_ends_takes_the_server_along(tmp_path: Path, ending: int) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert owner.stdout and owner.stdout.readline()
    owner.send_signal(ending)
    owner.wait(20)
    owner.stdout.close()
    assert wait_for(lambda: not processes_of(tmp_path))
    log = (tmp_path / "logs" / "postgres.log").read_text(encoding="utf-8")
    assert "database system is shut down" in log, "it was asked, not killed"


def test_a_start_that_was_interrupted_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "data.draft" / "base").mkdir(parents=True)
    (tmp_path / "password").write_text("of the first try", encoding="ascii")
    (tmp_path / "owner").write_text("1:0.0", encoding="ascii")
    with postgres(tmp_path, progress=False) as server, connect(server):
        assert "of the first try" not in server.url
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "logs", "password"]


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.touch()
    with pytest.raises(LabError, match=r"^The folder .*taken cannot be written \(.+\): name one that can\.$"):
        Postgres(file, progress=False).start()


def test_a_full_disk_is_one_sentence(small_disk: Callable[[int], Path]) -> None:
    with pytest.raises(LabError, match=r"^The disk of .* is full: free 100 MB, then try again\.$"):
        Postgres(small_disk(8) / "lab", progress=False).start()


@pytest.mark.parametrize("password", ["", "wrong"])
def test_data_without_its_password_is_one_sentence(folder: Path, password: str) -> None:
    file = folder / "password"
    right = file.read_text(encoding="ascii")
    file.write_text(password, encoding="ascii")
    try:
        with pytest.raises(LabError, match="does not hold the password"), postgres(folder, progress=False):
            pass
    finally:
        file.write_text(right, encoding="ascii")
    assert not processes_of(folder)


def test_a_port_that_was_taken_meanwhile_is_one_sentence(server: Postgres) -> None:
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    server.kill()
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(LabError, match=rf"another program has taken port {port}\.$"),
    ):
        server.restart()
    server.restart()
    connect(server).close()


def test_damaged_data_is_named_by_the_log(tmp_path: Path) -> None:
    with postgres(tmp_path, progress=False):
        pass
    (tmp_path / "data" / "PG_VERSION").write_text("14\n", encoding="ascii")
    with pytest.raises(LabError, match="initialized by PostgreSQL version 14"), postgres(tmp_path, progress=False):
        pass
    assert not processes_of(tmp_path)
