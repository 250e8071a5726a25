"""Measures against cases computed by hand, intervals, signals without labels, and hard cases of the real corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan, log2

import pandas as pd
import pytest
from agno.knowledge.document import Document
from agno.vectordb.search import SearchType

from utils import lesson, models
from utils.assistant import Library, open_library
from utils.knowledge import Question, load_questions
from utils.milvus_store import FoundDocument
from utils.retrieval_quality import (
    hard_cases,
    interval,
    measure,
    rank_documents,
    retrieve,
    score_of,
    separates,
    signals,
    summarise,
)


def question(id: str, *documents: str, facts: Sequence[str] = ("19530",)) -> Question:
    return Question(id, f"What about {id}?", documents, tuple(facts), "words" if documents else "unanswerable", "dev")


def chunks(*found: tuple[str, float], text: str = "nothing") -> list[Document]:
    return [FoundDocument(content=text, name=name, score=score) for name, score in found]


PORTS = question("ports", "milvus-lite", "agno-teams")
REST = question("rest", "milvus-lite")
UNKNOWN = question("unknown")


def test_measures_count_a_document_once_at_the_rank_of_its_first_chunk() -> None:
    found = chunks(("x", 0.9), ("x", 0.8), ("milvus-lite", 0.7), ("x", 0.6), ("y", 0.5), ("agno-teams", 0.4))
    assert rank_documents(found) == ["x", "milvus-lite", "y", "agno-teams"]
    row = measure({"ports": found}, [PORTS], k=3).loc["ports"]
    assert row.difficulty == "words" and row.topics == ("agno", "milvus")
    expected = {
        "recall@3": 1 / 2,  # one of two among x, milvus-lite, y
        "precision@3": 1 / 3,
        "hit@1": 0,
        "hit@3": 1,
        "MRR": 1 / 2,
        "nDCG@3": (1 / log2(3)) / (1 + 1 / log2(3)),  # gain at rank 2, the best order has ranks 1 and 2
        "answer@1": 0,
        "answer@3": 0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_answers_are_looked_for_in_the_first_chunks_together() -> None:
    both = question("both", "milvus-lite", facts=("19530|port 1", "9091"))
    found = [Document(name="x", content="Port 1"), Document(name="milvus-lite", content="and `9091`")]
    row = measure({"both": found}, [both], k=2).loc["both"]
    assert (row["answer@1"], row["answer@2"], row["hit@1"], row["hit@2"]) == (0, 1, 0, 1)
    alone = measure({"both": found}, [both], k=1)
    assert list(alone.filter(like="answer")) == ["answer@1"] and list(alone.filter(like="hit")) == ["hit@1"]


def test_nothing_found_is_zero_and_unanswerable_questions_are_left_out() -> None:
    table = measure({"ports": [], "unknown": chunks(("x", 1.0))}, [PORTS, REST, UNKNOWN])
    assert list(table.index) == ["ports", "rest"]
    assert (table.select_dtypes("number") == 0).all(axis=None)


def test_intervals_hold_the_mean_shrink_with_more_questions_and_repeat() -> None:
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 200
    low, high = interval(few)
    assert low < 0.5 < high and interval(few) == (low, high)
    # The normal approximation of a share of a half: 0.5 -+ 1.96 * sqrt(0.25 / 20).
    assert (low, high) == pytest.approx((0.281, 0.719), abs=0.04)
    assert interval(many)[1] - interval(many)[0] < (high - low) / 3
    assert interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert all(map(isnan, interval([1.0])))


def test_summaries_group_by_difficulty_and_count_a_question_in_each_of_its_topics() -> None:
    table = measure({"ports": chunks(("milvus-lite", 1.0)), "rest": chunks(("x", 1.0))}, [PORTS, REST])
    whole = summarise(table)
    assert whole.loc[("all", "hit@1")].tolist() == [2, 0.5, 0.0, 1.0]
    by_topic = summarise(table, "topics").xs("hit@1", level="measure")
    assert by_topic.questions.to_dict() == {"agno": 1, "milvus": 2}
    assert by_topic["mean"].to_dict() == {"agno": 1.0, "milvus": 0.5}
    assert summarise(table, "difficulty").index.unique("difficulty").tolist() == ["words"]


def test_signals_need_no_labels() -> None:
    found = {
        "a": chunks(("x", 0.9), ("x", 0.8), ("y", 0.5)),
        "b": chunks(("x", 0.4)),
        "c": [],
    }
    dense = {"a": chunks(("x", 1), ("y", 1), ("z", 1)), "b": chunks(("x", 1)), "c": []}
    words = {"a": chunks(("y", 1), ("q", 1), ("x", 1)), "b": [], "c": []}
    table = signals(found, dense, words, k=2)
    assert table.loc["a", ["best score", "gap", "agreement"]].tolist() == pytest.approx([0.9, 0.4, 0.5])
    assert table.loc["b", ["best score", "agreement"]].tolist() == [0.4, 0.0] and isnan(table.loc["b", "gap"])
    assert table["empty"].tolist() == [False, False, True]
    assert table.loc["c", ["best score", "gap", "agreement"]].isna().all()


def test_the_reranker_has_the_last_word_on_the_score() -> None:
    reranked = FoundDocument(content="", score=0.3, reranking_score=0.0)
    assert score_of(reranked) == 0.0 and score_of(chunks(("x", 0.3))[0]) == 0.3
    assert isnan(score_of(Document(content="")))


def test_separation_is_the_share_of_pairs_in_the_right_order() -> None:
    signal = pd.Series([0.9, 0.5, 0.6, 0.1, float("nan")], list("abcde"))
    good = pd.Series([True, True, False, False, False], list("abcde"))
    area, low, high = separates(signal, good)
    assert area == pytest.approx(5 / 6), "0.5 against 0.6 is the one wrong pair of six; NaN is lower than any number"
    assert low <= area <= high
    assert separates(-signal.fillna(0), good)[0] == pytest.approx(1 / 6)
    assert all(map(isnan, separates(signal, good | True)))


def test_a_hard_case_is_wrong_and_scores_like_a_right_one() -> None:
    asked = [question(name, "milvus-lite", "milvus-search") for name in "abcdef"] + [UNKNOWN]
    found = {
        "a": chunks(("milvus-lite", 0.5)),
        "b": chunks(("milvus-lite", 0.7)),
        "c": chunks(("x", 0.6), ("y", 0.5), ("milvus-search", 0.4)),  # as high as the median of a and b
        "d": chunks(("x", 0.59), ("milvus-lite", 0.5)),
        "e": chunks(("x", 0.9)),
        "f": [],
        "unknown": chunks(("x", 1.0)),
    }
    table = hard_cases(found, asked)
    assert table.question.tolist() == ["What about e?", "What about c?"]
    assert table["top document"].tolist() == ["x", "x"] and table.score.tolist() == [0.9, 0.6]
    assert table["right document"].tolist() == ["milvus-lite", "milvus-search"]
    assert isnan(table["its rank"][0]) and table["its rank"][1] == 3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    data = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_DATA", str(data))
        opened = open_library(lesson.workspace("quality"))
    yield opened
    opened.close()
    lesson.close_lite(data)


def test_on_the_corpus_the_reranker_beats_embeddings_and_a_low_score_warns(library: Library) -> None:
    asked = load_questions("dev")[::3]
    search, reranker = library.store.search, models.reranker()
    dense = retrieve(lambda text: search(text, 30, search_type=SearchType.vector), asked)
    words = retrieve(lambda text: search(text, 30, search_type=SearchType.keyword), asked)
    reranked = retrieve(lambda text: reranker.rerank(text, search(text, 30, search_type=SearchType.hybrid)), asked)
    plain, better = (summarise(measure(found, asked))["mean"]["all"] for found in (dense, reranked))
    assert better["MRR"] > plain["MRR"] + 0.1 and better["answer@1"] > plain["answer@1"] + 0.1
    answerable = pd.Series({q.id: q.answerable for q in asked})
    table = signals(reranked, dense, words)
    assert separates(table["best score"], answerable)[1] > 0.5, "its interval lies above chance"
    assert table["agreement"].between(0, 1).all() and not table["empty"].any()
    similar = hard_cases(dense, asked)
    assert len(similar) and (similar["its rank"] != 1).all() and similar.score.is_monotonic_decreasing
