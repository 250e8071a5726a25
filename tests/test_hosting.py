"""The settings of a service, its limits, its log lines and its database, each alone."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from agno.db.sqlite import SqliteDb
from agno.run.agent import RunOutput
from agno.session import AgentSession
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from utils.bootstrap import ROOT
from utils.hosting import ServiceConfig, configure_logs, load_config, open_database
from utils.hosting.database import DatabaseError, note_failed_writes
from utils.hosting.limits import RequestLimits
from utils.hosting.logs import AccessLog, log
from utils.hosting.runs import RunStatusCodes, SearchFailed
from utils.milvus_store import InvalidFilter
from utils.settings import Settings, SettingsError

NAME = "knowledge-agent"
KEY = "a-key-that-only-the-tests-know-0123456789"
PEM = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----"
POSTGRES = "postgresql+psycopg://ann:s3cret-word@db.example:5433/agents"


def load(tmp_path: Path, **values: str) -> ServiceConfig:
    return load_config(NAME, values, tmp_path / "absent.env")


def test_without_settings_it_listens_on_this_machine_only(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.host, config.port, config.workers, config.url) == ("127.0.0.1", 7777, 1, "http://127.0.0.1:7777")
    assert config.folder == ROOT / "data" / "local" / NAME
    assert config.milvus_uri == str(config.folder / "milvus.db") and config.settings.on_lite
    assert (config.auth, config.database_url, config.collection) == ("none", "", "knowledge")
    assert config.upload_limit == 20 * 2**20 and config.upload_types == ("md", "txt", "pdf", "csv")
    assert (config.milvus_timeout, config.model_timeout, config.shutdown_seconds) == (10, 60, 30)
    assert config.milvus_replicas is None


@pytest.mark.parametrize(
    ("values", "field", "wanted"),
    [
        ({"SERVICE_HOST": "localhost"}, "url", "http://localhost:7777"),
        ({"SERVICE_HOST": "::1"}, "url", "http://[::1]:7777"),
        ({"SERVICE_HOST": "0.0.0.0", "ALLOW_ANONYMOUS": "true"}, "url", "http://127.0.0.1:7777"),
        ({"SERVICE_HOST": "0.0.0.0", "OS_SECURITY_KEY": KEY}, "auth", "key"),
        ({"SERVICE_HOST": "0.0.0.0", "JWT_VERIFICATION_KEY": KEY}, "auth", "jwt"),
        ({"SERVICE_PORT": "65535"}, "port", 65535),
        ({"SERVICE_WORKERS": "4", "MILVUS_URI": "http://localhost:19530"}, "workers", 4),
        ({"MILVUS_URI": "http://localhost:19530"}, "milvus_uri", "http://localhost:19530"),
        ({"DATABASE_URL": POSTGRES}, "database_url", POSTGRES),
        ({"DATABASE_URL": "postgres://a:p%40ss@h/n"}, "database_url", "postgresql+psycopg://a:p%40ss@h/n"),
        ({"MILVUS_COLLECTION": "papers"}, "collection", "papers"),
        ({"MILVUS_TIMEOUT": "3"}, "milvus_timeout", 3),
        ({"MILVUS_REPLICAS": "2"}, "milvus_replicas", 2),
        ({"MILVUS_REPLICAS": " "}, "milvus_replicas", None),
        ({"JWT_VERIFICATION_KEY": PEM.replace("\n", "\\n"), "JWT_ALGORITHM": "EdDSA"}, "jwt_key", PEM),
        ({"CORS_ORIGINS": "https://a.example/, http://b:3000"}, "cors_origins", ("https://a.example", "http://b:3000")),
        ({"UPLOAD_LIMIT_MB": "1"}, "upload_limit", 2**20),
        ({"UPLOAD_TYPES": ".MD, pdf"}, "upload_types", ("md", "pdf")),
        ({"MODEL_TIMEOUT": "5"}, "model_timeout", 5),
        ({"MODEL_PROVIDER": "local"}, "model_timeout", 600),
        ({"SHUTDOWN_SECONDS": "0"}, "shutdown_seconds", 0),
        ({"LOG_LEVEL": "debug"}, "log_level", "DEBUG"),
        ({"SERVICE_PORT": "", "LOG_LEVEL": " "}, "log_level", "INFO"),
        ({"METRICS": "false"}, "metrics", False),
        ({"MODEL_PRICES": "a=b/c=0.25/2, d=1/8"}, "model_prices", {"a=b/c": (0.25, 2.0), "d": (1.0, 8.0)}),
        ({"GRADE_SAMPLE": "0.05"}, "grade_sample", 0.05),
        ({"TRACES_SAMPLE": "0"}, "traces_sample", 0.0),
        ({"TRACES_IN_DATABASE": "no"}, "traces_in_database", False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[::1]:4318/"}, "otlp_endpoint", "http://[::1]:4318"),
    ],
)
def test_a_right_value_is_taken(tmp_path: Path, values: dict[str, str], field: str, wanted: object) -> None:
    assert getattr(load(tmp_path, **values), field) == wanted


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"SERVICE_PORT": "0"}, "SERVICE_PORT is '0'; set it to a whole number from 1 to 65535."),
        ({"SERVICE_PORT": "80a"}, "SERVICE_PORT is '80a'"),
        ({"SERVICE_PORT": "٣"}, "SERVICE_PORT is '٣'"),
        ({"SERVICE_PORT": "9" * 5000}, "SERVICE_PORT is '99"),
        ({"SERVICE_WORKERS": "-1"}, "SERVICE_WORKERS is '-1'"),
        ({"SERVICE_WORKERS": "2"}, "SERVICE_WORKERS is 2, but Milvus Lite belongs to one process; set MILVUS_URI"),
        ({"SERVICE_WORKERS": "2", "MILVUS_URI": "x.db"}, "SERVICE_WORKERS is 2, but Milvus Lite"),
        ({"SERVICE_HOST": "0.0.0.0"}, "SERVICE_HOST 0.0.0.0 opens the service to the network without a key; set OS_"),
        ({"SERVICE_HOST": "service.example"}, "SERVICE_HOST service.example opens"),
        ({"SERVICE_HOST": "::"}, "SERVICE_HOST :: opens"),
        ({"ALLOW_ANONYMOUS": "perhaps"}, "ALLOW_ANONYMOUS is 'perhaps'; set it to true or false."),
        ({"SERVICE_FOLDER": "a\0b"}, "SERVICE_FOLDER is"),
        ({"DATABASE_URL": "mysql://ann:s3cret-word@h/n"}, "DATABASE_URL is not the URL of a PostgreSQL database"),
        ({"DATABASE_URL": "postgresql://ann:s3cret-word@h:port/n"}, "DATABASE_URL is not the URL"),
        ({"DATABASE_URL": "postgresql://ann:s3cret-word@h"}, "DATABASE_URL is not the URL"),
        ({"DATABASE_URL": "s3cret-word"}, "DATABASE_URL is not the URL"),
        ({"MILVUS_URI": "localhost:19530"}, "MILVUS_URI is 'localhost:19530'"),
        ({"MILVUS_TIMEOUT": "0"}, "MILVUS_TIMEOUT is '0'"),
        ({"MILVUS_REPLICAS": "0"}, "MILVUS_REPLICAS is '0'; set it to a whole number from 1 to 64."),
        ({"OS_SECURITY_KEY": "short"}, "OS_SECURITY_KEY has fewer than 16 characters"),
        ({"JWT_VERIFICATION_KEY": "s3cret-word"}, "JWT_VERIFICATION_KEY has fewer than 32 characters"),
        ({"OS_SECURITY_KEY": KEY, "JWT_VERIFICATION_KEY": KEY}, "OS_SECURITY_KEY and JWT_VERIFICATION_KEY are both"),
        ({"JWT_VERIFICATION_KEY": KEY, "JWT_ALGORITHM": "none"}, "JWT_ALGORITHM is 'none'; set it to one of HS256"),
        ({"JWT_VERIFICATION_KEY": KEY, "JWT_ALGORITHM": "RS256"}, "JWT_ALGORITHM is RS256, but JWT_VERIFICATION_KEY"),
        ({"CORS_ORIGINS": "*"}, "CORS_ORIGINS holds '*'"),
        ({"CORS_ORIGINS": "https://*.example"}, "CORS_ORIGINS holds 'https://*.example'"),
        ({"CORS_ORIGINS": "https://a.example/path"}, "CORS_ORIGINS holds 'https://a.example/path'"),
        ({"UPLOAD_LIMIT_MB": "1.5"}, "UPLOAD_LIMIT_MB is '1.5'"),
        ({"UPLOAD_TYPES": "md,exe"}, "UPLOAD_TYPES holds 'exe'; this service reads md, txt, pdf, csv"),
        ({"MODEL_TIMEOUT": "0"}, "MODEL_TIMEOUT is '0'"),
        ({"SHUTDOWN_SECONDS": "3601"}, "SHUTDOWN_SECONDS is '3601'"),
        ({"METRICS": "perhaps"}, "METRICS is 'perhaps'; set it to true or false."),
        ({"TRACES_SAMPLE": "1.1"}, "TRACES_SAMPLE is '1.1'; set it to a share of the runs from 0 to 1, such as 0.1."),
        ({"TRACES_SAMPLE": "nan"}, "TRACES_SAMPLE is 'nan'"),
        ({"GRADE_SAMPLE": "-0.1"}, "GRADE_SAMPLE is '-0.1'"),
        ({"TRACES_IN_DATABASE": "2"}, "TRACES_IN_DATABASE is '2'"),
        ({"MODEL_PRICES": "a=1/2, b=1"}, "MODEL_PRICES holds 'b=1'; write model=usd_in/usd_out per million tokens"),
        ({"MODEL_PRICES": "a=1/-2"}, "MODEL_PRICES holds 'a=1/-2'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT is 'localhost:4318', which"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:x"}, "OTEL_EXPORTER_OTLP_ENDPOINT is 'http://h:x'"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL is 'LOUD'; set it to one of DEBUG, INFO, WARNING, ERROR."),
        ({"MODEL_PROVIDER": "openai"}, "MODEL_PROVIDER is openai but OPENAI_API_KEY is not set"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_it(tmp_path: Path, values: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(sentence)}") as raised:
        load(tmp_path, **values)
    assert "\n" not in str(raised.value)
    assert "s3cret-word" not in str(raised.value) and KEY not in str(raised.value)


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    token = {"MILVUS_URI": "http://localhost:19530", "MILVUS_TOKEN": "root:s3cret-word"}
    model = {"MODEL_PROVIDER": "openai", "OPENAI_API_KEY": "s3cret-word"}
    for secrets in ({"OS_SECURITY_KEY": KEY}, {"JWT_VERIFICATION_KEY": KEY}):
        shown = repr(load(tmp_path, DATABASE_URL=POSTGRES, **secrets, **token, **model))
        assert KEY not in shown and "s3cret-word" not in shown


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(f"SERVICE_PORT=8001\nOS_SECURITY_KEY='{KEY}'\nUPLOAD_TYPES=md\n", encoding="utf-8")
    config = load_config(NAME, {"SERVICE_PORT": "8002"}, file)
    assert (config.port, config.security_key, config.upload_types) == (8002, KEY, ("md",))


@given(st.dictionaries(st.sampled_from(["SERVICE_PORT", "SERVICE_HOST", "DATABASE_URL", "CORS_ORIGINS"]), st.text()))
def test_no_value_causes_another_error(values: dict[str, str]) -> None:
    try:
        load_config(NAME, values, Path("absent.env"))
    except SettingsError as error:
        assert str(error).endswith(".")


def test_sqlite_is_made_and_a_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    config = ServiceConfig(Settings(), tmp_path / "new" / "folder")
    database = open_database(config, NAME)
    assert isinstance(database, SqliteDb) and database.id == NAME
    database.db_engine.dispose()
    (config.folder / "agent.db").unlink(missing_ok=True)
    (config.folder / "agent.db").mkdir()
    with pytest.raises(DatabaseError, match=r"^The database folder/agent\.db cannot be opened"):
        open_database(config, NAME)


def test_a_dead_postgresql_is_one_sentence_without_the_password(tmp_path: Path, closed_port: int) -> None:
    url = f"postgresql+psycopg://ann:s3cret-word@127.0.0.1:{closed_port}/agents"
    sentence = f"^The database agents at 127.0.0.1:{closed_port} does not answer or refuses the user ann; start it, or"
    with pytest.raises(DatabaseError, match=sentence) as raised:
        open_database(ServiceConfig(Settings(), tmp_path, database_url=url), NAME)
    assert "s3cret-word" not in str(raised.value) and "\n" not in str(raised.value)


def test_writes_that_fail_are_noted_until_they_succeed(tmp_path: Path) -> None:
    """On SQLite; on PostgreSQL test_service.py has a whole service do it."""
    database = open_database(ServiceConfig(Settings(), tmp_path), NAME)
    session, run = AgentSession(session_id="of-ann", agent_id="a"), RunOutput(run_id="first", session_id="of-ann")

    def write() -> None:
        with suppress(SQLAlchemyError):
            database.upsert_session(session)
        with suppress(SQLAlchemyError):
            database.upsert_run(run, "of-ann")

    write()  # makes the tables, outside of any request
    failed = note_failed_writes()
    with database.db_engine.begin() as sql:
        for table, event in (("sessions", "UPDATE"), ("runs", "INSERT")):
            action = f"BEFORE {event} ON agno_{table} BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
            sql.execute(text(f"CREATE TRIGGER no_{table} {action}"))
    write()
    assert failed == {"of-ann", "first"}
    for table, rest in (("sessions", {"first"}), ("runs", set())):
        with database.db_engine.begin() as sql:
            sql.execute(text(f"DROP TRIGGER no_{table}"))
        write()
        assert failed == rest
    database.db_engine.dispose()


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that answers with the number of bytes it got, as FastAPI does: with 400 if its body cannot be read."""
    status, read, more = 200, 0, True
    try:
        while more:
            message = await receive()
            read += len(message.get("body", b""))
            more = message.get("more_body", False)
    except Exception:
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": str(read).encode()})


def call(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to an ASGI app without a server."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


LIMITED = RequestLimits(echo, limit=1000, types=("md", "pdf"))


@pytest.mark.parametrize("path", ["/agents/a/runs", "/knowledge/content", "/knowledge/content/", "/anything"])
def test_a_body_over_the_limit_is_413_whether_it_says_its_length_or_not(path: str) -> None:
    async def pieces() -> Any:
        for _ in range(11):
            yield b"a" * 100

    for body in (b"a" * 1001, pieces()):
        response = call(LIMITED, "POST", path, content=body)
        assert response.status_code == 413 and response.json()["detail"].startswith("The request is larger than")


def test_a_body_at_the_limit_goes_through_whole() -> None:
    assert call(LIMITED, "POST", "/agents/a/runs", content=b"a" * 1000).text == "1000"
    response = call(LIMITED, "POST", "/knowledge/content", files={"file": ("a.md", b"a" * 700)})
    assert response.status_code == 200 and response.text == response.request.headers["content-length"]


@pytest.mark.parametrize("path", ["/knowledge/remote-content", "/knowledge/content/abc/refresh/"])
def test_routes_that_fetch_are_refused(path: str) -> None:
    assert call(LIMITED, "POST", path, data={"a": "b"}).status_code == 403


METADATA = [
    ("[1]", 422),
    ("{", 422),
    ('{"a": NaN}', 422),
    (r'{"a": "\ud800"}', 422),
    ('{"_agno": {"source_url": "x"}}', 422),
]
METADATA += [
    ("[" * 5000, 422),
    (json.dumps({"a": "b" * 31_000}), 200),
    (json.dumps({"a": "b" * 32_000}), 422),
    ('{"topic": "größe"}', 200),
    (" ", 200),
]


@pytest.mark.parametrize(("metadata", "status"), METADATA, ids=[value[:20] for value, _ in METADATA])
def test_metadata_is_an_object_that_every_part_can_store(metadata: str, status: int) -> None:
    limited = RequestLimits(echo, limit=100_000, types=("md",))
    response = call(limited, "POST", "/knowledge/content", data={"metadata": metadata}, files={"file": ("a.md", b"a")})
    assert response.status_code == status, response.text


class Lines(logging.Handler):
    """Keeps what the root logger's own handler would write."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def written() -> Iterator[Lines]:
    """The JSON log lines of a service in this process."""
    root, names = logging.getLogger(), ("agno", "agno-team", "agno-workflow", "uvicorn", "uvicorn.error")
    before = root.handlers, root.level, {name: logging.getLogger(name).handlers[:] for name in names}
    # Notebooks silence Agno with a filter, and so do tests that use what notebooks use.
    filters = {name: logging.getLogger(name).filters[:] for name in names}
    for name in names:
        logging.getLogger(name).filters.clear()
    configure_logs("DEBUG")
    formatter = root.handlers[0].formatter
    assert formatter is not None
    lines = Lines(formatter)
    root.handlers = [lines]
    yield lines
    root.handlers, root.level = before[0], before[1]
    for name in names:
        logging.getLogger(name).handlers = before[2][name]
        logging.getLogger(name).filters = filters[name]


@pytest.mark.parametrize(
    ("given_id", "kept"),
    [("abc-1", True), ("x" * 64, True), ("x" * 65, False), ("", False), ("a\tb", False), ("größe", True)],
)
def test_a_request_id_goes_in_and_out(written: Lines, given_id: str, kept: bool) -> None:
    response = call(AccessLog(echo), "POST", "/runs", headers={"X-Request-ID": given_id.encode("latin-1")})
    answered = response.headers.raw[-1][1].decode("latin-1")
    assert (answered == given_id) is kept and answered
    (line,) = [line for line in written.lines if line["event"] == "request"]
    assert line["request_id"] == answered and line["method"] == "POST" and line["status"] == 200 and line["ms"] >= 0


def test_lines_of_every_logger_are_json_with_their_exception(written: Lines) -> None:
    log.info("größe", value="a\nb")
    try:
        raise ValueError("what happened")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("it %s", "failed")
    logging.getLogger("agno").warning("from Agno")
    first, second, third = written.lines[-3:]
    assert (first["event"], first["value"], first["level"]) == ("größe", "a\nb", "info")
    assert second["event"] == "it failed" and second["exception"].endswith("ValueError: what happened")
    assert (third["event"], third["logger"]) == ("from Agno", "agno") and third["timestamp"]


# --- runs that fail ---


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raising(error: Exception) -> RunStatusCodes:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    return RunStatusCodes(app)


SEARCH_FAILED = "The knowledge base could not be searched. Error searching knowledge base: "


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SearchFailed("Milvus does not answer."), 503),
        (caused(SearchFailed("A filter is made of texts."), InvalidFilter("A filter is made of texts.")), 422),
        (RuntimeError(f"{SEARCH_FAILED}MilvusUnavailable"), 503),
        (RuntimeError(f"{SEARCH_FAILED}InvalidFilter"), 422),
        (RuntimeError("Connection error."), 502),
    ],
)
def test_a_workflow_that_raises_because_a_step_failed_has_a_body_and_a_status(error: Exception, status: int) -> None:
    response = call(raising(error), "POST", "/workflows/line/runs", data={"message": "Hello?"})
    assert (response.status_code, response.json()) == (status, {"status": "ERROR", "content": str(error)})


@pytest.mark.parametrize("error", [KeyError("a mistake in the program"), ValueError("another")])
def test_a_mistake_in_the_program_stays_one(error: Exception) -> None:
    with pytest.raises(type(error)):
        call(raising(error), "POST", "/workflows/line/runs", data={"message": "Hello?"})
    with pytest.raises(RuntimeError):
        call(raising(RuntimeError("of an agent")), "POST", "/agents/a/runs", data={"message": "Hello?"})


@pytest.mark.parametrize(
    ("kind", "prefix", "error"),
    [("agents", "Run", "content"), ("teams", "TeamRun", "content"), ("workflows", "Workflow", "error")],
)
def test_the_log_has_how_the_streamed_run_itself_ended(written: Lines, kind: str, prefix: str, error: str) -> None:
    """And not how a team or a workflow within it did, which has events of the same names."""
    sent = [("Started", "own", {}), ("Started", "inner", {}), ("Completed", "inner", {"content": "Done."})]
    sent += [("Error", "own", {error: "It broke."})]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for name, run_id, more in sent:
            event = f"event: {prefix}{name}\ndata: {json.dumps({'run_id': run_id, **more})}\n\n"
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    call(RunStatusCodes(app), "POST", f"/{kind}/one/runs", data={"message": "Hello?"})
    (line,) = [line for line in written.lines if line["event"] == "run"]
    assert (line["run_id"], line["status"], line["error"]) == ("own", "ERROR", "It broke.")
