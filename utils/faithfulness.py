"""Is each sentence of an answer carried by what was retrieved? A grader of words, vectors and rules; no model, no key.

It compares; it does not understand. A sentence is matched with the source sentence (or two in a row) that shares most
of its words: the same stem, or a near word vector. Then rules look for what such a match hides: another number, unit
or name, a negation, an opposite. `tests/benchmarks/faithfulness.py` measures how often it is right, and prints where
it is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import numpy as np
from agno.eval import AgentAsJudgeEval
from agno.models.base import Model
from numpy.typing import NDArray

from utils.errors import CourseError
from utils.offline.answers import REFUSAL
from utils.offline.text import STOP_WORDS, Vector, Words, markdown_sentences, stem, words_of

SUPPORTED, CONTRADICTED, NOT_FOUND = "supported", "contradicted", "not_found"

# Chosen on the dev split of data/faithfulness.jsonl. "Share" is of a sentence's words, each by its weight.
ENOUGH = 0.55  # share that a source must cover to be about the same thing
GAP = 12.0  # weight of a word that may be missing all the same
FLOOR = 0.3  # cosine between two words that says nothing about their meaning
CONTEXT = 0.7  # what a word counts that stands elsewhere in the same source
TIE = 0.1  # weight of a number among words, whose weights are about 3 to 20
WINDOW_GAIN = 0.08  # two source sentences are taken together if they cover so much more than the better of them
COPIED = 0.7  # share of a sentence's words in the order of the source: a copy, so that a changed word is a change
CHANGED = 6  # words that a change may take the place of, or put there
SYNONYM = 0.6  # cosine between a changed word and the one it replaces from which on they mean the same

_TEXTS = r"(knowledge base|documents?|documentation|context|passages?|sources?|search results?|text)"
_TELLS = r"(answer|contain|mention|provide|specif|state|say|cover|address|include|describe|explain|give|tell|have|hold)"
# Only a sentence about the texts, or about the one who answers: "A backup does not contain the index" is an answer.
_REFUSES = re.compile(
    rf"^(?!(if|when|unless)\b)[^.!?]*\b{_TEXTS}\b[^.!?]{{0,60}}\b(do|does|did|could)(es)?( not|n't) (\w+ ){{0,2}}"
    + _TELLS
    + rf"|\bnot (\w+ )?{_TELLS}\w* (in|by) (\w+ ){{0,3}}{_TEXTS}\b"
    r"|\b(I|we) (\w+ )?((do|did|could)( not|n't)|cannot|can't|(am|was) (unable|not able) to)"
    r" (\w+ ){0,2}(know|find|answer|have|see|tell|determine)"
    r"|(^\W*|\bthere (is|are|was|were) )no (relevant |specific |further )?"
    r"(information|mention|details|answer|documents?)\b"
    r"|\binformation (\w+ ){0,6}(is|was) not (available|found|provided|given)"
    r"|^\W*(the|your) (knowledge base|search) (is empty|(returned|found|holds?|contains?|has) no (\w+ )?"
    r"(documents?|passages?|results?|information)\b)"
    r"|\b(unable|not possible) to (answer|find|determine)|\bI('m| am) sorry\b|" + re.escape(REFUSAL),
    re.IGNORECASE,
)
CRITERIA = (
    "The input holds passages of documents, the output is one sentence of an answer. It passes only if the passages"
    " state everything that the sentence claims. It fails if any number, unit, version, name or negation differs, or if"
    " a part of it is not in the passages, even if that part is true or plausible. Use nothing but the passages."
)
# A citation stands by itself; `tags[0]`, [text](address) and everything in code marks is content.
_CODE_OR_CITATION = re.compile(r"(`[^`\n]*`)|(?:[ ]+|(?<=[.!?])|^)\[[\w., -]+\](?=[\s.,;:!?)]|$)", re.M)
_ROW = re.compile(r"^(?!\s*\|)(.* \| .*)$", re.M)

_TOKEN = re.compile(r"\d[\d,]*(?:\.(?:\d+|x\b))*|[A-Za-z]+(?:'t)?|[,;:.()]")
_UNITS = {
    "second": {"ms": 1e-3, "millisecond": 1e-3, "s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0}
    | {"h": 3600.0, "hour": 3600.0, "day": 86400.0, "week": 604800.0},
    "byte": {"byte": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    "share": {"percent": 0.01, "percentage": 0.01},
}
_UNIT = {name: (kind, factor) for kind, units in _UNITS.items() for name, factor in units.items()}
_WORD_NUMBERS = dict(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        map(float, range(13)),
        strict=True,
    )
) | {"once": 1.0, "single": 1.0, "twice": 2.0, "fifteen": 15.0, "twenty": 20.0, "thirty": 30.0, "forty": 40.0}
_WORD_NUMBERS |= {"fifty": 50.0, "sixty": 60.0, "seventy": 70.0, "eighty": 80.0, "ninety": 90.0, "hundred": 100.0}
_MULTIPLES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9}

# Phrases that a rule reads as one word.
_PHRASES = (
    (re.compile(r"\b(no|not) (fewer|less) than\b|\bat (the )?least\b", re.I), "atleast"),
    (re.compile(r"\b(no|not) more than\b|\bat (the )?most\b|\bup to\b", re.I), "atmost"),
    (re.compile(r"\b(instead|in place) of\b|\brather than\b", re.I), "without"),
    (re.compile(r"\bnot only\b", re.I), ""),
    (re.compile(r"%|\bper cent\b"), " percent"),
)
_NEGATIONS = frozenset(
    ["not", "no", "never", "none", "nothing", "nobody", "cannot", "without", "except", "neither", "nor"]
)
SCOPE = 2  # content words after a negation that it is taken to negate
_OPPOSITES = """
before/after more/less more/fewer atleast/atmost on/off true/false first/last minimum/maximum higher/lower raise/lower
increase/decrease larger/smaller large/small big/small long/short faster/slower fast/slow older/newer old/new
earlier/later open/closed enable/disable enabled/disabled allow/forbid allow/refuse accept/refuse accept/reject
succeed/fail succeeds/fails completed/failed same/different inside/outside start/stop above/below over/under best/worst
many/few required/optional cheap/expensive cheaper/dearer strong/weak descending/ascending positive/negative
permanent/temporary plus/minus add/remove lost/kept right/wrong always/never everything/nothing all/none lower/upper
stateless/stateful synchronous/asynchronous parallel/sequential public/private
"""
_OPPOSITE_OF: dict[str, set[str]] = {}
for _left, _right in (pair.split("/") for pair in _OPPOSITES.split()):
    _OPPOSITE_OF.setdefault(stem(_left), set()).add(stem(_right))
    _OPPOSITE_OF.setdefault(stem(_right), set()).add(stem(_left))


class JudgeError(CourseError):
    """The judge model gave no verdict."""


@dataclass(frozen=True)
class Verdict:
    """What the sources say about one sentence of an answer.

    Attributes:
        sentence: as it stands in the answer, without its citation.
        verdict: "supported", "contradicted" or "not_found".
        score: share of the sentence that the best source covers, 0..1.
        source: name of that source; None if there is none.
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
    """The sentences of a Markdown answer that claim something, without citations.

    Headings, code blocks, questions and fragments of one word claim nothing; a row of a table is one sentence.
    """
    text = _CODE_OR_CITATION.sub(lambda match: match.group(1) or "", answer)
    text = _ROW.sub(r"\n\1\n", text)
    found = (sentence.text.strip() for sentence in markdown_sentences(text))
    return [sentence for sentence in found if len(words_of(sentence).words) > 1 and not sentence.endswith("?")]


@dataclass(frozen=True)
class _Number:
    """A number with what it counts: kind "second", "byte", "share", or "" for anything else.

    Attributes:
        value: in the unit of its kind; a text for a version such as 2.3.5.
        raw: as written.
        loose: it is the word "one", which often counts nothing.
    """

    value: float | str
    kind: str
    raw: float | str
    loose: bool = False

    def same(self, other: _Number) -> bool:
        """Whether both say the same; a number without a unit fits the same number with any."""
        if self.kind and other.kind:
            return self.kind == other.kind and self.value == other.value
        return self.raw == other.raw


@dataclass(frozen=True)
class _Reading:
    """What the rules read in a sentence, or in two.

    Attributes:
        tokens: stems and numbers (with their unit) in order, grammar words included, negations and marks left out.
        numbers: in order.
        negated: stems of words that a negation is about.
        plain: stems of all other words.
    """

    tokens: tuple[str, ...]
    numbers: tuple[_Number, ...]
    negated: frozenset[str]
    plain: frozenset[str]


@lru_cache(maxsize=20_000)
def _read(text: str) -> _Reading:
    for pattern, word in _PHRASES:
        text = pattern.sub(word, text)
    raw = _TOKEN.findall(text)
    tokens: list[str] = []
    numbers: list[_Number] = []
    negated: set[str] = set()
    plain: set[str] = set()
    left = 0  # words that the last negation still reaches
    for i, token in enumerate(raw):
        lower = token.lower()
        following = raw[i + 1].lower() if i + 1 < len(raw) else ""
        before = _number(raw[i - 1].lower(), lower) if i else None
        if before and (before.kind or lower in _MULTIPLES):
            continue  # a unit, or the second word of "two hundred": read with the number
        number = _number(lower, following)
        if number:
            numbers.append(number)
            tokens.append(f"{number.value} {number.kind}".strip())
        elif not token[0].isalpha():
            left = 0
        elif lower in _NEGATIONS or lower.endswith("n't"):
            left = SCOPE
        else:
            tokens.append(stem(lower))
            if lower in ("but", "because", "while", "so", "and"):
                left = 0
            elif lower not in STOP_WORDS or stem(lower) in _OPPOSITE_OF:
                (negated if left else plain).add(stem(lower))
                left = max(0, left - 1)
    return _Reading(tuple(tokens), tuple(numbers), frozenset(negated), frozenset(plain - negated))


def _number(token: str, following: str) -> _Number | None:
    raw: float | str
    if token[0].isdigit():
        digits = token.rstrip(",").replace(",", "")
        raw = digits if digits.count(".") > 1 or digits.endswith("x") else float(digits)
    elif token in _WORD_NUMBERS:
        raw = _WORD_NUMBERS[token]
    else:
        return None
    if isinstance(raw, str):
        return _Number(raw, "", raw)
    raw *= _MULTIPLES.get(following, 1.0)
    kind, factor = _UNIT.get(following) or _UNIT.get(following.removesuffix("s")) or ("", 1.0)
    return _Number(round(raw * factor, 9), kind, raw, loose=raw == 1.0 and token.isalpha())


@dataclass(frozen=True)
class _Source:
    """A source, ready to be compared.

    Attributes:
        sentences: its sentences.
        vectors: unit vectors of all their words and of the headings', shape (words, 256).
        starts: where each sentence's words begin in `vectors`; the last entry is where the headings' do.
        places: numbers of the sentences that hold a stem.
    """

    sentences: tuple[str, ...]
    vectors: Vector
    starts: NDArray[np.intp]
    places: Mapping[str, Sequence[int]]


@lru_cache(maxsize=2_000)
def _prepare(name: str, content: str) -> _Source | None:
    found = [sentence for sentence in markdown_sentences(content) if words_of(sentence.text).words]
    if not found:
        return None
    headings = " ".join(dict.fromkeys([name, *(sentence.heading for sentence in found)]))
    words = [words_of(sentence.text) for sentence in found]
    words.append(words_of(headings) if words_of(headings).words else words_of("document"))
    places: dict[str, list[int]] = {}
    for place, one in enumerate(words):
        for one_stem in one.stems:
            places.setdefault(one_stem, []).append(place)
    starts = np.cumsum([0] + [len(one.words) for one in words[:-1]])
    return _Source(
        tuple(sentence.text for sentence in found), np.concatenate([one.vectors for one in words]), starts, places
    )


@dataclass(frozen=True)
class _Match:
    """The passage that covers most of a sentence.

    Attributes:
        text: one source sentence, or two in a row.
        share: share of the sentence's words that it covers, by weight, in 0..1.
        gap: weight of the word that it lacks most; 0 (it lacks none) to about 20 (a rare one).
        nearest: the one sentence that covers most.
    """

    text: str
    share: float
    gap: float
    nearest: str


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
        claims = sentences_of(answer)
        best: dict[int, tuple[_Match, str]] = {}
        for source in sources:
            name = str(source.get("name") or "")
            for i, match in enumerate(_best_matches(claims, _prepare(name, str(source["content"])))):
                if i not in best or match.share > best[i][0].share:
                    best[i] = match, name
        return [
            Verdict(claim, _verdict(claim, best[i][0]), round(best[i][0].share, 3), best[i][1] or None)
            if i in best
            else Verdict(claim, NOT_FOUND, 0.0, None)
            for i, claim in enumerate(claims)
        ]


def judge(answer: str, sources: Sequence[Mapping[str, Any]], model: Model) -> list[Verdict]:
    """The same by a language model: one call for each sentence, so grade a sample and not every run.

    The judge passes a sentence or not, so the verdicts are "supported" (score 1) and "not_found" (score 0) only.

    Args:
        answer, sources: as for `LocalGrader.grade`.
        model: one that writes JSON by a schema; it grades, so better another than the one that answered.

    Raises:
        JudgeError: the model failed, or what it wrote is not a verdict.
    """
    if is_refusal(answer):
        return []
    passages = "\n\n".join(f"[{source.get('name') or ''}]\n{source['content']}" for source in sources)
    evaluation = AgentAsJudgeEval(criteria=CRITERIA, model=model, telemetry=False, show_spinner=False)
    verdicts = []
    for sentence in sentences_of(answer):
        result = evaluation.run(input=passages, output=sentence)
        if result is None or not result.results:
            raise JudgeError("The judge gave no verdict: its model must answer with JSON by a schema (see the log).")
        passed = result.results[0].passed
        verdicts.append(Verdict(sentence, SUPPORTED if passed else NOT_FOUND, float(passed), None))
    return verdicts


def _verdict(sentence: str, match: _Match) -> str:
    if match.share < ENOUGH:
        return NOT_FOUND
    claim, passage = _read(sentence), _read(match.text)
    if _clashes(claim, passage) or _other_word(claim, _read(match.nearest)):
        return CONTRADICTED
    missing = [number for number in claim.numbers if not any(number.same(other) for other in passage.numbers)]
    if any(not number.loose for number in missing) or match.gap > GAP:
        return NOT_FOUND
    return SUPPORTED


def _best_matches(claims: Sequence[str], source: _Source | None) -> list[_Match]:
    """The best passage of a source for each sentence; empty if there is no source or no sentence."""
    if source is None or not claims:
        return []
    words = [words_of(claim) for claim in claims]
    # All words of the answer against all words of the source at once: the multiplication is what takes time.
    cosines = np.concatenate([one.vectors for one in words]) @ source.vectors.T
    near = np.maximum.reduceat(cosines, source.starts, axis=1)
    near = np.clip((near - FLOOR) / (1 - FLOOR), 0.0, 1.0)
    for i, word in enumerate(word for one in words for word in one.words):
        near[i, source.places.get(stem(word), [])] = 1.0
    near = np.maximum(near, CONTEXT * near.max(axis=1, keepdims=True))[:, :-1]
    ends = np.cumsum([len(one.words) for one in words])
    parts = np.split(near, ends[:-1])
    return [
        _Match(claim, 1.0, 0.0, claim) if claim in source.sentences else _best_match(one, part, source)
        for claim, one, part in zip(claims, words, parts, strict=True)
    ]


def _best_match(claim: Words, near: Vector, source: _Source) -> _Match:
    # A number has a rule of its own, so here it only decides between sentences that are alike in their words.
    weights = np.where([any(c.isalpha() for c in word) for word in claim.words], claim.weights, TIE)
    shares = weights / max(float(weights.sum()), 1e-9)
    pairs = np.maximum(near[:, :-1], near[:, 1:])
    single, pair = shares @ near, shares @ pairs
    best = int(np.argmax(single))
    nearest = source.sentences[best]
    if len(pair) and pair.max() - single[best] >= WINDOW_GAIN:
        best = int(np.argmax(pair))
        text, covered, share = " ".join(source.sentences[best : best + 2]), pairs[:, best], pair[best]
    else:
        text, covered, share = nearest, near[:, best], single[best]
    return _Match(text, float(share), float(((1 - covered) * weights).max()), nearest)


def _clashes(claim: _Reading, passage: _Reading) -> bool:
    """Whether the passage says the same with another number, name, negation or opposite."""
    if _other_number(claim, passage):
        return True
    # Two turns are none: "not slower" and "faster".
    return _other_negation(claim, passage) != _opposite(claim, passage)


def _other_number(claim: _Reading, passage: _Reading) -> bool:
    free = [number for number in passage.numbers if not any(number.same(other) for other in claim.numbers)]
    lost = [number for number in claim.numbers if not any(number.same(other) for other in passage.numbers)]
    return any(not number.loose and number.kind == other.kind for number in lost for other in free)


def _other_negation(claim: _Reading, passage: _Reading) -> bool:
    here, there = claim.negated & passage.plain, passage.negated & claim.plain
    if here and there:
        return True
    # A negation on the other side that is about a word of both may be the same one in other words.
    return bool(here and not passage.negated & claim.plain | passage.negated & claim.negated) or bool(
        there and not claim.negated & passage.plain | claim.negated & passage.negated
    )


def _opposite(claim: _Reading, passage: _Reading) -> bool:
    ours, theirs = claim.negated | claim.plain, passage.negated | passage.plain
    return any((_OPPOSITE_OF[word] & theirs) - ours for word in ours & _OPPOSITE_OF.keys() if word not in theirs)


def _other_word(claim: _Reading, passage: _Reading) -> bool:
    """Whether the claim copies the passage but for a few words that mean something else there, or another number."""
    steps = SequenceMatcher(None, passage.tokens, claim.tokens, autojunk=False).get_opcodes()
    equal = sum(b2 - b1 for step, _, _, b1, b2 in steps if step == "equal")
    if equal < COPIED * len(claim.tokens):
        return False
    for step, a1, a2, b1, b2 in steps:
        if step == "replace" and a2 - a1 <= CHANGED and b2 - b1 <= CHANGED:
            old, new = (
                [t for t in part if t not in STOP_WORDS] for part in (passage.tokens[a1:a2], claim.tokens[b1:b2])
            )
            new = [t for t in new if not _OPPOSITE_OF.get(t, set()) & set(old)]  # these have a rule of their own
            if old and new and not set(new) <= set(old) and _differ(old, new):
                return True
    return False


def _differ(old: Sequence[str], new: Sequence[str]) -> bool:
    if old[0][0].isdigit() and new[0][0].isdigit():
        return True
    a, b = words_of(" ".join(old)), words_of(" ".join(new))
    return bool(a.words and b.words) and float((a.vectors @ b.vectors.T).max()) < SYNONYM
