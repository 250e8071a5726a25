"""What a language model on this machine adds, and what it costs: `.venv/bin/python tests/benchmarks/engines.py`.

Sixty questions of the test split, the same for all (a fixed sample), are put to the whole assistant three times: to the
extractive engine, to the 0.5B and to the 1.5B model (`python3 -m utils model fetch small`, `... fetch default`). All of
them read the five best chunks. Takes about an hour on two cores; interrupted, it goes on where it stopped.

    --save      store the result as data/benchmarks/engines.json
    --fresh     forget what an interrupted run has measured
    --read      print the answers that were measured, to read them
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402
import psutil  # noqa: E402
from agno.models.message import Message  # noqa: E402
from tqdm import tqdm  # noqa: E402

from utils import lesson, models  # noqa: E402
from utils.assistant import Library, build_agent, open_library  # noqa: E402
from utils.knowledge import Question, load_questions  # noqa: E402
from utils.offline.answers import REFUSAL, parse_passages  # noqa: E402
from utils.offline.text import stem, words_of  # noqa: E402
from utils.settings import load_settings  # noqa: E402

ANSWERABLE, OTHERS, ALONE = 45, 15, 20
DOCUMENTS = 5
ENGINES = {
    "extractive": {"MODEL_PROVIDER": "offline"},
    "0.5B": {"MODEL_PROVIDER": "local", "MODEL_ID": "small"},
    "1.5B": {"MODEL_PROVIDER": "local", "MODEL_ID": "default"},
}
MEASURED = ROOT / "data" / "local" / "benchmarks" / "engines.jsonl"
# How language models decline. Read with --read: every answer that is taken for a refusal, and every one that is not.
_DECLINES = re.compile(
    r"\b(do(es)? not|don't|doesn't|did not|cannot|can't|could not|is not|are not|isn't|not) (\w+ ){0,3}"
    r"(answer|contain|mention|provide|specif|find|found|have (any )?information|cover|address|include|state|explicitly)"
    r"|\bno (information|mention|details|documents?|relevant|specific|answer)\b"
    r"|\b(unable|not possible) to (answer|find|determine)|\bI('m| am) sorry\b|" + re.escape(REFUSAL),
    re.IGNORECASE,
)
# Part of a sentence's words that one passage must have, and all its numbers and identifiers, to support the sentence.
SUPPORTED = 0.7


def sample() -> list[Question]:
    """Sixty questions of the test split, by the digest of their ids, so that it is the same everywhere."""
    questions = sorted(load_questions("test"), key=lambda q: hashlib.sha256(q.question.encode()).hexdigest())
    answerable = [q for q in questions if q.answerable][:ANSWERABLE]
    return answerable + [q for q in questions if not q.answerable][:OTHERS]


def support(answer: str, passages: list[str]) -> tuple[int, int]:
    """How many of the answer's sentences are supported by a passage, and how many there are.

    A sentence is supported if one passage holds all of its numbers and identifiers and most of its other words. That is
    words, not meaning: a negation passes.
    """
    known = [words_of(passage).stems for passage in passages]
    texts = [passage.lower() for passage in passages]
    supported = total = 0
    for sentence in re.split(r"(?<=[.!?:])\s+|\n+", re.sub(r"\[[\w., -]+\]", "", answer)):
        words = words_of(sentence).words
        if len(words) < 3:
            continue
        total += 1
        exact = [word.lower() for word in words if re.search(r"\d|_", word)]
        needed = SUPPORTED * len(words)
        supported += any(
            all(word in text for word in exact) and sum(stem(word) in stems for word in words) >= needed
            for stems, text in zip(known, texts, strict=True)
        )
    return supported, total


def declines(answer: str) -> bool:
    """Whether the answer begins with a refusal; further down, "it does not contain" may belong to what is explained."""
    first = re.split(r"(?<=[.!?:])\s+", answer.strip())[0]
    return bool(_DECLINES.search(first))


def measure(library: Library, question: Question) -> dict[str, Any]:
    """Ask one question; what was called, said and needed."""
    agent = build_agent(library, documents=DOCUMENTS)
    started = time.perf_counter()
    run = agent.run(question.question)
    seconds = time.perf_counter() - started
    text = str(run.content)
    results = [str(tool.result) for tool in run.tools or []]
    passages = [passage for result in results for passage in parse_passages(result)]
    found = {passage.source for passage in passages}
    cited = set(re.findall(r"\[([a-z0-9][\w.-]*)\]", text))
    supported, sentences = support(text, [passage.text for passage in passages])
    return {
        "status": run.status.value,
        "searched": [str(tool.tool_args.get("query")) for tool in run.tools or [] if tool.tool_args],
        "answer": text,
        "found": sorted(found & set(question.documents)),
        "cited": sorted(cited & found),
        "invented": sorted(cited - found),
        "supported": supported,
        "sentences": sentences,
        "seconds": round(seconds, 2),
        "read": run.metrics.input_tokens if run.metrics else 0,
        "written": run.metrics.output_tokens if run.metrics else 0,
    }


def calls_alone(question: Question) -> bool:
    """Whether the model calls the search tool when nobody decides for it (LOCAL_TOOLS=native), and calls it validly."""

    def search_knowledge_base(query: str) -> str:
        """Search the knowledge base for documents that answer the query."""
        return query

    model = models.chat_model(max_tokens=120)
    tool = {
        "type": "function",
        "function": {
            "name": "search_knowledge_base",
            "description": search_knowledge_base.__doc__,
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    }
    told = "You answer questions about Agno and Milvus. Always search the knowledge base before you answer."
    messages = [Message(role="system", content=told), Message(role="user", content=question.question)]
    reply = model.invoke(messages=messages, assistant_message=Message(role="assistant"), tools=[tool])
    return bool(reply.tool_calls)


def gather(questions: list[Question]) -> list[dict[str, Any]]:
    """A row for each engine and question; those that an interrupted run measured are taken from its file."""
    MEASURED.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()] if MEASURED.exists() else []
    done = {(row["engine"], row["question"]) for row in rows}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, MEASURED.open("a", encoding="utf-8") as log:
        os.environ |= {"COURSE_DATA": folder, "MILVUS_URI": ""}
        for engine, settings in ENGINES.items():
            for tools in ("policy", "native"):
                asked = questions if tools == "policy" else questions[:ALONE] if engine != "extractive" else []
                name = engine if tools == "policy" else f"{engine} alone"
                waiting = [q for q in asked if (name, q.question) not in done]
                if not waiting:
                    continue
                os.environ |= {"MODEL_ID": "", "LOCAL_TOOLS": tools, **settings}
                workspace = lesson.workspace("engines")
                library = open_library(workspace)
                speed = models.model_speed(load_settings())
                for question in tqdm(waiting, desc=name):
                    row = measure(library, question) if tools == "policy" else {"called": calls_alone(question)}
                    about = {"engine": name, "question": question.question, "answerable": question.answerable}
                    rows.append(about | row | {"speed": speed.__dict__ if speed else None})
                    log.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
                    log.flush()
                library.close()
                lesson.close_lite(workspace)
                models.stop_offline()
    asked_for = {question.question: question for question in questions}
    for row in rows:  # here, so that the labels count as they are today
        question = asked_for[row["question"]]
        row["correct"] = question.answerable and question.holds_key_facts(row.get("answer", ""))
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of each engine; shares are of the questions they can be asked of."""
    figures = {}
    for engine in ENGINES:
        mine = [row for row in rows if row["engine"] == engine]
        alone = [row["called"] for row in rows if row["engine"] == f"{engine} alone"]
        refused = {row["question"]: declines(row["answer"]) for row in mine}
        answerable = [row for row in mine if row["answerable"]]
        others = [row for row in mine if not row["answerable"]]
        answered = [row for row in mine if not refused[row["question"]]]
        table = pd.DataFrame(mine)
        figures[engine] = {
            "key fact present": _share(row["correct"] for row in answerable),
            "sentences supported": round(
                sum(row["supported"] for row in answered) / max(1, sum(row["sentences"] for row in answered)), 3
            ),
            "answers with a citation": _share(bool(row["cited"]) for row in answered),
            "answers that cite what was not found": _share(bool(row["invented"]) for row in answered),
            "correct refusals": _share(refused[row["question"]] for row in others),
            "wrong refusals": _share(refused[row["question"]] and not row["correct"] for row in answerable),
            "searched when due": _share(bool(row["searched"]) for row in mine),
            "searched without the policy": _share(alone) if alone else None,
            "right document found": _share(bool(row["found"]) for row in answerable),
            "seconds per question": round(float(table.seconds.median()), 1),
            "tokens read": round(float(table["read"].mean())),
            "tokens written": round(float(table.written.mean())),
            "tokens/s": round(mine[0]["speed"]["tokens_per_second"]) if mine[0]["speed"] else None,
            "prompt tokens/s": round(mine[0]["speed"]["prompt_tokens_per_second"]) if mine[0]["speed"] else None,
        }
    return figures


def _share(values: Any) -> float:
    found = list(values)
    return round(sum(found) / len(found), 3)


def machine() -> str:
    """The processor and its cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else [platform.processor()]
    return f"{names[0] if names else platform.machine()}, {psutil.cpu_count(logical=False)} cores"


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--read", action="store_true")
    options = parser.parse_args()
    if options.fresh:
        MEASURED.unlink(missing_ok=True)
    rows = gather(sample())
    if options.read:
        for row in sorted(rows, key=lambda row: str(row["question"])):
            if "answer" in row:
                mark = "declines" if declines(row["answer"]) else "right" if row["correct"] else "wrong"
                print(f"\n{row['question']}\n  {row['engine']} ({mark}): {' '.join(row['answer'].split())}")
    figures = summary(rows)
    print(pd.DataFrame(figures).to_string())
    if options.save:
        result = {
            "date": date.today().isoformat(),
            "split": "test",
            "questions": ANSWERABLE + OTHERS,
            "answerable": ANSWERABLE,
            "asked alone": ALONE,
            "documents read": DOCUMENTS,
            "machine": machine(),
            "versions": {name: version(name) for name in ("agno", "pymilvus", "milvus-lite", "wordllama", "xllamacpp")},
            "models": {"0.5B": "qwen2.5-coder-0.5b-instruct-q4_k_m", "1.5B": "qwen2.5-coder-1.5b-instruct-q4_k_m"},
            "engines": figures,
        }
        path = ROOT / "data" / "benchmarks" / "engines.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
