"""The form of every notebook in course.toml, its links, the README, and: run alone, twice, nothing is left behind.

nbval (notebooks/, first in .pytest.ini) compares the outputs; this file looks at the stored notebooks, and runs each a
second time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from typing import Any

import nbformat
import psutil
import pytest
from waiting import wait_for

from utils.__main__ import parser
from utils.bootstrap import ROOT
from utils.notebooks import Notebook, canonical_text, course, readme_table, run_notebook

FOLDER = ROOT / "notebooks"
LAST_SECTIONS = ["Try it", "In production", "Recap", "Next"]
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}
# Paths of a machine, addresses of objects, log lines, warnings, tracebacks, terminal colours.
NOISE = re.compile(
    r"(/home/|/Users/|/root/|/tmp/|/private/|/var/folders/|[A-Z]:\\)|object at 0x|Traceback \(most recent"
    r"|\w*Warning: |^\[?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b|^WARN|\x1b\[",
    re.MULTILINE,
)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
NOTEBOOKS = course()
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)


def read(notebook: Notebook) -> Any:
    return nbformat.read(FOLDER / f"{notebook.name}.ipynb", as_version=4)


def code_cells(notebook: Notebook) -> list[Any]:
    return [cell for cell in read(notebook).cells if cell.cell_type == "code"]


def prose(notebook: Notebook) -> str:
    return "\n\n".join(cell.source for cell in read(notebook).cells if cell.cell_type == "markdown")


def tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", []))


def printed(cell: Any) -> str:
    """The text a learner sees below a cell: streams, values, and what an error shows."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        texts.append(output.get("data", {}).get("text/plain", ""))
        texts.append("\n".join(output.get("traceback", [])))
    return "\n".join(text for text in texts if text)


def sections(notebook: Notebook) -> list[str]:
    without_code = re.sub(r"^```.*?^```", "", prose(notebook), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^## +(.+?) *$", without_code, re.MULTILINE)


def test_course_list_and_folder_agree() -> None:
    assert [notebook.name for notebook in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def test_course_list_is_in_order_and_complete() -> None:
    assert [n.number for n in NOTEBOOKS] == sorted({n.number for n in NOTEBOOKS})
    assert all(n.minutes > 0 and all((n.title, n.level, n.needs, n.works_with, n.adds, n.proof)) for n in NOTEBOOKS)


@each
def test_header(notebook: Notebook) -> None:
    """The first cell: title, one sentence, the table, and what the learner will be able to do."""
    first = read(notebook).cells[0]
    assert first.cell_type == "markdown"
    lines = [line.strip() for line in first.source.splitlines() if line.strip()]
    assert re.fullmatch(rf"# (\d\d\W+)?{re.escape(notebook.title)}", lines[0]), lines[0]
    assert not lines[1].startswith(("|", "#", "-")), "a sentence follows the title"
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [name.lower() for name in rows[0]] == ["time", "level", "needs", "works with"]
    assert rows[2] == [f"{notebook.minutes} minutes", notebook.level, notebook.needs, notebook.works_with]
    assert re.search(r"\*\*You will be able to\*\*.*\n(\s*[-*] .+\n?){2,}", prose(notebook))


@each
def test_sections_are_in_order(notebook: Notebook) -> None:
    found = sections(notebook)
    assert found[-len(LAST_SECTIONS) :] == LAST_SECTIONS, found
    assert len(found) > len(LAST_SECTIONS), "at least one section comes before Try it"
    assert len(set(found)) == len(found)


@each
def test_check_cells(notebook: Notebook) -> None:
    checks = [cell for cell in code_cells(notebook) if re.search(r"^\s*(check\(|assert )", cell.source, re.MULTILINE)]
    assert checks, "a notebook has Check cells"
    for cell in checks:
        assert printed(cell).strip(), f"a Check cell prints a clear line: {cell.source[:80]}"
        assert not tags(cell) & NOT_COMPARED, "what a Check cell prints is compared"


@each
def test_exercises_have_hidden_solutions_that_run(notebook: Notebook) -> None:
    cells = read(notebook).cells
    headings = [i for i, c in enumerate(cells) if c.cell_type == "markdown" and re.search("^## ", c.source, re.M)]
    start = next(i for i in headings if re.search("^## +Try it", cells[i].source, re.M))
    end = next(i for i in headings if i > start)
    text = "\n".join(cell.source for cell in cells[start:end] if cell.cell_type == "markdown")
    exercises = len(re.findall(r"^(?:### |\*\*Exercise |\d+\. )", text, re.MULTILINE))
    solutions = [cell for cell in cells if cell.cell_type == "code" and "solution" in tags(cell)]
    assert exercises >= 2 and len(solutions) >= exercises, (exercises, len(solutions))
    for cell in solutions:
        assert cell.metadata.get("jupyter", {}).get("source_hidden") is True, cell.source[:80]
        assert "nbval-skip" not in tags(cell)


@each
def test_footer_cell_ends_what_was_started(notebook: Notebook) -> None:
    last = read(notebook).cells[-1]
    assert last.cell_type == "code" and "finish(" in last.source


@each
def test_counts_and_outputs_are_those_of_one_clean_run(notebook: Notebook) -> None:
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        errors = [output.ename for output in cell.outputs if output.output_type == "error"]
        assert not errors or "raises-exception" in tags(cell), errors
        assert not [o for o in cell.outputs if o.get("name") == "stderr"], f"stderr below {cell.source[:80]}"


@each
def test_stored_file_is_canonical(notebook: Notebook) -> None:
    """As `run --save` writes it: no widget state, no timing, no editor marks."""
    text = (FOLDER / f"{notebook.name}.ipynb").read_text(encoding="utf-8")
    assert text == canonical_text(read(notebook))
    assert "widget-state" not in text


@each
def test_outputs_are_free_of_noise_and_fit_the_page(notebook: Notebook) -> None:
    for cell in code_cells(notebook):
        noise = NOISE.search(printed(cell))
        assert not noise, f"{noise and noise.group(0)!r} below {cell.source[:80]}"
        if any({"text/html", "text/markdown"} & output.get("data", {}).keys() for output in cell.outputs):
            continue  # a table, which has a width of its own: tests/test_browser.py measures it
        # What JupyterLab shows unbroken in a window of 1,280 pixels.
        long = [line for line in printed(cell).splitlines() if len(line) > 105]
        assert not long, f"over 105 characters: {long[0]}"


@each
def test_most_outputs_are_compared(notebook: Notebook) -> None:
    printing = [cell for cell in code_cells(notebook) if printed(cell).strip()]
    compared = [cell for cell in printing if not tags(cell) & NOT_COMPARED]
    assert len(compared) >= 0.6 * len(printing), f"{len(compared)} of {len(printing)}"


@each
def test_code_is_plain(notebook: Notebook) -> None:
    for cell in code_cells(notebook):
        assert not re.search(r"^\s*[%!]|getpass", cell.source, re.MULTILINE), f"magic or getpass: {cell.source[:80]}"
        assert len(cell.source.splitlines()) <= 45, f"over 45 lines: {cell.source[:80]}"
        assert not re.search(r"NBVAL_|PYTEST_VALIDATE", cell.source), "tags, not comments"


def links(text: str) -> list[str]:
    without_code = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [first or second for first, second in LINK.findall(without_code)]
    return [link for link in found if not re.match(r"(https?|mailto):|#", link)]


def images_without_alt(text: str) -> list[str]:
    markdown = re.findall(r"!\[\s*\]\([^)]*\)", text)
    return markdown + [tag for tag in re.findall(r"<img[^>]*>", text) if not re.search(r'alt="[^"]+"', tag)]


@each
def test_prose_links_resolve_and_pictures_have_alt_text(notebook: Notebook) -> None:
    text = prose(notebook)
    missing = [link for link in links(text) if not (FOLDER / link.split("#")[0]).exists()]
    assert not missing
    assert not images_without_alt(text)
    assert "data:image" not in text and "attachment:" not in text
    for cell in read(notebook).cells:
        assert "attachments" not in cell
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if any(kind.startswith("image/") for kind in output.get("data", {})):
                alt = [m.get("alt") for m in output.metadata.values() if isinstance(m, dict)]
                assert any(alt), f"a plot has alt text (display metadata): {cell.source[:80]}"


def processes_with(mark: str) -> list[psutil.Process]:
    """Every process, whoever its parent is now, that inherited the mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("COURSE_TEST_RUN") == mark:
                found.append(process)
        except psutil.Error:  # it has ended, or it is another user's
            continue
    return found


def tree() -> str:
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.notebook_run
@each
def test_run_again_alone_leaves_a_clean_tree_and_no_process(notebook: Notebook) -> None:
    """nbval's run was the first; this is the second, in a new kernel, over what the first left."""
    before, mark = tree(), uuid.uuid4().hex
    result = run_notebook(notebook, extra_environment={"COURSE_TEST_RUN": mark})
    assert result.error is None
    # A server may need a moment to notice that its owner is gone.
    assert wait_for(lambda: not processes_with(mark), 15), f"left running: {processes_with(mark)}"
    assert tree() == before


def test_process_left_behind_would_be_seen() -> None:
    mark = uuid.uuid4().hex
    sleeper = ["python3", "-c", "import subprocess as s; s.Popen(['sleep', '30'], start_new_session=True)"]
    subprocess.run(sleeper, env=os.environ | {"COURSE_TEST_RUN": mark}, check=True)
    left = processes_with(mark)
    assert [process.name() for process in left] == ["sleep"]
    left[0].kill()


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_table_is_the_course_list() -> None:
    assert readme_table(NOTEBOOKS) in readme()


def test_readme_names_commands_that_exist() -> None:
    named = re.findall(r"python3? -m utils (\w+)((?: --[\w-]+)*)", readme())
    assert {"lab", "test"} <= {command for command, _ in named}
    subcommands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for command, options in named:
        assert command in subcommands, command  # type: ignore[operator]
        known = subcommands[command]._option_string_actions  # type: ignore[index]
        assert all(option in known for option in options.split()), (command, options)


def test_readme_links_resolve_and_pictures_have_alt_text() -> None:
    missing = [link for link in links(readme()) if not (ROOT / link.split("#")[0]).exists()]
    assert not missing
    assert not images_without_alt(readme())


def measured(name: str) -> Any:
    return json.loads((ROOT / "data" / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def figures_after(question: str) -> list[int]:
    """The numbers of the README's paragraph that begins with this question, in order."""
    paragraph = readme().split(question)[1].split("\n\n")[0]
    return [int(figure) for figure in re.findall(r"(\d+)(?: %|\s+and (?=\d)|\s+seconds)", paragraph)]


def test_readme_figures_are_the_measured_ones() -> None:
    offline = measured("answers")["modes"]["reranked"]
    shown = [round(100 * offline[name]) for name in ("recall@3", "key fact", "correct refusals")]
    assert figures_after("How good is the offline model?") == shown
    models = [measured("engines")["engines"][size] for size in ("1.5B", "0.5B")]
    shown = [round(100 * figures["key fact present"]) for figures in models]
    shown += [round(figures["seconds per question"]) for figures in models]
    assert figures_after("How good are the two language models?") == shown


def test_top_level_holds_what_the_design_says() -> None:
    command = ["git", "ls-files"]  # a learner's own files beside them are no fault
    tracked = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    visible = {name for path in tracked if not (name := path.split("/")[0]).startswith(".")}
    assert visible <= {"README.md", "requirements.txt", "LICENSE", "notebooks", "data", "utils", "tests"}
