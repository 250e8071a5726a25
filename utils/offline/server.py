"""The HTTP side of the offline server: OpenAI's routes over an engine, and what they measure."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from utils.offline import DIMENSIONS, EMBEDDING_MODEL, RERANK_MODEL
from utils.offline.answers import relevance
from utils.offline.engine import End, Engine, Piece
from utils.offline.meter import Meter
from utils.offline.policy import Decision
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
# The same request gets the same bytes, so the creation time is a constant (2026-01-01).
_CREATED = 1_767_225_600
_Result = TypeVar("_Result")


def create_app(api_key: str, engine: Engine) -> Starlette:
    """The application.

    Args:
        api_key: every route but /health and /metrics asks for `Authorization: Bearer <api_key>`.
        engine: answers the chat requests.
    """
    known = (engine.model, EMBEDDING_MODEL, RERANK_MODEL)
    meter = Meter()

    def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise ApiError("Incorrect API key provided.", status=401, code="invalid_api_key")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "models": known})

    async def metrics(request: Request) -> Response:
        return Response(meter.text() + await engine.metrics(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        authorize(request)
        return JSONResponse({"object": "list", "data": [_model_body(name) for name in known]})

    async def model(request: Request) -> Response:
        authorize(request)
        name = request.path_params["name"]
        _check_model(name, known)
        return JSONResponse(_model_body(name))

    async def chat(request: Request) -> Response:
        authorize(request)
        asked = parse(ChatRequest, await request.body())
        _check_model(asked.model, (engine.model,))
        pieces = meter.measured(engine.reply(asked))
        if not asked.stream:
            return JSONResponse(_chat_body(asked, await _unless_gone(request, _all_of(pieces))))
        first = await _unless_gone(
            request, _first_of(pieces)
        )  # an error before the first piece has a status of its own
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(_events(asked, first, pieces, usage), media_type="text/event-stream")

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
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/v1/rerank", rerank, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _api_error,
            ClientDisconnect: _nobody_waits,
            404: _unknown_url,
            405: _unknown_url,
            500: _failed,
        },
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status)


async def _nobody_waits(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # as nginx logs it; nobody reads it


async def _unknown_url(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = (
        f"Unknown request URL: {request.method} {request.url.path}. This server has POST /v1/chat/completions, "
        "POST /v1/embeddings, POST /v1/rerank, GET /v1/models, GET /health and GET /metrics."
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


async def _first_of(pieces: AsyncIterator[Piece]) -> Piece:
    return await anext(pieces)


async def _all_of(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is given up when the client hangs up: a language model would go on for nobody."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _tool_call(asked: ChatRequest, number: int, call: Decision) -> dict[str, Any]:
    return {
        "id": f"call_{asked.identity}{number:02d}",
        "type": "function",
        "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
    }


def _chat_body(asked: ChatRequest, pieces: list[Piece]) -> dict[str, Any]:
    calls = [piece for piece in pieces if isinstance(piece, Decision)]
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    end = pieces[-1]
    assert isinstance(end, End)
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = [_tool_call(asked, number, call) for number, call in enumerate(calls)]
    return {
        "id": f"chatcmpl-{asked.identity}",
        "object": "chat.completion",
        "created": _CREATED,
        "model": asked.model,
        "choices": [{"index": 0, "message": message, "finish_reason": end.finish_reason, "logprobs": None}],
        "usage": _usage(end.prompt_tokens, end.completion_tokens),
    }


async def _events(
    asked: ChatRequest, first: Piece, others: AsyncIterator[Piece], include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the role, the text in pieces or the calls (name, then arguments in pieces), the end."""

    def event(body: dict[str, Any]) -> str:
        # Escaped to ASCII: some clients also end a line at U+2028 and the like.
        return f"data: {json.dumps(body)}\n\n"

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        kind = {"id": f"chatcmpl-{asked.identity}", "object": "chat.completion.chunk", "created": _CREATED}
        return event({**kind, "model": asked.model, "choices": choices, **more})

    def delta(content: dict[str, Any], reason: str | None = None) -> str:
        more = {"usage": None} if include_usage else {}
        return chunk([{"index": 0, "delta": content, "finish_reason": reason, "logprobs": None}], **more)

    yield delta({"role": "assistant", "content": None if isinstance(first, Decision) else ""})
    piece, number = first, 0
    try:
        while not isinstance(piece, End):
            if isinstance(piece, str):
                yield delta({"content": piece})
            else:
                call = _tool_call(asked, number, piece)
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                yield delta({"tool_calls": [{"index": number, **call, "function": {"name": name, "arguments": ""}}]})
                for part in re.findall(r"\S+\s*|\s+", arguments):
                    yield delta({"tool_calls": [{"index": number, "function": {"arguments": part}}]})
                number += 1
            piece = await anext(others)
    except ApiError as error:  # too late for a status
        yield event(error.body)
        return
    yield delta({}, piece.finish_reason)
    if include_usage:
        yield chunk([], usage=_usage(piece.prompt_tokens, piece.completion_tokens))
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
