"""How often the local grader of faithfulness is right: `.venv/bin/python tests/benchmarks/faithfulness.py`.

The labelled sentences in data/faithfulness.jsonl were written from the corpus before the rules were tuned, by the same
author: the figures say how the grader does on such sentences, not on whatever a language model may write. Thresholds
were chosen on the dev split; no document is in both splits.

    (no option)     the test split: the grader, two baselines, and every sentence that the grader got wrong
    --split dev     the dev split
    --judge N       also ask the language model that the settings name about N sentences (a call each)
    --save          store the result as data/benchmarks/faithfulness.json

One JSON object a line:

    id, document    unique name; the document of the corpus that `source` is quoted from
    source          the passage, word for word
    sentence        the claim
    label           supported      the passage says so
                    contradicted   it is what the passage says but for a number, unit, version, name, negation or
                                   opposite, so that a reader would be misled
                    not_found      the passage does not say so
    kind            how it was made: verbatim, paraphrase, merged (supported); number, unit, version, entity (another
                    component's or setting's name), negation, antonym (contradicted); half (one half is in the passage),
                    over-general, other-topic (not_found)
    split           dev or test
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import psutil  # noqa: E402

from utils import models  # noqa: E402
from utils.faithfulness import CONTRADICTED, NOT_FOUND, SUPPORTED, JudgeError, LocalGrader, Verdict, judge  # noqa: E402
from utils.knowledge import load_corpus  # noqa: E402
from utils.offline.text import embed, markdown_sentences, stem, words_of  # noqa: E402

PAIRS = ROOT / "data" / "faithfulness.jsonl"
RESULT = ROOT / "data" / "benchmarks" / "faithfulness.json"
LABELS = (SUPPORTED, CONTRADICTED, NOT_FOUND)
RESAMPLES = 2_000


@dataclass(frozen=True)
class Pair:
    """A labelled sentence; see the module's description."""

    id: str
    document: str
    source: str
    sentence: str
    label: str
    kind: str
    split: str

    def sources(self) -> list[dict[str, str]]:
        """The passage as a grader takes it."""
        return [{"name": self.document, "content": self.source}]


Grade = Callable[[Pair], str]


def load_pairs(split: str | None = None) -> list[Pair]:
    """The labelled sentences, or those of one split."""
    rows = [Pair(**json.loads(line)) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if split in (None, row.split)]


def overall(verdicts: Sequence[Verdict]) -> str:
    """One verdict for a text: the worst of its sentences', "not_found" if there is none."""
    found = {verdict.verdict for verdict in verdicts}
    return next((label for label in (CONTRADICTED, NOT_FOUND) if label in found), SUPPORTED if found else NOT_FOUND)


def local(pair: Pair) -> str:
    """The grader that is measured."""
    return overall(LocalGrader().grade(pair.sentence, pair.sources()))


def shared_words(pair: Pair) -> float:
    """Share of the sentence's words that the best source sentence has."""
    claim = [stem(word) for word in words_of(pair.sentence).words]
    known = [words_of(sentence.text).stems for sentence in markdown_sentences(pair.source)]
    return max(sum(word in stems for word in claim) for stems in known) / max(1, len(claim))


def cosine(pair: Pair) -> float:
    """Cosine between the sentence and the best source sentence."""
    vectors = embed([pair.sentence, *(sentence.text for sentence in markdown_sentences(pair.source))])
    return float((vectors[1:] @ vectors[0]).max())


def baseline(score: Callable[[Pair], float]) -> tuple[Grade, float]:
    """A grader that says "supported" from a score on, else "not_found"; its threshold is the best on dev.

    It never says "contradicted": likeness cannot tell.
    """
    pairs = load_pairs("dev")
    scores = np.array([score(pair) for pair in pairs])
    supported = np.array([pair.label == SUPPORTED for pair in pairs])
    best = max(
        sorted(set(scores)), key=lambda t: (supported & (scores >= t)).sum() / (supported.sum() + (scores >= t).sum())
    )
    return lambda pair: SUPPORTED if score(pair) >= best else NOT_FOUND, round(float(best), 3)


def matrix(pairs: Sequence[Pair], said: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often each label (rows) was given each verdict (columns)."""
    given = list(zip((pair.label for pair in pairs), said, strict=True))
    return {label: {verdict: given.count((label, verdict)) for verdict in LABELS} for label in LABELS}


def _rates(right: Any, said: Any) -> dict[str, float]:
    """Precision, recall and F1 of each label, their mean F1, accuracy, and the error that matters most."""
    figures: dict[str, float] = {}
    for i, label in enumerate(LABELS):
        hits = float(((right == i) & (said == i)).sum())
        figures[f"{label} precision"] = hits / max(1, int((said == i).sum()))
        figures[f"{label} recall"] = hits / max(1, int((right == i).sum()))
        figures[f"{label} F1"] = 2 * hits / max(1, int((said == i).sum()) + int((right == i).sum()))
    figures["macro F1"] = float(np.mean([figures[f"{label} F1"] for label in LABELS]))
    figures["accuracy"] = float((right == said).mean())
    figures["false sentences passed"] = float((said[right != 0] == 0).mean()) if (right != 0).any() else 0.0
    return figures


def figures(pairs: Sequence[Pair], said: Sequence[str]) -> dict[str, Any]:
    """Each rate as [value, low, high]: 95 % of a bootstrap over documents, since sentences of one are alike."""
    right = np.array([LABELS.index(pair.label) for pair in pairs])
    given = np.array([LABELS.index(verdict) for verdict in said])
    documents = sorted({pair.document for pair in pairs})
    places = [np.array([i for i, pair in enumerate(pairs) if pair.document == document]) for document in documents]
    random = np.random.default_rng(0)
    samples = [
        _rates(right[rows], given[rows])
        for draw in random.integers(len(documents), size=(RESAMPLES, len(documents)))
        for rows in [np.concatenate([places[i] for i in draw])]
    ]
    return {
        name: [round(float(x), 3) for x in (value, *np.quantile([sample[name] for sample in samples], (0.025, 0.975)))]
        for name, value in _rates(right, given).items()
    }


def by_kind(pairs: Sequence[Pair], said: Sequence[str]) -> dict[str, list[int]]:
    """How many of each kind were graded rightly, and how many there are."""
    rows = pd.DataFrame(
        {"kind": [pair.kind for pair in pairs], "right": [p.label == s for p, s in zip(pairs, said, strict=True)]}
    )
    return {str(kind): [int(part.right.sum()), len(part)] for kind, part in rows.groupby("kind")}


def whole_document(pairs: Sequence[Pair]) -> list[str]:
    """What the grader says when the passage is not cut out: it reads the whole document and four others."""
    bodies = {text.id: text.body for text in load_corpus()}
    names = list(bodies)
    said = []
    for pair in pairs:
        first = names.index(pair.document)
        read = [names[(first + i) % len(names)] for i in range(5)]
        sources = [{"name": name, "content": bodies[name]} for name in read]
        said.append(overall(LocalGrader().grade(pair.sentence, sources)))
    return said


def milliseconds(pairs: Sequence[Pair]) -> float:
    """Median time to grade an answer of eight sentences against five documents that were read before."""
    sources = [{"name": text.id, "content": text.body} for text in load_corpus()[:5]]
    grader = LocalGrader()
    grader.grade("The first call reads the documents.", sources)
    answers = [" ".join(pair.sentence for pair in pairs[i : i + 8]) for i in range(0, len(pairs) - 8, 8)]
    times = []
    for answer in answers:
        started = time.perf_counter()
        grader.grade(answer, sources)
        times.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(times), 1)


def ask_judge(pairs: Sequence[Pair], count: int) -> dict[str, Any]:
    """What the language model of the settings says of `count` sentences, half of them true.

    The sample goes by the digest of the ids, so it is the same everywhere.
    """
    mixed = sorted(pairs, key=lambda pair: hashlib.sha256(pair.id.encode()).hexdigest())
    sample = [pair for pair in mixed if pair.label == SUPPORTED][: count // 2]
    sample += [pair for pair in mixed if pair.label != SUPPORTED][: count - count // 2]
    model = models.chat_model()
    passed: list[bool | None] = []
    for pair in sample:
        try:
            passed.append(overall(judge(pair.sentence, pair.sources(), model)) == SUPPORTED)
        except JudgeError:
            passed.append(None)
    models.stop_offline()
    true = [verdict for pair, verdict in zip(sample, passed, strict=True) if pair.label == SUPPORTED]
    false = [verdict for pair, verdict in zip(sample, passed, strict=True) if pair.label != SUPPORTED]
    mine = [(local(pair) == SUPPORTED) == (pair.label == SUPPORTED) for pair in sample]
    return {
        "date": date.today().isoformat(),
        "model": str(model.id),
        "true sentences": len(true),
        "of them passed": sum(verdict is True for verdict in true),
        "false sentences": len(false),
        "of them failed": sum(verdict is False for verdict in false),
        "without a verdict": sum(verdict is None for verdict in passed),
        "local grader right": sum(mine),
    }


def machine() -> str:
    """The processor and its cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else [platform.processor()]
    return f"{names[0] if names else platform.machine()}, {psutil.cpu_count(logical=False)} cores"


def measure(split: str) -> dict[str, Any]:
    """Everything that is the same on every machine."""
    pairs = load_pairs(split)
    said = [local(pair) for pair in pairs]
    compared = {"local grader": figures(pairs, said)}
    thresholds = {}
    for name, score in {"shared words": shared_words, "cosine": cosine}.items():
        grade, thresholds[name] = baseline(score)
        compared[name] = figures(pairs, [grade(pair) for pair in pairs])
    reading = whole_document(pairs)
    # A sentence that its passage does not carry may stand elsewhere in five documents, so those are left out.
    kept = [i for i, pair in enumerate(pairs) if pair.label != NOT_FOUND]
    return {
        "split": split,
        "sentences": len(pairs),
        "labels": {label: sum(pair.label == label for pair in pairs) for label in LABELS},
        "graders": compared,
        "thresholds of the baselines": thresholds,
        "confusion": matrix(pairs, said),
        "by kind": by_kind(pairs, said),
        "in five whole documents": {
            label: [
                sum(reading[i] == label for i in kept if pairs[i].label == label),
                sum(pairs[i].label == label for i in kept),
            ]
            for label in (SUPPORTED, CONTRADICTED)
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables, then every sentence that was graded wrongly."""
    table = {
        grader: {name: f"{value:.2f} ({low:.2f}-{high:.2f})" for name, (value, low, high) in rates.items()}
        for grader, rates in result["graders"].items()
    }
    print(f"{result['split']} split, {result['sentences']} sentences; in brackets 95 % of a bootstrap over documents\n")
    print(pd.DataFrame(table).to_string(), "\n")
    print("labels (rows) and verdicts (columns) of the local grader")
    print(pd.DataFrame(result["confusion"]).T.to_string(), "\n")
    print("right, by kind:", ", ".join(f"{kind} {hits}/{count}" for kind, (hits, count) in result["by kind"].items()))
    print("right in five whole documents:", result["in five whole documents"], "\n")
    for pair in load_pairs(result["split"]):
        if (said := local(pair)) != pair.label:
            print(f"{pair.id} ({pair.kind}): said {said}, right is {pair.label}")
            print(f"    {pair.sentence}\n    source: {' '.join(pair.source.split())}")


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--judge", type=int, default=0, metavar="N")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    result = measure(options.split)
    show(result)
    pairs = load_pairs(options.split)
    result["ms per answer"] = milliseconds(pairs)
    print(f"\n{result['ms per answer']} ms for an answer of eight sentences with five documents")
    if options.judge:
        result["judge"] = ask_judge(pairs, options.judge)
        print("judge:", result["judge"])
    if options.save:
        stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        if "judge" in stored:  # takes minutes, so it is kept until it is asked again
            result.setdefault("judge", stored["judge"])
        about = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": {name: version(name) for name in ("agno", "wordllama", "numpy")},
        }
        RESULT.write_text(json.dumps(about | result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
