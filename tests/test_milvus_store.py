"""ReliableMilvus on Milvus Lite, on a Lite server, on a standalone server and on a cluster: the same on all of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from agno.agent import Agent
from agno.filters import AND, CONTAINS, EQ, GT, GTE, IN, LT, LTE, NEQ, NOT, OR, STARTSWITH, FilterExpr
from agno.knowledge.document import Document
from agno.knowledge.embedder.openai import OpenAIEmbedder
from agno.knowledge.knowledge import Knowledge
from agno.vectordb.distance import Distance
from agno.vectordb.milvus import Milvus
from agno.vectordb.search import SearchType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymilvus import WeightedRanker
from pymilvus.exceptions import MilvusException
from store_checks import CHECKS, DIMENSIONS, Check, Place, WordEmbedder, contents, documents

from utils.bootstrap import ROOT
from utils.lesson import close_lite
from utils.milvus_lab import standalone
from utils.milvus_store import (
    AccessDenied,
    CollectionMismatch,
    CollectionMissing,
    EmbedderUnavailable,
    FoundDocument,
    InvalidDocument,
    InvalidEmbedding,
    InvalidFilter,
    MilvusStoreError,
    MilvusUnavailable,
    NotSupported,
    ReliableMilvus,
    compile_filter,
)

TABLE = ROOT / "data" / "benchmarks" / "adapter.json"
MODES = ["lite", "lite_server", "standalone", "cluster"]

on_each_example = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@pytest.fixture(scope="module", params=MODES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder: Path | None = None
    if request.param == "lite":
        folder = tmp_path_factory.mktemp("store")
        uri, token = str(folder / "milvus.db"), ""
    else:
        lab = request.getfixturevalue(f"milvus_{request.param}")
        uri, token = lab.uri, lab.token
    found = Place(request.param, uri, token, ReliableMilvus, has_bm25=request.param.startswith("lite"))
    found.prepare(40)
    yield found
    if folder:
        close_lite(folder)


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Place]:
    """Milvus Lite in a folder of its own, for what is the same everywhere or may be broken."""
    yield Place("lite", str(tmp_path / "milvus.db"), "", ReliableMilvus, has_bm25=True)
    close_lite(tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.run.__name__)
def test_defect_of_the_stock_adapter_is_absent(place: Place, check: Check) -> None:
    check.run(place)


@pytest.fixture(scope="module", params=["lite", "standalone"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The stock adapter, as tests/benchmarks/adapter.py runs it."""
    folder = tmp_path_factory.mktemp("stock")
    place = Place("lite", str(folder / "milvus.db"), "", Milvus, has_bm25=True, prefix="stock", lenient=True)
    if request.param == "standalone":
        lab = request.getfixturevalue("milvus_standalone")
        place = replace(place, mode="standalone", uri=lab.uri, token=lab.token, has_bm25=False)
    place.prepare(len(CHECKS))
    yield place
    close_lite(folder)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.run.__name__)
def test_stock_adapter_does_what_the_table_of_notebook_01_says(stock: Place, check: Check) -> None:
    row = next(row for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"] if row["row"] == check.row)
    try:
        check.run(stock)
        passed = True
    except Exception:  # whatever goes wrong, the check has failed
        passed = False
    assert passed == row[f"Milvus on {stock.mode}"], "agno has changed: run tests/benchmarks/adapter.py --save"


# --- filters: Milvus against a reading of the rules in Python ---

TEXTS = [
    "",
    "a",
    "ab",
    "b",
    "é",
    "日本",
    "it's",
    'say "hi"',
    "back\\slash",
    "line\nbreak",
    'x" or id != "',
    "\u2028",
    "%_",
]
NUMBERS = [0, 1, -1, 1.0, 1.5, -2.25, 2026, 1e300, 5e-324, 2**52]
KEYS = ["topic", "year", "flag", "tags", 'we"ird', "back\\slash", "clé", "a.b[0]"]
VALUES: list[Any] = [*TEXTS, *NUMBERS, True, False, None, [], ["a", "b"], [1, True], ["a", None], {"deep": "a"}]

METADATA: list[dict[str, Any]] = [
    {},
    *({KEYS[number % len(KEYS)]: value} for number, value in enumerate(VALUES)),
    *({"topic": value, "year": NUMBERS[number % len(NUMBERS)]} for number, value in enumerate(VALUES)),
]

scalars = st.one_of(st.sampled_from([*TEXTS, *NUMBERS, True, False, None]), st.text(max_size=8), st.integers(-3, 3))
keys = st.sampled_from(KEYS)
ordered = st.one_of(st.sampled_from([*TEXTS, *NUMBERS]), st.text(max_size=4))
leaves = st.one_of(
    st.builds(EQ, keys, scalars),
    st.builds(NEQ, keys, scalars),
    st.builds(IN, keys, st.lists(scalars, max_size=3)),
    *(st.builds(operator, keys, ordered) for operator in (GT, GTE, LT, LTE)),
    st.builds(STARTSWITH, keys, st.one_of(st.sampled_from(TEXTS), st.text(max_size=3))),
)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(AND, inner, inner), st.builds(OR, inner, inner), st.builds(NOT, inner), st.just(AND()), st.just(OR())
    ),
    max_leaves=5,
)
dicts = st.dictionaries(keys, st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=3)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(stored: Any, value: Any) -> bool:
    if value is None:
        return stored is None
    if isinstance(stored, list):
        return any(element is not None and _equal(element, value) for element in stored)
    alike = type(stored) is type(value) or (_number(stored) and _number(value))
    return alike and bool(stored == value)


def _precedes(left: Any, right: Any, or_equal: bool) -> bool:
    if not (_number(left) and _number(right)) and not (isinstance(left, str) and isinstance(right, str)):
        return False
    return bool(left <= right if or_equal else left < right)


def matches(filter_: Any, metadata: Mapping[str, Any]) -> bool:
    """What compile_filter's docstring says, in Python."""
    if isinstance(filter_, dict):
        return all(matches(IN(k, v) if isinstance(v, list) else EQ(k, v), metadata) for k, v in filter_.items())
    match filter_:
        case AND():
            return all(matches(part, metadata) for part in filter_.expressions)
        case OR():
            return any(matches(part, metadata) for part in filter_.expressions)
        case NOT():
            return not matches(filter_.expression, metadata)
    stored = metadata.get(filter_.key)
    match filter_:
        case EQ():
            return _equal(stored, filter_.value)
        case NEQ():
            return not _equal(stored, filter_.value)
        case IN():
            return any(_equal(stored, value) for value in filter_.values)
        case GT() | GTE():
            return _precedes(filter_.value, stored, isinstance(filter_, GTE))
        case LT() | LTE():
            return _precedes(stored, filter_.value, isinstance(filter_, LTE))
        case STARTSWITH():
            return isinstance(stored, str) and stored.startswith(filter_.value)
    raise AssertionError(filter_)


@pytest.fixture(scope="module")
def filtered(place: Place) -> ReliableMilvus:
    """A store with one document for each of METADATA, named by its position."""
    store: ReliableMilvus = place.store()
    rows = [Document(content="text", id=str(n), name=str(n), meta_data=dict(m)) for n, m in enumerate(METADATA)]
    store.insert("h", rows)
    return store


@on_each_example
@given(filters=st.one_of(dicts, expressions, st.lists(expressions, max_size=2)))
def test_filter_means_the_same_everywhere(filtered: ReliableMilvus, filters: Any) -> None:
    found = {int(document.name or "") for document in filtered.search("text", limit=100, filters=filters)}
    conditions = filters if isinstance(filters, list) else [filters]
    assert found == {n for n, m in enumerate(METADATA) if all(matches(condition, m) for condition in conditions)}


def test_metadata_comes_back_as_it_was(filtered: ReliableMilvus) -> None:
    found = filtered.search("text", limit=100)
    assert {int(document.name or ""): document.meta_data for document in found} == dict(enumerate(METADATA))


@pytest.mark.parametrize(
    "filters",
    [
        [CONTAINS("topic", "x")],
        {"topic": b"bytes"},
        {"topic": float("nan")},
        {"topic": {"nested": 1}},
        {1: "x"},
        "topic == 1",
        ["topic == 1"],
        [GT("year", None)],
        [GT("year", True)],
        [GT("", 1)],
        [GT("a\tb", 1)],
        [GT("year", 10**400)],
        [STARTSWITH("topic", cast(str, 1))],
        {"topic": "\ud800"},
        [NOT(NOT(NOT(NOT(NOT(NOT(NOT(NOT(NOT(NOT(EQ("a", 1)))))))))))],
    ],
    ids=str,
)
def test_filter_that_cannot_be_answered_is_refused(filters: Any) -> None:
    with pytest.raises(InvalidFilter):
        # A lone surrogate is plain ASCII in a term, so it is harmless there; as a prefix or a name it is refused.
        compile_filter(filters if filters != {"topic": "\ud800"} else [STARTSWITH("topic", "\ud800")])


# --- users ---

USERS = ["alice", "bob", 'alice" or user_id != "', "alice' or '1'=='1", "%", "\\", "é", "a\nb", "__shared__", " "]


@pytest.fixture(scope="module")
def shared_by_users(place: Place) -> ReliableMilvus:
    """A store in which every user has one document, with the user as topic, and two are everyone's."""
    store: ReliableMilvus = place.store()
    for user in USERS:
        store.insert(user, [Document(content="text", name=f"of {user}", meta_data={"topic": user})], user_id=user)
    store.insert("all", documents("text", topic="all"))
    return store


@on_each_example
@given(
    user=st.one_of(st.sampled_from(USERS), st.text(min_size=1, max_size=20)),
    filters=st.one_of(
        st.dictionaries(st.one_of(st.just("topic"), st.text(max_size=9)), st.one_of(st.sampled_from(USERS), st.text())),
        st.lists(st.builds(NEQ, st.sampled_from(["topic", "user_id"]), st.sampled_from(USERS)), max_size=2),
    ),
)
def test_user_sees_their_own_and_the_shared_chunks_only(
    shared_by_users: ReliableMilvus, user: str, filters: dict[str, str] | list[FilterExpr]
) -> None:
    found = {document.name for document in shared_by_users.search("text", 100, filters, user)}
    assert found <= {f"of {user}", "name of text"}


@pytest.mark.parametrize("user", USERS)
def test_user_counts_and_checks_their_own(shared_by_users: ReliableMilvus, user: str) -> None:
    store = shared_by_users
    assert {document.name for document in store.search("text", 100, user_id=user)} == {f"of {user}", "name of text"}
    assert store.get_count(user) == 2
    assert store.content_hash_exists(user, user)
    assert store.name_exists(f"of {user}", user)
    for other in USERS:
        if other != user:
            assert not store.content_hash_exists(other, user)
            assert not store.name_exists(f"of {other}", user)
    assert not store.content_hash_exists(user)
    assert not store.name_exists(f"of {user}")


def test_user_deletes_only_their_own(place: Place) -> None:
    store = place.store()
    for user in (None, "alice", "bob"):
        document = Document(
            content=f"of {user}", id="same", name="same", content_id="same", meta_data={"topic": "same"}
        )
        store.insert("same", [document], user_id=user)
    everyone = ["of None", "of alice", "of bob"]
    of_alice = next(d for d in store.search("of", user_id="alice") if d.content == "of alice")
    for crafted in ('same" or user_id != "', "same' or '1'=='1", "%"):
        assert not store.delete_by_name(crafted, "bob")
        assert not store.delete_by_content_id(crafted, "bob")
        assert not store.delete_by_id(crafted)
        assert not store.delete_by_metadata({"topic": crafted}, "bob")
    assert not store.delete_by_id(of_alice.id, "bob")
    assert contents(store.search("of")) == everyone
    assert store.delete_by_id(of_alice.id, "alice")
    assert not store.id_exists(of_alice.id)
    assert contents(store.search("of")) == ["of None", "of bob"]
    assert store.delete_by_name("same", "bob")
    assert contents(store.search("of")) == ["of None"]
    assert store.delete_by_content_id("same")
    assert store.search("of") == []


def test_empty_user_and_empty_filter_are_refused(lite: Place) -> None:
    store = lite.store()
    with pytest.raises(MilvusStoreError, match="user_id"):
        store.search("x", user_id="")
    with pytest.raises(MilvusStoreError, match="user_id"):
        store.insert("h", documents("x"), user_id="é" * 200)
    with pytest.raises(InvalidFilter, match="drop"):
        store.delete_by_metadata({})


# --- replacing documents ---


def test_upsert_replaces_one_document_of_one_owner(place: Place) -> None:
    store = place.store()
    store.upsert("report", documents("page one", "page two", "page three"))
    store.upsert("report", documents("page one of alice"), user_id="alice")
    store.upsert("other", documents("page of another"))
    store.upsert("report", documents("page one", "page 2"), {"edition": 2})
    assert contents(store.search("page", 9)) == ["page 2", "page of another", "page one", "page one of alice"]
    assert contents(store.search("page", 9, {"edition": 2})) == ["page 2", "page one"]


def test_interrupted_replacement_loses_nothing_and_ends_well_when_repeated(place: Place) -> None:
    store = place.store()
    store.upsert("report", documents("old one", "old two"))
    delete = store.client.delete

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    store.client.delete = fail
    with pytest.raises(KeyboardInterrupt):
        store.upsert("report", documents("new one"))
    store.client.delete = delete
    assert contents(store.search("one", 9)) == ["new one", "old one", "old two"]
    store.upsert("report", documents("new one"))
    assert contents(store.search("one", 9)) == ["new one"]


def test_update_metadata_reaches_every_chunk_and_no_owner(place: Place) -> None:
    store = place.store()
    chunks = [Document(content=f"page {n}", content_id="c", meta_data={"page": n, "draft": True}) for n in range(3)]
    store.insert("h", chunks, user_id="alice")
    store.update_metadata("c", {"draft": False, "user_id": "bob"})
    found = store.search("page", filters={"draft": False}, user_id="alice")
    assert sorted(document.meta_data["page"] for document in found) == [0, 1, 2]
    assert store.search("page", user_id="bob") == []


def test_many_threads_and_tasks_write_and_read_at_once(place: Place) -> None:
    store = place.store()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.insert(f"h{n}", documents(f"thread {n}")), range(8)))

    async def write() -> list[list[Document]]:
        await asyncio.gather(*(store.async_upsert(f"t{n}", documents(f"task {n}")) for n in range(8)))
        return await asyncio.gather(*(store.async_search(f"task {n}", 99) for n in range(8)))

    expected = sorted(f"{kind} {n}" for kind in ("thread", "task") for n in range(8))
    assert all(contents(found) == expected for found in asyncio.run(write()))


def test_more_than_64_megabytes_at_once(place: Place) -> None:
    if place.mode != "standalone":
        pytest.skip("once is enough for so much")
    store = place.store()
    text = "m" * 60_000
    store.insert("h", [Document(content=f"{n} {text}", embedding=[1.0] * DIMENSIONS) for n in range(1100)])
    assert store.get_count() == 1100


# --- searching ---


def test_words_and_both_searches_with_scores(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("zebra zebra zebra", "a zebra and a horse", "two horses"), user_id="alice")
    if not place.has_bm25:
        for search_type in (SearchType.keyword, SearchType.hybrid):
            with pytest.raises(NotSupported, match="2.5"):
                store.search("zebra", search_type=search_type)
            with pytest.raises(NotSupported, match="2.5"):
                place.open("never_made", search_type=search_type).create()
        return
    words = store.search("zebra", search_type=SearchType.keyword)
    assert [document.content for document in words] == ["zebra zebra zebra", "a zebra and a horse"]
    assert words[0].score > words[1].score > 0
    assert [document.distance for document in words] == [-document.score for document in words]
    assert store.search("zebra", search_type=SearchType.keyword, user_id="bob") == []
    weighted = place.open(store.collection, fusion=WeightedRanker(0.1, 0.9), search_type=SearchType.hybrid)
    for found in (weighted.search("zebra"), store.search("zebra", search_type=SearchType.hybrid)):
        assert len(found) == 3
        assert found[0].content == "zebra zebra zebra"
        assert found[0].distance < found[-1].distance


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (Distance.cosine, [0.0, 1.0, 2.0]),
        (Distance.l2, [0.0, 5.0, 9.0]),
        (Distance.max_inner_product, [-1.0, 0.0, 2.0]),
    ],
    ids=lambda value: getattr(value, "value", ""),
)
def test_distance_is_smaller_the_nearer(place: Place, distance: Distance, expected: list[float]) -> None:
    if place.mode == "cluster":
        pytest.skip("the same program as the standalone server")

    class Axis(WordEmbedder):
        def get_embedding(self, text: str) -> list[float]:
            return [1.0, *[0.0] * (DIMENSIONS - 1)]

    store = place.new_store(Axis(), distance=distance)
    for position, (first, second) in enumerate([(1.0, 0.0), (0.0, 2.0), (-2.0, 0.0)]):
        vector = [first, second, *[0.0] * (DIMENSIONS - 2)]
        store.insert(str(position), [Document(content=str(position), embedding=vector)])
    found = store.search("x")
    assert [document.content for document in found] == ["0", "1", "2"]
    assert all(isinstance(document, FoundDocument) for document in found)
    assert [document.distance for document in found] == pytest.approx(expected, abs=1e-5)


def test_similarity_threshold_leaves_out_what_is_far(lite: Place) -> None:
    store = lite.store()
    store.insert("h", documents("milvus index", "something else"))
    near = lite.open(store.collection, similarity_threshold=0.9)
    assert contents(near.search("milvus index")) == ["milvus index"]


@pytest.mark.parametrize("limit", [0, -1, 16_385])
def test_limit_out_of_range_is_refused(lite: Place, limit: int) -> None:
    with pytest.raises(MilvusStoreError, match="16,384"):
        lite.store().search("x", limit)


def test_consistency_is_chosen_by_store_and_by_call(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("text"))
    assert contents(store.search("text", consistency="Strong")) == ["text"]
    assert len(place.open(store.collection, consistency="Eventually").search("text")) <= 1
    assert len(store.search("text", consistency="Bounded")) <= 1
    with pytest.raises(MilvusStoreError, match="Strong, Session, Bounded, Eventually"):
        store.search("text", consistency="strong")


_READER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']
from store_checks import WordEmbedder
from utils.milvus_store import ReliableMilvus
store = ReliableMilvus(sys.argv[4], uri=sys.argv[2], token=sys.argv[3], embedder=WordEmbedder())
store.search("text")
print("open", flush=True)
for line in sys.stdin:
    store.read_after(int(line))
    print(len(store.search("text", 99)), flush=True)
"""


def test_the_first_searches_may_come_together() -> None:
    """Left to pymilvus, scipy.sparse is loaded by all of the first searches at once, and some of them fail."""
    program = "import sys, utils.milvus_store; sys.exit('scipy.sparse' not in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_another_process_is_told_what_to_wait_for(place: Place) -> None:
    if place.mode == "lite":
        pytest.skip("Milvus Lite serves one process")
    store = place.store()
    arguments = [sys.executable, "-c", _READER, str(ROOT), place.uri, place.token, store.collection]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin
        assert reader.stdout
        assert reader.stdout.readline() == "open\n"
        for number in range(1, 4):
            store.insert(str(number), documents(f"text {number}"))
            print(store.last_write, file=reader.stdin, flush=True)
            assert reader.stdout.readline() == f"{number}\n"
        reader.stdin.close()


# --- collections ---


def test_creating_and_dropping(place: Place) -> None:
    store = place.open("made_here")
    assert not store.exists()
    with pytest.raises(CollectionMissing, match="create"):
        store.search("x")
    assert store.delete() is False
    with ThreadPoolExecutor(4) as pool:  # services that start at the same time
        list(pool.map(lambda _: place.open("made_here").create(), range(4)))
    store.insert("h", documents("text"))
    asyncio.run(store.async_create())
    assert asyncio.run(store.async_exists())
    assert asyncio.run(store.async_name_exists("name of text"))
    store.optimize()
    assert contents(store.search("text")) == ["text"]
    asyncio.run(store.async_drop())
    assert not store.exists()
    with pytest.raises(CollectionMissing):
        store.search("x")
    store.create()
    assert store.get_count() == 0


def test_a_loaded_collection_keeps_its_copies_whatever_a_store_asks_for(
    milvus_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("utils.milvus_store.logger.warning", said.append)
    place = Place("cluster", milvus_cluster.uri, milvus_cluster.token, ReliableMilvus, False, prefix="copies")

    def loaded(store: ReliableMilvus) -> int:
        assert contents(store.search("text")) == ["text"]
        return len(store.client.describe_replica(store.collection))

    one = place.new_store()
    one.insert("h", documents("text"))
    assert loaded(one) == 1
    one.client.release_collection(one.collection)
    one.client.load_collection(one.collection, replica_number=2)  # as an operator does who scales
    for replicas in (None, 2, 1):
        store = place.open(one.collection, replicas=replicas)
        store.create()
        assert loaded(store) == 2 and len(said) == (replicas == 1), "no service is refused, and nothing released"
    assert f"{one.collection} is loaded with 2 copies and stays so, although replicas is 1" in said[0]

    one.client.release_collection(one.collection)
    two = place.open(one.collection, replicas=2)
    two.create()
    assert loaded(two) == 2
    two.client.release_collection(two.collection)
    assert loaded(two) == 2, "loaded again by the search that found it released"
    two.client.release_collection(two.collection)
    two.client.load_collection(two.collection, replica_number=2, _async=True)  # another process has begun
    late = place.open(one.collection, replicas=1)
    late.create()
    assert loaded(late) == 2


def test_interrupted_creation_is_completed(lite: Place) -> None:
    store = lite.open("half")
    store.client.create_index = None
    with pytest.raises(TypeError):
        store.create()
    whole = lite.open("half")
    whole.create()
    whole.insert("h", documents("text"))
    assert contents(whole.search("text")) == ["text"]


def test_collection_of_another_embedder_or_program_is_refused(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("text"))

    class Short(WordEmbedder):
        def __init__(self) -> None:
            super().__init__()
            self.dimensions = 8

    with pytest.raises(CollectionMismatch, match="32 dimensions and the embedder makes 8"):
        place.open(store.collection, Short()).search("text")
    assert contents(store.search("text")) == ["text"]
    store.client.create_collection("foreign", dimension=DIMENSIONS)
    with pytest.raises(CollectionMismatch, match="not made by this store"):
        place.open("foreign").create()


@pytest.mark.parametrize("search_type", [SearchType.vector, SearchType.hybrid])
def test_collection_of_the_stock_adapter_is_refused_and_copied(place: Place, search_type: SearchType) -> None:
    if search_type is SearchType.hybrid and not place.has_bm25:
        pytest.skip("this server has no sparse vectors")
    stock = Milvus("stock_" + search_type.value, embedder=WordEmbedder(), uri=place.uri, token=place.token)
    stock.search_type = search_type
    stock.create()
    chunk = Document(content="milvus text", name="O'Reilly", content_id="c", meta_data={"topic": "x", "tags": ["a"]})
    stock.upsert("h", [chunk])
    stock.upsert("h", documents("text of alice", year=2026), user_id="alice")
    store = place.open(stock.collection)
    for use in (store.create, lambda: store.search("text")):
        with pytest.raises(CollectionMismatch, match="migrate"):
            use()
    copy = place.store()
    for _ in range(2):  # repeating does no harm
        assert copy.migrate(stock.collection) == 2
        assert copy.get_count() == 2
    found = {document.content: document for document in copy.search("text", user_id="alice")}
    assert found["milvus text"].meta_data == {"topic": "x", "tags": ["a"]}
    assert (found["milvus text"].name, found["milvus text"].content_id) == ("O'Reilly", "c")
    assert contents(copy.search("text", user_id="bob")) == ["milvus text"]
    assert contents(copy.search("text", filters={"tags": ["a"]})) == ["milvus text"]
    copy.upsert("h", [chunk])
    assert contents(copy.search("text")) == ["milvus text", "text of alice"]
    with pytest.raises(CollectionMissing):
        copy.migrate("nowhere")
    with pytest.raises(CollectionMismatch):
        copy.migrate(copy.collection)


# --- bad input: one sentence, and nothing that is stored is lost ---


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (Document(content="é" * 33_000), "65,535 bytes"),
        (Document(content="x", name="n" * 3000), "name of document"),
        (Document(content="x", meta_data={"k": "v" * 70_000}), "65,536 bytes"),
        (Document(content="x", meta_data={"k": object()}), "not JSON"),
        (Document(content="x", meta_data={"k": float("nan")}), "not JSON"),
        (Document(content="x", meta_data={"k": 2**63}), "64 bits"),
        (Document(content="x", meta_data={"k": list(range(5000))}), "more than 4,096 values"),
        (Document(content="lone \ud800"), "surrogate"),
    ],
    ids=["text", "name", "metadata", "object", "nan", "integer", "values", "surrogate"],
)
def test_document_that_milvus_cannot_hold(lite: Place, bad: Document, sentence: str) -> None:
    store = lite.store()
    store.insert("h", documents("kept"))
    for write in (store.insert, store.upsert):
        with pytest.raises(InvalidDocument, match=sentence):
            write("h", [Document(content="first of its batch"), bad])
    assert contents(store.search("kept")) == ["kept"]


@pytest.mark.parametrize(
    ("vector", "sentence"),
    [
        ([1.0] * 31, "31 numbers instead of 32"),
        ([], "0 numbers"),
        ([float("nan")] * 32, "NaN"),
        ([float("inf")] * 32, "NaN or infinity"),
    ],
    ids=["short", "none", "nan", "infinite"],
)
def test_embedder_that_returns_nonsense(lite: Place, vector: list[float], sentence: str) -> None:
    class Nonsense(WordEmbedder):
        def get_embedding(self, text: str) -> list[float]:
            return vector

    store = lite.store()
    store.insert("h", documents("kept"))
    broken = lite.open(store.collection, Nonsense())
    for write in (broken.insert, broken.upsert):
        with pytest.raises(InvalidEmbedding, match=sentence):
            write("h", documents("new"))
    with pytest.raises(InvalidEmbedding, match=sentence):
        broken.search("kept")
    assert contents(store.search("kept")) == ["kept"]


def test_query_that_cannot_be_embedded_is_an_error_and_not_an_empty_list(lite: Place, closed_port: int) -> None:
    store = lite.store()
    store.insert("h", documents("kept"))
    away = OpenAIEmbedder(
        id="any",
        base_url=f"http://127.0.0.1:{closed_port}/v1",
        api_key="none",
        dimensions=DIMENSIONS,
        client_params={"max_retries": 0},
    )
    dead = lite.open(store.collection, away)
    with pytest.raises(EmbedderUnavailable, match=r"^The embedder did not answer \(.+\)\.$"):
        Knowledge(vector_db=dead).search("kept")


def test_embedder_that_returns_too_few(lite: Place) -> None:
    class Batch(WordEmbedder):
        async def async_get_embeddings_batch_and_usage(self, texts: list[str]) -> tuple[list[Any], list[Any]]:
            return [self.get_embedding(text) for text in texts[1:]], [None] * (len(texts) - 1)

    store = lite.store(Batch())
    with pytest.raises(InvalidEmbedding, match="1 vectors for 2 texts"):
        store.insert("h", documents("one", "two"))


def test_embedder_with_batches_is_asked_once(lite: Place) -> None:
    asked: list[int] = []

    class Batch(WordEmbedder):
        async def async_get_embeddings_batch_and_usage(self, texts: list[str]) -> tuple[list[Any], list[Any]]:
            asked.append(len(texts))
            return [self.get_embedding(text) for text in texts], [None] * len(texts)

    store = lite.store(Batch())
    store.insert("h", documents(*(f"text {n}" for n in range(20))))
    asyncio.run(store.async_insert("g", documents("a", "b")))
    assert asked == [20, 2]


def test_two_equal_ids_in_one_call_make_one_chunk(place: Place) -> None:
    store = place.store()
    store.insert("h", [Document(content="first", id="same"), Document(content="second", id="same")])
    assert contents(store.search("x")) == ["second"]


@pytest.mark.parametrize("name", ["", "1st", "a-b", "a" * 256, "a b"])
def test_collection_name_that_milvus_refuses(name: str) -> None:
    with pytest.raises(MilvusStoreError, match="cannot name a collection"):
        ReliableMilvus(name, embedder=WordEmbedder())


def test_hashed_words_of_the_stock_adapter_are_refused() -> None:
    with pytest.raises(MilvusStoreError, match="BM25"):
        ReliableMilvus("x", embedder=WordEmbedder(), sparse_vector_dimensions=100)


def test_no_server_at_the_uri(closed_port: int) -> None:
    store = ReliableMilvus("x", uri=f"http://127.0.0.1:{closed_port}", embedder=WordEmbedder(), timeout=0.5)
    with pytest.raises(MilvusUnavailable, match="does not answer: start it"):
        store.search("x")
    with pytest.raises(MilvusUnavailable):
        Knowledge(vector_db=store)


def test_server_that_is_still_starting() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(MilvusUnavailable, match="not ready yet"):
            ReliableMilvus("x", uri=uri, embedder=WordEmbedder(), timeout=1).exists()


@pytest.mark.parametrize("token", ["root:wrong", ""])
def test_wrong_token(milvus_standalone: Any, token: str) -> None:
    store = ReliableMilvus("x", uri=milvus_standalone.uri, token=token, embedder=WordEmbedder(), timeout=60)
    with pytest.raises(AccessDenied, match="refuses the token"):
        store.exists()


@pytest.mark.parametrize("uri", ["milvus", "./data", "ftp://x"])
def test_uri_that_is_none(uri: str) -> None:
    with pytest.raises(MilvusStoreError, match="no address of Milvus"):
        ReliableMilvus("x", uri=uri, embedder=WordEmbedder()).exists()


def test_dead_server_is_no_empty_answer_to_an_agent(lite: Place, offline_models: Any, closed_port: int) -> None:
    from utils import models

    knowledge = Knowledge(vector_db=lite.store())
    knowledge.vector_db = ReliableMilvus(
        "x", uri=f"http://127.0.0.1:{closed_port}", embedder=WordEmbedder(), timeout=0.2
    )
    with pytest.raises(MilvusUnavailable):
        knowledge.search("milvus")
    agent = Agent(model=models.chat_model(), knowledge=knowledge, search_knowledge=True, telemetry=False)
    run = agent.run("What is Milvus Lite?")
    told = [str(message.content) for message in run.messages or [] if message.role == "tool"]
    assert told
    assert all("MilvusUnavailable" in text for text in told), told


def test_lite_file_that_another_process_holds(tmp_path: Path) -> None:
    uri = str(tmp_path / "milvus.db")
    program = (
        "import sys; from pymilvus import MilvusClient; c = MilvusClient(sys.argv[1]); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", program, uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(MilvusUnavailable, match="another process holds it"):
            ReliableMilvus("x", uri=uri, embedder=WordEmbedder()).exists()
        holder.kill()


def test_lite_file_of_an_old_version(tmp_path: Path) -> None:
    old = tmp_path / "milvus.db"
    old.write_bytes(b"SQLite format 3\x00" + bytes(1000))
    with pytest.raises(CollectionMismatch, match="Milvus Lite 2"):
        ReliableMilvus("x", uri=str(old), embedder=WordEmbedder()).create()
    assert old.stat().st_size == 1016


def test_two_threads_open_a_lite_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "milvus.db")
    with ThreadPoolExecutor(8) as pool:
        stores = [ReliableMilvus("x", uri=uri, embedder=WordEmbedder()) for _ in range(8)]
        list(pool.map(lambda store: store.create(), stores))
    close_lite(tmp_path)


def test_lite_that_was_closed_and_opened_again(lite: Place) -> None:
    store = lite.store()
    store.insert("h", documents("text"))
    close_lite(Path(lite.uri).parent)
    assert contents(store.search("text")) == ["text"]


def test_full_disk(small_disk: Any) -> None:
    folder = small_disk(6)
    store = ReliableMilvus("x", uri=str(folder / "milvus.db"), embedder=WordEmbedder(), timeout=5)
    store.create()
    store.insert("h", documents("kept"))
    filler = [Document(content=f"{n} " + "x" * 60_000, embedding=[1.0] * DIMENSIONS) for n in range(200)]
    with pytest.raises(MilvusStoreError, match="disk"):
        store.insert("big", filler)
    close_lite(folder)
    again = ReliableMilvus("x", uri=str(folder / "milvus.db"), embedder=WordEmbedder(), timeout=5)
    assert "kept" in contents(again.search("kept", 5))
    close_lite(folder)
    shutil.rmtree(folder / "milvus.db")


# --- errors that pass, and errors that do not ---


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (MilvusException(2, "service not ready[NodeID=1]"), 3),
        (MilvusException(65535, "no available shard leaders"), 3),
        (MilvusException(1100, "invalid parameter"), 1),
        (MilvusException(65535, "cannot parse expression"), 1),
    ],
    ids=["not ready", "no leader", "invalid", "parse"],
)
def test_passing_errors_are_retried_and_others_are_not(lite: Place, error: MilvusException, calls: int) -> None:
    store = lite.store()
    store.insert("h", documents("text"))
    search, seen = store.client.search, []

    def fail_twice(*arguments: Any, **options: Any) -> Any:
        seen.append(options["timeout"])
        if len(seen) < 3:
            raise error
        return search(*arguments, **options)

    store.client.search = fail_twice
    store.search("text") if calls == 3 else pytest.raises(MilvusStoreError, store.search, "text")
    assert len(seen) == calls
    assert all(later < earlier <= store.timeout for earlier, later in itertools.pairwise(seen))


def test_waiting_ends_when_the_time_is_up(lite: Place) -> None:
    store = lite.store(timeout=0.5)

    def fail(*_: Any, **__: Any) -> Any:
        raise MilvusException(2, "service not ready")

    store.client.search = fail
    with pytest.raises(MilvusUnavailable, match="0.5 seconds"):
        store.search("text")


def test_embedder_with_an_asynchronous_client_works_in_several_loops(lite: Place, offline_models: Any) -> None:
    from utils import models

    store = lite.new_store(models.embedder())
    for number in range(3):
        asyncio.run(store.async_insert(str(number), documents(f"text {number}", f"page {number}")))
        assert len(asyncio.run(store.async_search("text", 99))) == 2 * (number + 1)


def test_close_and_go_on(place: Place) -> None:
    store = place.store()
    store.insert("h", documents("text"))
    store.close()
    assert contents(store.search("text")) == ["text"]


# --- a server that dies ---


@pytest.fixture
def mortal(milvus_standalone: Any, tmp_path: Path) -> Iterator[Any]:
    """A standalone server that no other test uses; `milvus_standalone` skips where there is none."""
    with standalone(tmp_path / "lab", progress=False) as lab:
        yield lab


def test_server_killed_in_the_middle_of_an_upsert(mortal: Any) -> None:
    lab = mortal
    store = ReliableMilvus("killed", uri=lab.uri, token=lab.token, embedder=WordEmbedder(), timeout=60)
    store.create()
    old = [Document(content=f"old {n}", embedding=[1.0] * DIMENSIONS) for n in range(2500)]
    store.upsert("report", old)
    assert store.get_count() == 2500
    new = [Document(content=f"new {n} " + "x" * 5000, embedding=[1.0] * DIMENSIONS) for n in range(4000)]
    sent = threading.Event()
    upsert = store.client.upsert

    def watch(*args: Any, **options: Any) -> Any:
        result = upsert(*args, **options)
        sent.set()
        return result

    store.client.upsert = watch
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.upsert, "report", new)
        assert sent.wait(30)
        lab.kill()
        lab.restart()
        writing.result()  # the store waits, and goes on
    assert store.get_count() == 4000
    found = store.client.query("killed", filter='content like "old%"', output_fields=["count(*)"])
    assert found[0]["count(*)"] == 0
