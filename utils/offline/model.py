"""The engine with a language model: llama.cpp writes the answers and the arguments of the tool calls.

A small model rarely calls a tool of its own accord. So the policy says when a call is due; the model then writes its
arguments, and chooses among tools that serve the same end, under a JSON schema that lets nothing else pass. And a small
model that reads calls and JSON results goes on in JSON, so it is shown what tools returned as text (`_told`). A model
that calls tools well decides for itself and reads the messages as they are (`native_tools`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from utils.offline.answers import parse_passages
from utils.offline.conversation import Conversation
from utils.offline.engine import End, Piece
from utils.offline.grammars import answer_grammar, arguments_schema, call_schema, is_valid, json_grammar, within_bounds
from utils.offline.llama import Llama
from utils.offline.policy import Decision, allowed_tools, due_calls
from utils.offline.protocol import ApiError, ChatRequest, Function, Message, NamedTool, check_chat, schema_validator

Json = dict[str, Any]
_JSON_BEGINS = '{["-0123456789tfn'
# A model that repeats itself would otherwise go on until the context is full.
MAX_ANSWER_TOKENS = 512
MAX_CALL_TOKENS = 512


class LanguageModel:
    """The engine.

    Args:
        name: the model's name in requests and replies.
        llama: the loaded model.
        native_tools: let the model call tools by itself, in the form that it was trained for.
    """

    def __init__(self, name: str, llama: Llama, native_tools: bool = False) -> None:
        self.model, self._llama, self._native = name, llama, native_tools

    async def metrics(self) -> str:
        """llama.cpp's own metrics."""
        return await self._llama.metrics()

    async def reply(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """See Engine."""
        check_chat(request)
        request = within_bounds(request)
        choices = [] if self._native else await run_in_threadpool(_calls_to_make, request)
        if choices:
            read = written = 0
            for alternatives in choices:
                call, usage = await self._call(request, alternatives)
                read, written = max(read, usage["prompt_tokens"]), written + usage["completion_tokens"]
                yield call
            yield End("tool_calls", read, written)
        elif request.response_format is not None and request.response_format.type != "text":
            async for piece in self._json(request):
                yield piece
        else:
            async for piece in self._text(request):
                yield piece

    async def _call(self, request: ChatRequest, alternatives: tuple[Decision, ...]) -> tuple[Decision, Json]:
        """One tool call, written by the model under a schema; and the tokens that it took."""
        tools = {tool.name: tool for tool in allowed_tools(request)}
        schemas = {call.name: arguments_schema(tools[call.name], call) for call in alternatives}
        names = list(schemas)
        first = schemas[names[0]]["properties"]
        if len(names) == 1 and all("const" in wanted for wanted in first.values()):  # nothing to write
            known = {name: wanted["const"] for name, wanted in first.items()}
            return Decision(names[0], known), {"prompt_tokens": 0, "completion_tokens": 0}
        schema = call_schema(tools, schemas)
        asked = _told(request.messages)
        _add(asked, "user", _instruction(tools, alternatives))
        body = _sampling(request) | {"messages": asked, "max_tokens": MAX_CALL_TOKENS}
        text, last = await self._held(body, schema, "tools")
        if _reason(last) != "length":
            call = json.loads(text)
            return Decision(call["name"], call["arguments"]), last["usage"]
        if alternatives[0].arguments:  # it repeats itself; what the policy would ask for is better than no call
            return alternatives[0], last["usage"]
        raise ApiError(f"The model did not finish a call of {', '.join(names)}.", 500, "server_error")

    async def _json(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """An answer in JSON, sent when it is whole and follows its schema."""
        wanted = request.response_format
        assert wanted is not None
        body = self._body(request)
        if wanted.json_schema is None:
            body["response_format"] = {"type": "json_object"}
            text, last = await self._llama.whole(body)
        else:
            text, last = await self._held(body, wanted.json_schema.schema_, "response_format")
        yield text
        yield _end(last)

    async def _held(self, body: Json, schema: Json, where: str) -> tuple[str, Json]:
        """JSON that the model writes under a schema, or the beginning of it if it was cut off; and the last chunk.

        Raises:
            ApiError: llama.cpp could build no grammar of the schema, and went on without one (which only its log says).
        """
        text, last = await self._llama.whole({**body, "grammar": json_grammar(schema, where)}, _JSON_BEGINS)
        if _reason(last) != "length" and not is_valid(text, schema_validator(schema, where)):
            raise ApiError(
                f"Invalid schema in '{where}': this model cannot be held to it. Leave out `not`, and bounds and "
                "patterns that contradict each other.",
                param=where,
            )
        return text, last

    async def _text(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """An answer in words, as they come; with native tools, or calls in their place."""
        body, last = self._body(request), Json()
        calls: dict[int, dict[str, str]] = {}
        if self._native and (tools := allowed_tools(request)):
            forced = request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)
            body |= {
                "tools": [{"type": "function", "function": tool.model_dump()} for tool in tools],
                "tool_choice": "required" if forced else "auto",
                "parallel_tool_calls": request.parallel_tool_calls,
            }
        elif not self._native and request.messages[-1].role == "tool":
            body["grammar"] = answer_grammar(_found_last(request.messages))
        async for chunk in self._llama.stream(body):
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text
                for part in choice["delta"].get("tool_calls") or []:
                    call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
                    for field in call:
                        call[field] += part["function"].get(field) or ""
            last = {**last, **chunk, "choices": chunk["choices"] or last.get("choices", [])}
        for call in calls.values():
            try:
                yield Decision(call["name"], json.loads(call["arguments"] or "{}"))
            except ValueError:
                raise ApiError(f"The model did not finish a call of {call['name']}.", 500, "server_error") from None
        yield _end(last)

    def _body(self, request: ChatRequest) -> Json:
        limit = MAX_ANSWER_TOKENS if request.token_limit is None else request.token_limit
        return _sampling(request) | {
            "messages": _as_they_are(request.messages) if self._native else _told(request.messages),
            "max_tokens": limit,
            "stop": request.stops,
        }


def _calls_to_make(request: ChatRequest) -> list[tuple[Decision, ...]]:
    choices = due_calls(request, Conversation(tuple(request.messages)))
    if not choices and request.tool_choice not in (None, "auto", "none"):  # forced: the model chooses among all of them
        return [tuple(Decision(tool.name, {}) for tool in allowed_tools(request))]
    return choices


def _sampling(request: ChatRequest) -> Json:
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
    return {name: value for name in names if (value := getattr(request, name)) is not None}


def _as_they_are(messages: list[Message]) -> list[Json]:
    """The messages for a model that knows tool calls and their results."""
    made = []
    for message in messages:
        body: Json = {"role": _role(message), "content": message.text()}
        if message.tool_calls:
            body["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        if message.role == "tool":
            body["tool_call_id"] = message.tool_call_id
        made.append(body)
    return made


def _told(messages: list[Message]) -> list[Json]:
    """The messages with the results of tools in the user's words, and the request again behind the last of them."""
    made: list[Json] = []
    names: dict[str, str] = {}
    request = ""
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls or []}
        text = message.text()
        if message.role == "tool":
            name = names.get(str(message.tool_call_id), "The tool")
            _add(made, "user", f"{name} returned:\n\n{_readable(text)}")
        elif text or not message.tool_calls:
            _add(made, _role(message), text)
        request = text if message.role == "user" else request
    if messages[-1].role == "tool":
        cite = ", and end your answer with the ids of the documents that you used in square brackets, like "
        cite = "".join(f"{cite}[{source}]" for source in _found_last(messages)[:1])
        _add(made, "user", f"Now answer my question in whole sentences, as your instructions say{cite}: {request}")
    return made


def _found_last(messages: list[Message]) -> list[str]:
    """Ids of the documents that tools returned since the last request, each once."""
    found: list[str] = []
    for message in messages:
        if message.role == "user":
            found = []
        elif message.role == "tool":
            found += [passage.source for passage in parse_passages(message.text()) if passage.source]
    return list(dict.fromkeys(found))


def _add(made: list[Json], role: str, text: str) -> None:
    """Add a message; one of the role of the last is joined to it, since some models know no two in a row."""
    if made and made[-1]["role"] == role:
        made[-1]["content"] += f"\n\n{text}"
    else:
        made.append({"role": role, "content": text})


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _readable(result: str) -> str:
    """A list of documents as text under their ids; anything else as it is."""
    passages = parse_passages(result)
    if not all(passage.source for passage in passages):
        return result
    return "\n\n".join(f'<document id="{passage.source}">\n{passage.text}\n</document>' for passage in passages)


def _instruction(tools: dict[str, Function], alternatives: tuple[Decision, ...]) -> str:
    described = [f"- {call.name}: {' '.join(tools[call.name].description.split())}" for call in alternatives]
    which = "this function" if len(described) == 1 else "one of these functions"
    about = next((value for value in alternatives[0].arguments.values() if isinstance(value, str)), "")
    lines = [f"Call {which} now. Reply with the call as JSON only.", *described]
    return "\n".join([*lines, f"What it is for: {about}"] if about else lines)


def _reason(last: Json) -> str:
    reasons = [choice["finish_reason"] for choice in last.get("choices", []) if choice.get("finish_reason")]
    return reasons[0] if reasons else "stop"


def _end(last: Json) -> End:
    return End(_reason(last), last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"])
