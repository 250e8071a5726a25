"""Extractive answers: the best sentences of the passages at hand, or a refusal.

Nothing here writes prose. A sentence is ranked by meaning and by words (`SIGNALS`) and cited by its document. Whether
the passages answer at all is decided by a logistic model (`FEATURES`), fitted on the dev split of data/questions.jsonl
by `python tests/benchmarks/answers.py --fit`, which writes answerable.json.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from utils.offline.text import Sentence, Vector, coverage, embed, markdown_sentences, stem, words_of

REFUSAL = "The knowledge base does not answer this question."
MAX_SENTENCES = 8
MAX_WORDS = 170
_CITATION = re.compile(r"\s*\[([a-z0-9][\w.-]*)\](?=[\s.]*$)")
_ANNOUNCES = re.compile(r"(This|The following) (page|document|section|chapter|guide)\b|In this (page|section)\b")
# A name inside a sentence, an identifier, or something with a digit.
_NAME = re.compile(r"(?<!^)(?<![.?!:] )\b([A-Z][\w.-]*|[a-z]+_\w+|\w*\d[\w.]*)")
_MODEL_FILE = Path(__file__).with_name("answerable.json")


@dataclass(frozen=True)
class Passage:
    """A piece of text with the id of the document it comes from ("" when it has none)."""

    text: str
    source: str = ""


@dataclass(frozen=True)
class Quote:
    """A sentence picked from a passage (with the code block that it announces)."""

    text: str
    source: str
    score: float


@dataclass(frozen=True)
class Answer:
    """What the engine found: quotes, best first, and the probability (0..1) that they answer the question."""

    quotes: tuple[Quote, ...]
    confidence: float

    @property
    def answered(self) -> bool:
        """Whether the passages were judged to answer the question."""
        return bool(self.quotes) and self.confidence >= 0.5

    @property
    def text(self) -> str:
        """The quotes, a paragraph for each document with its citation, or the refusal."""
        if not self.answered:
            return REFUSAL
        paragraphs: dict[str, list[str]] = {}
        for quote in self.quotes:
            paragraphs.setdefault(quote.source, []).append(quote.text)
        return "\n\n".join(
            _paragraph(texts) + (f" [{source}]" if source else "") for source, texts in paragraphs.items()
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Ids of the quoted documents, best first, without repetition; empty for a refusal."""
        return tuple(dict.fromkeys(quote.source for quote in self.quotes if quote.source and self.answered))


def _paragraph(texts: list[str]) -> str:
    """Sentences as running text; table rows and sentences with a code block on lines of their own, after the rest."""
    apart = [text for text in texts if " | " in text or "```" in text]
    return "\n".join(filter(None, (" ".join(text for text in texts if text not in apart), *apart)))


def parse_passages(text: str, source: str = "") -> list[Passage]:
    """Passages in a tool's result: Agno's list of documents as JSON or YAML, or any other text as one passage.

    A document's source is `meta_data["id"]`, else its `name`. A citation that ends a sentence of plain text, such as
    `[milvus-lite]` in a team member's answer, is that sentence's source.
    """
    documents = _documents(text)
    if not documents:
        return [
            Passage(_CITATION.sub("", part).strip(), match.group(1) if (match := _CITATION.search(part)) else source)
            for part in re.split(r"\n\s*\n", text)
            if part.strip()
        ]
    return [
        Passage(document["content"], str(_meta_data(document).get("id") or document.get("name") or source))
        for document in documents
        if document["content"].strip()
    ]


def _meta_data(document: dict[str, Any]) -> dict[str, Any]:
    found = document.get("meta_data")
    return found if isinstance(found, dict) else {}


def _documents(text: str) -> list[dict[str, Any]]:
    parsed: object = None
    if text.lstrip().startswith(("[", "{")):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            return []
    elif text.lstrip().startswith("- ") and "content:" in text:
        try:
            parsed = yaml.load(text, yaml.BaseLoader)  # every value stays text: there is nothing to convert wrongly
        except (yaml.YAMLError, RecursionError):
            return []
    items = parsed if isinstance(parsed, list) else [parsed]
    return [item for item in items if isinstance(item, dict) and isinstance(item.get("content"), str)]


# How much each signal counts for the rank of a sentence; chosen on the dev split.
SIGNALS = {
    "words": 0.5,  # coverage of the question's words by the sentence
    "words with heading": 1.0,  # the same, the section's heading included
    "vector": 0.5,  # cosine between question and sentence
    "passage words": 0.5,  # coverage by the whole passage
    "rank": 0.1,  # the passage's place in the search result: 1 / (1 + place / 2)
    "number": 0.2,  # the question asks for a number and the sentence has one
    "name": 0.2,  # the question asks for a setting, call or option and the sentence has a name in code marks
}
# A sentence gains this part of what the better of its neighbours in the paragraph is ahead: an answer often follows its
# topic.
NEIGHBOUR = 0.4
# Sentences below this part of the best score are left out, and those that share this part of their words with a better
# one.
KEEP, SAME = 0.7, 0.7
_ASKS_NUMBER = re.compile(
    r"\bhow (many|much|long|big|large|often|fast|far|high|soon|old)\b"
    r"|\b(which|what) (\w+ ){0,3}(ports?|size|number|share|percentage|limit"
    r"|maximum|version|release|date|day|amount|factor|threshold|dimensions?)\b"
    r"|\bwhen (was|were|did)\b",
    re.I,
)
_ASKS_NAME = re.compile(
    r"\b(which|what)\b[^?]{0,60}\b(option|parameter|argument|setting|calls?|method|function|command|flag|variable|field|class|property|route"
    r"|endpoint|header|events?|status|level|mode|type|claim|scope|tool|key|module|package|file|switch|value|name|metric|error|exception)\b"
    r"|\bhow (do|can|should|must) (i|we|you)\b|\bwhat (turns|makes|tells|must|should|do)\b",
    re.I,
)


def find_answer(
    question: str, passages: Sequence[Passage], max_sentences: int = MAX_SENTENCES, max_words: int = MAX_WORDS
) -> Answer:
    """Pick the sentences that answer `question`, best first: at most `max_sentences`, about `max_words` words."""
    search = _Search(question, passages)
    if search.empty:
        return Answer((), 0.0)
    quotes = [
        Quote(
            "\n".join(filter(None, (search.candidates[i].text, search.candidates[i].code))),
            passages[search.places[i]].source,
            round(float(search.scores[i]), 4),
        )
        for i in search.choose(max_sentences, max_words)
    ]
    return Answer(tuple(quotes), search.confidence())


def relevance(question: str, texts: Sequence[str]) -> list[float]:
    """How well each text answers the question, about 0..1; for reranking what a search found."""
    search = _Search(question, [Passage(text) for text in texts], distinct=False)
    if search.empty:
        return [0.0] * len(texts)
    return [round(float(score), 6) for score in search.passage_scores()]


class _Search:
    """One question against the sentences of some passages.

    Attributes:
        asked: the question's words.
        candidates: the sentences, each once if `distinct`; `places[i]` is the number of the passage of candidate i.
        scores: one per candidate, shape (len(candidates),).
    """

    def __init__(self, question: str, passages: Sequence[Passage], distinct: bool = True) -> None:
        self.question, self.passages, self.asked = question, passages, words_of(question)
        self.candidates: list[Sentence] = []
        self.places: list[int] = []
        seen: set[str] = set()
        for place, passage in enumerate(passages):
            for sentence in markdown_sentences(passage.text):
                # Overlapping chunks repeat sentences, and some sentences only announce others.
                if (
                    len(sentence.text.split()) < 3
                    or _ANNOUNCES.match(sentence.text)
                    or (distinct and sentence.text in seen)
                ):
                    continue
                seen.add(sentence.text)
                self.candidates.append(sentence)
                self.places.append(place)
        if not self.empty:
            self._vector = embed([question])[0]
            self._passage_words = [words_of(passage.text) for passage in passages]
            self._covered = np.array([coverage(self.asked, words) for words in self._passage_words])
            self.scores = self._with_neighbours(self._score())

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compare: no sentence, or no content word in the question."""
        return not self.candidates or not self.asked.words

    def _score(self) -> NDArray[np.float32]:
        # A word that every passage has (the topic of all of them) tells little; this is BM25's inverse document
        # frequency.
        found = np.array([sum(stem(word) in words.stems for words in self._passage_words) for word in self.asked.words])
        telling = self.asked.weights * np.sqrt(np.log(1 + len(self.passages) / (found + 0.5)))
        telling = telling / telling.sum()
        self._passage_scores = self._covered @ telling
        places = np.array(self.places)
        texts = [sentence.text for sentence in self.candidates]
        headed = [f"{sentence.heading} {sentence.text}" for sentence in self.candidates]
        number, name = bool(_ASKS_NUMBER.search(self.question)), bool(_ASKS_NAME.search(self.question))
        signals = {
            "words": np.array([coverage(self.asked, words_of(text)) for text in texts]) @ telling,
            "words with heading": np.array([coverage(self.asked, words_of(text)) for text in headed]) @ telling,
            "vector": embed(texts) @ self._vector,
            "passage words": self._passage_scores[places],
            "rank": 1 / (1 + places / 2),
            "number": np.array([number and any(c.isdigit() for c in text) for text in texts]),
            "name": np.array([name and "`" in text for text in texts]),
        }
        total = sum((SIGNALS[key] * signals[key] for key in SIGNALS), np.zeros(len(texts)))
        return np.asarray(total / sum(SIGNALS.values()), np.float32)

    def _with_neighbours(self, own: NDArray[np.float32]) -> NDArray[np.float32]:
        scores = own.copy()
        for i in range(len(own)):
            near = [j for j in (i - 1, i + 1) if 0 <= j < len(own) and self._same_block(i, j)]
            scores[i] += NEIGHBOUR * max(0.0, *(own[j] - own[i] for j in near)) if near else 0.0
        return scores

    def _same_block(self, i: int, j: int) -> bool:
        return self.places[i] == self.places[j] and self.candidates[i].block == self.candidates[j].block

    def passage_scores(self) -> NDArray[np.float32]:
        """How well a passage answers: coverage of the question's words plus best sentence; shape (len(passages),)."""
        best = np.zeros(len(self.passages), np.float32)
        np.maximum.at(best, self.places, self.scores)
        return np.asarray((self._passage_scores + best) / 2, np.float32)

    def choose(self, max_sentences: int, max_words: int) -> list[int]:
        """Indices of the chosen sentences, best first."""
        chosen: list[int] = []
        others: list[frozenset[str]] = []
        words = 0
        for i in np.argsort(-self.scores, kind="stable"):
            length = len(self.candidates[i].text.split())
            if chosen and (len(chosen) == max_sentences or self.scores[i] < KEEP * self.scores[chosen[0]]):
                break
            if chosen and words + length > max_words:
                continue
            stems = words_of(self.candidates[i].text).stems
            if all(len(stems & other) < SAME * max(1, min(len(stems), len(other))) for other in others):
                chosen.append(int(i))
                others.append(stems)
                words += length
        return chosen

    def features(self) -> list[float]:
        """The signals that say whether the passages answer at all, in the order of `FEATURES`."""
        weights = self.asked.weights / self.asked.weights.sum()
        best = np.argsort(-self.passage_scores(), kind="stable")
        exact = self._covered == 1.0
        near = frozenset[str]().union(*(self._passage_words[i].stems for i in best[:3]))
        missing = sum(not words_of(name).stems <= near for name in _NAME.findall(self.question))
        return [
            float(exact[best[:2]].any(axis=0) @ weights),
            float(exact.any(axis=0) @ weights),
            float((weights * ~exact[best[0]]).max()),
            float(min(missing, 2)),
        ]

    def confidence(self) -> float:
        """Probability that the passages answer the question."""
        weights, intercept = _answerable()
        return 1 / (1 + math.exp(-float(weights @ self.features()) - intercept))


# Share of the question's word weight that stands in the two best passages, and in any passage; weight share of the
# heaviest word that the best passage lacks; number (0..2) of proper names, identifiers and numbers that the three best
# passages lack.
FEATURES = ("words in the best two", "words in any", "heaviest word missing", "names missing")


def answerability_features(question: str, passages: Sequence[Passage]) -> list[float]:
    """Values of `FEATURES` for fitting answerable.json."""
    return _Search(question, passages).features()


@cache
def _answerable() -> tuple[Vector, float]:
    fitted = json.loads(_MODEL_FILE.read_text(encoding="utf-8"))
    return np.array([fitted["weights"][name] for name in FEATURES], np.float32), float(fitted["intercept"])
