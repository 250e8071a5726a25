"""ReliableMilvus: Agno's vector store on Milvus that is the same on Milvus Lite, a standalone server and a cluster.

A drop-in for agno.vectordb.milvus.Milvus (agno 3.1.10), made to be copied: this file needs agno and pymilvus alone.

    from agno.knowledge.knowledge import Knowledge
    from milvus_store import ReliableMilvus

    store = ReliableMilvus(collection="docs", uri="./milvus.db", embedder=embedder)
    knowledge = Knowledge(vector_db=store)

What it promises, and the stock adapter does not:

* What you stored is there after a restart, and an error is raised, never turned into an empty list.
* A chunk is found as soon as its insert has returned, by this process. Another process is told what to wait for:
  hand it `store.last_write` and let it call `store.read_after(...)`.
* Replacing a document embeds first, writes second and deletes last, so an interruption loses nothing.
* Filters mean the same on every Milvus, and no value in them can leave its place: see `compile_filter`.
* A user sees and deletes their own chunks, and sees the shared ones. No filter, name or metadata crosses that.
* Keyword and hybrid search use Milvus's own BM25 (Milvus Lite, and servers from 2.5 on).

Its collection has these fields: id, user_id ("" for shared chunks), content_hash, content_id, name, content, meta_data
(JSON), terms (what the filters use, see `metadata_terms`), vector and, where Milvus has BM25, sparse.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import hashlib
import json
import math
import random
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import grpc
from agno.exceptions import EmbeddingError
from agno.filters import AND, CONTAINS, EQ, GT, GTE, IN, LT, LTE, MAX_FILTER_DEPTH, NEQ, NOT, OR, STARTSWITH, FilterExpr
from agno.knowledge.document import Document
from agno.knowledge.embedder import Embedder
from agno.knowledge.reranker.base import Reranker
from agno.utils.log import logger
from agno.utils.string import generate_id
from agno.vectordb.base import VectorDb
from agno.vectordb.distance import Distance
from agno.vectordb.score import normalize_score
from agno.vectordb.search import SearchType
from pymilvus import AnnSearchRequest, DataType, Function, FunctionType, MilvusClient, RRFRanker, WeightedRanker
from pymilvus.client.types import LoadState
from pymilvus.exceptions import ConnectionConfigException, MilvusException

with contextlib.suppress(ImportError):
    # pymilvus 3.0.2 loads it in the first search, past Python's import lock: where several threads search first, some
    # meet half a module and fail.
    import scipy.sparse  # noqa: F401

T = TypeVar("T")

METRICS = {Distance.cosine: "COSINE", Distance.l2: "L2", Distance.max_inner_product: "IP"}
CONSISTENCY_LEVELS = ("Strong", "Session", "Bounded", "Eventually")
SHARED = ""

# Limits of Milvus. A server counts bytes where Milvus Lite counts characters or nothing; here bytes count everywhere.
MAX_BYTES = {"user_id": 256, "content_hash": 256, "content_id": 256, "name": 2048, "content": 65_535}
MAX_METADATA_BYTES = 65_536
MAX_TERMS = 4096
MAX_TERM_LENGTH = 512
MAX_HITS = 16_384
INT64 = range(-(2**63), 2**63)

# Well below gRPC's 64 MB a message, and enough rows that the cost of a call no longer counts.
BATCH_ROWS = 500
BATCH_BYTES = 16_000_000

# A process that opens stores in many threads should not open as many connections at once.
_POOL = ThreadPoolExecutor(max_workers=16, thread_name_prefix="milvus-store")


class MilvusStoreError(ValueError):
    """Something went wrong in the store; the message is one sentence that says what to do.

    A ValueError, because that is the one kind that agno's Knowledge.search passes on: it logs any other exception and
    returns an empty list, which an agent takes for "nothing found".
    """


class MilvusUnavailable(MilvusStoreError):
    """No Milvus answered within the time limit."""


class AccessDenied(MilvusStoreError):
    """Milvus refuses the token, or the user lacks a privilege."""


class CollectionMissing(MilvusStoreError):
    """The collection does not exist (any more)."""


class CollectionMismatch(MilvusStoreError):
    """The collection exists but was made by another adapter or for another embedder."""


class InvalidFilter(MilvusStoreError):
    """A filter that Milvus cannot evaluate, or not the same everywhere."""


class InvalidDocument(MilvusStoreError):
    """A document that Milvus cannot hold; nothing of its batch was written."""


class InvalidEmbedding(MilvusStoreError):
    """The embedder returned a vector of the wrong length, or one that is not made of finite numbers."""


class EmbedderUnavailable(MilvusStoreError):
    """The embedder does not answer, so there is nothing to search with."""


class NotSupported(MilvusStoreError):
    """This Milvus server is too old for what was asked."""


@dataclass
class FoundDocument(Document):
    """A document that a search returned.

    Attributes:
        distance: smaller is nearer, whatever the search: 1 - cosine similarity (0 to 2), the squared Euclidean
            distance, minus the inner product, minus the BM25 score, or minus the fused score of a hybrid search.
        score: the same as Milvus says it, larger is nearer, except for L2, where it equals minus `distance`.
    """

    distance: float = 0.0
    score: float = 0.0


# --- filters ---------------------------------------------------------------------------------------------------------


def text_literal(text: str) -> str:
    """`text` as a string literal of a Milvus expression. Milvus Lite and servers agree on these four escapes only.

    Raises:
        InvalidFilter: the text holds half of a surrogate pair, which cannot be sent.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidFilter(
            "A text with half of a surrogate pair cannot be sent to Milvus: mend its encoding."
        ) from None
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


_quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii


def _term(parts: Sequence[Any]) -> str:
    """A list as compact ASCII JSON; a long one as its digest, since Milvus limits the length of array elements."""
    # As json.dumps with these separators, which would make an encoder for every call: a fifth of an insert's time.
    text = f"[{','.join([_quoted(part) if isinstance(part, str) else json.dumps(part) for part in parts])}]"
    return text if len(text) <= MAX_TERM_LENGTH else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@functools.lru_cache(maxsize=4096, typed=True)  # the chunks of a document have most of their metadata in common
def _value_term(key: str, value: str | float | bool) -> str:
    # 1 and 1.0 are the same number to a reader of the filter; true is none.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _term([key, value])


def _kind(value: Any) -> str | None:
    """How Milvus compares a value: as "number" or as "text"; None for what has no order."""
    if isinstance(value, str):
        return "text"
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else None


def metadata_terms(metadata: Mapping[str, Any]) -> list[str]:
    """What `compile_filter` asks for: `[key]` for each key with a value, `[key,null,kind]` for a number or a text, and
    `[key,value]` for each value, also for each element of a list. All as JSON.

    Milvus Lite and the server versions disagree about JSON paths that are missing, null or of another type (Lite takes
    true for 1, a server finds `!=` true for a missing key, `in` works on a server only). On an array of texts they
    agree.
    """
    terms: dict[str, None] = {}
    for key, value in metadata.items():
        if value is None:
            continue
        terms[_term([key])] = None
        if kind := _kind(value):
            terms[_term([key, None, kind])] = None
        for element in value if isinstance(value, list) else [value]:
            if isinstance(element, str | int | float):
                terms[_value_term(key, element)] = None
    return list(terms)


def _has(term: str) -> str:
    return f"array_contains(terms, {text_literal(term)})"


def _equals(key: str, value: Any) -> str:
    if value is None:
        return f"not {_has(_term([key]))}"
    if isinstance(value, float) and not math.isfinite(value) or not isinstance(value, str | int | float):
        raise InvalidFilter(
            f"The filter on {key!r} compares with {_shown(value)}: use a text, a finite number, true, false, None, or "
            "a list of them."
        )
    return _has(_value_term(key, value))


def _any_of(key: str, values: Iterable[Any]) -> str:
    tests = [_equals(key, value) for value in values]
    return _join("or", tests) if tests else _NOTHING


def _join(operator: str, tests: Sequence[str]) -> str:
    return tests[0] if len(tests) == 1 else f" {operator} ".join(f"({test})" for test in tests)


# Constants in a form that every version parses.
_NOTHING = 'id == ""'
_EVERYTHING = 'id != ""'


def _ordered(key: str, operator: str, value: Any) -> str:
    """`meta_data[key] <operator> value`, true only where the field is of the same kind as the value."""
    kind = _kind(value)
    if kind is None or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidFilter(
            f"The filter on {key!r} orders by {_shown(value)}: only texts and finite numbers have an order."
        )
    if not key or re.search(r"[\x00-\x1f]", key):
        raise InvalidFilter(f"Milvus cannot order by the metadata key {key!r}: use a name without control characters.")
    if isinstance(value, str):
        literal = text_literal(value)
    else:
        try:
            literal = repr(value if isinstance(value, int) and value in INT64 else float(value))
        except OverflowError:
            raise InvalidFilter(f"The filter on {key!r} orders by a number beyond 64 bits.") from None
    return f"({_has(_term([key, None, kind]))}) and (meta_data[{text_literal(key)}] {operator} {literal})"


def _starts_with(key: str, prefix: Any) -> str:
    """A prefix test as a range of texts: Milvus orders texts by code point, and `like` has no escape on old servers."""
    if not isinstance(prefix, str):
        raise InvalidFilter(f"STARTSWITH on {key!r} needs a text, not {_shown(prefix)}.")
    lower = _ordered(key, ">=", prefix)
    head = prefix.rstrip("\U0010ffff")
    if not head:
        return lower
    following = ord(head[-1]) + 1
    after = head[:-1] + chr(0xE000 if following == 0xD800 else following)
    return f"({lower}) and (meta_data[{text_literal(key)}] < {text_literal(after)})"


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, float) else f"a {type(value).__name__}"


def compile_filter(filters: Any) -> str:
    """A Milvus expression for a metadata filter in Agno's form; "" for none.

    The rules, the same on every Milvus:
        * A dict means that all of its entries hold, a list of FilterExpr that all of them do.
        * A field equals a value of the same type; 1 equals 1.0; true is not 1. A field that holds a list equals each of
          its elements. A list as value means any of them, as IN does.
        * None matches a field that is null or missing.
        * NEQ and NOT are the exact opposite, so they match where the field is missing, too.
        * GT, GTE, LT, LTE compare numbers with numbers and texts with texts, by code point; anything else is no match.
        * STARTSWITH is exact about case. CONTAINS is refused: Agno defines it without regard to case, and Milvus has no
          such test.

    Raises:
        InvalidFilter: an operator or a value that cannot be compared.
    """
    if not filters:
        return ""
    if isinstance(filters, Mapping):
        return _join("and", [_entry(key, value) for key, value in filters.items()])
    if isinstance(filters, FilterExpr):
        return _expression(filters, 1)
    if isinstance(filters, list | tuple):
        return _join("and", [_expression(filter_, 1) for filter_ in filters])
    raise InvalidFilter(f"A filter is a dict or a list of FilterExpr, not {_shown(filters)}.")


def _entry(key: Any, value: Any) -> str:
    if not isinstance(key, str):
        raise InvalidFilter(f"A metadata key is a text, not {_shown(key)}.")
    return _any_of(key, value) if isinstance(value, list | tuple | set | frozenset) else _equals(key, value)


def _expression(filter_: Any, depth: int) -> str:
    if depth > MAX_FILTER_DEPTH:
        raise InvalidFilter(f"The filter is nested more than {MAX_FILTER_DEPTH} levels deep.")
    match filter_:
        case AND() | OR():
            tests = [_expression(part, depth + 1) for part in filter_.expressions]
            if isinstance(filter_, AND):
                return _join("and", tests) if tests else _EVERYTHING
            return _join("or", tests) if tests else _NOTHING
        case NOT():
            return _not(filter_.expression, depth + 1)
        case EQ() | IN():
            return _entry(filter_.key, filter_.value if isinstance(filter_, EQ) else list(filter_.values))
        case NEQ():
            return f"not ({_entry(filter_.key, filter_.value)})"
        case GT() | GTE() | LT() | LTE():
            return _ordered(filter_.key, {GT: ">", GTE: ">=", LT: "<", LTE: "<="}[type(filter_)], filter_.value)
        case STARTSWITH():
            return _starts_with(filter_.key, filter_.value)
        case CONTAINS():
            raise InvalidFilter(
                "Milvus cannot search inside metadata without regard to case, as CONTAINS asks: store the words as a "
                "list and use EQ or IN, or a lower-case copy and STARTSWITH."
            )
    raise InvalidFilter(f"A filter is made of FilterExpr objects, not {_shown(filter_)}.")


def _not(filter_: Any, depth: int) -> str:
    return f"not ({_expression(filter_, depth)})"


# --- the store -------------------------------------------------------------------------------------------------------


class _Clock:
    """The Milvus timestamps that this process has to read up to, for each collection.

    Shared by all stores of a collection in the process, so that one sees what another has written.
    """

    def __init__(self) -> None:
        self.opened = 0
        self.written = 0
        # When a document's chunks were last changed; only the newest matter.
        self.by_content: OrderedDict[str, int] = OrderedDict()
        # After a write that failed or was interrupted nobody knows how far it came.
        self.unsure = False
        self.opening = threading.Lock()
        # Milvus Lite loses rows if several threads write to one collection and the process is then killed.
        self.writing = threading.Lock()

    def note(self, timestamp: int, content_hashes: Sequence[str] = ()) -> None:
        """Remember a write to these contents; without any, to all of them."""
        self.written = max(self.written, timestamp)
        if not content_hashes:
            self.opened = max(self.opened, timestamp)
        for content_hash in content_hashes:
            self.by_content[content_hash] = timestamp
            self.by_content.move_to_end(content_hash)
        while len(self.by_content) > 10_000:
            _, forgotten = self.by_content.popitem(last=False)
            self.opened = max(self.opened, forgotten)


_CLOCKS: dict[tuple[str, str], _Clock] = {}
_PROCESS_LOCK = threading.Lock()


class ReliableMilvus(VectorDb):
    """A Milvus collection as an Agno vector store; see the module's description.

    Args:
        collection: name of the collection.
        name, description, id: as for every Agno vector store.
        embedder: makes the vectors; OpenAI's by default, as in the stock adapter.
        distance: cosine, l2 or max_inner_product.
        uri: a path that ends in .db (Milvus Lite) or a server's address.
        token: "user:password" or an API key.
        search_type: of a search that does not choose one: vector, keyword (BM25) or hybrid (both, fused).
        reranker: deprecated by Agno; give it to Knowledge.
        similarity_threshold: leave out vector hits below this similarity (0 to 1, Agno's `normalize_score`).
        consistency: what a search sees that does not choose. "Session": everything written before the store was opened,
            and everything that this process wrote since. "Strong": everything written before the search, at the price
            of a wait on a server (0.2 to 0.4 seconds). "Bounded": what is older than 5 seconds. "Eventually": whatever
            is there.
        index_type, index_params: of the vector index, such as "IVF_FLAT" and {"nlist": 128}.
        search_params: such as {"nprobe": 16}.
        fusion: how a hybrid search joins its two rankings, RRFRanker(k) or WeightedRanker(vector, words).
        candidates: how many hits of each ranking are joined, at least.
        analyzer: Milvus's analyzer_params for BM25, {"type": "standard"} by default.
        replicas: copies of the collection in the query nodes' memory, when this store loads it; a cluster needs as many
            query nodes. By default one. A collection that is loaded already is left as it is, because others search in
            it and Milvus changes the number only after a release; the log says if this number is another one.
        timeout: seconds that one call may take in all, retries included.
        bm25: keep the index for keyword and hybrid searches where Milvus has BM25; without it Milvus Lite takes a
            document in about half the time.
        client_options: further arguments of MilvusClient, such as db_name.

    Every method raises a MilvusStoreError, or the embedder's own error.
    """

    def __init__(
        self,
        collection: str,
        name: str | None = None,
        description: str | None = None,
        id: str | None = None,
        embedder: Embedder | None = None,
        distance: Distance = Distance.cosine,
        uri: str = "http://localhost:19530",
        token: str | None = None,
        search_type: SearchType = SearchType.vector,
        reranker: Reranker | None = None,
        *,
        similarity_threshold: float | None = None,
        consistency: str = "Session",
        index_type: str = "AUTOINDEX",
        index_params: Mapping[str, Any] | None = None,
        search_params: Mapping[str, Any] | None = None,
        fusion: RRFRanker | WeightedRanker | None = None,
        candidates: int = 30,
        analyzer: Mapping[str, Any] | None = None,
        replicas: int | None = None,
        timeout: float = 20,
        bm25: bool = True,
        **client_options: Any,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", collection):
            raise MilvusStoreError(
                f"{collection!r} cannot name a collection: use letters, digits and underscores, at most 255, and begin "
                "with a letter."
            )
        if "sparse_vector_dimensions" in client_options:
            raise MilvusStoreError(
                "Leave sparse_vector_dimensions out: Milvus's own BM25 takes the place of hashed words."
            )
        super().__init__(
            id=id or generate_id(f"{uri}#{collection}"),
            name=name,
            description=description,
            similarity_threshold=similarity_threshold,
        )
        if embedder is None:
            from agno.knowledge.embedder.openai import OpenAIEmbedder

            embedder = OpenAIEmbedder()
        self.collection = collection
        self.embedder = embedder
        self.distance = distance
        self.uri = uri
        self.token = token
        self.reranker = reranker
        self.consistency = _checked_level(consistency)
        self.index_type = index_type
        self.index_params = dict(index_params or {})
        self.search_params = dict(search_params or {})
        self.fusion = fusion or RRFRanker()
        self.candidates = candidates
        self.analyzer = dict(analyzer or {"type": "standard"})
        self.replicas = replicas
        self.timeout = timeout
        self.bm25 = bm25
        self._client_options = client_options
        self._search_type = SearchType(search_type)
        self._next_search_type: contextvars.ContextVar[SearchType | None] = contextvars.ContextVar(
            f"search type of {self.id}", default=None
        )
        self._client: MilvusClient | None = None
        self._is_lite = False
        self._knows_bm25 = False
        self._ready = False
        self._has_bm25 = False
        self._connecting = threading.Lock()
        # Milvus Lite is one place however its path is spelled.
        place = str(Path(uri).resolve()) if self._on_lite_file else uri.rstrip("/")
        with _PROCESS_LOCK:
            self._clock = _CLOCKS.setdefault((f"{place}#{client_options.get('db_name', '')}", collection), _Clock())

    # --- settings that Agno reads or writes ---

    @property
    def dimensions(self) -> int | None:
        """Length of a vector."""
        return self.embedder.dimensions

    @property
    def search_type(self) -> SearchType:
        """The type of the next search. Assigning changes the next search of this task or thread only.

        Knowledge.search(search_type=...) assigns here and never restores: with the stock adapter one such search
        changes all later ones, of all users.
        """
        return self._next_search_type.get() or self._search_type

    @search_type.setter
    def search_type(self, value: SearchType) -> None:
        self._next_search_type.set(SearchType(value))

    def _take_search_type(self) -> SearchType:
        chosen = self.search_type
        self._next_search_type.set(None)
        return chosen

    def get_supported_search_types(self) -> list[str]:
        """The values of `search_type`."""
        return [SearchType.vector, SearchType.keyword, SearchType.hybrid]

    def upsert_available(self) -> bool:
        """True: `upsert` replaces a document."""
        return True

    # --- connection ---

    @property
    def _on_lite_file(self) -> bool:
        return self.uri.endswith(".db")

    @property
    def client(self) -> MilvusClient:
        """The pymilvus client, connected now if it is not yet.

        Raises:
            MilvusUnavailable, AccessDenied: no Milvus answers at the URI, or it refuses the token.
        """
        return self._call(lambda client, seconds: client)

    def _connected(self, seconds: float) -> MilvusClient:
        with self._connecting:
            if self._client is None:
                self._client = self._connect(seconds)
            return self._client

    def _connect(self, seconds: float) -> MilvusClient:
        if self._on_lite_file:
            path = Path(self.uri)
            if path.is_file():
                raise CollectionMismatch(
                    f"{path.name} is a file of Milvus Lite 2, which version 3 cannot read: move it away and "
                    "index the documents again."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
        options = dict(self._client_options)
        if self._on_lite_file:
            # Milvus Lite closes a connection that sends as many signs of life as pymilvus does.
            options.setdefault("grpc_options", {"grpc.keepalive_time_ms": 600_000})
        with _PROCESS_LOCK:  # two threads that open a file of Milvus Lite at once would lock each other out
            client = MilvusClient(self.uri, token=self.token or "", timeout=seconds, **options)
        version = str(client.get_server_version(timeout=seconds))
        self._is_lite = version.startswith("milvus_lite")
        # A hosted service may call its version anything, and is newer than 2.5.
        numbers = re.match(r"v?(\d+)\.(\d+)", version)
        self._knows_bm25 = numbers is None or (int(numbers[1]), int(numbers[2])) >= (2, 5)
        return client

    def _call(self, call: Callable[[MilvusClient, float], T]) -> T:
        """`call(client, seconds left)`, again after errors that pass by themselves, until it returns or time is up."""
        end = time.monotonic() + self.timeout
        pause = 0.05
        while True:
            try:
                return call(self._connected(end - time.monotonic()), max(0.1, end - time.monotonic()))
            except (MilvusException, grpc.RpcError) as error:
                if not _is_transient(error) or time.monotonic() + pause > end:
                    raise self._explained(error) from error
                self._recover(error)
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, 2)

    def _recover(self, error: MilvusException | grpc.RpcError) -> None:
        """Do what the next attempt needs after a passing error."""
        client = self._client
        if client is None:
            return
        if _is_not_loaded(error):
            with contextlib.suppress(MilvusException, grpc.RpcError):
                self._load(client, self.timeout)
        elif self._on_lite_file and (
            _grpc_status(error) is grpc.StatusCode.UNAVAILABLE or "Fail connecting" in str(error)
        ):
            self._client = None  # it was closed and opened again in this process, at another port

    def _explained(self, error: MilvusException | grpc.RpcError) -> MilvusStoreError:
        status = _grpc_status(error)
        code = getattr(error, "code", None)
        message = str(getattr(error, "message", "") or getattr(error, "details", lambda: "")())
        if isinstance(error, ConnectionConfigException) and self._on_lite_file:
            return MilvusUnavailable(
                f"{Path(self.uri).name} cannot be opened: another process holds it (Milvus Lite serves one process "
                "at a time: stop that one, or use a server), or the disk is full or not writable."
            )
        if isinstance(error, ConnectionConfigException):
            return MilvusStoreError(
                f"{self.uri!r} is no address of Milvus: use http://host:19530 or a path that ends in .db."
            )
        if (
            status in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
            or "PrivilegeNotPermitted" in message
        ):
            return AccessDenied(f"Milvus at {self.uri} refuses the token: set the right one (user:password).")
        if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return InvalidDocument(f"Milvus takes at most 64 MB in one message ({message}).")
        if status is grpc.StatusCode.UNIMPLEMENTED or "UNIMPLEMENTED" in message:
            return MilvusStoreError(
                f"What answers at {self.uri} is no Milvus, or too old: the gRPC port is 19530 by default."
            )
        if code == 100:
            return CollectionMissing(f"The collection {self.collection} does not exist: create() makes it.")
        if _is_transient(error):
            known = (
                "answers, but is not ready yet"
                if self._port_is_open()
                else "does not answer: start it, or correct the URI"
            )
            return MilvusUnavailable(f"Milvus at {self.uri} {known} (tried for {self.timeout:g} seconds).")
        if "space" in message.lower() and "device" in message.lower():
            return MilvusStoreError(f"The disk of Milvus at {self.uri} is full: free some space and write again.")
        return MilvusStoreError(f"Milvus refuses: {message.strip() or error}")

    def _port_is_open(self) -> bool:
        address = urlparse(self.uri)
        try:
            with socket.create_connection((address.hostname or "localhost", address.port or 19530), timeout=1):
                return True
        except OSError:
            return False

    def close(self) -> None:
        """Close the connection; the next call opens it again."""
        with self._connecting:
            if self._client is not None:
                self._client.close()
            self._client = None

    # --- the collection ---

    def create(self) -> None:
        """Make the collection, its indexes, and load it. Completes a creation that was interrupted.

        Raises:
            NotSupported: a keyword or hybrid store on a server without BM25.
            CollectionMismatch: the collection exists and is not one of this store's.
        """
        self._open(create=True)

    def exists(self) -> bool:
        """Whether the collection exists."""
        return bool(self._call(lambda client, seconds: client.has_collection(self.collection, timeout=seconds)))

    def drop(self) -> None:
        """Remove the collection with all of its chunks, of all users."""
        with self._clock.opening, self._clock.writing:
            self._call(lambda client, seconds: client.drop_collection(self.collection, timeout=seconds))
            self._ready = False

    def delete(self) -> bool:
        """As `drop`; False if there was nothing to remove."""
        existed = self.exists()
        self.drop()
        return existed

    def optimize(self) -> None:
        """Seal what was written last, so that it is indexed. For the end of a large load, not for every insert."""
        self._open()
        self._call(lambda client, seconds: client.flush(self.collection, timeout=seconds))

    def _open(self, create: bool = False) -> None:
        """Make sure, once, that the collection is this store's, complete and loaded."""
        if self._ready:
            return
        with self._clock.opening:
            if self._ready:
                return
            if self.exists():
                self._verify()
            elif create:
                self._make()
            else:
                raise CollectionMissing(f"The collection {self.collection} does not exist: create() makes it.")
            self._finish_creation()
            self._clock.opened = max(self._clock.opened, self._now())
            self._ready = True

    def _make(self) -> None:
        if not self.dimensions:
            raise CollectionMismatch("The embedder does not say how long its vectors are: give it dimensions=.")
        self._has_bm25 = self.bm25 and self._knows_bm25
        self._require_bm25(self._search_type)
        schema = MilvusClient.create_schema(enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, max_length=64, is_primary=True)
        for field in ("user_id", "content_hash", "content_id", "name"):
            schema.add_field(field, DataType.VARCHAR, max_length=MAX_BYTES[field])
        analyzed = {"enable_analyzer": True, "analyzer_params": self.analyzer} if self._has_bm25 else {}
        schema.add_field("content", DataType.VARCHAR, max_length=MAX_BYTES["content"], **analyzed)
        schema.add_field("meta_data", DataType.JSON)
        schema.add_field(
            "terms",
            DataType.ARRAY,
            element_type=DataType.VARCHAR,
            max_capacity=MAX_TERMS,
            max_length=MAX_TERM_LENGTH,
        )
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dimensions)
        if self._has_bm25:
            schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
            schema.add_function(Function("bm25", FunctionType.BM25, ["content"], ["sparse"]))
        try:
            self._call(
                lambda client, seconds: client.create_collection(
                    self.collection, schema=schema, consistency_level=self.consistency, timeout=seconds
                )
            )
        except MilvusStoreError:
            if not self.exists():  # else another process was quicker
                raise
            self._verify()

    def _finish_creation(self) -> None:
        indexes = MilvusClient.prepare_index_params()
        # Only this nested form reaches Milvus Lite; a server takes it, too.
        params = {"params": self.index_params}
        indexes.add_index("vector", self.index_type, "vector", metric_type=METRICS[self.distance], params=params)
        if self._has_bm25:
            indexes.add_index("sparse", "SPARSE_INVERTED_INDEX", "sparse", metric_type="BM25")
        wanted = {index.field_name for index in indexes}
        try:
            if wanted - self._call(self._indexed_fields):
                self._call(
                    lambda client, seconds: client.create_index(self.collection, indexes, sync=False, timeout=seconds)
                )
        except MilvusStoreError:
            if wanted - self._call(self._indexed_fields):  # else another process was quicker
                raise
        if not self._call(self._is_loaded):
            try:
                self._call(self._load)
            except MilvusStoreError:
                if not self._call(self._is_loaded):  # else another process was quicker, with another number of copies
                    raise
        if self.replicas and not self._is_lite:
            found = len(self._call(lambda client, seconds: client.describe_replica(self.collection, timeout=seconds)))
            if found != self.replicas:
                logger.warning(
                    f"{self.collection} is loaded with {found} copies and stays so, although replicas is "
                    f"{self.replicas}: to change it, release the collection and load it again, while nobody searches."
                )

    def _is_loaded(self, client: MilvusClient, seconds: float) -> bool:
        state = client.get_load_state(self.collection, timeout=seconds)["state"]
        if state == LoadState.Loading:
            raise MilvusException(message="not fully loaded")  # by another process: a passing error
        return bool(state == LoadState.Loaded)

    def _load(self, client: MilvusClient, seconds: float) -> None:
        copies = {} if self._is_lite else {"replica_number": self.replicas or 1}
        client.load_collection(self.collection, timeout=seconds, **copies)

    def _indexed_fields(self, client: MilvusClient, seconds: float) -> set[str]:
        indexes = client.list_indexes(self.collection, timeout=seconds)
        return {client.describe_index(self.collection, index, timeout=seconds)["field_name"] for index in indexes}

    def _verify(self) -> None:
        fields = self._fields(self.collection)
        if _is_of_stock_adapter(fields):
            raise CollectionMismatch(
                f"{self.collection} was made by agno.vectordb.milvus.Milvus, which stores metadata as text: give this "
                f'store a new name and copy the rows with its migrate("{self.collection}").'
            )
        if not {"id", "user_id", "content_hash", "content", "meta_data", "terms", "vector"} <= fields.keys():
            raise CollectionMismatch(f"{self.collection} was not made by this store: choose another name.")
        found = int(fields["vector"]["params"]["dim"])
        if self.dimensions and found != self.dimensions:
            raise CollectionMismatch(
                f"{self.collection} holds vectors of {found} dimensions and the embedder makes {self.dimensions}: use "
                "the embedder that filled it, or another collection."
            )
        self._has_bm25 = "sparse" in fields
        self._require_bm25(self._search_type)

    def _fields(self, collection: str) -> dict[str, dict[str, Any]]:
        described = self._call(lambda client, seconds: client.describe_collection(collection, timeout=seconds))
        return {field["name"]: field for field in described["fields"]}

    def _require_bm25(self, search_type: SearchType) -> None:
        if search_type is not SearchType.vector and not self._has_bm25:
            raise NotSupported(
                f"A {search_type.value} search needs BM25, and {self.collection} at {self.uri} has none: use Milvus "
                "Lite or a server from version 2.5 on, or search_type=SearchType.vector."
            )

    # --- what a read has to see ---

    @property
    def last_write(self) -> int:
        """The Milvus time up to which this process has written: hand it to another process for its `read_after`."""
        return self._clock.written

    def read_after(self, timestamp: int) -> None:
        """Let all later reads of this process see what was written up to another process's `last_write`."""
        self._clock.note(timestamp)

    def _now(self) -> int:
        """Milvus's clock; a read that waits for it sees all that was written before. Milvus Lite needs none.

        A write's own timestamp would do for inserts, but a delete does not return one.
        """
        if self._is_lite:
            return 0
        return int(self._call(lambda client, seconds: client._get_connection().alloc_timestamp(timeout=seconds)))

    def _view(self, level: str | None = None, content: str | None = None) -> dict[str, Any]:
        """The arguments of a read that make it see what it has to."""
        level = _checked_level(level) if level else self.consistency
        if self._clock.unsure:
            self._clock.note(self._now())
            self._clock.unsure = False
        if content is not None:
            seen = max(self._clock.opened, self._clock.by_content.get(content, 0))
        elif level == "Session":
            seen = max(self._clock.opened, self._clock.written)
        else:
            return {"consistency_level": level}
        return {"consistency_level": "Customized", "guarantee_timestamp": max(seen, 1)}

    # --- writing ---

    def insert(
        self,
        content_hash: str,
        documents: list[Document],
        filters: dict[str, Any] | None = None,
        user_id: str | None = None,
    ) -> None:
        """Add the chunks of a document; a chunk that is there already is replaced.

        Args:
            content_hash: identifies the document the chunks come from.
            documents: the chunks; those without an embedding get one.
            filters: metadata for every chunk.
            user_id: whose they are; None for everyone's.
        """
        self._write(content_hash, documents, filters, user_id, replace=False)

    def upsert(
        self,
        content_hash: str,
        documents: list[Document],
        filters: dict[str, Any] | None = None,
        user_id: str | None = None,
    ) -> None:
        """Replace all chunks of a document that this owner has; arguments as for `insert`.

        The new chunks are embedded and written before the old ones are deleted.
        """
        self._write(content_hash, documents, filters, user_id, replace=True)

    def _write(
        self,
        content_hash: str,
        documents: list[Document],
        filters: dict[str, Any] | None,
        user_id: str | None,
        replace: bool,
    ) -> None:
        owner = _owner(user_id)
        self._open()
        checked = [self._row(content_hash, document, filters, owner) for document in documents]
        self._embed(documents)
        rows = {}
        for row, document in zip(checked, documents, strict=True):
            # A server would keep the first of two equal ids, Milvus Lite the last.
            rows[row["id"]] = {**row, "vector": document.embedding}
        with self._writing(content_hash):
            stale = self._stale(content_hash, owner, rows) if replace else ""
            if stale and _is_nameless(content_hash, user_id, filters):
                raise InvalidDocument(
                    "This text has no name, and Agno gives all texts without one the same content hash, so it would "
                    "replace the last: pass name= to Knowledge.insert."
                )
            self._upsert(list(rows.values()))
            if stale:
                self._call(lambda client, seconds: client.delete(self.collection, filter=stale, timeout=seconds))

    @contextlib.contextmanager
    def _writing(self, *content_hashes: str) -> Iterator[None]:
        """Around a write: note the time by which it was done, for the reads that follow."""
        with self._clock.writing if self._is_lite else contextlib.nullcontext():
            try:
                yield
                now = self._now()
            except BaseException:
                self._clock.unsure = True
                raise
            self._clock.note(now, content_hashes)

    def _row(
        self, content_hash: str, document: Document, filters: Mapping[str, Any] | None, owner: str
    ) -> dict[str, Any]:
        """The document as a row, still without its vector."""
        content = document.content.replace("\x00", "\ufffd")
        row = {
            "id": _row_id(owner, content_hash, document.id or content),
            "user_id": owner,
            "content_hash": content_hash,
            "content_id": document.content_id or "",
            "name": document.name or "",
            "content": content,
        }
        for field, limit in MAX_BYTES.items():
            try:
                size = len(row[field].encode())
            except UnicodeEncodeError:
                raise InvalidDocument(
                    f"The {field} of {_title(document)} holds half of a surrogate pair: mend its encoding."
                ) from None
            if size > limit:
                raise InvalidDocument(
                    f"The {field} of {_title(document)} is longer than Milvus's limit of {limit:,} bytes"
                    f"{': split the document into smaller chunks' if field == 'content' else ''}."
                )
        return {**row, **_metadata_fields({**(document.meta_data or {}), **(filters or {})}, _title(document))}

    def _stale(self, content_hash: str, owner: str, rows: Mapping[str, Any]) -> str:
        """The expression for the owner's chunks of a document that are not among `rows`; "" if there are none."""
        expression = _same(content_hash=content_hash, user_id=owner)
        view = self._view(content=content_hash)
        if not self._any(expression, view):  # most documents are new, and naming all of their chunks is slow
            return ""
        if rows:
            kept = ", ".join(text_literal(row) for row in rows)
            expression = f"({expression}) and (id not in [{kept}])"
        return expression if self._any(expression, view) else ""

    def _any(self, expression: str, view: Mapping[str, Any]) -> bool:
        found = self._call(
            lambda client, seconds: client.query(
                self.collection, filter=expression, output_fields=["id"], limit=1, timeout=seconds, **view
            )
        )
        return bool(found)

    def _upsert(self, rows: Sequence[dict[str, Any]]) -> None:
        # Never pymilvus's insert: sent again after a lost answer it would double the rows.
        send = [partial(self._call, partial(_send, self.collection, batch)) for batch in _batches(rows)]
        if self._is_lite or len(send) == 1:
            for batch in send:
                batch()
        else:  # a server works on one batch while pymilvus packs the next
            sent = [_SENDING_POOL.submit(batch) for batch in send]
            wait(sent)  # also if one fails: none may arrive after the error
            for batch_sent in sent:
                batch_sent.result()

    def _embed(self, documents: Sequence[Document]) -> None:
        """Give every document an embedding, in batches where the embedder can, and check them all."""
        pending = [document for document in documents if document.embedding is None]
        if pending:
            for document, (vector, usage) in zip(pending, self._vectors([d.content for d in pending]), strict=True):
                document.embedding, document.usage = vector, usage
        try:
            for document in documents:
                self._check_vector(document.embedding)
        except InvalidEmbedding:
            for document in pending:
                document.embedding = None
            raise

    def _vectors(self, texts: list[str]) -> list[tuple[list[float], dict[str, Any] | None]]:
        batch = getattr(_of_background_loop(self.embedder), "async_get_embeddings_batch_and_usage", None)
        if batch is not None and len(texts) > 1:
            vectors, usages = _in_background_loop(batch(texts))
        else:
            pairs = list(_EMBEDDING_POOL.map(self.embedder.get_embedding_and_usage, texts))
            vectors, usages = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if len(vectors) != len(texts):
            raise InvalidEmbedding(f"The embedder returned {len(vectors)} vectors for {len(texts)} texts.")
        return list(zip(vectors, usages, strict=True))

    def _check_vector(self, vector: Sequence[float] | None) -> None:
        length = len(vector) if vector is not None else 0
        if length != self.dimensions:
            raise InvalidEmbedding(
                f"The embedder returned a vector of {length} numbers instead of {self.dimensions}: check its model and "
                "dimensions; nothing was written."
            )
        if not math.isfinite(sum(vector or ())):
            raise InvalidEmbedding("The embedder returned a vector with NaN or infinity in it; nothing was written.")

    def update_metadata(self, content_id: str, metadata: dict[str, Any]) -> None:
        """Merge `metadata` into that of every chunk of a content. Who owns the chunks does not change."""
        if not metadata:
            return
        self._open()
        fields = [*MAX_BYTES, "meta_data", "vector"]
        expression = _same(content_id=content_id)
        changed = []
        for row in self._all_rows(self.collection, expression, ["id", *fields], self._view()):
            merged = {**row["meta_data"], **metadata}
            if merged != row["meta_data"]:
                changed.append({**row, **_metadata_fields(merged, f"document {row['name']!r}")})
        if changed:
            with self._writing(*{row["content_hash"] for row in changed}):
                self._upsert(changed)

    def _all_rows(
        self, collection: str, expression: str, fields: list[str], view: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """All rows that match; a plain query returns at most 16,384.

        Raises:
            MilvusUnavailable: some are missing, since a query node has not caught up.
        """
        # The iterator knows no consistency level, but what a count has waited for is there.
        expected = self._count(expression, view, collection)
        if expected <= 1000:  # the iterator needs a second to begin on a server
            yield from self._call(
                lambda client, seconds: client.query(
                    collection,
                    filter=expression,
                    output_fields=fields,
                    limit=max(expected, 1),
                    timeout=seconds,
                    **view,
                )
            )
            return
        pages = self._call(
            lambda client, seconds: client.query_iterator(
                collection, batch_size=500, filter=expression, output_fields=fields, timeout=seconds
            )
        )
        found = 0
        try:
            while rows := self._call(lambda client, seconds: pages.next()):
                found += len(rows)
                yield from rows
        finally:
            pages.close()
        if found < expected:
            raise MilvusUnavailable(f"Milvus returned {found} of {expected} rows, since a node lags behind: try again.")

    def migrate(self, source: str) -> int:
        """Copy a collection of the stock adapter into this one, with its vectors, owners and metadata.

        Safe to repeat. The source stays as it is.

        Args:
            source: name of the collection that agno.vectordb.milvus.Milvus made, on the same Milvus.

        Returns:
            Number of chunks copied.

        Raises:
            CollectionMissing, CollectionMismatch: there is no such collection, or its vectors have another length.
        """
        self._open(create=True)
        if not self._call(lambda client, seconds: client.has_collection(source, timeout=seconds)):
            raise CollectionMissing(f"There is no collection {source} to copy from.")
        schema = self._fields(source)
        vector = "dense_vector" if "dense_vector" in schema else "vector"
        if not _is_of_stock_adapter(schema):
            raise CollectionMismatch(f"{source} was not made by agno.vectordb.milvus.Milvus.")
        if int(schema[vector]["params"]["dim"]) != self.dimensions:
            raise CollectionMismatch(f"The vectors of {source} do not have {self.dimensions} dimensions.")
        self._call(lambda client, seconds: client.load_collection(source, timeout=seconds))
        fields = ["id", "user_id", "content_hash", "content_id", "name", "content", "meta_data", vector]
        copied = 0
        rows = []
        with self._writing():
            for found in self._all_rows(source, _EVERYTHING, fields, {"consistency_level": "Strong"}):
                rows.append(self._migrated(found, found[vector]))
                if len(rows) == BATCH_ROWS:
                    self._upsert(rows)
                    copied, rows = copied + len(rows), []
            self._upsert(rows)
        return copied + len(rows)

    def _migrated(self, found: Mapping[str, Any], vector: list[float]) -> dict[str, Any]:
        meta_data = found.get("meta_data") or {}
        document = Document(
            content=found.get("content") or "",
            id=found["id"],
            name=found.get("name"),
            content_id=found.get("content_id"),
            meta_data=json.loads(meta_data) if isinstance(meta_data, str) else meta_data,
        )
        owner = found.get("user_id") or SHARED
        owner = SHARED if owner == "__shared__" else owner
        row = self._row(found.get("content_hash") or "", document, None, owner)
        return {**row, "vector": list(vector)}

    # --- searching ---

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
        """The nearest chunks, best first, as FoundDocument.

        Args:
            query: text to search for.
            limit: number of chunks, 1 to 16,384.
            filters: on the metadata, see `compile_filter`.
            user_id: search this user's chunks and the shared ones; None searches everyone's.
            search_type, consistency, search_params: for this search, instead of the store's.
        """
        chosen = SearchType(search_type) if search_type else self._take_search_type()
        if not 1 <= limit <= MAX_HITS:
            raise MilvusStoreError(f"A search returns 1 to {MAX_HITS:,} chunks, not {limit}.")
        self._open()
        self._require_bm25(chosen)
        options: dict[str, Any] = {
            "output_fields": ["name", "content", "content_id", "meta_data"],
            "limit": limit,
            **self._view(consistency),
        }
        expression = _scoped(compile_filter(filters), user_id)
        params = {"params": dict(self.search_params if search_params is None else search_params)}
        vector: list[float] = []
        if chosen is not SearchType.keyword:
            vector = self._query_vector(query)
        if chosen is SearchType.hybrid:
            pool = max(limit, self.candidates)
            requests = [
                AnnSearchRequest([vector], "vector", params, pool, expr=expression),
                AnnSearchRequest([query], "sparse", {}, pool, expr=expression),
            ]
            found = self._call(
                lambda client, seconds: client.hybrid_search(
                    self.collection, requests, self.fusion, timeout=seconds, **options
                )
            )
        else:
            words = chosen is SearchType.keyword
            found = self._call(
                lambda client, seconds: client.search(
                    self.collection,
                    data=[query] if words else [vector],
                    anns_field="sparse" if words else "vector",
                    filter=expression,
                    search_params={} if words else params,
                    timeout=seconds,
                    **options,
                )
            )
        documents: list[Document] = [self._found(hit, chosen) for hit in found[0]]
        if self.similarity_threshold and chosen is SearchType.vector:
            documents = [document for document in documents if self._similarity(document) >= self.similarity_threshold]
        return self.reranker.rerank(query, documents) if self.reranker and documents else documents

    def _query_vector(self, query: str) -> list[float]:
        try:
            vector = self.embedder.get_embedding(query)
        except EmbeddingError as error:  # Knowledge.search would make an empty list of it
            raise EmbedderUnavailable(f"The embedder did not answer ({error.safe_message.rstrip('.')}).") from error
        self._check_vector(vector)
        return vector

    def _found(self, hit: Mapping[str, Any], search_type: SearchType) -> FoundDocument:
        entity = hit["entity"]
        score = float(hit["distance"])
        if search_type is SearchType.keyword:
            score = abs(score)  # Milvus Lite returns BM25 scores as negative numbers
        elif search_type is SearchType.vector and self.distance is Distance.l2:
            score = -score
        cosine = search_type is SearchType.vector and self.distance is Distance.cosine
        return FoundDocument(
            content=entity["content"],
            id=str(hit["id"]),
            name=entity["name"] or None,
            meta_data=entity["meta_data"],
            content_id=entity["content_id"] or None,
            embedder=self.embedder,
            distance=1 - score if cosine else -score,
            score=score,
        )

    def _similarity(self, document: Document) -> float:
        assert isinstance(document, FoundDocument)
        inner_product = self.distance is Distance.max_inner_product
        return normalize_score(document.score if inner_product else document.distance, self.distance)

    # --- counting, checking, deleting ---

    def get_count(self, user_id: str | None = None) -> int:
        """Number of chunks that `search` with this user can find; all of them for None."""
        return self._count(_scoped("", user_id))

    def _count(self, expression: str, view: Mapping[str, Any] | None = None, collection: str | None = None) -> int:
        self._open()
        view = self._view() if view is None else view
        rows = self._call(
            lambda client, seconds: client.query(
                collection or self.collection,
                filter=expression,
                output_fields=["count(*)"],
                timeout=seconds,
                **view,
            )
        )
        return int(rows[0]["count(*)"])

    def content_hash_exists(self, content_hash: str, user_id: str | None = None) -> bool:
        """Whether this owner (None: the shared chunks) has chunks of a document."""
        return (
            self._count(_same(content_hash=content_hash, user_id=_owner(user_id)), self._view(content=content_hash)) > 0
        )

    def name_exists(self, name: str, user_id: str | None = None) -> bool:
        """Whether this owner (None: the shared chunks) has chunks with a name."""
        return self._count(_same(name=name, user_id=_owner(user_id))) > 0

    def id_exists(self, id: str, user_id: str | None = None) -> bool:
        """Whether there is a chunk with this id; of this owner, if one is given."""
        return self._count(_same(id=id, **({} if user_id is None else {"user_id": _owner(user_id)}))) > 0

    def delete_by_id(self, id: str, user_id: str | None = None) -> bool:
        """Delete one chunk; only if it is this owner's, if one is given. Whether there was one."""
        return self._delete(_same(id=id, **({} if user_id is None else {"user_id": _owner(user_id)})))

    def delete_by_name(self, name: str, user_id: str | None = None) -> bool:
        """Delete this owner's chunks with a name (None: the shared ones). Whether there were any."""
        return self._delete(_same(name=name, user_id=_owner(user_id)))

    def delete_by_metadata(self, metadata: dict[str, Any], user_id: str | None = None) -> bool:
        """Delete this owner's chunks that match a filter (None: the shared ones). Whether there were any.

        Raises:
            InvalidFilter: the filter is empty, which would delete everything; `drop` does that.
        """
        if not metadata:
            raise InvalidFilter("delete_by_metadata needs a filter; drop() removes everything.")
        return self._delete(_join("and", [compile_filter(metadata), _same(user_id=_owner(user_id))]))

    def delete_by_content_id(self, content_id: str, user_id: str | None = None) -> bool:
        """Delete a content's chunks: this owner's, or those of every owner for None. Whether there were any."""
        return self._delete(_same(content_id=content_id, **({} if user_id is None else {"user_id": _owner(user_id)})))

    def _delete(self, expression: str) -> bool:
        self._open()
        # A server's delete_count does not say how many rows there were.
        if not self._count(expression):
            return False
        with self._writing():
            self._call(lambda client, seconds: client.delete(self.collection, filter=expression, timeout=seconds))
        return True

    # --- asynchronous twins: the same calls in a thread, so they never block the loop and need no loop of their own ---

    async def async_create(self) -> None:
        """As `create`."""
        await _in_thread(self.create)

    async def async_exists(self) -> bool:
        """As `exists`."""
        return await _in_thread(self.exists)

    async def async_drop(self) -> None:
        """As `drop`."""
        await _in_thread(self.drop)

    async def async_name_exists(self, name: str, user_id: str | None = None) -> bool:  # type: ignore[override]
        """As `name_exists`."""
        return await _in_thread(self.name_exists, name, user_id)

    async def async_insert(
        self,
        content_hash: str,
        documents: list[Document],
        filters: dict[str, Any] | None = None,
        user_id: str | None = None,
    ) -> None:
        """As `insert`."""
        await _in_thread(self.insert, content_hash, documents, filters, user_id)

    async def async_upsert(
        self,
        content_hash: str,
        documents: list[Document],
        filters: dict[str, Any] | None = None,
        user_id: str | None = None,
    ) -> None:
        """As `upsert`."""
        await _in_thread(self.upsert, content_hash, documents, filters, user_id)

    async def async_search(
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
        """As `search`."""
        return await _in_thread(
            self.search,
            query,
            limit,
            filters,
            user_id,
            search_type=search_type or self._take_search_type(),
            consistency=consistency,
            search_params=search_params,
        )


# --- helpers ---------------------------------------------------------------------------------------------------------


def _checked_level(level: str) -> str:
    if level not in CONSISTENCY_LEVELS:
        raise MilvusStoreError(f"{level!r} is no consistency level: use one of {', '.join(CONSISTENCY_LEVELS)}.")
    return level


def _owner(user_id: str | None) -> str:
    if user_id is None:
        return SHARED
    if not user_id or len(user_id.encode(errors="replace")) > MAX_BYTES["user_id"]:
        raise MilvusStoreError(
            f"A user_id is a text of 1 to {MAX_BYTES['user_id']} bytes, or None for what all users share."
        )
    return user_id


def _same(**fields: str) -> str:
    """The expression for rows whose fields have these values."""
    return _join("and", [f"{field} == {text_literal(value)}" for field, value in fields.items()])


def _scoped(expression: str, user_id: str | None) -> str:
    """The expression, limited to what a user may see."""
    if user_id is None:
        return expression
    scope = f"user_id in [{text_literal(SHARED)}, {text_literal(_owner(user_id))}]"
    return f"({scope}) and ({expression})" if expression else scope


def _row_id(owner: str, content_hash: str, key: str) -> str:
    """The same chunk of the same owner always gets the same id, and no two owners' chunks do."""
    return hashlib.sha256(json.dumps([owner, content_hash, key]).encode()).hexdigest()


def _is_nameless(content_hash: str, user_id: str | None, filters: Mapping[str, Any] | None) -> bool:
    """Whether this is the hash that Knowledge (agno 3.1.10) gives to every text that is inserted without a name."""
    owner = [] if user_id is None else [hashlib.sha256(user_id.encode()).hexdigest()[:16]]
    metadata = [json.dumps(filters, sort_keys=True, default=str)] if filters else []
    return content_hash == hashlib.sha256(":".join([*owner, *metadata, "Text"]).encode()).hexdigest()


def _is_of_stock_adapter(fields: Mapping[str, Any]) -> bool:
    vectors = {"vector", "dense_vector"} & fields.keys()
    return bool(vectors) and "terms" not in fields and fields.get("id", {}).get("type") == DataType.VARCHAR


def _title(document: Document) -> str:
    return f"document {document.name!r}" if document.name else f"the document that begins {document.content[:40]!r}"


def _metadata_fields(metadata: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The two fields that hold metadata: `meta_data` as JSON text, and `terms`.

    Raises:
        InvalidDocument: it holds what JSON or Milvus has not, or is too large.
    """
    try:
        text = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDocument(
            f"The metadata of {title} is not JSON ({error}): use texts, numbers, lists and dicts."
        ) from None
    if size > MAX_METADATA_BYTES:
        raise InvalidDocument(f"The metadata of {title} is longer than Milvus's limit of {MAX_METADATA_BYTES:,} bytes.")
    terms = metadata_terms(json.loads(text, parse_int=partial(_int64, title)))
    if len(terms) > MAX_TERMS:
        raise InvalidDocument(f"The metadata of {title} has more than {MAX_TERMS:,} values.")
    return {"meta_data": text, "terms": terms}


def _int64(title: str, digits: str) -> int:
    value = int(digits)
    if value not in INT64:
        raise InvalidDocument(f"The metadata of {title} has a number beyond 64 bits: store it as a text.")
    return value


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows in batches that a message can hold."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        # Four bytes for each number and, at most, for each character; the terms repeat the metadata.
        row_size = 4 * (len(row["vector"]) + len(row["content"])) + 3 * len(row["meta_data"]) + 1000
        if batch and (len(batch) == BATCH_ROWS or size + row_size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row_size
    if batch:
        yield batch


def _send(collection: str, batch: list[dict[str, Any]], client: MilvusClient, seconds: float) -> None:
    client.upsert(collection, batch, timeout=seconds)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:  # pymilvus raises errors from themselves
        seen.append(cause)
        yield cause
        cause = cause.__cause__


def _grpc_status(error: BaseException) -> grpc.StatusCode | None:
    for cause in _causes(error):
        code = (
            cause.code()
            if isinstance(cause, grpc.RpcError) and hasattr(cause, "code")
            else getattr(cause, "code", None)
        )
        if isinstance(code, grpc.StatusCode):
            return code
    return None


# Server states that end by themselves: not ready, loading, no leader for a channel, a node gone.
_PASSING = re.compile(
    r"service not ready|service unavailable|not fully loaded|no available|channel not|node not|leader|unhealthy|"
    r"server unavailable|disconnected|shutting down|is not ready|failed to connect",
    re.IGNORECASE,
)


def _is_not_loaded(error: BaseException) -> bool:
    return getattr(error, "code", None) == 101


def _is_transient(error: BaseException) -> bool:
    status = _grpc_status(error)
    if status is not None:
        return status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    if isinstance(error, ConnectionConfigException):
        return False
    return (
        bool(getattr(error, "retriable", False))
        or _is_not_loaded(error)
        or bool(_PASSING.search(str(getattr(error, "message", ""))))
    )


_SENDING_POOL = ThreadPoolExecutor(max_workers=2, thread_name_prefix="milvus-store-sending")

# Embedders without a batch call are asked for several texts at a time.
_EMBEDDING_POOL = ThreadPoolExecutor(max_workers=8, thread_name_prefix="milvus-store-embedding")
_BACKGROUND_LOOP = asyncio.new_event_loop()
_BACKGROUND_EMBEDDERS: dict[int, tuple[Embedder, Embedder]] = {}


def _of_background_loop(embedder: Embedder) -> Embedder:
    """The embedder, or a copy of it with an asynchronous client of its own.

    Agno's embedders batch in their asynchronous client only, and that client belongs to the first event loop that uses
    it. This one is used in one loop of its own.
    """
    if not hasattr(embedder, "async_client"):
        return embedder
    known = _BACKGROUND_EMBEDDERS.get(id(embedder))
    if known is None or known[0] is not embedder:
        twin = copy.copy(embedder)
        twin.async_client = None
        known = _BACKGROUND_EMBEDDERS[id(embedder)] = (embedder, twin)
    return known[1]


def _in_background_loop(work: Coroutine[Any, Any, T]) -> T:
    with _PROCESS_LOCK:
        if not _BACKGROUND_LOOP.is_running():
            threading.Thread(target=_BACKGROUND_LOOP.run_forever, name="milvus-store-loop", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(work, _BACKGROUND_LOOP).result()


async def _in_thread(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_POOL, partial(context.run, call, *args, **kwargs))
