"""How well the assistant finds and answers: `.venv/bin/python tests/benchmarks/answers.py`.

On Windows the interpreter is .venv\\Scripts\\python.

    (no option)     the test split, searched by dense vectors, by words (BM25), by both, and by both with a reranker
    --split dev     the dev split
    --fit           fit utils/offline/answerable.json on the dev split (never on test)
    --save          store the result as data/benchmarks/answers.json

Every question goes through the whole assistant: Agno agent, model server, search in Milvus Lite.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from tqdm import tqdm  # noqa: E402

from utils import lesson, models  # noqa: E402
from utils.assistant import MODES, Library, ask, build_agent, open_library  # noqa: E402
from utils.knowledge import Question, load_questions  # noqa: E402
from utils.offline.answers import FEATURES, REFUSAL, Passage, answerability_features  # noqa: E402

DEPTH = 10
TARGETS = {"recall@3": 0.85, "key fact": 0.75, "correct refusals": 0.80, "wrong refusals": 0.10}
# The share of answerable dev questions that the fitted model may refuse.
WRONG_REFUSALS = 0.07


def document_ranks(library: Library, question: Question, mode: str) -> list[str]:
    """Ids of the documents found, best first, each once."""
    return list(dict.fromkeys(hit["name"] for hit in library.search(question.question, 30, mode)))


def recall(ranked: list[str], question: Question, k: int) -> float:
    """1 if a document that answers is among the first k; for two_documents the share of both."""
    found = [name in ranked[:k] for name in question.documents]
    return sum(found) / len(found) if question.difficulty == "two_documents" else float(any(found))


def reciprocal_rank(ranked: list[str], question: Question) -> float:
    """1 / rank of the first document that answers, 0 if there is none."""
    return next((1 / rank for rank, name in enumerate(ranked, 1) if name in question.documents), 0.0)


def measure(library: Library, questions: list[Question], mode: str) -> pd.DataFrame:
    """One row a question: ranks, answer, seconds, and what went wrong if the key fact is missing."""
    agent = build_agent(library, mode)
    rows = []
    for question in tqdm(questions, desc=mode, leave=False):
        ranked = document_ranks(library, question, mode)
        passages = library.search(question.question, DEPTH, mode)
        start = time.perf_counter()
        reply = ask(agent, question.question)
        seconds = time.perf_counter() - start
        refused = REFUSAL in reply.text
        correct = question.answerable and not refused and question.holds_key_facts(reply.text)
        in_passages = question.answerable and question.holds_key_facts("\n".join(p["content"] for p in passages))
        rows.append(
            {
                "answerable": question.answerable,
                "difficulty": question.difficulty,
                "recall@1": recall(ranked, question, 1) if question.answerable else np.nan,
                "recall@3": recall(ranked, question, 3) if question.answerable else np.nan,
                "recall@5": recall(ranked, question, 5) if question.answerable else np.nan,
                "MRR": reciprocal_rank(ranked, question) if question.answerable else np.nan,
                "correct": correct,
                "refused": refused,
                "lost": ""
                if correct or not question.answerable
                else "refusal"
                if refused
                else "choice"
                if in_passages
                else "retrieval",
                "ms": 1000 * seconds,
            }
        )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """The figures of one mode."""
    answerable, other = table[table.answerable], table[~table.answerable]
    figures = {name: answerable[name].mean() for name in ("recall@1", "recall@3", "recall@5", "MRR")}
    figures |= {"key fact": answerable.correct.mean(), "correct refusals": other.refused.mean()}
    figures |= {"wrong refusals": answerable.refused.mean(), "ms per question": table.ms.median()}
    return {name: round(float(value), 3) for name, value in figures.items()}


def fit(library: Library, questions: list[Question]) -> dict[str, Any]:
    """Class-balanced, L2-regularised logistic regression by Newton's method; the threshold allows WRONG_REFUSALS."""
    passages = [[Passage(hit["content"], hit["name"]) for hit in library.search(q.question, DEPTH)] for q in questions]
    x = np.array([answerability_features(q.question, p) for q, p in zip(questions, passages, strict=True)])
    y = np.array([q.answerable for q in questions])
    mean, scale = x.mean(axis=0), x.std(axis=0)
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    balance = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    penalty = np.array([1.0] * x.shape[1] + [0.0])
    beta = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ beta))
        gradient = z.T @ (balance * (p - y)) + penalty * beta
        hessian = (z * (balance * p * (1 - p))[:, None]).T @ z + np.diag(penalty)
        beta -= np.linalg.solve(hessian, gradient)
    weights = beta[:-1] / scale
    scores = x @ weights
    return {
        "about": (
            f"fitted on the dev split ({y.sum()} answerable, {(~y).sum()} not) by tests/benchmarks/answers.py --fit"
        ),
        "weights": {name: round(float(w), 4) for name, w in zip(FEATURES, weights, strict=True)},
        "intercept": round(-float(np.quantile(scores[y], WRONG_REFUSALS)), 4),
    }


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument(
        "--show",
        action="store_true",
        help="list the questions whose key fact is missing, and wrong refusals (dev only)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {"COURSE_DATA": folder, "MODEL_PROVIDER": "offline", "MILVUS_URI": ""}
        workspace = lesson.workspace("answers")
        library = open_library(workspace)
        if options.fit:
            fitted = fit(library, load_questions("dev"))
            (ROOT / "utils" / "offline" / "answerable.json").write_text(
                json.dumps(fitted, indent=2) + "\n", encoding="utf-8"
            )
            print(json.dumps(fitted, indent=2))
        else:
            report(library, load_questions(options.split), options)
        library.close()
        lesson.close_lite(workspace)
    models.stop_offline()


def report(library: Library, questions: list[Question], options: argparse.Namespace) -> None:
    """Measure every mode and print the tables."""
    tables = {mode: measure(library, questions, mode) for mode in MODES}
    figures = {mode: summary(table) for mode, table in tables.items()}
    answerable = sum(q.answerable for q in questions)
    print(
        f"{options.split} split: {answerable} answerable questions, "
        f"{len(questions) - answerable} that the corpus does not answer\n"
    )
    print(pd.DataFrame(figures).to_string(), "\n")
    both = tables["reranked"]
    for name, target in TARGETS.items():
        value = figures["reranked"][name]
        reached = value <= target if name == "wrong refusals" else value >= target
        print(f"{name:<17} {value:.3f}  target {target:.2f}  {'reached' if reached else 'MISSED'}")
    print("\nkey fact present by difficulty (reranked):")
    print(both[both.answerable].groupby("difficulty").correct.agg(["mean", "count"]).round(2).to_string())
    lost = both[both.answerable & ~both.correct].lost.value_counts()
    print(f"\nwhere the missing key facts were lost: {', '.join(f'{n} in {part}' for part, n in lost.items())}")
    print(
        "(retrieval: not among the first 10 chunks; choice: found, but another sentence was quoted; refusal: declined)"
    )
    if options.show and options.split == "dev":
        for question, (_, row) in zip(questions, both.iterrows(), strict=True):
            if row.lost or (not row.answerable and not row.refused):
                print(f"  {row.lost or 'answered'}: {question.question} {list(question.key_facts)}")
    if options.save:
        packages = {name: version(name) for name in ("agno", "pymilvus", "milvus-lite", "wordllama")}
        result = {
            "date": date.today().isoformat(),
            "split": options.split,
            "questions": len(questions),
            "versions": packages,
            "modes": figures,
        }
        path = ROOT / "data" / "benchmarks" / "answers.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
