"""Is each sentence of an answer carried by what was retrieved? A grader of words, vectors and rules; no model, no key.

It compares; it does not understand. A sentence is matched with the source sentence (or two in a row) that shares most
of its words, the same stem or a near vector; then rules look for what such a match hides: another number or unit,
a negation, an opposite. `tests/benchmarks/faithfulness.py` measures how often it is right, and prints where it is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from utils.offline.answers import REFUSAL
from utils.offline.text import Words, coverage, markdown_sentences, words_of

SUPPORTED, CONTRADICTED, NOT_FOUND = "supported", "contradicted", "not_found"
# Weighted share of a sentence's words that a source must cover; chosen on the dev split.
ENOUGH = 0.8

_REFUSES = re.compile(
    r"\b(do(es)? not|don't|doesn't|did not|cannot|can't|could not|is not|are not|isn't|not) (\w+ ){0,3}"
    r"(answer|contain|mention|provide|specif|find|found|have (any )?information|cover|address|include|state|explicitly)"
    r"|\bno (information|mention|details|documents?|relevant|specific|answer)\b"
    r"|\b(unable|not possible) to (answer|find|determine)|\bI('m| am) sorry\b|" + re.escape(REFUSAL),
    re.IGNORECASE,
)
_CITATION = re.compile(r"\s*\[[\w., -]+\](?!\()")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)*")
_NEGATION = re.compile(r"\b(not|never|no|none|nothing|cannot|without|except|neither|nor)\b|n't\b", re.I)


@dataclass(frozen=True)
class Verdict:
    """What the sources say about one sentence of an answer.

    Attributes:
        sentence: as it stands in the answer, without its citation.
        verdict: "supported", "contradicted" or "not_found".
        score: share of the sentence that the best source covers, 0..1.
        source: name of that source; None if nothing comes near.
    """

    sentence: str
    verdict: str
    score: float
    source: str | None


def is_refusal(answer: str) -> bool:
    """Whether the answer declines in its first sentence; further on, "does not contain" may be what is explained."""
    first = re.split(r"(?<=[.!?:])\s+", answer.strip())[0]
    return bool(_REFUSES.search(first))


def sentences_of(answer: str) -> list[str]:
    """The sentences of an answer that claim something: no headings, code blocks, citations, questions, fragments."""
    text = re.sub(r"^(?!\|)(.* \| .*)$", r"\n\1\n", _CITATION.sub("", answer), flags=re.M)
    return [s.text for s in markdown_sentences(text) if len(words_of(s.text).words) >= 2 and not s.text.endswith("?")]


class LocalGrader:
    """Grades answers by words, vectors and rules. Deterministic, and safe to share between threads."""

    def grade(self, answer: str, sources: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """A verdict for each sentence of `answer` that claims something; none for an answer that declines.

        Args:
            answer: Markdown; citations in [square brackets] are not content.
            sources: what was retrieved: mappings with `name` and `content`.
        """
        if is_refusal(answer):
            return []
        units = [(unit, str(source.get("name") or "")) for source in sources for unit in _units(str(source["content"]))]
        return [self._grade(sentence, units) for sentence in sentences_of(answer)]

    def _grade(self, sentence: str, units: Sequence[tuple[str, str]]) -> Verdict:
        claim = words_of(sentence)
        scores = [_covered(claim, words_of(unit)) for unit, _ in units]
        if not scores:
            return Verdict(sentence, NOT_FOUND, 0.0, None)
        best = int(np.argmax(scores))
        unit, name = units[best]
        if scores[best] < ENOUGH:
            verdict = NOT_FOUND
        else:
            same = set(_NUMBER.findall(sentence)) <= set(_NUMBER.findall(unit))
            polarity = len(_NEGATION.findall(sentence)) % 2 == len(_NEGATION.findall(unit)) % 2
            verdict = SUPPORTED if same and polarity else CONTRADICTED
        return Verdict(sentence, verdict, round(float(scores[best]), 3), name or None)


def _covered(claim: Words, unit: Words) -> float:
    weights = claim.weights
    return float(coverage(claim, unit) @ weights / max(float(weights.sum()), 1e-9))


@lru_cache(maxsize=2_000)
def _units(content: str) -> tuple[str, ...]:
    """The sentences of a source, and each two in a row."""
    found = [sentence.text for sentence in markdown_sentences(content)]
    return (*found, *(" ".join(pair) for pair in zip(found, found[1:], strict=False)))
