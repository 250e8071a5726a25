"""The cached retriever over a real Milvus: what is shared, by whom, for how long, and what is never kept."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from agno.agent import Agent
from agno.filters import AND, EQ, GT, IN
from agno.knowledge.document import Document
from agno.knowledge.knowledge import Knowledge
from agno.run import RunContext
from agno.team import Team
from waiting import wait_for

from utils import models
from utils.bootstrap import ROOT
from utils.lesson import close_lite
from utils.milvus_lab import lite_server
from utils.milvus_store import InvalidFilter, MilvusUnavailable, ReliableMilvus
from utils.retrieval import CachedRetriever

QUESTION = "When does the canteen close on Fridays?"
SEEN = contextvars.ContextVar("seen", default="nothing")


class Watched(ReliableMilvus):
    """A store that notes each search, and lets a test hold searches up."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[tuple[str, int, str]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def search(
        self, query: str, limit: int = 5, filters: Any = None, user_id: str | None = None, **options: Any
    ) -> Any:
        self.asked.append((query, limit, SEEN.get()))
        assert self.go_on.wait(20)
        return super().search(query, limit, filters, user_id, **options)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("library")
    store = Watched(collection="library", uri=str(folder / "milvus.db"), embedder=models.embedder())
    store.create()
    texts = {"canteen.md": "The canteen closes at 14:30 on Fridays.", "gym.md": "The gym opens at 7:15."}
    for number, (name, text) in enumerate(texts.items()):
        document = Document(id=name, name=name, content=text, meta_data={"topic": name[:-3], "number": number})
        store.insert(name, [document])
    store.insert("ann", [Document(id="ann", name="ann.md", content="Ann closes the canteen.")], user_id="ann")
    yield store
    close_lite(folder)


@pytest.fixture
def store(library: Watched) -> Iterator[Watched]:
    library.asked.clear()
    yield library
    library.go_on.set()


@pytest.fixture
def retriever(store: Watched) -> CachedRetriever:
    return CachedRetriever(Knowledge(name="library", vector_db=store))


def of(session_id: str, user_id: str | None = "bob") -> RunContext:
    return RunContext(run_id="run", session_id=session_id, user_id=user_id)


def names(found: Any) -> set[str]:
    return {document["name"] for document in found}


# --- what is the same search ---


def test_it_finds_what_the_knowledge_finds_and_searches_once(retriever: CachedRetriever, store: Watched) -> None:
    first = retriever.retrieve(QUESTION, run_context=of("one"))
    assert first == [document.to_dict() for document in retriever.knowledge.retrieve(QUESTION, user_id="bob")]
    store.asked.clear()
    assert retriever.retrieve(QUESTION, run_context=of("one")) == first
    assert asyncio.run(retriever.aretrieve(QUESTION, run_context=of("one"))) == first
    assert (retriever.searches, retriever.hits, store.asked) == (1, 2, [])


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("  When does the\tcanteen\n close on Fridays?", True),
        ("When does the canteen close on Fridays?\u2003", True),
        ("when does the canteen close on fridays?", False),
        ("When does the canteen close on Fridays", False),
        ("When does the canteen closeon Fridays?", False),
    ],
)
def test_queries_that_differ_in_white_space_only_are_the_same(
    retriever: CachedRetriever, other: str, same: bool
) -> None:
    retriever.retrieve(QUESTION, run_context=of("one"))
    retriever.retrieve(other, run_context=of("one"))
    assert retriever.searches == (1 if same else 2)


def test_a_letter_and_its_mark_are_the_same_as_both_in_one(retriever: CachedRetriever, store: Watched) -> None:
    retriever.retrieve("Köln canteen", run_context=of("one"))
    retriever.retrieve("Ko\u0308ln canteen", run_context=of("one"))
    retriever.retrieve("Koln canteen", run_context=of("one"))
    assert [query for query, _, _ in store.asked] == ["Köln canteen", "Koln canteen"]


def test_two_sessions_and_two_users_share_nothing(retriever: CachedRetriever) -> None:
    for session_id, user_id in (("one", "bob"), ("two", "bob"), ("one", "ann"), ("one", None)):
        for _ in range(2):
            found = retriever.retrieve("Who closes the canteen?", run_context=of(session_id, user_id))
            assert ("ann.md" in names(found)) is (user_id != "bob"), "each sees their own documents and the shared ones"
    assert (retriever.searches, retriever.hits) == (4, 4)


def test_the_user_that_agno_names_is_the_one_who_counts(retriever: CachedRetriever) -> None:
    retriever.retrieve("Who closes the canteen?", run_context=of("one", "ann"))
    assert "ann.md" not in names(retriever.retrieve("Who closes the canteen?", run_context=of("one"), user_id="bob"))
    assert "ann.md" in names(retriever.retrieve("Who closes the canteen?", user_id="ann"))
    assert retriever.searches == 3


def test_the_number_of_documents_counts_and_has_the_knowledges_default(
    retriever: CachedRetriever, store: Watched
) -> None:
    assert len(retriever.retrieve(QUESTION, 1)) == 1
    assert len(retriever.retrieve(QUESTION, 2)) == 2
    retriever.retrieve(QUESTION)
    retriever.retrieve(QUESTION, retriever.knowledge.max_results)
    assert [limit for _, limit, _ in store.asked] == [1, 2, retriever.knowledge.max_results]


FILTERS: list[Any] = [
    None,
    {"topic": "gym"},
    {"topic": ["gym"]},
    {"topic": ["gym", "canteen"]},
    {"number": 1},
    {"number": True},
    {"number": "1"},
    {"number": {1}},
    {"topic": "gym", "number": 1},
    [EQ("topic", "gym")],
    [IN("topic", ["gym"])],
    [GT("number", 0)],
    [AND(EQ("topic", "gym"), GT("number", 0))],
    [EQ("topic", "gym"), GT("number", 0)],
]


def test_filters_that_differ_are_different_searches(retriever: CachedRetriever) -> None:
    for _ in range(2):
        for filters in FILTERS:
            found = retriever.retrieve(QUESTION, filters=filters)
            assert found == [document.to_dict() for document in retriever.knowledge.retrieve(QUESTION, filters=filters)]
    # {"number": true} finds nothing, which is not kept.
    kept = sum(1 for filters in FILTERS if retriever.knowledge.retrieve(QUESTION, filters=filters))
    assert kept == len(FILTERS) - 2 and retriever.hits == kept and retriever.searches == 2 * len(FILTERS) - kept


def test_the_order_in_a_filter_does_not_count(retriever: CachedRetriever) -> None:
    retriever.retrieve(QUESTION, filters={"topic": "gym", "number": 1})
    retriever.retrieve(QUESTION, filters={"number": 1, "topic": "gym"})
    retriever.retrieve(QUESTION, filters=[EQ("topic", "gym")])
    retriever.retrieve(QUESTION, filters=[EQ("topic", "gym")])
    assert (retriever.searches, retriever.hits) == (2, 2)


def test_a_filter_that_cannot_be_a_key_is_asked_each_time(retriever: CachedRetriever) -> None:
    for _ in range(2):
        with pytest.raises(InvalidFilter):
            retriever.retrieve(QUESTION, filters={"topic": bytearray(b"gym")})
    assert (retriever.searches, retriever.hits) == (2, 0)


# --- for how long ---


def test_after_its_time_a_result_is_searched_again(store: Watched) -> None:
    retriever = CachedRetriever(Knowledge(vector_db=store), seconds=0.3)
    retriever.retrieve(QUESTION)
    time.sleep(0.31)
    retriever.retrieve(QUESTION)
    assert (retriever.searches, retriever.hits) == (2, 0)


def test_another_version_of_the_knowledge_is_searched_again(store: Watched) -> None:
    versions = [1]
    retriever = CachedRetriever(Knowledge(vector_db=store), version=lambda: versions[0])
    retriever.retrieve(QUESTION)
    retriever.retrieve(QUESTION)
    versions[0] = 2
    retriever.retrieve(QUESTION)
    assert (retriever.searches, retriever.hits) == (2, 1)


def test_a_search_that_began_before_a_change_is_not_taken_for_one_after_it(store: Watched) -> None:
    versions = [1]
    retriever = CachedRetriever(Knowledge(vector_db=store), version=lambda: versions[0])
    store.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(retriever.retrieve, QUESTION)
        wait_for_searches(store, 1)
        versions[0] = 2
        store.go_on.set()
        slow.result()
    retriever.retrieve(QUESTION)
    assert (retriever.searches, retriever.hits) == (2, 0)


def test_no_more_results_are_kept_than_allowed_and_those_in_use_stay(store: Watched) -> None:
    retriever = CachedRetriever(Knowledge(vector_db=store), entries=3)
    for query in ("canteen one", "canteen two", "canteen three"):
        retriever.retrieve(query)
    retriever.retrieve("canteen one")
    retriever.retrieve("canteen four")
    assert (retriever.searches, retriever.hits) == (4, 1)
    retriever.retrieve("canteen one")
    retriever.retrieve("canteen four")
    assert (retriever.searches, retriever.hits) == (4, 3)
    retriever.retrieve("canteen two")
    assert retriever.searches == 5, "the one that was not used for the longest time"
    for number in range(50):
        retriever.retrieve(f"canteen number {number}")
    assert len(retriever._kept) == 3


# --- failures, and nothing found ---


def test_a_failure_reaches_the_caller_and_is_not_kept(tmp_path: Path) -> None:
    with lite_server(tmp_path, progress=False) as server:
        store = ReliableMilvus("library", uri=server.uri, embedder=models.embedder(), timeout=2)
        store.create()
        store.insert("one", [Document(id="one", name="canteen.md", content="The canteen closes at 14:30.")])
        retriever = CachedRetriever(Knowledge(vector_db=store))
        server.kill()
        for _ in range(2):
            with pytest.raises(MilvusUnavailable):
                retriever.retrieve(QUESTION)
        with pytest.raises(MilvusUnavailable):
            asyncio.run(retriever.aretrieve(QUESTION))
        options: dict[str, Any] = {"model": models.chat_model(), "knowledge": retriever.knowledge, "telemetry": False}
        agent = Agent(knowledge_retriever=retriever.retrieve, **options)
        (tool,) = agent.run(QUESTION).tools or []
        assert tool.result == "Error searching knowledge base: MilvusUnavailable", "what require_knowledge looks for"
        server.restart()
        assert names(retriever.retrieve(QUESTION)) == {"canteen.md"}
        assert (retriever.searches, retriever.hits) == (5, 0)


def test_nothing_found_is_not_kept(retriever: CachedRetriever, store: Watched) -> None:
    filters = {"topic": "pool"}
    assert retriever.retrieve("When does the pool open?", filters=filters) == []
    store.insert("pool", [Document(id="pool", name="pool.md", content="The pool opens at 9.", meta_data=filters)])
    try:
        assert names(retriever.retrieve("When does the pool open?", filters=filters)) == {"pool.md"}
    finally:
        store.delete_by_name("pool.md")


# --- many at once ---


def wait_for_searches(store: Watched, number: int) -> None:
    assert wait_for(lambda: len(store.asked) >= number)


def wait_for_askers(retriever: CachedRetriever, number: int) -> None:
    assert wait_for(lambda: retriever.searches + retriever.hits >= number)


def test_many_threads_that_ask_at_once_make_one_search(retriever: CachedRetriever, store: Watched) -> None:
    store.go_on.clear()
    with ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(retriever.retrieve, QUESTION, run_context=of("one")) for _ in range(64)]
        wait_for_askers(retriever, 64)
        store.go_on.set()
        answers = [one.result() for one in asked]
    assert len(store.asked) == retriever.searches == 1 and retriever.hits == 63
    assert all(answer == answers[0] for answer in answers) and len({id(answer) for answer in answers}) == 64


def test_many_tasks_that_ask_at_once_make_one_search_and_hold_up_nobody(
    retriever: CachedRetriever, store: Watched
) -> None:
    async def ask() -> list[Any]:
        store.go_on.clear()
        tasks = [asyncio.create_task(retriever.aretrieve(QUESTION, run_context=of("one"))) for _ in range(100)]
        while retriever.hits < 99:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in tasks)
        store.go_on.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(ask())
    assert len(store.asked) == 1 and all(answer == answers[0] for answer in answers)


def test_threads_and_tasks_of_several_loops_share_a_search(retriever: CachedRetriever, store: Watched) -> None:
    store.go_on.clear()
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(retriever.retrieve, QUESTION) for _ in range(10)]
        asked += [pool.submit(lambda: asyncio.run(retriever.aretrieve(QUESTION))) for _ in range(10)]
        wait_for_askers(retriever, 20)
        store.go_on.set()
        assert len({str(one.result()) for one in asked}) == 1
    assert len(store.asked) == 1


def test_who_gives_up_takes_the_search_from_nobody(retriever: CachedRetriever, store: Watched) -> None:
    async def ask() -> Any:
        store.go_on.clear()
        first, second = (asyncio.create_task(retriever.aretrieve(QUESTION)) for _ in range(2))
        while retriever.hits < 1:
            await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(retriever.aretrieve(QUESTION), 0.01)
        store.go_on.set()
        return await second

    assert "canteen.md" in names(asyncio.run(ask())) and retriever.searches == 1


def test_a_loop_that_ends_meanwhile_disturbs_nobody(
    retriever: CachedRetriever, store: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    store.go_on.clear()
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(retriever.aretrieve(QUESTION), 0.05))
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(retriever.retrieve, QUESTION)
        wait_for_askers(retriever, 2)
        store.go_on.set()
        assert "canteen.md" in names(later.result())
    assert retriever.searches == 1 and not [line for line in caplog.records if "callback" in line.message]


def test_a_failure_reaches_all_who_waited_and_nobody_later(retriever: CachedRetriever, store: Watched) -> None:
    store.go_on.clear()
    wrong: Any = {"topic": {"$ne": "gym"}}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(retriever.retrieve, QUESTION, filters=wrong) for _ in range(8)]
        wait_for_askers(retriever, 8)
        store.go_on.set()
        assert {type(one.exception()) for one in asked} == {InvalidFilter}
    assert len(store.asked) == 1 and not retriever._under_way
    assert retriever.retrieve(QUESTION)


def test_different_searches_run_side_by_side_and_are_not_mixed_up(retriever: CachedRetriever, store: Watched) -> None:
    store.go_on.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(retriever.retrieve, "Who closes the canteen?", run_context=of("one", user_id))
            for user_id in ("ann", "bob") * 4
        ]
        wait_for_searches(store, 2)
        store.go_on.set()
        assert ["ann.md" in names(one.result()) for one in asked] == [True, False] * 4
    assert len(store.asked) == 2


def test_a_search_runs_in_the_context_of_who_asked_first(retriever: CachedRetriever, store: Watched) -> None:
    async def ask() -> None:
        SEEN.set("the trace of this run")
        await retriever.aretrieve(QUESTION)

    asyncio.run(ask())
    assert store.asked[0][2] == "the trace of this run"


# --- copies ---


def test_what_one_caller_alters_nobody_else_sees(retriever: CachedRetriever) -> None:
    first: Any = retriever.retrieve(QUESTION)
    right = str(first)
    for _ in range(2):
        found: Any = retriever.retrieve(QUESTION)
        assert str(found) == right
        found[0]["content"] = "altered"
        found[0]["meta_data"]["topic"] = "altered"
        found.clear()
    assert str(first) == right and str(asyncio.run(retriever.aretrieve(QUESTION))) == right
    assert retriever.searches == 1


# --- in Agno ---


def member(name: str, retriever: CachedRetriever) -> Agent:
    return Agent(
        id=name,
        name=name,
        model=models.chat_model(),
        knowledge=retriever.knowledge,
        knowledge_retriever=retriever.aretrieve,  # type: ignore[arg-type]  # Agno awaits it, and does not say so
        telemetry=False,
    )


def test_a_team_that_is_copied_as_agentos_does_makes_one_search(retriever: CachedRetriever, store: Watched) -> None:
    members: list[Agent | Team] = [member(name, retriever) for name in ("analyst", "writer")]
    team = Team(name="pair", model=models.chat_model(), members=members, telemetry=False)

    async def ask(wanted: set[str], **options: Any) -> None:
        for _ in range(2):
            run = await team.deep_copy().arun(QUESTION, session_id="one", user_id="bob", **options)
            assert [names(part.references[0].references) for part in run.member_responses] == [wanted] * 2

    async def ask_both() -> None:
        await ask({"canteen.md", "gym.md"})
        assert (retriever.searches, retriever.hits, len(store.asked)) == (1, 3, 1)
        await ask({"gym.md"}, knowledge_filters={"topic": "gym"})  # the run's filters reach the members
        assert (retriever.searches, retriever.hits) == (2, 6)

    asyncio.run(ask_both())


def test_the_module_needs_agno_alone() -> None:
    source = (ROOT / "utils" / "retrieval.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"agno"}
