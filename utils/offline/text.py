"""Words, sentences and vectors: what the offline engine knows about language.

The vectors are WordLlama's (256 dimensions, one static vector per token of the Llama 2 vocabulary, shipped in its
wheel). A text's vector is the mean of its token vectors. Frequent, empty tokens have short vectors and rare, telling
ones long ones, so a vector's length also serves as the weight of a word.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import snowballstemmer
from markdown_it import MarkdownIt
from numpy.typing import NDArray

from utils.offline import DIMENSIONS

# WordLlama's import configures the root logger; it is put back as it was.
_root, _level, _handlers = logging.getLogger(), logging.getLogger().level, logging.getLogger().handlers[:]
import wordllama  # noqa: E402
from wordllama.inference import WordLlamaInference  # noqa: E402

_root.setLevel(_level)
_root.handlers[:] = _handlers

Vector = NDArray[np.float32]

# The grammar of a question, not its subject. Everything else is weighed by its vector.
_GRAMMAR = """
a about after all also am an and any anybody anyone anything are as at be because been before being between both but by
can could did do does doing done for from get gets getting give given go goes going had happen happens has have having
he her here him his how i if in into is it its just kind let like made make makes making many may me might mine more
most much must my need needs of off on one only or other our out over own please really say says shall she should so
some somebody someone something still such take takes tell than that the their them then there these they thing things
this those through to too up us use used using very want wants was way we well were what when where whether which while
who whom whose why will with without would you your
"""
STOP_WORDS = frozenset(_GRAMMAR.split())

_WORD = re.compile(r"[A-Za-z0-9]+(?:[._@/-][A-Za-z0-9]+)*")
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+(?:\.[0-9]+)*")
# A full stop ends a sentence unless it follows a common abbreviation; the next sentence starts with a capital, a digit
# or a mark.
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!approx)[.!?][\"')\]`*]*\s+(?=[A-Z0-9`\"'(*\[<])")
_stemmer = snowballstemmer.stemmer("english")
_stemming = threading.Lock()  # the stemmer keeps the word that it works on in itself
_markdown = MarkdownIt("commonmark").enable("table")


@cache
def _model() -> WordLlamaInference:
    # The tokenizer file lies in the package itself: WordLlama finds it there when the package folder is its cache
    # folder.
    return wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)


def embed(texts: list[str], dimensions: int = DIMENSIONS) -> Vector:
    """Unit vectors of `texts`, shape (len(texts), dimensions).

    WordLlama is trained so that a prefix of its vectors is a usable vector too (Matryoshka), so fewer dimensions than
    256 are cut off and scaled to length 1 again. A text without any token gets a zero vector.
    """
    if not texts:
        return np.zeros((0, dimensions), dtype=np.float32)
    vectors = _model().embed(texts, norm=False)[:, :dimensions]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12) * (lengths > 1e-12), dtype=np.float32)


def token_ids(text: str) -> list[int]:
    """Token ids of `text` in the Llama 2 vocabulary (used to count tokens and to cut at max_tokens)."""
    return list(_model().tokenizer.encode(text, add_special_tokens=False).ids)


def first_tokens(text: str, count: int) -> str:
    """The longest beginning of `text` that has at most `count` tokens, cut where a token ends."""
    ends = [end for _, end in _model().tokenizer.encode(text, add_special_tokens=False).offsets]
    if len(ends) <= count:
        return text
    # A rare character is several tokens that all end behind it, so the beginning may have more tokens than counted.
    beginnings = (text[:end] for end in reversed(ends[:count]))
    return next((part for part in beginnings if len(token_ids(part)) <= count), "")


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """Lower-case Snowball stem."""
    with _stemming:
        return str(_stemmer.stemWord(word.lower()))


@dataclass(frozen=True)
class Words:
    """The distinct content words of a text.

    Attributes:
        words: as written, in order of first appearance.
        stems: their stems; a compound such as `load_collection` or `text-embedding` also brings the stems of its parts.
        vectors: unit vectors, shape (len(words), 256).
        weights: how telling each word is, shape (len(words),).
    """

    words: tuple[str, ...]
    stems: frozenset[str]
    vectors: Vector
    weights: Vector


@lru_cache(maxsize=20_000)
def words_of(text: str) -> Words:
    """Analyse a text into its content words (stop words left out, first spelling kept)."""
    distinct: dict[str, str] = {}
    stems: set[str] = set()
    for word in _WORD.findall(text.replace("_", " ")):
        if word.lower() in STOP_WORDS:
            continue
        distinct.setdefault(stem(word), word)
        stems.add(stem(word))
        stems.update(stem(part) for part in _PARTS.findall(word))
    words = tuple(distinct.values())
    if not words:
        return Words((), frozenset(), np.zeros((0, DIMENSIONS), np.float32), np.zeros(0, np.float32))
    raw = _model().embed([word.lower() for word in words], norm=False)
    lengths = np.linalg.norm(raw, axis=1)
    # A rare word is cut into several tokens, so the sum of its tokens says how rare it is, not their mean.
    counts = np.array([len(token_ids(word.lower())) for word in words])
    return Words(
        words,
        frozenset(stems),
        np.asarray(raw / np.maximum(lengths, 1e-12)[:, None], np.float32),
        np.asarray(lengths * np.sqrt(counts), np.float32),
    )


def coverage(question: Words, text: Words) -> Vector:
    """How well `text` covers each word of `question`: 1 for the same stem, else the best cosine between words, in 0..1.

    Shape (len(question.words),). This is late interaction (ColBERT's MaxSim) with static word vectors.
    """
    if not question.words:
        return np.zeros(0, np.float32)
    if not text.words:
        return np.zeros(len(question.words), np.float32)
    best = np.clip((question.vectors @ text.vectors.T).max(axis=1), 0, 1)
    same = np.array([stem(word) in text.stems for word in question.words])
    return np.asarray(np.where(same, 1.0, best), np.float32)


def weighted_coverage(question: Words, text: Words) -> float:
    """Mean `coverage`, weighted by how telling each word of the question is; 0 for a question without content words."""
    total = float(question.weights.sum())
    return float(coverage(question, text) @ question.weights) / total if total else 0.0


def split_sentences(paragraph: str) -> list[str]:
    """Sentences of plain running text."""
    text = " ".join(paragraph.split())
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
    return [
        part for start, end in zip(starts, [*starts[1:], len(text)], strict=True) if (part := text[start:end].strip())
    ]


@dataclass(frozen=True)
class Sentence:
    """One sentence of a document.

    Attributes:
        text: the sentence.
        heading: the heading it stands under.
        block: number of the paragraph, list item or table row that it belongs to.
        code: the code block that follows it, if it ends in a colon.
    """

    text: str
    heading: str
    block: int
    code: str = ""


@lru_cache(maxsize=5_000)
def markdown_sentences(document: str) -> tuple[Sentence, ...]:
    """Sentences of a Markdown text: paragraphs and list items are split, a table row is one, headings are context."""
    sentences: list[Sentence] = []
    heading = ""
    row: list[str] = []
    in_heading = in_row = False
    for block, token in enumerate(_markdown.parse(document)):
        match token.type:
            case "heading_open":
                in_heading = True
            case "heading_close":
                in_heading = False
            case "tr_open":
                in_row, row = True, []
            case "tr_close":
                in_row = False
                sentences.append(Sentence(" | ".join(row), heading, block))
            case "inline" if in_heading:
                heading = token.content
            case "inline" if in_row:
                row.append(token.content)
            case "inline":
                sentences.extend(Sentence(text, heading, block) for text in split_sentences(token.content))
            case "fence" | "code_block" if sentences and sentences[-1].text.endswith(":"):
                sentences[-1] = replace(sentences[-1], code=f"```{token.info.strip()}\n{token.content.rstrip()}\n```")
            case _:
                pass
    return tuple(sentences)
