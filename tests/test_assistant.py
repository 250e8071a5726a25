"""The assistant of `ask`: indexed once, repaired after an interruption, replaced with its corpus, clear if it fails."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from agno.agent import Agent
from agno.knowledge.document import Document
from agno.knowledge.embedder.openai import OpenAIEmbedder
from agno.models.openai import OpenAILike
from pymilvus import DataType, MilvusClient

from utils import lesson, models
from utils.assistant import MODES, AssistantError, Library, ask, ask_command, build_agent, open_library
from utils.bootstrap import course_environment
from utils.errors import CourseError
from utils.knowledge import Text, load_questions
from utils.models import Models
from utils.offline import CHAT_MODEL
from utils.offline.answers import REFUSAL

if TYPE_CHECKING:
    from utils.milvus_lab.servers import ServerLab

QUESTION = "Which port does Milvus listen on?"
TEXTS = [
    Text(
        "ports",
        "Ports",
        "milvus",
        "",
        "# Ports\n\n## Server\n\nMilvus listens on port 19530.\n\n## Web\n\nThe page has 9091.",
    ),
    Text(
        "bread",
        "Bread",
        "baking",
        "",
        "# Bread\n\nBread is baked at 230 degrees.\n\n## Rye\n\nRye bread needs a starter.",
    ),
    Text(
        "whales",
        "Whales",
        "sea",
        "",
        "# Whales\n\nA whale breathes air.\n\n## Size\n\nThe blue whale is the largest animal.",
    ),
]


@pytest.fixture(scope="module")
def first_ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """COURSE_DATA of the first `ask` with the whole corpus, and what that printed on stdout and stderr."""
    data = tmp_path_factory.mktemp("ask").resolve()
    output, progress = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_DATA", str(data))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(progress):
            assert ask_command(QUESTION) == 0
    yield data, output.getvalue(), progress.getvalue()
    lesson.close_lite(data)


@pytest.fixture
def embedder(offline_models: Models) -> OpenAIEmbedder:
    return models.embedder()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database for tests that leave it as it was: every new collection costs pymilvus a second."""
    folder = tmp_path_factory.mktemp("shared")
    yield str(folder / "milvus.db")
    lesson.close_lite(folder)


def test_ask_prints_the_answer_its_sources_and_who_answered(first_ask: tuple[Path, str, str]) -> None:
    _, output, progress = first_ask
    *answer, sources, by = output.splitlines()
    assert "19530" in "\n".join(answer)
    assert sources.startswith("sources: ") and len(sources.split(", ")) >= 1
    names = sources.removeprefix("sources: ").split(", ")
    assert set(names) == set(re.findall(r"\[([\w.-]+)\]", "\n".join(answer))) and "none" not in names
    lite = f"Milvus Lite {version('milvus-lite')}, in this process, at .../ask/milvus.db"
    assert by == f"answered by: {CHAT_MODEL} (offline) on {lite}"
    assert "indexing: 100%" in progress


def test_the_second_ask_does_not_index(
    first_ask: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output, _ = first_ask
    monkeypatch.setenv("COURSE_DATA", str(data))
    assert ask_command(QUESTION) == 0
    shown = capsys.readouterr()
    assert shown.out == output, "same question, same answer"
    assert "indexing" not in shown.err


def test_a_question_outside_the_corpus_has_no_sources(
    first_ask: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COURSE_DATA", str(first_ask[0]))
    assert ask_command("How do I bake sourdough bread at home?") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [REFUSAL, "sources: none"]


def test_twenty_questions_still_find_their_documents(first_ask: tuple[Path, str, str]) -> None:
    answerable = sorted((q for q in load_questions("dev") if q.answerable), key=lambda question: question.id)
    sample = random.Random(7).sample(answerable, 20)
    library = open_library(first_ask[0] / "ask")
    recalls = {}
    for question in sample:
        hits = library.search(question.question, 30)
        best = list(dict.fromkeys(hit["name"] for hit in hits))[:3]
        found = [name in best for name in question.documents]
        both = question.difficulty == "two_documents"
        recalls[question.id] = sum(found) / len(found) if both else float(any(found))
    library.close()
    assert sum(recalls.values()) / 20 >= 0.8, [name for name, recall in recalls.items() if recall < 1]


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_one_sentence(question: str) -> None:
    with pytest.raises(AssistantError, match='The question is empty: try python3 -m utils ask "'):
        ask_command(question)


def test_every_mode_finds_the_chunk_that_answers(shared: str, embedder: OpenAIEmbedder) -> None:
    library = Library(shared, "", embedder, TEXTS)
    found = {mode: library.search(QUESTION, 3, mode) for mode in MODES}
    assert {mode: hits[0]["name"] for mode, hits in found.items()} == dict.fromkeys(MODES, "ports")
    best = found["reranked"][0]
    assert best["content"] == "# Ports: Server\n\nMilvus listens on port 19530."
    assert best["meta_data"] == {"id": "ports", "title": "Ports", "topic": "milvus", "chunk": 2, "chunk_size": 46}
    assert [len(found[mode]) for mode in ("dense", "both", "reranked")] == [3, 3, 3]
    assert len(library.search(QUESTION, 1)) == 1
    assert len(library.search(QUESTION, 99, "dense")) == library.store.get_count() == 6
    assert [hit["name"] for hit in library.search("Rye needs what?", 9, "words")] == ["bread"], (
        "BM25 wants shared words"
    )
    with pytest.raises(KeyError):
        library.search(QUESTION, 3, "guess")


def test_the_best_of_both_are_ordered_by_the_reranker(shared: str, embedder: OpenAIEmbedder) -> None:
    library = Library(shared, "", embedder, TEXTS)
    question = "How does a whale breathe, and at which degrees is bread baked?"
    fused = [Document.from_dict(hit) for hit in library.search(question, 30, "both")]
    expected = [document.content for document in models.reranker().rerank(question, fused)][:2]
    assert [hit["content"] for hit in library.search(question, 2)] == expected


@pytest.mark.parametrize("mode", MODES)
def test_the_agent_cites_what_it_found(mode: str, shared: str, embedder: OpenAIEmbedder) -> None:
    reply = ask(build_agent(Library(shared, "", embedder, TEXTS), mode), QUESTION)
    assert "19530" in reply.text and reply.sources == ("ports",) and reply.seconds > 0


def test_a_proxy_is_not_asked_for_servers_of_this_machine(
    shared: str, embedder: OpenAIEmbedder, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "intranet.example")
    wanted = course_environment()["NO_PROXY"]
    assert wanted == os.environ["NO_PROXY"] + ",127.0.0.1,localhost"
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, wanted)
    assert course_environment()["NO_PROXY"] == wanted, "it does not grow with every start"
    library = Library(shared, "", embedder, TEXTS)
    assert "19530" in ask(build_agent(library), QUESTION).text


def test_an_embedder_that_refuses_is_one_sentence_and_no_answer(shared: str, embedder: OpenAIEmbedder) -> None:
    Library(shared, "", embedder, TEXTS)
    refused = OpenAIEmbedder(id=embedder.id, base_url=embedder.base_url, api_key="wrong", dimensions=256)
    library = Library(shared, "", refused, TEXTS)  # its chunks are there already
    with pytest.raises(AssistantError, match=rf"^The embedder at {refused.base_url} did not answer \(.* 401 .*\); ask"):
        library.search(QUESTION)
    with pytest.raises(AssistantError, match=r"^The search failed while the question was answered; ask again"):
        ask(build_agent(library), QUESTION)


def test_missing_rows_are_noticed_and_indexed_again(shared: str, embedder: OpenAIEmbedder) -> None:
    library = Library(shared, "", embedder, TEXTS)
    assert library.store.delete_by_name("ports") and library.store.get_count() == 4
    repaired = Library(shared, "", embedder, TEXTS)
    assert repaired.store.collection == library.store.collection and repaired.store.get_count() == 6
    assert repaired.search(QUESTION, 1)[0]["name"] == "ports"


def test_a_changed_corpus_replaces_the_collection_and_nothing_else(shared: str, embedder: OpenAIEmbedder) -> None:
    first = Library(shared, "", embedder, TEXTS)
    client = MilvusClient(shared)
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    client.create_collection("ask_me_anything", schema=schema)  # the learner's own
    changed = [replace(TEXTS[0], body="# Ports\n\nMilvus now listens on port 20000."), *TEXTS[1:]]
    second = Library(shared, "", embedder, changed)
    assert set(client.list_collections()) == {"ask_me_anything", second.store.collection}
    assert first.store.collection != second.store.collection
    assert "20000" in second.search(QUESTION, 1)[0]["content"]


def test_a_database_held_by_another_process_is_one_sentence(
    tmp_path: Path, course_data: Path, offline_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "held" / "milvus.db")
    (tmp_path / "held").mkdir()
    code = f"from pymilvus import MilvusClient; client = MilvusClient({path!r}); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "open\n"
        monkeypatch.setenv("MILVUS_URI", path)
        with pytest.raises(CourseError) as error:
            ask_command(QUESTION)
        holder.communicate("\n", timeout=120)
    assert str(error.value).startswith("The Milvus at .../held/milvus.db cannot be used: ")
    assert "another process holds it" in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_does_not_answer_is_one_sentence(embedder: OpenAIEmbedder, closed_port: int) -> None:
    with pytest.raises(AssistantError) as error:
        Library(f"http://127.0.0.1:{closed_port}", "root:secret", embedder, TEXTS)
    said = str(error.value)
    assert f"Milvus at http://127.0.0.1:{closed_port} does not answer" in said and "MILVUS_URI" in said
    assert "\n" not in said and "secret" not in said


def test_a_server_without_bm25_answers_from_vectors_and_reranker(
    milvus_standalone: ServerLab, embedder: OpenAIEmbedder
) -> None:
    library = Library(milvus_standalone.uri, milvus_standalone.token, embedder, TEXTS)
    reply = ask(build_agent(library), QUESTION)
    assert "19530" in reply.text and reply.sources == ("ports",)
    dense = [Document.from_dict(hit) for hit in library.search(QUESTION, 30, "dense")]
    expected = [document.content for document in models.reranker().rerank(QUESTION, dense)]
    assert [hit["content"] for hit in library.search(QUESTION, 30)] == expected
    for mode in ("words", "both"):
        with pytest.raises(AssistantError, match="needs BM25"):
            library.search(QUESTION, 3, mode)
    library.store.drop()


def test_a_failed_run_is_an_error_and_not_an_answer(closed_port: int) -> None:
    model = OpenAILike(id="any", base_url=f"http://127.0.0.1:{closed_port}/v1", api_key="none", max_retries=0)
    with pytest.raises(AssistantError, match="^The model did not answer: "):
        ask(Agent(model=model, telemetry=False), QUESTION)
