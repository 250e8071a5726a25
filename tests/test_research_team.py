"""The research team and the research workflow as a service, over real HTTP: answers, users, failures, a restart."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from agno.agent import Agent
from agno.models.openai import OpenAILike
from agno.run.base import RunStatus
from agno.team import Team
from conftest import model_environment
from service_runs import background_run, stream_run
from waiting import MANY, answered_meanwhile, wait_for

from utils import models, offline
from utils.hosting import require_members
from utils.milvus_lab import lite_server
from utils.milvus_lab.lite import LiteServer
from utils.offline import OfflineServer
from utils.service import Service, service
from utils.widgets import Console

APP = "utils.apps.research_team"
KEY = "a-key-that-only-the-tests-know-0123456789"
QUESTION = "When does the canteen close on Fridays?"
CANTEEN = "# Canteen\n\nThe canteen closes at 14:30 on Fridays."
ANSWER = "The canteen closes at 14:30 on Fridays. [canteen.md]"
PLACES = {"teams": "/teams/research-team/runs", "workflows": "/workflows/research-workflow/runs"}
LAST = {"teams": "TeamRun", "workflows": "Workflow"}
both = pytest.mark.parametrize("kind", PLACES)


@contextmanager
def running(folder: Path, *environments: dict[str, str]) -> Iterator[Service]:
    merged = {name: value for environment in environments for name, value in environment.items()}
    with service(folder, merged, app=APP, progress=False) as found:
        yield found


@contextmanager
def client(found: Service, user: str = "", scopes: list[str] | None = None) -> Iterator[httpx.Client]:
    claims = {"sub": user, "aud": "research-team", "scopes": scopes or [], "exp": int(time.time()) + 600}
    headers = {"Authorization": f"Bearer {jwt.encode(claims, KEY)}"} if user else {}
    with httpx.Client(base_url=found.url, timeout=60, trust_env=False, headers=headers) as api:
        yield api


def upload(api: httpx.Client, name: str, text: str, **fields: str) -> str:
    """Index a document; its id once it can be found."""
    answer = api.post("/knowledge/content", files={"file": (name, text)}, data=fields)
    assert answer.status_code == 202, answer.text
    content_id = str(answer.json()["id"])
    assert wait_for(lambda: status(api, content_id) != "processing") and status(api, content_id) == "completed"
    return content_id


def status(api: httpx.Client, content_id: str) -> str:
    return str(api.get(f"/knowledge/content/{content_id}/status").json()["status"])


def run(api: httpx.Client, kind: str, message: str = QUESTION, **fields: str) -> httpx.Response:
    return api.post(PLACES[kind], data={"message": message, "stream": "false", **fields})


def stream(api: httpx.Client, kind: str, message: str = QUESTION, **fields: str) -> list[tuple[str, dict[str, Any]]]:
    return stream_run(api, PLACES[kind], message, **fields)


def background(api: httpx.Client, kind: str, session_id: str, **fields: str) -> dict[str, Any]:
    return background_run(api, PLACES[kind], QUESTION, session_id, **fields)


def log_lines(found: Service, count: int, **wanted: Any) -> list[dict[str, Any]]:
    """The log lines of runs that hold these values, once there are `count` of them."""

    def lines() -> list[dict[str, Any]]:
        text = found.log_file.read_text(encoding="utf-8")
        every = [json.loads(line) for line in text.splitlines()]
        return [line for line in every if {"event": "run", **wanted}.items() <= line.items()]

    assert wait_for(lambda: len(lines()) >= count)
    return lines()


# --- answers ---


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, offline_environment: dict[str, str]) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("open"), offline_environment) as found:
        yield found


@pytest.fixture
def api(opened: Service) -> Iterator[httpx.Client]:
    with client(opened) as made:
        yield made


@both
def test_an_answer_follows_what_is_uploaded_changed_and_deleted(api: httpx.Client, kind: str) -> None:
    """In one session and within a few seconds, so that a cache could hide it."""
    question, session_id = "What is the colour of the boathouse?", f"changes-{kind}"
    assert api.delete("/knowledge/content").status_code == 200
    nothing = run(api, kind, question, session_id=session_id).json()
    assert nothing["status"] == "COMPLETED" and "pload" in nothing["content"], "a document to upload is asked for"
    for colour in ("green", "yellow"):
        content_id = upload(api, "boathouse.md", f"# Boathouse\n\nThe colour of the boathouse is {colour}.")
        found = run(api, kind, question, session_id=session_id).json()
        assert found["content"] == f"The colour of the boathouse is {colour}. [boathouse.md]"
    assert api.delete(f"/knowledge/content/{content_id}").status_code == 200
    gone = run(api, kind, question, session_id=f"{session_id}-2").json()
    assert gone["content"] == nothing["content"]


@both
def test_a_run_answers_with_its_source_in_all_three_ways(opened: Service, api: httpx.Client, kind: str) -> None:
    upload(api, "canteen.md", CANTEEN)
    fields = {"session_id": f"ways-{kind}", "user_id": "ann"}
    answer = run(api, kind, **fields)
    body = answer.json()
    assert (answer.status_code, body["status"], body["content"]) == (200, "COMPLETED", ANSWER)
    events = stream(api, kind, **fields)
    assert events[-1][0] == f"{LAST[kind]}Completed" and events[-1][1]["content"] == ANSWER
    assert {event.get("agent_id") for _, event in events} >= {"analyst", "writer"}
    polled = background(api, kind, **fields)
    assert (polled["status"], polled["content"]) == ("COMPLETED", ANSWER)
    stored = api.get(f"/sessions/{fields['session_id']}/runs", params={"user_id": "ann"}).json()
    whole = [one["run_id"] for one in stored if not one.get("parent_run_id")]
    assert whole == [body["run_id"], events[-1][1]["run_id"], polled["run_id"]]

    plain, streamed, started = log_lines(opened, 3, session_id=fields["session_id"])
    for line in (plain, streamed):
        assert (line["kind"], line["user_id"], line["status"]) == (kind.removesuffix("s"), "ann", "COMPLETED")
        assert line["http_status"] == 200 and line["input_tokens"] > 100 and line["output_tokens"] > 40
    assert (plain["run_id"], streamed["run_id"]) == tuple(whole[:2])
    assert (started["run_id"], started["status"], started["http_status"]) == (polled["run_id"], "PENDING", 202)


def test_the_tokens_in_the_log_are_those_of_all_members(opened: Service, api: httpx.Client) -> None:
    upload(api, "canteen.md", CANTEEN)
    body = run(api, "teams", session_id="tokens").json()
    parts = [body, *body["member_responses"]]
    (line,) = log_lines(opened, 1, session_id="tokens")
    assert [part.get("agent_id") for part in parts] == [None, "analyst", "writer"]
    assert line["input_tokens"] == sum(part["metrics"]["input_tokens"] for part in parts)


def test_the_workflow_hands_question_documents_and_notes_on(api: httpx.Client) -> None:
    upload(api, "canteen.md", CANTEEN)
    run(api, "workflows", session_id="handed")
    (stored,) = api.get("/sessions/handed/runs").json()
    analyst, writer = (part["messages"][-2]["content"] for part in stored["step_executor_runs"])
    for message in (analyst, writer):
        assert message.startswith(QUESTION) and "The canteen closes at 14:30 on Fridays." in message
    assert "The analyst's notes:" in writer and "The analyst's notes:" not in analyst
    assert not any(part.get("tools") for part in stored["step_executor_runs"]), "they search nothing"
    names = [step["step_name"] for step in stored["step_results"]]
    assert names == ["search", "found?", "brief the analyst", "analyst", "brief the writer", "writer"]


@pytest.mark.parametrize(("kind", "field"), [("teams", "knowledge_filters"), ("workflows", "dependencies")])
def test_filters_of_a_run_hold_for_everyone_in_it(api: httpx.Client, kind: str, field: str) -> None:
    upload(api, "canteen.md", CANTEEN, metadata=json.dumps({"house": "north"}))
    upload(api, "kitchen.md", "# Kitchen\n\nThe kitchen closes at 22:15 on Fridays.", metadata='{"house": "south"}')

    def ask(filters: Any) -> httpx.Response:
        value = {"knowledge_filters": filters} if kind == "workflows" else filters
        return run(api, kind, "What closes on Fridays, and when?", **{field: json.dumps(value)})

    for house, time_of_day, other in (("north", "14:30", "22:15"), ("south", "22:15", "14:30")):
        answer = ask({"house": house})
        assert time_of_day in answer.json()["content"] and other not in answer.text
    refused = ask({"house": {"$ne": "north"}})
    assert (refused.status_code, refused.json()["status"]) == (422, "ERROR"), refused.text


# --- the console of notebook 03 ---


@both
def test_the_console_shows_answer_sources_and_what_each_did(opened: Service, api: httpx.Client, kind: str) -> None:
    assert api.delete("/knowledge/content").status_code == 200
    upload(api, "canteen.md", CANTEEN)
    console = Console(opened.url, PLACES[kind].split("/")[2], user_id=f"console-{kind}", group=kind)
    shown: list[str] = []
    console.status.observe(lambda change: shown.append(change["new"]), "value")
    assert console.ask(QUESTION) == ANSWER
    answered, sources = console.last_run, console.sources.value
    assert answered.status == "completed" and answered.sources == ["canteen.md"]
    assert '"cc-chip cc-cited">canteen.md<' in sources and not console.error.value
    labels = [span.label for span in answered.spans]
    who = ["Analyst: model", "Writer: model"]
    if kind == "teams":
        delegated = ["model", "delegate_task_to_member"]
        searched = [[name, f"{name.split(':')[0]}: search_knowledge_base", name] for name in who]
        assert labels == [*delegated, *searched[0], *delegated, *searched[1], "model"]
    else:
        steps = [f"step: {name}" for name in ("search", "brief the analyst", "analyst", "brief the writer", "writer")]
        assert labels == [*steps[:3], who[0], *steps[3:], who[1]]
    assert all(span.end is not None and span.start <= span.end <= answered.seconds for span in answered.spans)
    assert all(label in console.timeline.value for label in labels) and answered.input_tokens > 100
    assert any("Writer: answering" in text for text in shown)

    assert [session["session_id"] for session in console.sessions()] == [console.session_id]
    assert "runs: 1" in console.session_list.options[0][0]
    console.open_session(console.session_id)
    assert "14:30" in console.answer.value and console.sources.value == sources
    console.close()


# --- a token for each user ---


SCOPES = ["teams:run", "workflows:run", "sessions:read", "knowledge:read", "knowledge:write", "knowledge:delete"]
SECRET, SECRET_QUESTION = "The vault of Ann opens with the word persimmon.", "What is the word of the vault of Ann?"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, offline_environment: dict[str, str]) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("guarded"), offline_environment, {"JWT_VERIFICATION_KEY": KEY}) as found:
        yield found


@both
def test_two_users_share_neither_documents_nor_searches_nor_sessions(guarded: Service, kind: str) -> None:
    with client(guarded, "ann", SCOPES) as ann, client(guarded, "bob", SCOPES) as bob:
        upload(ann, "vault.md", f"# Vault\n\n{SECRET}")
        session_id = f"of-ann-{kind}"
        for _ in range(2):
            assert SECRET in run(ann, kind, SECRET_QUESTION, session_id=session_id, user_id="bob").json()["content"]
        answers = [run(bob, kind, SECRET_QUESTION), run(bob, kind, SECRET_QUESTION, user_id="ann")]
        answers += [run(bob, kind, SECRET_QUESTION, session_id=session_id, user_id="ann")]
        answers += [bob.get(f"/sessions/{session_id}/runs", params={"user_id": "ann"})]
        assert [answer.status_code for answer in answers] == [200, 200, 404, 404]
        streamed = json.dumps(stream(bob, kind, SECRET_QUESTION, user_id="ann"))
        assert "persimmon" not in "".join(answer.text for answer in answers) + streamed
        assert len([one for one in ann.get(f"/sessions/{session_id}/runs").json() if not one.get("parent_run_id")]) == 2


@both
def test_without_the_scope_nobody_runs_it(guarded: Service, kind: str) -> None:
    with client(guarded) as nobody, client(guarded, "ann", ["agents:run", "sessions:read"]) as reader:
        assert (run(nobody, kind).status_code, run(reader, kind).status_code) == (401, 403)


# --- parts that fail, and a restart ---


class Parts:
    """A service whose Milvus and chat model can be killed; its embedder is another server."""

    def __init__(self, found: Service, milvus: LiteServer, model: OfflineServer) -> None:
        self.service, self.milvus, self.model = found, milvus, model

    def restart_model(self) -> None:
        port = int(self.model.base_url.rpartition(":")[2].partition("/")[0])
        self.model = offline.start(self.model.process.log_file, port, self.model.api_key)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("parts")
    with lite_server(folder / "milvus", progress=False) as milvus:
        model = offline.start(folder / "model.log")
        settings = {"MILVUS_URI": milvus.uri, "MILVUS_TIMEOUT": "1", "EMBEDDING_ID": ""}
        with running(folder / "service", model_environment(model), settings) as found:
            made = Parts(found, milvus, model)
            with client(found) as api:
                upload(api, "canteen.md", CANTEEN)
            yield made
        made.model.process.stop()


def is_ready(api: httpx.Client) -> bool:
    return api.get("/ready").status_code == 200


@both
def test_a_dead_model_fails_every_run_until_it_is_back(parts: Parts, kind: str) -> None:
    session_id = f"dead-model-{kind}"
    with client(parts.service) as api:
        parts.model.process.kill()
        api.headers["Origin"] = "https://os.agno.com"
        try:
            answer = run(api, kind, session_id=session_id, user_id="ann")
            assert answer.headers["access-control-allow-origin"] == "https://os.agno.com", "a browser may read why"
            body = answer.json()
            assert (answer.status_code, body["status"]) == (502, "ERROR") and body["content"]
            assert (body["session_id"], body["user_id"]) == (session_id, "ann") and body["run_id"]
            name, event = stream(api, kind)[-1]
            assert name == f"{LAST[kind]}Error" and (event.get("content") or event.get("error"))
            assert background(api, kind, f"{session_id}-2")["status"] == "ERROR"
        finally:
            parts.restart_model()
        assert run(api, kind).json()["content"] == ANSWER
        stored = api.get(f"/sessions/{session_id}/runs", params={"user_id": "ann"}).json()
        assert [(one["run_id"], one["status"]) for one in stored] == [(body["run_id"], "ERROR")]
    (line,) = log_lines(parts.service, 1, session_id=session_id)
    assert (line["level"], line["status"], line["http_status"], line["user_id"]) == ("error", "ERROR", 502, "ann")
    assert line["run_id"] == body["run_id"] and line["error"]


@both
def test_a_dead_milvus_fails_every_run_until_it_is_back(parts: Parts, kind: str) -> None:
    session_id = f"dead-milvus-{kind}"
    with client(parts.service) as api:
        parts.milvus.kill()
        try:
            answer = run(api, kind, session_id=session_id)
            assert (answer.status_code, answer.json()["status"]) == (503, "ERROR")
            assert answer.json()["content"].startswith("The knowledge base could not be searched.")
            name, event = stream(api, kind)[-1]
            assert name == f"{LAST[kind]}Error" and "knowledge base" in (event.get("content") or event["error"])
            assert background(api, kind, f"{session_id}-2")["status"] == "ERROR"
        finally:
            parts.milvus.restart()
        assert wait_for(lambda: is_ready(api))
        assert run(api, kind).json()["content"] == ANSWER, "the failure was not kept"
    streamed = log_lines(parts.service, 1, http_status=200, status="ERROR", kind=kind.removesuffix("s"))
    assert "knowledge base" in streamed[-1]["error"], "a stream's failure is in the log, too"


def test_others_are_answered_while_milvus_is_waited_for(parts: Parts) -> None:
    asked = [(path, {"data": {"message": QUESTION, "stream": "false"}}) for path in PLACES.values()] * 5
    parts.milvus.kill()
    try:
        codes, others = asyncio.run(answered_meanwhile(parts.service.url, asked))
    finally:
        parts.milvus.restart()
    assert codes == [503] * 10 and others >= MANY
    with client(parts.service) as api:
        assert wait_for(lambda: is_ready(api))


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_sessions_are_there_after_a_restart_and_the_team_remembers(parts: Parts) -> None:
    with client(parts.service) as api:
        before = {kind: run(api, kind, session_id=f"kept-{kind}").json() for kind in PLACES}
    parts.service.restart()
    with client(parts.service) as api:
        for kind, body in before.items():
            stored = {one["run_id"]: one for one in api.get(f"/sessions/kept-{kind}/runs").json()}[body["run_id"]]
            assert (stored["status"], stored["content"]) == ("COMPLETED", ANSWER)
            assert run(api, kind, session_id=f"kept-{kind}").json()["content"] == ANSWER
        asked = run(api, "teams", "What did I ask?", session_id="kept-teams").json()
        assert any(message.get("from_history") and message["content"] == QUESTION for message in asked["messages"])


# --- a member that fails ---


def test_a_team_whose_member_fails_has_failed(closed_port: int) -> None:
    """The leader's model answers, the writer's does not: without the hook the run completes."""
    dead = OpenAILike(id="none", base_url=f"http://127.0.0.1:{closed_port}/v1", api_key="none", max_retries=0)

    def ask(hooks: list[Any]) -> Any:
        members: list[Agent | Team] = [
            Agent(id="analyst", name="Analyst", model=models.chat_model(), telemetry=False),
            Agent(id="writer", name="Writer", model=dead, telemetry=False),
        ]
        team = Team(model=models.chat_model(), members=members, post_hooks=hooks, telemetry=False)
        return team.run("Which port does Milvus listen on?")

    assert ask([]).status is RunStatus.completed
    failed = ask([require_members])
    assert failed.status is RunStatus.error
    assert failed.content == "The member writer of the team failed. Connection error."
