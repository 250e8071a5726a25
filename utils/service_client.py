"""A client of an AgentOS service: its routes, its errors as sentences, and what a streamed run has told so far.

The console (utils/widgets.py) is made on it. It knows nothing of Agno but the routes and the events.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import SSEError, connect_sse

from utils.errors import CourseError

Json = dict[str, Any]
# The events that end a run, and its status then.
ENDS = {"RunCompleted": "completed", "RunCancelled": "cancelled", "RunPaused": "paused"}
ENDS |= {"RunError": "failed", "error": "failed"}
# What reading an answer raises that is a web page, or JSON of another shape.
NOT_AGENTOS = (AttributeError, KeyError, SSEError, TypeError, ValueError)


class ServiceError(CourseError):
    """The service cannot be reached or refuses a request, or a run failed."""


@dataclass
class Span:
    """A model request, a tool call or a workflow's step, in seconds since the question was sent.

    `end` is None until it has ended.
    """

    label: str
    kind: str
    start: float
    end: float | None = None


@dataclass
class Run:
    """What a streamed run has told so far: `add` takes in the events of `ServiceClient.stream`.

    Attributes:
        status: "running", "completed", "failed", "cancelled", "paused" or "incomplete".
        text: the answer as far as it has come; error: why the run failed; doing: what it does now.
        sources: names of the documents that the searches found.
        spans: model requests, tool calls and a workflow's steps.
        first_event, first_token, seconds: when the first event, the first visible text and the last event came.
        reported: the service's own `time_to_first_token`, in seconds.
    """

    question: str = ""
    status: str = "running"
    run_id: str = ""
    text: str = ""
    error: str = ""
    doing: str = "asking"
    sources: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    first_event: float | None = None
    first_token: float | None = None
    seconds: float = 0.0
    reported: float | None = None
    _texts: dict[str, str] = field(default_factory=dict)
    _open: dict[str, Span] = field(default_factory=dict)

    def add(self, seconds: float, data: Json) -> None:
        """Take in one event, whether an agent sent it, a team (TeamRunContent) or a workflow (WorkflowCompleted)."""
        name = str(data.get("event")).removeprefix("Team").replace("Workflow", "Run", 1)
        self.run_id = self.run_id or data.get("run_id") or ""
        self.seconds, self.first_event = seconds, seconds if self.first_event is None else self.first_event
        run_id, tool = data.get("run_id") or self.run_id, data.get("tool") or {}
        nested = run_id != self.run_id  # a team's member or a workflow's step
        who = f"{data.get('agent_name') or data.get('team_name') or 'member'}: " if nested else ""
        key = str(tool.get("tool_call_id") or run_id)
        self.sources += [found for found in source_names(data) if found not in self.sources]
        if name in ("ModelRequestStarted", "ToolCallStarted"):
            label = f"{who}{tool.get('tool_name', 'model')}"
            self.doing = f"{who}{'calling ' + str(tool['tool_name']) if tool else 'waiting for the model'}"
            self._open[key] = Span(label, "tool" if tool else "model", seconds)
            self.spans.append(self._open[key])
        elif name in ("ModelRequestCompleted", "ToolCallCompleted", "ToolCallError"):
            self.input_tokens += data.get("input_tokens") or 0
            self.output_tokens += data.get("output_tokens") or 0
            if key in self._open:
                self._open.pop(key).end = seconds
        elif name == "StepStarted":
            self.doing = f"at the step {data.get('step_name')}"
            self._open[f"step {data.get('step_id')}"] = Span(f"step: {data.get('step_name')}", "step", seconds)
            self.spans.append(self._open[f"step {data.get('step_id')}"])
        elif name in ("StepCompleted", "StepError"):
            if step := self._open.pop(f"step {data.get('step_id')}", None):
                step.end = seconds
        elif name == "RunContent" and data.get("content"):
            self.doing = f"{who}answering"
            self.first_token = seconds if self.first_token is None else self.first_token
            self._texts[run_id] = self._texts.get(run_id, "") + as_text(data["content"])
            # Until the team's leader speaks itself, and in a workflow always, the member that speaks is shown.
            self.text = self._texts.get(self.run_id) or self._texts[run_id]
        elif name in ENDS and not nested and self.status == "running":  # RunCompleted comes after RunCancelled, too
            self.status = ENDS[name]
            self.reported = (data.get("metrics") or {}).get("time_to_first_token")
            if self.status == "completed":
                self.text = as_text(data.get("content")) or self.text
            elif self.status == "failed":
                self.error = as_text(data.get("content") or data.get("error"))


def as_text(content: object) -> str:
    """Content of a run, which is text or JSON, as text."""
    return content if isinstance(content, str) else "" if content is None else json.dumps(content, ensure_ascii=False)


def source_names(data: Json) -> list[str]:
    """Names of the documents in the `references` of an event or of a stored run, each once.

    A step of a workflow that searches has them in its content, if this is a MessageReferences of Agno's.
    """
    content = data.get("content")
    own = isinstance(content, dict) and isinstance(content.get("references"), list)
    searches = [*(data.get("references") or []), *([content] if own else [])]
    found = [document for search in searches for document in search.get("references") or []]
    return list(dict.fromkeys(str(d["name"]) for d in found if isinstance(d, dict) and d.get("name")))


class ServiceClient:
    """The routes of one agent, team or workflow on an AgentOS.

    Args:
        url: of the service, such as http://127.0.0.1:7777.
        component: "agents/<id>", "teams/<id>" or "workflows/<id>".
        token: OS_SECURITY_KEY of the service or a JWT; "" for none.
        user_id: whose sessions these are (a JWT's own user wins).
        timeout: seconds to wait for an answer; a run and an upload may be silent for twelve times as long.

    Every method raises ServiceError with a sentence that says what to do. Threads may share a client.
    """

    def __init__(
        self, url: str, component: str, token: str = "", user_id: str = "learner", timeout: float = 10
    ) -> None:
        if not (token.isascii() and token.isprintable()):
            raise ServiceError("The token holds a character that no token has; copy it again.")
        self.url, self.component, self.user_id = url.rstrip("/"), component, user_id
        self._http = httpx.Client(headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=timeout)
        self._patient = httpx.Timeout(timeout, read=12 * timeout)
        self._sockets: set[Any] = set()

    def run(self, message: str, session_id: str) -> Json:
        """Ask, and wait for the whole run."""
        form = {"message": message, "session_id": session_id, "user_id": self.user_id, "stream": "false"}
        return dict(self._call("POST", f"/{self.component}/runs", data=form, timeout=self._patient))

    def stream(self, message: str, session_id: str) -> Iterator[tuple[float, Json]]:
        """Ask, and yield the run's events with the seconds from the request to each event's arrival.

        If the connection breaks, the events end without one that ends the run.
        """
        url, form = f"{self.url}/{self.component}/runs", {"message": message, "session_id": session_id}
        form |= {"user_id": self.user_id, "stream": "true"}
        begun = time.perf_counter()
        with self._sentences(), connect_sse(self._http, "POST", url, data=form, timeout=self._patient) as source:
            if source.response.is_error:
                source.response.read()
                raise self._refusal(source.response)
            wire = source.response.extensions["network_stream"].get_extra_info("socket")
            self._sockets.add(wire)
            try:
                for sent in source.iter_sse():
                    yield time.perf_counter() - begun, {"event": sent.event, **json.loads(sent.data)}
            except (httpx.NetworkError, httpx.ProtocolError, httpx.TimeoutException):
                return
            finally:
                self._sockets.discard(wire)

    def cancel(self, run_id: str, session_id: str) -> None:
        """Ask for the end of a running run; its stream tells whether it was cancelled."""
        self._call("POST", f"/{self.component}/runs/{run_id}/cancel", params={"session_id": session_id})

    def upload(self, name: str, content: bytes | str) -> str:
        """Send a file (bytes) or a text (str) to be indexed; returns the id to ask `status` for."""
        text = {"data": {"name": name, "text_content": content}}
        sent: Json = text if isinstance(content, str) else {"files": {"file": (name, content)}}
        return str(self._call("POST", "/knowledge/content", timeout=self._patient, **sent)["id"])

    def status(self, content_id: str) -> tuple[str, str]:
        """How far the indexing is ("processing", "completed", "partial" or "failed"), and why."""
        found = self._call("GET", f"/knowledge/content/{content_id}/status")
        return found["status"], found["status_message"]

    def contents(self, limit: int = 50) -> tuple[list[Json], int]:
        """The newest documents, and how many there are in all."""
        page = self._call("GET", "/knowledge/content", params={"limit": limit})
        return page["data"], page["meta"]["total_count"]

    def delete_content(self, content_id: str) -> None:
        """Remove a document and its vectors."""
        self._call("DELETE", f"/knowledge/content/{content_id}")

    def sessions(self, limit: int = 20) -> list[Json]:
        """The user's newest sessions with this agent, team or workflow."""
        group, _, name = self.component.partition("/")
        wanted = {"type": group.removesuffix("s"), "component_id": name, "user_id": self.user_id, "limit": limit}
        return list(self._call("GET", "/sessions", params=wanted)["data"])

    def session_runs(self, session_id: str, previews: bool = False) -> list[Json]:
        """The runs of a session, oldest first; previews lack messages, events and references."""
        route = "run-previews" if previews else "runs"
        return list(self._call("GET", f"/sessions/{session_id}/{route}", params={"user_id": self.user_id}))

    def rename_session(self, session_id: str, name: str) -> None:
        """Give a session another name."""
        wanted = {"user_id": self.user_id}
        self._call("POST", f"/sessions/{session_id}/rename", params=wanted, json={"session_name": name})

    def delete_session(self, session_id: str) -> None:
        """Delete a session and its runs."""
        self._call("DELETE", f"/sessions/{session_id}", params={"user_id": self.user_id})

    def close(self) -> None:
        """End every connection, also a stream that another thread reads."""
        for wire in list(self._sockets):
            with suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)  # closing alone does not wake a thread that waits for data
        self._http.close()

    def _call(self, method: str, path: str, **options: Any) -> Any:
        with self._sentences():
            response = self._http.request(method, f"{self.url}{path}", **options)
            if response.is_error:
                raise self._refusal(response)
            return response.json() if response.content else None

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        if self._http.is_closed:
            raise ServiceError("This console is closed; make another one.")
        try:
            yield
        except NOT_AGENTOS:
            raise ServiceError(f"What answers at {self.url} is not AgentOS: correct the URL.") from None
        except httpx.TimeoutException:
            raise ServiceError(f"The service at {self.url} does not answer in time: look into its log.") from None
        except (httpx.TransportError, httpx.InvalidURL):
            raise ServiceError(f"No service can be reached at {self.url}: start it, or correct the URL.") from None

    @staticmethod
    def _refusal(response: httpx.Response) -> ServiceError:
        code, wait = response.status_code, response.headers.get("Retry-After", "")
        try:
            body = dict(response.json())
        except (TypeError, ValueError):
            body = {}
        said = body.get("detail") or body.get("content") or response.reason_phrase
        if isinstance(said, list):  # FastAPI names each field that it does not accept
            said = "; ".join(f"{error['loc'][-1]}: {error['msg']}" for error in said)
        said = str(said).strip().rstrip(".")
        sentences = {
            401: f"The service does not accept the token ({said}): pass its OS_SECURITY_KEY or a valid JWT as token=.",
            403: f"The token does not allow this ({said}): ask for one that does.",
            404: f"{said} (404): refresh the list, or correct the name.",
            429: f"Too many requests ({said}): wait {wait if wait.isdigit() else '60'} seconds, then try again.",
        }
        usual = f"{said}." if "detail" in body else f"The service refuses this ({code}: {said})."
        failed = f"The service could not do this ({code}: {said}): look into its log, and try again."
        return ServiceError(sentences.get(code, usual if code < 500 else failed))
