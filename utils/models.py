"""The model and the embedder that answer: OpenAI, any OpenAI-compatible server, a local model, or the offline one.

The rest of the course never names a model or a server; it calls `chat_model()` and `embedder()`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import httpx
import openai
from agno.knowledge.document.base import Document
from agno.knowledge.embedder.openai import OpenAIEmbedder
from agno.knowledge.reranker.base import Reranker
from agno.models.openai import OpenAIChat, OpenAILike
from pydantic import Field

from utils import local_models, offline
from utils.errors import CourseError
from utils.offline import DIMENSIONS, EMBEDDING_MODEL, RERANK_MODEL, LanguageModelFile, OfflineServer, Speed
from utils.processes import ServerError
from utils.settings import Settings, load_settings

OPENAI_URL = "https://api.openai.com/v1"
EXTRACTIVE = "extractive: it quotes fitting sentences, or declines; it cannot reason"

# What the openai client raises when the answer is a web page, other JSON, or half of what it should be.
_NOT_THE_API = (AttributeError, IndexError, TypeError, ValueError)


class ModelError(CourseError):
    """The model server cannot be reached, refuses the key, or does not know a model."""


@dataclass(frozen=True)
class Endpoint:
    """A model on a server that was checked to answer."""

    provider: str
    base_url: str
    model_id: str
    api_key: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.model_id} ({self.provider})"


@dataclass(frozen=True)
class Models:
    """The two endpoints in use; `dimensions` is the length of the embedder's vectors."""

    chat: Endpoint
    embedding: Endpoint
    dimensions: int

    def to_json(self) -> str:
        """The endpoints with their keys, to hand them to a child process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Models:
        """The endpoints out of `to_json`; they are not checked again."""
        found = json.loads(text)
        return cls(Endpoint(**found["chat"]), Endpoint(**found["embedding"]), found["dimensions"])


def chat_model(source: Settings | Models | None = None, **options: Any) -> OpenAIChat:
    """An Agno chat model for an Agent or Team.

    Args:
        source: settings to connect with (default: those of the environment), or endpoints that `connect` found before.
        options: for its constructor (temperature, ...).

    Raises:
        ModelError: the server cannot be reached, refuses the key, or does not know the model.
        SettingsError: see `load_settings`.
    """
    chat = _found(source).chat
    # OpenAI's own models know the role `developer` that OpenAIChat sends; other servers mostly know `system`
    # (OpenAILike).
    kind = OpenAIChat if chat.provider == "openai" else OpenAILike
    return kind(id=chat.model_id, base_url=chat.base_url, api_key=chat.api_key, **options)


def embedder(source: Settings | Models | None = None) -> OpenAIEmbedder:
    """An Agno embedder; its `dimensions` are those of the vectors that the server really returns.

    Args:
        source: as for `chat_model`.

    Raises:
        ModelError, SettingsError: as for `chat_model`.
    """
    models = _found(source)
    embedding = models.embedding
    return OpenAIEmbedder(
        id=embedding.model_id, base_url=embedding.base_url, api_key=embedding.api_key, dimensions=models.dimensions
    )


def _found(source: Settings | Models | None) -> Models:
    return source if isinstance(source, Models) else connect(source or load_settings())


class ServerReranker(Reranker):
    """An Agno reranker that asks a server with the /v1/rerank route that Jina, Cohere, vLLM and llama.cpp share.

    Agno's own rerankers each need one vendor's client. `Knowledge(reranker=...)` fetches three times the wanted number
    of documents and keeps the best of the new order.
    """

    base_url: str
    model: str
    api_key: str = Field(repr=False)

    def rerank(self, query: str, documents: list[Document], limit: int | None = None) -> list[Document]:
        """The documents by falling relevance to `query`, each with its `reranking_score`.

        Raises:
            httpx.HTTPError: the server does not answer or refuses.
        """
        if not documents:
            return []
        body = {"model": self.model, "query": query, "documents": [document.content for document in documents]}
        headers = {"Authorization": f"Bearer {self.api_key}"}
        response = httpx.post(f"{self.base_url}/rerank", json=body, headers=headers, timeout=30, trust_env=False)
        response.raise_for_status()
        ranked = []
        for result in response.json()["results"]:
            document = documents[result["index"]]
            document.reranking_score = result["relevance_score"]
            ranked.append(document)
        return ranked


def reranker() -> ServerReranker:
    """The reranker of this process's own server, whichever model answers: OpenAI has none."""
    _forget_dead_server()
    endpoint = _own_endpoint(load_settings(), RERANK_MODEL)
    return ServerReranker(base_url=endpoint.base_url, model=endpoint.model_id, api_key=endpoint.api_key)


def client_environment(settings: Settings | None = None) -> dict[str, str]:
    """The endpoints as environment variables, for a program that reads OPENAI_BASE_URL, MODEL_ID and so on itself.

    Raises:
        ModelError, SettingsError: as for `chat_model`.
    """
    models = connect(settings or load_settings())
    return {
        "OPENAI_BASE_URL": models.chat.base_url,
        "OPENAI_API_KEY": models.chat.api_key,
        "MODEL_ID": models.chat.model_id,
        "EMBEDDING_BASE_URL": models.embedding.base_url,
        "EMBEDDING_API_KEY": models.embedding.api_key,
        "EMBEDDING_ID": models.embedding.model_id,
        "EMBEDDING_DIMENSIONS": str(models.dimensions),
    }


def connect(settings: Settings) -> Models:
    """Find the endpoints and check that they answer; once per settings, again if the offline server died.

    Raises:
        ModelError: see `chat_model`.
    """
    # Agno reads this variable when an Agent is made; its default is to report.
    os.environ["AGNO_TELEMETRY"] = str(settings.telemetry).lower()
    _forget_dead_server()
    return _connect(settings)


@cache
def _connect(settings: Settings) -> Models:
    if settings.provider in ("offline", "local"):
        server = _own_server(settings)
        chat = Endpoint(settings.provider, server.base_url, server.model, server.api_key)
        return Models(chat, _own_endpoint(settings, EMBEDDING_MODEL), DIMENSIONS)
    url = settings.base_url or OPENAI_URL
    known = _list_models(url, settings.api_key)
    # Some servers need no key, but the client insists on one.
    chat = Endpoint(
        settings.provider, url, _pick("MODEL_ID", settings.model_id, known, url), settings.api_key or "none"
    )
    if not settings.embedding_id:
        return Models(chat, _own_endpoint(settings, EMBEDDING_MODEL), DIMENSIONS)
    embedding = Endpoint(settings.provider, url, _pick("EMBEDDING_ID", settings.embedding_id, known, url), chat.api_key)
    return Models(chat, embedding, _measure_dimensions(embedding))


# By what they were started with: the offline one, and one for each language model.
_servers: dict[LanguageModelFile | None, OfflineServer] = {}


def _own_server(settings: Settings) -> OfflineServer:
    """This process's own server for these settings; started if it does not run."""
    model = None
    if settings.provider == "local":
        file = local_models.find(settings.model_id)
        model = LanguageModelFile(file.path, settings.local_context, settings.local_native_tools)
    if model not in _servers:
        try:
            _servers[model] = offline.start(tokens_per_second=load_settings().offline_tokens_per_second, model=model)
        except ServerError as error:
            raise ModelError(str(error)) from None
    return _servers[model]


def _own_endpoint(settings: Settings, model_id: str) -> Endpoint:
    """The embedder or the reranker of this process's own server, which needs no key and no network."""
    server = _own_server(settings)
    return Endpoint("offline", server.base_url, model_id, server.api_key)


def model_speed(settings: Settings) -> Speed | None:
    """How fast the local model was when it started; None for any other provider."""
    return _own_server(settings).speed if settings.provider == "local" else None


def _forget_dead_server() -> None:
    """If a server of our own ended by itself, drop all and the endpoints found on them; the next use starts others."""
    if not all(server.process.running for server in _servers.values()):
        stop_offline()


def stop_offline() -> None:
    """Stop the servers that this process started, if any; the next `connect` starts others."""
    for server in _servers.values():
        server.process.stop()
    _servers.clear()
    _connect.cache_clear()


def _list_models(url: str, key: str) -> list[str]:
    try:
        with openai.OpenAI(base_url=url, api_key=key or "none", timeout=10, max_retries=1) as client:
            return sorted(model.id for model in client.models.list())
    except openai.AuthenticationError:
        raise ModelError(f"The model server at {url} refuses the key in OPENAI_API_KEY; check the key.") from None
    except openai.APIConnectionError:
        raise ModelError(
            f"No model server answers at {url}; start it or correct OPENAI_BASE_URL, "
            "or set MODEL_PROVIDER=offline to work without one."
        ) from None
    except (openai.APIError, *_NOT_THE_API) as error:
        raise ModelError(
            f"The model server at {url} does not list its models ({error.__class__.__name__}); "
            "is it OpenAI-compatible, and does the URL end in /v1?"
        ) from None


def _pick(variable: str, wanted: str, known: list[str], url: str) -> str:
    if wanted in known:
        return wanted
    if not wanted and len(known) == 1:
        return known[0]
    if not known:
        raise ModelError(f"The model server at {url} lists no model; load one there, or correct OPENAI_BASE_URL.")
    names = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    problem = f"does not know the model '{wanted}'" if wanted else "has several models"
    raise ModelError(f"The model server at {url} {problem}; set {variable} to one of: {names}.")


def _measure_dimensions(embedding: Endpoint) -> int:
    try:
        with openai.OpenAI(base_url=embedding.base_url, api_key=embedding.api_key, timeout=30) as client:
            return len(client.embeddings.create(model=embedding.model_id, input="dimensions?").data[0].embedding)
    except (openai.APIError, *_NOT_THE_API) as error:
        raise ModelError(
            f"The model server at {embedding.base_url} does not embed text with '{embedding.model_id}' "
            f"({error.__class__.__name__}); set EMBEDDING_ID to an embedding model, or leave it out for "
            "the offline embedder."
        ) from None
