"""How much ReliableMilvus adds to a search: `.venv/bin/python tests/benchmarks/search.py`.

On Windows the interpreter is .venv\\Scripts\\python.

    (no option)     ReliableMilvus and pymilvus alone, on Milvus Lite and standalone, with 2,000 and 20,000 documents
    --pairs 200     how many pairs of searches each comparison takes, fewer where that would take over 20 seconds
    --save          store the result in data/benchmarks/store.json

Each pair is the same search with both, one after the other and in changing order: 5 hits of the same collection, the
same vector from the same embedder (looked up), fields, consistency and filter. pymilvus alone reads its hits into
plain tuples. The rows "10 at once" are the time for ten searches of one event loop, against AsyncMilvusClient.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
# Before gRPC is imported: it would report that Milvus Lite does not like pymilvus's keepalive pings.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from agno.vectordb.search import SearchType  # noqa: E402
from pymilvus import AnnSearchRequest, AsyncMilvusClient, MilvusClient, RRFRanker  # noqa: E402
from store_workload import (  # noqa: E402
    QUIET,
    Place,
    Ratio,
    ReadyEmbedder,
    machine,
    make_documents,
    make_queries,
    places,
    ratio_of_medians,
    ready_embedder,
    save,
    verdict,
)
from tqdm import tqdm  # noqa: E402

from utils.milvus_store import ReliableMilvus, compile_filter  # noqa: E402

SIZES = (2000, 20_000)
LIMIT = 5
FIELDS = ["name", "content", "content_id", "meta_data"]
USERS = 5
USER = "user-1"
FILTER = {"topic": "t3"}
CONCURRENT = 10
WARM_UP = 10
MAX_SECONDS = 20
SETTLE = 5
TARGET = 1.15

Search = Callable[[str], Sequence[Any]]


def fill(place: Place, size: int, embedder: ReadyEmbedder) -> ReliableMilvus:
    """A new collection: half of the documents are shared, the others belong to five users."""
    store = ReliableMilvus(f"search_{size}", embedder=embedder, uri=place.uri, token=place.token)
    store.create()
    documents = make_documents(size)
    store.insert("shared", documents[: size // 2])
    for user in range(USERS):
        store.insert("own", documents[size // 2 + user :: USERS], user_id=f"user-{user}")
    store.optimize()
    # Milvus Lite goes on for a moment, in this very process.
    time.sleep(SETTLE)
    return store


def pymilvus_search(client: MilvusClient, store: ReliableMilvus, expression: str = "") -> Search:
    """The vector search that ReliableMilvus makes, with pymilvus alone."""
    seen = max(store.last_write, 1)

    def search(query: str) -> Sequence[Any]:
        found = client.search(
            store.collection,
            data=[store.embedder.get_embedding(query)],
            anns_field="vector",
            filter=expression,
            limit=LIMIT,
            output_fields=FIELDS,
            consistency_level="Customized",
            guarantee_timestamp=seen,
        )
        return read(found)

    return search


def pymilvus_hybrid(client: MilvusClient, store: ReliableMilvus) -> Search:
    """The hybrid search that ReliableMilvus makes, with pymilvus alone."""
    seen = max(store.last_write, 1)

    def search(query: str) -> Sequence[Any]:
        requests = [
            AnnSearchRequest([store.embedder.get_embedding(query)], "vector", {}, store.candidates),
            AnnSearchRequest([query], "sparse", {}, store.candidates),
        ]
        found = client.hybrid_search(
            store.collection,
            requests,
            RRFRanker(),
            limit=LIMIT,
            output_fields=FIELDS,
            consistency_level="Customized",
            guarantee_timestamp=seen,
        )
        return read(found)

    return search


def read(found: Any) -> Sequence[Any]:
    """The hits with all of their fields; pymilvus parses metadata only when a hit is looked at."""
    return [(hit["id"], hit["distance"], *(hit["entity"][name] for name in FIELDS)) for hit in found[0]]


def comparisons(place: Place, client: MilvusClient, store: ReliableMilvus) -> dict[str, tuple[Search, Search]]:
    """The searches to compare: ReliableMilvus's and that of pymilvus alone."""
    scope = f'user_id in ["", "{USER}"]'
    filtered = compile_filter(FILTER)
    compared: dict[str, tuple[Search, Search]] = {
        "vector": (lambda query: store.search(query, LIMIT), pymilvus_search(client, store)),
        "vector, of a user": (
            lambda query: store.search(query, LIMIT, user_id=USER),
            pymilvus_search(client, store, scope),
        ),
        "vector, filtered": (
            lambda query: store.search(query, LIMIT, FILTER),
            pymilvus_search(client, store, filtered),
        ),
        'vector, against meta_data["topic"] ==': (
            lambda query: store.search(query, LIMIT, FILTER),
            pymilvus_search(client, store, 'meta_data["topic"] == "t3"'),
        ),
    }
    if place.has_bm25:
        compared["hybrid"] = (
            lambda query: store.search(query, LIMIT, search_type=SearchType.hybrid),
            pymilvus_hybrid(client, store),
        )
    return compared


def time_pairs(store: Search, raw: Search, queries: Sequence[str]) -> tuple[list[float], list[float]]:
    """Seconds of each search.

    Raises:
        RuntimeError: the two found different numbers of hits.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + MAX_SECONDS
    for number, query in enumerate(queries):
        if time.monotonic() > end and number >= 2 * WARM_UP:
            break
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            hits = (store, raw)[which](query)
            elapsed = time.perf_counter() - start
            if len(hits) != LIMIT:
                raise RuntimeError(f"{len(hits)} hits instead of {LIMIT}")
            if number >= WARM_UP:
                seconds[which].append(elapsed)
    return seconds


async def time_concurrent(
    place: Place, store: ReliableMilvus, queries: Sequence[str]
) -> tuple[list[float], list[float]]:
    """Seconds for ten searches at once."""
    client = AsyncMilvusClient(place.uri, token=place.token, grpc_options=QUIET)
    await client.has_collection(store.collection)  # connects once, not from ten tasks
    seen = max(store.last_write, 1)

    async def raw(query: str) -> Sequence[Any]:
        found = await client.search(
            store.collection,
            data=[store.embedder.get_embedding(query)],
            anns_field="vector",
            limit=LIMIT,
            output_fields=FIELDS,
            consistency_level="Customized",
            guarantee_timestamp=seen,
        )
        return read(found)

    async def ours(query: str) -> Sequence[Any]:
        return await store.async_search(query, LIMIT)

    searches: tuple[Callable[[str], Coroutine[Any, Any, Sequence[Any]]], ...] = (ours, raw)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(len(queries) // CONCURRENT):
        group = queries[number * CONCURRENT : (number + 1) * CONCURRENT]
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            await asyncio.gather(*(searches[which](query) for query in group))
            if number >= 2:
                seconds[which].append(time.perf_counter() - start)
    await client.close()
    return seconds


def measure(place: Place, size: int, pairs: int) -> tuple[pd.DataFrame, dict[str, Ratio]]:
    """Milliseconds and ratios, a row for each kind of search."""
    queries = make_queries(pairs + WARM_UP)
    texts = [document.content for document in make_documents(size)]
    store = fill(place, size, ready_embedder([*texts, *queries]))
    client = place.client()
    timed = {f"vector, {CONCURRENT} at once": asyncio.run(time_concurrent(place, store, queries * 3))}
    for name, searches in tqdm(comparisons(place, client, store).items(), desc=f"{place.name}, {size}", leave=False):
        timed[name] = time_pairs(*searches, queries)
    table = pd.DataFrame(
        {
            name: {
                f"{which} {label} ms": 1000 * float(np.quantile(seconds, quantile))
                for which, seconds in zip(("store", "pymilvus"), both, strict=True)
                for label, quantile in (("p50", 0.5), ("p95", 0.95))
            }
            for name, both in timed.items()
        }
    ).T
    client.close()
    store.drop()
    return table, {name: ratio_of_medians(*both) for name, both in timed.items()}


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with places() as every:
        for place in every:
            figures[place.name] = {}
            for size in SIZES:
                table, ratios = measure(place, size, options.pairs)
                print(f"\n{place.name}, {size:,} documents\n{table.round(2).to_string()}\n")
                for name, ratio in ratios.items():
                    print(f"{name:<38} {verdict(ratio, TARGET, at_least=False)}")
                figures[place.name][f"{size} documents"] = {
                    name: {
                        **{column: round(value, 3) for column, value in table.loc[name].to_dict().items()},
                        "ratio of p50, with its 95 % interval": ratio.as_list(),
                    }
                    for name, ratio in ratios.items()
                }
    print(f"\n{LIMIT} hits, {options.pairs} pairs. {machine()}")
    if options.save:
        save("search", {"hits": LIMIT, "pairs": options.pairs, **figures})


if __name__ == "__main__":
    main()
