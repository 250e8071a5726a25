"""The corpus in data/knowledge, its labelled questions, and the chunker that fits it.

questions.jsonl has one JSON object a line:

    id           unique name of the question
    question     as a user would ask it
    documents    ids of the documents that answer it; any one of them does, unless difficulty is two_documents
                 (then all)
    key_facts    texts that a correct answer contains, all of them; "a|b" means that either spelling will do
    difficulty   words (shares words with the passage), paraphrase, two_documents, unanswerable (the corpus does
                 not answer it)
    split        dev (thresholds may be tuned on it) or test (never)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from agno.knowledge.chunking.strategy import ChunkingStrategy
from agno.knowledge.document.base import Document

from utils.bootstrap import ROOT
from utils.errors import CourseError

CORPUS = ROOT / "data" / "knowledge"
QUESTIONS = ROOT / "data" / "questions.jsonl"


class CorpusError(CourseError):
    """The corpus or its questions are missing or not in the expected form."""


@dataclass(frozen=True)
class Text:
    """A document of the corpus: what its front matter says, and its Markdown body."""

    id: str
    title: str
    topic: str
    source: str
    body: str

    def metadata(self) -> dict[str, str]:
        """What is stored with every chunk."""
        return {"id": self.id, "title": self.title, "topic": self.topic}


@dataclass(frozen=True)
class Question:
    """A labelled question; see the module's description."""

    id: str
    question: str
    documents: tuple[str, ...]
    key_facts: tuple[str, ...]
    difficulty: str
    split: str

    @property
    def answerable(self) -> bool:
        """Whether the corpus answers it."""
        return bool(self.documents)

    def holds_key_facts(self, answer: str) -> bool:
        """Whether `answer` contains every key fact, ignoring case, Markdown marks and white space."""
        text = _plain(answer)
        return all(any(_plain(spelling) in text for spelling in fact.split("|")) for fact in self.key_facts)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[`*_\"']", "", text).casefold().split())


def load_corpus(folder: Path = CORPUS) -> list[Text]:
    """The documents of a folder of Markdown files with front matter, sorted by id.

    Raises:
        CorpusError: the folder holds no document, or one lacks its front matter.
    """
    texts = []
    for path in sorted(folder.glob("*.md")):
        parts = path.read_text(encoding="utf-8").split("---\n", 2)
        try:
            header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
        except yaml.YAMLError:
            header = None
        if not isinstance(header, dict) or not {"id", "title", "topic", "source"} <= header.keys():
            raise CorpusError(
                f"{path.name} does not start with front matter (id, title, topic, source between two lines of ---)."
            )
        texts.append(Text(header["id"], header["title"], header["topic"], header["source"], parts[2].strip()))
    if not texts:
        raise CorpusError(f"No document in {folder.name}: bring the folder back with git checkout -- data/knowledge.")
    return texts


def load_questions(split: str | None = None) -> list[Question]:
    """The labelled questions, or those of one split ("dev" or "test").

    Raises:
        CorpusError: the file is missing or a line is not a question.
    """
    try:
        lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        questions = [
            Question(**{**row, "documents": tuple(row["documents"]), "key_facts": tuple(row["key_facts"])})
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"data/questions.jsonl cannot be read ({error}): bring it back with git checkout -- data/questions.jsonl."
        ) from None
    return [question for question in questions if split in (None, question.split)]


class SectionChunking(ChunkingStrategy):
    """One chunk for each section of a Markdown document, headed by the document's title and the section's heading.

    A section that is cut out of its page loses what it is about ("It needs 8 GB": what does?). Repeating the title
    gives the embedder and the reader that context back.
    """

    def chunk(self, document: Document) -> list[Document]:
        """Split at `## ` headings; text before the first one is a chunk of its own. Front matter is left out."""
        text = re.sub(r"\A---\n.*?\n---\n", "", document.content, flags=re.DOTALL)
        title, _, rest = text.lstrip("# \n").partition("\n")
        chunks = []
        for number, section in enumerate(re.split(r"\n(?=## )", f"\n{rest}"), 1):
            heading, _, body = section.strip().partition("\n") if section.startswith("## ") else ("", "", section)
            if not (section if rest.strip() else title).strip():
                continue
            name = f"{title}: {heading.lstrip('# ')}" if heading else title
            content = f"# {name}\n\n{body.strip()}".strip()
            chunks.append(
                Document(
                    id=self._generate_chunk_id(document, number, content),
                    name=document.name,
                    meta_data={**document.meta_data, "chunk": number, "chunk_size": len(content)},
                    content=content,
                )
            )
        return chunks
