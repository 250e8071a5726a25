"""The part of OpenAI's HTTP API that the offline server speaks: request models, checks, errors.

Source: OpenAI's API reference for /v1/chat/completions, /v1/embeddings and /v1/models. A field that changes nothing for
a deterministic engine (temperature, seed, user, ...) is accepted and has no effect; a field that would need another
engine (n > 1, logprobs, audio) is refused, as is a field that OpenAI does not know.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, TypeVar

import jsonschema_rs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Body = TypeVar("_Body", bound=BaseModel)

MAX_BATCH = 2048
MAX_INPUT_TOKENS = 8192
CONTEXT_TOKENS = 131_072


class ApiError(Exception):
    """An error to be sent in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class FunctionCall(_Open):
    """Name and JSON-encoded arguments of a call."""

    name: str
    arguments: str


class ToolCall(_Open):
    """A call that an assistant message made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Open):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        """The message's text; parts of a list are joined by line breaks."""
        if isinstance(self.content, list):
            return "\n".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


class Function(_Open):
    """A function the model may call; `parameters` is a JSON schema of type object."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(_Strict):
    """A tool offered to the model."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    """The name inside a forced tool choice."""

    name: str


class NamedTool(_Strict):
    """A forced tool choice."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Strict):
    """The schema that an answer must follow."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Strict):
    """Text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Strict):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """Body of POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = Field(default=None, min_length=1, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    # These have an effect with a language model only: the extractive engine does not sample.
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    logit_bias: dict[str, float] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def canonical(self) -> str:
        """The request as text; whether it is streamed makes no difference to it."""
        return self.model_dump_json(exclude={"stream", "stream_options"})

    @property
    def identity(self) -> str:
        """24 hexadecimal digits; the same request has the same."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:24]

    @property
    def token_limit(self) -> int | None:
        """The smaller of max_tokens and max_completion_tokens, if any."""
        return min((n for n in (self.max_tokens, self.max_completion_tokens) if n is not None), default=None)

    @property
    def stops(self) -> list[str]:
        """The stop sequences as a list without empty ones."""
        return [s for s in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if s]


class EmbeddingRequest(_Strict):
    """Body of POST /v1/embeddings."""

    model: str
    input: str | list[str]
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class RerankRequest(_Strict):
    """Body of POST /v1/rerank, in the form that Jina, Cohere, vLLM and llama.cpp share (OpenAI has no such route)."""

    model: str
    query: str = Field(min_length=1)
    documents: list[str] = Field(min_length=1, max_length=MAX_BATCH)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False


def parse(kind: type[_Body], body: bytes) -> _Body:
    """Read a request body.

    Raises:
        ApiError: the body is not JSON or not of the form of `kind`; `param` names the first wrong field.
    """
    try:
        data = json.loads(body)
        # What Python reads but JSON does not know: NaN, infinity, half of a surrogate pair.
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ApiError("We could not parse the JSON body of your request.") from None
    if not isinstance(data, dict):
        raise ApiError("The JSON body of your request must be an object.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        param = ".".join(path[: 4 if kind is ChatRequest else 1])
        if first["type"] == "missing":
            raise ApiError(
                f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            ) from None
        if first["type"] == "extra_forbidden":
            raise ApiError(
                f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter"
            ) from None
        raise ApiError(f"Invalid value for '{param}': {first['msg']}.", param=param, code="invalid_value") from None


def check_chat(request: ChatRequest) -> None:
    """Check what the form of the fields alone does not say.

    Raises:
        ApiError: a tool message without its call, a call without its result, a part that is not text, a forced tool
            that is not offered, too many stop sequences, an invalid schema, or `json_object` without the word JSON in a
            message.
    """
    waiting: set[str] = set()
    for number, message in enumerate(request.messages):
        where = f"messages.{number}"
        if isinstance(message.content, list):
            for part in message.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ApiError(
                        f"Invalid content part in '{where}': this server reads text parts only.",
                        param=where,
                        code="invalid_value",
                    )
        if message.role == "tool":
            if message.tool_call_id not in waiting:
                raise ApiError(
                    f"Invalid parameter: messages with role 'tool' must be a response to a preceding message "
                    f"with 'tool_calls' ('{where}').",
                    param=where,
                )
            waiting.discard(message.tool_call_id)
            continue
        if waiting:
            raise ApiError(
                "An assistant message with 'tool_calls' must be followed by tool messages responding to "
                "each 'tool_call_id'. "
                f"The following tool_call_ids did not have response messages: {', '.join(sorted(waiting))}",
                param=where,
            )
        if message.role == "assistant":
            waiting = {call.id for call in message.tool_calls or []}
        elif message.content is None:
            raise ApiError(
                f"Missing required parameter: '{where}.content'.",
                param=f"{where}.content",
                code="missing_required_parameter",
            )
    if waiting:
        raise ApiError(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to "
            "each 'tool_call_id'. "
            f"The following tool_call_ids did not have response messages: {', '.join(sorted(waiting))}",
            param="messages",
        )
    offered = {tool.function.name for tool in request.tools or []}
    for tool in request.tools or []:
        schema_validator(tool.function.parameters, f"tools.{tool.function.name}.parameters")
    if request.tool_choice is not None and not offered:
        raise ApiError(
            "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
            param="tool_choice",
        )
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in offered:
        raise ApiError(
            f"Invalid value for 'tool_choice': '{request.tool_choice.function.name}' is not one of the tools.",
            param="tool_choice",
        )
    if len(request.stops) > 4:
        raise ApiError(
            "Invalid 'stop': array too long. Expected at most 4 sequences.", param="stop", code="array_above_max_length"
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    _check_response_format(request)


def _check_response_format(request: ChatRequest) -> None:
    wanted = request.response_format
    if wanted is None:
        return
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise ApiError(
                "Missing required parameter: 'response_format.json_schema'.",
                param="response_format.json_schema",
                code="missing_required_parameter",
            )
        schema = wanted.json_schema.schema_
        schema_validator(schema, "response_format.json_schema.schema")
        if wanted.json_schema.strict and (
            schema.get("type") != "object" or schema.get("additionalProperties") is not False
        ):
            raise ApiError(
                f"Invalid schema for response_format '{wanted.json_schema.name}': a strict schema needs "
                '"type": "object" and "additionalProperties": false at its root.',
                param="response_format",
            )
    elif wanted.type == "json_object" and not any("json" in message.text().lower() for message in request.messages):
        raise ApiError(
            "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.",
            param="messages",
        )


def schema_validator(schema: dict[str, Any], where: str) -> jsonschema_rs.Draft202012Validator:
    """A validator for a JSON schema; `where` is the request's field, for the error.

    Raises:
        ApiError: it is no JSON schema, nested too deeply, or has a reference that leads nowhere or out of it.
    """
    try:
        return jsonschema_rs.Draft202012Validator(schema, retriever=_refuse)
    except ValueError as error:
        problem = getattr(error, "message", str(error))
        raise ApiError(f"Invalid schema in '{where}': {problem[:200]}", param=where.split(".")[0]) from None


def _refuse(uri: str) -> None:
    """Nothing is fetched: a request must not make this server open an address."""
    raise ValueError(f"the reference {uri} leads out of the schema")
