"""What a chat request asks, and the evidence that its messages carry."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from utils.offline.answers import REFUSAL, Passage, parse_passages
from utils.offline.protocol import Message
from utils.offline.text import split_sentences, words_of

# What Agno's search_knowledge_base returns when there is nothing, and when the search raised.
NO_DOCUMENTS = "No documents found"
SEARCH_ERROR = "Error searching knowledge base"

SEARCH_TOOL = re.compile(r"^(search|retrieve|lookup|find)_|_search$|^search$")
DELEGATE_TOOL = re.compile(r"^delegate_task_to_members?$|^execute_task(s_parallel)?$")

# Blocks that Agno puts into a user message beside the user's words.
_BLOCK = re.compile(
    r"<(references|member_interaction_context|team_history_context|additional context|context)>(.*?)</\1>", re.S
)
# The conversation that Agno's session summaries put into the system message.
_SUMMARISED = re.compile(r"<conversation>(.*?)</conversation>", re.S)
_QUESTION = re.compile(r"[^.!?\n]*\?(?=\s)")
_REFERENCES_LEAD = "Use the following references from the knowledge base if it helps:"
_POINTS_BACK = re.compile(r"\b(it|its|that|this|they|them|their|those|these|there|one|ones)\b", re.I)
# A request of at most this many words is one question; a longer one brings text along.
_SHORT = 60
_CARRIES_ON = re.compile(r"^(and|but|so|what about|how about|why|also)\b", re.I)
# "..., and which ...", also with a preposition before the question word.
_SECOND_QUESTION = re.compile(
    r"[,;]?\s+and\s+(?=(?:(?:by|in|on|at|under|with|for|from|to|of)\s+)?"
    r"(?:which|what|how|where|when|who|why|does|do|is|are|can|should)\b)",
    re.I,
)
# About what was said, or about the user. "What did I forget to set?" and "What do I set?" are about neither.
_ABOUT_TALK = re.compile(
    r"\b(what|which question|when) (did|have|had) (I|we) (just |already )?"
    r"(ask(ed)?|said|say|tell|told|mention|talk|discuss)"
    r"|\b(did|have) (I|we) (ever |already )?(ask(ed)?|mention|tell|told|talk|discuss)"
    r"|\bmy (first|last|previous) (question|message)"
    r"|\bwhat('s| is| are) my (\w+ )?(name|job|role|team|company|city|preferences?|favou?rites?)\b"
    r"|\bwho am I\b|\b(where|what) do I (live|work|like|prefer|do|run|use)\b"
    r"|\bknow about me\b|\babout me\?|\bremember (me|my)\b",
    re.I,
)
_ABOUT_USER = re.compile(
    r"\b(my name is|call me|I am|I'm|I work|I live|I prefer|I like|I use|I run|we use|we run"
    r"|my (team|job|company|role) (is|are)|remember that)\b",
    re.I,
)


@dataclass(frozen=True)
class Called:
    """A tool call of the current turn with its result."""

    name: str
    arguments: dict[str, Any]
    result: str


@dataclass(frozen=True)
class Conversation:
    """The messages of a request, read for one purpose: to decide what comes next."""

    messages: tuple[Message, ...]

    @cached_property
    def system(self) -> str:
        """All system and developer messages."""
        return "\n\n".join(m.text() for m in self.messages if m.role in ("system", "developer"))

    @cached_property
    def _turn(self) -> int:
        return max((i for i, m in enumerate(self.messages) if m.role == "user"), default=-1)

    @cached_property
    def request(self) -> str:
        """The user's own words in the current turn, without the blocks that Agno adds."""
        text = self.messages[self._turn].text() if self._turn >= 0 else ""
        return _BLOCK.sub("", text).replace(_REFERENCES_LEAD, "").strip()

    @cached_property
    def earlier_requests(self) -> tuple[str, ...]:
        """The user's messages of earlier turns."""
        return tuple(_BLOCK.sub("", m.text()).strip() for m in self.messages[: max(self._turn, 0)] if m.role == "user")

    @cached_property
    def question(self) -> str:
        """What to look for: a short request as a whole, else its questions, else its first paragraph.

        A follow-up ("And on a cluster?") takes the request before it along.
        """
        question = " ".join(self.request.split())
        if "?" in question:  # what users say of themselves is not what they ask
            question = " ".join(s for s in split_sentences(question) if s not in self.user_facts)
        if len(question.split()) > _SHORT:
            paragraphs = [p.strip() for p in re.split(r"\n\s*\n", self.request) if p.strip()]
            asked = [s for p in paragraphs for s in split_sentences(p) if s.endswith("?")]
            question = " ".join(asked) or paragraphs[0]
        follows = len(words_of(question).words) < 2 or _CARRIES_ON.search(question) or _POINTS_BACK.search(question)
        if self.earlier_requests and follows and len(words_of(question).words) < 6:
            question = f"{self.earlier_requests[-1]} {question}"
        return question

    @cached_property
    def questions(self) -> tuple[str, ...]:
        """The parts of the question that can be looked up alone: its questions, split before "and which ...".

        Each part takes the statements before it along, and a part that points back ("what does that mean?") the part
        before it.
        """
        sentences = split_sentences(self.question)
        context = " ".join(s for s in sentences if not s.endswith("?"))
        parts = [part for s in sentences if s.endswith("?") for part in _SECOND_QUESTION.split(s)]
        if len(parts) < 2 or min(len(words_of(part).words) for part in parts) < 2:
            return (self.question,)
        whole = [f"{parts[i - 1]} {part}" if i and _POINTS_BACK.search(part) else part for i, part in enumerate(parts)]
        return tuple(f"{context} {part}".strip() for part in whole)

    @property
    def about_talk(self) -> bool:
        """Whether the request is about the conversation or the user, not about the world."""
        return bool(_ABOUT_TALK.search(self.request)) and not words_of(self.request).stems & {"milvus", "agno"}

    @cached_property
    def called(self) -> tuple[Called, ...]:
        """Tool calls of the current turn, in order, with their results."""
        calls = {}
        found = []
        for message in self.messages[self._turn + 1 :]:
            for call in message.tool_calls or []:
                calls[call.id] = call.function
            if message.role == "tool" and message.tool_call_id in calls:
                function = calls[message.tool_call_id]
                found.append(Called(function.name, _arguments(function.arguments), message.text()))
        return tuple(found)

    @cached_property
    def searches(self) -> tuple[tuple[str, tuple[Passage, ...]], ...]:
        """(query, passages) of each search of this turn and of references that came with the message, if not empty."""
        found = [(self.question, block) for kind, block in self._blocks if kind == "references"]
        for call in self.called:
            if (
                SEARCH_TOOL.search(call.name)
                and call.result.strip() != NO_DOCUMENTS
                and not call.result.startswith(SEARCH_ERROR)
            ):
                found.append(
                    (next((v for v in call.arguments.values() if isinstance(v, str)), self.question), call.result)
                )
        parsed = [(query, tuple(dict.fromkeys(parse_passages(text)))) for query, text in found]
        return tuple((query, passages) for query, passages in parsed if passages)

    @cached_property
    def told(self) -> tuple[Passage, ...]:
        """What others answered: members of a team, and text that the user's message itself brings along."""
        texts = [c.result for c in self.called if DELEGATE_TOOL.search(c.name)]
        texts += [b for kind, b in self._blocks if kind != "references"]
        texts += [_QUESTION.sub("", talk).replace("\n", "\n\n") for talk in _SUMMARISED.findall(self.system)]
        passages = [passage for text in texts for passage in parse_passages(_without_labels(text))]
        after = self.request.partition(self.question)[2] if self.question else ""
        if len(after.split()) > 25:
            passages += parse_passages(after)
        return tuple(p for p in dict.fromkeys(passages) if p.text and not p.text.startswith(REFUSAL))

    @cached_property
    def _blocks(self) -> list[tuple[str, str]]:
        text = self.messages[self._turn].text() if self._turn >= 0 else ""
        return [(match.group(1), match.group(2).strip()) for match in _BLOCK.finditer(text)]

    @cached_property
    def user_facts(self) -> tuple[str, ...]:
        """Sentences of this request that state something about the user."""
        return tuple(s for s in split_sentences(self.request) if _ABOUT_USER.search(s) and not s.endswith("?"))

    @cached_property
    def known_about_user(self) -> tuple[str, ...]:
        """What the history and the memories in the system message say about the user, oldest first."""
        memories = re.search(
            r"<memories_from_previous_interactions>(.*?)</memories_from_previous_interactions>", self.system, re.S
        )
        lines = [line.strip("- ").strip() for line in memories.group(1).splitlines()] if memories else []
        stated = [
            s
            for text in self.earlier_requests
            for s in split_sentences(text)
            if _ABOUT_USER.search(s) and not s.endswith("?")
        ]
        return tuple(dict.fromkeys(line for line in (*lines, *stated) if line))


def _arguments(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _without_labels(text: str) -> str:
    """A member's answer without the labels by which Agno names the member, its task and its response."""
    lines = [line for line in text.splitlines() if not re.match(r"(Member|Task): |See below interactions", line)]
    return re.sub(r"(?m)^(Response|Assistant|Agent [^:\n]{1,60}): ", "\n", "\n".join(lines))
