"""`python3 -m utils bench index`: measure what is missing in the file of results, with progress and time left.

Everything is kept after each step: inserted vectors in the server's folder, exact neighbours beside it, figures in the
file of results. Stopped or killed at any moment, the same command continues. An insert that was interrupted goes on
behind the last vector that arrived; its segment is sealed there, so that the collection has one segment more, and the
seconds of the one batch that was under way are missing. A build that was interrupted is started anew.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException
from tqdm import tqdm

from utils.errors import CourseError
from utils.index_bench import measure, plan
from utils.index_bench.dataset import BLOCK, DIMENSIONS, SEED, Clustered, Floats, Ids, exact_neighbours
from utils.index_bench.plan import Index
from utils.index_bench.store import Results
from utils.lesson import quiet_logs, show_path
from utils.milvus_lab import standalone
from utils.milvus_lab.programs import milvus_version, require_server
from utils.milvus_lab.servers import ServerLab
from utils.settings import load_settings

TOP_K = 10
QUERIES = 500
MOST_CLIENTS = 32
# Segments are sealed when full and never merged: nothing happens behind the back of a measurement. As shipped,
# they are sealed at 23 % and merged later. The files of a dropped index, 4 GB at 10 million vectors, go after two
# minutes instead of hours.
SERVER_SETTINGS = {
    "dataCoord.segment.sealProportion": "1",
    "dataCoord.compaction.enableAutoCompaction": "false",
    "dataCoord.gc.interval": "60",
    "dataCoord.gc.dropTolerance": "60",
}
INSERT_SECONDS, TRUTH_SECONDS, START_SECONDS = 3e-5, 5e-6, 12.0  # of a row, of a row, of a restart with loading


class ClientsError(CourseError):
    """A number of clients that cannot be started."""


class RoomError(CourseError):
    """The machine has too little memory or disk."""


@dataclass(frozen=True)
class Options:
    """What to measure, and where.

    Attributes:
        sizes: numbers of vectors.
        folder: for the server's data and the exact neighbours.
        out: the file of results.
        kinds: of indexes, such as HNSW; all by default.
        clients: how many search at the same time.
        queries: how many are searched with each parameter.
        client_seconds: how long the clients search with each parameter.
        batch: vectors that are inserted by one call, at most 10,000.
    """

    sizes: Sequence[int]
    folder: Path
    out: Path
    kinds: Sequence[str] = ()
    clients: int = 4
    queries: int = QUERIES
    client_seconds: float = 2.0
    batch: int = BLOCK

    def indexes(self, rows: int) -> list[Index]:
        """The indexes to measure at a size."""
        return [index for index in plan.indexes(rows) if not self.kinds or index.kind in self.kinds]


def bench_index_command(
    sizes: Sequence[str], kinds: Sequence[str], clients: int, out: str | None, redo: str | None, restart: bool
) -> int:
    """Measure what is missing until it is done or stopped, and return the exit code.

    Args:
        sizes: numbers of vectors such as "10k"; all four by default.
        kinds: of indexes; all by default.
        clients: how many search at the same time.
        out: the file of results; one in the course's data folder by default.
        redo: "search" or "build" measures these again, with the vectors that are inserted.
        restart: insert and measure these sizes anew.

    Raises:
        CourseError: a size is wrong, there is too little room, the server does not start, or the file holds results of
            another machine.
    """
    if not 1 <= clients <= MOST_CLIENTS:
        raise ClientsError(f"--clients {clients}: choose from 1 to {MOST_CLIENTS} clients.")
    folder = load_settings().data_folder / "index-bench"
    options = Options(
        sizes=sorted({plan.read_size(size) for size in sizes} or plan.SIZES),
        folder=folder,
        out=Path(out).expanduser() if out else folder / "index.json",
        kinds=kinds,
        clients=clients,
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        run(options, redo, restart)
    except MilvusException as error:
        log = show_path(folder / "server" / "logs" / "standalone.log")
        raise measure.MeasureError(
            f"Milvus did not do what it was asked for ({error.message}): see {log}, then run the same command again, "
            "which continues."
        ) from None
    print(f"Results: {show_path(options.out)}. The vectors stay in {show_path(folder)}; delete it when you are done.")
    return 0


def run(options: Options, redo: str | None = None, restart: bool = False) -> None:
    """Measure what is missing; arguments and errors as above."""
    require_server()
    quiet_logs()
    results = Results(options.out, conditions(options))
    for rows in options.sizes:
        if restart:
            results.forget(rows)
        _forget(results.size(rows), redo, options)
    todo = {rows: missing for rows in options.sizes if (missing := unmeasured(results.size(rows), options, rows))}
    if not todo:
        return
    require_room(options.folder, results, todo)
    results.save()
    with (
        standalone(options.folder / "server", progress=False, settings=SERVER_SETTINGS) as lab,
        measure.clients(options.clients, lab.uri, lab.token) as clients,
    ):
        Bench(lab, clients, results, options).run(todo)


def conditions(options: Options) -> dict[str, Any]:
    """What must be the same for all figures in a file."""
    return {
        "machine": machine(),
        "versions": {
            "milvus": milvus_version(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("pymilvus", "numpy", "faiss-cpu")},
        },
        "seed": SEED,
        "dimensions": DIMENSIONS,
        "metric": measure.METRIC,
        "top k": TOP_K,
        "queries": options.queries,
        "clients": options.clients,
        "consistency level": measure.CONSISTENCY,
        "server settings": SERVER_SETTINGS,
    }


def machine() -> str:
    """The machine without its name."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} processors, {memory:.0f} GB, {platform.system()} {platform.machine()}"


def unmeasured(entry: dict[str, Any], options: Options, rows: int) -> list[Index]:
    """The indexes of which a measurement is missing."""
    stored = entry.get("indexes", {})
    return [index for index in options.indexes(rows) if _missing(stored.get(index.name, {}), index)]


def leave_out(results: Results, rows: int, index: Index) -> str | None:
    """Why an index is not built at a size, or None: HNSW takes more than two hours, as far as smaller sizes tell."""
    seconds = plan.hnsw_seconds(rows, results.build_seconds("HNSW")) if index.kind == "HNSW" else None
    if seconds is None or seconds <= plan.HNSW_LIMIT_SECONDS:
        return None
    return f"its build would take {seconds / 3600:.1f} hours, as estimated from the smaller sizes"


def require_room(folder: Path, results: Results, todo: dict[int, list[Index]]) -> None:
    """Check memory and disk beforehand.

    Raises:
        RoomError: one of them is too small; the message says which, and what to do.
    """
    largest = max(todo)
    needed, free = plan.memory_bytes(largest), psutil.virtual_memory().available
    if free < needed:
        raise RoomError(
            f"{largest:,} vectors need {needed / 1e9:.1f} GB of free memory, and {free / 1e9:.1f} GB are free: end "
            "other programs, or choose smaller --sizes."
        )
    inserted = [rows for rows in todo if "flush seconds" in results.size(rows).get("insert", {})]
    needed = sum(plan.disk_bytes(rows) for rows in todo if rows not in inserted)
    needed = max(needed, 2 * max(index.bytes(largest) for index in todo[largest]))
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RoomError(
            f"{' + '.join(f'{rows:,}' for rows in todo)} vectors need {needed / 1e9:.1f} GB of free disk, and "
            f"{free / 1e9:.1f} GB are free: free some, choose smaller --sizes, or set COURSE_DATA to another disk."
        )


class Bench:
    """One run of the command, on a server that is up."""

    def __init__(self, lab: ServerLab, clients: measure.Clients, results: Results, options: Options) -> None:
        self._lab, self._clients, self._results, self._options = lab, clients, results, options
        self._client = MilvusClient(lab.uri, token=lab.token)
        self._vectors = Clustered()
        self._queries = self._vectors.queries(options.queries)

    def run(self, todo: dict[int, list[Index]]) -> None:
        """Insert, build and search what is missing, the smallest size first."""
        for name in self._client.list_collections():
            self._client.release_collection(name)  # what was loaded when an earlier run was killed
        self._work = Work(sum(self._seconds(rows, indexes) for rows, indexes in todo.items()))
        for rows, indexes in todo.items():
            self._insert(rows)
            truth = self._truth(rows)
            for index in indexes:
                if reason := leave_out(self._results, rows, index):
                    self._stored(rows, index)["left out"] = reason
                    self._results.save()
                    self._work.say(f"{rows:,} {index.name}: left out, {reason}")
                else:
                    self._index(rows, index, truth)

    def _seconds(self, rows: int, indexes: list[Index]) -> float:
        inserted = "flush seconds" in self._results.size(rows).get("insert", {})
        return (
            (0 if inserted else rows * INSERT_SECONDS)
            + rows * TRUTH_SECONDS
            + sum(index.build_seconds(rows) + START_SECONDS for index in indexes)
            + sum(self._search_seconds(rows, index, search) for index in indexes for search in index.searches)
        )

    def _search_seconds(self, rows: int, index: Index, search: Any) -> float:
        return self._options.client_seconds + 0.6 + self._options.queries * index.search_seconds(rows, search)

    def _insert(self, rows: int) -> None:
        name, entry = _collection(rows), self._results.size(rows)
        if "insert" not in entry:
            self._client.drop_collection(name)  # of a size that is measured anew
        if not self._client.has_collection(name):
            measure.make_collection(self._client, name, DIMENSIONS)
            entry["insert"] = {"rows": 0, "seconds": 0.0}
        figures = entry["insert"]
        if "flush seconds" in figures:
            return
        _, there = measure.flush(self._client, name)  # of an insert that was interrupted
        figures["rows"] = sum(there)
        with self._work.part(f"{rows:,}: inserting", rows * INSERT_SECONDS, rows) as progress:
            batches = measure.insert(self._client, name, self._vectors, sum(there), rows, self._options.batch)
            for done, seconds in batches:
                figures.update({"rows": done, "seconds": round(figures["seconds"] + seconds, 3)})
                self._results.save()
                progress(done)
        seconds, segments = measure.flush(self._client, name)
        if sum(segments) != rows:
            raise measure.MeasureError(f"{name} has {sum(segments):,} rows instead of {rows:,}: run it with --restart.")
        figures.update({"flush seconds": round(seconds, 2), "interruptions": int(bool(there)), **_now()})
        entry["segment rows"] = segments
        self._results.save()
        self._work.say(f"{rows:,}: inserted in {figures['seconds']:.1f} s, {len(segments)} segments")

    def _truth(self, rows: int) -> Ids:
        """The exact neighbours of the queries, computed once."""
        file = self._options.folder / f"truth-{SEED}-{rows}-{self._options.queries}-{TOP_K}.npy"
        with self._work.part(f"{rows:,}: exact neighbours", rows * TRUTH_SECONDS, rows) as progress:
            if not file.exists():

                def blocks() -> Iterator[Floats]:
                    for number, block in enumerate(self._vectors.blocks(rows)):
                        yield block
                        progress(number * BLOCK + len(block))

                found = exact_neighbours(blocks(), self._queries, TOP_K)
                draft = file.with_suffix(".draft.npy")
                np.save(draft, found)
                os.replace(draft, file)
        truth: Ids = np.load(file)
        return truth

    def _stored(self, rows: int, index: Index) -> dict[str, Any]:
        fresh = {"kind": index.kind, "build": dict(index.build), "searches": []}
        found: dict[str, Any] = self._results.size(rows).setdefault("indexes", {}).setdefault(index.name, fresh)
        return found

    def _index(self, rows: int, index: Index, truth: Ids) -> None:
        name, stored, title = _collection(rows), self._stored(rows, index), f"{rows:,} {index.name}"
        there = measure.built_index(self._client, name) == (index.kind, dict(index.build))
        with self._work.part(f"{title}: building", index.build_seconds(rows), rows) as progress:
            if "build seconds" not in stored or not there:
                self._build(name, index, stored, progress)
                self._work.say(f"{title}: built in {stored['build seconds']:.1f} s")
        with self._work.part(f"{title}: loading", START_SECONDS, 1):
            self._load(name, rows, stored)
        for parameters in index.searches:
            if not any(done["parameters"] == parameters for done in stored["searches"]):
                weight = self._search_seconds(rows, index, parameters)
                label = f"{title}: {plan.describe(parameters) or 'searching'}"
                with self._work.part(label, weight, len(self._queries)) as progress:
                    stored["searches"].append(self._search(name, truth, parameters, progress))
                self._results.save()
        self._client.release_collection(name)
        best = stored["searches"][-1]
        self._work.say(f"{title}: searched, recall up to {best['recall']:.3f}, then p50 {best['p50 ms']} ms")

    def _build(self, name: str, index: Index, stored: dict[str, Any], progress: measure.Progress) -> None:
        measure.drop_index(self._client, name)
        storage = self._lab.folder / "standalone" / "storage"
        before = measure.index_files(storage)
        peak = 0

        def step(done: int) -> None:
            nonlocal peak
            peak = max(peak, self._memory())
            progress(done)

        seconds = measure.build(self._client, name, index.kind, index.build, step)
        stored["build seconds"] = round(seconds, 2)
        stored["index bytes"] = measure.new_bytes(before, measure.index_files(storage))
        stored["peak memory of the build, bytes"] = peak
        stored["build"] = dict(index.build)
        stored.update(_now())
        self._results.save()

    def _load(self, name: str, rows: int, stored: dict[str, Any]) -> None:
        self._client.release_collection(name)
        self._lab.restart()  # a server that has built an index keeps some of the memory; a fresh one does not
        before = self._memory()
        seconds, segments = measure.load(self._client, name, rows)
        stored["load seconds"] = round(seconds, 2)
        stored["segments"] = segments
        stored["memory before loading, bytes"] = before
        stored["memory after loading, bytes"] = self._memory()
        self._results.save()

    def _search(self, name: str, truth: Ids, parameters: Any, progress: measure.Progress) -> dict[str, Any]:
        single = measure.search_each(self._client, name, self._queries, truth, parameters, progress)
        rate = self._clients.searches_per_second(name, self._queries, parameters, TOP_K, self._options.client_seconds)
        return {
            "parameters": dict(parameters),
            "recall": round(single.recall, 4),
            **measure.percentiles(single.milliseconds),
            "searches per second": round(rate, 1),
            **_now(),
        }

    def _memory(self) -> int:
        return self._lab.memory()["standalone"]


class Work:
    """Progress over the whole run: a bar in a terminal, a line a minute elsewhere, and a line for each step.

    Args:
        total: the seconds that all parts are expected to take; only their proportions matter for the time left.
    """

    def __init__(self, total: float) -> None:
        self._total, self._done = total, 0.0
        self._start = self._shown = time.monotonic()
        self._bar = tqdm(
            total=round(total, 1), disable=None, bar_format="{desc} {percentage:3.0f} %|{bar:20}| {postfix}"
        )

    @contextmanager
    def part(self, title: str, weight: float, units: int) -> Iterator[measure.Progress]:
        """A part of so many units; the block gets a function to be called with the number that are done."""
        base = self._done
        self._bar.set_description_str(title)

        def progress(done: int) -> None:
            self._done = base + weight * min(done / units, 1)
            self._bar.n = round(min(self._done, self._total), 1)
            self._bar.set_postfix_str(self._left())
            if self._bar.disable and time.monotonic() > self._shown + 60:
                self.say(f"{title}, {done:,} of {units:,}")

        yield progress
        progress(units)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._shown = time.monotonic()
        tqdm.write(f"[{self._left()}] {text}")

    def _left(self) -> str:
        if self._done <= 0:
            return "estimating"
        seconds = (time.monotonic() - self._start) * max(self._total - self._done, 0) / self._done
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"


def _collection(rows: int) -> str:
    return f"bench_{rows}"


def _missing(stored: dict[str, Any], index: Index) -> bool:
    done = [search["parameters"] for search in stored.get("searches", [])]
    return "left out" not in stored and any(parameters not in done for parameters in index.searches)


def _forget(entry: dict[str, Any], redo: str | None, options: Options) -> None:
    """Remove the figures that are measured again."""
    for name, index in list(entry.get("indexes", {}).items()):
        if not options.kinds or index["kind"] in options.kinds:
            if redo == "build":
                del entry["indexes"][name]
            elif redo == "search":
                index["searches"] = []


def _now() -> dict[str, Any]:
    """When a figure was measured, and how busy the machine was (the load average of the last minute)."""
    return {"date": date.today().isoformat(), "load": round(psutil.getloadavg()[0], 1)}
