"""The grader of faithfulness: what it takes for a sentence, which rules it has, and that its measured figures hold."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from utils.bootstrap import ROOT
from utils.faithfulness import CONTRADICTED, NOT_FOUND, SUPPORTED, LocalGrader, is_refusal, sentences_of
from utils.knowledge import load_corpus
from utils.offline.answers import REFUSAL
from utils.offline.engine import EMPTY
from utils.offline.text import Sentence, markdown_sentences

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from faithfulness import LABELS, RESULT, Pair, baseline, load_pairs, measure, shared_words

KINDS = {
    SUPPORTED: {"verbatim", "paraphrase", "merged"},
    CONTRADICTED: {"number", "unit", "version", "entity", "negation", "antonym"},
    NOT_FOUND: {"half", "over-general", "other-topic"},
}
PAIRS = load_pairs()
BODIES = {text.id: text.body for text in load_corpus()}
QUOTES = [(name, sentence) for name, body in BODIES.items() for sentence in markdown_sentences(body)]
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)*")


def verdicts(answer: str, *contents: str) -> list[str]:
    sources = [{"name": f"document-{i}", "content": content} for i, content in enumerate(contents)]
    return [verdict.verdict for verdict in LocalGrader().grade(answer, sources)]


def verdict(sentence: str, source: str) -> str:
    (found,) = verdicts(sentence, source)
    return found


# What is graded


def test_an_answer_is_split_at_sentences_items_and_rows() -> None:
    answer = """# Ports

Milvus listens on 19530, e.g. for gRPC. It answers REST requests too [milvus-standalone-docker].

- Port 9091 serves metrics, approx. 108 of them.
- Port 2379 belongs to etcd [a, b]. Anything else?

| port | role |
|---|---|
| 9000 | MinIO |

```bash
curl localhost:9091/healthz
```
The option `tags[0]` and [the manual](https://milvus.io) stay. [1]
container name | ports on the host
"""
    assert sentences_of(answer) == [
        "Milvus listens on 19530, e.g. for gRPC.",
        "It answers REST requests too.",
        "Port 9091 serves metrics, approx. 108 of them.",
        "Port 2379 belongs to etcd.",
        "port | role",
        "9000 | MinIO",
        "The option `tags[0]` and [the manual](https://milvus.io) stay.",
        "container name | ports on the host",
    ]


@pytest.mark.parametrize("code", ["`topic in [a, b]`", "`run.tools[i].metrics`", "fallback_models=[...]", "`[1, 2]`"])
def test_brackets_in_code_are_no_citation(code: str) -> None:
    assert sentences_of(f"Use the form {code} for lists.") == [f"Use the form {code} for lists."]


def test_an_answer_without_claims_or_sources() -> None:
    assert verdicts("", "Milvus has segments.") == []
    assert verdicts("Shall I go on with the second part?", "Milvus has segments.") == []
    assert verdicts("Milvus has segments.") == [NOT_FOUND]
    assert verdicts("Milvus has segments.", "", "```\ncode\n```") == [NOT_FOUND]


def test_a_verdict_names_the_source_that_carries_the_sentence() -> None:
    sources = [
        {"name": "etcd", "content": "etcd stores the metadata of Milvus."},
        {"name": "ports", "content": "Metrics are served on port 9091."},
    ]
    first, second = LocalGrader().grade("Metrics are served on port 9091. The metadata is in etcd.", sources)
    assert (first.sentence, first.verdict, first.source) == ("Metrics are served on port 9091.", SUPPORTED, "ports")
    assert (second.verdict, second.source) == (SUPPORTED, "etcd")
    assert first.score == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        REFUSAL,
        EMPTY,
        "The knowledge base holds no document about this: upload one, then ask again.",
        "The documents do not say which port is used.",
        "The provided documents do not contain information about prices. Milvus itself is free.",
        "I'm sorry, but I cannot help with that.",
        "I could not find anything about it.",
        "Based on the documents, there is no mention of Redis.",
        "The price is not mentioned in the provided context.",
        "No relevant information was found.",
    ],
)
def test_a_refusal_is_no_claim(answer: str) -> None:
    assert is_refusal(answer)
    assert verdicts(answer, "Milvus is free.") == []


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A backup does not contain the index files.",
        'The tool answers "No documents found".',
        "Milvus 2.3.5 does not know the index.",
        "Agno has no such metric. The documents do not say more.",
    ],
)
def test_an_answer_about_what_something_lacks_is_no_refusal(answer: str) -> None:
    assert not is_refusal(answer)


def test_no_sentence_of_the_corpus_reads_as_a_refusal() -> None:
    assert [sentence.text for _, sentence in QUOTES if is_refusal(sentence.text)] == []


# The rules


@pytest.mark.parametrize(
    ("sentence", "source"),
    [
        ("The index saves 75% of the memory.", "The index saves 75 % of the memory."),
        ("The index saves 75 percent of the memory.", "The index saves 75 % of the memory."),
        ("The queue holds 9000 jobs.", "The queue holds 9,000 jobs."),
        ("The team has two members.", "The team has 2 members."),
        ("The cluster holds 10 million vectors.", "The cluster holds ten million vectors."),
        ("The export runs every 5 seconds.", "The export runs every 5,000 milliseconds."),
        ("The lease ends after one minute.", "The lease ends after 60 seconds."),
        ("The server needs 8 GB of memory.", "The server needs 8,000 MB of memory."),
        ("The batch holds two hundred texts.", "The batch holds 200 texts."),
        ("The server needs no less than 8 GB.", "The server needs at least 8 GB."),
    ],
)
def test_numbers_are_the_same_however_they_are_written(sentence: str, source: str) -> None:
    assert verdict(sentence, source) == SUPPORTED


@pytest.mark.parametrize(
    ("sentence", "source"),
    [
        ("The index saves 57 % of the memory.", "The index saves 75 % of the memory."),
        ("The lease ends after 60 milliseconds.", "The lease ends after 60 seconds."),
        ("The metrics are on port 9090.", "The metrics are on port 9091."),
        ("Hybrid search came with Milvus 2.5.", "Hybrid search came with Milvus 2.4."),
        ("The default was changed on 3 May 2026.", "The default was changed on 3 May 2025."),
        ("Milvus Lite 3.2.1 hangs in this call.", "Milvus Lite 3.2.2 hangs in this call."),
        ("The team has three members.", "The team has two members."),
        ("The proxy does not merge the results.", "The proxy merges the results."),
        ("The proxy merges the results.", "The proxy never merges the results."),
        ("The service runs without a database.", "The service runs with a database."),
        ("The server needs at most 8 GB of memory.", "The server needs at least 8 GB of memory."),
        ("The hook runs before the model.", "The hook runs after the model."),
        ("The switch is on by default.", "The switch is off by default."),
        ("The option `enable_batch` is true by default.", "The option `enable_batch` is false by default."),
        ("The proxy stores the metadata of a collection.", "The coordinator stores the metadata of a collection."),
    ],
)
def test_an_altered_sentence_is_contradicted(sentence: str, source: str) -> None:
    assert verdict(sentence, source) == CONTRADICTED
    assert verdict(source, source) == SUPPORTED


def test_two_turns_are_none() -> None:
    source = "The graph index is faster than the cluster index."
    assert verdict("The graph index is slower than the cluster index.", source) == CONTRADICTED
    assert verdict("The graph index is not slower than the cluster index.", source) == SUPPORTED


def test_a_sentence_may_join_two_neighbours_but_not_add_a_half() -> None:
    source = "The coordinator assigns log channels. It also balances segments over query nodes."
    assert verdict("The coordinator assigns log channels and balances segments over query nodes.", source) == SUPPORTED
    assert verdict("The coordinator assigns log channels and encrypts passwords with bcrypt.", source) == NOT_FOUND


@settings(deadline=None)
@given(st.sampled_from(QUOTES))
def test_a_quoted_sentence_is_supported(quote: tuple[str, Sentence]) -> None:
    name, sentence = quote
    assert set(verdicts(sentence.text, BODIES[name])) <= {SUPPORTED}


@settings(deadline=None)
@given(st.sampled_from([q for q in QUOTES if NUMBER.search(q[1].text)]), st.data())
def test_no_changed_digit_passes(quote: tuple[str, Sentence], data: st.DataObject) -> None:
    name, sentence = quote
    place = data.draw(st.sampled_from([i for i, c in enumerate(sentence.text) if c.isdecimal()]))
    digit = data.draw(st.sampled_from(sorted(set("0123456789") - {sentence.text[place]})))
    changed = sentence.text[:place] + digit + sentence.text[place + 1 :]
    number = next(match[0] for match in NUMBER.finditer(changed) if match.start() <= place < match.end())
    assume(number not in NUMBER.findall(BODIES[name]))  # else the document may say so elsewhere
    found = verdicts(changed, BODIES[name])
    assert not found or set(found) != {SUPPORTED}


@settings(deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_any_text_can_be_graded(answer: str, content: str) -> None:
    graded = LocalGrader().grade(answer, [{"name": "any", "content": content}])
    assert all(one.verdict in LABELS and 0 <= one.score <= 1.001 for one in graded)


# The labelled sentences and the measured figures


def test_the_labelled_sentences_are_sound() -> None:
    assert len({pair.id for pair in PAIRS}) == len(PAIRS) >= 200
    assert len({(pair.source, pair.sentence) for pair in PAIRS}) == len(PAIRS)
    for pair in PAIRS:
        assert pair.kind in KINDS[pair.label] and pair.split in {"dev", "test"}, pair.id
        assert " ".join(pair.source.split()) in " ".join(BODIES[pair.document].split()), pair.id
        plain = " ".join(pair.source.split())
        assert (pair.sentence in plain) == (pair.kind == "verbatim"), pair.id


def test_the_splits_share_no_document_and_are_balanced() -> None:
    documents = {split: {pair.document for pair in load_pairs(split)} for split in ("dev", "test")}
    assert not documents["dev"] & documents["test"]
    for split, least in {"dev": 80, "test": 120}.items():
        labels = Counter(pair.label for pair in load_pairs(split))
        assert labels.total() >= least
        assert min(labels.values()) >= 0.3 * labels.total()


def test_the_stored_figures_are_those_of_the_grader() -> None:
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    fresh = measure("test")
    assert {name: stored[name] for name in fresh} == fresh


def test_the_rules_gain_what_likeness_cannot_tell() -> None:
    graders = json.loads(RESULT.read_text(encoding="utf-8"))["graders"]
    local = graders.pop("local grader")
    for rates in graders.values():
        assert local["supported precision"][0] > rates["supported precision"][2], "above the baseline's interval"
        assert local["false sentences passed"][2] < rates["false sentences passed"][1]


def test_a_baseline_passes_a_negation() -> None:
    grade, threshold = baseline(shared_words)
    source = "The proxy merges the partial results of the query nodes."
    pair = Pair("x", "x", source, source.replace("merges", "never merges"), CONTRADICTED, "negation", "test")
    assert 0 < threshold < 1
    assert grade(pair) == SUPPORTED
