"""The course's notebooks: the list in course.toml, running and saving them, the README's table, JupyterLab."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

from utils.bootstrap import ROOT, course_environment
from utils.errors import CourseError
from utils.settings import load_settings

CELL_TIMEOUT = 300  # the longest cell takes 25 seconds alone, and four times as long on a busy machine
LOCAL_CELL_TIMEOUT = 1800  # a language model on this machine reads some 100 tokens a second
TABLE_BEGIN, TABLE_END = "<!-- path: begin (written by python3 -m utils run --save) -->", "<!-- path: end -->"
# Everything that settings read; a learner's own keys and servers must not decide what is stored or tested.
_SETTINGS = ["OPENAI_API_KEY", "OPENAI_BASE_URL", "MODEL_ID", "EMBEDDING_ID", "LOCAL_CONTEXT", "LOCAL_TOOLS"]
_SETTINGS += ["MILVUS_URI", "MILVUS_LITE_PATH", "MILVUS_TOKEN", "LARGE_DATA", "COURSE_DATA"]


@dataclass(frozen=True)
class Notebook:
    """One entry of course.toml; `number` and `name` come from its file name."""

    number: int
    name: str
    title: str
    minutes: int
    level: str
    needs: str
    works_with: str
    adds: str
    proof: str
    from_post: str


@dataclass(frozen=True)
class Result:
    """How one run went: `error` is None, or the first error in a few lines."""

    notebook: Notebook
    seconds: float
    cells: int
    error: str | None


def offline_environment() -> dict[str, str]:
    """The variables for tests and stored outputs: the offline model and Milvus Lite, whatever else is set."""
    # Empty instead of absent: an absent variable would be looked up in .env.
    # The hash seed: Agno's Document.to_dict() walks through a set of names, so that the order of the keys in what a
    # model reads, and with it the number of tokens, changes with the seed.
    return dict.fromkeys(_SETTINGS, "") | {
        "MODEL_PROVIDER": "offline",
        "AGNO_TELEMETRY": "false",
        "PYTHONHASHSEED": "0",
    }


def course(root: Path = ROOT) -> list[Notebook]:
    """The notebooks in order. Raises CourseError if course.toml is missing or an entry is wrong."""
    path = root / "notebooks" / "course.toml"
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["notebook"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise CourseError(f"notebooks/course.toml cannot be read ({error}): git checkout brings it back.") from error
    notebooks = []
    for entry in entries:
        fields = dict(entry)
        name = str(fields.pop("file", "")).removesuffix(".ipynb")
        try:
            notebooks.append(Notebook(number=int(name[:2]), name=name, **fields))
        except (TypeError, ValueError) as error:
            raise CourseError(f"Correct the entry '{name}' of notebooks/course.toml: {error}.") from error
    return notebooks


def select(wanted: Sequence[str], root: Path = ROOT) -> list[Notebook]:
    """The notebooks that numbers (2, 02) or names stand for. Raises CourseError with the list for an unknown one."""
    known = course(root)
    chosen = []
    for word in wanted:
        name = Path(word).name.removesuffix(".ipynb")
        found = [n for n in known if name in (n.name, n.name[3:]) or (name.isdecimal() and int(name) == n.number)]
        if not found:
            listed = ", ".join(n.name for n in known)
            raise CourseError(f"There is no notebook '{word}': choose from {listed}.")
        chosen += [n for n in found if n not in chosen]
    return chosen


def run_command(wanted: Sequence[str], everything: bool = False, save: bool = False, root: Path = ROOT) -> int:
    """The command `run`: run, print a table, and return 1 if a notebook failed."""
    if everything == bool(wanted):
        raise CourseError("Name the notebooks to run, for example python3 -m utils run 2, or give --all.")
    results = []
    chosen = course(root) if everything else select(wanted, root)
    for notebook in chosen:
        results.append(run_notebook(notebook, save=save, root=root))
        if error := results[-1].error:
            print(f"{notebook.name} failed: {error}", file=sys.stderr, flush=True)
    if save:
        update_readme(root)
    width = max(len(n.name) for n in chosen)
    print(f"\n{'notebook':<{width}}  seconds  cells  result")
    for r in results:
        print(f"{r.notebook.name:<{width}}  {r.seconds:7.1f}  {r.cells:5}  {'failed' if r.error else 'ok'}")
    return int(any(r.error for r in results))


def run_notebook(
    notebook: Notebook, save: bool = False, root: Path = ROOT, extra_environment: dict[str, str] | None = None
) -> Result:
    """Run one notebook from top to bottom in a kernel of its own, which has ended when this returns.

    The kernel is this Python and works in notebooks/. With `save` it runs with the offline model, and the notebook is
    stored in canonical form if no cell failed. `extra_environment` adds variables for the kernel.
    """
    path = root / "notebooks" / f"{notebook.name}.ipynb"
    if not path.is_file():
        raise CourseError(f"notebooks/{path.name} is missing: get it back with git checkout -- notebooks.")
    content = nbformat.read(path, as_version=4)
    environment = {**course_environment(root), **(offline_environment() if save else {}), **(extra_environment or {})}
    started, cells, error = time.monotonic(), 0, None
    local = load_settings(environment).provider == "local"
    client = NotebookClient(
        content,
        timeout=LOCAL_CELL_TIMEOUT if local else CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
        store_widget_state=False,
    )
    code = [
        (index, cell) for index, cell in enumerate(content.cells) if cell.cell_type == "code" and cell.source.strip()
    ]
    print(f"{notebook.name} ...", flush=True)
    with _kernel(client, environment, root / ".jupyter" / "kernel.log"):
        # disable=None: the moving line only where a terminal shows it.
        for index, cell in tqdm(code, desc="  cells", unit="cell", leave=False, disable=None):
            cells += 1
            try:
                client.execute_cell(cell, index, execution_count=cells)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
                error = _short(failure, cell, cells)
                break
    seconds = time.monotonic() - started
    print(f"  {'failed' if error else 'ok'}, {cells} cells, {seconds:.1f} s", flush=True)
    if save and error is None:
        path.write_text(canonical_text(content), encoding="utf-8", newline="\n")
    return Result(notebook, seconds, cells, error)


@contextmanager
def _kernel(client: NotebookClient, environment: dict[str, str], log_path: Path) -> Iterator[None]:
    """Start the client's kernel, and end it however the block is left (nbclient alone swallows Ctrl-C)."""
    with log_path.open("w", encoding="utf-8") as log:  # what the kernel itself says is not the learner's output
        try:
            client.create_kernel_manager().transport_encryption = "auto"
            client.start_new_kernel(env=environment, stderr=log)
            client.start_new_kernel_client()
            yield
        finally:
            client._cleanup_kernel()


def _short(failure: Exception, cell: NotebookNode, number: int) -> str:
    """An error in two or three lines: which cell, what it says."""
    first = next((line for line in cell.source.splitlines() if line.strip()), "").strip()
    if isinstance(failure, CellExecutionError):
        text = f"{failure.ename}: {failure.evalue}" if failure.ename not in failure.evalue else failure.evalue
    elif isinstance(failure, CellTimeoutError):
        text = "the cell took too long"
    else:
        text = "the kernel died (.jupyter/kernel.log holds its last words)"
    return f"cell {number} ({first[:60]})\n  " + "\n  ".join(line[:200] for line in text.strip().splitlines()[:2])


def canonical_text(content: NotebookNode) -> str:
    """The notebook's file text in the one form that is committed, so that a second save changes nothing.

    Kept: sources, outputs, tags, hidden sources. Dropped: timing, widget state, editor marks. Counts are 1..N.
    """
    content.nbformat, content.nbformat_minor = 4, 5
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    content.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    count, seen = 0, set()
    for index, cell in enumerate(content.cells):
        if not cell.get("id") or cell.id in seen:
            cell.id = f"cell-{index}"
        seen.add(cell.id)
        jupyter = {k: v for k, v in cell.metadata.get("jupyter", {}).items() if k == "source_hidden"}
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict(({"jupyter": jupyter} if jupyter else {}) | ({"tags": tags} if tags else {}))
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            # A widget's id is new in every run, and its state is not stored.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return nbformat.writes(content).rstrip("\n") + "\n"


def readme_table(notebooks: Iterable[Notebook]) -> str:
    """The README's path table, between the two comments that mark its place."""
    rows = ["| # | notebook | minutes | level | what you add | proof that it works |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {n.number:02} | [{n.title}](notebooks/{n.name}.ipynb) | {n.minutes} | {n.level} | {n.adds} | {n.proof} |"
        for n in notebooks
    ]
    return "\n".join([TABLE_BEGIN, *rows, TABLE_END])


def update_readme(root: Path = ROOT) -> None:
    """Write the table into README.md. Raises CourseError if its two comments are gone."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    place = re.compile(re.escape(TABLE_BEGIN) + ".*?" + re.escape(TABLE_END), re.DOTALL)
    if not place.search(text):
        raise CourseError(
            f"README.md has no place for its table: put the lines '{TABLE_BEGIN}' and '{TABLE_END}' there."
        )
    new = place.sub(lambda _: readme_table(course(root)), text)
    if new != text:
        path.write_text(new, encoding="utf-8", newline="\n")


def open_lab(port: int | None, browser: bool, root: Path = ROOT) -> int:
    """The command `lab`: JupyterLab on this machine only, until Ctrl-C. Raises CourseError if `port` is taken."""
    if port is not None:
        _check_port(port)
    # Its news pop-up and its look for newer versions would go to the network: both are off.
    settings = root / ".jupyter" / "config" / "labconfig" / "page_config.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.root_dir": str(root),
        "ServerApp.answer_yes": "True",
        "ServerApp.allow_root": "True",  # in a container there is often no other user
        "Application.log_level": "WARN",
        "LanguageServerManager.autodetect": "False",  # looking for servers would start npm
        "KernelManager.transport_encryption": "auto",
        "LabApp.default_url": "/lab/tree/notebooks/00_start_here.ipynb",
        "LabApp.extension_manager": "readonly",
        "LabApp.news_url": "None",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    if port is not None:
        options |= {"ServerApp.port": str(port), "ServerApp.port_retries": "0"}
    if not browser:
        options["ServerApp.open_browser"] = "False"
    from jupyterlab.labapp import LabApp

    print("Starting JupyterLab; Ctrl-C here ends it. Its address:", flush=True)
    LabApp.launch_instance([f"--{name}={value}" for name, value in options.items()])
    return 0


def _check_port(port: int) -> None:
    if not 1024 <= port <= 65535:
        raise CourseError(f"{port} is no port to use: choose one from 1024 to 65535, or leave --port out.")
    with socket.socket() as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            other = port + 1 if port < 65535 else port - 1
            raise CourseError(
                f"Port {port} is taken: choose another, for example --port {other}, or leave --port out."
            ) from error
