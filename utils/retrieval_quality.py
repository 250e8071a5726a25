"""How good retrieval is: with labelled questions by the usual measures, and without labels by signals of the search.

The judged unit is the document: a search returns chunks, and a document has the rank of its first chunk, its other
chunks are not counted again. Which passage of the document came is another question, which "answer@k" settles: do the
first k chunks together hold the key facts of the question (`Question.holds_key_facts`)? A chunk of a right document
that lacks them is similar, not relevant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ir_measures
import numpy as np
import pandas as pd
from agno.knowledge.document import Document
from ir_measures import RR, P, R, Success, nDCG
from scipy import stats

from utils.knowledge import Question, load_corpus

Retriever = Callable[[str], Sequence[Document]]
# What was found, chunks best first, by the question's id.
Found = Mapping[str, Sequence[Document]]

RESAMPLES = 2_000
SEED = 8


def retrieve(retriever: Retriever, questions: Sequence[Question]) -> dict[str, list[Document]]:
    """Ask any retriever (text of a question -> its chunks, best first, each named by its document) every question."""
    return {question.id: list(retriever(question.question)) for question in questions}


def rank_documents(chunks: Sequence[Document]) -> list[str]:
    """Names of the documents of these chunks in the order of their first chunks, each once."""
    return list(dict.fromkeys(chunk.name or "" for chunk in chunks))


def score_of(chunk: Document) -> float:
    """What the search says of a chunk, larger is better: the reranker's score, else that of Milvus; NaN without one."""
    score = getattr(chunk, "score", None) if chunk.reranking_score is None else chunk.reranking_score
    return float("nan") if score is None else float(score)


def measure(found: Found, questions: Sequence[Question], k: int = 5) -> pd.DataFrame:
    """The measures of each answerable question, one row each, indexed by the question's id.

    Args:
        found: from `retrieve`; a question that is missing there found nothing.
        questions: labelled questions; those that the corpus does not answer have no right document and are left out.
        k: how many documents count (recall, precision, hit, nDCG), and how many chunks (answer).

    Returns:
        difficulty and topics (of its labelled documents, a tuple), then numbers from 0 to 1:
        recall@k      share of its labelled documents among the first k
        precision@k   share of the first k documents that are labelled; at most (labelled documents) / k
        hit@1, hit@k  1 if a labelled document is there: enough where any one of them answers
        MRR           1 / rank of the first labelled document, over all that was found; 0 without one
        nDCG@k        gains discounted by the logarithm of the rank, 1 for the best order
        answer@1, answer@k  1 if the first chunks hold the key facts
    """
    topics = {text.id: text.topic for text in load_corpus()}
    asked = [question for question in questions if question.answerable]
    labels = {question.id: dict.fromkeys(question.documents, 1) for question in asked}
    names = {question.id: rank_documents(found.get(question.id, ())) for question in asked}
    # The library sorts by score, so that a falling one keeps the order of the documents.
    run = {id_: {name: -float(rank) for rank, name in enumerate(ranked)} for id_, ranked in names.items()}
    columns = {
        R @ k: f"recall@{k}",
        P @ k: f"precision@{k}",
        Success @ 1: "hit@1",
        Success @ k: f"hit@{k}",
        RR: "MRR",
        nDCG @ k: f"nDCG@{k}",
    }
    rows: dict[str, dict[str, object]] = {
        question.id: {
            "difficulty": question.difficulty,
            "topics": tuple(sorted({topics.get(name, "unknown") for name in question.documents})),
        }
        for question in asked
    }
    values = {(value.query_id, value.measure): value.value for value in ir_measures.iter_calc(columns, labels, run)}
    for question in asked:
        chunks = found.get(question.id, ())
        rows[question.id] |= {column: values[question.id, name] for name, column in columns.items()}
        for depth in dict.fromkeys((1, k)):
            text = "\n".join(chunk.content for chunk in chunks[:depth])
            rows[question.id][f"answer@{depth}"] = float(question.holds_key_facts(text))
    return pd.DataFrame.from_dict(rows, orient="index")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean (percentiles of resampled questions); NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    found = stats.bootstrap(
        (np.asarray(values, float),), np.mean, n_resamples=RESAMPLES, method="percentile", rng=SEED
    ).confidence_interval
    return float(found.low), float(found.high)


def summarise(table: pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """Mean and 95 % interval of each measure, for all questions or by "difficulty" or "topics".

    Args:
        table: from `measure`.
        by: a question whose documents have several topics counts in each of them.

    Returns:
        One row for each group and measure: questions (how many), mean, low, high.
    """
    grouped = [("all", table)] if by is None else table.explode(by).groupby(by)
    rows = {
        (group, name): (len(part), part[name].mean(), *interval(part[name].tolist()))
        for group, part in grouped
        for name in part.select_dtypes("number").columns
    }
    index = pd.MultiIndex.from_tuples(rows, names=[by or "questions", "measure"])
    return pd.DataFrame(rows.values(), index, ["questions", "mean", "low", "high"])


def signals(found: Found, dense: Found, words: Found, k: int = 5) -> pd.DataFrame:
    """What a search says about itself when nobody has labelled the question; one row a question, indexed by its id.

    Args:
        found: what the assistant retrieves; its scores must be comparable between questions.
        dense, words: what embeddings alone and BM25 alone find.
        k: how many documents of each are compared.

    Returns:
        best score, gap (best minus second document's score), agreement (share of the first k documents of `dense` that
        are among the first k of `words`) and empty (whether nothing was found). NaN where there is nothing to compare.
    """
    rows = {}
    for id_, chunks in found.items():
        best: dict[str, float] = {}
        for chunk in chunks:
            best.setdefault(chunk.name or "", score_of(chunk))
        first, second = (*best.values(), float("nan"), float("nan"))[:2]
        near, shared = rank_documents(dense[id_])[:k], set(rank_documents(words[id_])[:k])
        agreement = sum(name in shared for name in near) / len(near) if near else float("nan")
        rows[id_] = (first, first - second, agreement, not chunks)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["best score", "gap", "agreement", "empty"])


def separates(signal: pd.Series[float], good: pd.Series[bool]) -> tuple[float, float, float]:
    """How well a signal tells good from bad: the chance that it is larger for a good question than for a bad one.

    Args:
        signal: one number a question; NaN counts as lower than any number.
        good: whether the question is good, by the same index.

    Returns:
        The area under the ROC curve (Mann-Whitney's U over the number of pairs; 0.5 is chance), and the ends of its
        95 % bootstrap interval. NaN if all are good or none is.
    """
    values = signal.fillna(float("-inf"))
    groups = values[good].to_numpy(float), values[~good].to_numpy(float)
    if not all(map(len, groups)):
        return (float("nan"),) * 3

    def area(high: np.ndarray, low: np.ndarray) -> float:
        return float(stats.mannwhitneyu(high, low).statistic) / (len(high) * len(low))

    if min(map(len, groups)) < 2:
        return area(*groups), float("nan"), float("nan")
    ends = stats.bootstrap(groups, area, vectorized=False, n_resamples=500, method="percentile", rng=SEED)
    return area(*groups), float(ends.confidence_interval.low), float(ends.confidence_interval.high)


def hard_cases(found: Found, questions: Sequence[Question]) -> pd.DataFrame:
    """Answerable questions whose first document is wrong and scores as high as right ones do: similar, not relevant.

    High means at least the median score of the first documents that are right. Highest first; columns: question, top
    document, score, right document (the first found, else the first labelled), its rank (NaN: not found).
    """
    rows = []
    for question in questions:
        if not question.answerable or not found.get(question.id):
            continue
        names = rank_documents(found[question.id])
        rank = next((rank for rank, name in enumerate(names, 1) if name in question.documents), float("nan"))
        right = question.documents[0] if np.isnan(rank) else names[int(rank) - 1]
        rows.append((question.question, names[0], score_of(found[question.id][0]), right, rank))
    table = pd.DataFrame(rows, columns=["question", "top document", "score", "right document", "its rank"])
    wrong = table["its rank"] != 1
    high = table.score >= table.score[~wrong].median()
    return table[wrong & high].sort_values("score", ascending=False, ignore_index=True)
