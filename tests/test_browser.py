"""Every notebook in a real browser: it is drawn without errors and fits the page; widgets can be worked with.

The notebooks are opened with their stored outputs, in a window of 1280 pixels with JupyterLab's file list open.
UPDATE_PICTURES=1 python3 -m utils test -k console_of takes the README's picture again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nbformat
import pytest
from browser import CellError, Lab, NotebookPage, chromium, jupyter_lab, no_browser, open_notebook
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from playwright.sync_api import Browser

from utils.bootstrap import ROOT
from utils.index_bench.store import search_table
from utils.notebooks import course
from utils.service import service

TEXT = {"application/vnd.jupyter.stdout", "application/vnd.jupyter.stderr", "text/plain"}
# What JupyterLab writes in place of an output that it cannot draw.
NOT_DRAWN = re.compile(r"Error (displaying|creating) widget|Loading widget|Javascript Error:|Failed to load model")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with jupyter_lab(tmp_path_factory.mktemp("lab")) as started:
        yield started


@pytest.fixture(scope="module", params=course(), ids=lambda notebook: notebook.name)
def opened(request: pytest.FixtureRequest, browser: Browser, lab: Lab) -> Iterator[tuple[NotebookPage, list[Any]]]:
    """A notebook of the course in the browser, and its stored cells."""
    stored = nbformat.read(ROOT / "notebooks" / f"{request.param.name}.ipynb", as_version=4)
    with open_notebook(browser, lab, request.param.name) as page:
        yield page, stored.cells


def texts(outputs: list[Any]) -> list[str]:
    """The outputs that are shown as plain text."""
    streams = [output.text for output in outputs if output.output_type == "stream"]
    values = [output.data["text/plain"] for output in outputs if list(output.get("data", {})) == ["text/plain"]]
    return [" ".join(text.split()) for text in streams + values]


def faults(page: NotebookPage, cells: list[Any]) -> list[str]:
    """Diagrams, formulas, pictures and outputs that are not drawn, and errors that no tag announces."""
    found = []
    for stored, shown in zip(cells, page.look(), strict=True):
        announced = "raises-exception" in stored.metadata.get("tags", [])
        for area in shown["areas"]:
            found += [f"cell {shown['number']}: {fault[:80]}" for fault in area["faults"]]
            found += [f"cell {shown['number']}: no picture {name}" for name, *sizes in area["images"] if 0 in sizes]
            traceback = area["kind"].endswith(("stderr", "error")) and "Traceback" in area["text"]
            if (traceback and not announced) or NOT_DRAWN.search(area["text"]):
                found.append(f"cell {shown['number']}: {area['text'][:80]}")
    return found


def test_every_cell_shows_what_is_stored(opened: tuple[NotebookPage, list[Any]]) -> None:
    page, cells = opened
    for stored, shown in zip(cells, page.look(), strict=True):
        areas, where = shown["areas"], f"cell {shown['number']}"
        assert shown["rendered"] and all(area["height"] > 0 for area in areas), where
        if stored.cell_type == "markdown":
            assert areas[0]["text"].strip(), where
            assert areas[0]["diagrams"] == stored.source.count("```mermaid"), where
            continue
        outputs = stored.outputs
        plain = [" ".join(area["text"].split()) for area in areas if area["kind"] in TEXT]
        assert sorted(plain) == sorted(texts(outputs)), where
        html = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
        assert sum(area["rows"] for area in areas if area["kind"] == "text/html") == html.count("<tr"), where
        pictures = [output for output in outputs if any(key.startswith("image/") for key in output.get("data", {}))]
        assert sum(len(area["images"]) for area in areas if area["kind"].startswith("image/")) == len(pictures), where


def test_nothing_is_shown_as_an_error(opened: tuple[NotebookPage, list[Any]]) -> None:
    found = faults(*opened) + opened[0].notices()
    assert not found, "\n".join(found)


def test_nothing_is_wider_than_the_page(opened: tuple[NotebookPage, list[Any]]) -> None:
    found = opened[0].too_wide()
    assert not found, "\n".join(found)


def test_no_line_of_output_is_broken(opened: tuple[NotebookPage, list[Any]]) -> None:
    found = opened[0].torn_lines()
    assert not found, "\n".join(found)


def test_console_log_and_network_report_nothing(opened: tuple[NotebookPage, list[Any]]) -> None:
    found = opened[0].troubles
    assert not found, "\n".join(found)


def test_faults_would_be_seen(browser: Browser, lab: Lab) -> None:
    traceback = "Traceback (most recent call last):\n  ...\nValueError"
    wide = "<table><tr>" + "".join(f"<td>column_{i}</td>" for i in range(40)) + "</tr></table>"
    cells = [
        new_markdown_cell("```mermaid\nflowchart LR\n  a[ --> b\n```"),
        new_markdown_cell("![missing](images/none.png)"),
        new_markdown_cell("$\\frac{1}$"),
        new_markdown_cell("```\n" + "x" * 200 + "\n```"),
        new_code_cell("1", outputs=[new_output("stream", name="stderr", text=traceback)]),
        new_code_cell("2", outputs=[new_output("display_data", {"text/html": wide})]),
        new_code_cell("3", outputs=[new_output("stream", text="short\n" + "word " * 40)]),
        new_code_cell("4", outputs=[new_output("stream", text="Loading widget...")]),
        new_markdown_cell("All is well with $x^2$ here: " + "word " * 200),
    ]
    lab.write("faults", *cells)
    with open_notebook(browser, lab, "faults") as page:
        assert [fault.split(":")[0] for fault in faults(page, cells)] == [f"cell {n}" for n in (1, 2, 3, 5, 8)]
        assert [fault.split(":")[0] for fault in page.too_wide()] == ["cell 4", "cell 6"]
        (line,) = page.torn_lines()
        assert re.fullmatch(r"cell 7: 1\d{3} pixels \(200 characters\) in a page of 8\d\d: 'word word .*'", line)
        assert any("none.png" in trouble for trouble in page.troubles), page.troubles


WIDGETS = """
import ipywidgets as w

name, question = w.Text(description="Name"), w.Textarea(placeholder="Ask", tooltip="Your question")
send, upload, answer = w.Button(description="Send"), w.FileUpload(multiple=True), w.HTML("nothing yet")
for widget, mark in ((question, "my-question"), (upload, "my-upload"), (answer, "my-answer")):
    widget.add_class(mark)
send.on_click(lambda _: setattr(answer, "value", f"<b>{name.value}</b> asks: {question.value}"))
name.on_submit(lambda _: setattr(answer, "value", f"Enter from {name.value}"))
upload.observe(lambda c: setattr(answer, "value", " ".join(f"{f.name}:{f.size}" for f in c["new"])), "value")
w.VBox([name, question, send, upload, answer])
"""


def test_the_browser_can_type_press_and_upload(browser: Browser, lab: Lab, tmp_path: Path) -> None:
    lab.write("widgets", new_code_cell(WIDGETS.strip()), new_code_cell("print('ready')"))
    files = [tmp_path / "one.md", tmp_path / "two.txt"]
    for file in files:
        file.write_bytes(b"12345")
    with open_notebook(browser, lab, "widgets") as page:
        assert page.run_all(180) == []
        assert page.wait_for(".my-answer", "nothing yet") == "nothing yet"
        page.type("Name", "Ana")
        page.type(".my-question", "Which port?")
        page.press("Send")
        page.wait_for(".my-answer", "Ana asks: Which port?")
        page.type("Name", "Bo", enter=True)
        page.wait_for(".my-answer", re.compile("^Enter from Bo$"))
        page.upload(".my-upload", *files)
        page.wait_for(".my-answer", "one.md:5 two.txt:5")
        page.upload("Upload", files[1])
        page.wait_for(".my-answer", re.compile(r"^two\.txt:5$"))
        with pytest.raises(AssertionError, match="two.txt:5"):
            page.wait_for(".my-answer", "something else", timeout=0.3)
        for where in (None, ".my-answer"):
            page.screenshot(tmp_path / "shot.png", where)
            assert (tmp_path / "shot.png").read_bytes().startswith(b"\x89PNG")
        assert page.too_wide() == [] and page.troubles == []


def test_errors_and_slow_cells_are_named(browser: Browser, lab: Lab) -> None:
    lab.write(
        "slow",
        new_markdown_cell("# Slow"),
        new_code_cell("import os, time\ntime.sleep(20 * ('seen' in os.environ))"),
        new_code_cell("os.environ['seen'] = '1'"),
        new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}),
        new_code_cell("undefined", metadata={"jupyter": {"source_hidden": True}}),
        new_code_cell("print('not reached')"),
    )
    with open_notebook(browser, lab, "slow") as page:
        assert page.run_all(180) == [
            CellError(4, "ZeroDivisionError", "division by zero"),
            CellError(5, "NameError", "name 'undefined' is not defined"),
        ]
        with pytest.raises(AssertionError, match="^5 cells have not ended after 1 seconds, first .*cell 2: import os"):
            page.run_all(1)


def test_the_console_of_notebook_03_is_used_in_the_browser(browser: Browser, lab: Lab, tmp_path: Path) -> None:
    stored = nbformat.read(ROOT / "notebooks" / "03_agentos_service.ipynb", as_version=4)
    assert "servers.close()" in stored.cells[-1].source
    # Without the last cell, which ends the service; here the end of the kernel does.
    lab.write("03_agentos_service", *stored.cells[:-1])
    document = tmp_path / "parking.md"
    document.write_text("# Parking\n\nVisitors park on level 3. The barrier closes at 22:00.\n", encoding="utf-8")
    pictures = ROOT / "notebooks" / "images" if os.environ.get("UPDATE_PICTURES") else tmp_path
    with open_notebook(browser, lab, "03_agentos_service") as page:
        assert page.run_all(600) == []
        page.page.keyboard.press("Control+b")  # hides the file list
        page.type(".console-question", "For how many days are nightly backups kept?")
        page.press(".console-send")
        page.wait_for(".console-answer", "35 days")
        page.wait_for(".console-answer", "[backup-policy.pdf]")  # the end of the streamed answer
        page.wait_for(".console-sources", "backup-policy.pdf")
        page.page.locator(".knowledge-console").evaluate("console => console.scrollIntoView({block: 'start'})")
        page.screenshot(pictures / "03_console.png")  # the README's picture
        page.page.get_by_role("tab", name="Documents").click()
        page.upload(".console-upload", document)
        page.wait_for(".console-documents", re.compile(r"parking\.md [\d,]+ bytes completed"))
        page.page.get_by_role("tab", name="Chat").click()
        page.type(".console-question", "When does the barrier close?", enter=True)
        page.wait_for(".console-answer", "22:00")
        page.wait_for(".console-sources", "parking.md")
        page.page.get_by_role("tab", name="Last run").click()
        page.wait_for(".console-timeline", "search_knowledge_base")
        assert page.troubles == [] and page.too_wide() == []


def test_the_slider_of_notebook_07_shows_the_stored_runs(browser: Browser, lab: Lab) -> None:
    cells = nbformat.read(ROOT / "notebooks" / "07_index_tuning.ipynb", as_version=4).cells
    names = ("search_table(STORED)", "ipw.SelectionSlider")
    loading, slider = (next(cell for cell in cells if name in cell.source) for name in names)
    imports = "import json\nfrom pathlib import Path\n\nimport ipywidgets as ipw"
    lab.write("slider", new_code_cell(imports), new_code_cell(loading.source), new_code_cell(slider.source))
    stored = search_table(ROOT / "data" / "benchmarks" / "index.json")
    recalls = stored[(stored["kind"] == "IVF_FLAT") & (stored["nlist"] == 128) & (stored["rows"] == 10_000_000)]
    eight, sixteen = (f"{recalls.set_index('nprobe')['recall'][nprobe]:.2f}" for nprobe in (8, 16))
    assert eight != sixteen
    with open_notebook(browser, lab, "slider") as page:
        assert page.run_all(180) == []
        page.wait_for(".index-runs", re.compile(rf"10,000,000\s+{eight}"))
        page.page.get_by_role("slider").press("ArrowRight")
        page.wait_for(".index-runs", re.compile(rf"10,000,000\s+{sixteen}"))
        assert page.troubles == []


def test_the_panel_of_notebook_08_follows_a_service(
    browser: Browser, lab: Lab, tmp_path: Path, offline_environment: dict[str, str]
) -> None:
    with service(tmp_path, {**offline_environment}, progress=False) as found:
        urls = [f"{found.url}/metrics/prometheus"]
        code = (
            f"from utils.monitoring_panel import MonitoringPanel\n\npanel = MonitoringPanel({urls}, every=0.2).start()"
        )
        lab.write("panel", new_code_cell(f"{code}\npanel"))
        with open_notebook(browser, lab, "panel") as page:
            assert page.run_all(180) == []
            page.wait_for(".monitoring-panel", "completed 0,")
            form = {"message": "When does the canteen close?", "stream": "true"}
            httpx.post(f"{found.url}/agents/knowledge-assistant/runs", data=form, timeout=60)
            page.wait_for(".monitoring-panel", re.compile(r"completed 0\.\d"))
            picture = page.page.locator(".monitoring-panel img")
            assert picture.evaluate("image => image.naturalWidth") > 500
            assert page.troubles == [] and page.too_wide() == []


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_a_browser_learners_skip_and_ci_fails(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="install one of them"):
        no_browser()
