"""Which model answers: every way a model server can be wrong is one sentence, and a compatible server really works."""

from __future__ import annotations

import base64
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import psutil
import pytest
from agno.agent import Agent
from agno.knowledge.document.base import Document
from agno.models.openai import OpenAIChat, OpenAILike
from agno.run.base import RunStatus
from dotenv import dotenv_values
from openai import OpenAI

from utils import models
from utils.bootstrap import ROOT
from utils.models import ModelError, Models, connect
from utils.offline import CHAT_MODEL, DIMENSIONS, EMBEDDING_MODEL, RERANK_MODEL
from utils.settings import Settings, SettingsError

Reply = tuple[int, str, str]


class ModelServer(ThreadingHTTPServer):
    """A small real server: `replies` says what a route answers; `seen` collects path, Authorization header and body."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = replies
        self.seen: list[tuple[str, str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, ModelServer)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.server.seen.append((self.path, self.headers.get("Authorization", ""), body))
        status, kind, text = self.server.replies.get(self.path, (404, "application/json", "{}"))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., ModelServer]]:
    running: list[ModelServer] = []

    def start(models_reply: Reply, embeddings_reply: Reply | None = None) -> ModelServer:
        replies = {"/v1/models": models_reply}
        if embeddings_reply:
            replies["/v1/embeddings"] = embeddings_reply
        running.append(ModelServer(replies))
        threading.Thread(target=running[-1].serve_forever, args=(0.05,), daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def listing(*names: str) -> Reply:
    data = [{"id": name, "object": "model", "created": 1, "owned_by": "test"} for name in names]
    return 200, "application/json", json.dumps({"object": "list", "data": data})


def compatible(url: str, **fields: str) -> Settings:
    return Settings(provider="compatible", base_url=url, **fields)  # type: ignore[arg-type]


def offline_as_compatible(found: Models, **fields: str) -> Settings:
    return compatible(found.chat.base_url, **({"api_key": found.chat.api_key} | fields))


def sentence(settings: Settings) -> str:
    with pytest.raises(ModelError) as error:
        connect(settings)
    assert "\n" not in str(error.value) and str(error.value).endswith((".", "?"))
    return str(error.value)


def test_offline_needs_no_setting(offline_models: Models) -> None:
    assert (offline_models.chat.provider, offline_models.chat.model_id) == ("offline", CHAT_MODEL)
    assert (offline_models.embedding.model_id, offline_models.dimensions) == (EMBEDDING_MODEL, DIMENSIONS)
    assert offline_models.chat.base_url.startswith("http://127.0.0.1:")
    assert str(offline_models.chat) == f"{CHAT_MODEL} (offline)"
    assert connect(Settings(milvus_token="other")).chat == offline_models.chat, "one server for the process"


def test_keys_are_not_shown(offline_models: Models) -> None:
    assert len(offline_models.chat.api_key) > 20
    assert offline_models.chat.api_key not in f"{offline_models!r} {models.reranker()!r}"


def test_nothing_listens(closed_port: int) -> None:
    said = sentence(compatible(f"http://127.0.0.1:{closed_port}/v1"))
    assert f"No model server answers at http://127.0.0.1:{closed_port}/v1" in said
    assert "OPENAI_BASE_URL" in said and "MODEL_PROVIDER=offline" in said


def test_wrong_key_at_a_real_server(offline_models: Models) -> None:
    said = sentence(offline_as_compatible(offline_models, api_key="wrong-key", model_id=CHAT_MODEL))
    assert "refuses the key in OPENAI_API_KEY" in said and "wrong-key" not in said


def test_a_server_without_key_is_sent_a_harmless_one(serve: Callable[..., ModelServer]) -> None:
    server = serve(listing("only"))
    assert connect(compatible(server.url)).chat.api_key == "none"
    assert [(path, key) for path, key, _ in server.seen] == [("/v1/models", "Bearer none")]


@pytest.mark.parametrize(
    "reply",
    [
        (200, "text/html", "<html>A router's login page</html>"),
        (404, "text/html", "<html>Not here</html>"),
        (200, "application/json", "not JSON"),
        (200, "application/json", "[]"),
        (200, "application/json", '{"data": "abc"}'),
        (200, "application/json", '{"data": [{"id": null}, {"id": "b"}]}'),
        (403, "application/json", "{}"),
        (500, "application/json", '{"error": {"message": "broken"}}'),
    ],
)
def test_a_server_that_does_not_speak_the_api(serve: Callable[..., ModelServer], reply: Reply) -> None:
    url = serve(reply).url
    said = sentence(compatible(url, model_id="any"))
    assert said.startswith(f"The model server at {url} does not list its models (") and "/v1?" in said


def test_an_unknown_model_lists_what_the_server_knows(serve: Callable[..., ModelServer]) -> None:
    url = serve(listing("llama", "mistral")).url
    assert sentence(compatible(url, model_id="lama")) == (
        f"The model server at {url} does not know the model 'lama'; set MODEL_ID to one of: llama, mistral."
    )
    said = sentence(compatible(url, model_id="llama", embedding_id="bge"))
    assert "'bge'; set EMBEDDING_ID to one of: llama, mistral." in said


def test_several_models_must_be_chosen_from(serve: Callable[..., ModelServer]) -> None:
    said = sentence(compatible(serve(listing(*(f"m{i:02}" for i in range(20)))).url))
    assert "has several models; set MODEL_ID to one of: m00, m01," in said
    assert said.endswith("m11, ....")


def test_a_server_without_models(serve: Callable[..., ModelServer]) -> None:
    assert "lists no model" in sentence(compatible(serve(listing()).url))


def test_the_only_model_is_chosen_and_the_offline_embedder_used(
    serve: Callable[..., ModelServer], offline_models: Models
) -> None:
    server = serve(listing("only"))
    found = connect(compatible(server.url))
    assert (found.chat.model_id, found.chat.base_url, found.chat.provider) == ("only", server.url, "compatible")
    assert (found.embedding, found.dimensions) == (offline_models.embedding, DIMENSIONS)


def test_the_length_of_vectors_is_measured(serve: Callable[..., ModelServer]) -> None:
    vector = base64.b64encode(np.ones(7, "<f4").tobytes()).decode()
    data = [{"object": "embedding", "index": 0, "embedding": vector}]
    body = json.dumps({"object": "list", "data": data, "model": "e", "usage": {"prompt_tokens": 1, "total_tokens": 1}})
    settings = compatible(serve(listing("m", "e"), (200, "application/json", body)).url, model_id="m", embedding_id="e")
    assert connect(settings).dimensions == 7
    assert models.embedder(settings).dimensions == 7


@pytest.mark.parametrize("body", ["{}", '{"data": [{"index": 0}]}', '{"data": []}', "[]", "not JSON"])
def test_a_server_that_lists_but_does_not_embed(serve: Callable[..., ModelServer], body: str) -> None:
    url = serve(listing("m"), (200, "application/json", body)).url
    said = sentence(compatible(url, model_id="m", embedding_id="m"))
    assert f"The model server at {url} does not embed text with 'm'" in said and "EMBEDDING_ID" in said


def test_a_chat_model_is_refused_as_embedder(offline_models: Models) -> None:
    said = sentence(offline_as_compatible(offline_models, model_id=CHAT_MODEL, embedding_id=CHAT_MODEL))
    assert f"does not embed text with '{CHAT_MODEL}' (NotFoundError)" in said


def test_the_offline_server_works_as_a_compatible_one(offline_models: Models) -> None:
    settings = offline_as_compatible(offline_models, model_id=CHAT_MODEL, embedding_id=EMBEDDING_MODEL)
    model = models.chat_model(settings, temperature=0.5)
    assert isinstance(model, OpenAILike) and model.temperature == 0.5

    def retrieve(query: str, **_: Any) -> list[dict[Any, Any] | str] | None:
        return [{"name": "ports", "content": "Milvus listens on port 19530. It also has a web page."}]

    agent = Agent(model=model, knowledge_retriever=retrieve, search_knowledge=True, telemetry=False)
    run = agent.run("Which port does Milvus listen on?")
    assert run.status == RunStatus.completed
    assert "19530" in str(run.content) and "[ports]" in str(run.content)
    embedder = models.embedder(settings)
    assert embedder.dimensions == DIMENSIONS
    vector = np.array(embedder.get_embedding("a test"))
    assert vector.shape == (DIMENSIONS,) and np.isclose(np.linalg.norm(vector), 1, atol=1e-3)


def test_openai_gets_its_own_kind_of_model(serve: Callable[..., ModelServer]) -> None:
    settings = Settings(provider="openai", base_url=serve(listing("gpt")).url, api_key="k", model_id="gpt")
    model = models.chat_model(settings)
    assert type(model) is OpenAIChat and (model.id, model.api_key) == ("gpt", "k")


def test_the_environment_for_other_programs(offline_models: Models) -> None:
    assert models.client_environment(Settings()) == {
        "OPENAI_BASE_URL": offline_models.chat.base_url,
        "OPENAI_API_KEY": offline_models.chat.api_key,
        "MODEL_ID": CHAT_MODEL,
        "EMBEDDING_BASE_URL": offline_models.embedding.base_url,
        "EMBEDDING_API_KEY": offline_models.embedding.api_key,
        "EMBEDDING_ID": EMBEDDING_MODEL,
        "EMBEDDING_DIMENSIONS": str(DIMENSIONS),
    }


def test_settings_of_the_environment_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PROVIDER", "compatible")
    for build in (models.chat_model, models.embedder, models.client_environment):
        with pytest.raises(SettingsError, match="OPENAI_BASE_URL"):
            build()


def test_reranker_orders_and_scores() -> None:
    texts = ["Bread is baked at 230 degrees.", "Milvus listens on port 19530.", "A port is a place where ships lie."]
    documents = [Document(content=text, name=str(number)) for number, text in enumerate(texts)]
    reranker = models.reranker()
    assert reranker.model == RERANK_MODEL
    found = reranker.rerank("Which port does Milvus listen on?", documents)
    assert [document.name for document in found] == ["1", "2", "0"]
    scores = [document.reranking_score or 0.0 for document in found]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[1] > scores[2] >= 0
    assert reranker.rerank("Which port?", []) == []


TELEMETRY = """
from agno.agent import Agent
from utils.models import chat_model
print(Agent(model=chat_model()).run("Hello").status.value)
"""


class Recorder(socketserver.ThreadingTCPServer):
    """A proxy that notes where its clients want to go and lets none of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Refuse)
        self.wanted: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Refuse(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Recorder)
        self.server.wanted.append(self.rfile.readline().decode())
        self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def test_agno_reports_runs_only_if_asked_to(offline_models: Models) -> None:
    if "AGNO_TELEMETRY" in dotenv_values(ROOT / ".env"):
        pytest.skip("this learner's .env has decided")
    chat = {"MODEL_PROVIDER": "compatible", "OPENAI_BASE_URL": offline_models.chat.base_url, "MODEL_ID": CHAT_MODEL}
    chat["OPENAI_API_KEY"] = offline_models.chat.api_key
    # Absent and not just empty: Agno itself would report then.
    unset = {name: value for name, value in os.environ.items() if name != "AGNO_TELEMETRY"}
    programs = []
    for telemetry in ({}, {"AGNO_TELEMETRY": "true"}):
        proxy = Recorder()
        to_proxy = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.server_address[1]}", "NO_PROXY": "127.0.0.1"}
        program = subprocess.Popen(  # Agno reports from a thread, and what waits is sent when the process ends
            [sys.executable, "-c", TELEMETRY],
            cwd=ROOT,
            env=unset | chat | to_proxy | telemetry,
            stdout=subprocess.PIPE,
            text=True,
        )
        programs.append((program, proxy))
    said = [program.communicate(timeout=120)[0] for program, _ in programs]
    for _, proxy in programs:
        proxy.shutdown()
        proxy.server_close()
    assert said == ["COMPLETED\n"] * 2
    (_, quiet), (_, reporting) = programs
    assert reporting.wanted and "agno.com" in reporting.wanted[0], "otherwise this test would prove nothing"
    assert quiet.wanted == []


def test_an_offline_server_that_died_is_replaced() -> None:
    settings = Settings()
    before = models.connect(settings).chat
    server = models._servers[None].process
    psutil.Process(server.pid).kill()
    server._process.wait()
    after = models.connect(settings).chat
    assert after.base_url != before.base_url
    with OpenAI(base_url=after.base_url, api_key=after.api_key) as client:
        assert client.models.list().data


def test_the_reranker_of_a_server_that_died_is_replaced() -> None:
    before = models.reranker()
    server = models._servers[None].process
    psutil.Process(server.pid).kill()
    server._process.wait()
    after = models.reranker()
    assert after.base_url != before.base_url
    assert after.rerank("port", [Document(content="The port is 19530.")])[0].reranking_score
