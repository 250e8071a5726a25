"""Notebooks in a real browser: JupyterLab on a copy of the course, and a page that is looked at and worked with."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx
import nbformat
import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Playwright,
    Request,
    Response,
    expect,
    sync_playwright,
)
from playwright.sync_api import TimeoutError as TooLate

from utils.bootstrap import ROOT, course_environment
from utils.processes import ServerProcess, owner_mark

PROGRAMS = ["chromium", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge"]
PROGRAMS += ["chromium-browser"]  # last, since on Ubuntu it may be no more than a hint to install a snap
CHANNELS = ["chrome", "msedge", "chromium"]  # where installers put them on macOS and Windows; playwright's own
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
PATIENCE = 180.0  # seconds for JupyterLab to do a thing that takes one or two on an idle machine
WIDTH, HEIGHT = 1280, 900

PANEL = ".jp-NotebookPanel"
AREA = ".jp-MarkdownOutput, .jp-OutputArea-output"

# JupyterLab as the command `lab` starts it; it ends with the tests, should these be killed.
START = """
import os, signal, sys
from pathlib import Path
from utils.notebooks import open_lab
from utils.processes import end_with_owner
end_with_owner(sys.argv[2], lambda: os.kill(os.getpid(), signal.SIGTERM))
open_lab(None, browser=False, root=Path(sys.argv[1]))
"""

# True once all cells are there, and each text, output and picture that is to come has come.
COMPLETE = f"""([cells]) => {{
    const panel = document.querySelector("{PANEL}");
    return panel !== null && panel.querySelectorAll(".jp-Cell").length === cells
        && [...panel.querySelectorAll("{AREA}")].every(area => area.childElementCount > 0)
        && [...panel.querySelectorAll("img")].every(image => image.complete)
        && window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === "idle"
}}"""

# What each cell shows. A line of text is never wider than its page, since JupyterLab breaks it, in the middle of a
# word too: so lines are measured as they would be unbroken.
LOOK = f"""async () => {{
    await document.fonts.ready
    const pen = document.createElement("canvas").getContext("2d")
    const torn = pre => {{
        pen.font = getComputedStyle(pre).font
        return pre.textContent.split("\\n").map(line => [line, pen.measureText(line).width, pre.clientWidth])
            .filter(([line, width, page]) => width > page + 1)
    }}
    const area = shown => ({{
        kind: shown.dataset.mimeType ?? (shown.matches(".jp-MarkdownOutput") ? "text/markdown" : "widget"),
        text: shown.textContent,
        height: shown.getBoundingClientRect().height,
        rows: shown.querySelectorAll("tr").length,
        images: [...shown.querySelectorAll("img")].map(image => [
            image.alt || image.src.slice(0, 80), image.naturalWidth, image.getBoundingClientRect().width
        ]),
        diagrams: shown.querySelectorAll(".jp-RenderedMermaid img[src^='data:image/svg+xml']").length,
        faults: [...shown.querySelectorAll(".jp-RenderedMermaid.jp-mod-warning, mjx-merror")].map(e => e.textContent),
        wide: [shown, ...shown.querySelectorAll("div, pre, table")]
            .filter(part => part.clientWidth > 1 && part.scrollWidth > part.clientWidth + 1)
            .map(part => [part.textContent, part.scrollWidth, part.clientWidth]),
        torn: [...shown.querySelectorAll("pre")].filter(pre => shown.matches(".jp-RenderedText")).flatMap(torn),
    }})
    const cells = [...document.querySelectorAll("{PANEL} .jp-Cell")]
    return cells.map((cell, index) => ({{
        number: index + 1,
        rendered: !cell.matches(".jp-MarkdownCell:not(.jp-mod-rendered)"),
        areas: [...cell.querySelectorAll("{AREA}")].map(area),
    }}))
}}"""

# At the first error JupyterLab is done with running, while cells that may raise leave others waiting in the kernel:
# what is asked of it last ends after them.
RUN_ALL = """async () => {
    const { commands, shell } = window.jupyterapp
    await commands.execute("notebook:clear-all-cell-outputs")
    window.allRan = false
    const { session } = shell.currentWidget.sessionContext
    const last = () => session.kernel.requestExecute({ code: "", silent: true }).done
    void commands.execute("notebook:run-all-cells").then(last, last).finally(() => { window.allRan = true })
}"""
RUNS = """() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap((cell, index) =>
    cell.model.type === "code" && cell.model.sharedModel.source.trim() ? [{
        number: index + 1,
        count: cell.model.executionCount,
        source: cell.model.sharedModel.source.trim().split("\\n")[0].slice(0, 60),
        errors: cell.model.outputs.toJSON().filter(output => output.output_type === "error"),
    }] : []
)"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium, Chrome or Edge.

    Playwright keeps an event loop running in this thread until the end, so `asyncio.run` fails meanwhile: a fixture
    must not hold it beyond its own test file. Where no browser starts, the test is skipped; in CI it fails.
    """
    with sync_playwright() as playwright:
        browser = _launch(playwright)
        yield browser
        browser.close()


def _launch(playwright: Playwright) -> Browser:
    places: list[dict[str, Any]] = [{"executable_path": path} for name in PROGRAMS if (path := shutil.which(name))]
    places += [{"channel": channel} for channel in CHANNELS]
    for place in places:
        with suppress(Error):  # not there, or there and broken
            # Scroll bars take a part of the page's width, so they are not left out.
            return playwright.chromium.launch(args=QUIET, ignore_default_args=["--hide-scrollbars"], **place)
    no_browser()


def no_browser() -> NoReturn:
    """Skip the test; in CI, fail it."""
    sentence = (
        "No Chromium, Chrome or Edge starts here: install one of them (Debian: apt-get install chromium) to see the "
        "notebooks in a browser."
    )
    # A skipped test looks like a passed one in a green pipeline, where nobody reads the reasons.
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(sentence + " .ci/run does so where apt-get may be used.", pytrace=False)
    pytest.skip(sentence)


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: `url` ends with a slash, `root` is the copy of the course that it shows."""

    url: str
    token: str
    root: Path

    def write(self, name: str, *cells: nbformat.NotebookNode) -> None:
        """Put a notebook of these cells beside the course's own."""
        kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        notebook = nbformat.v4.new_notebook(cells=list(cells), metadata={"kernelspec": kernel})
        nbformat.write(notebook, self.root / "notebooks" / f"{name}.ipynb")


@contextmanager
def jupyter_lab(root: Path) -> Iterator[Lab]:
    """JupyterLab as `python3 -m utils lab` starts it, on a copy of the course in the folder `root`.

    Kernels import this `utils`, and what notebooks write goes below `root` too. Settings that differ from a learner's:
    all cells are drawn, also those that are not in view, and its application object can be called from the page.
    """
    for name in ("notebooks", "data", "utils"):
        left_out = shutil.ignore_patterns("local", "__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, root / name, ignore=left_out)
    own = root / ".jupyter"
    settings = own / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    for path, content in (
        (settings, {"windowingMode": "none"}),
        (own / "config" / "jupyter_lab_config.json", {"LabApp": {"expose_app_in_browser": True}}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    environment = course_environment(root) | {
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "COURSE_DATA": str(root / "data" / "local"),
    }
    command = [sys.executable, "-c", START, str(root), owner_mark()]
    with ServerProcess("JupyterLab", command, own / "lab.log", environment, patience=20) as server:
        found: list[dict[str, Any]] = []

        def listens() -> bool:
            for path in (own / "runtime").glob("jpserver-*.json"):
                with suppress(ValueError):  # half written
                    found.append(json.loads(path.read_text(encoding="utf-8")))
            return bool(found)

        server.wait_until(listens, PATIENCE)
        yield Lab(found[0]["url"], found[0]["token"], root)


@dataclass(frozen=True)
class CellError:
    """An error below a cell; `number` counts all cells from 1, as JupyterLab's status bar does."""

    number: int
    name: str
    message: str


@dataclass
class NotebookPage:
    """One notebook in a browser window. Use open_notebook() to get it.

    Args:
        page: playwright's page, for what is not offered here.
        troubles: what the console log and the network reported so far: errors, failed requests, and requests to
            another host than JupyterLab's, which fail where there is no network.

    A place on the page (`where`) is a widget's CSS class such as ".console-send", or the name that the learner reads:
    a button's text, a field's description or aria-label.
    """

    page: Page
    troubles: list[str] = field(default_factory=list)

    def look(self) -> list[dict[str, Any]]:
        """What each cell shows, in order; `LOOK` says what it finds."""
        return list(self.page.evaluate(LOOK))

    def too_wide(self) -> list[str]:
        """A sentence for each text and output that scrolls sideways, with the number of its cell and its pixels."""
        return [
            f"cell {cell['number']}: {width} pixels in a page of {page}: {_start(text)}"
            for cell in self.look()
            for area in cell["areas"]
            for text, width, page in area["wide"][:1]  # the parts inside are wide for the same reason
        ]

    def torn_lines(self) -> list[str]:
        """A sentence for each line of text output that JupyterLab breaks because it is wider than the page."""
        return [
            f"cell {cell['number']}: {width:.0f} pixels ({len(line)} characters) in a page of {page}: {_start(line)}"
            for cell in self.look()
            for area in cell["areas"]
            for line, width, page in area["torn"]
        ]

    def notices(self) -> list[str]:
        """The texts of dialogs and pop-ups that lie over the notebook."""
        return self.page.locator(".jp-Dialog-content, .Toastify__toast").all_inner_texts()

    def run_all(self, timeout: float) -> list[CellError]:
        """Clear all outputs, run all cells, and return the errors below them.

        Raises AssertionError if they have not ended within `timeout` seconds, naming the cell that stands.
        """
        self.page.evaluate(RUN_ALL)
        try:
            self.page.wait_for_function("() => window.allRan", timeout=1000 * timeout)
        except TooLate:
            standing = [f"cell {cell['number']}: {cell['source']}" for cell in self._runs() if not cell["count"]]
            raise AssertionError(
                f"{len(standing)} cells have not ended after {timeout:.0f} seconds, first {standing[:1]}; "
                f"in the way: {self.notices()}"
            ) from None
        runs = self._runs()
        errors = [
            CellError(cell["number"], error["ename"], error["evalue"]) for cell in runs for error in cell["errors"]
        ]
        # After an error JupyterLab stops; else the last cell must have run.
        assert errors or runs[-1]["count"], f"cell {runs[-1]['number']} did not run: {runs[-1]['source']}"
        return errors

    def _runs(self) -> list[dict[str, Any]]:
        return list(self.page.evaluate(RUNS))

    def type(self, where: str, text: str, enter: bool = False) -> None:
        """Put a text into a Text or Textarea, in place of what it holds, and press Enter if asked to.

        It comes at once, as if pasted: of single keys, ipywidgets holds back those that come while the kernel is at
        the ones before, and a button that is pressed meanwhile overtakes them.
        """
        place = self._place(where, ("textarea", "input")) if where.startswith(".") else self._shown.get_by_label(where)
        place.fill(text)
        if enter:
            place.press("Enter")

    def press(self, where: str) -> None:
        """Press a button once it can be pressed."""
        self._button(where).click()

    def upload(self, where: str, *paths: Path) -> None:
        """Choose files in a FileUpload."""
        with self.page.expect_file_chooser() as chooser:  # its input is outside of the document
            self._button(where).click()
        chooser.value.set_files(list(paths))

    def wait_for(self, where: str, text: str | re.Pattern[str], timeout: float = 30) -> str:
        """Wait until the element of a CSS class holds this text, for at most `timeout` seconds; return all its text.

        Raises AssertionError with the text that it holds instead.
        """
        place = self._shown.locator(where)
        expect(place).to_contain_text(text, timeout=1000 * timeout, use_inner_text=True)
        return place.inner_text()

    def screenshot(self, path: Path, where: str | None = None) -> None:
        """Save a PNG of the window, or of the element of a CSS class, which is scrolled into view."""
        if where is None:
            self.page.screenshot(path=path, animations="disabled")
        else:
            self._shown.locator(where).screenshot(path=path, animations="disabled")

    @property
    def _shown(self) -> Locator:
        return self.page.locator(f"{PANEL} .jp-Notebook")

    def _place(self, where: str, tags: Sequence[str]) -> Locator:
        """A CSS class is on the widget's outermost element, which for some widgets is the control itself."""
        return self._shown.locator(", ".join(f"{tag}{where}, {where} {tag}" for tag in tags))

    def _button(self, where: str) -> Locator:
        if where.startswith("."):
            return self._place(where, ["button"])
        # Before the text there may be an icon, which is a character too; a FileUpload counts its files: "Upload (0)".
        name = re.compile(rf"^\W*{re.escape(where)}( \(\d+\))?$")
        return self._shown.get_by_role("button", name=name)


@contextmanager
def open_notebook(
    browser: Browser, lab: Lab, name: str, width: int = WIDTH, height: int = HEIGHT
) -> Iterator[NotebookPage]:
    """Open notebooks/<name>.ipynb in a fresh window of this size and workspace; its kernel ends with it.

    Raises AssertionError if it is not shown completely, with an idle kernel, after PATIENCE seconds.
    """
    cells = len(nbformat.read(lab.root / "notebooks" / f"{name}.ipynb", as_version=4).cells)
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(1000 * PATIENCE)
    try:
        opened = NotebookPage(context.new_page())
        _listen(opened, lab)
        # A workspace that was used before would open its notebooks too.
        place = f"lab/workspaces/{uuid.uuid4().hex}/tree/notebooks/{name}.ipynb"
        opened.page.goto(f"{lab.url}{place}?token={lab.token}")
        try:
            opened.page.wait_for_function(COMPLETE, arg=[cells])
        except TooLate:
            raise AssertionError(
                f"{name} is not complete after {PATIENCE:.0f} seconds; troubles: {opened.troubles}; "
                f"in the way: {opened.notices()}"
            ) from None
        yield opened
    finally:
        context.close()
        _end_kernel(lab, f"notebooks/{name}.ipynb")


def _listen(opened: NotebookPage, lab: Lab) -> None:
    def console(message: ConsoleMessage) -> None:
        if message.type == "error":
            opened.troubles.append(f"console: {message.text}")

    def request(made: Request) -> None:
        if not made.url.startswith((lab.url, "data:", "blob:")):
            opened.troubles.append(f"another host: {made.url}")

    def response(came: Response) -> None:
        if came.status >= 400:
            opened.troubles.append(f"HTTP {came.status}: {came.request.method} {came.url}")

    def failed(made: Request) -> None:
        # An aborted one is the page's own doing: JupyterLab sets a picture's address twice.
        if made.failure != "net::ERR_ABORTED":
            opened.troubles.append(f"failed: {made.url} ({made.failure})")

    opened.page.on("console", console)
    opened.page.on("pageerror", lambda error: opened.troubles.append(f"exception: {error}"))
    opened.page.on("request", request)
    opened.page.on("requestfailed", failed)
    opened.page.on("response", response)


def _end_kernel(lab: Lab, path: str) -> None:
    with httpx.Client(base_url=lab.url, headers={"Authorization": f"token {lab.token}"}, timeout=PATIENCE) as client:
        for session in client.get("api/sessions").raise_for_status().json():
            if session["path"] == path:
                client.delete(f"api/sessions/{session['id']}").raise_for_status()


def _start(text: str) -> str:
    return repr(" ".join(text.split())[:80])
