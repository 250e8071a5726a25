"""What ingest.py and search.py share: documents, an embedder that costs nothing, the two Milvus, ratios, the report."""

from __future__ import annotations

import json
import os
import platform
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from agno.knowledge.document import Document
from agno.knowledge.embedder import Embedder
from numpy.typing import NDArray
from pymilvus import MilvusClient

from utils import lesson
from utils.milvus_lab import standalone

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "data" / "benchmarks" / "store.json"
DIMENSIONS = 256
CHARACTERS = 600
WORDS = [f"word{number}" for number in range(2000)]
TOPICS = 10
# pymilvus pings every 10 seconds, and Milvus Lite ends a connection with "Too many pings"; its async client fails then.
QUIET = {"grpc.keepalive_time_ms": 600_000}


@dataclass
class ReadyEmbedder(Embedder):
    """Looks vectors up that were made before the clock starts, so that embedding does not hide what a store costs."""

    dimensions: int | None = DIMENSIONS
    enable_batch: bool = True
    vectors: dict[str, list[float]] = field(default_factory=dict)

    def get_embedding(self, text: str) -> list[float]:
        return self.vectors[text]

    def get_embedding_and_usage(self, text: str) -> tuple[list[float], dict[str, Any] | None]:
        return self.vectors[text], None

    async def async_get_embedding(self, text: str) -> list[float]:
        return self.vectors[text]

    async def async_get_embedding_and_usage(self, text: str) -> tuple[list[float], dict[str, Any] | None]:
        return self.vectors[text], None

    async def async_get_embeddings_batch_and_usage(self, texts: list[str]) -> tuple[list[list[float]], list[None]]:
        return [self.vectors[text] for text in texts], [None] * len(texts)


def make_documents(count: int) -> list[Document]:
    """New documents without embeddings, the same at every call: about 600 characters and three keys of metadata."""
    choice = random.Random(0).choice
    documents = []
    for number in range(count):
        content = f"Chunk {number}."
        while len(content) < CHARACTERS:
            content += f" {choice(WORDS)}"
        metadata = {"topic": f"t{number % TOPICS}", "year": 2000 + number % 25, "source": f"page-{number // 10}.md"}
        documents.append(Document(content=content, name=f"page-{number // 10}", id=str(number), meta_data=metadata))
    return documents


def make_queries(count: int) -> list[str]:
    """Texts of four words to search for."""
    choose = random.Random(7)
    return [" ".join(choose.sample(WORDS, 4)) for _ in range(count)]


def ready_embedder(texts: Sequence[str]) -> ReadyEmbedder:
    """An embedder that knows these texts; its vectors are random and of length 1."""
    vectors = np.random.default_rng(len(texts)).standard_normal((len(texts), DIMENSIONS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ReadyEmbedder(vectors=dict(zip(texts, vectors.tolist(), strict=True)))


@dataclass(frozen=True)
class Place:
    """A Milvus to measure."""

    name: str
    uri: str
    token: str

    @property
    def has_bm25(self) -> bool:
        return self.uri.endswith(".db")

    def client(self) -> MilvusClient:
        """A connection of its own."""
        return MilvusClient(self.uri, token=self.token, grpc_options=QUIET)


@contextmanager
def places() -> Iterator[Iterator[Place]]:
    """Milvus Lite and then a standalone server, each started when it is its turn, with empty data."""
    lesson.quiet_logs()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield _places(Path(folder))


def _places(folder: Path) -> Iterator[Place]:
    yield Place(f"Milvus Lite {version('milvus-lite')}", str(folder / "milvus.db"), "")
    lesson.close_lite(folder)
    with standalone(folder / "standalone", progress=False) as lab:
        yield Place("Milvus standalone 2.3.5", lab.uri, lab.token)


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    def as_list(self) -> list[float]:
        return [round(number, 3) for number in (self.value, self.low, self.high)]


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Median of `above` by median of `below`, measured in pairs; the interval is from resampling the pairs."""
    pairs = np.array([above, below])
    picks = np.random.default_rng(0).integers(pairs.shape[1], size=(2000, pairs.shape[1]))
    medians = np.median(pairs[:, picks], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return Ratio(float(np.median(above) / np.median(below)), float(low), float(high))


def median_of_ratios(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The median of the rounds' ratios: for few and long rounds, between which the machine's speed drifts."""
    ratios: NDArray[np.float64] = np.array(above) / np.array(below)
    picks = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def verdict(ratio: Ratio, target: float, at_least: bool) -> str:
    """The ratio beside its target."""
    reached = ratio.value >= target if at_least else ratio.value <= target
    bound = "at least" if at_least else "at most"
    return f"{ratio}  target {bound} {target:g}  {'reached' if reached else 'MISSED'}"


def machine() -> str:
    """The machine without its name, and how busy it was."""
    memory = psutil.virtual_memory().total / 2**30
    load = psutil.getloadavg()[0]
    return (
        f"{os.cpu_count()} processors, {memory:.0f} GB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, load {load:.1f}"
    )


def save(part: str, figures: dict[str, Any]) -> None:
    """Store the figures of one benchmark as its part of data/benchmarks/store.json."""
    stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    stored[part] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("agno", "pymilvus", "milvus-lite")},
        **figures,
    }
    RESULT.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
