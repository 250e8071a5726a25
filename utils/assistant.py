"""The assistant of `python3 -m utils ask`: one agent, the corpus in Milvus, searched by meaning and by words."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agno.agent import Agent
from agno.knowledge.document.base import Document
from agno.knowledge.embedder.openai import OpenAIEmbedder
from agno.run.base import RunStatus
from openai import OpenAI, OpenAIError
from pymilvus import AnnSearchRequest, DataType, Function, FunctionType, MilvusClient, RRFRanker
from pymilvus.exceptions import MilvusException
from tqdm import tqdm

from utils import lesson, models
from utils.errors import CourseError
from utils.knowledge import SectionChunking, Text, load_corpus
from utils.settings import load_settings

INSTRUCTIONS = [
    "You answer questions about Agno and Milvus from a knowledge base.",
    "Always search the knowledge base before you answer, and answer only from what the search returns.",
    "After each statement name the id of the document it comes from in square brackets, like [milvus-lite].",
    "If the documents do not answer the question, say so.",
]
# Chosen on the dev split of data/questions.jsonl: how steeply reciprocal rank fusion discounts lower ranks.
FUSION_K = 10
CANDIDATES = 30
BATCH = 64


class AssistantError(CourseError):
    """The question could not be answered because a part of the assistant failed."""


@dataclass(frozen=True)
class Reply:
    """An answer, the ids of the documents it cites, and the seconds it took."""

    text: str
    sources: tuple[str, ...]
    seconds: float


class Library:
    """The corpus in one Milvus collection with a dense vector and a BM25 sparse vector per chunk.

    The collection's name holds a digest of texts and embedder, so a changed corpus gets a new collection and the old
    one is dropped. An interrupted start is noticed by the number of rows and repeated.
    """

    def __init__(
        self, uri: str, token: str, embedder: OpenAIEmbedder, texts: list[Text], progress: bool = False
    ) -> None:
        self._openai = OpenAI(base_url=embedder.base_url, api_key=embedder.api_key)
        self._embedder = embedder
        self._reranker = models.reranker()
        chunker = SectionChunking()
        documents = [
            chunk
            for text in texts
            for chunk in chunker.chunk(Document(content=text.body, name=text.id, meta_data=text.metadata()))
        ]
        mark = json.dumps([embedder.id, embedder.dimensions, [document.content for document in documents]])
        self.collection = f"ask_{hashlib.sha256(mark.encode()).hexdigest()[:12]}"
        try:
            self._milvus = MilvusClient(uri, token=token, timeout=10)
            if self._rows() != len(documents):
                self._fill(documents, progress)
        except MilvusException as error:
            raise AssistantError(_explain(uri, error)) from None

    def _rows(self) -> int:
        """Rows of the collection, -1 if it does not exist."""
        if not self._milvus.has_collection(self.collection):
            return -1
        self._milvus.load_collection(self.collection)
        found = self._milvus.query(self.collection, filter="", output_fields=["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def _fill(self, documents: list[Document], progress: bool) -> None:
        for old in self._milvus.list_collections():
            if re.fullmatch(r"ask_[0-9a-f]{12}", old):  # a server may hold the learner's own collections
                self._milvus.drop_collection(old)
        schema = MilvusClient.create_schema()
        schema.add_field("id", DataType.VARCHAR, max_length=64, is_primary=True)
        schema.add_field("document", DataType.VARCHAR, max_length=128)
        schema.add_field("text", DataType.VARCHAR, max_length=16384, enable_analyzer=True)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=self._embedder.dimensions)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(
            Function("bm25", FunctionType.BM25, input_field_names=["text"], output_field_names=["sparse"])
        )
        indexes = MilvusClient.prepare_index_params()
        indexes.add_index("dense", index_type="FLAT", metric_type="COSINE")
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
        self._milvus.create_collection(self.collection, schema=schema, index_params=indexes)
        with tqdm(total=len(documents), desc="indexing", unit=" chunks", disable=not progress) as bar:
            for start in range(0, len(documents), BATCH):
                batch = documents[start : start + BATCH]
                vectors = self._embed([document.content for document in batch])
                rows = [
                    {"id": f"{d.name}-{d.meta_data['chunk']}", "document": d.name, "text": d.content, "dense": vector}
                    for d, vector in zip(batch, vectors, strict=True)
                ]
                self._milvus.insert(self.collection, rows)
                bar.update(len(batch))
        self._milvus.flush(self.collection)

    def _embed(self, texts: list[str]) -> list[list[float]]:
        try:
            response = self._openai.embeddings.create(model=self._embedder.id, input=texts)
        except OpenAIError as error:
            raise AssistantError(
                f"The embedder at {self._embedder.base_url} did not answer ({error.__class__.__name__}); ask again, "
                "and if that does not help run python3 -m utils doctor."
            ) from None
        return [item.embedding for item in response.data]

    def search(self, query: str, limit: int = 10, mode: str = "reranked") -> list[dict[str, Any]]:
        """The best chunks for a query, best first, as dicts with name, content and meta_data (as Agno expects them).

        Args:
            query: the question.
            limit: how many chunks.
            mode: "dense" (embeddings), "words" (BM25), "both" (fused by reciprocal rank), or "reranked" (both, then a
                reranker).
        """
        pool = max(CANDIDATES, limit)
        found = self._search_milvus(query, pool if mode == "reranked" else limit, pool, mode)
        if mode == "reranked":
            found = self._reranker.rerank(query, found)[:limit]
        return [document.to_dict() for document in found]

    def _search_milvus(self, query: str, limit: int, pool: int, mode: str) -> list[Document]:
        vector = self._embed([query])[0] if mode != "words" else []
        dense = AnnSearchRequest([vector], "dense", {}, pool)
        words = AnnSearchRequest([query], "sparse", {}, pool)
        fields = ["document", "text"]
        if mode in ("both", "reranked"):
            found = self._milvus.hybrid_search(
                self.collection, [dense, words], RRFRanker(FUSION_K), limit, output_fields=fields
            )
        else:
            one = {"dense": dense, "words": words}[mode]
            found = self._milvus.search(
                self.collection, data=one.data, anns_field=one.anns_field, limit=limit, output_fields=fields
            )
        hits = [hit["entity"] for hit in found[0]]
        return [Document(content=hit["text"], name=hit["document"], meta_data={"id": hit["document"]}) for hit in hits]

    def close(self) -> None:
        """Close the connections."""
        self._milvus.close()
        self._openai.close()


def _explain(uri: str, error: MilvusException) -> str:
    if uri.endswith(".db"):
        return (
            f"Milvus Lite cannot open {lesson.show_path(Path(uri))} ({error.message}): another process may hold it; "
            "wait for the other ask to end, or delete that folder to build it anew."
        )
    return (
        f"The Milvus server at {uri} failed ({error.message}): start it, check MILVUS_URI and MILVUS_TOKEN, and use "
        "Milvus 2.5 or later (BM25)."
    )


def build_agent(library: Library, mode: str = "reranked") -> Agent:
    """The agent that searches `library` before it answers."""

    def retrieve(query: str, num_documents: int | None = None, **_: Any) -> list[dict[Any, Any] | str] | None:
        return [*library.search(query, num_documents or 10, mode)]

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
        AssistantError: the run failed.
    """
    run = agent.run(question)
    if run.status != RunStatus.completed:
        raise AssistantError(f"The model did not answer: {run.content}")
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
    reply = ask(build_agent(library), question)
    print(reply.text)
    print(f"sources: {', '.join(reply.sources) or 'none'}")
    print(f"answered by: {models.connect(load_settings()).chat} on {lesson.describe_milvus(folder)}")
    library.close()
    return 0
