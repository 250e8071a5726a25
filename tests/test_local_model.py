"""A real language model behind the model server: what llama.cpp does, and what the learner reads when it cannot.

Run by `python3 -m utils test --local-model`. What holds for the extractive engine too is in the test_offline_* files.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import psutil
import pytest
from agno.agent import Agent
from agno.models.openai import OpenAILike
from agno.run import RunStatus
from agno.run.agent import RunContentEvent
from offline_messages import (
    BOTH,
    PORT_QUESTION,
    SEARCH,
    Json,
    called,
    json_schema,
    searched,
    system,
    tool,
    user,
)
from pydantic import BaseModel, Field
from waiting import gone, wait_for

from utils import lesson, local_models, models, offline
from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.models import ModelError
from utils.offline import LanguageModelFile, OfflineServer
from utils.processes import ServerError
from utils.settings import Settings

pytestmark = pytest.mark.local_model
unix = pytest.mark.skipif(sys.platform == "win32", reason="signals as on Unix")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and memory maps as on Linux")

Ask = Callable[..., Any]
STORY = [user("Tell me a long story about a fox who learns to sail.")]


@pytest.fixture(scope="module")
def model_path() -> Path:
    return local_models.find("small").path


def asker(server: OfflineServer) -> tuple[openai.OpenAI, Ask]:
    """A client of the server, and a function that asks its model for a chat completion."""
    client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0, timeout=300)

    def ask(messages: Any, **options: Any) -> Any:
        return client.chat.completions.create(model=server.model, messages=messages, **options)

    return client, ask


@pytest.fixture(scope="module")
def chat(offline_server: OfflineServer) -> Iterator[Ask]:
    client, ask = asker(offline_server)
    with client:
        yield ask


@pytest.fixture
def model(offline_server: OfflineServer) -> OpenAILike:
    return OpenAILike(id=offline_server.model, base_url=offline_server.base_url, api_key=offline_server.api_key)


def text_of(chat: Ask, messages: list[Json], **options: Any) -> str:
    return str(chat(messages, **options).choices[0].message.content)


def calls_of(chat: Ask, messages: list[Json], **options: Any) -> list[tuple[str, Json]]:
    message = chat(messages, **options).choices[0].message
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def counted(server: OfflineServer, name: str) -> float:
    """The value of one metric of the server, all its labels added up."""
    text = httpx.get(f"{server.base_url.removesuffix('/v1')}/metrics", timeout=60, trust_env=False).text
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, text
    return sum(map(float, found))


def assert_sentence(said: str) -> None:
    """One sentence that a learner can act on."""
    assert said.endswith(".") and "\n" not in said and "Traceback" not in said
    assert len(said) < 500


# What the learner is told


def test_a_context_that_is_too_long_is_one_sentence(chat: Ask, model: OpenAILike) -> None:
    long = "word " * 9000
    with pytest.raises(openai.BadRequestError) as refused:
        chat([user(long)])
    assert refused.value.code == "context_length_exceeded"
    assert isinstance(refused.value.body, dict)
    said = str(refused.value.body["message"])
    assert "maximum context length is 8192 tokens" in said and "LOCAL_CONTEXT" in said
    assert "\n" not in said
    run = Agent(model=model, telemetry=False).run(long)
    assert run.status == RunStatus.error and "maximum context length is 8192 tokens" in str(run.content)


def damaged(path: Path, whole: Path, kind: str) -> Path:
    """A file that is no model any more."""
    with whole.open("rb") as file:
        start = file.read(4_000_000)
    noise = random.Random(1).randbytes(100_000)
    path.write_bytes(
        {
            "cut off in its tensors": start + b"\0" * 3_000_000,
            "cut off in its header": start[:20_000],
            "noise behind the header": start[:24] + noise,
            "noise behind the first kilobytes": start[:4000] + noise,
            "counts without end": b"GGUF\x03\0\0\0" + b"\xff" * 16 + noise,
            "not a GGUF file": b"<html>A login page</html>" * 100,
            "empty": b"",
        }[kind]
    )
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "cut off in its tensors",
        "cut off in its header",
        "noise behind the header",
        "noise behind the first kilobytes",
        "counts without end",
        "not a GGUF file",
        "empty",
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, model_path: Path, kind: str) -> None:
    path = damaged(tmp_path / "some.gguf", model_path, kind)
    with pytest.raises(ServerError) as error:
        offline.start(tmp_path / "server.log", model=LanguageModelFile(path))
    assert_sentence(str(error.value))
    assert "some.gguf" in str(error.value)
    with pytest.raises(CourseError) as told:
        models.connect(Settings(provider="local", model_id=str(path)))
    assert isinstance(told.value, ModelError | local_models.LocalModelError)
    assert_sentence(str(told.value))


# With an address space of 4 GB, an allocation of more fails at once and takes no memory from anybody.
LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from utils import offline
from utils.processes import ServerError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    offline.start(Path(sys.argv[1]), model=offline.LanguageModelFile(Path(sys.argv[2]), context=int(sys.argv[3])))
    print("started")
except ServerError as error:
    print(error)
"""


@linux
def test_too_little_memory_is_one_sentence(tmp_path: Path, model_path: Path) -> None:
    def said(context: int) -> str:
        command = [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "server.log"), str(model_path), str(context)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout.strip()

    refused = said(1_000_000)
    assert_sentence(refused)
    assert "memory" in refused and "LOCAL_CONTEXT" in refused
    assert said(1024) == "started"


@unix
@pytest.mark.parametrize(("signal", "words"), [("ILL", "lacks an instruction"), ("KILL", "memory ran out")])
def test_a_server_that_the_system_ends_is_one_sentence(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str, words: str
) -> None:
    """An unsupported processor, or no memory left: a program in Python's place that ends in the same way."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nulimit -c 0\nkill -{signal} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ServerError, match=words) as error:
        offline.start(tmp_path / "server.log", model=LanguageModelFile(model_path))
    assert_sentence(str(error.value))


# Always the same, unless the request asks for something else


def test_the_same_request_gets_the_same_bytes(offline_server: OfflineServer) -> None:
    """From the second time on: with the prompt in its cache, llama.cpp rounds a little differently than without."""
    headers = {"Authorization": f"Bearer {offline_server.api_key}"}
    requests: list[Json] = [
        {"messages": STORY, "max_tokens": 40},
        {"messages": searched(PORT_QUESTION, BOTH), "tools": [SEARCH]},
        {"messages": [user(PORT_QUESTION)], "tools": [SEARCH]},
        {"messages": STORY, "max_tokens": 20, "temperature": 1.5, "seed": 7},
    ]
    with httpx.Client(base_url=offline_server.base_url, headers=headers, timeout=300, trust_env=False) as http:
        for asked in requests:
            body = {"model": offline_server.model, **asked}
            _, second, third = (http.post("/chat/completions", json=body).content for _ in range(3))
            assert second == third


def test_temperature_and_seed_are_passed_on(chat: Ask) -> None:
    def told(**options: Any) -> str:
        return text_of(chat, STORY, max_tokens=12, **options)

    told()
    assert len({told(temperature=1.8, seed=seed) for seed in (1, 2, 3)}) == 3
    assert told(temperature=1.8) == told(temperature=1.8), "the seed is fixed unless the request names one"
    assert told(temperature=0, seed=1) == told(seed=2) == told()


# Several at a time


def ended(chat: Ask, length: int, number: int = 0) -> float:
    """When a list of that length was written (a schema leaves a model no choice of the length, as a story would)."""
    items: Json = {"type": "array", "items": {"enum": [1, 2]}, "minItems": length, "maxItems": length}
    schema: Json = {"type": "object", "properties": {"items": items}, "required": ["items"]}
    schema["additionalProperties"] = False
    text = text_of(chat, [user(f"Write list {number}.")], response_format=json_schema(schema))
    assert len(json.loads(text)["items"]) == length
    return time.monotonic()


def test_a_short_request_beside_long_ones_does_not_wait_for_them(chat: Ask) -> None:
    with ThreadPoolExecutor(4) as pool:
        long = [pool.submit(ended, chat, 60, number) for number in range(3)]
        time.sleep(0.5)
        short = pool.submit(ended, chat, 1)
        assert short.result() < min(one.result() for one in long)


def test_more_requests_than_slots_wait_for_the_first_free_one(chat: Ask) -> None:
    """Of six at once four are worked on; the others come as soon as one of these has ended, not after all of them."""
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(ended, chat, 10)
        long = [pool.submit(ended, chat, 90, number) for number in range(3)]
        time.sleep(0.5)
        waiting = [pool.submit(ended, chat, 1, number) for number in range(2)]
        assert max(one.result() for one in (first, *waiting)) < min(one.result() for one in long)
        assert first.result() < min(one.result() for one in waiting)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(offline_server: OfflineServer, stream: bool) -> None:
    def busy() -> float:
        return counted(offline_server, "llamacpp:requests_processing")

    assert wait_for(lambda: busy() == 0, 60)
    asked: Json = {"model": offline_server.model, "messages": STORY, "max_tokens": 2000, "stream": stream}
    headers = {"Authorization": f"Bearer {offline_server.api_key}"}
    before = counted(offline_server, "model_requests_total")
    started = time.monotonic()
    with httpx.Client(base_url=offline_server.base_url, headers=headers, timeout=60, trust_env=False) as http:
        if stream:
            with http.stream("POST", "/chat/completions", json=asked) as response:
                assert next(response.iter_lines())
                assert busy() == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/chat/completions", json=asked, timeout=2)
        assert wait_for(lambda: busy() == 0)
    assert time.monotonic() - started < 15, "2000 tokens take longer"
    assert counted(offline_server, "model_requests_total") == before + 1


# From its start to its end

LOADING = """
import sys
from pathlib import Path
from utils import offline
offline.start(Path(sys.argv[1]), model=offline.LanguageModelFile(Path(sys.argv[2]), context=32768))
print("ready", flush=True)
sys.stdin.readline()
"""


@linux
def test_it_ends_when_its_owner_is_killed_while_the_model_loads(tmp_path: Path, model_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", LOADING, str(tmp_path / "server.log"), str(model_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def servers() -> list[psutil.Process]:
        return psutil.Process(owner.pid).children()

    def loads() -> bool:
        return str(model_path) in Path(f"/proc/{servers()[0].pid}/maps").read_text()

    assert wait_for(lambda: bool(servers()), 60) and wait_for(loads, 60)
    (server,) = servers()
    owner.kill()
    said, _ = owner.communicate()
    assert "ready" not in said
    assert wait_for(lambda: gone(server))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The settings of the small model, also in the environment; its server is stopped afterwards."""
    monkeypatch.setenv("MODEL_PROVIDER", "local")
    monkeypatch.setenv("MODEL_ID", "small")
    models.stop_offline()
    yield Settings(provider="local", model_id="small")
    models.stop_offline()


def test_the_banner_says_how_fast_it_is_and_a_killed_server_is_replaced(
    small: Settings, course_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lesson.show_setup(lesson.workspace("00_some"))
    model, speed, embedder, _ = capsys.readouterr().out.splitlines()
    found = models.connect(small)
    assert model == f"model     {found.chat.model_id} (local)" and "0.5b" in model
    shown = re.fullmatch(
        r" {10}([\d.]+) s to the first token of a short prompt, then (\d+) tokens/s; prompts at (\d+) tokens/s", speed
    )
    assert shown and float(shown[1]) > 0
    assert embedder == "embedder  wordllama-256 (offline), 256 dimensions"
    (server,) = models._servers.values()
    assert server.speed == models.model_speed(small)
    assert server.speed and server.speed.tokens_per_second > 0 and server.speed.prompt_tokens_per_second > 0
    assert int(shown[2]) == round(server.speed.tokens_per_second)

    psutil.Process(server.process.pid).kill()
    assert wait_for(lambda: not server.process.running)
    again = models.connect(small)
    assert again.chat.base_url != found.chat.base_url and again.chat.model_id == found.chat.model_id
    run = Agent(model=models.chat_model(again, max_tokens=5), telemetry=False).run("Say hello.")
    assert run.status == RunStatus.completed
    assert models.embedder(again).get_embedding("it embeds too")


def test_the_metrics_count_and_time_what_was_written(chat: Ask, offline_server: OfflineServer) -> None:
    names = [
        "model_time_to_first_token_seconds_count",
        "model_tokens_per_second_count",
        "model_tokens_per_second_sum",
        "model_tokens_total",
        "model_requests_total",
        "llamacpp:tokens_predicted_total",
    ]

    def read() -> list[float]:
        return [counted(offline_server, name) for name in names]

    before, started = read(), time.monotonic()
    usage = chat(STORY, max_tokens=20).usage
    took = time.monotonic() - started
    firsts, speeds, speed, tokens, requests, predicted = [now - then for now, then in zip(read(), before, strict=True)]
    assert (firsts, speeds, requests) == (1, 1, 1)
    assert (tokens, predicted) == (usage.total_tokens, usage.completion_tokens) and usage.completion_tokens == 20
    assert 19 / took <= speed < 2000
    # An answer that is sent when it is whole says nothing about the speed.
    before = read()
    text_of(chat, STORY, response_format=json_schema(NESTED))
    firsts, speeds, *_ = [now - then for now, then in zip(read(), before, strict=True)]
    assert (firsts, speeds) == (1, 0)


# Tool calls and JSON under a schema

NESTED: Json = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["flat", "hnsw", "ivf"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 7},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "exact": {"type": "boolean"},
        "place": {
            "type": "object",
            "properties": {"host": {"type": "string", "maxLength": 20}, "level": {"$ref": "#/$defs/Level"}},
            "required": ["host", "level"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 2, "maxItems": 3},
        "ids": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 1},
        "size": {"oneOf": [{"const": "small"}, {"const": "large"}]},
    },
    "required": ["kind", "count", "share", "exact", "place", "tags", "ids", "size"],
    "additionalProperties": False,
    "$defs": {"Level": {"type": "string", "enum": ["low", "high"]}},
}
BUILD: Json = {
    "type": "function",
    "function": {"name": "build_index", "description": "Builds an index on a collection.", "parameters": NESTED},
}
BUILD_PLEASE = [user("Build an index of kind hnsw with a count of 5 and 0.5 as its share on host alpha.")]


def test_a_calls_arguments_follow_the_tools_schema(chat: Ask) -> None:
    ((name, arguments),) = calls_of(chat, BUILD_PLEASE, tools=[BUILD], tool_choice="required")
    assert name == "build_index"
    jsonschema_rs.Draft202012Validator(NESTED).validate(arguments)
    assert (arguments["kind"], arguments["count"], arguments["place"]["host"]) == ("hnsw", 5, "alpha")


def test_references_of_several_tools_are_kept_apart(chat: Ask) -> None:
    """Each has another thing under the same name; the model chooses the tool and writes under its schema."""
    tools = []
    for name, values in (("paint_house", ["red", "blue"]), ("paint_boat", ["green", "white"])):
        made = tool(name, f"{name.replace('_', ' ').capitalize()} in a colour.", colour={"$ref": "#/$defs/Colour"})
        made["function"]["parameters"]["$defs"] = {"Colour": {"enum": values}}
        tools.append(made)
    for what, colours in (("house", {"red", "blue"}), ("boat", {"green", "white"})):
        named = {"type": "function", "function": {"name": f"paint_{what}"}}
        ((name, arguments),) = calls_of(chat, [user(f"Paint the {what}.")], tools=tools, tool_choice=named)
        assert name == f"paint_{what}" and arguments["colour"] in colours
    ((name, arguments),) = calls_of(chat, [user("Paint it.")], tools=tools, tool_choice="required")
    assert arguments["colour"] in ({"red", "blue"} if name == "paint_house" else {"green", "white"})


def test_of_tools_for_the_same_end_one_is_called(chat: Ask) -> None:
    web = tool("search_web", "Search the web for news of today.", query="string")
    for question in (PORT_QUESTION, "What is in the news of today?"):
        ((name, arguments),) = calls_of(chat, [user(question)], tools=[SEARCH, web])
        assert name in ("search_knowledge_base", "search_web")
        assert list(arguments) == ["query"] and 0 < len(arguments["query"]) <= 500


def test_ids_that_only_the_policy_knows_are_not_made_up(chat: Ask) -> None:
    members = '<member id="analyst" name="Analyst">Ports</member>\n<member id="writer" name="Writer">Poems</member>'
    delegate = tool("delegate_task_to_member", "Delegates a task.", member_id="string", task="string")
    messages = [system(members), user(PORT_QUESTION)]
    for number, member in enumerate(("analyst", "writer")):
        ((name, arguments),) = calls_of(chat, messages, tools=[delegate])
        assert arguments["member_id"] == member and arguments["task"].strip()
        messages += called(name, arguments, "Port 19530.", number)
    assert calls_of(chat, messages, tools=[delegate]) == []


@pytest.mark.parametrize(
    ("schema", "allowed"),
    [
        ({"type": "string", "minLength": 10**12}, False),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 10**12}, False),
        ({"type": "string", "maxLength": 10**12}, True),
        ({"type": "integer", "minimum": 3, "maximum": 2}, False),
        ({"type": "string", "pattern": "^[a-c]{4}$"}, True),
        ({"type": "string", "pattern": "(?=a)b"}, False),
        ({"not": {}}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["answer", "call"])
def test_a_schema_is_met_or_refused_and_takes_no_memory(
    offline_server: OfflineServer, chat: Ask, schema: Json, allowed: bool, way: str
) -> None:
    root = {"type": "object", "properties": {"value": schema}, "required": ["value"], "additionalProperties": False}
    process = psutil.Process(offline_server.process.pid)
    before, started = process.memory_info().rss, time.monotonic()
    options: Json = {"response_format": json_schema(root)}
    if way == "call":
        set_value = {"name": "set_value", "description": "Sets the value.", "parameters": root}
        options = {"tools": [{"type": "function", "function": set_value}], "tool_choice": "required"}
    if allowed:
        message = chat([user("Set the value to abba.")], **options).choices[0].message
        text = message.content if way == "answer" else message.tool_calls[0].function.arguments
        jsonschema_rs.Draft202012Validator(root).validate(json.loads(text))
    else:
        with pytest.raises(openai.BadRequestError) as error:
            chat([user("Set the value to abba.")], **options)
        assert error.value.param == ("tools" if way == "call" else "response_format")
        assert isinstance(error.value.body, dict) and "\n" not in error.value.body["message"]
        assert time.monotonic() - started < 20
    assert process.memory_info().rss - before < 300e6


class Place(BaseModel, extra="forbid"):
    host: str = Field(max_length=30)
    port: int = Field(ge=1, le=65535)


class Choice(BaseModel, extra="forbid"):
    places: list[Place] = Field(min_length=1, max_length=2)
    kind: str = Field(pattern="^(lite|standalone|distributed)$")
    remark: str | None = Field(max_length=30)


def test_an_answer_follows_its_schema(chat: Ask) -> None:
    for messages in (searched(PORT_QUESTION, BOTH), STORY):
        text = text_of(chat, messages, response_format=json_schema(Choice.model_json_schema()))
        Choice.model_validate_json(text)
        text = text_of(chat, messages, response_format=json_schema(NESTED))
        jsonschema_rs.Draft202012Validator(NESTED).validate(json.loads(text))


def test_a_text_without_end_is_ended(chat: Ask) -> None:
    """Half of a JSON value is of no use, so a text that the schema sets no bound to gets one."""
    schema: Json = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    schema["additionalProperties"] = False
    choice = chat([user("Write the word fox again and again, for ever.")], response_format=json_schema(schema)).choices[
        0
    ]
    assert choice.finish_reason == "stop" and len(json.loads(choice.message.content)["text"]) <= 1000


# A model that calls tools by itself


@pytest.fixture(scope="module")
def native(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """A server that leaves the calls to the model."""
    log = tmp_path_factory.mktemp("native") / "server.log"
    with offline.start(log, model=LanguageModelFile(model_path, 4096, native_tools=True)) as server:
        client, ask = asker(server)
        with client:
            yield ask


def check_reply(chat: Ask, messages: list[Json], tools: list[Json], **options: Any) -> list[str]:
    """The names of the called tools. A reply has valid calls, else a text; streamed, it is the same."""
    options |= {"messages": messages, "tools": tools, "max_tokens": 80}
    chat(**options)  # see test_the_same_request_gets_the_same_bytes
    choice = chat(**options).choices[0]
    calls = choice.message.tool_calls or []
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    for call in calls:
        jsonschema_rs.Draft202012Validator(schemas[call.function.name]).validate(json.loads(call.function.arguments))
    assert calls or choice.message.content
    streamed = [chunk.choices[0] for chunk in chat(**options, stream=True)]
    assert streamed[-1].finish_reason == choice.finish_reason == ("tool_calls" if calls else choice.finish_reason)
    assert "".join(one.delta.content or "" for one in streamed) == (choice.message.content or "")
    arguments = "".join(part.function.arguments for one in streamed for part in one.delta.tool_calls or [])
    assert arguments == "".join(call.function.arguments for call in calls)
    return [call.function.name for call in calls]


MULTIPLY = tool("multiply", "Multiply two whole numbers.", a="integer", b="integer")


@pytest.mark.parametrize(
    "messages",
    [[user("What is 6 times 7? Use the tool.")], [user("Say hello.")], searched(PORT_QUESTION, BOTH)],
    ids=["calculation", "greeting", "searched"],
)
def test_natively_a_request_with_tools_gets_a_text_or_a_valid_call(native: Ask, messages: list[Json]) -> None:
    check_reply(native, messages, [SEARCH, MULTIPLY])
    assert check_reply(native, messages, [SEARCH], tool_choice="none") == []


def test_natively_a_forced_tool_is_a_text_or_a_valid_call(native: Ask) -> None:
    """llama.cpp lets a text come before the forced call, so a small model may end without one."""
    named = {"type": "function", "function": {"name": "multiply"}}
    for tools, choice in (([MULTIPLY], "required"), ([SEARCH, MULTIPLY], named)):
        assert set(check_reply(native, [user("Multiply 6 by 7.")], tools, tool_choice=choice)) <= {"multiply"}


def test_natively_a_bound_takes_no_memory(native: Ask) -> None:
    endless = tool("note", "Takes a note.", text={"type": "string", "minLength": 10**12})
    with pytest.raises(openai.BadRequestError):
        native([user("Take a note.")], tools=[endless])
    assert text_of(native, [user("Say hello.")], max_tokens=5)


# llama.cpp's own server, by its URL

LLAMA = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel = 8192, 2
params.cache_ram_mib, params.verbosity = 0, 1
params.api_keys = ["the-key"]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def llama_url(model_path: Path) -> Iterator[str]:
    """The URL of llama.cpp's own OpenAI-compatible server."""
    server = subprocess.Popen(
        [sys.executable, "-c", LLAMA, str(model_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    yield f"{server.stdout.readline().strip()}/v1"
    server.kill()
    server.communicate()


@pytest.fixture
def compatible(llama_url: str) -> Settings:
    return Settings(provider="compatible", base_url=llama_url, api_key="the-key")


def test_llama_cpps_server_by_its_url(compatible: Settings) -> None:
    found = models.connect(compatible)  # it lists one model, so MODEL_ID is not needed
    assert found.chat.provider == "compatible" and "0.5b" in found.chat.model_id
    assert found.embedding.provider == "offline"
    agent = Agent(model=models.chat_model(found, temperature=0, max_tokens=20), telemetry=False)
    run = agent.run("Say hello.")
    assert run.status == RunStatus.completed and run.content
    pieces = [e.content for e in agent.run("Say hello.", stream=True) if isinstance(e, RunContentEvent) and e.content]
    assert "".join(pieces) == run.content and len(pieces) > 1


def test_llama_cpps_server_refuses_a_wrong_key_and_model(llama_url: str) -> None:
    with pytest.raises(ModelError, match="refuses the key in OPENAI_API_KEY") as key:
        models.connect(Settings(provider="compatible", base_url=llama_url, api_key="wrong"))
    assert_sentence(str(key.value))
    with pytest.raises(ModelError, match="does not know the model 'gpt-4o'; set MODEL_ID to one of") as name:
        models.connect(Settings(provider="compatible", base_url=llama_url, api_key="the-key", model_id="gpt-4o"))
    assert_sentence(str(name.value))


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers."""
    return a * b


def test_agno_on_llama_cpps_server_with_a_tool_and_with_a_schema(compatible: Settings) -> None:
    model = models.chat_model(compatible, temperature=0, max_tokens=100)
    run = Agent(model=model, telemetry=False, tools=[multiply], tool_call_limit=2).run("What is 6 times 7?")
    assert run.status == RunStatus.completed
    assert all(made.tool_name == "multiply" for made in run.tools or [])
    filled = Agent(model=model, telemetry=False, output_schema=Choice).run("Where does Milvus Standalone listen?")
    assert filled.status == RunStatus.completed and isinstance(filled.content, Choice)
