"""A vector store that measures the searches of runs: a span for each stage, and how good what it found is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from agno.knowledge.document import Document
from agno.run import RunContext
from agno.vectordb.search import SearchType
from openinference.semconv.trace import DocumentAttributes, OpenInferenceSpanKindValues, SpanAttributes
from opentelemetry.trace import Span

from utils.hosting import tracing
from utils.hosting.metrics import AGREEMENT, RunRecord, current_run
from utils.milvus_store import FoundDocument, ReliableMilvus
from utils.retrieval import CachedRetriever, Documents


@dataclass
class _Search:
    """One search under way."""

    begun: int = field(default_factory=time.time_ns)  # when Milvus's part began
    vector: list[float] | None = None
    scores: dict[str, float] = field(default_factory=dict)  # cosine similarity by the chunk's id


_under_way: ContextVar[_Search | None] = ContextVar("search", default=None)


class MeasuredMilvus(ReliableMilvus):
    """ReliableMilvus, measured where a run searches.

    A hybrid search's own score only tells ranks. So the vectors of what was found come along, and the score that is
    counted is the cosine similarity, whatever the search; a search by words alone has none.
    """

    def search(
        self,
        query: str,
        limit: int = 5,
        filters: Any = None,
        user_id: str | None = None,
        *,
        search_type: SearchType | None = None,
        consistency: str | None = None,
        search_params: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        options: dict[str, Any] = {
            "search_type": search_type,
            "consistency": consistency,
            "search_params": search_params,
        }
        run = current_run()
        if run is None:
            return super().search(query, limit, filters, user_id, **options)
        search = _Search()
        token = _under_way.set(search)
        try:
            with tracing.span("search", OpenInferenceSpanKindValues.RETRIEVER) as span:
                span.set_attribute(SpanAttributes.INPUT_VALUE, query)
                documents = super().search(query, limit, filters, user_id, **options)
                tracing.stage_span("vector_search", search.begun)
                _describe(span, documents, search)
        except Exception:
            run.count_search(None, [])
            raise
        finally:
            _under_way.reset(token)
        found = [{"name": document.name, "content": document.content} for document in documents]
        run.count_search(found, [search.scores[str(doc.id)] for doc in documents if str(doc.id) in search.scores])
        self._compare_later(run, query, limit, filters, user_id)
        return documents

    def _compare_later(self, run: RunRecord, query: str, limit: int, filters: Any, user_id: str | None) -> None:
        """Of a sampled run: do vectors alone and words alone find the same?"""

        def compare() -> None:
            by_vectors, by_words = (
                {document.id for document in self.search(query, limit, filters, user_id, search_type=kind)}
                for kind in (SearchType.vector, SearchType.keyword)
            )
            most = max(len(by_vectors), len(by_words))
            if most:
                AGREEMENT.observe(len(by_vectors & by_words) / most)

        if run.sampled and self._has_bm25:
            run.after_answer(compare)

    def _view(self, level: str | None = None, content: str | None = None) -> dict[str, Any]:
        view = super()._view(level, content)
        if _under_way.get() is not None:
            view["output_fields"] = ["name", "content", "content_id", "meta_data", "vector"]
        return view

    def _query_vector(self, query: str) -> list[float]:
        search = _under_way.get()
        if search is None:
            return super()._query_vector(query)
        with tracing.span("embedding", OpenInferenceSpanKindValues.EMBEDDING):
            search.vector = super()._query_vector(query)
        search.begun = time.time_ns()
        return search.vector

    def _found(self, hit: Mapping[str, Any], search_type: SearchType) -> FoundDocument:
        document = super()._found(hit, search_type)
        search = _under_way.get()
        if search is not None and search.vector is not None:
            search.scores[str(document.id)] = _cosine(search.vector, hit["entity"]["vector"])
        return document


class MeasuredRetriever(CachedRetriever):
    """CachedRetriever that tells each run what it was given: a search that was kept is none for MeasuredMilvus."""

    async def aretrieve(
        self,
        query: str,
        num_documents: int | None = None,
        filters: Any = None,
        run_context: RunContext | None = None,
        user_id: str | None = None,
    ) -> Documents:
        documents = await super().aretrieve(query, num_documents, filters, run_context, user_id)
        run = current_run()
        if run is not None:
            run.add_sources([document for document in documents if isinstance(document, dict)])
        return documents


def _cosine(one: list[float], other: list[float]) -> float:
    a, b = np.asarray(one), np.asarray(other)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


def _describe(span: Span, documents: list[Document], search: _Search) -> None:
    """Name the documents and their scores, as OpenInference does; the texts are in the tool's span."""
    for number, document in enumerate(documents):
        prefix = f"{SpanAttributes.RETRIEVAL_DOCUMENTS}.{number}."
        span.set_attribute(prefix + DocumentAttributes.DOCUMENT_ID, document.name or str(document.id))
        if str(document.id) in search.scores:
            span.set_attribute(prefix + DocumentAttributes.DOCUMENT_SCORE, search.scores[str(document.id)])
