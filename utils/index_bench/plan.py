"""Which indexes are measured at which size, and what that needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.errors import CourseError
from utils.index_bench.dataset import DIMENSIONS

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
FLAT_LIMIT = 1_000_000
HNSW_LIMIT_SECONDS = 2 * 3600
NPROBE = (1, 2, 4, 8, 16, 32, 64, 128)
EF = (10, 20, 40, 80, 160, 320)
HNSW = {"M": 16, "efConstruction": 100}
# The server's default of nlist, 128, is measured at every size; then values towards the usual advice, four times the
# square root of a segment's rows. Milvus makes an nlist smaller, without a word, that leaves a cell fewer than 39 rows:
# 10,000 get at most 256. Training costs nlist squared, so that no size gets more than 1024.
LARGE_NLIST = (128, 512, 1024)
NLIST = {10_000: (64, 128, 256), 100_000: LARGE_NLIST, 1_000_000: LARGE_NLIST, 10_000_000: LARGE_NLIST}

RAW_BYTES = 4 * DIMENSIONS
IDLE_BYTES = 600 * 10**6  # the server without data, and the command itself
BUILD_BYTES = 2 * 10**9  # an index is built one segment of at most 512 MB at a time
# Measured at 10 million: what a row takes in the segments' files, and in the message queue.
SEGMENT_BYTES, QUEUE_BYTES = 390, 430


class SizeError(CourseError):
    """A size or an index that cannot be measured."""


@dataclass(frozen=True)
class Index:
    """An index to build and the search parameters to measure on it.

    Attributes:
        kind: FLAT, IVF_FLAT, IVF_SQ8 or HNSW.
        build: parameters of the build.
        searches: parameters of the searches, one measurement each.
    """

    kind: str
    build: Mapping[str, int] = field(default_factory=dict)
    searches: tuple[Mapping[str, int], ...] = ({},)

    @property
    def name(self) -> str:
        """Kind and parameters, such as `IVF_FLAT nlist=128`."""
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.build.items())])

    def bytes(self, rows: int) -> int:
        """About what the index takes in memory and on disk: the vectors, and HNSW's 2 * M links of 4 bytes."""
        vector = DIMENSIONS if self.kind == "IVF_SQ8" else RAW_BYTES
        return rows * (vector + 8 * self.build.get("M", 0))

    def build_seconds(self, rows: int) -> float:
        """About what the build takes on two cores: the weights of the parts in the time that is left."""
        if self.kind == "HNSW":
            return 3 + rows * 1.5e-4
        return 1 + rows * 6e-8 * self.build.get("nlist", 0)

    def search_seconds(self, rows: int, search: Mapping[str, int]) -> float:
        """About what one search takes."""
        if self.kind == "HNSW":
            return 2e-3 + 3e-5 * search["ef"] * (1 + rows / 2e6)
        share = min(1.0, search["nprobe"] / self.build["nlist"]) if self.build else 1.0
        return 2e-3 + 3e-8 * rows * share


def indexes(rows: int) -> Iterator[Index]:
    """What is measured at a size, in order."""
    if rows <= FLAT_LIMIT:
        yield Index("FLAT")
    nlists = NLIST[min(SIZES, key=lambda size: abs(math.log(size / rows)))]
    for nlist in nlists:
        yield Index("IVF_FLAT", {"nlist": nlist}, probes(rows, nlist))
    middle = nlists[1]
    yield Index("IVF_SQ8", {"nlist": middle}, probes(rows, middle))
    yield Index("HNSW", HNSW, tuple({"ef": ef} for ef in EF))


def probes(rows: int, nlist: int) -> tuple[Mapping[str, int], ...]:
    """The values of nprobe that make sense for a number of cells: all of them are a FLAT search.

    Beyond the limit of FLAT, at most a quarter of the cells is searched.
    """
    most = nlist if rows <= FLAT_LIMIT else nlist // 4
    return tuple({"nprobe": nprobe} for nprobe in NPROBE if nprobe <= most)


def disk_bytes(rows: int) -> int:
    """About what a size takes on disk, with the index in use and the one before it, which is removed a minute later."""
    largest = max(index.bytes(rows) for index in indexes(rows))
    return rows * (SEGMENT_BYTES + QUEUE_BYTES) + 2 * largest


def memory_bytes(rows: int) -> int:
    """About what a size takes in memory: the largest index loaded, or one being built."""
    largest = max(index.bytes(rows) for index in indexes(rows))
    return IDLE_BYTES + max(int(1.2 * largest), min(BUILD_BYTES, 5 * rows * RAW_BYTES))


def read_size(text: str) -> int:
    """A number of vectors, written as 10000, 10k or 1M.

    Raises:
        SizeError: it is not a number from 1000 to 10 million.
    """
    digits, factor = text.strip().lower().replace("_", "").replace(",", ""), 1
    if digits.endswith(("k", "m")):
        factor = 1000 if digits.endswith("k") else 1_000_000
        digits = digits[:-1]
    rows = int(digits) * factor if digits.isascii() and digits.isdigit() and len(digits) < 9 else 0
    if not SIZES[0] // 10 <= rows <= SIZES[-1]:
        raise SizeError(f"{text!r} is no size: give a number of vectors from 1k to 10M, such as 10k, 100k, 1M or 10M.")
    return rows


def hnsw_seconds(rows: int, measured: Mapping[int, float]) -> float | None:
    """What the build of HNSW takes at a size, from the largest smaller size that was measured; None without one.

    A vector is linked by a search among those that are there, so a build takes rows * log(rows).

    Args:
        rows: the size.
        measured: seconds of the build by size.
    """
    smaller = max((size for size in measured if size < rows), default=None)
    if smaller is None:
        return None
    return measured[smaller] * rows * math.log(rows) / (smaller * math.log(smaller))


def describe(parameters: Mapping[str, Any]) -> str:
    """Parameters in one line."""
    return " ".join(f"{name}={value}" for name, value in parameters.items())
