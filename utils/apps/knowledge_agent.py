"""The knowledge assistant as a service: one agent that searches uploaded documents before it answers.

    python3 -m utils serve                      in the foreground, after setting everything up
    python -m utils.apps.knowledge_agent        the same where the packages are installed, such as in a container

Settings are environment variables: utils/hosting/config.py lists them.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from agno.agent import Agent
from agno.db.base import BaseDb
from agno.db.schemas.knowledge import KnowledgeRow
from agno.exceptions import EmbeddingError
from agno.knowledge.chunking.recursive import RecursiveChunking
from agno.knowledge.content import Content, ContentStatus
from agno.knowledge.document.base import Document
from agno.knowledge.knowledge import Knowledge
from agno.knowledge.reader.base import Reader
from agno.knowledge.reader.field_labeled_csv_reader import FieldLabeledCSVReader
from agno.knowledge.reader.markdown_reader import MarkdownReader
from agno.knowledge.reader.pdf_reader import PDFReader
from agno.knowledge.reader.text_reader import TextReader
from agno.vectordb.search import SearchType
from fastapi import FastAPI

from utils import models
from utils.errors import CourseError
from utils.hosting import (
    ServiceConfig,
    configure_logs,
    create_service,
    find_models,
    load_config,
    log,
    log_ids,
    open_database,
    require_knowledge,
    run_service,
)
from utils.knowledge import SectionChunking
from utils.milvus_store import MilvusStoreError, NotSupported, ReliableMilvus

NAME = "knowledge-agent"
AGENT = "knowledge-assistant"
INSTRUCTIONS = [
    "You are a knowledge base assistant.",
    "Always search the knowledge base before you answer, and answer only from what the search returns.",
    "After each statement name the document it comes from in square brackets, like [handbook.md].",
    "If the documents do not answer the question, say so; if there are none yet, ask the user to upload some.",
]
CHUNK = 800  # characters
BEAT_SECONDS = 5
LOST_SECONDS = 30  # several beats: reading a large document may hold up the loop that beats


class ServiceError(CourseError):
    """The service cannot start."""


class EmbedderFailed(MilvusStoreError):
    """The query could not be embedded."""


class Store(ReliableMilvus):
    """A search whose query cannot be embedded fails; Agno's Knowledge takes that error for "nothing found"."""

    def search(
        self, query: str, limit: int = 5, filters: Any = None, user_id: str | None = None, **options: Any
    ) -> list[Document]:
        try:
            return super().search(query, limit, filters, user_id, **options)
        except EmbeddingError as error:
            raise EmbedderFailed(f"The embedding model does not answer: {error.safe_message}") from None


class Uploads(Knowledge):
    """Agno's Knowledge, for documents that people upload again.

    Agno 3.1.10 loads an upload with `skip_if_exists`: a changed text under the same name is "completed", and the old
    text stays. Here it replaces the old one. Agno also cuts Markdown every 5,000 characters; here at its headings.

    In Agno a document whose process is killed while it indexes stays "processing" for ever. Here the process keeps the
    time in the row new, and a row with an old one is "failed", whichever worker or replica is asked.
    """

    async def _aload_content(
        self, content: Content, upsert: bool, skip_if_exists: bool, *args: Any, **options: Any
    ) -> None:
        content.reader = None  # a client's `reader_id` would read a file of any type, in any way
        beat = asyncio.create_task(self._beat(content))
        try:
            await super()._aload_content(content, True, False, *args, **options)
        finally:
            beat.cancel()
            log.info(
                "document",
                content_id=content.id,
                name=content.name,
                user_id=content.user_id,
                status=content.status.value if content.status else None,
                error=content.status_message,
            )

    async def _beat(self, content: Content) -> None:
        """While a document is indexed, keep the time in its row new."""
        database = self._database
        while content.id:
            await asyncio.sleep(BEAT_SECONDS)
            row = database.get_knowledge_content(content.id, user_id=content.user_id)
            if row:
                row.updated_at = int(time.time())
                database.upsert_knowledge_content(row)

    def _content_row_to_content(self, content_row: KnowledgeRow) -> Content:
        """A document whose process was killed while it indexed: its row says "processing", and nobody keeps it new."""
        content = super()._content_row_to_content(content_row)
        silent = time.time() - (content.updated_at or 0)
        if content.status is ContentStatus.PROCESSING and silent > LOST_SECONDS:
            content.status = ContentStatus.FAILED
            content.status_message = "The service stopped while this was indexed: upload it again."
        return content

    async def aget_content_status(
        self, content_id: str, user_id: str | None = None
    ) -> tuple[ContentStatus | None, str | None]:
        content = await self.aget_content_by_id(content_id, user_id)
        return (content.status, content.status_message) if content else (None, "Content not found")

    def patch_content(self, content: Content, user_id: str | None = None) -> dict[str, Any] | None:
        """Agno reports here, too, that an upload failed before it had a row."""
        if content.status is ContentStatus.FAILED and not self._database.get_knowledge_content(str(content.id)):
            self._insert_contents_db(content)
        return super().patch_content(content, user_id)

    @property
    def _database(self) -> BaseDb:
        assert isinstance(self.contents_db, BaseDb)
        return self.contents_db

    def _select_reader(self, extension: str) -> Reader:
        if extension == ".md":
            return MarkdownReader(chunking_strategy=SectionChunking())
        if extension == ".pdf":
            return PDFReader(chunking_strategy=RecursiveChunking(CHUNK))
        if extension == ".csv":
            return FieldLabeledCSVReader()  # a chunk for each row, each value with its column's name
        return TextReader(chunking_strategy=RecursiveChunking(CHUNK))


def open_store(config: ServiceConfig, endpoints: models.Models) -> Store:
    """The service's collection, made if it is not there: for words (BM25) and vectors; before Milvus 2.5 for vectors.

    Raises:
        ServiceError: Milvus cannot be used; the sentence says what to do.
    """

    def opened(search_type: SearchType) -> Store:
        store = Store(
            config.collection,
            uri=config.milvus_uri,
            token=config.settings.milvus_token,
            embedder=models.embedder(endpoints),
            search_type=search_type,
            timeout=config.milvus_timeout,
        )
        store.create()
        return store

    config.make_folder()
    try:
        try:
            return opened(SearchType.hybrid)
        except NotSupported:
            return opened(SearchType.vector)
    except MilvusStoreError as error:
        raise ServiceError(f"Milvus cannot be used: {error}") from None


def make_agent(config: ServiceConfig, endpoints: models.Models, database: BaseDb, knowledge: Knowledge) -> Agent:
    """The assistant."""
    return Agent(
        id=AGENT,
        name="Knowledge Assistant",
        model=models.chat_model(endpoints, timeout=config.model_timeout),
        instructions=INSTRUCTIONS,
        knowledge=knowledge,
        search_knowledge=True,
        db=database,
        add_history_to_context=True,
        num_history_runs=3,
        pre_hooks=[log_ids],
        post_hooks=[require_knowledge],
        markdown=True,
        telemetry=config.settings.telemetry,
    )


def create_app() -> FastAPI:
    """The service, with everything it needs opened and checked.

    Raises:
        CourseError: a setting is wrong, or the model, Milvus or the database cannot be used.
    """
    config = load_config(NAME)
    configure_logs(config.log_level)
    endpoints = find_models(config)
    database = open_database(config, NAME)
    knowledge = Uploads(name=NAME, vector_db=open_store(config, endpoints), contents_db=database)
    agent = make_agent(config, endpoints, database, knowledge)
    return create_service(NAME, config, endpoints, database, knowledge, agents=[agent])


def main() -> int:
    """Serve in the foreground; return the exit code."""
    try:
        return run_service("utils.apps.knowledge_agent:create_app", load_config(NAME))
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
