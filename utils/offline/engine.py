"""What every engine has in common, and the extractive one: tool calls by the policy, then an answer made of quotes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from starlette.concurrency import run_in_threadpool

from utils.offline import CHAT_MODEL
from utils.offline.answers import MAX_SENTENCES, MAX_WORDS, REFUSAL, Answer, Passage, find_answer
from utils.offline.conversation import DELEGATE_TOOL, NO_DOCUMENTS, SEARCH_ERROR, SEARCH_TOOL, Conversation
from utils.offline.policy import Decision, decide
from utils.offline.protocol import CONTEXT_TOKENS, ApiError, ChatRequest, check_chat
from utils.offline.structured import Findings, fill_schema
from utils.offline.text import first_tokens, token_ids, words_of

Searches = tuple[tuple[str, tuple[Passage, ...]], ...]
EMPTY = "The knowledge base returned no documents. Upload documents first, then ask again."
NOTHING_GIVEN = (
    "No document was given to answer from. This is the extractive offline model: it quotes what tools and messages "
    "contain and cannot answer from knowledge of its own."
)


@dataclass(frozen=True)
class End:
    """How a reply ended: OpenAI's finish reason, and how many tokens were read and written."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


Piece = str | Decision | End


class Engine(Protocol):
    """What answers chat requests."""

    model: str  # its name in requests and replies

    def reply(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """Pieces of text or whole tool calls as they come, then the end.

        Raises:
            ApiError: before the first piece: the request is wrong, too long, or cannot be met.
        """
        ...

    async def metrics(self) -> str:
        """What the engine itself counts, in Prometheus's text format."""
        ...


class Extractive:
    """The engine without a language model. The same request always gets the same reply.

    Args:
        tokens_per_second: how fast it replies, as a model that thinks would; 0 for at once.
    """

    model = CHAT_MODEL

    def __init__(self, tokens_per_second: int = 0) -> None:
        self._pause = 1 / tokens_per_second if tokens_per_second else 0.0

    async def reply(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """See Engine."""
        completion = await run_in_threadpool(complete, request)
        words = re.findall(r"\S+\s*|\s+", completion.text)
        for piece in (*completion.calls, *words):
            yield piece
            if self._pause:
                await asyncio.sleep(self._pause)
        yield End(completion.finish_reason, completion.prompt_tokens, completion.completion_tokens)

    async def metrics(self) -> str:
        """Nothing of its own."""
        return ""


@dataclass(frozen=True)
class Completion:
    """The extractive engine's reply to one request: either text or tool calls, and the token counts."""

    text: str
    calls: tuple[Decision, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def complete(request: ChatRequest) -> Completion:
    """Answer a chat request. The same request always gets the same completion.

    Raises:
        ApiError: the request is wrong, too long, or asks for what the engine cannot do.
    """
    check_chat(request)
    prompt_tokens = len(token_ids(request.canonical))
    if prompt_tokens > CONTEXT_TOKENS:
        raise ApiError(
            f"This model's maximum context length is {CONTEXT_TOKENS} tokens. "
            f"However, your messages resulted in {prompt_tokens} tokens.",
            param="messages",
            code="context_length_exceeded",
        )
    conversation = Conversation(tuple(request.messages))
    calls = tuple(decide(request, conversation))
    if calls:
        tokens = sum(len(token_ids(call.name + json.dumps(call.arguments))) for call in calls)
        return Completion("", calls, "tool_calls", prompt_tokens, tokens)
    text, reason = _cut(_reply(request, conversation), request)
    return Completion(text, (), reason, prompt_tokens, len(token_ids(text)))


def _reply(request: ChatRequest, conversation: Conversation) -> str:
    wanted, findings = request.response_format, _say(conversation)
    if wanted is None or wanted.type == "text":
        return findings.text
    if wanted.type == "json_object" or wanted.json_schema is None:
        return json.dumps({"answer": findings.text, "sources": findings.sources}, ensure_ascii=False)
    return fill_schema(wanted.json_schema.schema_, findings)


def _cut(text: str, request: ChatRequest) -> tuple[str, str]:
    ends = [index for stop in request.stops if (index := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    if request.token_limit is not None and len(token_ids(text)) > request.token_limit:
        return first_tokens(text, request.token_limit), "length"
    return text, "stop"


def _say(conversation: Conversation) -> Findings:
    """What to say, with what it rests on."""
    question, searches, told = conversation.question, conversation.searches, conversation.told
    if conversation.about_talk:
        return _from_talk(conversation)
    if searches:
        answer = _answer_parts(searches)
        if answer.answered or not told:
            return _findings(question, answer, tuple(passage for _, passages in searches for passage in passages))
    if told:
        # Members and the user's own text were chosen by someone who judged them: they are quoted, not judged again.
        quotes = find_answer(question, told).quotes
        if quotes:
            return _findings(question, Answer(quotes, 1.0), told)
    return _plain(conversation, _without_evidence(conversation))


def _answer_parts(searches: Searches) -> Answer:
    """One answer to all parts of a question, each from its own search; each part gets its share of the sentences."""
    if len(searches) == 1:
        return find_answer(*searches[0])
    share = 1.2 / len(searches)
    answers = [
        find_answer(part, passages, max(2, round(share * MAX_SENTENCES)), round(share * MAX_WORDS))
        for part, passages in searches
    ]
    quotes = {quote.text: quote for answer in answers for quote in answer.quotes}
    return Answer(tuple(quotes.values()), max(answer.confidence for answer in answers))


def _findings(question: str, answer: Answer, passages: tuple[Passage, ...]) -> Findings:
    return Findings(question, answer.text, answer.sources, answer.answered, round(answer.confidence, 4), passages)


def _plain(conversation: Conversation, text: str, answered: bool = False) -> Findings:
    return Findings(conversation.question, text, (), answered, 1.0 if answered else 0.0, (Passage(text),))


def _without_evidence(conversation: Conversation) -> str:
    searches = [call.result for call in conversation.called if SEARCH_TOOL.search(call.name)]
    failed = [result for result in searches if result.startswith(SEARCH_ERROR)]
    if failed:
        reason = failed[0].removeprefix(SEARCH_ERROR).strip(": ")
        return f"The search failed ({reason}), so there is nothing to answer from."
    if searches:
        return EMPTY if all(result.strip() in (NO_DOCUMENTS, "") for result in searches) else REFUSAL
    if any(DELEGATE_TOOL.search(call.name) for call in conversation.called):
        return REFUSAL
    results = [f"{call.name} returned: {call.result.strip()}" for call in conversation.called]
    if results:
        return "\n\n".join(results)
    if conversation.user_facts:
        return f"You said: {' '.join(conversation.user_facts)}"
    return NOTHING_GIVEN


def _from_talk(conversation: Conversation) -> Findings:
    """Answer a question about the conversation or the user by quoting the user."""
    facts = conversation.known_about_user
    if facts and "question" not in conversation.request and "ask" not in conversation.request:
        asked = words_of(conversation.request)
        fitting = [fact for fact in facts if words_of(fact).stems & asked.stems] or list(facts)
        return _plain(conversation, f"You told me: {' '.join(fitting)}", answered=True)
    requests = conversation.earlier_requests
    if requests:
        chosen = requests[0] if "first" in conversation.request else requests[-1]
        return _plain(conversation, f'You asked: "{chosen}"', answered=True)
    shown = [call.result for call in conversation.called]
    return _plain(
        conversation, shown[0] if shown else "This conversation holds nothing about that yet.", answered=bool(shown)
    )
