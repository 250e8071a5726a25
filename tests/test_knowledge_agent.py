"""The knowledge assistant as a service, over real HTTP: who may do what, what is refused, what fails, what is kept."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import schemathesis
from conftest import model_environment
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from service_runs import background_run, stream_run
from waiting import MANY, answered_meanwhile

from utils import offline
from utils.milvus_lab import lite_server
from utils.milvus_lab.lite import LiteServer
from utils.offline import OfflineServer
from utils.service import Service, service

KEY = "a-key-that-only-the-tests-know-0123456789"
RUNS = "/agents/knowledge-assistant/runs"
PUBLIC = {"/", "/health", "/info", "/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
USER = ["agents:run", "agents:read", "sessions:read", "sessions:write", "sessions:delete"]
USER += ["knowledge:read", "knowledge:write", "knowledge:delete", "memories:read", "memories:write", "memories:delete"]


@contextmanager
def running(folder: Path, *environments: dict[str, str]) -> Iterator[Service]:
    merged = {name: value for environment in environments for name, value in environment.items()}
    with service(folder, {"LOG_LEVEL": "INFO", **merged}, progress=False) as found:
        yield found


def client(found: Service, headers: dict[str, str] | None = None) -> httpx.Client:
    return httpx.Client(base_url=found.url, timeout=60, trust_env=False, headers=headers or {})


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def token(user: str, scopes: list[str], key: str = KEY, algorithm: str | None = "HS256", **claims: Any) -> str:
    body = {"sub": user, "aud": "knowledge-agent", "scopes": scopes, "exp": int(time.time()) + 600, **claims}
    return jwt.encode(body, key if algorithm else "", algorithm or "none")


def indexed(api: httpx.Client, name: str, content: str | bytes, **fields: str) -> dict[str, Any]:
    """Upload a file and wait for its last status."""
    answer = api.post("/knowledge/content", files={"file": (name, content)}, data=fields)
    assert answer.status_code == 202, answer.text
    return last_status(api, answer.json()["id"])


def last_status(api: httpx.Client, content_id: str, seconds: float = 30) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (found := api.get(f"/knowledge/content/{content_id}/status").json()).get("status") == "processing":
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return dict(found)


def search(api: httpx.Client, query: str, **options: Any) -> list[str]:
    answer = api.post("/knowledge/search", json={"query": query, **options})
    assert answer.status_code == 200, answer.text
    return [document["content"] for document in answer.json()["data"]]


def run(api: httpx.Client, message: str, **fields: str) -> httpx.Response:
    return api.post(RUNS, data={"message": message, "stream": "false", **fields})


def stream(api: httpx.Client, message: str, **fields: str) -> list[tuple[str, dict[str, Any]]]:
    return stream_run(api, RUNS, message, **fields)


def background(api: httpx.Client, message: str, session_id: str, **fields: str) -> dict[str, Any]:
    return background_run(api, RUNS, message, session_id, **fields)


def log_lines(found: Service) -> list[dict[str, Any]]:
    """Each line of the log; one that is no JSON fails the test."""
    return [json.loads(line) for line in found.log_file.read_text(encoding="utf-8").splitlines()]


def lines_with(found: Service, count: int, **wanted: Any) -> list[dict[str, Any]]:
    """The log lines that hold these values, once there are `count` of them: they come a moment after the answer."""
    end = time.monotonic() + 10
    while True:
        lines = [line for line in log_lines(found) if wanted.items() <= line.items()]
        if len(lines) >= count or time.monotonic() > end:
            return lines
        time.sleep(0.05)


def operations(api: httpx.Client) -> list[tuple[str, str]]:
    paths = api.get("/openapi.json").json()["paths"]
    return [(method.upper(), re.sub(r"{\w+}", "x", path)) for path, methods in paths.items() for method in methods]


# --- a service without a key ---


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, offline_environment: dict[str, str]) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("open"), offline_environment, {"UPLOAD_LIMIT_MB": "1"}) as found:
        yield found


@pytest.fixture
def api(opened: Service) -> Iterator[httpx.Client]:
    with client(opened) as made:
        yield made
        assert made.get("/ready").status_code == 200, "whatever was refused, the service goes on"


def pdf(text: str) -> bytes:
    """A PDF of one page with one line of text."""
    writer = PdfWriter()
    page = writer.add_blank_page(300, 200)
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1")})
    font[NameObject("/BaseFont")] = NameObject("/Helvetica")
    fonts = DictionaryObject({NameObject("/F1"): font})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    content = DecodedStreamObject()
    content.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode("latin-1"))
    page[NameObject("/Contents")] = content
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "question"),
    [
        ("canteen.md", b"# Canteen\n\nThe canteen closes at 14:30 on Fridays.", "When does the canteen close?"),
        ("gym.txt", "The gym of Köln opens at 7:15 in the morning.".encode(), "When does the gym open?"),
        ("mark.txt", "\ufeffThe library lends 12 books a month.".encode(), "How many books does the library lend?"),
        ("towns.csv", b"town,visitors\nTromso,41234\nBergen,80765\n", "Tromso visitors"),
        ("parking.PDF", pdf("The parking garage has 4321 places."), "How many places has the parking garage?"),
        ("größe 数据 \u202f1.md", b"# Sizes\n\nThe tank holds 777 litres.", "How much does the tank hold?"),
        ("../../outside.md", b"# Path\n\nThe ladder is 19 metres long.", "How long is the ladder?"),
        ("n" * 251 + ".txt", b"The tower has 55 floors.", "How many floors has the tower?"),
    ],
    ids=["md", "txt", "byte order mark", "csv", "pdf", "Unicode", "path", "255 characters"],
)
def test_what_may_be_uploaded_is_found(api: httpx.Client, name: str, content: bytes, question: str) -> None:
    number = re.search(r"[\d:]{2,}", content.decode("utf-8", "replace") if not name.endswith("PDF") else "4321")
    assert number
    found = indexed(api, name, content)
    assert found["status"] == "completed", found
    assert number[0] in search(api, question)[0]
    assert api.get(f"/knowledge/content/{found['id']}").json()["name"] == name


def test_a_text_with_a_name_is_found(api: httpx.Client) -> None:
    answer = api.post("/knowledge/content", data={"name": "gate", "text_content": "The gate is painted violet."})
    assert last_status(api, answer.json()["id"])["status"] == "completed"
    assert search(api, "What colour is the gate?")[0] == "The gate is painted violet."


FILE = ("a.txt", b"text")
REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "too large": (413, {"files": {"file": ("a.txt", b"a" * 2**20)}}),
    "type": (415, {"files": {"file": ("a.exe", b"text")}}),
    "no type": (415, {"files": {"file": ("a", b"text")}}),
    "two endings": (415, {"files": {"file": ("a.md.exe", b"text")}}),
    "a web page": (415, {"files": {"file": ("a.html", b"<p>text")}}),
    "no PDF": (415, {"files": {"file": ("a.pdf", b"text")}}),
    "NUL": (415, {"files": {"file": ("a.txt", b"a\0b")}}),
    "Latin-1": (415, {"files": {"file": ("a.txt", "größe".encode("latin-1"))}}),
    "UTF-16": (415, {"files": {"file": ("a.txt", "größe".encode("utf-16"))}}),
    "empty": (422, {"files": {"file": ("a.txt", b"")}}),
    "only space": (422, {"files": {"file": ("a.txt", b" \n\t ")}}),
    "long name": (422, {"files": {"file": ("n" * 252 + ".txt", b"text")}}),
    "NUL in the name": (422, {"data": {"name": "a\0b", "text_content": "text"}}),
    "no name": (422, {"data": {"text_content": "text"}}),
    "nothing": (400, {"data": {"name": "a"}}),
    "address": (403, {"data": {"url": "http://127.0.0.1:1/"}}),
    "address beside a file": (403, {"data": {"url": "http://127.0.0.1:1/"}, "files": {"file": FILE}}),
    "address as a file": (403, {"files": {"url": ("a.txt", b"http://127.0.0.1:1/")}}),
    "not multipart": (400, {"content": b"text", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}),
    "no boundary": (400, {"content": b"text", "headers": {"Content-Type": "multipart/form-data"}}),
    "JSON": (400, {"json": {"text_content": "text", "name": "a"}}),
    "many fields": (400, {"files": {f"f{number}": (None, "x") for number in range(1001)}}),
    "many files": (400, {"files": [("file", FILE)] * 1001}),
    "metadata": (422, {"data": {"metadata": "[1]"}, "files": {"file": FILE}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_in_one_sentence(api: httpx.Client, name: str) -> None:
    status, request = REFUSED[name]
    answer = api.post("/knowledge/content", **request)
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and detail.endswith(".") and "\n" not in detail and len(detail) < 400


@pytest.mark.parametrize("path", ["/knowledge/content", RUNS, "/memories"])
def test_a_body_that_grows_too_large_is_refused_while_it_comes(opened: Service, api: httpx.Client, path: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(32):
            yield b"a" * 65536

    kind = {"/memories": "application/json"}.get(path, "application/x-www-form-urlencoded")
    answer = api.post(path, content=pieces(), headers={"Content-Type": kind})
    assert answer.status_code == 413 and answer.json()["detail"].startswith("The request is larger than 1 MB")


def test_a_broken_pdf_fails_with_a_message(api: httpx.Client) -> None:
    found = indexed(api, "broken.pdf", b"%PDF-1.4 and then nothing that a reader knows")
    assert found["status"] == "failed" and found["status_message"]


def test_the_client_does_not_choose_how_its_file_is_read(api: httpx.Client) -> None:
    found = indexed(api, "plain.txt", b"The plain text is read as text.", reader_id="website", chunk_size="3")
    assert found["status"] == "completed" and search(api, "plain text")[0] == "The plain text is read as text."
    found = indexed(api, "plain.txt", b"text", reader_id="text", chunker="FixedSizeChunker", chunk_size="0")
    assert found["status"] == "failed" and found["status_message"], "and not unknown: it was accepted"


def test_a_refresh_fetches_nothing(api: httpx.Client) -> None:
    """Agno 3.1.10 would open the file or the address that the caller puts into the metadata of a document."""
    found = indexed(api, "a.txt", b"text")
    source = {"_agno": {"source_url": "http://127.0.0.1:1/a.txt", "reader_id": "website"}}
    api.patch(f"/knowledge/content/{found['id']}", data={"metadata": json.dumps(source)})
    answer = api.post(f"/knowledge/content/{found['id']}/refresh")
    assert answer.status_code == 403 and "does not fetch" in answer.json()["detail"]


def test_an_upload_of_the_same_name_replaces_the_text(api: httpx.Client) -> None:
    long = "".join(f"## Part {number}\n\nThe old pump number {number} is green.\n\n" for number in range(20))
    first = indexed(api, "pump.md", f"# Pump\n\n{long}")
    assert any("green" in text for text in search(api, "colour of the pump"))
    second = indexed(api, "pump.md", "# Pump\n\n## Colour\n\nThe new pump is orange.")
    assert first["id"] == second["id"] and second["status"] == "completed"
    found = search(api, "colour of the pump", max_results=50)
    assert [text for text in found if "pump" in text.lower()] == ["# Pump: Colour\n\nThe new pump is orange."]


def test_one_search_does_not_change_how_the_next_is_made(api: httpx.Client) -> None:
    indexed(api, "crane.txt", b"The crane lifts 6 tonnes.")
    before = search(api, "crane tonnes")
    for kind in ("vector", "keyword", "hybrid", "vector"):
        assert search(api, "crane tonnes", search_type=kind)
        assert search(api, "crane tonnes") == before


def test_a_run_answers_with_its_source_in_all_three_ways(opened: Service, api: httpx.Client) -> None:
    indexed(api, "canteen.md", "# Canteen\n\nThe canteen closes at 14:30 on Fridays.")
    question = "When does the canteen close on Fridays?"
    wanted = "The canteen closes at 14:30 on Fridays. [canteen.md]"
    answer = run(api, question, session_id="ways", user_id="ann")
    assert (answer.status_code, answer.json()["status"], answer.json()["content"]) == (200, "COMPLETED", wanted)
    events = stream(api, question, session_id="ways", user_id="ann")
    assert events[0][0] == "RunStarted" and events[-1][0] == "RunCompleted" and events[-1][1]["content"] == wanted
    polled = background(api, question, "ways", user_id="ann")
    assert (polled["status"], polled["content"]) == ("COMPLETED", wanted)

    plain, streamed, started = lines_with(opened, 3, event="run", session_id="ways")
    for line in (plain, streamed):
        assert line["user_id"] == "ann" and line["status"] == "COMPLETED" and line["http_status"] == 200
        assert line["seconds"] > 0 and line["input_tokens"] > 100 and line["output_tokens"] > 5
    assert plain["run_id"] == answer.json()["run_id"] and streamed["run_id"] == events[0][1]["run_id"]
    assert (started["run_id"], started["status"], started["http_status"]) == (polled["run_id"], "PENDING", 202)


def test_a_request_id_goes_through_to_the_log_lines_of_its_run(opened: Service, api: httpx.Client) -> None:
    answer = api.post(RUNS, data={"message": "Hello?", "stream": "false"}, headers={"X-Request-ID": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    lines = lines_with(opened, 2, request_id="mine-1")
    assert {line["event"] for line in lines} >= {"run", "request"}
    assert {line["run_id"] for line in lines} == {answer.json()["run_id"]}


TOPICS = ["harbour", "bakery", "museum", "stadium", "observatory", "brewery", "lighthouse", "tannery"]


def test_200_runs_at_once_are_all_right_stored_and_not_mixed_up(api: httpx.Client, opened: Service) -> None:
    """Each asks for another fact; half of them share one session."""
    facts = {topic: f"The {topic} was founded in {1700 + number}." for number, topic in enumerate(TOPICS)}
    indexed(api, "founded.md", "# Years\n\n" + "".join(f"## {topic}\n\n{fact}\n\n" for topic, fact in facts.items()))

    async def ask(http: httpx.AsyncClient, number: int) -> tuple[int, httpx.Response]:
        topic, session_id = TOPICS[number % len(TOPICS)], "shared" if number % 2 else f"own-{number}"
        form = {"message": f"In which year was the {topic} founded?", "session_id": session_id, "stream": "false"}
        form["user_id"] = f"user-{session_id}"
        return number, await http.post(RUNS, data=form)

    async def ask_all() -> list[tuple[int, httpx.Response]]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=opened.url, timeout=120, limits=limits, trust_env=False) as http:
            return await asyncio.gather(*(ask(http, number) for number in range(200)))

    shared = set()
    for number, answer in asyncio.run(ask_all()):
        topic = TOPICS[number % len(TOPICS)]
        body = answer.json()
        assert answer.status_code == 200 and body["status"] == "COMPLETED", answer.text
        # In the shared session the history holds the answers to other questions.
        assert facts[topic] in body["content"], (topic, body["content"])
        if number % 2:
            shared.add(body["run_id"])
        else:
            (stored,) = api.get(f"/sessions/own-{number}/runs", params={"user_id": f"user-own-{number}"}).json()
            assert stored["run_id"] == body["run_id"] and facts[topic] in stored["content"]
    stored = api.get("/sessions/shared/runs", params={"user_id": "user-shared"}).json()
    assert {one["run_id"] for one in stored} == shared and len(stored) == len(shared) == 100
    assert {one["status"] for one in stored} == {"COMPLETED"}


# --- one key for everybody ---


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, offline_environment: dict[str, str]) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("keyed"), offline_environment, {"OS_SECURITY_KEY": KEY}) as found:
        yield found


def test_without_the_key_only_the_public_routes_answer(keyed: Service) -> None:
    with client(keyed) as nobody, client(keyed, bearer("wrong")) as stranger:
        every = operations(nobody)
        assert len(every) > 100
        for method, path in [*every, *(("GET", path) for path in sorted(PUBLIC))]:
            for api in (nobody, stranger):
                answer = api.request(method, path)
                assert (answer.status_code != 401) is (path in PUBLIC), (method, path, answer.text)


def test_with_the_key_it_works(keyed: Service) -> None:
    with client(keyed, bearer(KEY)) as api:
        assert indexed(api, "a.md", "# A\n\nThe roof is blue.")["status"] == "completed"
        assert run(api, "Which colour has the roof?", user_id="ann").json()["user_id"] == "ann"
    for wrong in (f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer"):
        with client(keyed, {"Authorization": wrong}) as api:
            assert api.get("/sessions").status_code == 401, wrong


# --- a token for each user ---


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, offline_environment: dict[str, str]) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("guarded"), offline_environment, {"JWT_VERIFICATION_KEY": KEY}) as found:
        yield found


def test_without_a_token_only_the_public_routes_answer(guarded: Service) -> None:
    with client(guarded) as nobody:
        for method, path in [*operations(nobody), *(("GET", path) for path in sorted(PUBLIC))]:
            answer = nobody.request(method, path)
            assert (answer.status_code != 401) is (path in PUBLIC), (method, path, answer.text)


def test_ready_tells_no_secret(guarded: Service, offline_environment: dict[str, str]) -> None:
    with client(guarded) as nobody:
        body = nobody.get("/ready").text
    assert json.loads(body)["status"] == "ready"
    assert KEY not in body and offline_environment["OPENAI_API_KEY"] not in body


RUN_SCOPE = ["agents:knowledge-assistant:run"]


@pytest.mark.parametrize(
    "given",
    [
        "no token",
        token("ann", RUN_SCOPE, exp=int(time.time()) - 60),
        token("ann", RUN_SCOPE, key="another-key-of-the-same-length-0123456789"),
        token("ann", RUN_SCOPE, aud="another-service"),
        token("ann", RUN_SCOPE, algorithm=None),
        token("ann", RUN_SCOPE, key=KEY * 2, algorithm="HS512"),
        token("ann", RUN_SCOPE)[:-4],
        token("ann", ["agent_os:admin"], key="another-key-of-the-same-length-0123456789"),
    ],
    ids=["none", "expired", "other key", "other audience", "alg none", "other algorithm", "cut off", "admin"],
)
def test_a_wrong_token_is_401(guarded: Service, given: str) -> None:
    with client(guarded, bearer(given)) as api:
        assert run(api, "Hello?").status_code == 401


def test_a_right_token_runs_and_one_without_the_scope_is_told_which_it_needs(guarded: Service) -> None:
    with client(guarded, bearer(token("ann", RUN_SCOPE))) as api:
        answer = run(api, "Hello?", user_id="bob")
        assert answer.status_code == 200 and answer.json()["user_id"] == "ann", "a posted user changes nothing"
        listed = api.get("/sessions")
        assert listed.status_code == 403 and "sessions:read" in listed.json()["detail"]
    with client(guarded, bearer(token("ann", ["sessions:read", "agents:another:run"]))) as api:
        refused = run(api, "Hello?")
        assert refused.status_code == 403 and "agents:run" in refused.json()["detail"]
    with client(guarded, bearer(token("", RUN_SCOPE))) as api:
        assert run(api, "Hello?").status_code in (401, 403), "a token names its user"


@pytest.fixture
def ann(guarded: Service) -> Iterator[httpx.Client]:
    with client(guarded, bearer(token("ann", USER))) as api:
        yield api


@pytest.fixture
def bob(guarded: Service) -> Iterator[httpx.Client]:
    with client(guarded, bearer(token("bob", USER))) as api:
        yield api


@pytest.fixture
def admin(guarded: Service) -> Iterator[httpx.Client]:
    with client(guarded, bearer(token("root", ["agent_os:admin"]))) as api:
        yield api


def test_a_session_is_its_users_alone(ann: httpx.Client, bob: httpx.Client) -> None:
    run(ann, "What is written about the vault?", session_id="of-ann")
    before = ann.get("/sessions/of-ann/runs").json()
    assert len(before) == 1 and bob.get("/sessions/of-ann").status_code == 404
    for user in ({}, {"user_id": "ann"}):
        listed = bob.get("/sessions", params={"type": "agent", **user}).json()["data"]
        assert "of-ann" not in [session["session_id"] for session in listed]
        for path in ("/sessions/of-ann", "/sessions/of-ann/runs", f"/sessions/of-ann/runs/{before[0]['run_id']}"):
            assert bob.get(path, params=user).status_code == 404
        renamed = bob.post("/sessions/of-ann/rename", params=user, json={"session_name": "mine"})
        assert renamed.status_code == 404
        bob.delete("/sessions/of-ann", params=user)
        bob.request("DELETE", "/sessions", params=user, json={"session_ids": ["of-ann"], "session_types": ["agent"]})
        assert run(bob, "And what did I ask?", session_id="of-ann", **user).status_code == 404
        assert bob.get(f"{RUNS}/{before[0]['run_id']}", params={"session_id": "of-ann", **user}).status_code == 404
    assert ann.get("/sessions/of-ann/runs").json() == before
    assert ann.get("/sessions/of-ann").json()["session_name"] != "mine"


SECRET, QUESTION = "The vault of Ann opens with the word persimmon.", "What is the word of the vault of Ann?"
HOSTILE: list[Any] = [
    {"topic": 'x" or user_id != "'},
    {"topic": 'x\\" or user_id != \\"'},
    {"topic": 'x"} or user_id != "" or meta_data["a'},
    {'a"] == "" or user_id != "" or meta_data["a': "x"},
    {"user_id": "ann"},
    {"user_id": ["ann", ""]},
    {"topic": {"$ne": "x"}},
    [{"op": "OR", "conditions": [{"op": "EQ", "key": "user_id", "value": "ann"}]}],
    [{"op": "NOT", "condition": {"op": "EQ", "key": "topic", "value": "x"}}],
]


@pytest.fixture
def secret_id(ann: httpx.Client, admin: httpx.Client) -> str:
    """The id of Ann's own document; one that an admin uploaded is there for all."""
    indexed(admin, "shared.md", "# Canteen\n\nThe canteen closes at 14:30 on Fridays.")
    return str(indexed(ann, "secret.md", f"# Vault\n\n{SECRET}")["id"])


def test_what_a_user_uploads_is_found_by_nobody_else(
    ann: httpx.Client, bob: httpx.Client, admin: httpx.Client, secret_id: str
) -> None:
    assert SECRET in search(ann, QUESTION)[0] and SECRET in run(ann, QUESTION).json()["content"]
    for text in ("".join(search(bob, QUESTION, max_results=50)), run(bob, QUESTION).text):
        assert "persimmon" not in text
    for api in (ann, bob, admin):
        assert "canteen closes at 14:30" in search(api, "When does the canteen close?")[0]
    assert "14:30" in run(bob, "When does the canteen close on Fridays?").json()["content"]
    names = {
        who: {row["name"] for row in api.get("/knowledge/content").json()["data"]}
        for who, api in (("ann", ann), ("bob", bob), ("admin", admin))
    }
    assert names == {"ann": {"secret.md", "shared.md"}, "bob": {"shared.md"}, "admin": {"secret.md", "shared.md"}}
    for path in (f"/knowledge/content/{secret_id}", f"/knowledge/content/{secret_id}/status"):
        assert bob.get(path).status_code == 404 and ann.get(path).status_code == 200


def test_a_user_changes_and_deletes_only_what_is_theirs(
    ann: httpx.Client, bob: httpx.Client, admin: httpx.Client, secret_id: str
) -> None:
    shared = next(row["id"] for row in bob.get("/knowledge/content").json()["data"] if row["name"] == "shared.md")
    for content_id, status in ((secret_id, 404), (shared, 403)):
        assert bob.patch(f"/knowledge/content/{content_id}", data={"name": "mine"}).status_code == status
        assert bob.delete(f"/knowledge/content/{content_id}").status_code == status
    assert bob.delete("/knowledge/content").status_code == 200
    own = indexed(bob, "secret.md", "# Vault\n\nThe vault of Bob is empty.")
    assert own["id"] != secret_id and SECRET in search(ann, QUESTION)[0], "the same name, but of another user"
    assert {row["name"] for row in admin.get("/knowledge/content").json()["data"]} >= {"secret.md", "shared.md"}


@pytest.mark.parametrize("hostile", HOSTILE, ids=[json.dumps(hostile)[:40] for hostile in HOSTILE])
def test_a_hostile_filter_finds_nothing_of_others(bob: httpx.Client, secret_id: str, hostile: Any) -> None:
    answers = [
        bob.post("/knowledge/search", json={"query": QUESTION, "filters": hostile}),
        run(bob, QUESTION, knowledge_filters=json.dumps(hostile)),
        run(bob, QUESTION, dependencies=json.dumps({"user_id": "ann"}), user_id="ann"),
    ]
    for answer in answers:
        assert "persimmon" not in answer.text and answer.status_code < 500, answer.text


def test_memories_are_their_users_alone(ann: httpx.Client, bob: httpx.Client) -> None:
    made = ann.post("/memories", json={"memory": "Ann drinks tea.", "topics": ["drinks"], "user_id": "bob"}).json()
    path = f"/memories/{made['memory_id']}"
    assert made["user_id"] == "ann"
    for user in ({}, {"user_id": "ann"}):
        assert bob.get("/memories", params=user).json()["data"] == []
        assert bob.get(path, params=user).status_code == 404
        assert bob.patch(path, params=user, json={"memory": "Ann drinks rum.", **user}).status_code == 404
        bob.delete(path, params=user)
        bob.request("DELETE", "/memories", params=user, json={"memory_ids": [made["memory_id"]], **user})
    (kept,) = ann.get("/memories").json()["data"]
    assert kept["memory"] == "Ann drinks tea."
    assert ann.patch(path, json={"memory": "Ann drinks coffee."}).json()["memory"] == "Ann drinks coffee."
    ann.delete(path)
    assert ann.get("/memories").json()["data"] == []


# --- parts that fail ---


class Parts:
    """A service whose model server and Milvus can be killed and started again at the same address."""

    def __init__(self, found: Service, milvus: LiteServer, model: OfflineServer) -> None:
        self.service, self.milvus, self.model = found, milvus, model

    def restart_model(self) -> None:
        port = int(self.model.base_url.rpartition(":")[2].partition("/")[0])
        self.model = offline.start(self.model.process.log_file, port, self.model.api_key)

    def failed(self, api: httpx.Client) -> dict[str, str]:
        """What /ready says of each part that fails."""
        time.sleep(2.1)  # the answer of a moment ago is kept for 2 seconds
        answer = api.get("/ready")
        checks = {name: check["error"] for name, check in answer.json()["checks"].items() if not check["ok"]}
        assert answer.status_code == (503 if checks else 200)
        return checks

    def wait_until_ready(self, api: httpx.Client) -> None:
        end = time.monotonic() + 30
        while api.get("/ready").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("parts")
    with lite_server(folder / "milvus", progress=False) as milvus:
        model = offline.start(folder / "model.log")
        settings = {"MILVUS_URI": milvus.uri, "MILVUS_TIMEOUT": "2"}
        with running(folder / "service", model_environment(model), settings) as found:
            made = Parts(found, milvus, model)
            with client(found) as api:
                assert indexed(api, "canteen.md", "# Canteen\n\nThe canteen closes at 14:30.")["status"] == "completed"
            yield made
        made.model.process.stop()


def test_a_dead_model_fails_every_run_and_upload_until_it_is_back(parts: Parts) -> None:
    question = "When does the canteen close?"
    with client(parts.service) as api:
        parts.model.process.kill()
        failed = parts.failed(api)
        assert list(failed) == ["model"] and parts.model.base_url in failed["model"], failed

        answer = run(api, question, session_id="dead-model", user_id="ann")
        assert (answer.status_code, answer.json()["status"]) == (502, "ERROR") and answer.json()["content"]
        name, body = stream(api, question)[-1]
        assert name == "RunError" and body["content"]
        assert background(api, question, "dead-model-2")["status"] == "ERROR"
        found = indexed(api, "canteen.md", "# Canteen\n\nThe canteen closes at 15:00.")
        assert found["status"] == "failed" and "upload it again" in found["status_message"]
        answer = api.post("/knowledge/search", json={"query": question})
        assert answer.status_code == 503 and "embedder" in answer.json()["detail"], "and not nothing found"

        parts.restart_model()
        parts.wait_until_ready(api)
        assert "14:30" in run(api, question).json()["content"], "the upload that failed took nothing away"
        assert indexed(api, "canteen.md", "# Canteen\n\nThe canteen closes at 14:30.")["status"] == "completed"
    (line,) = lines_with(parts.service, 1, event="run", session_id="dead-model")
    assert (line["level"], line["status"], line["http_status"], line["user_id"]) == ("error", "ERROR", 502, "ann")
    assert line["error"]


def test_a_dead_milvus_fails_every_search_and_upload_until_it_is_back(parts: Parts) -> None:
    question = "When does the canteen close?"
    with client(parts.service) as api:
        parts.milvus.kill()
        failed = parts.failed(api)
        assert list(failed) == ["milvus"] and "Milvus" in failed["milvus"], failed

        answer = run(api, question)
        assert (answer.status_code, answer.json()["status"]) == (503, "ERROR")
        assert answer.json()["content"].startswith("The knowledge base could not be searched.")
        name, body = stream(api, question)[-1]
        assert name == "RunError" and "knowledge base" in body["content"]
        assert background(api, question, "dead-milvus")["status"] == "ERROR"
        found = indexed(api, "late.md", "# Late\n\nThe pool opens at 9:15.")
        assert found["status"] == "failed" and "Milvus" in found["status_message"], found
        content_id = api.get("/knowledge/content").json()["data"][0]["id"]
        for method, path, json_body in (
            ("POST", "/knowledge/search", {"query": question}),
            ("DELETE", f"/knowledge/content/{content_id}", None),
        ):
            answer = api.request(method, path, json=json_body)
            assert answer.status_code == 503 and parts.milvus.uri in answer.json()["detail"], answer.text
        assert api.get("/health").status_code == 200 and api.get("/sessions").status_code == 200

        parts.milvus.restart()
        parts.wait_until_ready(api)
        assert "14:30" in run(api, question).json()["content"]
        assert indexed(api, "late.md", "# Late\n\nThe pool opens at 9:15.")["status"] == "completed"
        assert "9:15" in search(api, "When does the pool open?")[0]


def test_requests_are_answered_while_milvus_is_waited_for(parts: Parts) -> None:
    """Nothing that waits for Milvus may hold up the event loop, and with it everybody else."""
    asked: list[tuple[str, dict[str, Any]]] = [
        (RUNS, {"data": {"message": "When does it close?", "stream": "false"}})
    ] * 10
    asked.append(("/knowledge/search", {"json": {"query": "canteen"}}))
    parts.milvus.kill()
    try:
        codes, others = asyncio.run(answered_meanwhile(parts.service.url, asked))
    finally:
        parts.milvus.restart()
    assert codes == [503] * 11 and others >= MANY
    with client(parts.service) as api:
        parts.wait_until_ready(api)


def test_the_log_is_json_and_holds_no_secret(
    opened: Service, keyed: Service, guarded: Service, parts: Parts, offline_environment: dict[str, str]
) -> None:
    secrets = [KEY, offline_environment["OPENAI_API_KEY"], parts.model.api_key, "eyJhbGciOi"]
    for found in (opened, keyed, guarded, parts.service):
        assert all("event" in line and "level" in line and "timestamp" in line for line in log_lines(found))
        text = found.log_file.read_text(encoding="utf-8")
        assert [secret for secret in secrets if secret in text] == []


# --- whatever a client may send ---

# Operations of Agno 3.1.10 that answer 500 to input that is the caller's mistake.
AGNO_FAILS = {
    # An empty session_id raises a plain Exception("No session_id provided").
    "GET /agents/{agent_id}/runs",
    "GET /agents/{agent_id}/runs/{run_id}",
    "GET /agents/{agent_id}/runs/{run_id}/checkpoints",
    "GET /agents/{agent_id}/runs/{run_id}/checkpoints/{message_index}",
    # `limit` and `page` have no upper bound, and SQLite none of these integers; page 0 of the statistics is a 500.
    "GET /sessions",
    "GET /memories",
    "GET /user_memory_stats",
    # A summary of any shape goes to a constructor as keyword arguments.
    "PATCH /sessions/{session_id}",
    # `sort_by` is looked up as an attribute of the table.
    "GET /knowledge/content",
    # Metadata that is JSON but no object fails in a model that is made by hand.
    "PATCH /knowledge/content/{content_id}",
    # A search_type that does not exist.
    "POST /knowledge/search",
}
EXAMPLES = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_nothing_that_a_client_sends_is_a_server_error(opened: Service, api: httpx.Client) -> None:
    """Requests made from the service's own description, right ones and wrong ones."""
    known = {
        "agent_id": "knowledge-assistant",
        "session_id": run(api, "Hello?").json()["session_id"],
        "content_id": indexed(api, "known.txt", b"text")["id"],
        "memory_id": api.post("/memories", json={"memory": "a", "user_id": "ann"}).json()["memory_id"],
    }
    schema = schemathesis.openapi.from_url(f"{opened.url}/openapi.json")
    asked, failed = set(), []
    included = schema.include(path_regex="^/(ready|agents|knowledge|sessions|memories|memory_topics|user_memory_stats)")
    for found in included.get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]

        def check(case: schemathesis.Case[Any]) -> None:
            asked.add(case.operation.label)
            if case.method != "DELETE":  # what is deleted would be unknown to the operations that follow
                case.path_parameters |= {name: known[name] for name in case.path_parameters if name in known}
            answer = case.call(timeout=120)
            if answer.status_code >= 500 and answer.status_code not in (502, 503):
                failed.append((case.operation.label, answer.status_code, answer.text[:200], case.as_curl_command()))

        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):  # there is no wrong request without a parameter
                EXAMPLES(given(case=operation.as_strategy(generation_mode=mode))(check))()
    assert len(asked) >= 45 and asked >= AGNO_FAILS
    assert [failure for failure in failed if failure[0] not in AGNO_FAILS] == []
