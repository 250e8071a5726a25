"""The corpus, its questions and the chunker: complete, consistent with each other, and free of machine traces."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from agno.knowledge.document.base import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.bootstrap import ROOT
from utils.knowledge import CORPUS, QUESTIONS, CorpusError, Question, SectionChunking, Text, load_corpus, load_questions
from utils.offline.answers import FEATURES

TEXTS = load_corpus()
LABELLED = load_questions()
BY_ID = {text.id: text for text in TEXTS}
DIFFICULTIES = {"words", "paraphrase", "two_documents", "unanswerable"}


def chunks_of(text: Text) -> list[Document]:
    return SectionChunking().chunk(Document(content=text.body, name=text.id, meta_data=text.metadata()))


def reassembled(title: str, chunks: list[Document]) -> list[str]:
    """The words of a document, put together from its chunks."""
    words = title.split()
    for chunk in chunks:
        head, _, body = chunk.content.partition("\n")
        assert head.startswith(f"# {title}"), "every chunk says which document it comes from"
        words += head.removeprefix(f"# {title}").removeprefix(":").split() + body.split()
    return words


def words_of(markdown: str) -> list[str]:
    """The words of a Markdown text without the marks of its first heading and of its sections."""
    first, *lines = markdown.split("\n")
    headings = [line.lstrip("# ") if line.startswith("## ") else line for line in lines]
    return " ".join([first.lstrip("# "), *headings]).split()


def test_there_are_enough_documents_and_each_is_its_own() -> None:
    assert len(TEXTS) >= 36
    assert {path.stem for path in CORPUS.iterdir()} == set(BY_ID), (
        "the file name is the id, and nothing else lies there"
    )
    for values in ([t.id for t in TEXTS], [t.title for t in TEXTS], [t.body for t in TEXTS]):
        assert [value for value, count in Counter(values).items() if count > 1] == []


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.id)
def test_document(text: Text) -> None:
    content = (CORPUS / f"{text.id}.md").read_text(encoding="utf-8")
    header = yaml.safe_load(content.split("---\n")[1])
    assert list(header) == ["id", "title", "topic", "source"]
    assert all(isinstance(value, str) and value.strip() == value != "" for value in header.values())
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text.id)
    assert text.topic in {"milvus", "agno", "agentos", "operations"}
    assert text.body.split("\n")[0] == f"# {text.title}"
    assert 300 <= len(text.body.split()) <= 900
    assert content.endswith("\n") and "\t" not in content
    assert content.isascii(), "quotes, dashes and spaces are ASCII, as a reader types them"
    assert re.findall(r"(?:/home/|/Users/|/root/|/tmp/|/work/|/private/|/var/folders/|\b[A-Za-z]:\\)\S*", content) == []
    prose = re.sub(r"^```.*?^```$", "", text.body, flags=re.M | re.S)
    assert len(re.findall(r"^# ", prose, re.M)) == 1 and len(re.findall(r"^## ", prose, re.M)) >= 2
    assert not re.search(r"^#+ ?$|TODO|FIXME|lorem ipsum", prose, re.M | re.I)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.id)
def test_every_code_fence_is_closed(text: Text) -> None:
    for part in [text.body, *(chunk.content for chunk in chunks_of(text))]:
        fences = re.findall(r"^ *```(.*)$", part, re.M)
        assert len(fences) % 2 == 0 == part.count("```") % 2
        assert not any(fences[1::2]), "a closing fence stands alone; a language there means that one was not closed"


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.id)
def test_chunks_hold_the_whole_document_and_fit_into_milvus(text: Text) -> None:
    chunks = chunks_of(text)
    assert reassembled(text.title, chunks) == words_of(text.body)
    assert len({chunk.id for chunk in chunks}) == len(chunks) >= 2
    for chunk in chunks:
        assert chunk.name == text.id and chunk.meta_data["chunk_size"] == len(chunk.content) <= 16384
        assert {**text.metadata(), **chunk.meta_data} == chunk.meta_data


TITLE = st.text(min_size=1).map(lambda text: " ".join(text.split()).lstrip("# ")).filter(bool)
LINE = st.text(st.characters(exclude_characters="\n"), max_size=20)
LINES = st.lists(st.one_of(LINE, st.just(""), LINE.map("## {}".format), st.just("# code"), st.just("### deeper")))


@settings(deadline=None)
@given(TITLE, LINES)
def test_chunks_hold_every_word_of_any_document(title: str, lines: list[str]) -> None:
    document = Document(content="\n".join([f"# {title}", *lines]), name="any", meta_data={"kept": True})
    chunks = SectionChunking().chunk(document)
    assert chunks, "a document with a title has something to index"
    assert reassembled(title, chunks) == words_of(document.content)
    assert len({chunk.meta_data["chunk"] for chunk in chunks}) == len(chunks)
    assert all(chunk.meta_data["kept"] and chunk.name == "any" for chunk in chunks)
    assert document.meta_data == {"kept": True}


def test_a_chunk_is_headed_by_title_and_section() -> None:
    content = "# Bread\n\nFlour and water.\n\n## Rye\n\nNeeds a starter.\n\n### How old\n\nTwo days.\n## Empty\n"
    chunks = SectionChunking().chunk(Document(content=content, name="bread"))
    assert [chunk.content for chunk in chunks] == [
        "# Bread\n\nFlour and water.",
        "# Bread: Rye\n\nNeeds a starter.\n\n### How old\n\nTwo days.",
        "# Bread: Empty",
    ]
    assert [chunk.content for chunk in SectionChunking().chunk(Document(content="One line."))] == ["# One line."]
    assert SectionChunking().chunk(Document(content=" \n\n")) == []


def test_there_are_enough_questions_in_both_splits() -> None:
    splits = Counter(question.split for question in LABELLED)
    assert len(LABELLED) >= 140 and set(splits) == {"dev", "test"} and min(splits.values()) >= 60
    assert sum(not question.answerable for question in LABELLED) >= 25
    for split in ("dev", "test"):
        assert load_questions(split) == [question for question in LABELLED if question.split == split]
        assert {question.difficulty for question in load_questions(split)} == DIFFICULTIES, "each split has every kind"


def test_questions_are_unique() -> None:
    asked = (re.sub(r"\W+", " ", question.question).strip().casefold() for question in LABELLED)
    for values in ((question.id for question in LABELLED), asked):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_lines_hold_exactly_the_documented_fields() -> None:
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(LABELLED) and QUESTIONS.read_bytes().isascii()
    assert {tuple(row) for row in rows} == {("id", "question", "documents", "key_facts", "difficulty", "split")}


@pytest.mark.parametrize("question", LABELLED, ids=lambda question: question.id)
def test_question(question: Question) -> None:
    assert question.difficulty in DIFFICULTIES and len(question.question.split()) >= 3
    assert question.question.strip() == question.question and question.question.endswith("?")
    assert set(question.documents) <= set(BY_ID) and len(set(question.documents)) == len(question.documents)
    assert all(spelling.strip() for fact in question.key_facts for spelling in fact.split("|"))
    bodies = [BY_ID[name].body for name in question.documents]
    facts = [replace(question, key_facts=(fact,)) for fact in question.key_facts]
    if question.difficulty == "unanswerable":
        assert not question.answerable and not question.documents and not question.key_facts
    elif question.difficulty == "two_documents":
        assert len(bodies) == 2 and facts
        assert all(any(fact.holds_key_facts(body) for body in bodies) for fact in facts)
    else:
        assert bodies and facts
        assert all(question.holds_key_facts(body) for body in bodies), "any one of the documents answers"


def asks(*key_facts: str) -> Question:
    return Question("id", "What?", ("ports",), key_facts, "words", "dev")


@pytest.mark.parametrize(
    ("key_facts", "answer", "held"),
    [
        (("19530",), "Milvus listens on port 19530.", True),
        (("19530",), "Milvus listens on port 1953 0.", False),
        (("load_collection",), "Call `LOAD_Collection()` first.", True),
        (("at least 8 GB",), "It needs **at\nleast**  8 GB.", True),
        (('it\'s "fast"',), "Its fast.", True),
        (("port 19530", "port 9091"), "port 9091 and port 19530", True),
        (("port 19530", "port 9091"), "port 19530 only", False),
        (("half|50 %|50%",), "It is 50% cheaper.", True),
        (("half|50 %|50%",), "It is 5% cheaper.", False),
        (("half|50 %", "Lite"), "Half of Lite.", True),
        (("half|50 %", "Lite"), "50 %", False),
        (("19530",), "", False),
    ],
)
def test_holds_key_facts(key_facts: tuple[str, ...], answer: str, held: bool) -> None:
    assert asks(*key_facts).holds_key_facts(answer) is held


def test_the_fitted_model_names_the_features_and_the_dev_split() -> None:
    fitted = json.loads((ROOT / "utils" / "offline" / "answerable.json").read_text(encoding="utf-8"))
    assert tuple(fitted["weights"]) == FEATURES
    assert all(math.isfinite(weight) and weight for weight in [*fitted["weights"].values(), fitted["intercept"]])
    dev = load_questions("dev")
    answerable = sum(question.answerable for question in dev)
    assert f"dev split ({answerable} answerable, {len(dev) - answerable} not)" in fitted["about"], "fit it again"


def test_a_folder_without_documents_says_how_to_get_them_back(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="No document in .*: bring the folder back with git checkout"):
        load_corpus(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "# No header\n",
        "---\nid: a\n---\n# A\n",
        "---\n- a\n---\n# A\n",
        "x\n---\nid: a\n---\n",
        "---\na: [\n---\n# A\n",
    ],
)
def test_a_document_without_front_matter_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "odd.md").write_text(content)
    with pytest.raises(CorpusError, match=r"^odd\.md does not start with front matter \(id, title, topic, source"):
        load_corpus(tmp_path)


def test_documents_come_sorted_with_their_own_fields(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.md").write_text(
            f"---\nid: {name}\ntitle: T\ntopic: x\nsource: s\n---\n\n# T\n\n---\nbody\n"
        )
    assert load_corpus(tmp_path) == [Text(name, "T", "x", "s", "# T\n\n---\nbody") for name in ("a", "b")]
    assert load_corpus(tmp_path)[0].metadata() == {"id": "a", "title": "T", "topic": "x"}


def test_outdated_answers_are_of_the_development_split_and_wrong() -> None:
    lines = [json.loads(line) for line in (ROOT / "data" / "outdated.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = {question.id: question for question in load_questions("dev")}
    assert len({line["question"] for line in lines}) == len(lines) >= 20
    for line in lines:
        assert set(line) == {"question", "second_query", "outdated", "wrong"}
        question = questions[line["question"]]
        assert line["second_query"].casefold() != question.question.casefold()
        assert line["wrong"] in line["outdated"] and not question.holds_key_facts(line["outdated"])
        right = [BY_ID[name].body.replace("`", "").casefold() for name in question.documents]
        assert not any(line["wrong"].casefold() in text for text in right), "else a right answer would count as wrong"
