"""Single measurements on a Milvus server. Seconds are those of the wall clock."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient, SegmentState

from utils.errors import CourseError
from utils.index_bench.dataset import BLOCK, Clustered, Floats, Ids, recall
from utils.lesson import quiet_logs
from utils.processes import end_with_owner, owner_mark

FIELD = "vector"
METRIC = "COSINE"  # what Agno's adapter and ReliableMilvus use unless told otherwise
# Nothing is written while searches are measured, so every level gives the same answer; this one never waits.
CONSISTENCY = "Eventually"
TIMEOUT = 3 * 3600.0
WARM_UP = 20

Progress = Callable[[int], object]


class MeasureError(CourseError):
    """The server is not in the state in which a measurement means something."""


@dataclass(frozen=True)
class Searched:
    """What a series of single searches gave.

    Attributes:
        milliseconds: of each search, in order.
        recall: the mean share of the exact neighbours found.
    """

    milliseconds: list[float]
    recall: float


def make_collection(client: MilvusClient, name: str, dimensions: int) -> None:
    """Make an empty collection of one shard with the vector's number as its key, and without an index."""
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field(FIELD, DataType.FLOAT_VECTOR, dim=dimensions)
    client.create_collection(name, schema=schema, num_shards=1)


def insert(
    client: MilvusClient, name: str, vectors: Clustered, first: int, count: int, batch: int = BLOCK
) -> Iterator[tuple[int, float]]:
    """Insert the vectors from number `first` to `count`, and yield after each batch how many are in and its seconds.

    The seconds are those of the client and the server, without making the vectors.
    """
    for start in range(first - first % BLOCK, count, BLOCK):
        block = vectors.block(start // BLOCK)[: count - start]
        for at in range(max(first - start, 0), len(block), batch):
            rows = [{"id": start + at + n, FIELD: vector} for n, vector in enumerate(block[at : at + batch])]
            began = time.perf_counter()
            client.insert(name, rows, timeout=TIMEOUT)
            yield start + at + len(rows), time.perf_counter() - began


def flush(client: MilvusClient, name: str) -> tuple[float, list[int]]:
    """Seal and write all segments; return the seconds and the rows of each segment, the largest first."""
    began = time.perf_counter()
    client.flush(name, timeout=TIMEOUT)
    segments = client.list_persistent_segments(name)
    while any(segment.state != SegmentState.Flushed for segment in segments):
        time.sleep(0.1)
        segments = client.list_persistent_segments(name)
    return time.perf_counter() - began, sorted((int(segment.num_rows) for segment in segments), reverse=True)


def build(client: MilvusClient, name: str, kind: str, parameters: Mapping[str, int], progress: Progress) -> float:
    """Build an index and return the seconds until the server reports it finished for every row.

    Args:
        client: of the server.
        name: the collection, which has no index.
        kind: such as IVF_FLAT.
        parameters: such as {"nlist": 128}.
        progress: is called with the number of rows that are done.
    """
    index = client.prepare_index_params()
    index.add_index(FIELD, index_type=kind, index_name=FIELD, metric_type=METRIC, params=dict(parameters))
    began = time.perf_counter()
    client.create_index(name, index, sync=False)
    while True:
        found = client.describe_index(name, FIELD)
        progress(int(found["indexed_rows"]))
        if found["state"] == "Finished" and int(found["pending_index_rows"]) == 0:
            return time.perf_counter() - began
        if found["state"] == "Failed":
            raise MeasureError(f"Milvus could not build {kind} on {name}: see the server's log.")
        time.sleep(0.1)


def built_index(client: MilvusClient, name: str) -> tuple[str, dict[str, int]] | None:
    """Kind and parameters of the finished index of a collection; None if there is none."""
    if not client.list_indexes(name):
        return None
    found = client.describe_index(name, FIELD)
    if found["state"] != "Finished" or int(found["pending_index_rows"]):
        return None
    return found["index_type"], {key: int(found[key]) for key in ("nlist", "M", "efConstruction") if key in found}


def drop_index(client: MilvusClient, name: str) -> None:
    """Release the collection and drop its index, if it has one."""
    client.release_collection(name)
    if client.list_indexes(name):
        client.drop_index(name, FIELD)


def load(client: MilvusClient, name: str, rows: int) -> tuple[float, int]:
    """Load a collection; return the seconds and the number of segments that are searched.

    Raises:
        MeasureError: not all rows are in sealed segments.
    """
    began = time.perf_counter()
    client.load_collection(name, timeout=TIMEOUT)
    seconds = time.perf_counter() - began
    segments = client.list_loaded_segments(name)
    sealed = sum(int(segment.num_rows) for segment in segments if segment.state == SegmentState.Sealed)
    if sealed != rows:
        raise MeasureError(f"{name} has {sealed:,} rows in sealed segments instead of {rows:,}: run it with --restart.")
    return seconds, len(segments)


def search(client: MilvusClient, name: str, query: Floats, parameters: Mapping[str, int], top_k: int) -> list[int]:
    """The numbers that one search finds, the best first."""
    found = client.search(
        name,
        [query],
        anns_field=FIELD,
        limit=top_k,
        search_params={"metric_type": METRIC, "params": dict(parameters)},
        consistency_level=CONSISTENCY,
        timeout=TIMEOUT,
    )
    return [hit["id"] for hit in found[0]]


def search_each(
    client: MilvusClient, name: str, queries: Floats, truth: Ids, parameters: Mapping[str, int], progress: Progress
) -> Searched:
    """Search one query after the other, from one client.

    Args:
        client: of the server.
        name: a loaded collection.
        queries: of shape (queries, dimensions).
        truth: their exact neighbours, of shape (queries, top k).
        parameters: of the search, such as {"nprobe": 8}; those that the index does not have are ignored.
        progress: is called with the number of queries that are done.
    """
    top_k = truth.shape[1]
    for query in queries[:WARM_UP]:
        search(client, name, query, parameters, top_k)
    milliseconds, found = [], []
    for number, query in enumerate(queries):
        began = time.perf_counter()
        found.append(search(client, name, query, parameters, top_k))
        milliseconds.append(1000 * (time.perf_counter() - began))
        progress(number + 1)
    return Searched(milliseconds, recall(found, truth))


class Clients:
    """Several client processes; they share the machine's cores with the server."""

    def __init__(self, pool: ProcessPoolExecutor, count: int, uri: str, token: str) -> None:
        self.count = count
        self._pool, self._uri, self._token = pool, uri, token

    def searches_per_second(
        self, name: str, queries: Floats, parameters: Mapping[str, int], top_k: int, seconds: float
    ) -> float:
        """Let every client search without a pause, and return how many searches ended a second, all together."""
        start = time.time() + 0.5  # by then every one of them is connected
        # The pool starts its processes here. Ctrl-C reaches every process of the terminal; these inherit that it is
        # held back, so only their owner hears of it, and ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            jobs = [
                self._pool.submit(
                    _search_until,
                    self._uri,
                    self._token,
                    name,
                    np.roll(queries, 37 * n, 0),
                    parameters,
                    top_k,
                    start,
                    seconds,
                )
                for n in range(self.count)
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return sum(job.result() for job in jobs)


@contextmanager
def clients(count: int, uri: str, token: str) -> Iterator[Clients]:
    """Start client processes; they end with the block, and with this process if it is killed."""
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_start_client, initargs=(owner_mark(),)
    )
    try:
        yield Clients(pool, count, uri, token)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_client(owner: str) -> None:
    quiet_logs()
    end_with_owner(owner, lambda: None)


def _search_until(
    uri: str,
    token: str,
    name: str,
    queries: Floats,
    parameters: Mapping[str, int],
    top_k: int,
    start: float,
    seconds: float,
) -> float:
    client = MilvusClient(uri, token=token)
    search(client, name, queries[0], parameters, top_k)
    time.sleep(max(0.0, start - time.time()))
    began = time.perf_counter()
    done = 0
    while (passed := time.perf_counter() - began) < seconds:
        search(client, name, queries[done % len(queries)], parameters, top_k)
        done += 1
    client.close()
    return done / passed


def index_files(storage: Path) -> dict[str, int]:
    """The files of all indexes in the storage of a lab, with their bytes."""
    found = {}
    for file in storage.rglob("index_files/**/*"):
        try:
            if file.is_file():
                found[str(file)] = file.stat().st_size
        except FileNotFoundError:  # removed by the server since it was listed
            continue
    return found


def new_bytes(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """Bytes of the files that have come."""
    return sum(size for file, size in after.items() if file not in before)


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """Median and 95th percentile of milliseconds, as they are stored."""
    return {"p50 ms": round(float(np.quantile(values, 0.5)), 2), "p95 ms": round(float(np.quantile(values, 0.95)), 2)}
