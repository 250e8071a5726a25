"""CachedRetriever: one vector search serves several agents of a session.

A `knowledge_retriever` for Agno's agents and teams (agno 3.1.10), made to be copied: this file needs agno alone.

    from agno.agent import Agent
    from retrieval import CachedRetriever

    retriever = CachedRetriever(knowledge)
    analyst = Agent(knowledge=knowledge, knowledge_retriever=retriever.aretrieve, ...)
    writer = Agent(knowledge=knowledge, knowledge_retriever=retriever.aretrieve, ...)

`aretrieve` is for `arun()` and AgentOS, `retrieve` for `run()`. Agno calls what it is given as it is: a coroutine
function in `run()` gives the model no documents, and a plain function in `arun()` holds up the event loop.

Give an agent `knowledge` as well. The tool is the same (search_knowledge_base, by way of the retriever), but without it
Agno leaves out what `knowledge` brings: its instructions in the system message, its number of documents, and, for the
member of a team, the filters of the run.

What it promises:

* A search is shared only by the same session, user, query, filters and number of documents. Queries are the same if
  they differ in white space or in Unicode's composition, and in nothing else: "IT" is not "it".
* Whoever asks while the same search is under way waits for it, in whichever thread or event loop.
* An error is raised to all who wait for that search, and the next one searches again. Agno then tells the model "Error
  searching knowledge base: <the error's name>", as it does for the knowledge itself.
* "Nothing found" is not kept, either. Knowledge.search makes an empty list of errors that are no ValueError, and it is
  the one answer that people try to change: they upload a document and ask again.
* Each caller has a copy of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from agno.filters import FilterExpr
from agno.knowledge.knowledge import Knowledge
from agno.run import RunContext

Documents = list[dict[Any, Any] | str]

# Searches run here, so that a caller who gives up takes nothing from those who wait for the same search.
_POOL = ThreadPoolExecutor(max_workers=16, thread_name_prefix="retrieval")


class CachedRetriever:
    """Searches a knowledge base, and keeps what it found; see the module's description.

    Args:
        knowledge: the knowledge base; its `retrieve` may be called from several threads at once.
        seconds: how long a result is kept. So long may a change by another process stay unseen.
        entries: how many results are kept; the one that was not used for the longest time goes first.
        version: says which state the knowledge base is in. When its value changes, what was kept is no longer used.

    Attributes:
        searches: how many times the knowledge base was searched.
        hits: how many times it was not, because the result was kept or the same search was under way.

    Both methods raise what the search raises.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        seconds: float = 60,
        entries: int = 1000,
        version: Callable[[], Hashable] = lambda: None,
    ) -> None:
        self.knowledge = knowledge
        self.searches = 0
        self.hits = 0
        self._seconds = seconds
        self._entries = entries
        self._version = version
        self._kept: OrderedDict[Hashable, tuple[float, Documents]] = OrderedDict()
        self._under_way: dict[Hashable, Future[Documents]] = {}
        self._lock = threading.Lock()

    def retrieve(
        self,
        query: str,
        num_documents: int | None = None,
        filters: Any = None,
        run_context: RunContext | None = None,
        user_id: str | None = None,
    ) -> Documents:
        """The best documents for a query, as dicts with name, content and meta_data. Agno names the arguments.

        Args:
            query: what to look for.
            num_documents: how many; as many as the knowledge base returns by default.
            filters: on metadata, in Agno's form.
            run_context: of the run that asks: its session, and its user unless `user_id` is given.
            user_id: whose documents are searched, besides the shared ones; None for everybody's.
        """
        return copy.deepcopy(self._find(query, num_documents, filters, run_context, user_id).result())

    async def aretrieve(
        self,
        query: str,
        num_documents: int | None = None,
        filters: Any = None,
        run_context: RunContext | None = None,
        user_id: str | None = None,
    ) -> Documents:
        """As `retrieve`, without holding up the event loop."""
        return copy.deepcopy(await asyncio.wrap_future(self._find(query, num_documents, filters, run_context, user_id)))

    def _find(
        self, query: str, number: int | None, filters: Any, run_context: RunContext | None, user_id: str | None
    ) -> Future[Documents]:
        """The search, whether it is done, under way, or begins now."""
        query = " ".join(unicodedata.normalize("NFC", query).split())
        session_id = run_context.session_id if run_context else None
        if user_id is None and run_context:
            user_id = run_context.user_id
        number = number or self.knowledge.max_results
        search = partial(self.knowledge.retrieve, query, max_results=number, filters=filters, user_id=user_id)
        try:
            filters_key = _frozen(filters)
        except TypeError:  # a value of some other type, which the knowledge base refuses or not
            filters_key = object()
        key = (self._version(), session_id, user_id, query, number, filters_key)
        with self._lock:
            found: Future[Documents] = Future()
            expires, documents = self._kept.get(key, (0.0, []))
            if expires > time.monotonic():
                self.hits += 1
                self._kept.move_to_end(key)
                found.set_result(documents)
                return found
            if key in self._under_way:
                self.hits += 1
                return self._under_way[key]
            # With the caller's context variables: a trace has the search below the run that asked first.
            _POOL.submit(contextvars.copy_context().run, self._search, key, search, found)
            found.set_running_or_notify_cancel()  # from now on a task that is cancelled cannot cancel it for all
            self.searches += 1
            self._under_way[key] = found
            return found

    def _search(self, key: Hashable, search: Callable[[], Any], found: Future[Documents]) -> None:
        documents: Documents = []
        failure: BaseException | None = None
        try:
            documents = [document.to_dict() for document in search() or []]
        except BaseException as error:  # whatever it is, others wait for it
            failure = error
        with self._lock:
            del self._under_way[key]
            if documents:
                self._kept[key] = (time.monotonic() + self._seconds, documents)
                self._kept.move_to_end(key)
            while len(self._kept) > self._entries:
                self._kept.popitem(last=False)
        if failure is None:
            found.set_result(documents)
        else:
            found.set_exception(failure)


def _frozen(value: Any) -> Hashable:
    """A filter as a key: equal for two filters of the same types and values only, so that true is not 1.

    Raises:
        TypeError: a value of it has no hash.
    """
    if isinstance(value, FilterExpr):
        return type(value), _frozen(vars(value))
    if isinstance(value, Mapping):
        return dict, frozenset((_frozen(name), _frozen(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return list, tuple(_frozen(part) for part in value)
    if isinstance(value, set | frozenset):
        return set, frozenset(_frozen(part) for part in value)
    hash(value)
    return type(value), value
