"""The HTTP side of the offline server: OpenAI's routes over the engine."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from utils.offline import CHAT_MODEL, DIMENSIONS, EMBEDDING_MODEL, RERANK_MODEL
from utils.offline.answers import relevance
from utils.offline.engine import Completion, complete
from utils.offline.protocol import (
    MAX_BATCH,
    MAX_INPUT_TOKENS,
    ApiError,
    ChatRequest,
    EmbeddingRequest,
    RerankRequest,
    parse,
)
from utils.offline.text import embed, token_ids

EMBEDDING_SIZES = (64, 128, 256)
MODELS = (CHAT_MODEL, EMBEDDING_MODEL, RERANK_MODEL)
# The same request gets the same bytes, so the creation time is a constant (2026-01-01).
_CREATED = 1_767_225_600


def create_app(api_key: str, tokens_per_second: int = 0) -> Starlette:
    """The application.

    Args:
        api_key: every route but /health asks for `Authorization: Bearer <api_key>`.
        tokens_per_second: how fast answers are given out, as a model that thinks would; 0 for at once.
    """

    async def paced(completion: Completion, usage: bool) -> AsyncIterator[str]:
        for event in _events(completion, usage):
            yield event
            if tokens_per_second:
                await asyncio.sleep(1 / tokens_per_second)

    def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise ApiError("Incorrect API key provided.", status=401, code="invalid_api_key")

    async def models(request: Request) -> Response:
        authorize(request)
        return JSONResponse({"object": "list", "data": [_model_body(name) for name in MODELS]})

    async def model(request: Request) -> Response:
        authorize(request)
        name = request.path_params["name"]
        _check_model(name, MODELS)
        return JSONResponse(_model_body(name))

    async def chat(request: Request) -> Response:
        authorize(request)
        asked = parse(ChatRequest, await request.body())
        _check_model(asked.model, (CHAT_MODEL,))
        completion = await run_in_threadpool(complete, asked)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(paced(completion, usage), media_type="text/event-stream")
        if tokens_per_second:
            await asyncio.sleep(completion.completion_tokens / tokens_per_second)
        return JSONResponse(_chat_body(completion))

    async def embeddings(request: Request) -> Response:
        authorize(request)
        asked = parse(EmbeddingRequest, await request.body())
        _check_model(asked.model, (EMBEDDING_MODEL,))
        return JSONResponse(await run_in_threadpool(_embeddings_body, asked))

    async def rerank(request: Request) -> Response:
        authorize(request)
        asked = parse(RerankRequest, await request.body())
        _check_model(asked.model, (RERANK_MODEL,))
        return JSONResponse(await run_in_threadpool(_rerank_body, asked))

    return Starlette(
        routes=[
            Route("/health", _health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/v1/rerank", rerank, methods=["POST"]),
        ],
        exception_handlers={ApiError: _api_error, 404: _unknown_url, 405: _unknown_url, 500: _failed},
    )


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "models": MODELS})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status)


async def _unknown_url(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = (
        f"Unknown request URL: {request.method} {request.url.path}. This server has POST /v1/chat/completions, "
        "POST /v1/embeddings, POST /v1/rerank, GET /v1/models and GET /health."
    )
    return JSONResponse(ApiError(message, code="unknown_url").body, status_code=status)


async def _failed(request: Request, error: Exception) -> Response:
    message = "The server had an error while processing your request; its log file has the details."
    return JSONResponse(ApiError(message, kind="server_error").body, status_code=500)


def _check_model(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ApiError(
            f"The model '{name}' does not exist. This route knows: {', '.join(known)}.",
            status=404,
            param="model",
            code="model_not_found",
        )


def _model_body(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _CREATED, "owned_by": "offline"}


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _tool_calls(completion: Completion) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{completion.id}{number:02d}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for number, call in enumerate(completion.calls)
    ]


def _chat_body(completion: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if completion.calls else completion.text,
        "refusal": None,
    }
    if completion.calls:
        message["tool_calls"] = _tool_calls(completion)
    return {
        "id": f"chatcmpl-{completion.id}",
        "object": "chat.completion",
        "created": _CREATED,
        "model": CHAT_MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": completion.finish_reason, "logprobs": None}],
        "usage": _usage(completion.prompt_tokens, completion.completion_tokens),
    }


def _events(completion: Completion, include_usage: bool) -> Iterator[str]:
    """Server-sent events: the role, the answer word by word or the calls (name, then arguments in pieces), the end."""

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        body = {
            "id": f"chatcmpl-{completion.id}",
            "object": "chat.completion.chunk",
            "created": _CREATED,
            "model": CHAT_MODEL,
        }
        # Escaped to ASCII: some clients also end a line at U+2028 and the like.
        return f"data: {json.dumps({**body, 'choices': choices, **more})}\n\n"

    def delta(content: dict[str, Any], reason: str | None = None) -> str:
        more = {"usage": None} if include_usage else {}
        return chunk([{"index": 0, "delta": content, "finish_reason": reason, "logprobs": None}], **more)

    yield delta({"role": "assistant", "content": None if completion.calls else ""})
    for number, call in enumerate(_tool_calls(completion)):
        arguments = call["function"]["arguments"]
        yield delta(
            {"tool_calls": [{"index": number, **call, "function": {"name": call["function"]["name"], "arguments": ""}}]}
        )
        for piece in re.findall(r"\S+\s*|\s+", arguments):
            yield delta({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})
    for piece in re.findall(r"\S+\s*|\s+", completion.text):
        yield delta({"content": piece})
    yield delta({}, completion.finish_reason)
    if include_usage:
        yield chunk([], usage=_usage(completion.prompt_tokens, completion.completion_tokens))
    yield "data: [DONE]\n\n"


def _embeddings_body(asked: EmbeddingRequest) -> dict[str, Any]:
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    if not texts or len(texts) > MAX_BATCH:
        raise ApiError(f"Invalid 'input': expected 1 to {MAX_BATCH} texts, got {len(texts)}.", param="input")
    counts = [len(token_ids(text)) for text in texts]
    if 0 in counts:
        raise ApiError("Invalid 'input': input cannot be an empty string.", param="input")
    if max(counts) > MAX_INPUT_TOKENS:
        raise ApiError(
            f"This model's maximum context length is {MAX_INPUT_TOKENS} tokens, "
            f"however you requested {max(counts)} tokens.",
            param="input",
            code="context_length_exceeded",
        )
    size = DIMENSIONS if asked.dimensions is None else asked.dimensions
    if size not in EMBEDDING_SIZES:
        raise ApiError(
            f"Invalid value for 'dimensions': {size}. This model has {', '.join(map(str, EMBEDDING_SIZES))}.",
            param="dimensions",
        )
    vectors = embed(texts, size)
    data = [
        {
            "object": "embedding",
            "index": number,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if asked.encoding_format == "base64"
            else vector.tolist(),
        }
        for number, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": EMBEDDING_MODEL,
        "usage": {"prompt_tokens": sum(counts), "total_tokens": sum(counts)},
    }


def _rerank_body(asked: RerankRequest) -> dict[str, Any]:
    scores = relevance(asked.query, asked.documents)
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])[: asked.top_n]
    results = [
        {
            "index": i,
            "relevance_score": scores[i],
            **({"document": {"text": asked.documents[i]}} if asked.return_documents else {}),
        }
        for i in ranked
    ]
    return {
        "model": RERANK_MODEL,
        "results": results,
        "usage": {"total_tokens": sum(len(token_ids(text)) for text in (asked.query, *asked.documents))},
    }
