"""How quickly documents get into Milvus: `.venv/bin/python tests/benchmarks/ingest.py`.

On Windows the interpreter is .venv\\Scripts\\python.

    (no option)           ReliableMilvus, pymilvus alone and Agno's stock adapter, on Milvus Lite and standalone
    --rounds 7            how often each is measured; every round runs all of them, in another order
    --offline-embedder    embed with the course's offline server, which then takes most of the time
    --save                store the result in data/benchmarks/store.json

Every run fills a new collection, with 2,000 documents, or 200 with the stock adapter, which writes one row a call; the
figures are for one document. Without --offline-embedder the vectors are looked up. pymilvus alone writes the same rows
into a collection with the same fields and index, 1,000 a call: the time includes the embedder and making the rows, but
not their `terms`, which only ReliableMilvus needs. Its quicker call, insert or upsert, is the one to compare with. No
collection has BM25, since the stock adapter's has none, but that of "insert with BM25" (Milvus Lite; the standalone
server is too old for it). `upsert` is what Knowledge.insert calls; the first one of a process waits for Milvus's clock,
0.1 to 0.2 seconds on a server, to know what was there before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
# Before gRPC is imported: it would report that Milvus Lite does not like pymilvus's keepalive pings.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import pandas as pd  # noqa: E402
from agno.knowledge.embedder import Embedder  # noqa: E402
from agno.vectordb.milvus import Milvus  # noqa: E402
from store_workload import (  # noqa: E402
    Place,
    machine,
    make_documents,
    median_of_ratios,
    places,
    ready_embedder,
    save,
    verdict,
)
from tqdm import tqdm  # noqa: E402

from utils import models  # noqa: E402
from utils.milvus_store import ReliableMilvus, metadata_terms  # noqa: E402

DOCUMENTS = 2000
STOCK_DOCUMENTS = 200
RAW_BATCH = 1000
HASH = "benchmark"
STORE, RAW = ("insert", "upsert", "insert with BM25"), ("raw insert", "raw upsert")
STOCK = ("stock insert", "stock upsert", "stock async")
STOCK_TARGETS = {"Milvus Lite": 5.0, "Milvus standalone": 20.0}
RAW_TARGET = 0.8

MakeEmbedder = Callable[[], Embedder]


def time_store(place: Place, collection: str, method: str, embedder: Embedder) -> float:
    """Seconds a document with ReliableMilvus."""
    store = _store(place, collection, embedder, bm25="BM25" in method)
    documents = make_documents(DOCUMENTS)
    start = time.perf_counter()
    (store.upsert if method == "upsert" else store.insert)(HASH, documents)
    return (time.perf_counter() - start) / DOCUMENTS


def _store(place: Place, collection: str, embedder: Embedder, bm25: bool = False) -> ReliableMilvus:
    store = ReliableMilvus(collection, embedder=embedder, uri=place.uri, token=place.token, bm25=bm25)
    store.create()
    return store


def time_raw(place: Place, collection: str, method: str, embedder: Embedder) -> float:
    """Seconds a document with pymilvus alone, into a collection that ReliableMilvus made: the same fields and index."""
    _store(place, collection, embedder)
    client = place.client()
    write = client.upsert if method == "raw upsert" else client.insert
    documents = make_documents(DOCUMENTS)
    terms = [metadata_terms(document.meta_data) for document in documents]
    start = time.perf_counter()
    texts = [document.content for document in documents]
    vectors, _ = asyncio.run(embedder.async_get_embeddings_batch_and_usage(texts))  # type: ignore[attr-defined]
    rows = [
        {
            "id": document.id,
            "user_id": "",
            "content_hash": HASH,
            "content_id": "",
            "name": document.name,
            "content": document.content,
            "meta_data": document.meta_data,
            "terms": row_terms,
            "vector": vector,
        }
        for document, row_terms, vector in zip(documents, terms, vectors, strict=True)
    ]
    for first in range(0, DOCUMENTS, RAW_BATCH):
        write(collection, rows[first : first + RAW_BATCH])
    seconds = time.perf_counter() - start
    client.close()
    return seconds / DOCUMENTS


def time_stock(place: Place, collection: str, method: str, embedder: Embedder) -> float:
    """Seconds a document with agno.vectordb.milvus.Milvus."""
    store = Milvus(collection, embedder=embedder, uri=place.uri, token=place.token)
    store.create()
    documents = make_documents(STOCK_DOCUMENTS)

    async def insert() -> float:
        await store.async_client.has_collection(collection)  # connects before the clock starts
        start = time.perf_counter()
        await store.async_insert(HASH, documents)
        seconds = time.perf_counter() - start
        await store.async_client.close()
        return seconds

    if method == "stock async":
        seconds = asyncio.run(insert())
    else:
        start = time.perf_counter()
        (store.upsert if method == "stock upsert" else store.insert)(HASH, documents)
        seconds = time.perf_counter() - start
    store.client.close()
    return seconds / STOCK_DOCUMENTS


def time_once(place: Place, collection: str, method: str, make_embedder: MakeEmbedder) -> float:
    """Seconds a document, in a new collection, which is removed again.

    Raises:
        RuntimeError: not every document arrived.
    """
    timed = time_store if method in STORE else time_raw if method in RAW else time_stock
    seconds = timed(place, collection, method, make_embedder())
    client = place.client()
    found = client.query(collection, output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
    client.drop_collection(collection)
    client.close()
    if found != (STOCK_DOCUMENTS if method in STOCK else DOCUMENTS):
        raise RuntimeError(f"{method} stored {found} documents")
    return seconds


def measure(place: Place, rounds: int, make_embedder: MakeEmbedder) -> pd.DataFrame:
    """Seconds a document: a column for each method, a row for each round, after one that is not counted."""
    methods = [*STORE, *RAW, *STOCK]
    table = []
    for number in tqdm(range(rounds + 1), desc=place.name, leave=False):
        order = random.Random(number).sample(methods, len(methods))
        table.append({m: time_once(place, f"run_{number}_{i}", m, make_embedder) for i, m in enumerate(order)})
    return pd.DataFrame(table[1:], columns=methods)


def report(place: Place, table: pd.DataFrame) -> dict[str, object]:
    """Print the figures of one Milvus and return them."""
    medians = table.median()
    raw = min(RAW, key=medians.__getitem__)
    stock_target = STOCK_TARGETS[place.name.rpartition(" ")[0]]
    shown = pd.DataFrame(
        {
            "us a document": 1e6 * medians,
            "fastest": 1e6 * table.min(),
            "slowest": 1e6 * table.max(),
            "documents/s": 1 / medians,
        }
    )
    print(f"\n{place.name}\n{shown.round(0).astype(int).to_string()}\n")
    rivals = {"insert": ("stock insert", "stock async", raw), "upsert": ("stock upsert", raw)}
    ratios = {
        f"{method} against {rival}": median_of_ratios(table[rival].to_list(), table[method].to_list())
        for method in rivals
        for rival in rivals[method]
    }
    for name, ratio in ratios.items():
        target = RAW_TARGET if name.endswith(raw) else stock_target
        print(f"{name:<28} {verdict(ratio, target, at_least=True)}")
    return {
        "microseconds a document": {name: round(1e6 * seconds, 1) for name, seconds in medians.items()},
        "times as fast, with its 95 % interval": {name: ratio.as_list() for name, ratio in ratios.items()},
    }


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--offline-embedder", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    os.environ["MODEL_PROVIDER"] = "offline"
    looked_up = ready_embedder([document.content for document in make_documents(DOCUMENTS)])
    figures = {}
    with places() as every:
        for place in every:
            table = measure(place, options.rounds, models.embedder if options.offline_embedder else lambda: looked_up)
            figures[place.name] = report(place, table)
    models.stop_offline()
    print(f"\n{DOCUMENTS} documents ({STOCK_DOCUMENTS} with the stock adapter), {options.rounds} rounds. {machine()}")
    if options.save:
        part = "ingest with the offline embedding server" if options.offline_embedder else "ingest"
        save(part, {"documents": DOCUMENTS, "rounds": options.rounds, **figures})


if __name__ == "__main__":
    main()
