"""What a client may send: a largest body, and uploads of the types that the service can read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePath

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = "/knowledge/content"
# A refresh fetches the address, or opens the file of this machine, that is in metadata which its caller can change.
FETCHES = re.compile(r"/knowledge/(remote-content|content/[^/]+/refresh)")
LONGEST_NAME = 255  # characters, as of a file
UNSTORABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # PostgreSQL takes no NUL, nothing takes half a character
LARGEST_METADATA = 32_000  # bytes; it is stored with each chunk, where Milvus takes 65,535


class BodyTooLarge(Exception):
    """The body went past the limit while it was read."""


class Refused(Exception):
    """An upload that may not go on: the status and the sentence of the answer."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


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
        started = too_large = False
        read = 0

        async def counted() -> Message:
            nonlocal read, too_large
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                too_large = True
                raise BodyTooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if too_large and not started:
                raise BodyTooLarge  # FastAPI makes a 400 of whatever a form's body raises
            started = True
            await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"")
        path = scope["path"].rstrip("/")
        try:
            if declared.isdigit() and int(declared) > self._limit:
                raise BodyTooLarge
            if FETCHES.fullmatch(path):
                raise Refused(403, "This service does not fetch documents: send the file itself.")
            if path == UPLOAD and scope["method"] == "POST":
                body = await _read(counted)
                await self._examine(Request(scope, _replay(body, _closed)))
                await self._app(scope, _replay(body, receive), noted)
            else:
                await self._app(scope, counted, noted)
        except Refused as error:
            await JSONResponse({"detail": str(error)}, error.status)(scope, receive, send)
        except BodyTooLarge:
            if started:
                raise
            sentence = f"The request is larger than {self._limit // 2**20} MB, which is the limit: split the document."
            await JSONResponse({"detail": sentence}, 413, {"Connection": "close"})(scope, receive, send)

    async def _examine(self, request: Request) -> None:
        """Raise Refused unless the upload may go on."""
        try:
            async with request.form() as form:
                if _text(form, "url"):
                    raise Refused(403, "This service does not fetch addresses: send the file itself.")
                _examine_metadata(_text(form, "metadata"))
                name, text, file = _text(form, "name"), _text(form, "text_content"), form.get("file")
                if text and not name:
                    raise Refused(422, "Give the text a name: without one it cannot be told from another.")
                if isinstance(file, UploadFile):
                    self._examine_file(file.filename or "", file.file.read())
                    name = name or file.filename or ""
                if len(name) > LONGEST_NAME or UNSTORABLE.search(name):
                    raise Refused(422, f"A name has up to {LONGEST_NAME} characters and no control characters.")
        except HTTPException as error:  # python-multipart's own sentence
            raise Refused(error.status_code, str(error.detail)) from None

    def _examine_file(self, name: str, content: bytes) -> None:
        ending = PurePath(name).suffix.lower().lstrip(".")
        name = repr(name[:LONGEST_NAME])
        if ending not in self._types:
            raise Refused(415, f"{name} is not one of the types {', '.join(self._types)}.")
        if not content.strip():
            raise Refused(422, f"{name} is empty.")
        if ending == "pdf" and b"%PDF-" not in content[:1024]:
            raise Refused(415, f"{name} is not a PDF file.")
        if ending != "pdf" and not _is_text(content):
            raise Refused(415, f"{name} is not text: save it as UTF-8.")


def _text(form: FormData, field: str) -> str:
    """A field of the form without the space around it; "" if it is not there."""
    return str(form.get(field) or "").strip()


def _examine_metadata(value: str) -> None:
    if not value:
        return
    try:
        metadata = json.loads(value)
        size = len(json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):  # no JSON; a number that is none, or half a character, which nothing can store
        metadata = None
    if not isinstance(metadata, dict) or "_agno" in metadata:  # under which Agno keeps its own
        raise Refused(422, 'metadata is not a JSON object of your own, such as {"topic": "backup"}.')
    if size > LARGEST_METADATA:
        raise Refused(422, f"metadata is larger than {LARGEST_METADATA:,} bytes.")


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
