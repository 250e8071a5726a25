"""Runs as clients and operators need them: a failed one has a failing status, and each leaves a line in the log."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from types import FrameType
from typing import Any

from agno.exceptions import OutputCheckError
from agno.run import RunContext
from agno.run.agent import RunOutput
from agno.run.background import _background_tasks
from agno.run.base import RunStatus
from agno.run.team import TeamRunOutput
from agno.workflow.workflow import _workflow_background_tasks
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.hosting.database import StoredRun, note_failed_writes, note_stored_runs
from utils.hosting.logs import get_ids, log, set_ids
from utils.hosting.metrics import RunMetrics, RunRecord
from utils.milvus_store import InvalidFilter

RUNS = re.compile(r"/(agents|teams|workflows)/([^/]+)/runs(?:/[^/]+/continue)?/?")
# Agno tells the model, and nobody else, that a search failed: the text of the tool's result begins like this.
SEARCH_ERROR = "Error searching knowledge base"
SEARCH_FAILED = "The knowledge base could not be searched."
STORE_SECONDS = 2.0  # in which a run that is cut off is stored as cancelled
# How the events of a stream's own run begin; those of a team's members, for instance, have another prefix.
_EVENTS = {"agent": "Run", "team": "TeamRun", "workflow": "Workflow"}
# Those with text for the client; of a team its leader's, of a workflow those of the agents in its steps.
_CONTENT = {
    "agent": {b"event: RunContent"},
    "team": {b"event: TeamRunContent"},
    "workflow": {b"event: RunContent", b"event: TeamRunContent", b"event: WorkflowCompleted"},
}
_STATUS = {"Completed": "COMPLETED", "Error": "ERROR", "Cancelled": "CANCELLED", "Paused": "PAUSED"}


class SearchFailed(OutputCheckError):
    """A run that needed the knowledge base could not search it, so it has failed."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{SEARCH_FAILED} {reason}")


class MemberFailed(OutputCheckError):
    """A member of a team failed, so the team's run has failed."""


def log_ids(run_context: RunContext) -> None:
    """A pre hook of an agent or a team: every log line of the run carries its ids. A workflow's first step calls it."""
    set_ids(run_id=run_context.run_id, session_id=run_context.session_id, user_id=run_context.user_id)


def require_knowledge(run_output: RunOutput | TeamRunOutput) -> None:
    """A post hook: a run whose search of the knowledge base failed has failed, whatever the model made of it.

    In a team also a member's search counts.

    Raises:
        SearchFailed: a search failed.
    """
    for part in _with_members(run_output):
        for tool in part.tools or []:
            if str(tool.result).startswith(SEARCH_ERROR):
                error = SearchFailed(str(tool.result))
                run_output.content = error.message
                raise error


def require_members(run_output: TeamRunOutput) -> None:
    """A post hook of a team: where a member failed, and not only at its first attempt, the run has failed.

    Agno gives the leader the error's text as the member's answer, and the run completes with what the leader makes of
    it.

    Raises:
        MemberFailed: a member's last run failed.
    """
    parts = run_output.member_responses
    last = {part.agent_id if isinstance(part, RunOutput) else part.team_id: part for part in parts}
    for name, part in last.items():
        if part.status is RunStatus.error:
            run_output.content = f"The member {name} of the team failed. {part.content}"
            raise MemberFailed(run_output.content)


def _with_members(run: RunOutput | TeamRunOutput) -> Iterator[RunOutput | TeamRunOutput]:
    yield run
    for part in run.member_responses if isinstance(run, TeamRunOutput) else []:
        yield from _with_members(part)


def finish_background_runs(app: FastAPI, seconds: float) -> None:
    """Let the background runs of an app end until `seconds` after SIGTERM, then cancel them, which is stored.

    Uvicorn waits for requests only, and Agno 3.1.10 then waits for up to 30 seconds more, whatever an orchestrator
    grants: killed meanwhile, a run would stay RUNNING for ever.
    """
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        told: list[float] = []
        with suppress(ValueError):  # not in the main thread, so there are no signals
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _noting_time(told, signal.getsignal(number)))
        async with inner(app) as state:
            yield state
            runs = {*_background_tasks, *_workflow_background_tasks}
            if runs:
                remaining = min(told, default=time.monotonic()) + seconds - time.monotonic()
                _, late = await asyncio.wait(runs, timeout=max(remaining, STORE_SECONDS))
                for task in late:
                    task.cancel()
                await asyncio.wait(runs, timeout=STORE_SECONDS)

    app.router.lifespan_context = lifespan


def _noting_time(told: list[float], handler: Any) -> Callable[[int, FrameType | None], None]:
    def note(number: int, frame: FrameType | None) -> None:
        told.append(time.monotonic())
        if callable(handler):
            handler(number, frame)

    return note


class RunStatusCodes:
    """ASGI middleware: a run that failed answers 502, or 503 if the knowledge base failed, where Agno answers 200.

    If what failed is the caller's own filter, it is 422. The body stays Agno's: the run with `status`, `content` (what
    went wrong) and `run_id`. For a workflow Agno has no body but 500, so these are made here. A stream has begun with
    200 before its run can fail; its last event is RunError, TeamRunError or WorkflowError. A background run is polled,
    and says it in `status`. Every run is logged with its ids, status, seconds and tokens, and counted.
    """

    def __init__(self, app: ASGIApp, metrics: RunMetrics | None = None) -> None:
        self._app = app
        self._metrics = metrics or RunMetrics({}, enabled=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = RUNS.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        kind, component = found[1].rstrip("s"), found[2]
        record = self._metrics.begin(kind, component)
        watch = _Watch(send, {"kind": kind, "component_id": component}, note_failed_writes(), record)
        note_stored_runs(watch.note_stored)
        try:
            await self._app(scope, receive, watch.send)
        except (OutputCheckError, RuntimeError) as error:  # what a workflow raises if a step fails, or the step's agent
            if found[1] != "workflows" or watch.started:
                raise
            await watch.fail(error)(scope, receive, watch.send)
        finally:
            watch.finish()


class _Watch:
    """What one run answers, on its way to the client."""

    def __init__(self, send: Send, names: dict[str, str], unwritten: set[str], record: RunRecord) -> None:
        self._send = send
        self._names = names
        self._unwritten = unwritten
        self._record = record
        self._stored: dict[str, StoredRun] = {}  # those that ended, by id
        self._over = False
        self._started = time.perf_counter()
        self._start: Message = {}
        self._body = b""
        self._run: dict[str, Any] = {}
        self._last: Message = {}

    @property
    def started(self) -> bool:
        """Whether the answer has begun."""
        return bool(self._start)

    def fail(self, error: Exception) -> JSONResponse:
        """The answer for a workflow's run that raised."""
        ids = {name: value for name, value in get_ids().items() if name in ("run_id", "session_id", "user_id")}
        body = {**ids, "status": "ERROR", "content": str(error)}
        # Of an agent in a step only the text comes here: what require_knowledge made of the tool's result.
        searched = str(error).startswith(SEARCH_FAILED)
        callers = isinstance(error.__cause__, InvalidFilter) or str(error).endswith(InvalidFilter.__name__)
        return JSONResponse(body, 502 if not searched else 422 if callers else 503)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            if not self._is_json():
                await self._send(message)
        elif not self._is_json():
            await self._send_event(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._finish_json()

    def _is_json(self) -> bool:
        return dict(self._start["headers"]).get(b"content-type", b"").startswith(b"application/json")

    async def _finish_json(self) -> None:
        try:
            run = json.loads(self._body)
        except ValueError:
            run = None
        self._run = run if isinstance(run, dict) else {}
        if self._start["status"] == 200 and self._run.get("status") == "ERROR":
            self._start["status"] = self._failure()
        if self._is_unwritten(self._run):
            self._run["stored"] = False
            self._body = json.dumps(self._run).encode()
            MutableHeaders(scope=self._start)["content-length"] = str(len(self._body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": self._body})

    def _failure(self) -> int:
        """The status of a failed run."""
        results = [str(tool.get("result")) for part in _parts(self._run) for tool in part.get("tools") or []]
        searches = [result for result in results if result.startswith(SEARCH_ERROR)]
        # Agno's sentence ends with the error's name; the filter is the caller's own.
        return 502 if not searches else 422 if searches[0].endswith(InvalidFilter.__name__) else 503

    def _is_unwritten(self, run: dict[str, Any]) -> bool:
        return bool(self._unwritten & {run.get("run_id"), run.get("session_id")})

    async def _send_event(self, message: Message) -> None:
        """Pass an event of a stream on. Agno sends one at a time.

        The one that ends the run waits for what follows it: a workflow is written to the database in between.
        """
        if self._last:
            last, self._last = self._last, {}
            if self._is_unwritten(self._run):
                self._run["stored"] = False
                name, _, rest = last["body"].partition(b"data: ")
                event = json.dumps({**json.loads(rest), "stored": False}).encode()
                last["body"] = name + b"data: " + event + b"\n\n"
            await self._send(last)
        if self._note_event(message.get("body", b"")):
            self._last = message
        else:
            await self._send(message)

    def _note_event(self, chunk: bytes) -> bool:
        """Keep the ids from a stream's first event, and what its last one says; whether this is the last one."""
        name, _, rest = chunk.partition(b"\n")
        if name in _CONTENT[self._names["kind"]] and json.loads(rest.partition(b"data: ")[2]).get("content"):
            self._record.show()
        if not name.startswith(b"event: ") or "status" in self._run:
            return False  # after a cancelled run Agno sends RunCompleted too; the first of the two is right
        status = _STATUS.get(name[7:].decode().removeprefix(_EVENTS[self._names["kind"]]))
        if status or not self._run:
            event = json.loads(rest.partition(b"data: ")[2])
            own, other = self._run.get("run_id"), event.get("run_id")
            if own and other and own != other:
                return False  # a team within the team
            self._run = event
            if status:
                self._run["status"] = status
        return status is not None

    def note_stored(self, run: StoredRun) -> None:
        """A run was stored: one that goes on after its request ends with that."""
        if run.run_id and run.status.value in _STATUS.values():
            self._stored[run.run_id] = run
            if self._over:
                self._end_as_stored()

    def finish(self) -> None:
        """The request is over: log the run and count it, unless it goes on."""
        self._write_log()
        self._over = True
        # Agno numbers the events of a background run's stream, which its client may leave and come back to.
        status = self._run.get("status")
        if status == "PENDING" or (status is None and "event_index" in self._run):
            self._end_as_stored()
        else:
            self._count(self._run)

    def _end_as_stored(self) -> None:
        run = self._stored.get(self._run.get("run_id", ""))
        if run is not None:
            self._count(run.to_dict())

    def _count(self, run: dict[str, Any]) -> None:
        tokens = (_tokens(run, "input_tokens"), _tokens(run, "output_tokens"))
        self._record.end(run.get("status"), self._start.get("status"), tokens, str(run.get("content") or ""))

    def _write_log(self) -> None:
        """One line for the run, however it ended; without a status if it was refused or the client went away."""
        run = self._run
        failed = run.get("status") == "ERROR"
        (log.error if failed or "stored" in run else log.info)(
            "run",
            **self._names,
            **{name: run[name] for name in ("run_id", "session_id", "user_id") if run.get(name)},
            status=run.get("status"),
            http_status=self._start.get("status"),
            seconds=round(time.perf_counter() - self._started, 3),
            input_tokens=_tokens(run, "input_tokens"),
            output_tokens=_tokens(run, "output_tokens"),
            **({"stored": False} if "stored" in run else {}),
            **({"error": str(run.get("content") or run.get("error"))[:500]} if failed else {}),
        )


def _parts(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A run as JSON, and the runs of a team's members and of the agents and teams in a workflow's steps."""
    yield run
    for name in ("member_responses", "step_executor_runs"):
        for part in run.get(name) or []:
            yield from _parts(part)


def _tokens(run: dict[str, Any], name: str) -> int | None:
    """How many there were in all: Agno's figure for a team is that of its leader alone."""
    counts = [(part.get("metrics") or {}).get(name) for part in _parts(run)]
    return sum(count or 0 for count in counts) if any(counts) else None
