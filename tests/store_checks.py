"""What an Agno vector store on Milvus should do: one check for each known defect of the stock adapter.

The checks use only what agno.vectordb.base.VectorDb and Knowledge offer, so they run on ReliableMilvus (where all must
pass, see test_milvus_store.py) and on agno.vectordb.milvus.Milvus (whose failures make the table of notebook 01, see
benchmarks/adapter.py). A check returns if the store does the right thing and raises if it does not.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agno.filters import EQ, GT
from agno.knowledge.document import Document
from agno.knowledge.embedder import Embedder
from agno.knowledge.knowledge import Knowledge
from agno.vectordb.search import SearchType

from utils.bootstrap import ROOT
from utils.lesson import close_lite

DIMENSIONS = 32


class WordEmbedder(Embedder):
    """Counts words by their digest: texts that share words are near each other. Counts its own calls, too."""

    def __init__(self) -> None:
        super().__init__(dimensions=DIMENSIONS)
        self.texts: list[str] = []

    def get_embedding(self, text: str) -> list[float]:
        self.texts.append(text)
        vector = [0.01] * DIMENSIONS
        for word in text.lower().split():
            vector[hashlib.sha256(word.encode()).digest()[0] % DIMENSIONS] += 1
        length = math.sqrt(sum(number * number for number in vector))
        return [number / length for number in vector]

    def get_embedding_and_usage(self, text: str) -> tuple[list[float], dict[str, Any] | None]:
        return self.get_embedding(text), None

    async def async_get_embedding(self, text: str) -> list[float]:
        return self.get_embedding(text)

    async def async_get_embedding_and_usage(self, text: str) -> tuple[list[float], dict[str, Any] | None]:
        return self.get_embedding(text), None


@dataclass
class Place:
    """A Milvus, and the adapter under test.

    Attributes:
        mode: lite, lite_server, standalone or cluster.
        has_bm25: whether this Milvus has BM25, and with it keyword and hybrid search.
        prefix: of the collections' names, where several places share a server.
        lenient: help an adapter over its defects 1 and 20 in the checks of the other ones, which it could not pass
            otherwise: load a collection that a restart has released, wait until a write can be read.
    """

    mode: str
    uri: str
    token: str
    adapter: Callable[..., Any]
    has_bm25: bool
    prefix: str = "check"
    lenient: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _ready: list[str] = field(default_factory=list)

    def _name(self) -> str:
        return f"{self.prefix}_{next(self._numbers)}"

    def prepare(self, count: int) -> None:
        """Make collections ahead, at the same time: a server needs 3 seconds for one, and for thirty."""

        def make(name: str) -> str:
            self.adapter(name, embedder=WordEmbedder(), uri=self.uri, token=self.token).create()
            return name

        self._ready.append(make(self._name()))  # the stock adapter cannot open Milvus Lite in two threads at once
        with ThreadPoolExecutor(count) as pool:
            self._ready.extend(pool.map(make, [self._name() for _ in range(count - 1)]))

    def store(self, embedder: Embedder | None = None, **options: Any) -> Any:
        """A store on an empty collection; `options` may be anything that does not change the collection."""
        name = self._ready.pop() if self._ready else self._create(**options)
        store = self.open(name, embedder, **options)
        if self.lenient:
            store.client.load_collection(name)
        return store

    def new_store(self, embedder: Embedder | None = None, **options: Any) -> Any:
        """A store on a collection that is made with `options`."""
        store = self.open(self._name(), embedder, **options)
        store.create()
        return store

    def open(self, name: str, embedder: Embedder | None = None, **options: Any) -> Any:
        """A store object on a collection."""
        return self.adapter(name, embedder=embedder or WordEmbedder(), uri=self.uri, token=self.token, **options)

    def _create(self, **options: Any) -> str:
        name = self._name()
        self.open(name, **options).create()
        return name

    def settle(self, store: Any) -> None:
        """After writes: wait until they can be read, if the place is lenient."""
        if self.lenient:
            store.client.query(
                store.collection, filter="", output_fields=["count(*)"], consistency_level="Strong", timeout=20
            )

    def restart(self) -> None:
        """As far as a store can tell, Milvus Lite starts anew; a server goes on."""
        if self.mode == "lite":
            close_lite(Path(self.uri).parent)


def documents(*texts: str, **metadata: Any) -> list[Document]:
    """Named documents with the same metadata."""
    return [Document(content=text, name=f"name of {text}", meta_data=dict(metadata)) for text in texts]


def contents(found: list[Document]) -> list[str]:
    """Their texts, sorted."""
    return sorted(document.content for document in found)


@dataclass(frozen=True)
class Check:
    """One row of the table of defects."""

    row: int
    title: str
    run: Callable[[Place], None]


CHECKS: list[Check] = []


def check(row: int, title: str) -> Callable[[Callable[[Place], None]], Callable[[Place], None]]:
    def register(run: Callable[[Place], None]) -> Callable[[Place], None]:
        CHECKS.append(Check(row, title, run))
        return run

    return register


@check(1, "finds what was stored before a restart")
def restart(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("milvus keeps this"))
    place.settle(store)
    place.restart()
    assert contents(place.open(store.collection).search("milvus")) == ["milvus keeps this"]


@check(2, "keeps the first of two texts without a name, or says so")
def nameless(place: Place) -> None:
    store = place.store()
    knowledge = Knowledge(vector_db=store)
    knowledge.insert(text_content="the first text about Milvus")
    place.settle(store)
    knowledge.insert(text_content="the second text about Agno")
    place.settle(store)
    assert "the first text about Milvus" in contents(store.search("text", limit=5))


@check(3, "a filter's value and key cannot reach another user's chunks")
def injection(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("secret of bob", topic="x"), user_id="bob")
    place.settle(store)
    for value in ('x" or id != "") or (id == "', 'x") or (user_id != "'):
        assert store.search("secret", filters={"topic": value}, user_id="alice") == []
    key = 'topic"] == "x" or id != "") or (meta_data["topic'
    assert store.search("secret", filters={key: "x"}, user_id="alice") == []


def _refuses_words(place: Place, search_type: SearchType) -> None:
    """On a server without BM25 a store has to say so, and not to answer with something else."""
    store = place.store()
    store.insert("h", documents("a zebra"))
    place.settle(store)
    try:
        found = place.open(store.collection, search_type=search_type).search("zebra")
    except ValueError as error:
        assert "2.5" in str(error)
        return
    raise AssertionError(f"a search by words without BM25 was answered with {contents(found)}")


@check(4, "a hybrid search finds something, or says that it cannot")
def hybrid(place: Place) -> None:
    if not place.has_bm25:
        _refuses_words(place, SearchType.hybrid)
        return
    store = place.new_store(search_type=SearchType.hybrid)
    store.upsert("h", documents("milvus has hybrid search", "agno has teams"))
    place.settle(store)
    assert "agno has teams" in contents(store.search("teams"))


_SEARCH_BY_WORDS = """
import importlib, json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']
from store_checks import WordEmbedder
from agno.vectordb.search import SearchType
module, name, uri, token, collection = sys.argv[2:]
class Same(WordEmbedder):
    def get_embedding(self, text):
        return [1.0] * self.dimensions
adapter = getattr(importlib.import_module(module), name)
store = adapter(collection, embedder=Same(), uri=uri, token=token, search_type=SearchType.hybrid)
print(json.dumps([document.content for document in store.search("zebra", limit=1)]))
"""


@check(5, "words find the same in another process")
def other_process(place: Place) -> None:
    if not place.has_bm25:
        _refuses_words(place, SearchType.hybrid)
        return
    adapter = place.adapter

    class Same(WordEmbedder):
        def get_embedding(self, text: str) -> list[float]:
            return [1.0] * DIMENSIONS

    store = place.new_store(Same(), search_type=SearchType.hybrid)
    store.upsert("h", documents(*(f"horse number {number}" for number in range(20)), "a zebra among them"))
    place.settle(store)
    place.restart()
    arguments = [str(ROOT), adapter.__module__, adapter.__name__, place.uri, place.token, store.collection]
    answer = subprocess.run(
        [sys.executable, "-c", _SEARCH_BY_WORDS, *arguments],
        env={**os.environ, "PYTHONHASHSEED": "77", "GRPC_VERBOSITY": "NONE"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(answer.stdout.splitlines()[-1]) == ["a zebra among them"], answer.stderr[-500:]


@check(6, "a synchronous insert works with a hybrid store")
def hybrid_insert(place: Place) -> None:
    if not place.has_bm25:
        _refuses_words(place, SearchType.hybrid)
        return
    store = place.new_store(search_type=SearchType.hybrid)
    store.insert("h", documents("milvus has hybrid search"))
    place.settle(store)
    assert store.client.query(
        store.collection, filter='id != ""', output_fields=["content"], consistency_level="Strong"
    )


@check(7, "writes in batches")
def batches(place: Place) -> None:
    store = place.store()
    calls = []

    def counted(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        calls.append(call)
        return call(*arguments, **options)

    for name in ("insert", "upsert"):
        setattr(store.client, name, partial(counted, getattr(store.client, name)))
    store.insert("h", documents(*(f"text {number}" for number in range(20))))
    assert len(calls) == 1, f"{len(calls)} calls for 20 documents"


@check(8, "embeds each text once")
def embeds_once(place: Place) -> None:
    embedder = WordEmbedder()
    store = place.store(embedder)
    store.upsert("h", documents("one", "two", "three"))
    asyncio.run(store.async_upsert("g", documents("four", "five")))
    assert sorted(embedder.texts) == ["five", "four", "one", "three", "two"]


class _Broken(WordEmbedder):
    def get_embedding(self, text: str) -> list[float]:
        raise RuntimeError("the embedder is down")


@check(9, "a failing embedder loses nothing")
def failing_embedder(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("the old text"))
    place.settle(store)
    broken = place.open(store.collection, _Broken())
    for replace in (broken.upsert, lambda *a: asyncio.run(broken.async_upsert(*a))):
        try:
            replace("h", documents("the new text"))
        except Exception:
            continue
        raise AssertionError("no error")
    place.settle(store)
    assert contents(place.open(store.collection).search("text")) == ["the old text"]


@check(10, "an asynchronous search leaves the event loop free")
def does_not_block(place: Place) -> None:
    free = threading.Event()

    class Waiting(WordEmbedder):
        def get_embedding(self, text: str) -> list[float]:
            assert free.wait(3), "the event loop stood still"
            return super().get_embedding(text)

        async def async_get_embedding(self, text: str) -> list[float]:
            return await asyncio.to_thread(self.get_embedding, text)

    store = place.store()
    store.insert("h", documents("milvus"))
    place.settle(store)
    waiting = place.open(store.collection, Waiting())

    async def search() -> list[Document]:
        task = asyncio.create_task(waiting.async_search("milvus"))
        await asyncio.sleep(0.05)
        free.set()
        return await task

    assert contents(asyncio.run(search())) == ["milvus"]


@check(11, "works in a second event loop")
def two_loops(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("milvus"))
    place.settle(store)
    for _ in range(2):
        assert contents(asyncio.run(store.async_search("milvus"))) == ["milvus"]
    asyncio.run(store.async_insert("g", documents("agno")))


@check(12, "a missing collection is an error, not an empty list")
def errors_are_raised(place: Place) -> None:
    store = place.store()
    knowledge = Knowledge(vector_db=store)
    store.drop()
    searches: list[Callable[[], list[Document]]] = [
        lambda: knowledge.search("milvus"),
        lambda: asyncio.run(knowledge.asearch("milvus")),
    ]
    for search in searches:
        try:
            found = search()
        except ValueError:
            continue
        raise AssertionError(f"no error but {found}")


@check(13, "one search's type does not change the next")
def search_type_stays(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("milvus"))
    place.settle(store)
    knowledge = Knowledge(vector_db=store)
    try:
        knowledge.search("milvus", search_type="hybrid")
    except ValueError:
        assert not place.has_bm25
    assert store.search_type == SearchType.vector
    assert contents(knowledge.search("milvus")) == ["milvus"]


@check(14, "get_count counts this collection")
def counts(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("one", "two"))
    place.settle(store)
    assert store.get_count() == 2


@check(15, "name_exists takes any name")
def names(place: Place) -> None:
    store = place.store()
    store.insert("h", [Document(content="milvus", name="O'Reilly")])
    place.settle(store)
    assert store.name_exists("O'Reilly")
    assert not store.name_exists("zzz' or id != '")
    assert not store.name_exists('zzz" or id != "')


@check(16, "FilterExpr filters are applied")
def filter_expressions(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("old", year=2020))
    store.insert("g", documents("new", year=2026))
    place.settle(store)
    assert contents(store.search("text", filters=[GT("year", 2021)])) == ["new"]
    assert contents(store.search("text", filters=[EQ("year", 2020)])) == ["old"]


@check(17, "a keyword search looks for words, or says that it cannot")
def keyword(place: Place) -> None:
    if not place.has_bm25:
        _refuses_words(place, SearchType.keyword)
        return
    store = place.store()
    store.insert("h", documents("a zebra", "a horse"))
    place.settle(store)
    assert contents(place.open(store.collection, search_type=SearchType.keyword).search("zebra")) == ["a zebra"]


@check(18, "returns distances, and no vectors")
def distances(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("milvus"))
    place.settle(store)
    found = store.search("milvus")[0]
    assert found.embedding is None
    assert abs(found.distance) < 1e-3


@check(19, "deleting by metadata leaves other users' chunks alone")
def delete_by_metadata(place: Place) -> None:
    store = place.store()
    for user in (None, "alice", "bob"):
        store.insert("h", documents(f"of {user}", topic="x"), user_id=user)
    place.settle(store)
    store.delete_by_metadata({"topic": "x"})
    place.settle(store)
    assert contents(store.search("of", limit=9)) == ["of alice", "of bob"]


@check(20, "a chunk is found once its insert has returned")
def read_after_write(place: Place) -> None:
    store = place.store()
    for number in range(3):
        store.insert(f"h{number}", documents(f"text {number}"))
        assert len(store.search("text", limit=9)) == number + 1


@check(21, "metadata filters match")
def metadata(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("about indexes", topic="index", year=2026, draft=False, tags=["a", "b"]))
    place.settle(store)
    for filters in ({"topic": "index"}, {"year": 2026}, {"draft": False}, {"tags": ["b", "c"]}):
        assert contents(store.search("text", filters=filters)) == ["about indexes"], filters
    for filters in ({"topic": "other"}, {"year": 2025}, {"draft": True}, {"tags": ["c"]}):
        assert store.search("text", filters=filters) == [], filters


@check(22, "index and search parameters can be chosen")
def index_parameters(place: Place) -> None:
    options: dict[str, Any] = {"index_type": "IVF_FLAT", "index_params": {"nlist": 4}, "search_params": {"nprobe": 4}}
    accepted = inspect.signature(place.adapter).parameters
    assert options.keys() <= accepted.keys(), "no parameter for the index"
    store = place.new_store(**options)
    assert store.client.describe_index(store.collection, "vector")["index_type"] == "IVF_FLAT"
    store.insert("h", documents("milvus"))
    place.settle(store)
    assert contents(store.search("milvus")) == ["milvus"]
