"""Vectors like text embeddings, the same ones at every call, and the exact answer to every query.

A vector is the centre of its cluster plus noise, turned, and scaled to length 1. Centres and noise have variances that
fall from axis to axis, as those of embeddings do: with equal variances all distances in 96 dimensions are almost the
same, and no index could be better than another. The clusters overlap, so that the neighbours of a query lie in several
cells of an IVF index and recall grows with nprobe step by step.

96 dimensions: those of Deep1B, the usual public set of this size, and 10 million of them are 3.8 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import faiss
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

DIMENSIONS = 96
SEED = 7
BLOCK = 10_000  # vectors that are made at once; the first ones are the same at every size
CLUSTERS = 2000
SPREAD = 0.8  # length of the noise by that of the centres
FALL = 0.5  # the standard deviation of axis n is n ** -FALL
SETUP, QUERIES, VECTORS = 0, 1, 2  # each has random numbers of its own


class Clustered:
    """A distribution of unit vectors, and as many draws from it as wanted.

    Args:
        seed: the same seed gives the same vectors, but for rounding in the last digit on another processor.
        dimensions: of a vector.
    """

    def __init__(self, seed: int = SEED, dimensions: int = DIMENSIONS) -> None:
        self._seed = seed
        random = np.random.default_rng([seed, SETUP])
        deviations = np.arange(1, dimensions + 1) ** -FALL
        self._deviations = (deviations / np.linalg.norm(deviations)).astype(np.float32)
        self._centres = random.standard_normal((CLUSTERS, dimensions), dtype=np.float32) * self._deviations
        self._shares = random.dirichlet(np.full(CLUSTERS, 2.0))  # large and small clusters
        # Without the turn, every axis would have its own scale, which quantisation (IVF_SQ8) would profit from.
        self._turn = np.linalg.qr(random.standard_normal((dimensions, dimensions)))[0].astype(np.float32)

    def blocks(self, count: int) -> Iterator[Floats]:
        """The first `count` vectors in blocks of shape (10,000, dimensions); the last one may be shorter."""
        for number, start in enumerate(range(0, count, BLOCK)):
            yield self.block(number)[: count - start]

    def block(self, number: int) -> Floats:
        """The vectors from `number` * 10,000 on, of shape (10,000, dimensions)."""
        return self._draw(BLOCK, np.random.default_rng([self._seed, VECTORS, number]))

    def queries(self, count: int) -> Floats:
        """Draws from the same distribution that are none of the vectors, of shape (count, dimensions)."""
        return self._draw(count, np.random.default_rng([self._seed, QUERIES]))

    def _draw(self, count: int, random: np.random.Generator) -> Floats:
        clusters = random.choice(CLUSTERS, count, p=self._shares)
        noise = random.standard_normal((count, len(self._deviations)), dtype=np.float32) * self._deviations
        drawn = (self._centres[clusters] + SPREAD * noise) @ self._turn
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def exact_neighbours(blocks: Iterable[Floats], queries: Floats, top_k: int) -> Ids:
    """The numbers of the `top_k` vectors of highest cosine similarity, the best first, by comparing every pair.

    Args:
        blocks: unit vectors in order, of shape (any, dimensions) each; only one block is held at a time.
        queries: unit vectors, of shape (queries, dimensions).
        top_k: at most the number of vectors.

    Returns:
        Numbers of shape (queries, top_k), counted from 0 over all blocks.
    """
    best = faiss.ResultHeap(len(queries), top_k, keep_max=True)
    start = 0
    for block in blocks:
        similarities, numbers = faiss.knn(queries, block, min(top_k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(similarities, numbers + start)
        start += len(block)
    best.finalize()
    found: Ids = best.I
    return found


def recall(found: Iterable[Iterable[int]], truth: Ids) -> float:
    """The mean share of the exact neighbours that a search found, from 0 to 1.

    Args:
        found: the numbers that each query found.
        truth: `exact_neighbours` of the same queries, of shape (queries, top k).
    """
    hits = [len(set(one) & set(exact)) for one, exact in zip(found, truth.tolist(), strict=True)]
    return sum(hits) / truth.size
