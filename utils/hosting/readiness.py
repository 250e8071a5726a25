"""`GET /ready`: whether the database, Milvus and the model answer, asked for real. Agno's /health asks nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import httpx
from agno.vectordb.base import VectorDb
from fastapi import APIRouter, Response
from pydantic import BaseModel
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from utils.errors import CourseError
from utils.hosting.database import DatabaseError
from utils.models import Endpoint, Models

Probe = Callable[[], Awaitable[None]]
PROBE_SECONDS = 3.0
# A balancer and an orchestrator ask every second or so, and each worker of each replica would ask the model.
KEPT_SECONDS = 2.0


class NotReady(CourseError):
    """A part that the service needs does not answer."""


class Check(BaseModel):
    """One part: whether it answers, within how many milliseconds, and if not, what is wrong."""

    ok: bool
    ms: float
    error: str | None = None


class Readiness(BaseModel):
    """The answer of /ready."""

    status: Literal["ready", "not ready"]
    checks: dict[str, Check]


def database_probe(engine: Engine) -> Probe:
    """Asks the database for one row."""

    def ask() -> None:
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
        except DatabaseError as error:
            raise NotReady(str(error)) from None
        except SQLAlchemyError as error:
            raise NotReady(f"The database does not answer ({type(error).__name__}).") from None

    return lambda: asyncio.to_thread(ask)


def milvus_probe(store: VectorDb) -> Probe:
    """Asks Milvus for the collection."""

    def ask() -> None:
        try:
            found = store.exists()
        except ValueError as error:  # a MilvusStoreError, which is one sentence
            raise NotReady(f"Milvus does not answer: {error}") from None
        if not found:
            raise NotReady("The collection is gone from Milvus: restart the service, then upload the documents again.")

    return lambda: asyncio.to_thread(ask)


def model_probe(models: Models) -> Probe:
    """Asks each model server for its list of models, which costs nothing."""

    # Made once: it reads all certificates, which takes 17 ms in which no request goes on.
    client = httpx.AsyncClient(timeout=PROBE_SECONDS)

    async def ask(endpoint: Endpoint) -> None:
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        try:
            response = await client.get(f"{endpoint.base_url}/models", headers=headers)
        except httpx.HTTPError as error:
            raise NotReady(
                f"The model server at {endpoint.base_url} does not answer ({type(error).__name__}): start it."
            ) from None
        if response.status_code != 200:
            raise NotReady(f"The model server at {endpoint.base_url} answers with status {response.status_code}.")
        if endpoint.model_id not in response.text:
            raise NotReady(f"The model server at {endpoint.base_url} no longer has the model '{endpoint.model_id}'.")

    async def ask_all() -> None:
        await asyncio.gather(*(ask(endpoint) for endpoint in {models.chat, models.embedding}))

    return ask_all


class _LastAnswer:
    """Runs one probe at a time and keeps its answer for a moment."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._running: asyncio.Task[Check] | None = None
        self._until = 0.0

    async def get(self) -> Check:
        """The answer; after PROBE_SECONDS without one, a Check that says so, while the probe goes on."""
        if self._running is None or (self._running.done() and time.monotonic() > self._until):
            self._running = asyncio.create_task(self._run())
        try:
            return await asyncio.wait_for(asyncio.shield(self._running), PROBE_SECONDS)
        except TimeoutError:
            return Check(ok=False, ms=PROBE_SECONDS * 1000, error=f"No answer within {PROBE_SECONDS:.0f} seconds.")

    async def _run(self) -> Check:
        started = time.perf_counter()
        error = None
        try:
            await self._probe()
        except NotReady as found:
            error = str(found)
        self._until = time.monotonic() + KEPT_SECONDS
        return Check(ok=error is None, ms=round((time.perf_counter() - started) * 1000, 1), error=error)


def readiness_router(probes: Mapping[str, Probe]) -> APIRouter:
    """The route /ready.

    Args:
        probes: what to ask, by the name that the answer gives it.
    """
    router = APIRouter(tags=["Health"])
    answers = {name: _LastAnswer(probe) for name, probe in probes.items()}
    unready: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "A part does not answer"}}

    @router.get("/ready", operation_id="ready", summary="Whether every part answers", responses=unready)
    async def ready(response: Response) -> Readiness:
        found = await asyncio.gather(*(answer.get() for answer in answers.values()))
        checks = dict(zip(answers, found, strict=True))
        if all(check.ok for check in found):
            return Readiness(status="ready", checks=checks)
        response.status_code = 503
        return Readiness(status="not ready", checks=checks)

    return router
