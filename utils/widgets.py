"""A local console for an AgentOS service, made of ipywidgets: chat, documents, sessions and the last run's timeline.

It talks only HTTP to the service (utils/service_client.py); utils/console_html.py makes what it shows.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as ipw

from utils.console_html import STYLE, answer_html, document_html, question_html, sources_html, timeline_html
from utils.service_client import Json, Run, ServiceClient, ServiceError, as_text, source_names

FILE_TYPES = ".md,.txt,.pdf,.csv"
ENTER = {"event": "submit"}  # what a Text sends
PATIENCE = 600  # seconds until the indexing of a document is no longer waited for
REDRAW = 0.06  # seconds between two drawings of a growing answer
ENDINGS = {
    "completed": "Answered in {:.2f} s",
    "cancelled": "Stopped after {:.2f} s: the answer is incomplete",
    "failed": "Failed after {:.2f} s",
    "incomplete": "Broken off after {:.2f} s: the answer is incomplete",
    "paused": "The run waits for a confirmation, which this console cannot give",
}


def _html(value: str = "", name: str = "") -> ipw.HTML:
    made = ipw.HTML(value)
    made.add_class(name or "cc-part")
    return made


def _field(kind: Any, name: str, label: str) -> Any:
    made = kind(tooltip=label, layout=ipw.Layout(width="auto", min_width="0", flex="1 1 0"))
    made.add_class(name)
    if made.has_trait("placeholder"):
        made.placeholder = label
    return made


class Console:
    """The console of one agent, team or workflow; a cell that ends with it shows it.

    Args:
        url: of the service, such as http://127.0.0.1:7777.
        agent_id: id of the agent, team or workflow.
        token: OS_SECURITY_KEY of the service or a JWT; "" for none.
        user_id: whose sessions these are.
        group: "agents", "teams" or "workflows".

    What the controls do can be done from Python too. These methods wait until it is done, show it in the console, and
    raise ServiceError with the sentence that the console shows.
    """

    def __init__(
        self,
        url: str,
        agent_id: str = "knowledge-assistant",
        token: str = "",
        user_id: str = "learner",
        group: str = "agents",
    ) -> None:
        self.client = ServiceClient(url, f"{group}/{agent_id}", token, user_id)
        self.session_id = str(uuid.uuid4())
        self.last_run = Run(status="not asked")
        self._alone = threading.Lock()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._rows: dict[str, ipw.HBox] = {}
        title = _html(f'<b>{escape(agent_id)}</b> <span class="cc-muted">at {escape(self.client.url)}</span>')
        self.error, self.status = _html(name="console-error"), _html(name="console-status")
        self.timeline = _html('<span class="cc-muted">No run yet.</span>', "console-timeline")
        tabs = [self._chat_tab(), self._documents_tab(), self._sessions_tab(), self.timeline]
        self.tabs = ipw.Tab(tabs, titles=["Chat", "Documents", "Sessions", "Last run"])
        self.tabs.observe(self._read_tab, "selected_index")
        self.view = ipw.VBox([_html(STYLE), title, self.error, self.tabs, self.status])
        self.view.add_class("knowledge-console")
        self._say("Ready")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = self.view._repr_mimebundle_(**options)
        return bundle and {**bundle, "text/plain": f"Console of {self.client.component}"}

    def _read_tab(self, change: Json) -> None:
        read = {1: self.documents, 2: self.sessions}.get(change["new"])
        if read is not None:
            self._behind(read)

    def close(self) -> None:
        """End the connections and threads; the console keeps showing what it shows."""
        self._closed.set()
        self.client.close()
        for thread in self._threads:
            thread.join(5)
        self._say("Closed")

    # Chat

    def _chat_tab(self) -> ipw.VBox:
        self.history, self.asked, self.sources = _html(), _html(), _html(name="console-sources")
        self.answer = _html('<span class="cc-muted">The answer and its sources appear here.</span>', "console-answer")
        log = ipw.Box([ipw.VBox([self.history, self.asked, self.answer, self.sources])])
        log.add_class("console-log")
        self.question = _field(ipw.Text, "console-question", "Ask about the documents")
        self.question.on_msg(lambda _, message, __: self._behind(self._send) if message == ENTER else None)
        self.send_button = self._button("Send", "console-send", "Send the question", self._send)
        self.stop_button = self._button("Stop", "console-stop", "Stop the answer", self.stop)
        self.stop_button.disabled = True
        return ipw.VBox([log, ipw.HBox([self.question, self.send_button, self.stop_button])])

    def _send(self) -> None:
        question, self.question.value = self.question.value, ""
        self.ask(question)

    def ask(self, question: str) -> str:
        """Ask in the open session and return the answer; if it is stopped, what has come."""
        with self._telling(), self._no_other_run():
            if not question.strip():
                raise ServiceError("The question is empty: type one first.")
            run = self.last_run = Run(question.strip())
            self._archive()
            self.asked.value = question_html(run.question)
            self.send_button.disabled, self.stop_button.disabled = True, False
            try:
                self._follow(run)
            finally:
                if run.status == "running":
                    run.status = "incomplete" if run.run_id else "failed"
                self.send_button.disabled, self.stop_button.disabled = False, True
                self.timeline.value = timeline_html(run)
                self._draw(run)
            return run.text

    def _follow(self, run: Run) -> None:
        drawn, doing = 0.0, ""
        for seconds, event in self.client.stream(run.question, self.session_id):
            run.add(seconds, event)
            if run.doing != doing or seconds > drawn + REDRAW:
                drawn, doing = seconds, run.doing
                self._draw(run)
        if run.status == "failed":
            raise ServiceError(f"The run failed ({run.error.rstrip('.')}): look into the service's log.")
        if run.status == "running":
            raise ServiceError(
                "The connection broke, so the answer is incomplete: see that the service runs; ask again."
            )

    def _draw(self, run: Run) -> None:
        self.answer.value = answer_html(run.text, run.status)
        self.sources.value = sources_html(run.sources, run.text)
        self._say(ENDINGS[run.status].format(run.seconds) if run.status in ENDINGS else f"{run.doing} ...")

    def _archive(self) -> None:
        if self.asked.value:
            self.history.value += self.asked.value + self.answer.value + self.sources.value

    def stop(self) -> None:
        """Cancel the question that another thread asks."""
        with self._telling():
            run = self.last_run
            self._say("Stopping ...")
            while run.status == "running" and not run.run_id:
                time.sleep(0.02)
            if run.status == "running":
                self.client.cancel(run.run_id, self.session_id)

    @contextmanager
    def _no_other_run(self) -> Iterator[None]:
        if not self._alone.acquire(blocking=False):
            raise ServiceError("A question is being answered: wait for the answer, or press Stop.")
        try:
            yield
        finally:
            self._alone.release()

    # Documents

    def _documents_tab(self) -> ipw.VBox:
        self.files = ipw.FileUpload(accept=FILE_TYPES, multiple=True, description="Upload files", tooltip=FILE_TYPES)
        self.files.layout = ipw.Layout(width="auto", flex="none")
        self.files.add_class("console-upload")
        self.files.observe(lambda change: self._behind(self._send_files) if change["new"] else None, "value")
        self.text_name = _field(ipw.Text, "console-text-name", "Name of a text to add")
        self.text = _field(ipw.Textarea, "console-text", "The text itself")
        self.add_button = self._button("Add text", "console-add-text", "Index the text", self._send_text)
        refresh = self._button("Refresh", "console-refresh", "Read the list again", self.documents)
        # Jupyter carries files to the kernel in one message, and drops it without a word if it is larger.
        limit = f"{FILE_TYPES.replace(',', ' ')} up to 10 MB at a time; larger: console.upload(path)"
        hint = _html(f'<span class="cc-muted">{limit}</span>')
        self.count, self.list = _html(), ipw.VBox()
        self.list.add_class("console-documents")
        form = ipw.HBox([self.text_name, self.text, self.add_button])
        head = ipw.HBox([self.files, refresh, hint], layout=ipw.Layout(align_items="center"))
        return ipw.VBox([head, form, self.count, self.list])

    def _send_files(self) -> None:
        files, self.files.value = self.files.value, ()
        self._index([(file["name"], bytes(file["content"])) for file in files])

    def _send_text(self) -> None:
        self.upload(self.text_name.value.strip(), self.text.value)
        self.text_name.value = self.text.value = ""

    def upload(self, path: str | Path, content: bytes | str | None = None) -> str:
        """Index a document; returns "completed", "partial" or "failed", or "processing" if 10 minutes were not enough.

        Args:
            path: of a file; with `content`, the document's name.
            content: what a file of that name would hold (bytes), or a text.
        """
        if content is not None:
            return self._index([(str(path), content)])[0]
        try:
            return self._index([(Path(path).name, Path(path).read_bytes())])[0]
        except OSError as error:
            raise ServiceError(f"{path} cannot be read ({error.strerror}): correct the path.") from None

    def _index(self, documents: list[tuple[str, bytes | str]]) -> list[str]:
        statuses, problems = [], []
        with self._telling("Indexing"):
            for name, content in documents:
                try:
                    status, why = self._index_one(name, content)
                except ServiceError as error:
                    status, why = "refused", str(error)
                statuses.append(status)
                if status != "completed":
                    problems.append(f"{name}: {status}. {why}")
            if "refused" in statuses:
                raise ServiceError("\n".join(problems))
        self._show_error("\n".join(problems))
        return statuses

    def _index_one(self, name: str, content: bytes | str) -> tuple[str, str]:
        if not name or not content:
            raise ServiceError("A document needs a name and content: give both.")
        content_id, status, why = self.client.upload(name, content), "processing", ""
        end = time.monotonic() + PATIENCE
        while status == "processing" and time.monotonic() < end and not self._closed.wait(0.2):
            status, why = self.client.status(content_id)
            self._list_documents()
        return status, why

    def documents(self) -> list[Json]:
        """The newest documents; while one is being processed, wait and show how it goes."""
        end = time.monotonic() + PATIENCE
        with self._telling("Reading the list"):
            found = self._list_documents()
            while any(document["status"] == "processing" for document in found) and time.monotonic() < end:
                if self._closed.wait(1):
                    break
                found = self._list_documents()
        return found

    def _list_documents(self) -> list[Json]:
        found, count = self.client.contents()
        self.count.value = f"Documents: {count}" + (f", here the newest {len(found)}" if count > len(found) else "")
        self._rows = {document["id"]: self._row(document) for document in found}
        self.list.children = tuple(self._rows.values())
        return found

    def _row(self, document: Json) -> ipw.HBox:
        row = self._rows.get(document["id"])
        if row is None:
            tooltip = f"Delete {document['name']}"
            delete = self._button("", "console-delete", tooltip, lambda: self.delete_document(document["id"]), "trash")
            row = ipw.HBox([_html(), delete])
            row.add_class("console-row")
        row.children[0].value = document_html(document)
        return row

    def delete_document(self, content_id: str) -> None:
        """Remove a document from the knowledge base."""
        with self._telling("Deleting"):
            self.client.delete_content(content_id)
            self._list_documents()

    # Sessions

    def _sessions_tab(self) -> ipw.VBox:
        def chosen() -> str:
            if self.session_list.value is None:
                raise ServiceError("No session is chosen: click one in the list.")
            return str(self.session_list.value)

        self.session_list = _field(ipw.Select, "console-sessions", "Sessions")
        self.session_name = _field(ipw.Text, "console-session-name", "New name of the chosen session")
        works: dict[str, tuple[str, Callable[[], object]]] = {
            "Open": ("Go on with the session in Chat", lambda: self.open_session(chosen())),
            "New": ("Begin a session in Chat", self.new_session),
            "Delete": ("Delete the session", lambda: self.delete_session(chosen())),
            "Rename": ("Give it the new name", lambda: self.rename_session(chosen(), self.session_name.value)),
        }
        buttons = [self._button(label, f"console-{label.lower()}", *work) for label, work in works.items()]
        buttons.insert(3, self.session_name)
        return ipw.VBox([self.session_list, ipw.HBox(buttons)])

    def sessions(self) -> list[Json]:
        """The user's newest sessions."""
        with self._telling("Reading the sessions"):
            return self._list_sessions()

    def _list_sessions(self) -> list[Json]:
        found, options = self.client.sessions(), {}
        for session in found:
            previews = self.client.session_runs(session["session_id"], previews=True)
            runs = sum(not run.get("parent_run_id") for run in previews)  # without those of a team's members
            begun = datetime.fromisoformat(session["created_at"]).astimezone()
            mark = "  (open)" if session["session_id"] == self.session_id else ""
            options[session["session_id"]] = f"{begun:%d %b %H:%M}  runs: {runs}  {session['session_name']}{mark}"
        kept = self.session_list.value
        self.session_list.options = [(label, session_id) for session_id, label in options.items()]
        self.session_list.value = kept if kept in options else None
        return found

    def open_session(self, session_id: str) -> None:
        """Show a session's questions and answers; the next question goes on with it."""
        with self._telling("Opening"):
            self._show_session(session_id, self.client.session_runs(session_id))
            self.tabs.selected_index = 0

    def new_session(self) -> None:
        """Begin a session; the service knows it from its first question on."""
        with self._telling("Beginning a session"):
            self._show_session(str(uuid.uuid4()), [])
            self.tabs.selected_index = 0

    def _show_session(self, session_id: str, runs: list[Json]) -> None:
        with self._no_other_run():
            self.session_id = session_id
            self.history.value = self.asked.value = self.answer.value = self.sources.value = ""
            for run in [run for run in runs if not run.get("parent_run_id")]:
                self._archive()
                inner = [other for other in runs if other.get("parent_run_id") == run["run_id"]]
                parts = [run, *inner, *(run.get("step_results") or []), *(run.get("step_executor_runs") or [])]
                names = list(dict.fromkeys(name for part in parts for name in source_names(part)))
                text, status = as_text(run.get("content")), str(run.get("status")).lower()
                self.asked.value = question_html(as_text(run.get("run_input")))
                self.answer.value = answer_html(text, status)
                self.sources.value = sources_html(names, text)

    def rename_session(self, session_id: str, name: str) -> None:
        """Give a session another name."""
        with self._telling("Renaming"):
            if not name.strip():
                raise ServiceError("The new name is empty: type one first.")
            self.client.rename_session(session_id, name.strip())
            self.session_name.value = ""
            self._list_sessions()

    def delete_session(self, session_id: str) -> None:
        """Delete a session and its runs; instead of the open one, a new one begins."""
        with self._telling("Deleting"):
            self.client.delete_session(session_id)
            if session_id == self.session_id:
                self._show_session(str(uuid.uuid4()), [])
            self._list_sessions()

    # Threads and messages

    def _button(self, label: str, name: str, tooltip: str, work: Callable[[], object], icon: str = "") -> ipw.Button:
        button = ipw.Button(description=label, icon=icon, tooltip=tooltip, layout=ipw.Layout(width="auto", flex="none"))
        button.add_class(name)
        button.on_click(lambda _: self._behind(work))
        return button

    def _behind(self, work: Callable[[], object]) -> None:
        """Do `work` in a thread, so that the kernel can go on; what it raises becomes a text of the console."""

        def attempt() -> None:
            try:
                work()
            except ServiceError as error:
                self._show_error(str(error))
            except Exception as error:  # a thread's traceback would appear below whichever cell runs now
                self._show_error(f"The console failed ({type(error).__name__}: {error}); make another one.")

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=attempt, name="console", daemon=True))
        self._threads[-1].start()

    @contextmanager
    def _telling(self, doing: str = "") -> Iterator[None]:
        """Show what is done, and as text what fails."""
        self._show_error("")
        if doing:
            self._say(f"{doing} ...")
        try:
            yield
        except ServiceError as error:
            self._show_error(str(error))
            raise
        finally:
            if doing:
                self._say("Ready")

    def _say(self, text: str) -> None:
        self.status.value = f'<span role="status">{escape(text)}</span>'

    def _show_error(self, text: str) -> None:
        self.error.value = f'<div class="cc-error" role="alert">{escape(text)}</div>' if text else ""
