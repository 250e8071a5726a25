"""The knowledge base of a service: documents that people upload, in one Milvus collection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from typing import Any

from agno.db.base import BaseDb
from agno.db.schemas.knowledge import KnowledgeRow
from agno.knowledge.chunking.recursive import RecursiveChunking
from agno.knowledge.content import Content, ContentStatus
from agno.knowledge.knowledge import Knowledge
from agno.knowledge.reader.base import Reader
from agno.knowledge.reader.field_labeled_csv_reader import FieldLabeledCSVReader
from agno.knowledge.reader.markdown_reader import MarkdownReader
from agno.knowledge.reader.pdf_reader import PDFReader
from agno.knowledge.reader.text_reader import TextReader
from agno.vectordb.search import SearchType

from utils import models
from utils.errors import CourseError
from utils.hosting.config import ServiceConfig
from utils.hosting.logs import log
from utils.hosting.search import MeasuredMilvus
from utils.knowledge import SectionChunking
from utils.milvus_store import MilvusStoreError, NotSupported, ReliableMilvus

CHUNK = 800  # characters
BEAT_SECONDS = 5
LOST_SECONDS = 30  # several beats: reading a large document may hold up the loop that beats


class KnowledgeError(CourseError):
    """Milvus cannot hold the service's documents."""


class Uploads(Knowledge):
    """Agno's Knowledge, for documents that people upload again.

    Agno 3.1.10 loads an upload with `skip_if_exists`: a changed text under the same name is "completed", and the old
    text stays. Here it replaces the old one. Agno also cuts Markdown every 5,000 characters; here at its headings.

    In Agno a document whose process is killed while it indexes stays "processing" for ever. Here the process keeps the
    time in the row new, and a row with an old one is "failed", whichever worker or replica is asked.
    """

    _changes = 0
    _loading = 0

    def version(self) -> Hashable:
        """Equal at two times only if this process changed nothing in between that a search may find."""
        return object() if self._loading else self._changes

    async def _aload_content(
        self, content: Content, upsert: bool, skip_if_exists: bool, *args: Any, **options: Any
    ) -> None:
        content.reader = None  # a client's `reader_id` would read a file of any type, in any way
        beat = asyncio.create_task(self._beat(content))
        self._loading += 1  # the row says "completed" a moment before this method ends
        try:
            await super()._aload_content(content, True, False, *args, **options)
        finally:
            beat.cancel()
            self._loading -= 1
            self._changes += 1
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
        try:
            return super().patch_content(content, user_id)
        finally:
            self._changes += 1

    async def aremove_content_by_id(
        self, content_id: str, user_id: str | None = None, _seen: set[str] | None = None
    ) -> bool:
        try:
            return await super().aremove_content_by_id(content_id, user_id, _seen)
        finally:
            self._changes += 1

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


def open_knowledge(config: ServiceConfig, endpoints: models.Models, database: BaseDb, name: str) -> Uploads:
    """The documents of the settings' collection, which is made if it is not there.

    Args:
        config: the service's settings.
        endpoints: of the embedder.
        database: keeps the documents' states.
        name: of the knowledge base.

    Raises:
        KnowledgeError: Milvus cannot be used; the sentence says what to do.
        SettingsError: the service's folder cannot be made.
    """
    return Uploads(name=name, vector_db=_open_store(config, endpoints), contents_db=database)


def _open_store(config: ServiceConfig, endpoints: models.Models) -> ReliableMilvus:
    """The collection for words (BM25) and vectors; on a server before Milvus 2.5 for vectors."""

    def opened(search_type: SearchType) -> ReliableMilvus:
        store = MeasuredMilvus(
            config.collection,
            uri=config.milvus_uri,
            token=config.settings.milvus_token,
            embedder=models.embedder(endpoints),
            search_type=search_type,
            replicas=config.milvus_replicas,
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
        raise KnowledgeError(f"Milvus cannot be used: {error}") from None
