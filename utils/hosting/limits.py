"""What a client may send: a largest body, and uploads of the types that the service can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOADS = ("/knowledge/content", "/knowledge/remote-content")


class BodyTooLarge(Exception):
    """The body went past the limit while it was read."""


class RequestLimits:
    """ASGI middleware that refuses large bodies (413), files of another type (415), and addresses to fetch (403).

    Args:
        app: what it protects.
        limit: of a body, in bytes.
        types: file name endings that may be uploaded, without a dot.

    An upload is read whole before Agno sees it. An upload by address is refused because the service would fetch, from
    inside its network, whatever address a client names.
    """

    def __init__(self, app: ASGIApp, limit: int, types: Sequence[str]) -> None:
        self._app = app
        self._limit = limit
        self._types = tuple(types)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        started = False
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise BodyTooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"")
        try:
            if declared.isdigit() and int(declared) > self._limit:
                raise BodyTooLarge
            if scope["method"] == "POST" and scope["path"].rstrip("/") in UPLOADS:
                body = await _read(counted)
                refusal = await self._refuse_upload(scope, body)
                if refusal is not None:
                    await refusal(scope, receive, send)
                    return
                await self._app(scope, _replay(body, receive), noted)
            else:
                await self._app(scope, counted, noted)
        except BodyTooLarge:
            if started:
                raise
            sentence = f"The request is larger than {self._limit // 2**20} MB, which is the limit: split the document."
            await JSONResponse({"detail": sentence}, 413, {"Connection": "close"})(scope, receive, send)

    async def _refuse_upload(self, scope: Scope, body: bytes) -> JSONResponse | None:
        """The answer to an upload that may not go on, else None."""
        if scope["path"].rstrip("/") != UPLOADS[0]:
            return JSONResponse({"detail": "This service does not fetch documents: send the file itself."}, 403)
        request = Request(scope, _replay(body, _closed))
        try:
            async with request.form() as form:
                return self._examine(form)
        except HTTPException as error:  # python-multipart's own sentence
            return JSONResponse({"detail": str(error.detail)}, error.status_code)

    def _examine(self, form: FormData) -> JSONResponse | None:
        if str(form.get("url") or "").strip():
            return JSONResponse({"detail": "This service does not fetch addresses: send the file itself."}, 403)
        if str(form.get("text_content") or "") and not str(form.get("name") or "").strip():
            return JSONResponse({"detail": "Give the text a name: without one it cannot be told from another."}, 422)
        file = form.get("file")
        if not isinstance(file, UploadFile):
            return None
        ending = PurePath(file.filename or "").suffix.lower().lstrip(".")
        content = file.file.read()
        allowed = ", ".join(self._types)
        if ending not in self._types:
            return JSONResponse({"detail": f"'{file.filename}' is not one of the types {allowed}."}, 415)
        if not file.size:
            return JSONResponse({"detail": f"'{file.filename}' is empty."}, 422)
        if ending == "pdf" and b"%PDF-" not in content[:1024]:
            return JSONResponse({"detail": f"'{file.filename}' is not a PDF file."}, 415)
        if ending != "pdf" and not _is_text(content):
            return JSONResponse({"detail": f"'{file.filename}' is not text: save it as UTF-8."}, 415)
        return None


def _is_text(content: bytes) -> bool:
    try:
        return "\x00" not in content.decode()
    except UnicodeDecodeError:
        return False


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then goes on with the connection."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _closed() -> Message:
    return {"type": "http.disconnect"}
