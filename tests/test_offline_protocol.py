"""OpenAI's API as the offline server speaks it: a real server, the official client, and raw HTTP.

All of it holds for both engines, except what is marked `extractive`.
"""

from __future__ import annotations

import asyncio
import base64
import enum
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offline_messages import (
    BACKUP,
    BACKUP_QUESTION,
    BOTH,
    OTHER_QUESTION,
    PORT_QUESTION,
    PORTS,
    SEARCH,
    Json,
    assistant,
    called,
    json_schema,
    modest,
    searched,
    system,
    tool,
    user,
)
from pydantic import BaseModel, ConfigDict, Field

from utils.offline import DIMENSIONS, EMBEDDING_MODEL, RERANK_MODEL, OfflineServer

pytestmark = pytest.mark.model_server
extractive = pytest.mark.extractive

QUOTED = "Milvus listens for clients on port 19530."
TWO_QUESTIONS = f"{PORT_QUESTION} {BACKUP_QUESTION}"
MEMORY = "<memories_from_previous_interactions>\n- My name is Ada.\n</memories_from_previous_interactions>"
NAME = "What is my name?"


Ask = Callable[..., Any]
Body = Callable[..., Json]


@pytest.fixture(scope="session")
def http(offline_server: OfflineServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {offline_server.api_key}"}
    root = offline_server.base_url.removesuffix("/v1")
    with httpx.Client(base_url=root, headers=headers, timeout=300, trust_env=False) as made:
        yield made


@pytest.fixture(scope="session")
def chat(client: openai.OpenAI, offline_server: OfflineServer) -> Ask:
    """Asks the model for a chat completion."""

    def ask(messages: Any, **options: Any) -> Any:
        return client.chat.completions.create(model=offline_server.model, messages=messages, **options)

    return ask


@pytest.fixture(scope="session")
def body(offline_server: OfflineServer) -> Body:
    """Makes the body of a chat request."""

    def make(messages: list[Json], **options: Any) -> Json:
        return {"model": offline_server.model, "messages": messages, **options}

    return make


@pytest.fixture(scope="session")
def examples(request: pytest.FixtureRequest) -> settings:
    """How many examples are tried; a language model takes a second for each."""
    return settings(modest, max_examples=4) if request.config.getoption("--local-model") else modest


def text_of(chat: Ask, messages: list[Json], **options: Any) -> str:
    return str(chat(messages, **options).choices[0].message.content)


def warm_up(chat: Ask, messages: list[Json], **options: Any) -> None:
    """Let llama.cpp read a prompt. With it in its cache it rounds a little differently, so an answer that follows may
    differ from the first one; from then on they are all the same."""
    chat(messages, **{**options, "max_tokens": 1})


def assert_error(response: httpx.Response, *statuses: int) -> Json:
    """The response has one of the statuses and OpenAI's error object, which is returned."""
    assert response.status_code in statuses, response.text
    error: Json = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error


# Models and health


def test_models_are_listed_and_found_by_name(client: openai.OpenAI, offline_server: OfflineServer) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == [offline_server.model, EMBEDDING_MODEL, RERANK_MODEL]
    assert [client.models.retrieve(model.id) for model in listed] == listed


def test_health_needs_no_key_and_everything_else_does(http: httpx.Client) -> None:
    assert httpx.get(f"{http.base_url}/health", trust_env=False).json()["status"] == "ok"
    for method, path in (
        ("GET", "v1/models"),
        ("GET", f"v1/models/{EMBEDDING_MODEL}"),
        ("POST", "v1/chat/completions"),
        ("POST", "v1/embeddings"),
        ("POST", "v1/rerank"),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
            response = httpx.request(method, f"{http.base_url}/{path}", headers=headers, json={}, trust_env=False)
            assert assert_error(response, 401)["code"] == "invalid_api_key"


def test_metrics_count_replies_their_tokens_and_their_speed(http: httpx.Client, chat: Ask) -> None:
    names = ['requests_total{outcome="stop"}', 'requests_total{outcome="tool_calls"}', 'tokens_total{kind="prompt"}']
    names += ['tokens_total{kind="completion"}', "time_to_first_token_seconds_count", "tokens_per_second_count"]

    def read() -> list[float]:
        response = httpx.get(f"{http.base_url}/metrics", timeout=60, trust_env=False)  # without a key
        values = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
        return [float(values.get(f"model_{name}", 0)) for name in names]

    def counted(ask: Callable[[], Any]) -> list[float]:
        before, usage = read(), ask().usage
        *numbers, firsts, speeds = [now - then for now, then in zip(read(), before, strict=True)]
        assert numbers[2:] == [usage.prompt_tokens, usage.completion_tokens]
        return [*numbers[:2], firsts, speeds]

    assert counted(lambda: chat(searched(PORT_QUESTION, BOTH))) == [1, 0, 1, 1]
    assert counted(lambda: chat([user(PORT_QUESTION)], tools=[SEARCH])) == [0, 1, 1, 0]


# Chat


def test_a_chat_completion_has_openais_form(chat: Ask, offline_server: OfflineServer) -> None:
    completion = chat(searched(PORT_QUESTION, BOTH), tools=[SEARCH])
    choice = completion.choices[0]
    assert (completion.object, completion.model) == ("chat.completion", offline_server.model)
    assert len(completion.choices) == 1
    assert (choice.finish_reason, choice.message.role, choice.message.tool_calls) == ("stop", "assistant", None)
    assert choice.message.content
    usage = completion.usage
    assert usage.prompt_tokens > 20 and usage.completion_tokens > 5
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@extractive
def test_an_answer_quotes_what_the_search_returned(chat: Ask) -> None:
    assert text_of(chat, searched(PORT_QUESTION, BOTH), tools=[SEARCH]) == f"{QUOTED} [milvus-ports]"


def test_the_async_client_gets_the_same(chat: Ask, offline_server: OfflineServer) -> None:
    name = offline_server.model

    async def ask() -> tuple[Any, str, list[str]]:
        async with openai.AsyncOpenAI(base_url=offline_server.base_url, api_key=offline_server.api_key) as other:
            messages: Any = searched(PORT_QUESTION, BOTH)
            whole = await other.chat.completions.create(model=name, messages=messages)
            stream = await other.chat.completions.create(model=name, messages=messages, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return whole, streamed, [model.id async for model in other.models.list()]

    warm_up(chat, searched(PORT_QUESTION, BOTH))
    whole, streamed, models = asyncio.run(ask())
    assert whole == chat(searched(PORT_QUESTION, BOTH))
    assert streamed == whole.choices[0].message.content
    assert name in models


def test_content_parts_and_the_developer_role_are_read(chat: Ask) -> None:
    parts = [{"type": "text", "text": part} for part in ("Which port does Milvus", "listen on for clients?")]
    whole = searched(PORT_QUESTION.replace("Milvus listen", "Milvus\nlisten"), BOTH)
    warm_up(chat, whole)
    assert text_of(chat, [user(parts), *whole[1:]]) == text_of(chat, whole)
    warm_up(chat, [system(MEMORY), user(NAME)])
    told = [text_of(chat, [{"role": role, "content": MEMORY}, user(NAME)]) for role in ("system", "developer")]
    assert told[0] == told[1] != text_of(chat, [user(NAME)])


@extractive
def test_a_memory_in_the_instructions_is_told(chat: Ask) -> None:
    assert text_of(chat, [system(MEMORY), user(NAME)]) == "You told me: My name is Ada."


WITHOUT_EFFECT: Json = {"user": "u", "logit_bias": {"1": 5}, "n": 1, "store": False, "metadata": {"a": "b"}}
WITHOUT_EFFECT |= {"reasoning_effort": "low", "logprobs": False}


def test_fields_without_effect_have_none(chat: Ask) -> None:
    messages = searched(PORT_QUESTION, BOTH)
    warm_up(chat, messages)
    assert text_of(chat, messages, **WITHOUT_EFFECT) == text_of(chat, messages)


@extractive
def test_how_to_sample_is_nothing_to_an_engine_that_does_not(chat: Ask) -> None:
    messages = searched(PORT_QUESTION, BOTH)
    options = {"temperature": 2, "top_p": 0.1, "seed": 7, "presence_penalty": 1}
    assert text_of(chat, messages, **options) == text_of(chat, messages)


# Streaming


def assembled(chat: Ask, messages: list[Json], **options: Any) -> tuple[Json, str, list[Any]]:
    """The message that a stream adds up to, its finish reason, and its chunks."""
    chunks = list(chat(messages, stream=True, **options))
    message: Json = {"content": None, "tool_calls": []}
    reasons = []
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content is not None:
                message["content"] = (message["content"] or "") + choice.delta.content
            for delta in choice.delta.tool_calls or []:
                if delta.index == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": delta.id, "name": delta.function.name, "arguments": ""})
                message["tool_calls"][delta.index]["arguments"] += delta.function.arguments
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert len(reasons) == 1
    return message, reasons[0], chunks


SEPARATED = "a\u2028b\u2029c\u0085d\u000be\u001cf\r\ng\t\u00a0h"
EXACTLY: Json = {"type": "object", "properties": {"text": {"const": SEPARATED}}, "required": ["text"]}
STREAMED: dict[str, tuple[list[Json], Json]] = {
    "answer": (searched(TWO_QUESTIONS, BOTH), {}),
    "refusal": (searched(OTHER_QUESTION, BOTH), {"max_tokens": 20}),
    "one call": ([user(PORT_QUESTION)], {"tools": [SEARCH]}),
    "two calls": ([user(TWO_QUESTIONS)], {"tools": [SEARCH]}),
    "no arguments": ([user("x")], {"tools": [tool("now")], "tool_choice": "required"}),
    "json": (searched(PORT_QUESTION, BOTH), {"response_format": json_schema({"type": "object", "properties": {}})}),
    "cut": (searched(PORT_QUESTION, BOTH), {"max_tokens": 3}),
    "empty": (searched(PORT_QUESTION, BOTH), {"stop": ["M"]}),
    "line separators": ([user("x")], {"response_format": json_schema(EXACTLY)}),
}


@pytest.mark.parametrize(("messages", "options"), STREAMED.values(), ids=STREAMED)
def test_a_stream_adds_up_to_the_whole_answer(chat: Ask, messages: list[Json], options: Json) -> None:
    warm_up(chat, messages, **options)
    message, reason, chunks = assembled(chat, messages, **options)
    whole = chat(messages, **options)
    expected = whole.choices[0].message
    calls = [(call.id, call.function.name, call.function.arguments) for call in expected.tool_calls or []]
    assert message["content"] == expected.content
    assert [(call["id"], call["name"], call["arguments"]) for call in message["tool_calls"]] == calls
    assert reason == whole.choices[0].finish_reason
    assert {chunk.id for chunk in chunks} == {whole.id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_words_come_one_by_one(chat: Ask) -> None:
    message, _, chunks = assembled(chat, searched(PORT_QUESTION, BOTH))
    assert len(chunks) >= 2 + len(message["content"].split()) > 5


def test_the_stream_has_the_usage_only_if_asked(chat: Ask) -> None:
    messages = searched(PORT_QUESTION, BOTH)
    warm_up(chat, messages)
    *chunks, last = chat(messages, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == chat(messages).usage
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_the_event_stream_is_read_by_any_client(http: httpx.Client, body: Body) -> None:
    """Only line breaks may end a line of it, also for clients that take every Unicode line separator for one."""
    asked = body([user("x")], response_format=json_schema(EXACTLY), stream=True)
    with http.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *lines, last = [line for line in response.iter_lines() if line]
    assert last == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert json.loads("".join(delta.get("content") or "" for delta in deltas)) == {"text": SEPARATED}


@extractive
def test_what_a_tool_returned_is_told_to_the_letter(chat: Ask) -> None:
    assert text_of(chat, [user("x"), *called("f", {}, SEPARATED)]) == f"f returned: {SEPARATED}"


def test_an_error_before_a_stream_is_an_error(chat: Ask) -> None:
    with pytest.raises(openai.BadRequestError):
        chat([user("x")], stream=True, stop=["a"] * 5)


# Tools


def calls_of(chat: Ask, messages: list[Json], **options: Any) -> list[tuple[str, Json]]:
    choice = chat(messages, **options).choices[0]
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
    assert (choice.finish_reason == "tool_calls") == bool(calls)
    assert (choice.message.content is None) == bool(calls)
    return calls


def names_of(calls: list[tuple[str, Json]]) -> list[str]:
    """The names of the called tools, each of which got what a search needs."""
    for _, arguments in calls:
        assert list(arguments) == ["query"] and 0 < len(arguments["query"].strip()) <= 500
    return [name for name, _ in calls]


def test_it_searches_and_then_answers(chat: Ask) -> None:
    assert names_of(calls_of(chat, [user(PORT_QUESTION)], tools=[SEARCH])) == ["search_knowledge_base"]
    assert calls_of(chat, searched(PORT_QUESTION, BOTH), tools=[SEARCH]) == []


@extractive
def test_it_searches_with_the_question(chat: Ask) -> None:
    assert calls_of(chat, [user(PORT_QUESTION)], tools=[SEARCH]) == [
        ("search_knowledge_base", {"query": PORT_QUESTION})
    ]


def test_tool_choice(chat: Ask) -> None:
    weather = tool("get_weather", "Get the weather of a city.", city="string")
    tools = [SEARCH, weather]
    named = {"type": "function", "function": {"name": "get_weather"}}
    ask = [user(PORT_QUESTION)]
    assert calls_of(chat, ask, tools=tools, tool_choice="none", max_tokens=20) == []
    warm_up(chat, ask, tools=tools)
    assert calls_of(chat, ask, tools=tools, tool_choice="auto") == calls_of(chat, ask, tools=tools)
    assert calls_of(chat, ask, tools=[weather], tool_choice="auto", max_tokens=20) == []
    assert [name for name, _ in calls_of(chat, ask, tools=[weather], tool_choice="required")] == ["get_weather"]
    assert [name for name, _ in calls_of(chat, ask, tools=tools, tool_choice=named)] == ["get_weather"]
    # Forced again although it was called already.
    again = searched(PORT_QUESTION, BOTH)
    assert names_of(calls_of(chat, again, tools=[SEARCH], tool_choice="required")) == ["search_knowledge_base"]


def test_parallel_calls(chat: Ask) -> None:
    both = ["search_knowledge_base"] * 2
    assert names_of(calls_of(chat, [user(TWO_QUESTIONS)], tools=[SEARCH])) == both
    assert names_of(calls_of(chat, [user(TWO_QUESTIONS)], tools=[SEARCH], parallel_tool_calls=True)) == both
    # One at a time, the second question is searched after the first.
    one = {"tools": [SEARCH], "parallel_tool_calls": False}
    messages = [user(TWO_QUESTIONS)]
    for number in range(2):
        calls = calls_of(chat, messages, **one)
        assert len(names_of(calls)) == 1
        messages += called(*calls[0], json.dumps(BOTH), number)
    assert calls_of(chat, messages, **one) == []


@extractive
def test_each_question_is_searched_and_answered(chat: Ask) -> None:
    queries = [("search_knowledge_base", {"query": question}) for question in (PORT_QUESTION, BACKUP_QUESTION)]
    assert calls_of(chat, [user(TWO_QUESTIONS)], tools=[SEARCH]) == queries
    messages = [user(TWO_QUESTIONS)]
    for number, (name, arguments) in enumerate(queries):
        assert calls_of(chat, messages, tools=[SEARCH], parallel_tool_calls=False) == [(name, arguments)]
        messages += called(name, arguments, json.dumps(BOTH), number)
    answer = text_of(chat, messages, tools=[SEARCH])
    assert "[milvus-ports]" in answer and "[milvus-backup]" in answer


# JSON answers


class Level(enum.Enum):
    low = "low"
    high = "high"


class Evidence(BaseModel):
    document: str
    quote: str = Field(min_length=3, max_length=40)


class Node(BaseModel):
    title: str
    parent: Node | None
    left: Node | None
    right: Node | None
    before: Node | None
    after: Node | None
    children: list[Node]


class Report(BaseModel):
    """Nested objects, references, a choice, optional fields, lists, bounds."""

    model_config = ConfigDict(extra="forbid")
    answer: str
    sources: list[str]
    level: Level
    score: int = Field(ge=1, le=10)
    share: float = Field(gt=0, lt=1)
    port: int = Field(ge=1, le=65535)
    evidence: Evidence
    more: list[Evidence] = Field(min_length=2, max_length=3)
    remark: str | None
    tree: Node
    tags: list[Level] = []
    done: bool
    by_name: dict[str, int] = {}


@extractive
@pytest.mark.parametrize("question", [PORT_QUESTION, OTHER_QUESTION])
def test_a_pydantic_model_is_filled(chat: Ask, question: str) -> None:
    wanted = json_schema(Report.model_json_schema(), strict=True)
    report = Report.model_validate_json(text_of(chat, searched(question, BOTH), response_format=wanted))
    answered = question == PORT_QUESTION
    assert report.done is answered
    assert report.sources == (["milvus-ports"] if answered else [])
    assert report.answer.startswith(QUOTED) is answered
    assert not answered or (report.port == 19530 and report.evidence.document == "milvus-ports")


class Answer(BaseModel):
    answer: str
    sources: list[str]
    evidence: Evidence | None


@pytest.fixture(scope="session")
def parsed(client: openai.OpenAI, offline_server: OfflineServer) -> Answer | None:
    """An answer as the client's own parse() reads it."""
    messages: Any = searched(PORT_QUESTION, BOTH)
    parse = client.chat.completions.parse
    return parse(model=offline_server.model, messages=messages, response_format=Answer).choices[0].message.parsed


def test_the_clients_parse_returns_the_model(parsed: Answer | None) -> None:
    assert parsed is not None and parsed.answer


@extractive
def test_the_parsed_model_holds_the_quote(parsed: Answer | None) -> None:
    assert parsed is not None and parsed.sources == ["milvus-ports"] and parsed.answer.startswith(QUOTED)


IN_JSON = [system("Answer in JSON."), *searched(PORT_QUESTION, BOTH)]


def test_json_object(chat: Ask) -> None:
    assert isinstance(json.loads(text_of(chat, IN_JSON, response_format={"type": "json_object"})), dict)
    with pytest.raises(openai.BadRequestError, match="json"):
        chat(searched(PORT_QUESTION, BOTH), response_format={"type": "json_object"})


@extractive
def test_what_a_json_object_holds(chat: Ask) -> None:
    reply = json.loads(text_of(chat, IN_JSON, response_format={"type": "json_object"}))
    assert reply == {"answer": f"{QUOTED} [milvus-ports]", "sources": ["milvus-ports"]}


def bounds(name: str, smallest: int, largest: int) -> st.SearchStrategy[Json]:
    """Up to two bounds of a schema, the lower one not above the upper one."""
    low, high = {"number": ("minimum", "maximum")}.get(name, (f"min{name}", f"max{name}"))
    pairs = st.tuples(*[st.none() | st.integers(smallest, largest)] * 2)
    ordered = pairs.map(lambda p: sorted(p) if None not in p else list(p))
    return ordered.map(lambda p: {k: v for k, v in zip((low, high), p, strict=True) if v is not None})


names = st.sampled_from(["answer", "sources", "score", "port", "level", "items", "x", "title", "topics", "question"])
leaves = st.one_of(
    bounds("Length", 0, 60).map(lambda b: {"type": "string", **b}),
    st.tuples(st.sampled_from(["integer", "number"]), bounds("number", -50, 50)).map(lambda t: {"type": t[0], **t[1]}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"$ref": "#/$defs/Level"}),
    st.lists(st.sampled_from(["a", "b", "Milvus", 1, 2.5, None, True]), min_size=1, max_size=3).map(
        lambda options: {"enum": options}
    ),
)


def composed(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    objects = st.dictionaries(names, inner, max_size=3).flatmap(
        lambda properties: st.builds(
            lambda required, more: {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": more,
            },
            st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([]),
            st.booleans(),
        )
    )
    arrays = st.tuples(inner, bounds("Items", 0, 4)).map(lambda t: {"type": "array", "items": t[0], **t[1]})
    optional = inner.map(lambda schema: {"anyOf": [schema, {"type": "null"}], "default": None})
    return objects | arrays | optional


schemas = st.recursive(leaves, composed, max_leaves=6)


@extractive
@modest
@given(schema=schemas, question=st.sampled_from([PORT_QUESTION, OTHER_QUESTION]))
def test_a_reply_follows_its_schema(http: httpx.Client, body: Body, schema: Json, question: str) -> None:
    root = {
        "type": "object",
        "properties": {"value": schema},
        "required": ["value"],
        "$defs": {"Level": {"type": "string", "enum": ["low", "high"]}},
    }
    asked = body(searched(question, BOTH), response_format=json_schema(root))
    response = http.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    jsonschema_rs.Draft202012Validator(root).validate(json.loads(response.json()["choices"][0]["message"]["content"]))


HARD_SCHEMAS: dict[str, Json] = {
    "nothing is valid": {"not": {}},
    "minLength without end": {"type": "string", "minLength": 10**12},
    "minItems without end": {"type": "array", "items": {"type": "integer"}, "minItems": 10**12},
    "contains itself": {"$ref": "#"},
    "leads nowhere": {"$ref": "#/$defs/Missing"},
    "other address": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a file": {"$ref": "file:///etc/hostname"},
    "bounds that cross": {"type": "integer", "minimum": 3, "maximum": 2},
    "not a schema": {"type": "objekt"},
    "not a regular expression": {"type": "string", "pattern": "("},
}


@pytest.mark.parametrize(
    "schema",
    [
        *[pytest.param(schema, id=name) for name, schema in HARD_SCHEMAS.items()],
        pytest.param({"type": "string", "pattern": "^[0-9]{4}$"}, id="pattern", marks=extractive),
    ],
)
def test_a_schema_that_cannot_be_met_is_refused(http: httpx.Client, body: Body, schema: Json) -> None:
    root = {"type": "object", "properties": {"value": schema}, "required": ["value"]}
    asked = body(searched(PORT_QUESTION, BOTH), response_format=json_schema(root))
    assert_error(http.post("/v1/chat/completions", json=asked), 400)


@extractive
def test_a_number_too_large_for_a_float_is_no_failure(chat: Ask) -> None:
    document = {"name": "d", "content": f"Milvus listens on port {'9' * 400} for clients."}
    schema = {"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"]}
    reply = text_of(chat, searched(PORT_QUESTION, [document]), response_format=json_schema(schema))
    assert json.loads(reply) == {"port": 0}
    multiply = tool("multiply", "Multiply.", a="integer")
    assert calls_of(chat, [user(f"Please multiply {'9' * 5000}")], tools=[multiply]) == []


# Limits of the answer


def test_stop_and_max_tokens(chat: Ask) -> None:
    messages = searched(PORT_QUESTION, BOTH)
    warm_up(chat, messages)
    whole = text_of(chat, messages)
    mark = f" {whole.split()[3]}"
    stopped = chat(messages, stop=[mark, "never"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole.partition(mark)[0], "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        cut = chat(messages, **{name: 5})
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens <= 5
        assert whole.startswith(cut.choices[0].message.content) and cut.choices[0].message.content
    enough = chat(messages, max_tokens=500).choices[0]
    assert (enough.message.content, enough.finish_reason) == (whole, "stop")


def test_any_stop_and_limit_is_honoured(chat: Ask, examples: settings) -> None:
    @examples
    @given(
        told=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
        stop=st.lists(st.text(max_size=3) | st.sampled_from(["port", " ", ".", "e"]), max_size=4),
        limit=st.integers(1, 40),
    )
    def holds(told: str, stop: list[str], limit: int) -> None:
        document = {"name": "d", "content": f"Milvus listens on port 19530 for clients. {told}"}
        messages = searched(f"{PORT_QUESTION} {told}", [document])
        warm_up(chat, messages)
        reply = chat(messages, stop=stop, max_tokens=limit)
        text, whole = reply.choices[0].message.content, text_of(chat, messages, max_tokens=60)
        assert whole.startswith(text)
        assert not any(mark in text for mark in stop if mark)
        assert reply.usage.completion_tokens <= limit
        stopped = any(whole.startswith(text + mark) for mark in stop if mark)
        assert text == whole or stopped or reply.choices[0].finish_reason == "length"

    holds()


# Embeddings and rerank


def embedded(client: openai.OpenAI, texts: Any, **options: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    reply = client.embeddings.create(model=EMBEDDING_MODEL, input=texts, **options)
    assert [item.index for item in reply.data] == list(range(len(reply.data)))
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0
    return np.array([item.embedding for item in reply.data])


def test_embeddings_are_unit_vectors_in_the_order_of_the_texts(client: openai.OpenAI) -> None:
    texts = [PORT_QUESTION, BACKUP_QUESTION, "Grüße aus Köln", "x", "port 19530"]
    vectors = embedded(client, texts)
    assert vectors.shape == (len(texts), DIMENSIONS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(embedded(client, texts[::-1]), vectors[::-1])
    for text, vector in zip(texts, vectors, strict=True):
        assert np.allclose(embedded(client, text), [vector], atol=1e-6)
    near, far = embedded(client, ["Milvus listens on port 19530.", "I bake bread on Sundays."]) @ vectors[0]
    assert near > far


def test_base64_and_float_are_the_same_vectors(http: httpx.Client) -> None:
    asked = {"model": EMBEDDING_MODEL, "input": [PORT_QUESTION, "x"]}
    floats, packed, default = (
        [item["embedding"] for item in http.post("/v1/embeddings", json={**asked, **form}).json()["data"]]
        for form in ({"encoding_format": "float"}, {"encoding_format": "base64"}, {})
    )
    assert floats == default
    assert [np.frombuffer(base64.b64decode(text), "<f4").tolist() for text in packed] == floats


@pytest.mark.parametrize("dimensions", [64, 128, 256])
def test_fewer_dimensions_are_a_prefix_scaled_to_length_one(client: openai.OpenAI, dimensions: int) -> None:
    (vector,) = embedded(client, PORT_QUESTION, dimensions=dimensions)
    (whole,) = embedded(client, PORT_QUESTION)
    prefix = whole[:dimensions] / np.linalg.norm(whole[:dimensions])
    assert vector.shape == (dimensions,) and np.allclose(vector, prefix, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "word " * 9000}, "input"),
        ({"input": None}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"dimensions": 100}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "many"}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_embedding_requests(http: httpx.Client, wrong: Json, param: str) -> None:
    response = http.post("/v1/embeddings", json={"model": EMBEDDING_MODEL, "input": "a", **wrong})
    assert assert_error(response, 400)["param"] == param


def test_the_largest_batch(client: openai.OpenAI) -> None:
    assert embedded(client, ["a"] * 2048, dimensions=64).shape == (2048, 64)


def test_rerank(http: httpx.Client, offline_server: OfflineServer) -> None:
    documents = [OTHER_QUESTION, BACKUP["content"], PORTS["content"], ""]
    asked = {"model": RERANK_MODEL, "query": PORT_QUESTION, "documents": documents}
    results = http.post("/v1/rerank", json=asked).json()["results"]
    assert results[0]["index"] == 2 and sorted(result["index"] for result in results) == [0, 1, 2, 3]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.5 and scores[-1] == 0
    best = http.post("/v1/rerank", json={**asked, "top_n": 1, "return_documents": True}).json()["results"]
    assert best == [{**results[0], "document": {"text": PORTS["content"]}}]
    wrongs: list[Json] = [{"documents": []}, {"query": ""}, {"top_n": 0}, {"documents": "a"}]
    wrongs.append({"model": offline_server.model})
    for wrong in wrongs:
        assert_error(http.post("/v1/rerank", json={**asked, **wrong}), 404 if "model" in wrong else 400)


# Errors


def test_a_wrong_key_and_an_unknown_model(client: openai.OpenAI, offline_server: OfflineServer) -> None:
    with openai.OpenAI(base_url=offline_server.base_url, api_key="wrong", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError) as refused:
            other.models.list()
        assert refused.value.code == "invalid_api_key"
    for send in (
        lambda: client.models.retrieve("gpt-4o"),
        lambda: client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}]),
        lambda: client.chat.completions.create(model=EMBEDDING_MODEL, messages=[{"role": "user", "content": "x"}]),
        lambda: client.embeddings.create(model=offline_server.model, input="x"),
    ):
        with pytest.raises(openai.NotFoundError) as unknown:
            send()
        assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /v1/responses"):
        client.responses.create(model=offline_server.model, input="x")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", f"/v1/models/{EMBEDDING_MODEL}", 405),
        ("PUT", "/v1/embeddings", 405),
    ],
)
def test_unknown_routes(http: httpx.Client, method: str, path: str, status: int) -> None:
    error = assert_error(http.request(method, path), status)
    assert error["code"] == "unknown_url" and f"{method} {path}" in error["message"]


CALL = called("f", {}, "")[0]
WRONG: dict[str, tuple[Json, str | None]] = {
    "no messages": ({"messages": []}, "messages"),
    "messages are text": ({"messages": "hello"}, "messages"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "an image": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}])]},
        "messages.0",
    ),
    "a result without its call": ({"messages": [user("x"), called("f", {}, "r")[1]]}, "messages.1"),
    "a result given twice": ({"messages": [*called("f", {}, "r"), called("f", {}, "r")[1]]}, "messages.2"),
    "a call without its result": ({"messages": [user("x"), CALL, user("y")]}, "messages.2"),
    "a call without its result at the end": ({"messages": [user("x"), CALL]}, "messages"),
    "two answers": ({"n": 2}, "n"),
    "logprobs": ({"logprobs": True}, "logprobs"),
    "audio": ({"modalities": ["audio"]}, "modalities.0"),
    "unknown parameter": ({"colour": "red"}, "colour"),
    "temperature too high": ({"temperature": 3}, "temperature"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "tokens as text": ({"max_tokens": "many"}, "max_tokens"),
    "five stops": ({"stop": list("abcde")}, "stop"),
    "tool without name": ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    "tool choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "a tool that is not offered": (
        {"tools": [SEARCH], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice",
    ),
    "tool with a wrong schema": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 1}}}]},
        "tools",
    ),
    "strict schema open for more": (
        {"response_format": json_schema({"type": "object", "properties": {}}, strict=True)},
        "response_format",
    ),
    "schema missing": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "stream options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
}


@pytest.mark.parametrize(("wrong", "param"), WRONG.values(), ids=WRONG)
def test_wrong_chat_requests(client: openai.OpenAI, body: Body, wrong: Json, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/chat/completions", body=body([user("x")]) | wrong, cast_to=object)
    assert error.value.type == "invalid_request_error"
    assert str(error.value.param).startswith(param)


def test_a_context_that_is_too_long(chat: Ask) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat([user("word " * 140_000)])
    assert error.value.code == "context_length_exceeded"


START = b'{"model": "MODEL", "messages": [{"role": "user", "content": "x"}], '
NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "half": b'{"model": ',
    "not UTF-8": b'{"model": "\xff"}',
    "a list": b"[]",
    "a text": b'"x"',
    "nested without end": b"[" * 100_000,
    "NaN": START + b'"metadata": {"a": NaN}}',
    "infinity": START + b'"seed": 1e999}',
    "half a character": b'{"model": "MODEL", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "a very long number": b'{"model": "MODEL", "messages": [], "seed": ' + b"9" * 5000 + b"}",
    "a deep schema": START
    + b'"tools": [{"type": "function", "function": {"name": "f", "parameters": %s{}%s}}]}'
    % (b'{"not": ' * 400, b"}" * 400),
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_bodies_that_cannot_be_read(http: httpx.Client, offline_server: OfflineServer, content: bytes) -> None:
    response = http.post("/v1/chat/completions", content=content.replace(b"MODEL", offline_server.model.encode()))
    assert assert_error(response, 400)["type"] == "invalid_request_error"


# Whatever comes

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
markdown = st.lists(
    st.sampled_from(
        ["# ", "- ", "1. ", "| a | b |\n|---|---|\n| 1 | 2 |", "```\n", "> ", "\n\n", "*", "[x](y)", "<b>", "A. "]
        + [
            "port ",
            "<references>",
            "</references>",
            "&amp;",
            "\\",
            "`",
            "$x$",
            "Response: ",
            "[milvus-lite]",
            "?",
            "and which ",
        ]
    ),
    max_size=25,
).map("".join)
results = st.one_of(
    texts,
    markdown,
    st.recursive(texts | st.integers() | st.none(), lambda x: st.lists(x, max_size=3), max_leaves=5).map(json.dumps),
    st.lists(
        st.fixed_dictionaries(
            {"content": texts | markdown | st.none() | st.integers()},
            optional={
                "meta_data": texts | st.dictionaries(st.just("id"), texts | st.none()),
                "name": texts | st.none(),
            },
        ),
        max_size=4,
    ).map(json.dumps),
    st.sampled_from(["[", "{", "- ", "- content: "]).flatmap(lambda start: (texts | markdown).map(start.__add__)),
    st.sampled_from(
        ["[" * 50_000, "- content: " + "[" * 3000, "- content: 2024-99-99", "- content: !!int ''", "- content: *a"]
    ),
    texts.map(lambda text: (text or "long ") * 200),
)
tool_sets = st.none() | st.lists(
    st.sampled_from(
        [SEARCH, tool("think", thought="string"), tool("get_weather", "Weather.", city="string", days="integer")]
        + [tool("get_chat_history"), tool("update_user_memory", task="string")]
        + [tool("delegate_task_to_members", task="string")]
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda offered: offered["function"]["name"],
)


def test_any_text_is_answered_and_always_the_same_way(
    http: httpx.Client, chat: Ask, body: Body, examples: settings
) -> None:
    @examples
    @given(
        asked=texts | markdown | st.sampled_from([PORT_QUESTION, TWO_QUESTIONS]),
        before=texts | markdown,
        result=results,
        arguments=st.just('{"query": "port"}') | texts | st.sampled_from(["[]", "{", "[" * 50_000]),
        tools=tool_sets,
        stream=st.booleans(),
    )
    def holds(asked: str, before: str, result: str, arguments: str, tools: list[Json] | None, stream: bool) -> None:
        messages = [system(before), user(before), assistant(result[:500]), user(asked)]
        for conversation in (messages, [*messages, *called("search_knowledge_base", arguments, result)]):
            options: Json = {"tools": tools} if tools else {}
            warm_up(chat, conversation, **options)
            # A language model may have much to say to a random text; what the extractive engine says is cut too.
            request = body(conversation, stream=stream, max_tokens=16, **options)
            first, second = (http.post("/v1/chat/completions", json=request) for _ in range(2))
            assert first.status_code == 200, first.text
            assert first.content == second.content

    holds()


@modest
@given(text=texts | markdown)
def test_any_text_has_a_vector_or_is_empty(http: httpx.Client, text: str) -> None:
    response = http.post("/v1/embeddings", json={"model": EMBEDDING_MODEL, "input": text})
    if text:
        assert response.status_code == 200, response.text
        length = np.linalg.norm(response.json()["data"][0]["embedding"])
        assert np.isclose(length, 1, atol=1e-5)
    else:
        assert_error(response, 400)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "role", "function", "name", "id", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = [
    *("messages", "tools", "tool_choice", "response_format", "stream", "stream_options", "stop", "max_tokens", "n"),
    *("input", "dimensions", "encoding_format", "query", "documents", "top_n", "parallel_tool_calls", "model", "x"),
]
good: dict[str, Json] = {
    "/v1/chat/completions": {"messages": [user(PORT_QUESTION)], "max_completion_tokens": 10},
    "/v1/embeddings": {"model": EMBEDDING_MODEL, "input": "a"},
    "/v1/rerank": {"model": RERANK_MODEL, "query": "a", "documents": ["b"]},
}


def test_any_body_is_answered_or_refused_in_openais_form(
    http: httpx.Client, offline_server: OfflineServer, examples: settings
) -> None:
    @examples
    @given(
        path=st.sampled_from(sorted(good)),
        changes=st.dictionaries(st.sampled_from(fields), anything, max_size=3),
        message=st.none()
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "tool_call_id"]), anything),
        schema=st.none() | anything,
    )
    def holds(path: str, changes: Json, message: Json | None, schema: Any) -> None:
        request = {"model": offline_server.model, **good[path], **changes}
        if message is not None:
            request["messages"] = [user("x"), {"role": "assistant", "content": None, **message}]
        if schema is not None:
            request["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
            request["tools"] = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        response = http.post(path, content=json.dumps(request))
        if response.status_code != 200:
            assert_error(response, 400, 404)

    holds()


ENDINGS = ("ing", "ed", "s", "ation")
WORDS = [f"{start}{middle}{end}" for start in ("re", "un") for middle in ("index", "cluster") for end in ENDINGS]


@extractive
def test_many_at_once_get_the_same_as_one_at_a_time(chat: Ask) -> None:
    requests = [searched(f"{PORT_QUESTION} {word}?", [PORTS, BACKUP, {"content": f"{word} it."}]) for word in WORDS]
    with ThreadPoolExecutor(16) as pool:
        at_once = list(pool.map(chat, requests))
    assert at_once == [chat(messages) for messages in requests]


def test_many_vectors_at_once_are_the_same_as_one_at_a_time(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(16) as pool:
        at_once = list(pool.map(lambda word: embedded(client, word).tolist(), WORDS))
    assert at_once == [embedded(client, word).tolist() for word in WORDS]
