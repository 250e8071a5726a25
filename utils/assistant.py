"""The assistant of `python3 -m utils ask`: one agent, the corpus in Milvus, searched by meaning and by words."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agno.agent import Agent
from agno.exceptions import EmbeddingError
from agno.knowledge.document.base import Document
from agno.knowledge.embedder.openai import OpenAIEmbedder
from agno.run.base import RunStatus
from agno.vectordb.search import SearchType
from pymilvus import RRFRanker
from tqdm import tqdm

from utils import lesson, models
from utils.errors import CourseError
from utils.knowledge import SectionChunking, Text, load_corpus
from utils.milvus_store import EmbedderUnavailable, MilvusStoreError, NotSupported, ReliableMilvus
from utils.offline.conversation import SEARCH_ERROR
from utils.settings import load_settings

INSTRUCTIONS = [
    "You answer questions about Agno and Milvus from a knowledge base.",
    "Always search the knowledge base before you answer, and answer only from what the search returns.",
    "After each statement name the id of the document it comes from in square brackets, like [milvus-lite].",
    "If the documents do not answer the question, say so.",
]
MODES = {
    "dense": SearchType.vector,
    "words": SearchType.keyword,
    "both": SearchType.hybrid,
    "reranked": SearchType.hybrid,
}
# Chosen on the dev split of data/questions.jsonl: how steeply reciprocal rank fusion discounts lower ranks.
FUSION_K = 10
CANDIDATES = 30
BATCH = 64
# How many chunks the model reads. A language model on this machine reads 50 to 150 tokens a second, and the first five
# chunks hold the answer nearly as often as the first ten.
DOCUMENTS = {"local": 5}


class AssistantError(CourseError):
    """The question could not be answered because a part of the assistant failed."""


@dataclass(frozen=True)
class Reply:
    """An answer, the ids of the documents it cites, and the seconds it took."""

    text: str
    sources: tuple[str, ...]
    seconds: float


class Library:
    """The corpus in one Milvus collection, searched by meaning and by words.

    The collection's name holds a digest of texts, embedder and store, so a changed corpus gets a new collection and the
    old one is dropped. An interrupted start is noticed by the number of chunks and repeated.

    Raises:
        AssistantError: Milvus or the embedder fails, here or in a search.
    """

    def __init__(
        self, uri: str, token: str, embedder: OpenAIEmbedder, texts: list[Text], progress: bool = False
    ) -> None:
        chunker = SectionChunking()
        chunks = [
            chunk
            for text in texts
            for chunk in chunker.chunk(Document(content=text.body, name=text.id, meta_data=text.metadata()))
        ]
        mark = json.dumps(
            [ReliableMilvus.__name__, embedder.id, embedder.dimensions, [chunk.content for chunk in chunks]]
        )
        self._embedder = embedder
        self._reranker = models.reranker()
        self.store = ReliableMilvus(
            collection=f"ask_{hashlib.sha256(mark.encode()).hexdigest()[:12]}",
            uri=uri,
            token=token,
            embedder=embedder,
            index_type="FLAT",  # exact, and quick enough for a few hundred chunks
            fusion=RRFRanker(FUSION_K),
            candidates=CANDIDATES,
            timeout=10,
        )
        with self._one_sentence():
            self.store.create()
            if self.store.get_count() != len(chunks):
                self._fill(chunks, progress)

    def _fill(self, chunks: list[Document], progress: bool) -> None:
        for old in self.store.client.list_collections():
            # A server may hold the learner's own collections.
            if re.fullmatch(r"ask_[0-9a-f]{12}", old) and old != self.store.collection:
                self.store.client.drop_collection(old)
        with tqdm(total=len(chunks), desc="indexing", unit=" chunks", disable=not progress) as bar:
            for start in range(0, len(chunks), BATCH):
                batch = chunks[start : start + BATCH]
                self.store.insert("corpus", batch)
                bar.update(len(batch))
        self.store.optimize()

    def search(self, query: str, limit: int = 10, mode: str = "reranked") -> list[dict[str, Any]]:
        """The best chunks for a query, best first, as dicts with name, content and meta_data (as Agno expects them).

        Args:
            query: the question.
            limit: how many chunks.
            mode: "dense" (embeddings), "words" (BM25), "both" (fused by reciprocal rank), or "reranked" (both, then a
                reranker; on a server without BM25, before 2.5, embeddings and a reranker).
        """
        reranked = mode == "reranked"
        depth = max(CANDIDATES, limit) if reranked else limit
        with self._one_sentence():
            try:
                found = self.store.search(query, depth, search_type=MODES[mode])
            except NotSupported:
                if not reranked:
                    raise
                found = self.store.search(query, depth, search_type=SearchType.vector)
        if reranked:
            found = self._reranker.rerank(query, found)[:limit]
        return [document.to_dict() for document in found]

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        """Turn what the store and the embedder raise into an AssistantError."""
        try:
            yield
        except (EmbedderUnavailable, EmbeddingError) as error:
            cause = error.__cause__ if isinstance(error, EmbedderUnavailable) else error
            reason = getattr(cause, "safe_message", str(cause)).rstrip(".")
            raise AssistantError(
                f"The embedder at {self._embedder.base_url} did not answer ({reason}); ask again, and if that does not "
                "help run python3 -m utils doctor."
            ) from None
        except MilvusStoreError as error:
            uri = self.store.uri
            place = f"at {lesson.show_path(Path(uri))}" if uri.endswith(".db") else "of MILVUS_URI and MILVUS_TOKEN"
            raise AssistantError(f"The Milvus {place} cannot be used: {error}") from None

    def close(self) -> None:
        """Close the connection."""
        self.store.close()


def build_agent(library: Library, mode: str = "reranked", documents: int = 10) -> Agent:
    """The agent that searches `library` before it answers, and reads that many of the chunks found."""

    def retrieve(query: str, num_documents: int | None = None, **_: Any) -> list[dict[Any, Any] | str] | None:
        return [*library.search(query, num_documents or documents, mode)]

    return Agent(
        name="Knowledge Assistant",
        model=models.chat_model(),
        instructions=INSTRUCTIONS,
        knowledge_retriever=retrieve,
        search_knowledge=True,
        telemetry=False,
    )


def ask(agent: Agent, question: str) -> Reply:
    """Ask one question.

    Raises:
        AssistantError: the run or its search failed.
    """
    run = agent.run(question)
    if run.status != RunStatus.completed:
        raise AssistantError(f"The model did not answer: {run.content}")
    # Agno tells the model that a search failed, and the run completes all the same.
    if any(str(tool.result).startswith(SEARCH_ERROR) for tool in run.tools or []):
        raise AssistantError(
            "The search failed while the question was answered; ask again, and if that does not help run "
            "python3 -m utils doctor."
        )
    text = str(run.content)
    found = {
        document["name"]
        for references in run.references or []
        for document in references.references or []
        if isinstance(document, dict)
    }
    cited = dict.fromkeys(name for name in re.findall(r"\[([\w.-]+)\]", text) if name in found)
    return Reply(text, tuple(cited), float(run.metrics.duration or 0) if run.metrics else 0.0)


def open_library(folder: Path, progress: bool = False) -> Library:
    """The corpus in the Milvus of the settings, indexed now if it is not there yet.

    Raises:
        CourseError: the model, the corpus or Milvus cannot be used; the sentence says what to do.
    """
    settings = load_settings()
    return Library(
        lesson.milvus_uri(folder, settings), settings.milvus_token, models.embedder(settings), load_corpus(), progress
    )


def ask_command(question: str) -> int:
    """Answer one question on the command line: the answer, its sources, and who answered."""
    if not question.strip():
        raise AssistantError('The question is empty: try python3 -m utils ask "Which port does Milvus listen on?"')
    folder = lesson.workspace("ask", fresh=False)
    library = open_library(folder, progress=True)
    chat = models.connect(load_settings()).chat
    reply = ask(build_agent(library, documents=DOCUMENTS.get(chat.provider, 10)), question)
    print(reply.text)
    print(f"sources: {', '.join(reply.sources) or 'none'}")
    print(f"answered by: {chat} on {lesson.describe_milvus(folder)}")
    library.close()
    return 0
